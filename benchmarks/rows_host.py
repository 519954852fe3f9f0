"""The host's row kernels and the culler on a store of made-up rows, beside the memory's own rate.

Import this module only after ``OMP_NUM_THREADS`` was set: the kernels' threads are counted once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.fixed_rows import FixedScene
from gsscale_nerfstudio import _C
from gsscale_nerfstudio.cull import Culler, View
from gsscale_nerfstudio.optim import AdamHistory
from gsscale_nerfstudio.store import GROUPS, HostStore, RowLayout
from gsscale_nerfstudio.store.memory import ReservedArray

REPETITIONS = 5
COPIED = 1 << 28, 4 << 30
"""Bytes of each array of the copy, at least and at most; the latter is more than any cache."""
STEP = 64
LONGEST_GAP = 24
"""Rows are 1 to 24 steps behind, as where a view sees 8 % of them."""
LR = 1e-6
"""So small that rows stay where they are, however often they are stepped."""
_FILL_ROWS = 1 << 16


@dataclass
class Measurement:
    """One kernel.

    Attributes:
        kernel: its name.
        side: ``host``, ``gpu`` or ``link``: whose memory, or what between them, limits it.
        rows: rows that one call was given, on average.
        ms: median over calls.
        bytes_per_row: read + written, as far as the task itself needs it.
    """

    kernel: str
    side: str
    rows: float
    ms: float
    bytes_per_row: float

    @property
    def ns_per_row(self) -> float:
        return self.ms * 1e6 / self.rows

    @property
    def bytes_per_s(self) -> float:
        return self.bytes_per_row * self.rows / (self.ms / 1e3)


def memory_rate(size: int, threads: int) -> dict[str, float]:
    """Bytes read + written per second: ``copy`` of one array to another, ``in_place`` scaling.

    A copy that doesn't bypass the cache reads its target, too, which nobody counts; scaling in
    place, what the row kernels' accesses are like, has no such traffic. Kernels are compared with
    the faster of the two. Each is the best of its repetitions, as it stands for what is possible.

    Args:
        size: bytes of each array; :data:`COPIED` bounds it.
        threads: torch's threads.
    """
    torch.set_num_threads(threads)
    width = 64
    # The store's kind of memory, with huge pages.
    size = min(max(size, COPIED[0]), COPIED[1])
    arrays = [ReservedArray(size // (4 * width), width) for _ in range(2)]
    source, target = (array.tensor for array in arrays)
    source.fill_(1.0)
    target.fill_(2.0)
    moved = 2 * source.numel() * source.element_size()
    return {
        "copy": moved / min(_times(lambda: target.copy_(source))),
        "in_place": moved / min(_times(lambda: source.mul_(1.0))),
    }


def _times(work: Callable[[], Any], prepare: Callable[[], Any] = lambda: None) -> list[float]:
    """Seconds of each repetition, after one that doesn't count."""
    times = []
    for _ in range(1 + REPETITIONS):
        prepare()
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times[1:]


class HostRows:
    """A store in the middle of a training: moments filled, rows up to 24 steps behind.

    Args:
        scene: rows and cameras.
        views: number of cameras to measure with, evenly spaced over the scene's.
    """

    def __init__(self, scene: FixedScene, views: int) -> None:
        rows, cameras = scene.rows, scene.cameras
        self.layout = RowLayout(rows.sh_degree)
        self.store = HostStore(self.layout, rows.rows)
        for values in rows.chunks():
            self.store.append(values, stamp=STEP)
        self.store.sort()
        self._random = torch.Generator().manual_seed(rows.seed)
        self._fill_moments()
        rates = dict.fromkeys(GROUPS, LR)
        self.history = AdamHistory(self.layout, rates, dict.fromkeys(GROUPS, 1e-15))
        self.lrs = np.full(len(GROUPS), LR)
        for _ in range(STEP):
            self.history.advance(self.lrs)
        self.n = len(self.store)
        self.culler = Culler(self.store.spheres, self.store.blocks)
        self._make_stale(torch.arange(self.n))
        _C.refresh_spheres(self.store.kernel_rows, self.history.tables, 0, self.n)
        self.culler.refresh(self.n)
        chosen = np.linspace(0, len(cameras) - 1, min(views, len(cameras))).round().astype(int)
        self.views = [View.from_camera(cameras[i : i + 1]) for i in chosen]
        self.ids = torch.empty(self.n, dtype=torch.int32)

    def _fill_moments(self) -> None:
        """Real pages with ordinary numbers: a page never written would be read from the cache."""
        columns = self.layout.optimized
        m = 2e-3 * torch.rand(_FILL_ROWS, columns, generator=self._random) - 1e-3
        for first in range(0, len(self.store), _FILL_ROWS):
            end = min(len(self.store), first + _FILL_ROWS)
            self.store.exp_avg[first:end, :columns] = m[: end - first]
            self.store.exp_avg_sq[first:end, :columns] = (m * m + 1e-7)[: end - first]

    def _make_stale(self, ids: Tensor) -> None:
        """Let rows be current for one of the last steps, but not for the present one."""
        gaps = torch.randint(1, LONGEST_GAP + 1, (len(ids),), generator=self._random)
        self.store.bookkeeping("stamp")[ids] = (STEP - gaps).float()

    def settle(self) -> Measurement:
        """All rows in place: the three arrays' rows are read and written."""
        every = torch.arange(self.n)
        work = _times(
            lambda: _C.settle_range(self.store.kernel_rows, self.history.tables, 0, self.n),
            prepare=lambda: self._make_stale(every),
        )
        self._make_stale(every)
        return Measurement("settle", "host", self.n, median(work) * 1e3, 2 * 3 * self._row_bytes)

    def gather_settled(self) -> Measurement:
        """A view's rows to staging: id and three rows read, one row written."""
        out = torch.empty(self._most_visible(), self.layout.width).fill_(0.0)
        times, rows = [], []
        for ids in self.visible_ids():
            start = time.perf_counter()
            _C.gather_settled(self.store.kernel_rows, self.history.tables, ids.numpy(), out.numpy())
            times.append(time.perf_counter() - start)
            rows.append(len(ids))
        return self._per_view("gather_settled", rows, times, 4 + 4 * self._row_bytes)

    def settle_and_step(self) -> Measurement:
        """A view's rows in place: id, gradient, three rows read, three rows, sphere written."""
        grads = torch.empty(self._most_visible(), self.layout.width).fill_(1e-3)
        grads[:, self.layout.optimized :] = 0.0
        per_column = np.append(self.lrs, 0.0)[self.layout.group_of_column].astype(np.float32)
        times, rows = [], []
        for ids in self.visible_ids():
            start = time.perf_counter()
            _C.settle_and_step(
                self.store.kernel_rows,
                self.history.tables,
                ids.numpy(),
                grads.numpy(),
                per_column,
            )
            times.append(time.perf_counter() - start)
            rows.append(len(ids))
            self._make_stale(ids.long())
        return self._per_view("settle + step", rows, times, 4 + 7 * self._row_bytes + 16)

    def cull(self) -> Measurement:
        """All rows, a view at a time: block bounds, the spheres of cut blocks, ids out."""
        times, needed = [], []
        for view in self.views:
            start = time.perf_counter()
            ids = self.culler.cull(view, self.n, out=self.ids)
            times.append(time.perf_counter() - start)
            cut = _cut_blocks(self.store.blocks[: -(-self.n // _C.BLOCK_ROWS)], view)
            needed.append(
                32 * -(-self.n // _C.BLOCK_ROWS) + 16 * _C.BLOCK_ROWS * cut + 4 * len(ids)
            )
        return Measurement(
            "cull", "host", self.n, median(times) * 1e3, sum(needed) / len(needed) / self.n
        )

    def replace_spheres(self) -> Measurement:
        """A view's spheres from the device to the culler: id and sphere read, sphere written, and
        read once more for its block's bound."""
        new = self.store.spheres[: self._most_visible()].clone()
        times, rows = [], []
        for ids in self.visible_ids():
            values = new[: len(ids)].copy_(self.store.spheres[ids.long()])
            start = time.perf_counter()
            self.culler.replace(self.n, ids, values)
            times.append(time.perf_counter() - start)
            rows.append(len(ids))
        return self._per_view("replace spheres", rows, times, 4 + 3 * 16)

    def plan_slots(self) -> Measurement:
        """Slots for a view's rows in a cache of two and a half views: id and its copy, the table's
        entry read and written, slot; of half of the rows, which were not there, the move."""
        most = self._most_visible()
        table = _C.SlotTable(5 * most // 2, self.n)
        slots, moves = np.empty(most, np.int32), np.empty((most, 3), np.int32)
        times, rows = [], []
        for number, ids in enumerate(self.visible_ids(), 1):
            start = time.perf_counter()
            table.plan(ids.numpy(), number, number, slots, moves)
            times.append(time.perf_counter() - start)
            rows.append(len(ids))
        return self._per_view("plan slots", rows, times, 8 + 16 + 4 + 6)

    def visible_ids(self) -> Iterator[Tensor]:
        """Rows [n] int32 of each view; valid until the next ones are asked for."""
        for view in self.views:
            yield self.culler.cull(view, self.n, out=self.ids)

    def visible_share(self) -> float:
        """Mean share of the rows that the views see."""
        return sum(len(ids) for ids in self.visible_ids()) / (len(self.views) * self.n)

    def measure(self) -> list[Measurement]:
        """All kernels."""
        kernels = self.settle(), self.settle_and_step(), self.gather_settled(), self.cull()
        return [*kernels, self.replace_spheres(), self.plan_slots()]

    @property
    def _row_bytes(self) -> int:
        return 4 * self.layout.width

    def _most_visible(self) -> int:
        return max(len(ids) for ids in self.visible_ids())

    def _per_view(
        self, kernel: str, rows: list[int], times: list[float], bytes_per_row: float
    ) -> Measurement:
        """Views differ in size: their median time per row, for a view of the mean size."""
        mean = sum(rows) / len(rows)
        per_row = median(t / n for t, n in zip(times, rows, strict=True) if n)
        return Measurement(kernel, "host", mean, per_row * mean * 1e3, bytes_per_row)


def _cut_blocks(blocks: Tensor, view: View) -> int:
    """Blocks whose bound some plane cuts, so that their rows have to be looked at (cull.h)."""
    planes = torch.from_numpy(view.planes())
    form, offset = planes[:, [0, 1, 2, 4]], planes[:, 3]
    low, high = blocks[:, :4], blocks[:, 4:]
    up, down = form.clamp_min(0).T, form.clamp_max(0).T
    least = low @ up + high @ down + offset
    most = high @ up + low @ down + offset
    return int(((most >= 0).all(dim=1) & (least < 0).any(dim=1)).sum())
