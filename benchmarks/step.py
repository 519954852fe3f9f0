"""A training step at a fixed number of Gaussians: time, memory, and what they consist of.

    python benchmarks/step.py --scene DIR --rows 20000000 --visible 0.08 --budget-gb 8

Every method runs in a process of its own, one after the other, on the same made-up rows
(``fixed_rows.py``), in the same order of views, with a random image as the truth. The file in
``docs/results/`` is written after each method.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # as a script: find the package, and let its modules shadow nothing
    _here = Path(__file__).resolve().parent
    sys.path[:] = [*(p for p in sys.path if Path(p).resolve() != _here), str(_here.parent)]

from rich.console import Console
from rich.markup import escape

from benchmarks import cli, overrides, results, step_table
from benchmarks import machine as machine_info
from benchmarks.children import Files, Outcome, run_all, tail
from benchmarks.plan import PlanError, RunSpec
from benchmarks.scene import dataparser_arguments
from benchmarks.sharing import SharedGpu

KIND = "step"
CHILD = Path(__file__).resolve().with_name("step_child.py")
METHODS: dict[str, tuple[str, str | None]] = {
    "splatfacto": ("splatfacto", None),
    "gsplat": ("gsplat", None),
    "gsscale-host": ("gsscale", "host"),
    "gsscale-resident": ("gsscale", "resident"),
    "gsscale-auto": ("gsscale", "auto"),
}
"""Names on the command line: the method and its engine."""
NEED_CUDA = ("splatfacto", "gsplat")


@dataclass
class StepArgs(SharedGpu):
    """Measure the training step of several methods at a fixed number of rows."""

    scene: Path
    """Folder with a transforms.json or with a COLMAP model in sparse/0; it needs a point cloud."""
    rows: int
    """Number of Gaussians."""
    visible: float = 0.08
    """Share of them that a view sees on average; the scene is tiled until it is at most 1.15 times
    this."""
    methods: tuple[str, ...] = ("splatfacto", "gsplat", "gsscale-host", "gsscale-resident")
    """splatfacto, gsplat, gsscale-host, gsscale-resident, gsscale-auto; in the order of running."""
    budget_gb: float | None = None
    """GPU memory that gsscale may use (--pipeline.model.vram-budget-gb). Unset: the cap, if there
    is one, or the default."""
    steps: int = 60
    """Timed steps."""
    warmup: int = 30
    """Steps before them; enough to fill the cache of the resident engine."""
    seed: int = 42
    """Seed of the rows and of the order of views."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where to train. Methods that need a GPU are skipped on the CPU."""
    overrides: tuple[str, ...] = ()
    """Settings for every method, as ns-train names them; splatfacto:NAME=VALUE for one alone."""
    dataparser_overrides: tuple[str, ...] = ()
    """Settings of the dataparser: eval-interval=4."""
    output: Path | None = None
    """File to write. Default: docs/results/step-SCENE-ROWS-DATE.json."""
    commit: str | None = None
    """What is measured, where git can't tell. Default: $GSSCALE_COMMIT, then git."""
    timeout: float | None = None
    """Seconds after which a method is ended and recorded as failed."""
    logs: Path = field(default_factory=lambda: Path("outputs/benchmarks"))
    """Folder for the methods' logs."""

    def check(self) -> None:
        """Raise on arguments that would only fail minutes later."""
        strangers = [name for name in self.methods if name not in METHODS]
        if strangers or not self.methods:
            raise PlanError(f"--methods takes {', '.join(METHODS)}, not {strangers or 'nothing'}")
        if self.rows < 1 or self.steps < 1 or self.warmup < 0:
            raise PlanError("--rows and --steps must be at least 1, --warmup at least 0")
        if not 0 < self.visible <= 1:
            raise PlanError(f"--visible is a share, above 0 and at most 1, not {self.visible}")
        for name, gigabytes in (("budget", self.budget_gb), ("cap", self.cap_gb)):
            if gigabytes is not None and not gigabytes > 0:
                raise PlanError(f"--{name}-gb must be positive, not {gigabytes}")
        self.check_sharing()
        if self.cap_gb is not None and self.device == "cpu":
            raise PlanError("--cap-gb is of a GPU's memory; leave it out with --device cpu")
        if self.output is not None and self.output.exists():
            raise PlanError(f"{self.output} exists: name another --output")
        known = {method for method, _ in METHODS.values()}
        strange = overrides.targets(list(self.overrides)) - known
        if strange:
            raise PlanError(f"a setting is meant for {', '.join(sorted(strange))}: no such method")
        dataparser_arguments(self.scene, list(self.dataparser_overrides))

    def spec(self, name: str) -> RunSpec:
        """The run of a method."""
        method, engine = METHODS[name]
        settings = overrides.for_method(list(self.overrides), method)
        budget = self.cap_gb if self.budget_gb is None else self.budget_gb
        if engine is not None and budget is not None:
            settings.append(f"pipeline.model.vram-budget-gb={budget}")
        return RunSpec(method, engine, self.seed, tuple(settings))

    def command(self) -> str:
        """The call to do the same again; folders of this machine are left out."""
        words = ["python", "benchmarks/step.py", "--scene", self.scene.resolve().name]
        words += ["--rows", str(self.rows), "--visible", str(self.visible)]
        words += ["--methods", *self.methods]
        words += ["--budget-gb", str(self.budget_gb)] if self.budget_gb is not None else []
        words += self.sharing_words(recorded=True)
        words += ["--steps", str(self.steps), "--warmup", str(self.warmup)]
        words += ["--seed", str(self.seed), "--device", self.device]
        words += ["--overrides", *self.overrides] if self.overrides else []
        if self.dataparser_overrides:
            words += ["--dataparser-overrides", *self.dataparser_overrides]
        return shlex.join(words)


Command = Callable[[RunSpec, Files], list[str]]


def child_command(args: StepArgs) -> Command:
    """What starts a method: ``step_child.py`` with the same interpreter."""

    def command(spec: RunSpec, files: Files) -> list[str]:
        words = [sys.executable, str(CHILD), "--method", spec.method, "--scene", str(args.scene)]
        words += ["--engine", spec.engine] if spec.engine else []
        words += ["--rows", str(args.rows), "--visible", str(args.visible)]
        words += ["--steps", str(args.steps), "--warmup", str(args.warmup)]
        words += ["--seed", str(args.seed), "--device", args.device]
        words += args.sharing_words(recorded=False)
        words += ["--result", str(files.result), "--progress", str(files.progress)]
        words += ["--scratch", str(args.logs / "placeholder")]
        words += ["--overrides", *spec.overrides] if spec.overrides else []
        if args.dataparser_overrides:
            words += ["--dataparser-overrides", *args.dataparser_overrides]
        return words

    return command


def measure(args: StepArgs, console: Console, command: Command | None = None) -> int:
    """Run the methods, write the file, print the tables. Returns how many methods failed."""
    args.check()
    scene = args.scene.resolve().name
    path = args.output or results.new_path(f"step-{scene}-{args.rows}")
    report: dict[str, Any] = {
        "kind": KIND,
        "scene": scene,
        "rows": args.rows,
        "visible": args.visible,
        "budget_gb": args.budget_gb,
        "cap_gb": args.cap_gb,
        "steps": args.steps,
        "warmup": args.warmup,
        "truth": "one random uint8 image on the device; its content does not change a step's time",
        "machine": machine_info.describe_apart(),
        "commit": machine_info.commit(args.commit),
        "command": args.command(),
        "runs": [],
    }
    names = {}
    for name in dict.fromkeys(args.methods):
        if args.device == "cpu" and name in NEED_CUDA:
            console.print(f"{name} is skipped: it needs a GPU")
        else:
            names[args.spec(name)] = name
    failed = 0

    def on_done(outcome: Outcome) -> None:
        nonlocal failed
        name = names[outcome.spec]
        settings = list(outcome.spec.overrides)
        report["runs"].append({"method": name, "overrides": settings, **outcome.measured})
        results.write_report(path, report)
        if "error" in outcome.measured:
            failed += 1
            console.print(f"[bold red]failed[/] {name} after {outcome.seconds:.0f} s:")
            text = tail(outcome.log) or outcome.measured["error"]
            console.print(escape(text), highlight=False, soft_wrap=True)
        else:
            median = outcome.measured["ms_median"]
            console.print(f"finished {name} after {outcome.seconds:.0f} s: {median:.1f} ms a step")

    run_all(
        specs=list(names),
        command=command or child_command(args),
        folder=args.logs,
        steps=args.steps,
        parallel=1,
        timeout=args.timeout,
        console=console,
        on_done=on_done,
    )
    results.write_report(path, report)
    step_table.show_report(report, console)
    console.print(f"written to {escape(str(path))}")
    return failed


def main() -> int:
    """The command line. Exit status 1 when a method failed, 2 when nothing was started."""
    return cli.run(StepArgs, __doc__, measure)


if __name__ == "__main__":
    sys.exit(main())
