"""Host memory through which rows and ids pass on their way to or from the device."""

from __future__ import annotations

import torch
from torch import Tensor

from gsscale_nerfstudio.engines.streams import Mark, SideStream, wait
from gsscale_nerfstudio.store.memory import ReservedArray, with_spare


class Staging:
    """A page-locked buffer that copies and kernels read or write, one user at a time.

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
        """The first ``n`` rows, once the device does not read or write them any more."""
        # The last copy may still be under way: it must not see new rows.
        wait(self._in_use_until)
        self._in_use_until = None
        if self._cuda:
            self._array.pin_whole(n)
        return self._tensor[:n]

    def to_be_locked(self, n: int) -> int:
        """Bytes of host memory that asking for ``n`` rows would take."""
        return self._array.to_be_locked(n) if self._cuda else 0

    def used_until(self, mark: Mark) -> None:
        """The buffer belongs to a copy or a kernel that ends at ``mark``."""
        self._in_use_until = mark


class Upload:
    """Staging with a buffer on the device, which rows reach while the current stream does others.

    The buffer stays: the next view's rows come when memory is scarcest, so there must be room for
    them then, and memory that comes and goes breaks up the rest. On a CPU staging is the buffer.

    Args:
        capacity: rows that address space is taken for.
        width: elements per row.
        device: where rows go.
    """

    def __init__(self, capacity: int, width: int, device: torch.device) -> None:
        self._staging = Staging(capacity, width, device)
        self._device = device
        self._link = SideStream(device)
        self._buffer = torch.empty(0, width, device=device)
        self._read: Mark = None

    def rows(self, n: int) -> Tensor:
        """[n, width] in host memory, to be filled and sent."""
        return self._staging.rows(n)

    def to_be_locked(self, n: int) -> int:
        """See :meth:`Staging.to_be_locked`."""
        return self._staging.to_be_locked(n)

    def send(self, rows: Tensor) -> tuple[Tensor, Mark]:
        """Queue the copy of filled rows: those on the device, and when they will be there."""
        if self._device.type == "cpu":
            return rows, None
        # The view before may still be unpacked from the buffer.
        with self._link.active(after=self._read):
            if len(rows) > len(self._buffer):
                n, width = rows.shape
                self._buffer = rows.new_empty(0)  # or both would be on the device at once
                self._buffer = torch.empty(with_spare(n), width, device=self._device)
                # Memory of the link's stream, read in the current one: when it is freed, the
                # allocator must not give it away before those reads are done.
                self._buffer.record_stream(torch.cuda.default_stream(self._device))
            on_device = self._buffer[: len(rows)]
            on_device.copy_(rows, non_blocking=True)
            arrived = self._link.mark()
        self._staging.used_until(arrived)
        return on_device, arrived

    def let_go(self) -> None:
        """Give up the buffer; the next view to be sent gets a new one. Nothing is on its way."""
        self._buffer = self._buffer.new_empty(0)

    def read_until(self, mark: Mark) -> None:
        """What was sent last has been read on the device at ``mark``."""
        self._read = mark
