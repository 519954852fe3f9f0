"""The row cache's kernels on the GPU, beside what its memory and the link allow.

Import this module only where Triton is. Without a GPU its kernels run in Triton's interpreter, for
tests; the times then mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from benchmarks.clock import Clock
from benchmarks.rows_host import LONGEST_GAP, STEP, HostRows, Measurement
from gsscale_nerfstudio.engines.cache import RowCache
from gsscale_nerfstudio.engines.colors import Viewpoint
from gsscale_nerfstudio.engines.streams import SideStream, mark_current, wait, wait_in_stream
from gsscale_nerfstudio.engines.working_set import LEAVES, WorkingSet, working_set
from gsscale_nerfstudio.optim.device_tables import DeviceTables

REPETITIONS = 5
COPIED = 1 << 28
"""Bytes of each array of the copies: several times what a GPU's cache holds."""
_HEAD_START = 2_000_000
"""GPU cycles, about a millisecond, in which the host queues what is to be timed."""
_MOVE_BYTES = 12
"""Row that comes, slot, row that leaves."""


@dataclass
class Rates:
    """Bytes per second, each the best of its repetitions.

    Attributes:
        device_copy: one array to another on the device, read + written.
        h2d, d2h: copies between page-locked memory and the device.
        duplex: both of them at the same time, added up.
    """

    device_copy: float
    h2d: float
    d2h: float
    duplex: float


@dataclass
class GpuMeasurement:
    """A kernel, and the rate (a name in :class:`Rates`) of what it has to go through."""

    measurement: Measurement
    rate: str


class Stopwatch:
    """Times what the device does for a call.

    Args:
        device: a GPU, or the CPU, where it is the host's time.
    """

    def __init__(self, device: torch.device) -> None:
        self._clock = Clock(device)

    def seconds(
        self, work: Callable[[], Any], prepare: Callable[[], Any] = lambda: None
    ) -> list[float]:
        """Seconds of each repetition, after one that doesn't count."""
        marks = []
        for _ in range(1 + REPETITIONS):
            prepare()
            if self._clock.cuda:
                # Otherwise short kernels would be timed with the gaps that the host leaves.
                torch.cuda._sleep(_HEAD_START)
            before = self._clock.mark()
            work()
            marks.append([before, self._clock.mark()])
        self._clock.synchronize()
        return [self._clock.milliseconds(pair)[0] / 1e3 for pair in marks[1:]]


def measure_rates(device: torch.device) -> Rates:
    """What the device's memory and the link can do."""
    pinned = device.type == "cuda"
    watch, side = Stopwatch(device), SideStream(device)
    here, there = (torch.ones(COPIED // 4, device=device) for _ in range(2))
    up, down = (torch.ones(COPIED // 4, pin_memory=pinned) for _ in range(2))

    def both_ways() -> None:
        with side.active(after=mark_current(device)):
            down.copy_(there, non_blocking=True)
            done = side.mark()
        here.copy_(up, non_blocking=True)
        wait_in_stream(done, device)

    def rate(moved: int, work: Callable[[], Any]) -> float:
        return moved / min(watch.seconds(work))

    return Rates(
        device_copy=rate(2 * COPIED, lambda: here.copy_(there)),
        h2d=rate(COPIED, lambda: here.copy_(up, non_blocking=True)),
        d2h=rate(COPIED, lambda: down.copy_(there, non_blocking=True)),
        duplex=rate(2 * COPIED, both_ways),
    )


class GpuRows:
    """A cache over the rows of the host's measurement, and the views' rows in it.

    Args:
        host: rows in the middle of a training; they are page-locked, and stay as they are but for
            stamps and steps of a tiny learning rate.
        device: where the cache is.
    """

    def __init__(self, host: HostRows, device: torch.device) -> None:
        self.host, self.device = host, device
        if device.type == "cuda":
            host.store.pin()
        self.views = [ids.clone() for ids in host.visible_ids() if len(ids)]
        largest = max(map(len, self.views))
        # Two views, as in a training whose next view arrives while this one is being trained.
        self.cache = RowCache(host.store, device, min(host.n, 2 * largest))
        self.tables = DeviceTables(host.history, device)
        self.viewpoint = Viewpoint(torch.zeros(3, device=device), host.layout.sh_degree)
        self.watch = Stopwatch(device)
        self._random = torch.Generator(device).manual_seed(0)

    def measure(self) -> list[GpuMeasurement]:
        """All kernels."""
        return [*self.link(), *self.on_device()]

    # -- the link --------------------------------------------------------------------------------

    def link(self) -> list[GpuMeasurement]:
        """Each view's rows into the cache, out of it, and in while those of the last go out."""
        read, write, both = [], [], []
        for before, ids in zip([self.views[-1], *self.views], self.views, strict=False):
            none = torch.full_like(ids, -1)
            read.append(self._exchange(ids, none))
            write.append(self._exchange(none, ids))
            n = min(len(before), len(ids))
            both.append(self._exchange(ids[:n], before[:n]))
        arrays = 3 * self._row_bytes
        return [
            _summary("read missing rows", "link", "h2d", read, _MOVE_BYTES + arrays),
            _summary("write rows back", "link", "d2h", write, _MOVE_BYTES + arrays),
            _summary("both at once", "link", "duplex", both, _MOVE_BYTES + 2 * arrays),
        ]

    def _exchange(self, coming: Tensor, leaving: Tensor) -> tuple[int, list[float]]:
        """Rows moved and seconds. Rows that leave are brought in before, so they stay the same.

        Args:
            coming, leaving: [n] int32, rows; -1 for none.
        """
        slots = torch.arange(len(coming), dtype=torch.int32)
        none = torch.full_like(slots, -1)
        bring = self._moves(leaving, slots, none)
        moves = self._moves(coming, slots, leaving)
        times = self.watch.seconds(
            lambda: self.cache._exchange(moves), prepare=lambda: self.cache._exchange(bring)
        )
        return len(moves), times

    def _moves(self, coming: Tensor, slots: Tensor, leaving: Tensor) -> Tensor:
        moves = torch.stack([coming, slots, leaving], dim=1)
        # As the engine's lists: a copy from other memory would make the host wait.
        return moves.pin_memory() if self.device.type == "cuda" else moves

    # -- the device's memory ---------------------------------------------------------------------

    def on_device(self) -> list[GpuMeasurement]:
        """A view's settled leaves out of the cache; settle + step of its rows in place."""
        self.cache.forget()  # link() went past its table
        gather, step = [], []
        for number, ids in enumerate(self.views):
            slots = self._admit(ids, number)
            gather.append((len(ids), self._gather(slots)))
            step.append((len(ids), self._step(ids, slots)))
        # Slot and three rows read, leaves, colours and slopes written; slot, mean, gradients and
        # three rows read, three rows and a sphere written.
        leaves = 4 * self.host.layout.columns[LEAVES[-1]].stop
        color, arrays = 4 * 3, 3 * self._row_bytes
        stepped = 4 + color + leaves + color + 2 * arrays + 16
        return [
            _summary("gather", "gpu", "device_copy", gather, 4 + arrays + leaves + 4 * color),
            _summary("settle + step", "gpu", "device_copy", step, stepped),
        ]

    def _admit(self, ids: Tensor, number: int) -> Tensor:
        """Slots of a view's rows, as they come about when views follow each other."""
        admission = self.cache.admit(ids, number, number, mark_current(self.device))
        assert admission is not None
        wait(admission.ready)
        return admission.slots

    def _gather(self, slots: Tensor) -> list[float]:
        return self.watch.seconds(lambda: self._gathered(slots))

    def _step(self, ids: Tensor, slots: Tensor) -> list[float]:
        working = self._working_set(ids, slots)
        times = self.watch.seconds(
            lambda: self.cache.step(slots, working, self.tables, self.host.lrs),
            prepare=lambda: self._make_stale(slots),
        )
        self._make_stale(slots)
        return times

    def _gathered(self, slots: Tensor) -> dict[str, Tensor]:
        return self.cache.gather(slots, self.tables, self.viewpoint, training=True)

    def _working_set(self, ids: Tensor, slots: Tensor) -> WorkingSet:
        """The rows' leaves and colours, with gradients."""
        working = working_set(
            ids, self._gathered(slots), self.host.layout, self.viewpoint, training=True
        )
        for leaf in working.leaves.values():
            leaf.grad = torch.full_like(leaf, 1e-3)
        working.colors.arrived.gradient = torch.full_like(working.colors.values, 1e-3)
        return working

    def _make_stale(self, slots: Tensor) -> None:
        """Let cached rows be current for one of the last steps, but not for the present one."""
        gaps = torch.randint(
            1, LONGEST_GAP + 1, (len(slots),), generator=self._random, device=self.device
        )
        column = self.host.layout.bookkeeping["stamp"]
        self.cache.params[slots.long(), column] = (STEP - gaps).float()

    @property
    def _row_bytes(self) -> int:
        return 4 * self.host.layout.width


def _summary(
    kernel: str,
    side: str,
    rate: str,
    views: list[tuple[int, list[float]]],
    bytes_per_row: float,
) -> GpuMeasurement:
    """Views differ in size: their median time per row, for a view of the mean size."""
    mean = fmean(rows for rows, _ in views)
    per_row = median(median(times) / rows for rows, times in views)
    measured = Measurement(kernel, side, mean, per_row * mean * 1e3, bytes_per_row)
    return GpuMeasurement(measured, rate)
