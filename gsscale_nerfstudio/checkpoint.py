"""Checkpoint files: written whole or not at all, and readable by every torch and numpy."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nerfstudio.utils.rich_utils import CONSOLE

from gsscale_nerfstudio.errors import GSScaleError

_NAME = re.compile(r"step-(\d+)\.ckpt")


def allow_numpy_scalars() -> None:
    """Let ``torch.load`` read the numpy scalars in the checkpoints of Nerfstudio's schedulers.

    Since torch 2.6 it reads tensors and plain values only, unless told otherwise, and refuses what
    splatfacto saves (nerfstudio #3683). numpy 2 renamed the module that pickles name.
    """
    if not hasattr(torch.serialization, "add_safe_globals"):
        return  # older torch reads everything
    allowed: list[Any] = [np.dtype, type(np.dtype(np.float64))]
    # A pickle names the module of the numpy that wrote it; this numpy may be the other one.
    scalar = np.float64(0).__reduce__()[0]
    allowed += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    torch.serialization.add_safe_globals(allowed)


def plain(value: Any) -> Any:
    """``value`` with numpy scalars, at any depth, replaced by Python's own."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(plain(v) for v in value)
    return value


def save(state: dict[str, Any], path: Path, scratch: Path) -> None:
    """Write a checkpoint so that a crash at any moment leaves a whole file or none.

    Args:
        state: what ``torch.save`` is to write.
        path: final name.
        scratch: folder on the same file system for the unfinished file. Not the checkpoint folder:
            Nerfstudio takes every file in there for a checkpoint.

    Raises:
        GSScaleError: the disk is full or not writable; older checkpoints are untouched.
    """
    unfinished = scratch / f".{path.name}.{os.getpid()}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            torch.save(plain(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself must survive a power cut, too
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        raise GSScaleError(
            f"could not write the checkpoint {path}: {error}; free disk space or choose another "
            "--output-dir. Earlier checkpoints are untouched."
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


def is_whole(path: Path) -> bool:
    """Whether ``path`` is a complete checkpoint; a truncated file lacks the archive's end."""
    return path.is_file() and zipfile.is_zipfile(path)


def steps_in(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in ``folder``, ascending."""
    found = (_NAME.fullmatch(path.name) for path in sorted(folder.glob("step-*.ckpt")))
    return [int(match[1]) for match in found if match and is_whole(folder / match[0])]


def newest_step(folder: Path) -> int | None:
    """Step of the newest whole checkpoint in ``folder``, with a warning where newer ones are not.

    Returns:
        None if there is no checkpoint at all.

    Raises:
        GSScaleError: there are checkpoints, and none is whole.
    """
    names = [path.name for path in sorted(folder.glob("step-*.ckpt"))] if folder.is_dir() else []
    if not names:
        return None
    whole = steps_in(folder)
    if not whole:
        raise GSScaleError(
            f"no checkpoint in {folder} can be read ({', '.join(names)}: truncated or damaged); "
            "train again or point to another run"
        )
    damaged = [name for name in names if int(_NAME.fullmatch(name)[1]) > whole[-1]]  # type: ignore[index]
    if damaged:
        CONSOLE.print(
            f"[bold yellow]gsscale:[/bold yellow] {', '.join(damaged)} in {folder} is truncated or "
            f"damaged; using step {whole[-1]} instead"
        )
    return whole[-1]


def require_whole(path: Path) -> None:
    """Check a checkpoint that the user named.

    Raises:
        GSScaleError: it is missing or damaged; names the steps that can be loaded instead.
    """
    if is_whole(path):
        return
    state = "truncated or damaged" if path.exists() else "missing"
    others = [step for step in steps_in(path.parent) if path.name != f"step-{step:09d}.ckpt"]
    remedy = (
        f"load another one with --load-step ({', '.join(map(str, others))})"
        if others
        else "there is no other whole checkpoint beside it"
    )
    raise GSScaleError(f"the checkpoint {path} is {state}; {remedy}")
