"""A training of any size: a scene's images, made-up rows, one refinement, evaluation, checkpoint.

python benchmarks/big_training.py --scene DIR --rows 1e8 --steps 300 --cap-gb 24 --work DIR

The rows are those of ``step.py``, and so are the views: the scene's cameras over every tile, each
with its own image. What comes out is no picture of anything. Whether it comes to an end, in how
much memory and in what time, does not depend on that.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

if __name__ == "__main__":  # as a script: find the package, and let its modules shadow nothing
    _here = Path(__file__).resolve().parent
    sys.path[:] = [*(p for p in sys.path if Path(p).resolve() != _here), str(_here.parent)]

from rich.console import Console
from rich.markup import escape

from benchmarks import cli, results
from benchmarks import machine as machine_info
from benchmarks.cli import say, show
from benchmarks.host_memory import AnonymousPeak
from benchmarks.plan import PlanError
from benchmarks.scene import dataparser_arguments
from benchmarks.step_table import gb, text
from benchmarks.tables import TextTable, describe_machine

KIND = "big training"
GROWTH = 1.02
"""Rows that there may be in the end, as a multiple of those that were made. A refinement would add
as many as the gradients of nonsense ask for: tens of GB."""
PEAKS = {
    "peak_host_before_checkpoint_bytes": "host memory before the checkpoint",
    "peak_host_anonymous_bytes": "host memory without files, all the time",
    "peak_host_bytes": "host memory, with the checkpoint's file as far as it is mapped",
    "peak_gpu_allocated_bytes": "GPU memory allocated",
    "peak_gpu_reserved_bytes": "GPU memory reserved",
}
"""Bytes, and what they are called in the table. A checkpoint is written through a mapping: its
pages count as resident, though the system takes them back when it needs them."""


@dataclass
class BigTrainingArgs:
    """Train a large number of made-up Gaussians."""

    scene: Path
    """Folder with a transforms.json or with a COLMAP model in sparse/0; it needs a point cloud."""
    rows: float
    """Number of Gaussians: 1e8."""
    work: Path
    """Folder for the checkpoint, which is deleted at the end: 720 bytes for each Gaussian, 484 with
    moments of 16 bits."""
    visible: float = 0.05
    """Share of them that a view sees on average, at most."""
    steps: int = 300
    """Training steps; Gaussians are refined after two thirds of them."""
    engine: str = "auto"
    """Engine of gsscale."""
    cap_gb: float | None = None
    """GPU memory that this process may have in all, as on a card of this size."""
    seed: int = 42
    """Seed of rows and training."""
    overrides: tuple[str, ...] = ()
    """Settings as ns-train names them: NAME=VALUE. max-gaussians is 1.02 times the rows unless one
    of these says otherwise."""
    dataparser_overrides: tuple[str, ...] = ()
    """Settings of the dataparser: eval-interval=4."""
    output: Path | None = None
    """File to write. Default: docs/results/big-training-SCENE-ROWS-DATE.json."""
    commit: str | None = None
    """What is measured, where git can't tell. Default: $GSSCALE_COMMIT, then git."""

    def check(self) -> None:
        """Raise on arguments that would only fail minutes later."""
        if self.rows < 1 or self.steps < 6:
            raise PlanError("--rows must be at least 1, --steps at least 6")
        if self.output is not None and self.output.exists():
            raise PlanError(f"{self.output} exists: name another --output")
        dataparser_arguments(self.scene, list(self.dataparser_overrides))

    def settings(self) -> list[str]:
        """All settings: full resolution, all SH bands, one refinement that adds a few rows, then
        the user's."""
        model, third = "pipeline.model", self.steps // 3
        fixed = [f"{model}.num-downscales=0", f"{model}.sh-degree-interval=1"]
        fixed += [f"{model}.warmup-length={third}", f"{model}.refine-every={third}"]
        fixed.append(f"{model}.max-gaussians={int(GROWTH * self.rows)}")
        if self.cap_gb is not None:
            fixed.append(f"{model}.vram-budget-gb={self.cap_gb}")
        return [*fixed, *self.overrides]

    def command(self) -> str:
        """The call to do the same again; folders of this machine are left out."""
        words = ["python", "benchmarks/big_training.py", "--scene", self.scene.resolve().name]
        words += ["--rows", f"{self.rows:g}", "--work", "DIR", "--visible", str(self.visible)]
        words += ["--steps", str(self.steps), "--engine", self.engine, "--seed", str(self.seed)]
        words += ["--cap-gb", str(self.cap_gb)] if self.cap_gb is not None else []
        words += ["--overrides", *self.overrides] if self.overrides else []
        if self.dataparser_overrides:
            words += ["--dataparser-overrides", *self.dataparser_overrides]
        return shlex.join(words)


class Stopwatch:
    """Seconds by what they went into."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def over(self, name: str) -> Iterator[None]:
        """Add what happens inside."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, timed."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.over(name):
                return function(*args, **kwargs)

        return call


def train(args: BigTrainingArgs, work: Path, console: Console) -> dict[str, Any]:
    """Do all of it in this process, with files in ``work``. Returns what was measured."""
    import torch
    from nerfstudio.scripts import train as ns_train

    from benchmarks import fixed_rows, flight, images, ns_config
    from benchmarks.host_memory import peak_host_bytes
    from benchmarks.memory_cap import cap_gpu_memory
    from benchmarks.offline import ensure_lpips_backbone
    from benchmarks.step_methods import fill_store

    cuda = torch.cuda.is_available()
    if args.cap_gb is not None:
        cap_gpu_memory(args.cap_gb)
    config = ns_config.parse(
        ns_config.train_arguments(
            method="gsscale",
            scene=args.scene,
            steps=args.steps,
            seed=args.seed,
            engine=args.engine,
            overrides=args.settings(),
            dataparser_overrides=list(args.dataparser_overrides),
            output_dir=work,
        )
    )
    config.save_config()
    ensure_lpips_backbone(work)
    ns_train._set_random_seed(args.seed)
    watch = Stopwatch()
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    model = trainer.pipeline.model
    if not any(model.strategy.changes_rows(step) for step in range(1, args.steps)):
        least = 3 * (model.num_train_data + 1)
        raise PlanError(f"there is no refinement in {args.steps} steps; let --steps be {least}")
    if model.camera_optimizer.config.mode != "off" or model.config.use_bilateral_grid:
        raise PlanError(
            "poses and bilateral grids are those of the scene's images, and there are more views; "
            "leave camera-optimizer.mode and use-bilateral-grid out"
        )
    data = trainer.pipeline.datamanager
    with watch.over("reading images"):
        split = flight.images_in_memory(data)
    with watch.over("making rows"):
        degree = model.config.sh_degree
        scene = fixed_rows.fit(split, int(args.rows), args.visible, args.seed, degree)
        fill_store(model.engine, scene.rows)
    flight.fly_over(data, split, scene.cameras)
    console.print(f"made {int(args.rows):,} rows under {len(scene.cameras):,} cameras")
    rows, largest_file, before_saving = model.num_points, 0, 0

    save = trainer.save_checkpoint

    def save_and_measure(step: int) -> None:
        nonlocal largest_file, before_saving
        before_saving = before_saving or peak_host_bytes()
        with watch.over("checkpoint"):
            save(step)
        sizes = [path.stat().st_size for path in trainer.checkpoint_dir.glob("*.ckpt")]
        largest_file = max([largest_file, *sizes])

    trainer.save_checkpoint = save_and_measure
    model.strategy.refine = watch.timed("refinement", model.strategy.refine)
    with watch.over("training"):
        trainer.train()
        if cuda:
            torch.cuda.synchronize()
    counters = {name: float(value) for name, value in model.engine.counters.items()}
    with watch.over("evaluation"):
        views = images.metrics_of_views(trainer.pipeline)
    stepping = sum(watch.seconds[name] for name in ("refinement", "checkpoint"))
    return {
        "rows": rows,
        "rows_after": model.num_points,
        "tiles": scene.rows.tiles,
        "views": len(scene.cameras),
        "planned_visible_share": scene.visible_share,
        "evaluated_views": len(views),
        "psnr": fmean(view["psnr"] for view in views),
        "it_per_s": args.steps / (watch.seconds["training"] - stepping),
        "seconds": watch.seconds,
        "checkpoint_bytes": largest_file,
        "counters": counters,
        "hit_rate": 1 - counters["rows_missed"] / counters["rows"],
        "peak_host_before_checkpoint_bytes": before_saving,
        "peak_host_bytes": peak_host_bytes(),
        "peak_gpu_allocated_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "peak_gpu_reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None,
    }


def measure(args: BigTrainingArgs, console: Console) -> None:
    """Train, write the file, print the table."""
    args.check()
    scene = args.scene.resolve().name
    path = args.output or results.new_path(f"big-training-{scene}-{int(args.rows)}")
    machine, commit = machine_info.describe_apart(), machine_info.commit(args.commit)
    args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gsscale-big-", dir=args.work) as work:
        try:
            with AnonymousPeak() as anonymous:
                measured = train(args, Path(work), console)
        finally:
            close_writers()
    report = {
        "kind": KIND,
        "scene": scene,
        "steps": args.steps,
        "cap_gb": args.cap_gb,
        "machine": machine,
        "commit": commit,
        "command": args.command(),
        **measured,
        "peak_host_anonymous_bytes": anonymous.bytes,
    }
    results.write_report(path, report)
    say(describe_machine(machine), console)
    show(table(report), console)
    console.print(f"written to {escape(str(path))}")


def close_writers() -> None:
    """Let go of TensorBoard's file, which Nerfstudio keeps open as long as the process lives."""
    from nerfstudio.utils import writer

    for each in writer.EVENT_WRITERS:
        if isinstance(each, writer.TensorboardWriter):
            each.tb_writer.close()
    writer.EVENT_WRITERS.clear()


def table(report: dict[str, Any]) -> TextTable:
    """One line a figure."""
    written = report["checkpoint_bytes"] / report["seconds"]["checkpoint"]
    lines = [
        ["Gaussians, before and after", f"{report['rows']:,}, {report['rows_after']:,}"],
        ["views, of how many tiles", f"{report['views']:,}, {report['tiles']:,}"],
        ["it/s, without refinement and checkpoint", text(report["it_per_s"], "{:.2f}")],
        ["hit rate: rows of a view that were at hand", text(report["hit_rate"], "{:.0%}")],
        *([f"s for {name}", text(s, "{:.1f}")] for name, s in report["seconds"].items()),
        ["checkpoint, GB and GB/s", f"{report['checkpoint_bytes'] / 1e9:.2f}, {written / 1e9:.2f}"],
        *([f"{name}, GB", text(gb(report[key]), "{:.2f}")] for key, name in PEAKS.items()),
    ]
    return TextTable(["what", "how much"], lines)


def main() -> int:
    """The command line. Exit status 2 when nothing was started."""
    return cli.run(BigTrainingArgs, __doc__, measure)


if __name__ == "__main__":
    sys.exit(main())
