"""The page-locked memory through which a view's rows pass with the host engine."""

from __future__ import annotations

import torch

from gsscale_nerfstudio.engines.lookahead import SplitLists
from gsscale_nerfstudio.engines.staging import Staging, Upload
from gsscale_nerfstudio.store import RowLayout
from gsscale_nerfstudio.store.host import headroom
from gsscale_nerfstudio.store.memory import available_memory, with_spare


class ViewStaging:
    """Buffers that take no memory yet, and grow to the largest view.

    Args:
        capacity: rows of the largest view that there may be.
        width: of a row.
        device: where views go.

    Attributes:
        outgoing: a view's hot rows, or all of them.
        cold: the cold rows of the next view.
        lists: which of its rows these are.
    """

    def __init__(self, capacity: int, width: int, device: torch.device) -> None:
        self.outgoing = Staging(capacity, width, device)
        self.cold = Upload(capacity, width, device)
        self.lists = SplitLists(capacity, device)
        # The worker may still be stepping rows with the last gradients when the next are written.
        # Those before it has done with: begin() has waited for it in between. Where it has not been
        # given any, as with views in parts, the first is used again.
        self._gradients = [Staging(capacity, width, device) for _ in range(2)]
        self._held = 0  # rows of the largest view so far for which there was memory

    @staticmethod
    def size(layout: RowLayout, rows: int) -> int:
        """Bytes for a view of so many rows."""
        of_rows = 4 * layout.width * 4  # outgoing, cold, gradients of two steps
        positions = 4 * 4
        return rows * with_spare(of_rows + positions)

    @property
    def gradients(self) -> Staging:
        """Of the present step."""
        return self._gradients[0]

    def keep_gradients(self) -> None:
        """Leave those of the present step to the worker; the next step has the other buffer."""
        self._gradients.reverse()

    def has_room_for(self, rows: int) -> bool:
        """Whether there is host memory for all that a view of so many rows sends and gets back."""
        if rows > self._held:
            size = sum(each.to_be_locked(rows) for each in (self.outgoing, *self._gradients))
            size += self.cold.to_be_locked(rows) + self.lists.to_be_locked(rows)
            if not _can_be_locked(size):
                return False
            self._held = rows
        return True

    def can_send(self, rows: int) -> bool:
        """Whether there is host memory for so many rows on their way to the device."""
        return _can_be_locked(self.outgoing.to_be_locked(rows))


def _can_be_locked(size: int) -> bool:
    """Whether so many bytes of host memory can be taken.

    Rows leave headroom to all else, of which staging may have half: it is what comes last.
    """
    return size == 0 or size <= available_memory() - headroom() // 2
