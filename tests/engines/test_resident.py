"""The resident engine: whatever the budget and whoever is late, dense Adam's numbers come out."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from gsscale_nerfstudio.cull import Culler, View
from gsscale_nerfstudio.densify import RowStrategy
from gsscale_nerfstudio.engines import Budget, ResidentEngine, sizing
from gsscale_nerfstudio.engines import make_engine as engine_of
from gsscale_nerfstudio.engines.budget import IN_TENSORS
from gsscale_nerfstudio.engines.rates import Rates
from gsscale_nerfstudio.engines.sizing import CacheSizing, ViewSizing, with_margin
from gsscale_nerfstudio.engines.streams import Stress
from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.store import HostStore, RowLayout
from gsscale_nerfstudio.store.edit import RowEdit
from tests.engines.driving import (
    DEVICES,
    SIZE,
    around,
    copies,
    dense,
    drive,
    largest_errors,
    make_engine,
    random_rows,
    ring_of_views,
    unordered_error,
)

ROWS = 500


def largest_view(layout: RowLayout) -> int:
    engine = make_engine(random_rows(ROWS, layout), layout, "cpu", None)
    return max(len(engine.fetch(view)) for view in ring_of_views())


def largest_working_set(layout: RowLayout, steps: int) -> int:
    """Rows of the largest view of a training; rows move, so that it is not that of the start."""
    engine = make_engine(random_rows(ROWS, layout), layout, "cpu", None)
    sizes, begin = [], engine.begin

    def begin_and_count(*args: Any) -> Any:
        working = begin(*args)
        sizes.append(len(working))
        return working

    engine.begin = begin_and_count
    drive(engine, steps)
    return max(sizes)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("budget", ["all rows", "two views", "one view"])
@pytest.mark.parametrize("degree", [0, 2, 3])
def test_two_hundred_steps_equal_dense_adam(device, budget, degree, capsys):
    """Learning-rate schedules on, views announced; with less room, rows come and go."""
    if device == "cpu" and degree != 2 and budget != "two views":
        pytest.skip("slow without a GPU, and covered by the others")
    layout = RowLayout(degree)
    steps = 200 if (degree, budget) == (2, "two views") or device == "cuda" else 40
    room = {"all rows": ROWS, "two views": 2 * largest_view(layout)}.get(budget)
    room = room or with_margin(largest_working_set(layout, steps))  # the least that will do
    engine = make_engine(random_rows(ROWS, layout), layout, device, room)
    before = copies(engine.store)
    seen = drive(engine, steps)
    counters = dict(engine.counters)
    engine.settle()
    expected = dense(before, seen, steps)
    moved = min(float((expected[n] - before[n]).abs().max()) for n in before if before[n].numel())
    assert moved > 1e-4
    errors = largest_errors(engine.store, {n: v for n, v in expected.items()})
    assert max(e for e in errors.values() if e == e) < 1e-5, errors
    assert counters["views"] == steps
    assert engine._fitted is not None  # it did not fall back to the host engine
    said = " ".join(capsys.readouterr().out.split())
    assert said.count(f"engine resident. The GPU has room for {room:,} Gaussians") == 1
    if budget != "two views":  # which have room or not, as they come
        assert ("two consecutive views do not fit" in said) == (budget == "one view")
    missed = counters["rows_missed"]
    assert missed <= ROWS if budget == "all rows" else missed > 0.2 * counters["rows"]
    assert engine.store.bookkeeping("count").sum() == sum(len(view.ids) for view in seen)


@pytest.mark.parametrize("device", DEVICES)
def test_renders_and_wrong_announcements_do_not_disturb(device):
    layout = RowLayout(1)
    view = largest_view(layout)
    plain, watched = (
        make_engine(random_rows(ROWS, layout), layout, device, 2 * view) for _ in range(2)
    )
    drive(plain, 60, announce=lambda step: False)
    chance = random.Random(1)
    views = ring_of_views()

    def look(step: int) -> None:
        if chance.random() < 0.5:
            working = watched.fetch(chance.choice(views))
            assert all(torch.isfinite(leaf).all() for leaf in working.leaves.values())
        if chance.random() < 0.2:
            watched.settle()
        if chance.random() < 0.2:
            watched.announce([chance.choice(views)])  # not what comes next

    drive(watched, 60, before_step=look)
    plain.settle()
    watched.settle()
    # The rows of a view depend on what was known when it was culled; their values do not.
    errors = largest_errors(watched.store, copies(plain.store))
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_what_is_fetched_is_what_is_settled(device, cached, moments):
    """Rows in the cache and rows in the host store, at any number of steps behind."""
    layout = RowLayout(1, moments)
    room = 2 * largest_view(layout) if cached else None
    engine = make_engine(random_rows(ROWS, layout), layout, device, room)
    drive(engine, 30)
    fetched = [engine.fetch(view) for view in ring_of_views()]
    if cached:
        assert 0 < engine._cache.table.in_use < ROWS
    engine.settle()
    for working in fetched:
        for name, leaf in working.leaves.items():
            expected = engine.store.column(name)[working.ids.long()]
            torch.testing.assert_close(leaf.cpu(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_culling_ahead_drops_no_row(device, moments):
    """A view that was culled before the last step was done holds all rows that it sees after."""
    layout = RowLayout(1, moments)
    engine = make_engine(random_rows(ROWS, layout), layout, device, ROWS)
    views = ring_of_views()
    ahead, exact = [], []

    def compare(step: int) -> None:
        if engine._announced:
            view = views[step * 5 % len(views)]
            ahead.append(engine._announced[0].prepared.result().ids)
            # What the view sees of the rows as they are, without room for steps to come.
            late = engine.fetch(view)
            means, scales = (late.leaves[name].cpu() for name in ("means", "scales"))
            spheres = Culler.spheres_of(means, torch.exp(scales)).numpy()
            planes = view.planes()
            distances = spheres[:, :3] @ planes[:, :3].T + planes[:, 3]
            visible = (distances + spheres[:, 3:] * planes[:, 4] >= 0).all(axis=1)
            exact.append(late.ids[torch.from_numpy(visible)])

    drive(engine, 30, before_step=compare)
    assert len(ahead) >= 28
    for early, late in zip(ahead, exact, strict=True):
        assert set(late.tolist()) <= set(early.tolist())
    sizes = [sum(len(ids) for ids in sets) for sets in (exact, ahead)]
    assert sizes[0] < sizes[1] < 1.5 * sizes[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("share", [0.7, 3])
def test_densification_in_between(device, share, monkeypatch):
    """The same rows grow, split and go as with the host engine, and have the same values.

    Streams and threads of the resident engine are late at random.
    """
    layout = RowLayout(1)

    def strategy() -> RowStrategy:
        return RowStrategy(
            grow_grad2d=0.95,
            grow_scale3d=0.07,
            refine_start_iter=5,
            refine_every=10,
            reset_every=30,
            prune_opa=0.4,
            verbose=False,
        )

    stores = []
    for cache_rows in (None, int(share * ROWS)):
        torch.manual_seed(5)
        engine = make_engine(random_rows(ROWS, layout), layout, device, cache_rows)
        strategies = strategy()
        sizes = []

        def refine(step: int, engine=engine, strategies=strategies, sizes=sizes) -> None:
            strategies.refine(engine, step)
            sizes.append(len(engine.store))

        with monkeypatch.context() as late:
            late.setattr(Stress, "longest", 0.002 if cache_rows else 0.0)
            drive(engine, 45, announce=lambda step: step % 2 == 0, after_step=refine)
        engine.settle()
        assert len(set(sizes)) > 2
        stores.append(engine.store)
    assert len(stores[0]) == len(stores[1])
    assert unordered_error(*stores) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_rows_stay_resident_while_others_are_edited(device):
    """With room for all, only rows that densification wrote cross the link again."""
    layout = RowLayout(1)
    engine = make_engine(random_rows(ROWS, layout), layout, device, 4 * ROWS)
    strategy = RowStrategy(
        grow_grad2d=0.95, grow_scale3d=0.07, refine_start_iter=5, refine_every=10, verbose=False
    )
    written = []

    def apply(edits: Iterable[RowEdit], apply=engine.apply) -> None:
        def counted() -> Iterator[RowEdit]:
            for edit in edits:
                written[-1] += len(edit.values) + len(edit.added)
                yield edit

        written.append(0)
        apply(counted())

    engine.apply = apply
    drive(engine, 36, after_step=lambda step: strategy.refine(engine, step))
    assert len(written) == 3 and min(written) > 20
    assert engine.counters["rows_missed"] <= ROWS + sum(written) < 0.2 * engine.counters["rows"]


@pytest.mark.parametrize("device", DEVICES)
def test_opacities_are_reset_wherever_they_are(device):
    layout = RowLayout(1)
    half, none = (
        make_engine(random_rows(ROWS, layout), layout, device, rows)
        for rows in (largest_view(layout) + ROWS // 4, None)
    )
    for engine in (half, none):
        drive(engine, 20)
        engine.limit_opacities(-0.05)
    assert 0 < half._cache.table.in_use < ROWS
    for engine in (half, none):
        engine.settle()
        opacities = engine.store.column("opacities")
        assert opacities.max() <= -0.05 + 1e-7 and opacities.min() < -0.1
        assert not engine.store.column("opacities", engine.store.exp_avg).any()
        assert not engine.store.column("opacities", engine.store.exp_avg_sq).any()
        assert engine.store.column("means", engine.store.exp_avg).any()
    errors = largest_errors(half.store, copies(none.store))
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("device", DEVICES)
def test_summaries_are_of_settled_rows_wherever_they_are(device):
    layout = RowLayout(1)
    room = largest_view(layout) + ROWS // 4
    engine = make_engine(random_rows(ROWS, layout), layout, device, room)
    twin = make_engine(random_rows(ROWS, layout), layout, device, None)
    for each in (engine, twin):
        drive(each, 20)
    twin.settle()
    store = twin.store
    counts = store.bookkeeping("count").clone()
    gradient = store.bookkeeping("grad2d") / counts.clamp_min(1)
    radius = store.bookkeeping("max_radius").clone()
    assert counts.max() > 1 and counts.min() == 0
    summary = engine.summarize()
    torch.testing.assert_close(summary.gradient, gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(summary.radius, radius, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(summary.scale, store.column("scales").amax(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        summary.opacity, store.column("opacities").flatten(), rtol=1e-5, atol=1e-5
    )
    again = engine.summarize()
    assert not again.gradient.any() and not again.radius.any()


@pytest.mark.parametrize("device", DEVICES)
def test_results_do_not_depend_on_who_is_late(device, monkeypatch):
    layout = RowLayout(1)
    room = 2 * largest_view(layout)
    plain, stressed = (
        make_engine(random_rows(ROWS, layout), layout, device, room) for _ in range(2)
    )
    drive(plain, 50)
    monkeypatch.setattr(Stress, "longest", 0.004)
    drive(stressed, 50)
    plain.settle()
    stressed.settle()
    errors = largest_errors(stressed.store, copies(plain.store))
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("device", DEVICES)
def test_a_budget_below_one_view_goes_on_as_the_host_engine(device, monkeypatch, capsys):
    layout = RowLayout(1)
    engine = make_engine(random_rows(ROWS, layout), layout, device, largest_view(layout) // 2)
    # It is their optimizer state that has no room; views are whole.
    monkeypatch.setattr(ViewSizing, "fits", lambda sizing, rows, view: True)
    before = copies(engine.store)
    seen = drive(engine, 20)
    assert "vram-budget-gb" in capsys.readouterr().out
    engine.settle()
    errors = largest_errors(engine.store, dense(before, seen, 20))
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("device", DEVICES)
def test_a_view_larger_than_expected_gets_a_new_cache(device):
    """Views differ by more than the reserve that the cache was made with."""
    layout = RowLayout(1)
    values = random_rows(ROWS, layout)
    values["means"][: ROWS // 2, 0] = -abs(values["means"][: ROWS // 2, 0])
    values["means"][: 4 * ROWS // 5, 2] = -abs(values["means"][: 4 * ROWS // 5, 2])
    engine = make_engine(values, layout, device, ROWS)
    before = copies(engine.store)
    seen = drive(engine, 24)
    sizes = [len(view.ids) for view in seen]
    assert max(sizes) > 2 * sizes[0]
    engine.settle()
    errors = largest_errors(engine.store, dense(before, seen, 24))
    assert max(errors.values()) < 1e-5, errors
    assert engine._fitted is not None


class BudgetInBytes:
    """So many bytes for the cache and a view together."""

    def __init__(self, size: int) -> None:
        self.size = size

    def cache_rows(self, _device: object, row_bytes: int, needed: int, _cached: int = 0) -> int:
        return (self.size - needed) // row_bytes


def test_a_cache_makes_room_for_larger_images_of_the_same_rows(monkeypatch):
    """As when splatfacto's schedule doubles their sides.

    Not on a GPU, where what rows take beside is measured: torch's pieces are larger than all this.
    """
    monkeypatch.setattr(sizing, "_VIEW_ROW_BYTES", 0)  # a view needs memory for its pixels alone
    layout, pixels = RowLayout(0), ring_of_views()[0].width * ring_of_views()[0].height
    engine = make_engine(random_rows(ROWS, layout), layout, "cpu", ROWS)
    engine.budget = BudgetInBytes(4 * pixels * sizing._PIXEL_BYTES + 400 * layout.cached_bytes)

    def view_at(step: int) -> View:
        view, times = ring_of_views()[step * 5 % 12], 1 if step < 6 else 2
        K = view.K * [[times], [times], [1]]
        return replace(view, K=K, width=times * view.width, height=times * view.height)

    before, sizes = copies(engine.store), []
    seen = drive(engine, 12, view_at=view_at, after_step=lambda _: sizes.append(len(engine._cache)))
    engine.settle()
    assert sizes == [ROWS + ROWS // 8] * 6 + [400] * 6
    errors = largest_errors(engine.store, dense(before, seen, 12))
    assert max(errors.values()) < 1e-5, errors


def test_a_restart_forgets_the_cache():
    layout = RowLayout(1)
    engine = make_engine(random_rows(ROWS, layout), layout, "cpu", ROWS)
    drive(engine, 5)
    engine.settle()
    engine.store.column("means").add_(1.0)
    engine.restart(5)
    working = engine.fetch(ring_of_views()[0])
    expected = engine.store.column("means")[working.ids.long()]
    assert len(working) and torch.equal(working.leaves["means"], expected)


def test_budgets():
    cpu = torch.device("cpu")
    assert Budget(None).cache_rows(cpu, 768, 10**6) == 2**31 - 1
    four, eight = (Budget(gb).cache_rows(cpu, 768, 10**9) for gb in (4, 8))
    assert eight - four == pytest.approx(IN_TENSORS * 4e9 / 768, abs=2)
    assert 0 < four < 3e9 / 768
    assert Budget(0.5).cache_rows(cpu, 768, 1000) == 0
    less = Budget(4).cache_rows(cpu, 768, 10**9 + 768 * 1000)
    assert less == four - 1000


def test_what_a_view_needs_is_measured(monkeypatch):
    """What torch holds beside the cache and what was there between views, per row."""
    memory = {"reserved": 0, "allocated": 0}
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: memory["reserved"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: memory["allocated"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10**12, 10**12))
    layout = RowLayout(3)
    sizing = CacheSizing(Budget(8), torch.device("cuda"), layout)
    slots, images, pixels = 10**6, 50_000_000, 3_000_000
    memory["allocated"] = images + slots * sizing.row_bytes
    sizing.saw(800_000, pixels)
    sizing.leave_room_for(1_000_000, pixels)
    guessed = sizing.limit(slots)
    for per_row in (500, 900):
        memory["reserved"] = memory["allocated"] + 800_000 * per_row + 130 * pixels
        sizing.observe(slots)
        more = sizing.view_rows * (700 - per_row) / sizing.row_bytes
        assert sizing.limit(slots) - guessed == pytest.approx(more, abs=2)
    # A smaller view that is seen after memory was given back tells as much.
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    sizing.give_back()
    sizing.saw(100_000, pixels)
    memory["reserved"] = memory["allocated"] + 100_000 * 700 + 130 * pixels
    sizing.observe(slots)
    assert sizing.limit(slots) == pytest.approx(guessed, abs=2)


def test_refused_without_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    store = HostStore(RowLayout(0), max_rows=100)
    store.append(random_rows(50, store.layout), stamp=0)
    engine = engine_of("resident", store, None)
    with pytest.raises(GSScaleError, match="host"):
        drive(engine, 1)
    assert isinstance(engine_of("auto", store, None), ResidentEngine)


def test_a_cache_follows_the_room_that_there_is():
    """Before a view that was not announced; a little over or under is let be."""
    layout = RowLayout(1)
    view = largest_view(layout)
    engine = make_engine(random_rows(ROWS, layout), layout, "cpu", 2 * view)
    before = copies(engine.store)
    caches = []

    def change(step: int) -> None:
        caches.append((engine._cache, len(engine._cache), engine._cache.table.in_use))
        rooms = {5: 1.98 * view, 10: 1.4 * view, 15: 1.6 * view, 20: 1.9 * view, 25: 3 * ROWS}
        if step in rooms:
            engine.budget.rows = int(rooms[step])
            engine.rest()
            engine._fitted.outdated = True

    seen = drive(engine, 30, after_step=change)
    first, smaller, larger, plenty = caches[5], caches[11], caches[21], caches[26]
    assert caches[9][:2] == first[:2] and caches[4][2] > view
    assert smaller[0] is not first[0] and smaller[1] == int(1.4 * view)
    assert caches[19][:2] == smaller[:2]
    # With no room for the copy that growing takes, it is a new cache.
    assert larger[0] is not smaller[0] and larger[1] == int(1.9 * view)
    assert plenty[0] is larger[0] and plenty[1] == ROWS + ROWS // 8
    assert plenty[2] >= caches[25][2]  # rows stay
    engine.settle()
    errors = largest_errors(engine.store, dense(before, seen, 30))
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("link, engine_is", [(1e3, "host"), (1e12, "resident")])
def test_auto_leaves_a_link_that_is_too_slow(link, engine_is, capsys):
    layout = RowLayout(1)
    engine = make_engine(random_rows(ROWS, layout), layout, "cpu", largest_view(layout) + 20)
    before = copies(engine.store)

    def ask(step: int) -> None:
        engine._sizing.rates = Rates(link=link, memory=1e9)
        if step == 10:
            engine.rest()
            engine._fitted.outdated = True

    seen = drive(engine, 20, after_step=ask)
    assert (engine._fitted is not None) == (engine_is == "resident")
    assert ("link is too slow" in capsys.readouterr().out) == (engine_is == "host")
    engine.settle()
    errors = largest_errors(engine.store, dense(before, seen, 20))
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("device", DEVICES)
def test_rates_are_measured(device):
    rates = Rates.measure(torch.device(device))
    assert 1e8 < rates.link < 1e13 and 1e8 < rates.memory < 1e13
    layout = RowLayout(3)
    assert rates.host_seconds(100, layout) > rates.resident_seconds(1, layout) > 0


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("cache_rows", [ROWS, None])
@pytest.mark.parametrize("after", [1, 3, 10, 30, 100])
def test_a_render_is_whole_or_not_at_all(cache_rows, after):
    """Nerfstudio's viewer gives up a render by raising from a trace function, at any line."""
    layout = RowLayout(1)
    engines = [make_engine(random_rows(ROWS, layout), layout, "cpu", cache_rows) for _ in range(2)]
    views = ring_of_views()

    def look(step: int) -> None:
        lines = 0

        def trace(frame, event, arg):
            nonlocal lines
            lines += 1
            if lines > after:
                raise Interrupted
            return trace

        sys.settrace(trace)
        try:
            engines[1].fetch(views[step % len(views)])
        except Interrupted:
            pass
        finally:
            sys.settrace(None)

    drive(engines[0], 12)
    drive(engines[1], 12, before_step=look)
    for engine in engines:
        engine.settle()
    errors = largest_errors(engines[1].store, copies(engines[0].store))
    assert max(errors.values()) < 1e-5, errors


def overview() -> View:
    """From where all rows are seen."""
    viewmat = np.eye(4)
    viewmat[2, 3] = 12.0
    return View(viewmat, around(0).K, *SIZE)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("every", "cached"), [(40, 0.7), (7, 0.0)])
def test_a_cache_that_an_overview_ended_comes_back(device, monkeypatch, capsys, every, cached):
    """After some steps; after more of them where there are many such views."""
    layout = RowLayout(1)
    largest = largest_view(layout)
    engine = make_engine(random_rows(ROWS, layout), layout, device, 2 * largest)
    monkeypatch.setattr(ViewSizing, "fits", lambda sizing, rows, view: True)
    before = copies(engine.store)
    had: list[bool] = []
    steps = 160

    def view_at(step: int) -> View:
        return overview() if step % every == every - 1 else around(step)

    seen = drive(
        engine, steps, after_step=lambda _: had.append(bool(engine.cached)), view_at=view_at
    )
    assert max(len(view.ids) for view in seen) > 2 * largest
    engine.settle()
    errors = largest_errors(engine.store, dense(before, seen, steps))
    assert max(errors.values()) < 1e-5, errors
    assert had[0] and not any(had[every - 1 :: every])
    share = sum(had[every:]) / len(had[every:])
    assert cached < share < cached + 0.3
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("cannot hold a view") == told.count("GPU has room for") == 1
