"""The host engine: whatever is done ahead or put off, dense Adam's numbers come out."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from gsscale_nerfstudio.cull import Culler, View
from gsscale_nerfstudio.densify import RowStrategy
from gsscale_nerfstudio.engines import HostEngine, host
from gsscale_nerfstudio.engines.streams import Stress
from gsscale_nerfstudio.store import GROUPS, RowLayout
from tests.engines.driving import (
    DEVICES,
    copies,
    dense,
    drive,
    largest_errors,
    make_engine,
    random_rows,
    ring_of_views,
    unordered_error,
)

ROWS = 400


def host_engine(device: str, degree: int = 1, rows: int = ROWS) -> HostEngine:
    layout = RowLayout(degree)
    return make_engine(random_rows(rows, layout), layout, device, None)


Change = Callable[[int, dict], None]


def no_change(step: int, optimizers: dict) -> None:
    pass


def turning(step: int) -> View:
    """To the neighbour at most steps, so that many rows are hot, and now and then elsewhere."""
    views = ring_of_views()
    return views[(step + step // 6 * 5) % len(views)]


@pytest.fixture(params=["kernels", "torch"])
def backend(request, monkeypatch):
    """On a CPU, packing in Triton's interpreter and in torch; on a GPU the kernels."""
    if request.param == "torch":
        if torch.cuda.is_available():
            pytest.skip("a GPU has kernels")
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return request.param


@pytest.fixture
def without_kernels(monkeypatch):
    """Quick and, in threads, denser: torch packs where there is no GPU."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def check_equals_dense(
    engine: HostEngine, steps: int, change: Change = no_change, **hooks: Any
) -> None:
    """``change`` may do to both sides' optimizers what it likes, in every step."""
    before = copies(engine.store)
    seen = drive(engine, steps, **{"view_at": turning, "in_step": change, **hooks})
    engine.settle()
    expected = dense(before, seen, steps, change)
    errors = largest_errors(engine.store, expected)
    assert max(errors.values()) < 1e-5, errors
    assert engine.store.bookkeeping("count").sum() == sum(len(view.ids) for view in seen)
    assert torch.equal(engine.store.bookkeeping("stamp"), torch.full((len(engine.store),), steps))
    blocks = engine.store.blocks.clone()
    engine.culler.refresh(len(engine.store))
    assert torch.equal(engine.store.blocks, blocks)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("degree", [0, 2, 3])
def test_two_hundred_steps_equal_dense_adam(device, degree, backend, monkeypatch):
    """Schedules on, views announced: rows are hot and cold, and parts of hot rows are small."""
    monkeypatch.setattr(host, "_HOT_PART", 16)
    steps = 200 if degree == 2 or device == "cuda" else 30
    engine = host_engine(device, degree)
    check_equals_dense(engine, steps)
    counters = engine.counters
    assert counters["views"] == steps
    assert 0.2 * counters["rows"] < counters["rows_missed"] < 0.8 * counters["rows"]
    assert counters["link_bytes"] == 2 * counters["rows"] * engine.store.layout.width * 4
    assert min(counters[name] for name in ("cull_s", "step_s", "host_wait_s")) > 0


@pytest.mark.parametrize("device", DEVICES)
def test_more_steps_than_the_horizon(device, without_kernels):
    """Rows come back after more skipped steps than the table of gaps holds."""
    engine = host_engine(device, 0, 150)
    views = ring_of_views()
    horizon = 270
    assert engine.history.horizon < horizon
    check_equals_dense(
        engine, horizon + 40, view_at=lambda step: views[(step // 3) % 2 if 5 < step < 290 else 6]
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_in_between(device, seed, without_kernels, monkeypatch):
    """Renders, settling, wrong and missing announcements, at any point of a step; late threads."""
    monkeypatch.setattr(Stress, "longest", 0.003 * (seed % 2))
    chance = random.Random(seed)
    engine = host_engine(device)
    views = ring_of_views()

    def disturb(*_: object) -> None:
        kind = chance.randrange(8)
        if kind == 0:
            working = engine.fetch(chance.choice(views))
            assert all(torch.isfinite(leaf).all() for leaf in working.leaves.values())
        elif kind == 1:
            engine.settle()
        elif kind == 2:
            engine.announce([chance.choice(views)])
        elif kind == 3:
            engine.refresh_bounds()

    check_equals_dense(
        engine,
        80,
        announce=lambda step: chance.random() < 0.8,
        before_step=disturb,
        in_step=disturb,
        after_step=disturb,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("longest", [0.002, 0.02])
@pytest.mark.parametrize("every", [1, 2])
def test_results_do_not_depend_on_who_is_late(device, longest, every, without_kernels, monkeypatch):
    plain, stressed = host_engine(device), host_engine(device)
    some = {"announce": lambda step: step % every == 0, "view_at": turning}
    drive(plain, 40, **some)
    monkeypatch.setattr(Stress, "longest", longest)
    drive(stressed, 40, **some)
    for engine in (plain, stressed):
        engine.settle()
    # Nobody's lateness decides which rows are in a view, or hot.
    for name in GROUPS:
        assert torch.equal(plain.store.column(name), stressed.store.column(name))
    assert torch.equal(plain.store.spheres[:ROWS], stressed.store.spheres[:ROWS])


def nothing() -> View:
    return moved(ring_of_views()[0], -1000.0)  # everything lies behind


def moved(view: View, forward: float) -> View:
    """The same camera, with everything ``forward`` further in front of it."""
    viewmat = view.viewmat.copy()
    viewmat[2, 3] += forward
    return View(viewmat, view.K, view.width, view.height)


PATHS = {
    "the same view again": lambda views: [views[0]] * 3 + [views[5]],
    "no rows in common": lambda views: [moved(views[0], -1.0), moved(views[6], -1.0)],
    "no rows at all": lambda views: [views[0], nothing(), nothing(), views[0], views[1], nothing()],
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", PATHS)
def test_paths_at_the_ends_of_the_range(device, path, backend):
    engine = host_engine(device)
    views = PATHS[path](ring_of_views())
    sizes = [len(engine.fetch(view)) for view in views]
    assert (0 in sizes) == (path == "no rows at all")
    check_equals_dense(engine, 24, view_at=lambda step: views[step % len(views)])
    if path == "no rows in common":
        common = set(engine.fetch(views[0]).ids.tolist()) & set(engine.fetch(views[1]).ids.tolist())
        assert not common


@pytest.mark.parametrize("device", DEVICES)
def test_learning_rates_that_change_after_the_announcement(device, without_kernels):
    """Cold rows were settled for a step that did not come; a rise also outgrows the bounds."""

    def change(step: int, optimizers: dict) -> None:
        if step % 3 == 1:
            for name in ("means", "opacities"):
                optimizers[name].param_groups[0]["lr"] *= 0.25 if step % 2 else 1.9

    engine = host_engine(device)
    check_equals_dense(engine, 60, change)
    plain = host_engine(device)
    drive(plain, 60, view_at=turning)
    # The views after such steps were brought in anew.
    assert engine.counters["rows_missed"] > 1.1 * plain.counters["rows_missed"]


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_that_does_not_come_about(device, without_kernels):
    """A gradient scaler may skip the optimizers: the announced view is begun all the same."""
    engine = host_engine(device)
    views = ring_of_views()
    drive(engine, 10)
    for name, lr in zip(GROUPS, engine._last_lrs, strict=True):
        # Nothing but the number of the step tells that it is not the one that was expected.
        engine.optimizers[name].param_groups[0]["lr"] = lr
    for view, following in pairwise(views):
        engine.begin(view)
        engine.announce([following])
    working = engine.begin(views[-1])
    assert engine.step_count == 10
    engine.settle()
    for name, leaf in working.leaves.items():
        expected = engine.store.column(name)[working.ids.long()]
        torch.testing.assert_close(leaf.detach().cpu(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
def test_a_view_that_is_stepped_twice(device, without_kernels):
    engine = host_engine(device)

    def again(step: int) -> None:
        if step == 5:
            for optimizer in engine.optimizers.values():
                optimizer.step()

    seen = drive(engine, 12, after_step=again, view_at=turning)
    engine.settle()
    assert engine.step_count == 13
    assert (engine.store.bookkeeping("stamp") == 13).all()
    seen.append(seen[5])
    assert engine.store.bookkeeping("count").sum() == sum(len(view.ids) for view in seen)


@pytest.mark.parametrize("device", DEVICES)
def test_densification_in_between(device, without_kernels):
    """The same rows grow, split and go whether views are announced or not."""
    stores = []
    for announced in (False, True):
        torch.manual_seed(5)
        strategy = RowStrategy(
            grow_grad2d=0.95,
            grow_scale3d=0.07,
            refine_start_iter=5,
            refine_every=10,
            reset_every=30,
            prune_opa=0.4,
            verbose=False,
        )
        engine = host_engine(device)
        sizes = []

        def refine(step: int, engine=engine, strategy=strategy, sizes=sizes) -> None:
            strategy.refine(engine, step)
            sizes.append(len(engine.store))

        drive(
            engine, 45, announce=lambda step, yes=announced: yes, after_step=refine, view_at=turning
        )
        engine.settle()
        assert len(set(sizes)) > 2
        stores.append(engine.store)
    assert len(stores[0]) == len(stores[1])
    assert unordered_error(*stores) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("settled", [False, True])
def test_culling_ahead_drops_no_row(device, settled, without_kernels):
    """A view that was culled before the last step was done holds all rows that it sees after."""
    engine = host_engine(device)
    sizes = []

    def compare(step: int) -> None:
        if not engine._announced:
            return
        early = engine._announced[0].prepared.result().ids
        # The worker knew of all steps but the pending one.
        assert engine._visible.known_step == engine.step_count - 1
        engine._finish_step()
        assert engine._visible.known_step == engine.step_count
        if settled:
            engine.settle()
        everything = torch.empty(ROWS, engine.store.layout.width)
        ids = torch.arange(ROWS, dtype=torch.int32)
        engine._gather(ids, everything, None, engine.history.tables)
        means, scales = (everything[:, engine.store.layout.columns[n]] for n in GROUPS[:2])
        spheres = Culler.spheres_of(means, scales.exp())
        exact = Culler(spheres, torch.empty(2, 8))
        exact.refresh(ROWS)
        late = exact.cull(turning(step), ROWS)
        assert set(late.tolist()) <= set(early.tolist())
        sizes.append((len(late), len(early)))

    drive(engine, 40, before_step=compare, view_at=turning)
    late, early = (sum(size) for size in zip(*sizes, strict=True))
    assert len(sizes) == 39 and late < early < 1.4 * late


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("begun", [False, True])
def test_rows_that_are_loaded_are_not_stepped_over(device, begun, without_kernels, monkeypatch):
    """A checkpoint comes while a step is pending, or while the worker has the rest of it."""
    monkeypatch.setattr(Stress, "longest", 0.03)
    engine = host_engine(device)
    drive(engine, 3, view_at=turning)
    adam = engine.optimizers["means"]
    saved = adam.state_dict()
    engine.announce([turning(9)])  # no step is under way: culled only
    engine.begin(turning(9))
    engine.announce([turning(10)])
    for leaf in engine.current.leaves.values():
        leaf.grad = torch.ones_like(leaf)
    for name in GROUPS:
        engine.optimizers[name].step()
    if begun:
        engine.begin(turning(10))
        assert not list(engine._worker._jobs)[-1].done()
    adam.load_state_dict(saved)
    moments = engine.store.column("means", engine.store.exp_avg)
    for _ in range(2):
        assert torch.equal(moments, saved["state"][0]["exp_avg"])
        engine.settle()
        engine._worker.submit(lambda: None).result()
    assert engine.step_count == 3


@pytest.mark.parametrize("device", DEVICES)
def test_a_restart_drops_the_pending_step(device, without_kernels):
    engine = host_engine(device)
    drive(engine, 5)
    engine._wait_for_worker()  # the step before the pending one may still be under way
    engine.store.column("means").fill_(0.25)  # as a checkpoint's rows
    engine.restart(5)
    engine.settle()
    assert (engine.store.column("means") == 0.25).all()


@pytest.mark.gpu
def test_views_of_any_size_pass_through_the_rings():
    """Staging and the buffer on the device grow while copies are under way."""
    layout = RowLayout(3)
    engine = make_engine(random_rows(150_000, layout), layout, "cuda", None)

    def zoomed(step: int) -> View:
        return moved(ring_of_views()[0], [0.1, 3.0, 0.5, 40.0, 0.1, 40.0][step % 6])

    check_equals_dense(engine, 24, view_at=zoomed)
