"""How a training step changes with the number of rows, and how many a card can train.

python benchmarks/scale.py --scene DIR --rows 2e6 4e6 8e6 --cap-gb 8 --methods splatfacto

Steps of ``step.py`` at one number of rows after the other. A method that runs out of memory is not
asked for more rows.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a script: find the package, and let its modules shadow nothing
    _here = Path(__file__).resolve().parent
    sys.path[:] = [*(p for p in sys.path if Path(p).resolve() != _here), str(_here.parent)]

from rich.console import Console
from rich.markup import escape

from benchmarks import cli, results
from benchmarks import machine as machine_info
from benchmarks.children import Outcome, run_all
from benchmarks.cli import say, show
from benchmarks.plan import PlanError
from benchmarks.sharing import SharedGpu
from benchmarks.step import Command, StepArgs, child_command
from benchmarks.step_table import gb, text
from benchmarks.tables import MISSING, TextTable, describe_machine

KIND = "scale"
LEGEND = """\
ms: median of a step. visible: rows of a view. host: milliseconds of a step in which CPU threads
settled and stepped rows, culled, and admitted rows to the cache; they overlap with the GPU's work.
missed: share of a view's rows that crossed the link. GPU GB, reserved, host GB: peaks of a
training, 10^9 bytes."""
OFF_BY = 0.25
"""How far views may be off what --visible-rows asks for, as a share of it."""
HOST_WORK = ("step_s", "gather_s", "cull_s", "spheres_s", "admit_s", "expect_s")
"""Counters of the engines that are time of the CPU's."""


@dataclass
class ScaleArgs(SharedGpu):
    """Measure the training step of several methods at several numbers of rows."""

    scene: Path
    """Folder with a transforms.json or with a COLMAP model in sparse/0; it needs a point cloud."""
    rows: tuple[float, ...]
    """Numbers of Gaussians, ascending: 1e6 3e6."""
    visible_rows: float | None = None
    """Gaussians that a view sees on average, whatever their number; what a number of tiles cannot
    give within a quarter is refused. Unset: --visible decides."""
    visible: float = 0.08
    """Share of the Gaussians that a view sees on average."""
    methods: tuple[str, ...] = ("gsscale-host", "gsscale-resident")
    """As those of step.py."""
    steps: int = 100
    """Timed steps."""
    warmup: int = 30
    """Steps before them."""
    seed: int = 42
    """Seed of the rows and of the order of views."""
    overrides: tuple[str, ...] = ()
    """Settings for every method, as ns-train names them; splatfacto:NAME=VALUE for one alone."""
    dataparser_overrides: tuple[str, ...] = ()
    """Settings of the dataparser: eval-interval=4."""
    output: Path | None = None
    """File to write. Default: docs/results/scale-SCENE-DATE.json."""
    commit: str | None = None
    """What is measured, where git can't tell. Default: $GSSCALE_COMMIT, then git."""
    timeout: float | None = None
    """Seconds after which a run is ended and recorded as failed."""
    logs: Path = field(default_factory=lambda: Path("outputs/benchmarks"))
    """Folder for the logs."""

    def steps_at(self, rows: float) -> StepArgs:
        """The step benchmark at a number of rows."""
        share = self.visible
        if self.visible_rows is not None:
            share = min(1.0, self.visible_rows / rows)
        return StepArgs(
            scene=self.scene,
            rows=int(rows),
            visible=share,
            methods=self.methods,
            cap_gb=self.cap_gb,
            turns=self.turns,
            cuda_gb=self.cuda_gb,
            steps=self.steps,
            warmup=self.warmup,
            seed=self.seed,
            overrides=self.overrides,
            dataparser_overrides=self.dataparser_overrides,
            output=self.output,
            commit=self.commit,
            timeout=self.timeout,
            logs=self.logs / f"rows-{int(rows)}",
        )

    def check(self) -> None:
        """Raise on arguments that would only fail minutes later."""
        if not self.rows or list(self.rows) != sorted(self.rows):
            raise PlanError("--rows takes at least one number of Gaussians, ascending")
        if self.visible_rows is not None and not self.visible_rows > 0:
            raise PlanError(f"--visible-rows must be positive, not {self.visible_rows}")
        for rows in self.rows:
            self.steps_at(rows).check()

    def command(self) -> str:
        """The call to do the same again; folders of this machine are left out."""
        words = ["python", "benchmarks/scale.py", "--scene", self.scene.resolve().name]
        words += ["--rows", *(f"{rows:g}" for rows in self.rows)]
        if self.visible_rows is None:
            words += ["--visible", str(self.visible)]
        else:
            words += ["--visible-rows", f"{self.visible_rows:g}"]
        words += ["--methods", *self.methods]
        words += self.sharing_words(recorded=True)
        words += ["--steps", str(self.steps), "--warmup", str(self.warmup)]
        words += ["--seed", str(self.seed)]
        words += ["--overrides", *self.overrides] if self.overrides else []
        if self.dataparser_overrides:
            words += ["--dataparser-overrides", *self.dataparser_overrides]
        return shlex.join(words)


def check_visible_rows(args: ScaleArgs) -> None:
    """See that views will see as many rows as are asked for, at every number of rows.

    A scene is repeated a whole number of times, and one tile may already be less than that.

    Raises:
        PlanError: they would see others than asked for by more than a quarter.
    """
    if args.visible_rows is None:
        return
    from benchmarks import fixed_rows, ns_config

    arguments = ns_config.train_arguments(
        method="gsscale",
        scene=args.scene,
        steps=args.steps,
        seed=args.seed,
        engine=None,
        overrides=[],
        dataparser_overrides=list(args.dataparser_overrides),
        output_dir=args.logs,  # nothing is written there
    )
    split = fixed_rows.train_split(ns_config.parse(arguments))
    for rows in args.rows:
        share = args.steps_at(rows).visible
        seen = rows * fixed_rows.fit(split, int(rows), share, args.seed).visible_share
        if abs(seen / args.visible_rows - 1) > OFF_BY:
            raise PlanError(
                f"of {rows:,.0f} rows a view sees {seen:,.0f} at best, not --visible-rows "
                f"{args.visible_rows:g}: the scene is repeated a whole number of times; let it be "
                f"{seen:.2g}, or leave this number out of --rows"
            )


def measure(args: ScaleArgs, console: Console, command: Command | None = None) -> int:
    """Run, write the file, print the table. Returns how many runs failed but for memory."""
    args.check()
    check_visible_rows(args)
    scene = args.scene.resolve().name
    path = args.output or results.new_path(f"scale-{scene}")
    report: dict[str, Any] = {
        "kind": KIND,
        "scene": scene,
        "cap_gb": args.cap_gb,
        "steps": args.steps,
        "warmup": args.warmup,
        "machine": machine_info.describe_apart(),
        "commit": machine_info.commit(args.commit),
        "command": args.command(),
        "runs": [],
    }
    going = list(dict.fromkeys(args.methods))
    for rows in args.rows:
        steps = args.steps_at(rows)
        names = {steps.spec(name): name for name in going}

        def on_done(outcome: Outcome, steps: StepArgs = steps, names: Any = names) -> None:
            report["runs"].append(
                {"method": names[outcome.spec], "rows": steps.rows, **outcome.measured}
            )
            results.write_report(path, report)

        run_all(
            specs=list(names),
            command=command or child_command(steps),
            folder=steps.logs,
            steps=args.steps,
            parallel=1,
            timeout=args.timeout,
            console=console,
            on_done=on_done,
        )
        failed = {run["method"] for run in report["runs"] if "error" in run}
        going = [name for name in going if name not in failed]
    say(describe_machine(report["machine"]), console)
    show(table(report), console)
    say(LEGEND, console)
    console.print(f"written to {escape(str(path))}")
    errors = [run["error"] for run in report["runs"] if "error" in run]
    return sum(not _of_memory(error) for error in errors)


def table(report: dict[str, Any]) -> TextTable:
    """One row a run."""
    columns = ["method", "rows", "ms", "visible", "host", "missed", "GPU GB", "reserved", "host GB"]
    lines = []
    for run in report["runs"]:
        if "error" in run:
            lines.append([run["method"], f"{run['rows']:,}", failure(run)] + [MISSING] * 6)
            continue
        work = host_work(run)
        lines.append(
            [
                run["method"],
                f"{run['rows']:,}",
                text(run["ms_median"], "{:.2f}"),
                text(run["visible_rows"], "{:,.0f}"),
                text(1e3 * work if work else None, "{:.1f}"),
                text(missed(run), "{:.0%}"),
                *(text(gb(run[f"peak_{what}_bytes"]), "{:.2f}") for what in _PEAKS),
            ]
        )
    return TextTable(columns, lines)


_PEAKS = ("gpu_allocated", "gpu_reserved", "host")


def host_work(run: dict[str, Any]) -> float | None:
    """Seconds of a step in which CPU threads were at work; None if nothing was counted."""
    counters = run["counters"] or {}
    return sum(counters.get(name, 0.0) for name in HOST_WORK) or None


def missed(run: dict[str, Any]) -> float | None:
    """Share of a view's rows that crossed the link."""
    counters = run["counters"] or {}
    return counters["rows_missed"] / counters["rows"] if counters.get("rows") else None


def failure(run: dict[str, Any]) -> str:
    """Why a run has no figures, in a word or three."""
    return "out of memory" if _of_memory(run["error"]) else "failed"


def _of_memory(error: str) -> bool:
    return "out of memory" in error.lower()


def main() -> int:
    """The command line. Exit status 1 when a run failed, 2 when nothing was started."""
    return cli.run(ScaleArgs, __doc__, measure)


if __name__ == "__main__":
    sys.exit(main())
