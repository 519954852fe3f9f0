"""Views that are only shown, prepared by the worker: what is fetched stays the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gsscale_nerfstudio.cull import View
from gsscale_nerfstudio.engines import Engine
from gsscale_nerfstudio.engines.streams import Stress
from gsscale_nerfstudio.store import RowLayout
from tests.engines.driving import DEVICES, make_engine, make_optimizers, random_rows, ring_of_views

ROWS = 300
CACHES = [None, ROWS]


def tensors(engine: Engine, view: View) -> dict[str, Tensor]:
    working = engine.fetch(view)
    return {"ids": working.ids, **working.leaves, "colors": working.colors.values}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cache_rows", CACHES)
@pytest.mark.parametrize("longest", [0.0, 0.004])
def test_what_is_announced_is_fetched_as_it_would_be(device, cache_rows, longest, monkeypatch):
    """Views as announced, others, one twice, and one that comes after its turn."""
    monkeypatch.setattr(Stress, "longest", longest)
    layout = RowLayout(2)
    values, views = random_rows(ROWS, layout), ring_of_views()
    watched, apart = (make_engine(values, layout, device, cache_rows) for _ in range(2))
    expected = [tensors(apart, view) for view in views]
    culled: list[View] = []
    monkeypatch.setattr(
        watched, "_cull", lambda view, *args: culled.append(view) or apart._cull(view, *args)
    )
    found = []
    order = [(0, 1), (1, 2), (2, 3), (3, 7), (4, 5), (5, 5), (5, 8), (9, None), (8, 0)]
    for i, following in order:
        found.append((i, tensors(watched, views[i])))
        if following is not None:
            watched.announce_fetch(ring_of_views()[following])  # made anew, as renderers do
        # What has been fetched is not touched by what comes next.
        assert same(found[-1][1], expected[i])
    watched._wait_for_worker()
    assert all(same(tensors_, expected[i]) for i, tensors_ in found)
    # One for each announcement, and one for each view that was not the last announced: 0, 4, 9, 8.
    assert len(culled) == 8 + 4


def test_rows_that_have_changed_are_fetched_anew():
    layout = RowLayout(1)
    values, view = random_rows(ROWS, layout), ring_of_views()[0]
    engine = make_engine(values, layout, "cpu", None)
    engine.announce_fetch(view)
    engine.settle()
    engine.store.column("means").add_(0.1)
    engine.rows_changed()
    working = engine.fetch(view)
    assert torch.equal(working.leaves["means"], engine.store.column("means")[working.ids.long()])


def test_nothing_is_done_ahead_where_rows_are_trained():
    layout = RowLayout(1)
    engine = make_engine(random_rows(ROWS, layout), layout, "cpu", None)
    view = ring_of_views()[0]
    engine.announce_fetch(view)
    assert engine._to_fetch is not None
    make_optimizers(engine.parameters(), deferred=True, steps=10)
    assert engine._to_fetch is None
    engine.announce_fetch(view)
    assert engine._to_fetch is None


def test_parts_are_found_with_the_rows_culled_ahead(monkeypatch):
    """A view that turns out not to fit: announced or not, it is cut into the same windows."""
    layout = RowLayout(1)
    engine = make_engine(random_rows(ROWS, layout), layout, "cpu", None)
    views = ring_of_views()
    engine._sizing.most = len(engine.fetch(views[1]).ids) // 2
    expected = engine.windows(views[1])
    assert len(expected) > 1
    culled: list[View] = []
    cull = engine._cull
    monkeypatch.setattr(
        engine, "_cull", lambda view, *args: culled.append(view) or cull(view, *args)
    )
    engine.announce_fetch(views[1])
    windows = engine.windows(views[1])
    assert all(a.same_as(b) for a, b in zip(windows, expected, strict=True))
    assert sum(view.window is None for view in culled) == 1


def test_memory_that_runs_out_ahead_is_known_when_the_view_comes(monkeypatch):
    layout = RowLayout(1)
    engine = make_engine(random_rows(ROWS, layout), layout, "cpu", None)
    view = ring_of_views()[0]
    expected = tensors(engine, view)

    def fail(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as context:
        context.setattr(engine, "_gather_all", fail)
        engine.announce_fetch(view)
        engine._worker.wait()
    with pytest.raises(torch.OutOfMemoryError):
        engine.fetch(view)
    engine.announce_fetch(view)
    assert engine.make_room("out of memory", 0)
    assert engine._to_fetch is None
    assert same(tensors(engine, view), expected)
