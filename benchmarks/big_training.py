"""A training of any size: a scene's images, made-up rows, one refinement, evaluation, checkpoint.

python benchmarks/big_training.py --scene DIR --rows 1e8 --steps 300 --cap-gb 24 --work DIR

What comes out is no picture of anything. Whether it comes to an end, in how much memory and in what
time, does not depend on that.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, field
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
from benchmarks.made_up import MadeUpArgs, Stopwatch, close_writers, make_trainer, make_up
from benchmarks.plan import PlanError
from benchmarks.step_table import gb, text
from benchmarks.tables import TextTable, describe_machine
from benchmarks.turns import Turns

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


LEGEND = """\
it/s leave out refinement and checkpoint; the seconds of training are with them. The rest is said in
[A training of 100 M](scale.md#a-training-of-100-m)."""


@dataclass
class BigTrainingArgs(MadeUpArgs):
    """Train a large number of made-up Gaussians.

    max-gaussians is 1.02 times the rows unless one of the overrides says otherwise.
    """

    work: Path = field(kw_only=True)
    """Folder for the checkpoint, which is deleted at the end: 720 bytes for each Gaussian, 484 with
    moments of 16 bits."""
    steps: int = 300
    """Training steps; Gaussians are refined after two thirds of them."""

    def check(self) -> None:
        """Raise on arguments that would only fail minutes later."""
        super().check()
        if self.steps < 6:
            raise PlanError("--steps must be at least 6")

    def own_settings(self) -> list[str]:
        """One refinement that adds a few rows."""
        model, third = "pipeline.model", self.steps // 3
        refinement = [f"{model}.warmup-length={third}", f"{model}.refine-every={third}"]
        return [*refinement, f"{model}.max-gaussians={int(GROWTH * self.rows)}"]


def train(args: BigTrainingArgs, work: Path, console: Console) -> dict[str, Any]:
    """Do all of it in this process, with files in ``work``. Returns what was measured."""
    import torch

    from benchmarks import images
    from benchmarks.host_memory import peak_host_bytes

    cuda = torch.cuda.is_available()
    trainer = make_trainer(args, args.steps, work)
    model = trainer.pipeline.model
    if not any(model.strategy.changes_rows(step) for step in range(1, args.steps)):
        least = 3 * (model.num_train_data + 1)
        raise PlanError(f"there is no refinement in {args.steps} steps; let --steps be {least}")
    watch = Stopwatch()
    scene = make_up(trainer, args, watch)
    console.print(f"made {int(args.rows):,} rows under {len(scene.cameras):,} cameras")
    rows, largest_file, before_saving = model.num_points, 0, 0

    turns = None if args.turns is None else Turns(args.turns)
    if turns is not None:
        turns.alone()  # rows were made beside the others
    save = trainer.save_checkpoint

    def save_and_measure(step: int) -> None:
        nonlocal largest_file, before_saving
        before_saving = before_saving or peak_host_bytes()
        if turns is not None:
            turns.together()  # what comes now is not the GPU's
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
        "command": args.command("big_training.py", "--work", "DIR", "--steps", args.steps),
        **measured,
        "peak_host_anonymous_bytes": anonymous.bytes,
    }
    results.write_report(path, report)
    say(describe_machine(machine), console)
    show(table(report), console)
    console.print(f"written to {escape(str(path))}")


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
