"""Runs as child processes: start, watch, collect, end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import progress as progress_file
from benchmarks.plan import RunSpec

POLL_S = 0.5
TAIL_LINES = 25
LOG_COLUMNS = "160"
"""Without a terminal rich would break the log's lines, error messages too, at 80 columns."""
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Files:
    """The files of one run, which its command names."""

    log: Path
    result: Path
    progress: Path


@dataclass
class Outcome:
    """What a run gave: measured fields, or ``{"error": ...}``."""

    spec: RunSpec
    measured: dict[str, Any]
    log: Path
    seconds: float


@dataclass
class _Child:
    spec: RunSpec
    files: Files
    process: subprocess.Popen[bytes]
    started: float
    timed_out: bool = False


def run_all(
    specs: list[RunSpec],
    command: Callable[[RunSpec, Files], list[str]],
    folder: Path,
    steps: int,
    parallel: int,
    timeout: float | None,
    console: Console,
    on_done: Callable[[Outcome], None],
) -> None:
    """Do every run, ``parallel`` at a time; a failed run doesn't stop the others.

    Args:
        specs: the runs, in starting order.
        command: the command line of a run, which writes the given result file.
        folder: for logs and the small files between a run and this process.
        steps: for the progress display.
        parallel: runs at a time.
        timeout: seconds after which a run is ended, or None.
        console: where progress goes; bars only on a terminal.
        on_done: called in this process after each run, in the order in which they end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    waiting = list(specs)
    running: dict[Any, _Child] = {}
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as bars:
        try:
            while waiting or running:
                while waiting and len(running) < parallel:
                    child = _start(waiting.pop(0), command, folder)
                    running[bars.add_task(child.spec.label, total=steps)] = child
                    console.print(
                        f"started {child.spec.label}, log: {escape(str(child.files.log))}"
                    )
                time.sleep(POLL_S)
                for task, child in list(running.items()):
                    phase, done = progress_file.read(child.files.progress)
                    bars.update(task, completed=done, description=f"{child.spec.label}: {phase}")
                    if child.process.poll() is not None:
                        bars.remove_task(task)
                        del running[task]
                        on_done(_collect(child))
                    elif timeout is not None and time.monotonic() - child.started > timeout:
                        child.timed_out = True
                        _end(child)
        finally:  # an interrupt must not leave a training on the GPU
            for child in running.values():
                _end(child)


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    """The end of a log, without escape sequences and overwritten progress lines."""
    try:
        text = log.read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""
    plain = ESCAPES.sub("", text[-200_000:]).replace("\r\n", "\n")
    kept = [line.rstrip("\r ").rpartition("\r")[2] for line in plain.split("\n")]
    return "\n".join([line for line in kept if line][-lines:])


def _start(spec: RunSpec, command: Callable[[RunSpec, Files], list[str]], folder: Path) -> _Child:
    files = Files(
        log=folder / f"{spec.label}.log",
        result=folder / f"{spec.label}.result.json",
        progress=folder / f"{spec.label}.progress.json",
    )
    for stale in (files.result, files.progress):
        stale.unlink(missing_ok=True)
    with files.log.open("wb") as log:
        process = subprocess.Popen(
            command(spec, files),
            stdin=subprocess.DEVNULL,  # a question on the terminal would wait for ever
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": LOG_COLUMNS},
        )
    return _Child(spec, files, process, time.monotonic())


def _collect(child: _Child) -> Outcome:
    try:
        measured = json.loads(child.files.result.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        measured = {}
    status = child.process.returncode
    if child.timed_out:
        measured = {"error": "ended after the given timeout"}
    elif status and "error" not in measured:
        cause = f"signal {-status}" if status < 0 else f"exit status {status}"
        last = tail(child.files.log, 1)
        measured = {"error": f"{cause}; last line of the log: {last}" if last else cause}
    elif not measured:
        measured = {"error": "no result was written"}
    for small in (child.files.result, child.files.progress):
        small.unlink(missing_ok=True)
    return Outcome(child.spec, measured, child.files.log, time.monotonic() - child.started)


def _end(child: _Child) -> None:
    child.process.terminate()
    try:
        child.process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        child.process.kill()
        child.process.wait()
