"""Engines with moments of 16 bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gsscale_nerfstudio.engines import ResidentEngine, Viewpoint
from gsscale_nerfstudio.engines.cache import RowCache
from gsscale_nerfstudio.engines.streams import mark_current
from gsscale_nerfstudio.engines.working_set import working_set
from gsscale_nerfstudio.optim.device_tables import DeviceTables
from gsscale_nerfstudio.store import GROUPS, RowLayout
from gsscale_nerfstudio.store.keys import keys_of
from tests.engines.driving import (
    DEVICES,
    LR,
    copies,
    dense,
    drive,
    largest_errors,
    make_engine,
    random_rows,
)
from tests.engines.test_resident import ROWS, largest_view
from tests.optim.test_moments import check_rounded

NARROW = torch.bfloat16
WIDE = torch.float32


def layouts(degree: int = 1) -> tuple[RowLayout, RowLayout]:
    return RowLayout(degree, NARROW), RowLayout(degree, WIDE)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("room", [None, 2.0, 1.2])
def test_training_stays_near_dense_adam(device, room):
    """By either engine, with rows that come and go."""
    layout = RowLayout(1, NARROW)
    slots = None if room is None else int(room * largest_view(layout))
    steps = 200 if device == "cuda" or room is None else 60
    engine = make_engine(random_rows(ROWS, layout), layout, device, slots)
    before = copies(engine.store)
    seen = drive(engine, steps)
    engine.settle()
    expected = dense(before, seen, steps)
    errors = largest_errors(engine.store, expected)
    assert max(errors.values()) < 5e-3, errors
    # Of how far they have gone, in the mean: each step is off by a part of itself.
    for name in GROUPS:
        way = (expected[name] - before[name]).abs().mean()
        off = (engine.store.column(name) - expected[name]).abs().mean()
        assert 0 < off < 0.03 * way, name
    assert engine.store.exp_avg.dtype == engine.store.exp_avg_sq.dtype == NARROW


@pytest.mark.parametrize("device", DEVICES)
def test_rows_are_rounded_on_the_device_as_on_the_host(device):
    engines = [make_engine(random_rows(3000, layout), layout, device, 3000) for layout in layouts()]
    for engine in engines:
        assert isinstance(engine, ResidentEngine)
        drive(engine, 1)
        engine.settle()
    narrow, wide = (engine.store for engine in engines)
    of = slice(3000), slice(narrow.layout.optimized)
    assert (narrow.params[of] - wide.params[of]).abs().max() < 1e-6
    # Two kernels on a GPU may multiply and add in one, or not.
    strays = 1e-3 if device == "cuda" else 0.0
    check_rounded(narrow.exp_avg[of].flatten(), wide.exp_avg[of].flatten(), strays)
    check_rounded(narrow.exp_avg_sq[of].flatten(), wide.exp_avg_sq[of].flatten(), strays)


@pytest.mark.parametrize("device", DEVICES)
def test_equal_rows_with_ids_beyond_2_to_the_24_are_rounded_each_in_its_own_way(device):
    layout, n, place = RowLayout(3, NARROW), 100, torch.device(device)
    engine = make_engine(random_rows(n, layout), layout, device, n)
    store = engine.store
    store.params[:n] = store.params[0].clone()
    store.exp_avg[:n, : layout.optimized] = 0.01
    store.exp_avg_sq[:n, : layout.optimized] = 1e-4
    store.bookkeeping("key")[:] = keys_of(torch.arange(20_000_000, 20_000_000 + n))
    if place.type == "cuda":
        store.pin()  # the optimizers would have it done
    cache, ids = RowCache(store, place, n), torch.arange(n, dtype=torch.int32)
    slots = cache.admit(ids, 1, 1, None).slots
    tables, viewpoint = DeviceTables(engine.history, place), Viewpoint(torch.ones(3).to(place), 3)
    attributes = cache.gather(slots, tables, viewpoint, training=True)
    working = working_set(ids, attributes, layout, viewpoint, training=True)
    cache.step(slots, working, tables, np.array([LR[name] for name in GROUPS]))
    cache.write_back(mark_current(place))
    assert len(store.exp_avg_sq[:n].view(torch.int16).unique(dim=0)) == n


@pytest.mark.parametrize("slots", [None, 1000])
def test_moments_of_32_bits_without_noise_do_not_ask_for_keys(slots):
    layout, ends = RowLayout(1), []
    for keys in (torch.zeros(1000), keys_of(torch.arange(20_000_000, 20_001_000))):
        engine = make_engine(random_rows(1000, layout), layout, "cpu", slots)
        engine.store.bookkeeping("key")[:] = keys
        # Which rows a view brings along depends on how far the worker is, and those that it does
        # not need end a rounding away.
        drive(engine, 6, announce=lambda step: False)
        engine.settle()
        store = engine.store
        assert torch.equal(store.bookkeeping("key"), keys)
        store.bookkeeping("key").zero_()
        arrays = store.params, store.exp_avg, store.exp_avg_sq, store.spheres
        ends.append([array[:1000].clone() for array in arrays])
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))


def test_a_cache_that_grows_keeps_them():
    layout = RowLayout(1, NARROW)
    engine = make_engine(random_rows(ROWS, layout), layout, "cpu", int(1.5 * largest_view(layout)))
    drive(engine, 8)
    cache, bits = engine._cache, torch.int16
    rows, slots = cache.residents()
    held = [a[slots.long()].clone() for a in (cache.exp_avg, cache.exp_avg_sq)]
    assert held[0].dtype == NARROW and held[0].any()
    cache.grow(2 * len(cache))
    for before, after in zip(held, (cache.exp_avg, cache.exp_avg_sq), strict=True):
        assert torch.equal(before.view(bits), after[slots.long()].view(bits))
    engine.settle()
    ids = rows.long()
    for before, after in zip(held, (engine.store.exp_avg, engine.store.exp_avg_sq), strict=True):
        settled = after[ids].float()
        assert (settled - before.float()).abs().max() <= before.float().abs().max()
        assert settled.any()
