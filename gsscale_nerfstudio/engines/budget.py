"""How much of the GPU's memory rows may take."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_VIEW_ROW_BYTES = 1100
"""Device memory of a row while its view is trained, beside its place in the cache: leaves and
their gradients (472 bytes at SH degree 3), projection, sorting, their gradients. A guess to start
with: it depends on how many tiles of the image a row covers."""

_PIXEL_BYTES = 130
"""Per pixel: the rendered and the true image, the loss and its derivatives, rasterization."""

_CONTEXT_BYTES = 600 << 20
"""What CUDA, its libraries and compiled kernels take outside of torch's allocator."""

_HEADROOM = 0.9
"""Share of the free memory that is taken when the user names no budget."""


def view_bytes(view_rows: int, pixels: int) -> int:
    """Device memory that a view of so many rows and pixels is expected to need in training."""
    return view_rows * _VIEW_ROW_BYTES + pixels * _PIXEL_BYTES


@dataclass(frozen=True)
class Budget:
    """GPU memory that training may take in all, CUDA's own included.

    Args:
        gigabytes: 10^9 bytes; None for 90 % of what is free.
    """

    gigabytes: float | None = None

    def cache_rows(
        self,
        device: torch.device,
        row_bytes: int,
        view_rows: int,
        pixels: int,
        observed: int = 0,
        cached_rows: int = 0,
    ) -> int:
        """How many rows a cache may hold beside what a view needs while it is trained.

        What torch has allocated now (images, say) is taken to stay.

        Args:
            device: whose memory.
            row_bytes: bytes of a row in the cache.
            view_rows: rows of the largest view.
            pixels: of its image.
            observed: bytes that were in use beside the cache and :func:`view_bytes`, so far.
            cached_rows: of a cache that there is already.
        """
        available, taken = float("inf"), 0
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            taken = torch.cuda.memory_allocated(device) - cached_rows * row_bytes
            available = _HEADROOM * (free + torch.cuda.memory_reserved(device))
        if self.gigabytes is not None:
            available = min(available, self.gigabytes * 1e9 - _CONTEXT_BYTES)
        needed = view_bytes(view_rows, pixels) + max(taken, observed)
        # Rows are numbered by 32 bits.
        return int(max(0, min((available - needed) / row_bytes, 2**31 - 1)))
