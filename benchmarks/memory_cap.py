"""A GPU with less memory than there is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.errors import BenchmarkError


def cap_gpu_memory(gigabytes: float, cuda_gigabytes: float | None = None) -> float:
    """Let this process have so much GPU memory in all, as on a card of that size.

    What is taken already, CUDA's context among it, counts: call it first of all. torch then raises
    out of memory where the card would have. What CUDA's libraries take later, outside of torch, is
    not seen.

    Args:
        gigabytes: 10^9 bytes.
        cuda_gigabytes: what CUDA takes of them, where others are on the GPU, too. None to take what
            is in use for it, on a GPU that nobody else uses.

    Returns:
        The share of the GPU's memory that torch may have.

    Raises:
        BenchmarkError: that is not even enough for what is taken.
    """
    free, total = torch.cuda.mem_get_info()
    taken = total - free if cuda_gigabytes is None else cuda_gigabytes * 1e9
    left = gigabytes * 1e9 - taken
    if left <= 0:
        raise BenchmarkError(
            f"{taken / 1e9:.2f} GB of the GPU are taken before anything is measured, more than "
            f"--cap-gb {gigabytes}; end other processes on it, or raise the cap"
        )
    share = min(1.0, left / total)
    torch.cuda.set_per_process_memory_fraction(share)
    return share


@contextmanager
def lifted(share: float | None) -> Iterator[None]:
    """Let torch have all of the GPU for what is done inside.

    Args:
        share: what it may have otherwise, of :func:`cap_gpu_memory`; None where there is no cap.
    """
    if share is None:
        yield
        return
    torch.cuda.set_per_process_memory_fraction(1.0)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(share)
