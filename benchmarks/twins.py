"""Both methods for some steps from the same checkpoint of gsscale, and how far apart they get.

    python benchmarks/twins.py --scene DIR --checkpoint FILE --marks 1 20

The same Gaussians, moments, statistics, images and random numbers: what differs is each method's
own work. At a full-size scene this finds what a comparison of whole trainings hides in their
scatter. It goes wrong from the first step on, or else grows slowly: rounding does that, as a pixel
or a gradient changes its sign.

Marks lie before the next refinement, which would leave rows in different orders.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a script: find the package, and let its modules shadow nothing
    _here = Path(__file__).resolve().parent
    sys.path[:] = [*(p for p in sys.path if Path(p).resolve() != _here), str(_here.parent)]

from rich.console import Console

from benchmarks import cli
from benchmarks import overrides as settings
from benchmarks.cli import show
from benchmarks.made_up import close_writers
from benchmarks.plan import PlanError
from benchmarks.tables import TextTable

Rows = dict[str, Any]
"""Tensors [n, ...] on the CPU: parameters and moments by group, statistics."""

CLEARLY = 0.1
"""Share of a row's own move from which its twin is called apart."""


@dataclass
class TwinsArgs:
    """Continue a gsscale training with gsscale and with splatfacto."""

    scene: Path
    """Folder with a transforms.json or with a COLMAP model in sparse/0."""
    checkpoint: Path
    """Checkpoint of gsscale: step-NNNNNNNNN.ckpt."""
    marks: tuple[int, ...] = (1, 20)
    """Steps after which the two are compared, ascending."""
    engine: str = "auto"
    """Engine of gsscale."""
    overrides: tuple[str, ...] = ()
    """Settings of the training that saved the checkpoint, as ns-train names them: NAME=VALUE.
    With a method and a colon in front, for it alone: gsscale:pipeline.model.vram-budget-gb=4."""
    dataparser_overrides: tuple[str, ...] = ()
    """Settings of its dataparser: eval-interval=4."""

    def check(self) -> None:
        """Raise on arguments that would only fail minutes later."""
        if not self.marks or sorted(set(self.marks)) != list(self.marks) or self.marks[0] < 1:
            raise PlanError("--marks takes numbers of steps, ascending, from 1 on")
        if not self.checkpoint.is_file():
            raise PlanError(f"there is no checkpoint {self.checkpoint}")


@dataclass(frozen=True)
class Apart:
    """How two trainings differ in one tensor.

    Attributes:
        mark: steps since the checkpoint.
        name: the tensor: a group, its moments, a statistic.
        difference: norm of the difference over the norm of what splatfacto changed.
        rows_apart: share of the rows that splatfacto changed whose difference exceeds
            :data:`CLEARLY` of their own change.
        never: rows that only gsscale, and that only splatfacto has changed.
    """

    mark: int
    name: str
    difference: float
    rows_apart: float
    never: tuple[int, int]


def compare(mark: int, before: Rows, ours: Rows, theirs: Rows) -> Iterator[Apart]:
    """What of ``before`` both have changed, tensor by tensor."""
    for name, start in before.items():
        if not len(start) == len(ours[name]) == len(theirs[name]):
            raise PlanError(
                f"densification has changed the rows within {mark} steps: name smaller --marks, or "
                "a checkpoint from just after a refinement"
            )
        start = start.double().flatten(1) if start.dim() > 1 else start.double()[:, None]
        mine, other = (x[name].double().reshape(start.shape) - start for x in (ours, theirs))
        apart, size = (mine - other).norm(dim=1), other.norm(dim=1)
        moved = size > 0
        yield Apart(
            mark=mark,
            name=name,
            difference=float(apart.norm() / size.norm().clamp_min(1e-300)),
            rows_apart=float((apart > CLEARLY * size)[moved].double().mean()) if moved.any() else 0,
            never=(int((apart > 0)[~moved].sum()), int((moved & (mine.norm(dim=1) == 0)).sum())),
        )


def continued(
    args: TwinsArgs, method: str, folder: Path, at_mark: Callable[[int, Rows], None]
) -> None:
    """Train ``method`` from the checkpoint; ``at_mark(0, ...)`` is told of its beginning."""
    from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackLocation

    from benchmarks import cpu_splatfacto, ns_config
    from benchmarks.offline import ensure_lpips_backbone
    from gsscale_nerfstudio import checkpoint
    from gsscale_nerfstudio.random_state import restore_random_state
    from gsscale_nerfstudio.trainer import RESUME

    config = ns_config.parse(
        ns_config.train_arguments(
            method=method,
            scene=args.scene,
            steps=args.marks[-1],
            seed=0,
            engine=args.engine if method == "gsscale" else None,
            overrides=settings.for_method(list(args.overrides), method),
            dataparser_overrides=list(args.dataparser_overrides),
            output_dir=folder,
        )
    )
    config.load_checkpoint = args.checkpoint
    ensure_lpips_backbone(folder)
    if method == "splatfacto" and config.machine.device_type == "cpu":
        cpu_splatfacto.let_it_run()
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    ns_config.write_no_checkpoint(trainer)
    if method == "splatfacto":
        state = checkpoint.load(args.checkpoint).get(RESUME)
        if state is None:
            raise PlanError(f"{args.checkpoint} is no checkpoint of gsscale")
        _go_on_like_gsscale(trainer, state["pipeline"])
        restore_random_state(state["random"], trainer.device)
    at_mark(0, rows_of(trainer))

    def after_step(step: int) -> None:
        done = step + 1 - trainer._start_step
        if done in args.marks:
            at_mark(done, rows_of(trainer))

    trainer.callbacks.append(
        TrainingCallback([TrainingCallbackLocation.AFTER_TRAIN_ITERATION], after_step)
    )
    trainer.train()


def _go_on_like_gsscale(trainer: Any, state: dict[str, Any]) -> None:
    """Let splatfacto have what a checkpoint of gsscale has beside Nerfstudio's entries."""
    model, data = trainer.pipeline.model, trainer.pipeline.datamanager
    for name, parameter in model.gauss_params.items():
        # Loading made new parameters, and the optimizers still have the old (nerfstudio #3554).
        optimizer = trainer.optimizers.optimizers[name]
        (old,) = optimizer.param_groups[0]["params"]
        moments = optimizer.state.pop(old)
        optimizer.param_groups[0]["params"] = [parameter]
        optimizer.state[parameter] = {
            key: value if key == "step" else value.to(parameter) for key, value in moments.items()
        }
    statistics = state["engine"]["store"]["statistics"]
    for ours, theirs in (("grad2d", "grad2d"), ("count", "count"), ("max_radius", "radii")):
        model.strategy_state[theirs] = statistics[ours].to(model.device)
    images = state["datamanager"]
    data.train_unseen_cameras = [*images["queue"], *images["first_epoch"]]
    data.random_generator.setstate(images["generator"])


def rows_of(trainer: Any) -> Rows:
    """The Gaussians of either method, settled, in copies."""
    from gsscale_nerfstudio.store import GROUPS

    model, rows = trainer.pipeline.model, {}
    for name in GROUPS:
        rows[name] = model.gauss_params[name].detach().cpu().clone()
        state = trainer.optimizers.optimizers[name].state_dict()["state"][0]
        rows[f"exp_avg of {name}"] = state["exp_avg"].cpu().clone().float()
        rows[f"exp_avg_sq of {name}"] = state["exp_avg_sq"].cpu().clone().float()
    if hasattr(model, "engine"):
        statistics = model.engine.store.resume_state()["statistics"]
        statistics["radii"] = statistics.pop("max_radius")
    else:
        statistics = model.strategy_state
    return rows | {name: statistics[name].cpu().clone() for name in ("grad2d", "count", "radii")}


def measure(args: TwinsArgs, console: Console) -> list[Apart]:
    """Train both, print the table."""
    args.check()
    ours: dict[int, Rows] = {}
    found: list[Apart] = []

    def compare_with_ours(mark: int, rows: Rows) -> None:
        if mark > 0:
            found.extend(compare(mark, ours[0], ours.pop(mark), rows))
        elif any(not ours[0][name].equal(rows[name].reshape(ours[0][name].shape)) for name in rows):
            raise PlanError("the two did not begin with the same rows")

    with tempfile.TemporaryDirectory(prefix="gsscale-twins-") as folder:
        try:
            continued(args, "gsscale", Path(folder), ours.__setitem__)
            continued(args, "splatfacto", Path(folder), compare_with_ours)
        finally:
            close_writers()
    show(table(found), console)
    return found


def table(found: list[Apart]) -> TextTable:
    """One row a mark and tensor."""
    columns = ["after", "what", "difference", "rows apart", "only gsscale", "only splatfacto"]
    return TextTable(
        columns,
        [
            [
                str(one.mark),
                one.name,
                f"{one.difference:.1e}",
                f"{one.rows_apart:.2%}",
                *(f"{n:,}" for n in one.never),
            ]
            for one in found
        ],
    )


def main() -> int:
    """The command line. Exit status 2 when the two could not be compared."""
    return cli.run(TwinsArgs, __doc__, measure)


if __name__ == "__main__":
    sys.exit(main())
