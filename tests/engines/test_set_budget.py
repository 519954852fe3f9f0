"""Another budget between steps: the cache follows, or it is refused and nothing changes."""

from __future__ import annotations

import re

import pytest
import torch

from gsscale_nerfstudio.engines import Budget, HostEngine, ResidentEngine
from gsscale_nerfstudio.engines.sizing import view_bytes, with_margin
from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.store import HostStore, RowLayout
from tests.engines.driving import (
    SIZE,
    around,
    copies,
    dense,
    drive,
    largest_errors,
    random_rows,
    ring_of_views,
)

ROWS = 500
CPU = torch.device("cpu")


def store_of(layout: RowLayout) -> HostStore:
    store = HostStore(layout, max_rows=1000)
    store.append(random_rows(ROWS, layout), stamp=0)
    store.sort()
    return store


def budget_for(rows: int, layout: RowLayout, view_rows: int) -> Budget:
    """One that lets a cache have so many rows (or a few more) beside the largest view."""
    needed = view_bytes(with_margin(view_rows), SIZE[0] * SIZE[1])
    return Budget(Budget.least(CPU, layout.cached_bytes, needed, rows) + 1e-9)


def test_the_least_budget_gives_the_rows():
    row_bytes, needed = 768, 12_345_678
    least = Budget.least(CPU, row_bytes, needed, 1000)
    assert Budget(least + 1e-9).cache_rows(CPU, row_bytes, needed) == 1000
    assert Budget(least - 1e-9).cache_rows(CPU, row_bytes, needed) == 999


def test_the_cache_follows_and_results_stay():
    layout = RowLayout(1)
    store = store_of(layout)
    # The largest view of the drive: its motion is small beside the margin.
    view = max(HostEngine(store, CPU).visible_rows(view) for view in ring_of_views())
    engine = ResidentEngine(store, CPU, budget_for(3 * ROWS, layout, view))
    before = copies(store)
    capacities, at = [], {8: 2 * view, 16: 3 * view, 24: 3 * ROWS}

    def change(step: int) -> None:
        if engine.cached is not None:
            capacities.append(engine.cached[1])
        if step in at:
            engine.set_budget(budget_for(at[step], layout, view))
        if step == 12:
            with pytest.raises(GSScaleError, match="do not hold the largest view"):
                engine.set_budget(budget_for(view // 2, layout, view))

    seen = drive(engine, 32, before_step=change)
    engine.settle()
    errors = largest_errors(store, dense(before, seen, 32))
    assert max(errors.values()) < 1e-5, errors
    few = pytest.approx(2 * view, rel=0.1), pytest.approx(3 * view, rel=0.1)
    everything = ROWS + ROWS // 8
    assert capacities[:8] == [everything] * 8
    assert capacities[8:] == [few[0]] * 8 + [few[1]] * 8 + [everything] * 7
    assert engine.bounded and engine.cached[0] <= ROWS


def test_refused_with_the_least_that_would_do():
    layout = RowLayout(1)
    store = store_of(layout)
    view = max(HostEngine(store, CPU).visible_rows(view) for view in ring_of_views())
    engine = ResidentEngine(store, CPU, budget_for(2 * view, layout, view))
    drive(engine, 12)
    with pytest.raises(GSScaleError) as refusal:
        engine.set_budget(Budget(0.1))
    least = float(re.search(r"at least ([\d.]+) GB", str(refusal.value)).group(1))
    engine.set_budget(Budget(least))
    assert engine.budget.gigabytes == least


def test_a_larger_budget_is_not_held_down_by_a_lack_of_memory_before_it():
    layout = RowLayout(1)
    store = store_of(layout)
    view = max(HostEngine(store, CPU).visible_rows(view) for view in ring_of_views())
    engine = ResidentEngine(store, CPU, budget_for(3 * view, layout, view))
    cached = []

    def change(step: int) -> None:
        cached.append(engine.cached)
        if step == 6:
            assert engine.make_room("no memory", 1)
        if step == 12:
            engine.set_budget(budget_for(2.9 * view, layout, view))
        if step == 18:
            engine.set_budget(budget_for(3 * ROWS, layout, view))

    drive(engine, 24, before_step=change)
    before, short, same, larger = (cached[step][1] for step in (6, 12, 18, 23))
    assert short == same == before - before // 4
    assert larger == ROWS + ROWS // 8


def test_more_memory_brings_the_cache_back(capsys):
    layout = RowLayout(1)
    store = store_of(layout)
    view = max(HostEngine(store, CPU).visible_rows(view) for view in ring_of_views())
    engine = ResidentEngine(store, CPU, budget_for(view // 2, layout, view))
    before = copies(store)
    cached = []

    def change(step: int) -> None:
        cached.append(engine.cached)
        if step == 8:
            engine.set_budget(budget_for(view // 3, layout, view))
        if step == 16:
            engine.set_budget(budget_for(3 * ROWS, layout, view))

    seen = drive(engine, 32, before_step=change)
    engine.settle()
    errors = largest_errors(store, dense(before, seen, 32))
    assert max(errors.values()) < 1e-5, errors
    assert cached[1:17] == [None] * 16 and None not in cached[18:]
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("Adam runs on the CPU") == 2 and "GPU has room for" in said


def test_the_host_engine_sizes_views_by_it(monkeypatch):
    engine = HostEngine(store_of(RowLayout(0)), CPU, Budget(1.0))
    assert not engine.bounded  # there is no GPU
    view = around(0)
    drive(engine, 2)
    monkeypatch.setattr(engine._sizing, "_device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * 10**9,) * 2)
    assert engine._sizing.fits(10_000, view)
    engine.set_budget(Budget(0.66))
    assert not engine._sizing.fits(10_000, view) and engine._sizing.fits(100, view)
    assert engine.budget == Budget(0.66)
