"""How much of the GPU's memory rows may take."""

from __future__ import annotations

from dataclasses import dataclass

import torch

VIEW_ROW_BYTES = 1100
"""Device memory of a row while its view is trained, beside its place in the cache: leaves and
their gradients (472 bytes at SH degree 3), projection, sorting, their gradients. A guess to start
with: it depends on how many tiles of the image a row covers."""

_PIXEL_BYTES = 130
"""Per pixel: the rendered and the true image, the loss and its derivatives, rasterization."""

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
        self,
        device: torch.device,
        row_bytes: int,
        view_rows: int,
        pixels: int,
        view_row_bytes: float = VIEW_ROW_BYTES,
    ) -> int:
        """How many rows a cache may hold beside what a view needs while it is trained.

        What torch has allocated now (images, say) is taken to stay.

        Args:
            device: whose memory.
            row_bytes: bytes of a row in the cache.
            view_rows: rows of the largest view.
            pixels: of its image.
            view_row_bytes: what each row of a view needs; see :func:`observed_view_row_bytes`.
        """
        available, taken = float("inf"), 0
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            taken = torch.cuda.memory_allocated(device)
            available = _HEADROOM * (free + torch.cuda.memory_reserved(device))
        if self.gigabytes is not None:
            available = min(available, self.gigabytes * 1e9 - _CONTEXT_BYTES)
        needed = taken + view_rows * view_row_bytes + pixels * _PIXEL_BYTES
        # Rows are numbered by 32 bits.
        return int(max(0, min((available - needed) / row_bytes, 2**31 - 1)))


def observed_view_row_bytes(peak: int, cache_bytes: int, view_rows: int, pixels: int) -> float:
    """What a row of a view has needed, from the most that torch has reserved so far.

    Args:
        peak: bytes.
        cache_bytes: of them, in the cache.
        view_rows: rows of the largest view so far.
        pixels: of its image.
    """
    return (peak - cache_bytes - pixels * _PIXEL_BYTES) / max(1, view_rows)
