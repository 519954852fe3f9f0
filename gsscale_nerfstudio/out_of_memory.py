"""What to do when GPU memory runs out: let go of what was being done, make room, do it again."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch

from gsscale_nerfstudio.errors import GSScaleError

T = TypeVar("T")


class NoRoomError(GSScaleError):
    """A render, or what is made of one, needs more memory than there is."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that GPU memory has run out.

    torch's allocator has a type for it. The driver, cuBLAS and Triton, which take memory of their
    own, only have a message.
    """
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    said = str(error).lower()
    return (
        isinstance(error, RuntimeError)
        and not isinstance(error, GSScaleError)
        and ("out of memory" in said or "alloc_failed" in said)
    )


def retried(attempt: Callable[[], T], make_room: Callable[[str, int], None]) -> T:
    """The result of ``attempt()``, which is made again for as long as memory runs out in it.

    Args:
        attempt: has changed nothing that matters when it fails, or ``make_room`` puts it back.
        make_room: called in between with a few words of the error and the number of calls before
            this one. By then nothing of the attempt is held on to. It raises where there is no
            point in another one.
    """
    tries = 0
    while True:
        try:
            return attempt()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            said = in_short(error)
            # The traceback holds the frames, and these the tensors that fill the memory.
            traceback.clear_frames(error.__traceback__)
        # The error is gone only here, behind the block. Rings of objects go now, not some day.
        gc.collect()
        make_room(said, tries)
        tries += 1


def tried_again(attempt: Callable[[], T], give_back: Callable[[], None]) -> T:
    """The result of ``attempt()``, which is made once more if memory runs out in it.

    Args:
        attempt: has changed nothing when memory runs out in it.
        give_back: called in between; what it gives back costs nothing.

    Raises:
        RuntimeError: it ran out again.
    """
    try:
        return attempt()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # as in retried()
    gc.collect()
    give_back()
    return attempt()


def no_room_to_densify(error: RuntimeError) -> GSScaleError:
    """What is to be told when memory ran out in densification, as ``error`` says."""
    return GSScaleError(
        f"GPU memory ran out in densification ({in_short(error)}), which needs some 25 MB there; "
        "end what else takes the GPU's memory, or lower --pipeline.model.vram-budget-gb, and go on "
        "from the last checkpoint with --load-dir"
    )


def no_room_left(said: str, rows: int, size: tuple[int, int]) -> NoRoomError:
    """The end: what is to be told when nothing can be given up any more.

    Args:
        said: the error in short.
        rows: of the scene.
        size: height and width of the view in pixels.
    """
    height, width = size
    return NoRoomError(
        f"the GPU's memory does not hold what a view of {width} x {height} pixels needs, in a "
        f"scene of {rows:,} Gaussians ({said}), and nothing is left that could be given up; use "
        "smaller images (--pipeline.datamanager.camera-res-scale-factor 0.5), fewer Gaussians "
        "(--pipeline.model.max-gaussians, or a higher --pipeline.model.cull-alpha-thresh), or end "
        "what else takes the GPU's memory"
    )


def in_short(error: BaseException) -> str:
    """The first two sentences, which say how much was asked for."""
    lines = str(error).splitlines() or [type(error).__name__]
    return ". ".join(lines[0].split(". ")[:2]).rstrip(".")
