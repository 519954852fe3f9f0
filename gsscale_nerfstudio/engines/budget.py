"""How much of the GPU's memory rows may take."""

from __future__ import annotations

from dataclasses import dataclass

import torch

CONTEXT_BYTES = 600 << 20
"""What CUDA, its libraries and compiled kernels take outside of torch's allocator."""

FREE_SHARE = 0.9
"""Share of the free memory that is taken when the user names no budget."""

IN_TENSORS = 0.96
"""Share of a budget that is for tensors and CUDA. torch holds more than tensors take: on an H200,
with a budget of 4 GB, 3.13 GB for 3.02 (5.9 M Gaussians, `caliterra`, 9000 steps)."""


@dataclass(frozen=True)
class Budget:
    """GPU memory that training may take in all, CUDA's own included.

    Args:
        gigabytes: 10^9 bytes; None for 90 % of what is free.
    """

    gigabytes: float | None = None

    def is_more_than(self, other: Budget) -> bool:
        """Whether it allows more, as far as the card has it."""
        ours, theirs = (
            float("inf") if budget.gigabytes is None else budget.gigabytes
            for budget in (self, other)
        )
        return ours > theirs

    def cache_rows(
        self, device: torch.device, row_bytes: int, needed: int, cached_rows: int = 0
    ) -> int:
        """How many rows a cache may hold.

        What torch has allocated now (images, say) is taken to stay.

        Args:
            device: whose memory.
            row_bytes: bytes of a row in the cache.
            needed: bytes to leave for the training of a view.
            cached_rows: of a cache that there is already.
        """
        # Rows are numbered by 32 bits.
        taken = _taken(device, row_bytes, cached_rows)
        rows = (self.available(device) - needed - taken) / row_bytes
        return int(max(0, min(rows, 2**31 - 1)))

    @staticmethod
    def least(
        device: torch.device, row_bytes: int, needed: int, rows: int, cached_rows: int = 0
    ) -> float:
        """Gigabytes from which on :meth:`cache_rows` is ``rows``, if the card has them."""
        taken = _taken(device, row_bytes, cached_rows)
        return (rows * row_bytes + needed + taken + CONTEXT_BYTES) / IN_TENSORS / 1e9

    def available(self, device: torch.device) -> float:
        """Bytes that torch may take in all, what it has now included; CUDA's own come on top."""
        available = float("inf")
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            available = FREE_SHARE * (free + torch.cuda.memory_reserved(device))
        if self.gigabytes is not None:
            available = min(available, IN_TENSORS * self.gigabytes * 1e9 - CONTEXT_BYTES)
        return available


def _taken(device: torch.device, row_bytes: int, cached_rows: int) -> int:
    """Bytes in use on a device beside a cache of so many rows."""
    if device.type != "cuda":
        return 0
    return torch.cuda.memory_allocated(device) - cached_rows * row_bytes
