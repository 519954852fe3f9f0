"""What the host engine knows of the next view while the device is at the present one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gsscale_nerfstudio import _C
from gsscale_nerfstudio.cull import View
from gsscale_nerfstudio.engines.staging import Staging
from gsscale_nerfstudio.engines.streams import Mark


@dataclass(frozen=True)
class Outlook:
    """What will be so when an announced view is begun, as far as it is known beforehand.

    Attributes:
        step: optimizer steps that will have been done.
        before: ids of the view that is being trained, whose rows will be hot.
        lrs: [len(GROUPS)] learning rates that the last of those steps is expected to have.
        tables: the Adam history after that step.
    """

    step: int
    before: Tensor
    lrs: np.ndarray
    tables: _C.SkipTables

    def has_come_true(self, step: int, lrs: np.ndarray | None) -> bool:
        """Whether ``step`` steps have been done, the last one with learning rates ``lrs``."""
        return step == self.step and lrs is not None and np.array_equal(lrs, self.lrs)


@dataclass(frozen=True)
class Split:
    """The rows of two consecutive views, as positions in their ids: [*] int32, ascending.

    Attributes:
        hot_before, hot: in the view before and in this one, the rows that both see.
        only_before: in the view before, its other rows.
        cold: in this view, its other rows.
    """

    hot_before: Tensor
    hot: Tensor
    only_before: Tensor
    cold: Tensor


@dataclass(frozen=True)
class ColdRows:
    """What was done ahead for an announced view: its cold rows, on their way to the device.

    Attributes:
        outlook: what they were settled for.
        split: which they are.
        rows: [len(split.cold), width] float32 on the device.
        arrived: reached when they are there.
    """

    outlook: Outlook
    split: Split
    rows: Tensor
    arrived: Mark


@dataclass(frozen=True)
class PreparedView:
    """A view, its ids, and its cold rows if it was announced in time."""

    view: View
    ids: Tensor
    cold: ColdRows | None = None


@dataclass(frozen=True)
class GatheredView:
    """What was done ahead for a view that is only to be shown.

    Attributes:
        ids: [n] int32, its rows.
        rows: [n, width] float32 in page-locked memory, settled.
    """

    ids: Tensor
    rows: Tensor


class SplitLists:
    """Buffers for the positions of one :class:`Split` at a time.

    Args:
        capacity: rows of the largest view.
        device: reads ``hot`` and ``cold``, straight from page-locked memory.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        cpu = torch.device("cpu")
        self._read_here = [Staging(capacity, 0, cpu, torch.int32) for _ in range(2)]
        self._read_there = [Staging(capacity, 0, device, torch.int32) for _ in range(2)]

    def split(self, before: Tensor, ids: Tensor) -> Split:
        """Positions in ``ids``, and in those of the view before; the last split is no more.

        The caller has done with it. The device may not have: it is waited for.
        """
        n, m = len(before), len(ids)
        hot_before, only_before = (staging.rows(n) for staging in self._read_here)
        hot, cold = (staging.rows(m) for staging in self._read_there)
        common = _C.split_common(
            before.numpy(),
            ids.numpy(),
            hot_before.numpy(),
            hot.numpy(),
            only_before.numpy(),
            cold.numpy(),
        )
        return Split(
            hot_before[:common], hot[:common], only_before[: n - common], cold[: m - common]
        )

    def to_be_locked(self, n: int) -> int:
        """Bytes of host memory that splitting a view of ``n`` rows would take."""
        return sum(staging.to_be_locked(n) for staging in self._read_there)

    def read_until(self, mark: Mark) -> None:
        """The device has read the positions at ``mark``."""
        for staging in self._read_there:
            staging.used_until(mark)
