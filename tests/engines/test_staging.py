"""Page-locked buffers: what they take, and what becomes of a view for which there is none."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gsscale_nerfstudio.cull import View
from gsscale_nerfstudio.engines import ResidentEngine, ViewInParts, parts, view_staging
from gsscale_nerfstudio.engines.sizing import ViewSizing
from gsscale_nerfstudio.engines.staging import Staging
from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.store import RowLayout, memory
from gsscale_nerfstudio.store.memory import ReservedArray
from tests.engines.driving import around, drive, make_engine, random_rows, ring_of_views

LAYOUT = RowLayout(1)
ROWS = 400
ROW = 4 * LAYOUT.width


class Locked:
    """Memory of a machine where staging is page-locked, as for a GPU.

    Attributes:
        size: bytes that can be locked in all.
        pieces: bytes of what is locked, by its address.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.size = 1 << 30
        self.pieces: dict[int, int] = {}
        self.made: weakref.WeakSet[Staging] = weakref.WeakSet()
        cudart = SimpleNamespace(
            cudaHostRegister=self._register, cudaHostUnregister=self.pieces.pop
        )
        monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
        monkeypatch.setattr(memory, "_PIN_CHUNKS", (1 << 8, 1 << 20))
        for module in (memory, view_staging):
            monkeypatch.setattr(module, "available_memory", lambda: self.size - self.taken)
        monkeypatch.setattr(view_staging, "headroom", lambda: 1000)
        made = Staging.__init__

        def locking(staging: Staging, *args: object) -> None:
            made(staging, *args)  # type: ignore[arg-type]
            staging._cuda = True
            self.made.add(staging)

        monkeypatch.setattr(Staging, "__init__", locking)

    def _register(self, address: int, size: int, flags: int) -> int:
        self.pieces[address] = size
        assert self.taken <= self.size, "killed"
        return 0

    @property
    def taken(self) -> int:
        return sum(self.pieces.values())


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Locked]:
    locked = Locked(monkeypatch)
    yield locked
    for staging in locked.made:  # there is nothing to unlock when they go
        staging._array._pinned.clear()


def test_what_is_not_there_is_not_locked(locked):
    array = ReservedArray(1000, 16)
    assert array.to_be_locked(100) == 100 * 64 * 5 // 4
    array.pin_whole(100)
    assert locked.taken == 8000 and array.to_be_locked(125) == 0
    assert array.to_be_locked(200) == 16_000 - 8000  # its first part is there already
    locked.size = 8000 + 4799
    with pytest.raises(GSScaleError, match=r"buffers for 200 Gaussians .* free host memory"):
        array.pin_whole(200)
    assert array.pinned_rows == 125
    locked.size += 1
    array.pin_whole(200)
    assert locked.taken == 12_800  # with nothing to spare
    locked.size = 1 << 20
    array.pin_whole(201)
    assert locked.taken == 201 * 64 * 5 // 4
    assert array.to_be_locked(1000) == 64_000 - locked.taken  # there is no more of it
    array.unpin()
    assert locked.taken == 0


def test_a_view_without_staging_comes_in_parts(locked, capsys):
    """And with less of it: gradients of one step, and rows of one part at a time."""
    engine = make_engine(random_rows(ROWS, LAYOUT), LAYOUT, "cpu", None)
    view = around(0)
    n = engine.visible_rows(view)
    drive(engine, 1)  # now it is training
    engine._set_up_staging(engine.store, engine.device)
    locked.size = locked.taken + n * ROW * 5 // 4 + 1000 + n * ROW // 2
    whole = engine.begin(view)
    assert isinstance(whole, ViewInParts) and len(whole.parts) > 1
    for part in whole.parts:
        engine.bring_part(whole, part, engine._viewpoint(view), training=False)
    said = " ".join(capsys.readouterr().out.split())
    assert "host memory is low" in said and "drawn in parts" in said
    locked.size = 1 << 30
    engine.abandon()
    assert not isinstance(engine.begin(view), ViewInParts)


@pytest.mark.parametrize("training", [False, True])
def test_windows_end_somewhere_without_staging(locked, training):
    """With one for every tile of the rasterizer nothing would come to an end."""
    engine = make_engine(random_rows(ROWS, LAYOUT), LAYOUT, "cpu", None)
    part = around(0)
    K = np.diag([20.0, 20.0, 1.0]) @ part.K
    view = View(part.viewmat, K, 20 * part.width, 20 * part.height)
    ids = engine._rows_in(view)

    def windows() -> int:
        if training:
            return len(parts.windows_of(view, ids, engine._rows_in, engine._have_room))
        return len(engine.windows(view))

    assert windows() == 1
    locked.size = locked.taken
    assert 16 < windows() <= 2 * parts._MOST_WINDOWS
    locked.size += 1000 + len(ids) * ROW
    assert 1 < windows() < 16, "more than needed"


def test_parts_use_one_buffer_of_gradients_step_by_step():
    engine = make_engine(random_rows(ROWS, LAYOUT), LAYOUT, "cpu", None)
    buffers = []

    def note(step: int) -> None:
        assert engine._pending is not None
        buffers.append(engine._pending.grads.data_ptr())

    drive(engine, 6, after_step=note)
    assert buffers[0] != buffers[1] and buffers == buffers[:2] * 3  # the worker has the other one
    engine._sizing.most = 40
    drawn = []
    for step in range(3):
        whole = engine.begin(around(step))
        drawn.append(whole._sums.data_ptr())
        engine._step_rows(whole, engine.learning_rates)
        engine._finish_step()
    assert len(set(drawn)) == 1


def test_a_cache_that_comes_back_gives_back_the_host_engines_staging(locked, monkeypatch):
    """And the host engine has the room of the cache's buffers."""
    monkeypatch.setattr(ViewSizing, "fits", lambda sizing, rows, view: True)
    largest = max(
        len(make_engine(random_rows(ROWS, LAYOUT), LAYOUT, "cpu", None).fetch(view))
        for view in ring_of_views()
    )
    engine = make_engine(random_rows(ROWS, LAYOUT), LAYOUT, "cpu", 2 * largest)
    assert isinstance(engine, ResidentEngine)
    taken: dict[bool, list[int]] = {False: [], True: []}

    def pause(step: int) -> None:
        if step == 10:
            with monkeypatch.context() as patch:
                patch.setattr(engine.budget, "rows", largest // 2)
                engine.rest()
                engine._pause_caching(largest)
        engine.rest()

    def note(step: int) -> None:
        if step not in (10, 18):  # buffers of both, for one step
            taken[engine.cached is not None].append(
                sum(
                    array.pinned_rows
                    for array in (
                        engine._staging.outgoing._array,
                        engine._staging.cold._staging._array,
                        *(staging._array for staging in engine._staging._gradients),
                    )
                )
            )

    drive(engine, 30, before_step=pause, after_step=note)
    assert len(taken[False]) > 5 and min(taken[False]) > 0
    assert len(taken[True]) > 10 and max(taken[True]) == 0
