"""``torch.save`` without a second copy of what is saved, where torch can do that."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

STREAMS = hasattr(torch.serialization, "skip_data") and hasattr(os, "posix_fallocate")
"""Whether files are written in place, where they can be mapped; else ``torch.save`` needs
contiguous tensors."""

_PART = 1 << 20
"""Rows that are written at a time: what the disk has not taken yet is the system's to hold."""


def save(state: Any, path: Path) -> None:
    """Write what ``torch.save`` would, straight from tensors that may be strided views.

    The file is first made with room for all tensors, which then are copied to their places in it,
    piece by piece. The archive has no checksums of them; no torch asks for these.

    Where the file system refuses to map the file, as some network and FUSE ones do, ``torch.save``
    writes copies of all strided views, with the same result: they take as much more host memory as
    the file takes of the disk.

    Args:
        state: dictionaries, lists and tuples of tensors and plain values.
        path: a file to be written.

    Raises:
        OSError: the disk is full, or not writable, or there is no memory for copies.
    """
    # Where a file system cannot make room, glibc does, and reads what is there.
    with open(path, "w+b") as file:
        if STREAMS:
            with torch.serialization.skip_data(materialize_fake_tensors=True), FakeTensorMode():
                torch.save(_changed(state, _room_for), file)
            file.flush()
            places = _mapped(path)
            if places is not None:
                # A full disk is an error here; later it would be a signal that ends the process.
                os.posix_fallocate(file.fileno(), 0, file.tell())
                _fill(places, state)
                return
            _require_memory(state)
            file.seek(0)
            file.truncate()
        torch.save(_changed(state, _on_its_own), file)


def _require_memory(state: Any) -> None:
    """Raise where copies of all tensors would have the process killed, which ends more than a save.

    Raises:
        OSError: they do not fit.
    """
    from gsscale_nerfstudio.store.memory import available_memory  # the store imports this module

    sizes: list[int] = []
    _changed(state, lambda tensor: sizes.append(tensor.nbytes))
    if sum(sizes) > available_memory():
        raise OSError(
            errno.ENOMEM,
            "the file system does not map files, and host memory has no room for copies of "
            f"{sum(sizes) / 1e9:.1f} GB; choose an --output-dir on a local disk",
        )


def _mapped(path: Path) -> Any:
    """What a file holds, with tensors that are the file's bytes; None if it cannot be mapped."""
    try:
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError):  # a RuntimeError is how torch says that mmap failed
        return None


def _changed(state: Any, change: Any) -> Any:
    if isinstance(state, Tensor):
        return change(state)
    if isinstance(state, dict):
        return {key: _changed(value, change) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(_changed(value, change) for value in state)
    return state


def _room_for(tensor: Tensor) -> Tensor:
    """A contiguous tensor like it on the CPU, without memory, where tensors are made so."""
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _on_its_own(tensor: Tensor) -> Tensor:
    """A tensor that is all of its memory, on the CPU: ``torch.save`` writes all of what is behind a
    view, and where it was."""
    tensor = tensor.detach().cpu()
    if tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.is_contiguous():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _fill(places: Any, state: Any) -> None:
    if isinstance(state, Tensor):
        if state.dim() == 0:
            places.copy_(state.detach())
        for start in range(0, len(state) if state.dim() else 0, _PART):
            part = slice(start, start + _PART)
            places[part].copy_(state.detach()[part])
    elif isinstance(state, dict):
        for key, value in state.items():
            _fill(places[key], value)
    elif type(state) in (list, tuple):
        for place, value in zip(places, state, strict=True):
            _fill(place, value)
