"""GPU memory runs out in a step: the step is done again, with the same bits in the end."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from gsscale_nerfstudio.cull import View
from gsscale_nerfstudio.engines import Engine, ResidentEngine, cache
from gsscale_nerfstudio.engines.budget import Budget
from gsscale_nerfstudio.engines.cache import RowCache
from gsscale_nerfstudio.engines.sizing import CacheSizing, ViewSizing
from gsscale_nerfstudio.engines.streams import Stress
from gsscale_nerfstudio.out_of_memory import is_out_of_memory, retried
from gsscale_nerfstudio.store import GROUPS, RowLayout
from tests.engines.driving import (
    FixedBudget,
    around,
    give_gradients,
    in_view,
    make_engine,
    make_optimizers,
    random_rows,
    ring_of_views,
)
from tests.shortage import MESSAGE, failing_allocation

ROWS = 400
STEPS = 8


def largest_view(layout: RowLayout) -> int:
    engine = make_engine(random_rows(ROWS, layout), layout, "cpu", None)
    return max(len(engine.fetch(view)) for view in ring_of_views())


class Training:
    """Steps of an engine that go back and begin anew when memory runs out."""

    def __init__(self, engine: Engine, steps: int = STEPS) -> None:
        self.engine = engine
        self.optimizers, self.schedulers = make_optimizers(engine.parameters(), True, steps)
        self.leaves: list[weakref.ref[Tensor]] = []
        self.tries: list[int] = []

    def view(self, step: int) -> View:
        return around(step)

    def step(self, step: int) -> None:
        retried(lambda: self._attempt(step), self._again)
        for name in GROUPS:
            self.schedulers[name].step()

    def _again(self, said: str, tries: int) -> None:
        self.tries.append(tries)
        self.engine.abandon()
        assert all(leaf() is None for leaf in self.leaves)
        assert self.engine.make_room(said, tries)

    def _attempt(self, step: int) -> None:
        view = self.view(step)
        working = self.engine.begin(view)
        self.leaves = [weakref.ref(leaf) for leaf in working.leaves.values()]
        self.engine.announce([self.view(step + k) for k in range(1, 9)])
        # Which rows a view is given beyond those it sees depends on whether this step's spheres
        # have arrived, and to the last bit so do the rows.
        self.engine._wait_for_worker()
        give_gradients(working, in_view(working.leaves["means"].detach(), view), step)
        self.fail_before_stepping(step)
        for name in GROUPS:
            self.optimizers[name].step()

    def fail_before_stepping(self, step: int) -> None:
        """Nothing by default."""


class Failing(Training):
    """Memory runs out at given steps, so many times in a row, when most of a step is done."""

    def __init__(self, engine: Engine, failures: dict[int, int], steps: int = STEPS) -> None:
        super().__init__(engine, steps)
        self.failures = failures

    def fail_before_stepping(self, step: int) -> None:
        if self.failures.get(step, 0) > 0:
            self.failures[step] -= 1
            # Some groups' optimizers have told the engine already.
            for name in GROUPS[: self.failures[step] + 1]:
                self.optimizers[name].step()
            raise torch.cuda.OutOfMemoryError(MESSAGE)


def rows_of(engine: Engine) -> dict[str, Tensor]:
    """All rows, settled, with moments and statistics; spheres, too."""
    engine.settle()
    n, store = len(engine.store), engine.store
    return {
        name: getattr(store, name)[:n].clone()
        for name in ("params", "exp_avg", "exp_avg_sq", "spheres")
    }


def assert_same(a: Engine, b: Engine) -> None:
    ours, theirs = rows_of(a), rows_of(b)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert a.step_count == b.step_count


def engine_with(cache_rows: int | None, layout: RowLayout) -> Engine:
    return make_engine(random_rows(ROWS, layout), layout, "cpu", cache_rows)


@pytest.fixture(params=["host", "resident", "resident, small"])
def cache_rows(request: pytest.FixtureRequest) -> int | None:
    """Of an engine without, with a cache of all rows, and with one of two views'."""
    small = 2 * largest_view(RowLayout(1))
    return {"host": None, "resident": ROWS, "resident, small": small}[request.param]


def test_any_allocation_of_a_step_may_fail(cache_rows, monkeypatch):
    """In the main thread or the worker's: rows and statistics are stepped once, and all of them."""
    monkeypatch.setattr("gsscale_nerfstudio.engines.resident._RARELY", 0)  # as if by chance
    steps, nth, hits = 26, 0, 0
    whole, failing = (Training(engine_with(cache_rows, RowLayout(1)), steps) for _ in range(2))
    for step in range(steps):
        with failing_allocation(-1, monkeypatch) as asked:
            whole.step(step)
        if step == 3:
            places = set(asked)
        # What fails in the worker comes up a step or two later, and the next one waits for it.
        ready = step >= 2 and len(failing.tries) == hits
        with failing_allocation(nth if ready else -1, monkeypatch) as asked_again:
            failing.step(step)
        if ready:
            hits += len(asked_again) > nth
            nth += 1
    assert "empty_attributes" in places
    assert cache_rows is None or {"admit", "step", "_upload"} <= places
    assert nth > len(asked)  # all of a step's have failed
    assert failing.tries == [0] * hits and hits >= 6
    assert_same(whole.engine, failing.engine)


@pytest.mark.parametrize("stress", [0, 0.01])
def test_a_step_that_failed_is_done_again_with_the_same_bits(cache_rows, stress, monkeypatch):
    monkeypatch.setattr("gsscale_nerfstudio.engines.resident._RARELY", 0)
    monkeypatch.setattr(Stress, "longest", stress)
    layout = RowLayout(1)
    whole = Training(engine_with(cache_rows, layout))
    failing = Failing(engine_with(cache_rows, layout), {0: 1, 1: 1, 4: 1, 7: 1})
    for step in range(STEPS):
        whole.step(step)
        failing.step(step)
    assert failing.tries == [0] * 4
    assert_same(whole.engine, failing.engine)
    counts = [training.engine.store.bookkeeping("count").sum() for training in (whole, failing)]
    assert counts[0] == counts[1] > 0


class Apart(Training):
    """Views whose rows do not depend on when they are culled."""

    def view(self, step: int) -> View:
        return ring_of_views()[step * 6 % 12]


def two_clouds(layout: RowLayout) -> dict[str, Tensor]:
    """Rows in the middle of either of two opposite views, and none elsewhere."""
    values = random_rows(ROWS, layout)
    means = 0.1 * values["means"]
    means[:, 2] += torch.where(torch.arange(ROWS) % 2 == 0, 2.0, -2.6)
    values["means"] = means
    values["scales"] = torch.full_like(values["scales"], -4)
    return values


class ApartAndFailing(Failing, Apart):
    pass


def trained_apart(failures: dict[int, int]) -> tuple[Training, list[int]]:
    """A training in a cache that has room for all rows, and its slots after each step."""
    engine = make_engine(two_clouds(RowLayout(1)), RowLayout(1), "cpu", ROWS)
    assert isinstance(engine, ResidentEngine)
    training = ApartAndFailing(engine, failures, 12)
    sizes = []
    for step in range(12):
        training.step(step)
        sizes.append(len(engine._cache) if engine._cache is not None else 0)
    assert {len(engine.fetch(ring_of_views()[i])) for i in (0, 6)} == {ROWS // 2}
    return training, sizes


LEAST = ROWS // 2 + ROWS // 2 // 8
"""Slots that are enough for a view."""


def test_the_cache_shrinks_and_stays_small(capsys):
    """The first error may be chance. Later ones cost slots, which do not come back."""
    whole, sizes = trained_apart({})
    assert sizes == [ROWS] * 12
    failing, sizes = trained_apart({2: 1, 4: 1, 6: 1})
    assert sizes == [ROWS] * 4 + [ROWS * 3 // 4] * 2 + [LEAST] * 6
    assert_same(whole.engine, failing.engine)
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("Tried to allocate 2.00 GiB); ") == 3
    assert "torch kept for later was given back" in told
    assert "300 Gaussians with their Adam state stay on the GPU, not 400" in told
    assert "225 Gaussians with their Adam state stay on the GPU, not 300" in told

    failing.engine.rest()
    failing.engine._fitted.outdated = True  # as after a refinement
    failing.step(12)
    assert len(failing.engine._cache) == LEAST


def test_after_the_smallest_cache_comes_the_host_engine(capsys):
    whole, _ = trained_apart({})
    failing, sizes = trained_apart({2: 4, 8: 1})
    assert sizes == [ROWS] * 2 + [0] * 10
    assert failing.engine._fitted is None and failing.tries == [0, 1, 2, 3, 0]
    assert "Adam runs on the CPU" in " ".join(capsys.readouterr().out.split())
    ours, theirs = rows_of(failing.engine), rows_of(whole.engine)
    for name in ("params", "exp_avg"):  # C++ rounds in other places than the kernels
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("failures", [1, 3])
def test_what_was_given_up_comes_back_when_memory_has_sufficed_for_long(failures, monkeypatch):
    """A smaller cache, or, after three failures in a row, the one that was given up."""
    monkeypatch.setattr("gsscale_nerfstudio.engines.sizing._QUIET", 4)
    whole, _ = trained_apart({})
    failing, sizes = trained_apart({1: 1, 2: failures})
    small = {1: ROWS * 3 // 4, 3: 0}[failures]
    # Another view may begin before a new cache does.
    assert sizes[:6] == [ROWS] * 2 + [small] * 4 and sizes[7:] == [ROWS] * 5
    assert not failing.engine._sizing.limited
    ours, theirs = rows_of(failing.engine), rows_of(whole.engine)
    for name in ("params", "exp_avg"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


def test_views_are_drawn_whole_again_when_memory_has_sufficed_for_long(monkeypatch):
    monkeypatch.setattr("gsscale_nerfstudio.engines.sizing._QUIET", 4)
    monkeypatch.setattr("gsscale_nerfstudio.engines.sizing._FEWEST", 1)
    engine = engine_with(None, RowLayout(1))
    training = Failing(engine, {1: 1})
    training.step(0)
    training.step(1)
    assert engine.make_room("no memory", 1)
    most = engine._sizing.most
    assert most < ROWS
    for _ in range(4):
        assert engine._sizing.most == most
        engine._step_recorded()
    engine.begin(around(6))
    assert engine._sizing.most > ROWS


def test_nothing_is_left_when_the_host_engine_fails_twice():
    engine = engine_with(None, RowLayout(1))
    training = Failing(engine, {3: 2})
    with pytest.raises(AssertionError):
        for step in range(STEPS):
            training.step(step)
    assert training.tries == [0, 1] and engine.step_count == 3


def test_a_cache_that_cannot_be_made_is_made_smaller(monkeypatch):
    """Also when it is to grow: what is there stays."""
    layout = RowLayout(1)
    engine = make_engine(two_clouds(layout), layout, "cpu", ROWS)
    made, room = RowCache.__init__, [ROWS - 1]

    def scarce(self: RowCache, store: Any, device: Any, slots: int) -> None:
        if slots > room[0]:
            raise torch.cuda.OutOfMemoryError(MESSAGE)
        made(self, store, device, slots)

    monkeypatch.setattr(RowCache, "__init__", scarce)
    training = Apart(engine)
    for step in range(3):
        training.step(step)
    cache = engine._cache
    assert len(cache) == ROWS * 3 // 4

    def no_growth(self: RowCache, slots: int) -> None:
        raise torch.cuda.OutOfMemoryError(MESSAGE)

    monkeypatch.setattr(RowCache, "grow", no_growth)
    engine.budget.rows = engine._sizing._most_slots = 3 * ROWS  # plenty: the cache is to grow
    engine.rest()
    engine._fitted.outdated = True
    training.step(3)
    wanted = ROWS + ROWS // 8
    assert engine._cache is cache and engine._sizing._most_slots == wanted - wanted // 4


def test_growing_may_fail_half_way():
    """Slots that were there stay whole, and growing can be tried again."""
    layout = RowLayout(0)
    store = make_engine(random_rows(ROWS, layout), layout, "cpu", None).store
    store.exp_avg[:ROWS].uniform_()
    cache = RowCache(store, torch.device("cpu"), 100)
    ids = torch.arange(0, 200, 2, dtype=torch.int32)
    cache.admit(ids, 0, 0, None)
    with pytest.MonkeyPatch.context() as patch, failing_allocation(1, patch) as asked:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            cache.grow(150)
        assert asked == ["grow", "grow"]
    assert len(cache) == 100 and len(cache.params) == 150 and len(cache.exp_avg) == 100
    cache.grow(160)
    assert len(cache) == 160
    expected = store.exp_avg[:ROWS].clone()
    store.exp_avg[:ROWS] = 0
    cache.write_back(None)
    assert torch.equal(store.exp_avg[ids.long()], expected[ids.long()])


def test_rows_that_nobody_brings_are_not_in_the_table():
    layout = RowLayout(0)
    store = make_engine(random_rows(ROWS, layout), layout, "cpu", None).store
    cache = RowCache(store, torch.device("cpu"), 100)
    ids = torch.arange(100, dtype=torch.int32)
    for nth in range(2):
        with (
            pytest.MonkeyPatch.context() as patch,
            failing_allocation(nth, patch),
            pytest.raises(torch.cuda.OutOfMemoryError),
        ):
            cache.admit(ids, nth, nth, None)
        assert cache.table.in_use == 0
    assert cache.admit(ids, 2, 2, None).missed == 100


def test_pieces_are_written_back(monkeypatch):
    monkeypatch.setattr("gsscale_nerfstudio.engines.cache._PIECE", 7)
    layout = RowLayout(0)
    store = make_engine(random_rows(ROWS, layout), layout, "cpu", None).store
    cache = RowCache(store, torch.device("cpu"), 100)
    cache.admit(torch.arange(50, 150, dtype=torch.int32), 0, 0, None)
    cache.params += 1
    before = store.params[:ROWS].clone()
    cache.write_back(None)
    before[50:150] += 1
    assert torch.equal(store.params[:ROWS], before)


def test_densification_is_tried_again_piece_by_piece(monkeypatch):
    """What was summed up before has no statistics any more, and is not lost."""
    monkeypatch.setattr("gsscale_nerfstudio.engines.cache._PIECE", 50)
    kernels = {"summarize_slots": 0, "limit_slots": 0}

    def scarce(name: str) -> None:
        run = getattr(cache, name)

        def failing(*args: Any) -> None:
            kernels[name] += 1
            if kernels[name] == 3:
                raise torch.cuda.OutOfMemoryError(MESSAGE)
            run(*args)

        monkeypatch.setattr(cache, name, failing)

    summaries, engines = [], []
    for fails in (False, True):
        engine = engine_with(2 * largest_view(RowLayout(1)), RowLayout(1))
        training = Training(engine)
        for step in range(STEPS):
            training.step(step)
        assert 50 < engine.cached[0] < ROWS
        if fails:
            for name in kernels:
                scarce(name)
        summary = engine.summarize()
        summaries.append(torch.stack([summary.gradient, summary.radius, summary.opacity]).clone())
        engine.limit_opacities(-0.1)
        engines.append(engine)
    pieces = -(-engine.cached[0] // 50)
    assert kernels == dict.fromkeys(kernels, pieces + 1) and pieces > 2
    assert summaries[0][0].any() and torch.equal(*summaries)
    assert_same(*engines)


def test_densification_takes_no_second_lack_of_memory():
    engine = engine_with(None, RowLayout(1))
    tries: list[int] = []

    def work() -> None:
        tries.append(1)
        raise torch.cuda.OutOfMemoryError(MESSAGE)

    with pytest.raises(torch.cuda.OutOfMemoryError):
        engine.on_device(work)
    assert len(tries) == 2


@pytest.mark.parametrize("under_way", [False, True])
def test_a_render_may_shrink_the_cache_between_steps(under_way):
    """A step that is under way keeps its slots."""
    layout = RowLayout(1)
    training = Apart(make_engine(two_clouds(layout), layout, "cpu", ROWS))
    whole = Apart(make_engine(two_clouds(layout), layout, "cpu", ROWS))
    engine = training.engine

    def room(step: int) -> list[bool]:
        return [engine.make_room("no memory", tries) for tries in range(2)]

    if under_way:
        training.fail_before_stepping = lambda step: step != 4 or made.extend(room(step))
    made: list[bool] = []
    for step in range(STEPS):
        if step == 4 and not under_way:
            made += room(step)
        training.step(step)
        whole.step(step)
    assert made == [True, not under_way]
    assert len(engine._cache) == (ROWS if under_way else ROWS * 3 // 4)
    assert_same(whole.engine, engine)


def test_what_turned_out_to_be_too_many_is_remembered():
    sizing = CacheSizing(FixedBudget(10_000), torch.device("cpu"), RowLayout(1))
    sizing.leave_room_for(800, 0)  # 900 with what views differ by
    assert [sizing.too_many(n) for n in (2000, 1500, 1125, 900)] == [1500, 1125, 900, 675]
    assert sizing.limit(0) == 675
    assert sizing.too_many(1200, enough=1000) == 1000


def test_which_errors_are_meant():
    assert is_out_of_memory(torch.cuda.OutOfMemoryError(MESSAGE))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access"))
    assert not is_out_of_memory(ValueError("out of memory"))
    made: list[int] = []
    with pytest.raises(RuntimeError, match="illegal"):
        retried(_raise_illegal, lambda said, tries: made.append(tries))
    assert made == []


def _raise_illegal() -> None:
    raise RuntimeError("CUDA error: an illegal memory access")


def test_nothing_of_an_attempt_is_held_when_room_is_made():
    """Neither by the traceback's frames, nor by an error that the first one led to."""
    alive: list[weakref.ref[Tensor]] = []
    gc.disable()  # what retried() collects itself is enough
    try:

        def attempt() -> int:
            large = torch.ones(5)
            ring = [large]
            ring.append(ring)  # type: ignore[arg-type]
            alive.append(weakref.ref(large))
            if len(alive) < 3:
                try:
                    raise torch.cuda.OutOfMemoryError(MESSAGE)
                except RuntimeError as error:
                    raise RuntimeError("out of memory, too") from error
            return len(alive)

        def make_room(said: str, tries: int) -> None:
            assert said == "out of memory, too" and tries == len(alive) - 1
            assert [ref() for ref in alive] == [None] * len(alive)

        assert retried(attempt, make_room) == 3
    finally:
        gc.enable()


def test_limits_are_tried_less_often_where_memory_stays_short():
    sizing = ViewSizing(Budget(), torch.device("cpu"), RowLayout(1))

    def steps_until_quiet() -> int:
        sizing.most = 5
        sizing.ran_out()
        steps = 0
        while not sizing.quiet:
            sizing.stepped()
            steps += 1
        sizing.forget_limits()
        return steps

    assert [steps_until_quiet() for _ in range(4)] == [1000, 2000, 4000, 8000]
    for _ in range(10_000):  # it was enough for long
        sizing.stepped()
    assert steps_until_quiet() == 8000
