"""Host memory through which rows and ids pass on their way to or from the device."""

from __future__ import annotations

import torch
from torch import Tensor

from gsscale_nerfstudio.engines.streams import Mark, wait
from gsscale_nerfstudio.store.memory import ReservedArray


class Staging:
    """A page-locked buffer that copies read or write, one user at a time.

    Args:
        capacity: rows that address space is taken for.
        width: elements per row; 0 for a one-dimensional buffer.
        device: page-locked if this is a CUDA device.
        dtype: float32 or int32.
    """

    def __init__(
        self,
        capacity: int,
        width: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._array = ReservedArray(capacity, max(1, width), dtype)
        self._tensor = self._array.tensor if width else self._array.tensor.flatten()
        self._cuda = device.type == "cuda"
        self._in_use_until: Mark = None

    def rows(self, n: int) -> Tensor:
        """The first ``n`` rows, once no copy reads or writes them any more."""
        # The last copy may still be under way: it must not see new rows.
        wait(self._in_use_until)
        self._in_use_until = None
        if self._cuda:
            self._array.pin_whole(n)
        return self._tensor[:n]

    def used_until(self, mark: Mark) -> None:
        """The buffer belongs to a copy that ends at ``mark``."""
        self._in_use_until = mark
