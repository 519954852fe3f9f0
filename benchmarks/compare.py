"""Train one scene with several methods, side by side, and write what each run gave.

    python benchmarks/compare.py --scene DIR --steps 15000 --seeds 42 43

Every run is a fresh process (``run_one.py``). The file in ``docs/results/`` is written after each
run, so an interrupted call loses only the run it was in; the same call with ``--append FILE`` goes
on from there. ``report.py`` turns the files into ``docs/benchmarks.md``.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # as a script: find the package, and let its modules shadow nothing
    _here = Path(__file__).resolve().parent
    sys.path[:] = [*(p for p in sys.path if Path(p).resolve() != _here), str(_here.parent)]

from rich.console import Console
from rich.markup import escape

from benchmarks import cli, overrides, results, tables
from benchmarks import machine as machine_info
from benchmarks.children import Files, Outcome, run_all, tail
from benchmarks.cli import say, show
from benchmarks.plan import CompareArgs, PlanError, RunSpec
from benchmarks.results import Comparison, Run
from benchmarks.scene import dataparser_arguments

RUN_ONE = Path(__file__).resolve().with_name("run_one.py")

Command = Callable[[RunSpec, Files], list[str]]


def child_command(args: CompareArgs) -> Command:
    """What starts a run: ``run_one.py`` with the same interpreter."""

    def command(spec: RunSpec, files: Files) -> list[str]:
        words = [sys.executable, str(RUN_ONE), "--method", spec.method]
        words += ["--scene", str(args.scene), "--steps", str(args.steps), "--seed", str(spec.seed)]
        words += ["--engine", spec.engine] if spec.engine else []
        words += ["--result", str(files.result), "--progress", str(files.progress)]
        words += ["--scratch", str(args.logs / "placeholder")]
        words += ["--turns", str(args.shared_turns)] if args.shared_turns is not None else []
        words += ["--overrides", *spec.overrides] if spec.overrides else []
        if args.dataparser_overrides:
            words += ["--dataparser-overrides", *args.dataparser_overrides]
        words += ["--cap-gb", str(args.cap_gb)] if args.cap_gb is not None else []
        words += ["--cuda-gb", str(args.cuda_gb)] if args.cuda_gb is not None else []
        words += ["--evaluate-every", str(args.evaluate_every)] if args.evaluate_every else []
        words += ["--perceptual"] if args.perceptual else []
        words += ["--profile-steps", str(args.profile_steps)] if args.profile_steps else []
        if args.save_images is not None:
            words += ["--save-images", str(args.save_images), "--images", str(args.images)]
            words += ["--name", f"{args.scene_name}-{spec.label}"]
            words += ["--crop", *map(str, args.crop)] if args.crop is not None else []
        return words

    return command


def open_comparison(args: CompareArgs) -> tuple[Comparison, Comparison]:
    """The file to add to, and this call as a comparison without runs.

    They are the same object unless ``--append`` names a file that already exists.
    """
    call = Comparison(
        scene=args.scene_name,
        steps=args.steps,
        overrides=overrides.common(list(args.overrides)),
        dataparser=dataparser_arguments(args.scene, list(args.dataparser_overrides)),
        machine=machine_info.describe_apart(),
        commit=machine_info.commit(args.commit),
        command=args.command(),
        cap_gb=args.cap_gb,
    )
    if args.append is None:
        return call, call
    present = results.load(args.append)
    present.check_compatible(call, args.allow_mixed)
    present.add_command(call.command)
    return present, call


def output_path(args: CompareArgs) -> Path:
    """Where the file goes; an existing one is only ever appended to."""
    path = args.output or args.append
    if path is None:
        path = results.new_path(f"{args.scene_name}-{args.steps}")
    if path.exists() and (args.append is None or path.resolve() != args.append.resolve()):
        raise PlanError(f"{path} exists: add to it with --append, or name another --output")
    return path


def to_run(comparison: Comparison, call: Comparison, spec: RunSpec, parallel: int) -> Run:
    """The run of ``spec``, nothing measured yet."""
    return Run(
        method=spec.method,
        engine=spec.engine,
        seed=spec.seed,
        overrides=list(spec.overrides),
        commit=call.commit,
        parallel=parallel,
        machine=None if call.machine == comparison.machine else call.machine,
    )


def compare(args: CompareArgs, console: Console, command: Command | None = None) -> int:
    """Do the missing runs and write the file. Returns how many runs failed."""
    args.check()
    path = output_path(args)
    comparison, call = open_comparison(args)

    todo = []
    for spec in args.runs():
        present = comparison.find(to_run(comparison, call, spec, 1).identity())
        if present is not None and present.settles():
            console.print(f"{spec.label} is in the file already")
        else:
            todo.append(spec)
    parallel = min(args.parallel, max(1, len(todo)))
    failed = 0

    def on_done(outcome: Outcome) -> None:
        nonlocal failed
        run = dataclasses.replace(
            to_run(comparison, call, outcome.spec, parallel), **outcome.measured
        )
        comparison.add(run)
        results.save(comparison, path)
        minutes = f"{outcome.seconds / 60:.1f} min"
        if run.error is None:
            ended = f", {run.ended}" if run.ended else ""
            console.print(
                f"finished {outcome.spec.label} after {minutes}{ended}: PSNR {run.psnr:.2f}"
            )
        else:
            failed += 1
            console.print(f"[bold red]failed[/] {outcome.spec.label} after {minutes}:")
            console.print(escape(tail(outcome.log) or run.error), highlight=False, soft_wrap=True)

    run_all(
        specs=todo,
        command=command or child_command(args),
        folder=args.logs,
        steps=args.steps,
        parallel=parallel,
        timeout=args.timeout,
        console=console,
        on_done=on_done,
    )
    results.save(comparison, path)
    print_tables(comparison, console)
    console.print(f"written to {escape(str(path))}")
    return failed


def print_tables(comparison: Comparison, console: Console) -> None:
    """Both tables and the failures."""
    console.print(f"{comparison.scene}, {comparison.steps:,} steps", style="bold")
    say(tables.describe_machine(comparison.machine), console)
    for text in (
        tables.run_table(comparison),
        tables.summary_table(comparison),
        tables.course_table(comparison),
    ):
        if text.rows:
            show(text, console)
    for sentence in tables.failures(comparison):
        console.print(f"[bold red]failed[/] {escape(sentence)}", highlight=False, soft_wrap=True)


def main() -> int:
    """The command line. Exit status 1 when a run failed, 2 when nothing was started."""
    return cli.run(CompareArgs, __doc__, compare)


if __name__ == "__main__":
    sys.exit(main())
