"""Checkpoint files: written whole or not at all, and readable by every torch and numpy."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nerfstudio.utils.rich_utils import CONSOLE
from rich.markup import escape

from gsscale_nerfstudio import streamed
from gsscale_nerfstudio.errors import GSScaleError, warn
from gsscale_nerfstudio.files import remove_abandoned, whole_file
from gsscale_nerfstudio.versions import installed

_NAME = re.compile(r"step-(\d+)\.ckpt")

_UNFINISHED = ".unfinished.ckpt.tmp"

_SMALL = 1 << 20
"""Bytes of a record up to which it is checked byte by byte: all but the rows of a large scene."""


def path_of(folder: Path, step: int) -> Path:
    """Nerfstudio's name of the checkpoint of a step."""
    return folder / f"step-{step:09d}.ckpt"


def allow_numpy_scalars() -> None:
    """Let ``torch.load`` read the numpy scalars in the checkpoints of Nerfstudio's schedulers.

    Since torch 2.6 it reads tensors and plain values only, unless told otherwise, and refuses what
    splatfacto saves (nerfstudio #3683). numpy 2 renamed the module that pickles name.
    """
    if installed("torch") < (2, 6):
        return  # it reads everything, and would stumble over names in the list
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
        state: what ``torch.save`` is to write; tensors may be strided views.
        path: final name.
        scratch: folder on the same file system for the unfinished file. Not the checkpoint folder:
            Nerfstudio takes every file in there for a checkpoint.

    Raises:
        GSScaleError: the disk is full or not writable; older checkpoints are untouched.
    """
    try:
        # Always the same name: what a killed process has left there is overwritten.
        with whole_file(path, scratch / _UNFINISHED) as unfinished:
            streamed.save(plain(state), unfinished)
    except (OSError, RuntimeError) as error:
        raise GSScaleError(
            f"could not write the checkpoint {path}: {error}; free disk space or choose another "
            "--output-dir. Earlier checkpoints are untouched."
        ) from error


def remove_unfinished(scratch: Path) -> None:
    """Remove what a killed process has left, and say so; a run that goes on has another folder.

    Args:
        scratch: see :func:`save`.
    """
    file = scratch / _UNFINISHED
    size = remove_abandoned(file)
    if size:
        CONSOLE.print(
            f"gsscale: removed {escape(str(file))}, {size / 1e9:.2g} GB, which a run that was "
            "killed while it saved has left",
            highlight=False,
            soft_wrap=True,
        )


def remove_others(path: Path) -> None:
    """Remove all other checkpoints beside ``path``, a whole one.

    Raises:
        GSScaleError: one of them cannot be removed.
    """
    try:
        for other in path.parent.glob("*.ckpt"):
            if other != path:
                other.unlink(missing_ok=True)
    except OSError as error:
        raise GSScaleError(
            f"could not remove an earlier checkpoint: {error}; keep all with "
            "--save-only-latest-checkpoint False, or choose another --output-dir"
        ) from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint; its tensors are mapped, and read from the disk as they are used.

    So nothing is in memory twice, and moments that nobody uses are not read at all.

    Raises:
        GSScaleError: torch cannot make sense of the file.
    """
    try:
        return torch.load(path, map_location="cpu", mmap=True)
    except FileNotFoundError as error:
        raise GSScaleError(
            f"the checkpoint {path} is not there any more: its run goes on, and has replaced it by "
            "a newer one; call the command again"
        ) from error
    except Exception as error:  # whatever torch and pickle make of damaged bytes
        raise GSScaleError(
            f"the checkpoint {path} cannot be read ({type(error).__name__}: {error}); "
            f"{_others(path)}"
        ) from error


def is_whole(path: Path) -> bool:
    """Whether ``path`` is a complete checkpoint.

    Found: a file that ends too early, wherever, and damage to the archive's directory, to the head
    of any record, and to any record of at most 1 MiB that has a checksum: what says which tensors
    there are, but not tensors that were written in place. These are not looked through, which
    would mean to read all of the file once more: no crash can damage them, since a file gets its
    name when all of it is on the disk.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            for record in records:
                with archive.open(record) as content:
                    # What was written in place has a checksum of 0.
                    if record.file_size <= _SMALL and record.CRC != 0:
                        content.read()  # compares checksums
            return any(record.filename.endswith("/data.pkl") for record in records)
    except Exception:  # whatever zipfile makes of damaged bytes
        return False


def steps_in(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in ``folder``, ascending."""
    return [step for step, path in _named_in(folder) if is_whole(path)]


def _named_in(folder: Path) -> list[tuple[int, Path]]:
    """All checkpoints in ``folder`` with their steps, ascending, whole or not."""
    found = ((_NAME.fullmatch(path.name), path) for path in folder.glob("step-*.ckpt"))
    return sorted((int(match[1]), path) for match, path in found if match)


def newest_step(folder: Path) -> int | None:
    """Step of the newest whole checkpoint in ``folder``, with a warning where newer ones are not.

    Returns:
        None if there is no checkpoint at all.

    Raises:
        GSScaleError: there are checkpoints, and none is whole.
    """
    damaged: list[str] = []
    for step, path in reversed(_named_in(folder)):
        if is_whole(path):
            if damaged:
                warn(
                    f"{', '.join(damaged)} in {folder} is truncated or damaged; using step {step} "
                    "instead"
                )
            return step
        damaged.append(path.name)
    if not damaged:
        return None
    raise GSScaleError(
        f"no checkpoint in {folder} can be read ({', '.join(damaged)}: truncated or damaged); "
        "train again or point to another run"
    )


def require_whole(path: Path) -> None:
    """Check a checkpoint that the user named.

    Raises:
        GSScaleError: it is missing or damaged; names the steps that can be loaded instead.
    """
    if path.is_dir():
        raise GSScaleError(
            f"the checkpoint {path} is a folder; give --load-checkpoint a file in it, or the "
            "folder nerfstudio_models of a run to --load-dir"
        )
    if not is_whole(path):
        state = "truncated or damaged" if path.exists() else "missing"
        raise GSScaleError(f"the checkpoint {path} is {state}; {_others(path)}")


def require_some(folder: Path) -> None:
    """Check a folder of checkpoints that the user named.

    Raises:
        GSScaleError: there is none.
    """
    if not _named_in(folder):
        raise GSScaleError(
            f"there is no checkpoint in {folder}; give --load-dir the folder nerfstudio_models of "
            "a run, as outputs/.../nerfstudio_models"
        )


def _others(path: Path) -> str:
    """What to load instead of a checkpoint."""
    others = [step for step in steps_in(path.parent) if path_of(path.parent, step) != path]
    if not others:
        return "there is no other whole checkpoint beside it: give that of another run"
    steps = ", ".join(map(str, others))
    return f"load another one with --load-dir {path.parent} and --load-step ({steps})"
