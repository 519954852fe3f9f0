"""How much of the GPU's memory rows may take."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_CONTEXT_BYTES = 600 << 20
"""What CUDA, its libraries and compiled kernels take outside of torch's allocator."""

_HEADROOM = 0.9
"""Share of the free memory that is taken when the user names no budget."""


@dataclass(frozen=True)
class Budget:
    """GPU memory that training may take in all, CUDA's own included.

    Args:
        gigabytes: 10^9 bytes; None for 90 % of what is free.
    """

    gigabytes: float | None = None

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
        available, taken = float("inf"), 0
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            taken = torch.cuda.memory_allocated(device) - cached_rows * row_bytes
            available = _HEADROOM * (free + torch.cuda.memory_reserved(device))
        if self.gigabytes is not None:
            available = min(available, self.gigabytes * 1e9 - _CONTEXT_BYTES)
        # Rows are numbered by 32 bits.
        return int(max(0, min((available - needed - taken) / row_bytes, 2**31 - 1)))
