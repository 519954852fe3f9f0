"""Runs Nerfstudio's commands the way a user would, and prints them so that a user can."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nerfstudio.utils.rich_utils import CONSOLE

from gsscale_nerfstudio.errors import GSScaleError

_TAIL_LINES = 25
_LINE_WIDTH = 100


def say(text: str, style: str | None = None) -> None:
    """Print text as it is: paths and command lines stay whole, for copying."""
    CONSOLE.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def find_script(name: str) -> str:
    """How to call the console script ``name`` of the environment that this interpreter runs in.

    Its bare name where the shell finds the same file under it, else its full path.
    """
    # Not resolved: a virtual environment's interpreter is a link to one that has other scripts.
    script = Path(sys.executable).parent / name
    if not script.is_file():
        raise GSScaleError(
            f"{name} is not installed next to {sys.executable}: "
            "run `pip install gsscale-nerfstudio` with that interpreter."
        )
    return name if shutil.which(name) == str(script) else str(script)


def shell_line(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """The command as one would type it: quoted, with its variables, broken between flags."""
    words = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    pieces = [" ".join([*words, shlex.quote(command[0])])]
    for word in command[1:]:
        if word.startswith("--"):
            pieces.append(shlex.quote(word))
        else:
            pieces[-1] += " " + shlex.quote(word)
    lines = [pieces[0]]
    for piece in pieces[1:]:
        if len(lines[-1]) + len(piece) < _LINE_WIDTH:
            lines[-1] += " " + piece
        else:
            lines.append("    " + piece)
    return " \\\n".join(lines)


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    on_line: Callable[[str], None] = lambda line: None,
) -> float:
    """Print a command, run it to its end and return how long it took, in seconds.

    Args:
        command: Program and arguments.
        environment: Variables to set on top of this process's own.
        log: File for everything the command prints.
        on_line: Called with each line as it comes.

    Raises:
        GSScaleError: The command failed; the end of its output has then been printed.
    """
    say("\n" + shell_line(command, environment), style="cyan")
    log.parent.mkdir(parents=True, exist_ok=True)
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    start = time.monotonic()
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            tail.append(line.rstrip("\n"))
            on_line(line)
    if process.returncode != 0:
        say("\n".join(["", *tail]))
        raise GSScaleError(
            f"{Path(command[0]).name} failed with exit status {process.returncode}. "
            f"Above are its command line and the end of its output, all of which is in {log}."
        )
    return time.monotonic() - start
