"""The cache's bookkeeping beside a cache of one row at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gsscale_nerfstudio import _C


def int32(values) -> np.ndarray:
    return np.array(values, dtype=np.int32)


class Table:
    """A :class:`_C.SlotTable` that brings its outputs along."""

    def __init__(self, n_slots: int, n_rows: int) -> None:
        self.raw = _C.SlotTable(n_slots, n_rows)

    def plan(self, ids, view: int, protect_from: int):
        outputs = [np.full(len(ids), -7, dtype=np.int32) for _ in range(4)]
        done = self.raw.plan(int32(ids), view, protect_from, *outputs)
        if done is None:
            return None
        slots, *moves = (out.tolist() for out in outputs)
        return done, slots, list(zip(*(move[: done[0]] for move in moves), strict=True))

    def lookup(self, ids) -> list[int]:
        slots = np.full(len(ids), -7, dtype=np.int32)
        found = self.raw.lookup(int32(ids), slots)
        assert found == (slots >= 0).sum()
        return slots.tolist()

    def residents(self) -> dict[int, int]:
        rows, slots = np.empty((2, self.raw.in_use), dtype=np.int32)
        assert self.raw.residents(rows, slots) == self.raw.in_use
        assert (np.diff(rows) > 0).all()
        return dict(zip(rows.tolist(), slots.tolist(), strict=True))


class Model:
    """What the table should do, one row at a time."""

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        self.slot: dict[int, int] = {}
        self.used: dict[int, int] = {}

    def plan(self, ids, view: int, protect_from: int):
        misses = [row for row in ids if row not in self.slot]
        may_leave = sorted(
            (self.used[row], row)
            for row in self.slot
            if row not in ids and self.used[row] < protect_from
        )
        empty = list(range(len(self.slot), self.n_slots))
        if len(misses) > len(empty) + len(may_leave):
            return None
        moves, newest = [], -1
        for row in misses:
            gone = -1
            if empty:
                slot = empty.pop(0)
            else:
                newest, gone = may_leave.pop(0)
                slot = self.slot.pop(gone)
                del self.used[gone]
            moves.append((row, slot, gone))
            self.slot[row] = slot
        self.used.update(dict.fromkeys(ids, view))
        return (len(misses), newest), [self.slot[row] for row in ids], moves


class TableMachine(RuleBasedStateMachine):
    """Random views, some of them too large, against the model; rows come in runs."""

    n_slots, n_rows = 24, 60

    def __init__(self) -> None:
        super().__init__()
        self.table, self.model = Table(self.n_slots, self.n_rows), Model(self.n_slots)
        self.view = -1

    @rule(
        runs=st.lists(st.tuples(st.integers(0, 59), st.integers(1, 9)), max_size=5),
        skipped=st.sampled_from([1, 1, 1, 5]),
        protect=st.integers(-1, 6),
    )
    def plan(self, runs, skipped, protect):
        ids = sorted({row for first, n in runs for row in range(first, first + n)})
        ids = [row for row in ids if row < self.n_rows]
        view = self.view + skipped
        expected = self.model.plan(ids, view, view - protect)
        assert self.table.plan(ids, view, view - protect) == expected
        if expected is not None:
            self.view = view

    @rule(more=st.sampled_from([None, 0, 30]))
    @precondition(lambda self: self.view > 20)
    def clear(self, more):
        if more is not None:
            self.n_rows = 60 + more
        self.table.raw.clear(None if more is None else self.n_rows)
        self.model = Model(self.n_slots)

    @invariant()
    def same_rows_in_the_same_slots(self):
        raw = self.table.raw
        assert (raw.n_slots, raw.n_rows) == (self.n_slots, self.n_rows)
        assert raw.in_use == len(self.model.slot)
        residents = self.table.residents()
        assert residents == self.model.slot
        assert len(set(residents.values())) == len(residents)
        everything = self.table.lookup(range(self.n_rows))
        assert everything == [residents.get(row, -1) for row in range(self.n_rows)]
        assert len(residents) <= raw.listed <= 4 * self.n_slots


TestTableMachine = TableMachine.TestCase
TestTableMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), reuse=st.sampled_from([0.9, 0.98, 1]))
def test_long_runs_of_views_with_high_reuse(seed, reuse):
    """The lists are cut back many times, and the order of leaving stays that of the model."""
    rng = np.random.default_rng(seed)
    table, model = Table(100, 1000), Model(100)
    cuts = 0
    for view in range(400):
        pool = 90 if rng.random() < reuse else 1000
        ids = np.unique(rng.integers(0, pool, 40)).tolist()
        listed = table.raw.listed
        assert table.plan(ids, view, view - 1) == model.plan(ids, view, view - 1)
        assert table.raw.listed <= 400
        cuts += table.raw.listed < listed - 250
    assert cuts >= 5
    assert table.residents() == model.slot


def test_many_threads_worth_of_rows():
    """Parts of one view go to several threads; numpy follows the table over the whole store."""
    n_rows, n_slots = 3_000_000, 1_000_000
    rng = np.random.default_rng(0)
    table = _C.SlotTable(n_slots, n_rows)
    slot_of = np.full(n_rows, -1, dtype=np.int32)
    used = np.full(n_rows, -1)
    for view in range(12):
        first = rng.integers(0, n_rows - 900_000)
        ids = (first + np.flatnonzero(rng.random(900_000) < 0.5)).astype(np.int32)
        slots, rows_in, slots_in, rows_out = np.empty((4, len(ids)), dtype=np.int32)
        misses, newest = table.plan(ids, view, view, slots, rows_in, slots_in, rows_out)

        missing = ids[slot_of[ids] < 0]
        used[ids] = view
        resident = np.flatnonzero(slot_of >= 0)
        empty = min(len(missing), n_slots - len(resident))
        oldest = resident[np.lexsort((resident, used[resident]))][: len(missing) - empty]
        assert misses == len(missing)
        assert newest == (used[oldest].max() if len(oldest) else -1)
        np.testing.assert_array_equal(rows_in[:misses], missing)
        np.testing.assert_array_equal(rows_out[:misses], np.append(np.full(empty, -1), oldest))
        freed = np.append(np.arange(len(resident), len(resident) + empty), slot_of[oldest])
        np.testing.assert_array_equal(slots_in[:misses], freed)
        slot_of[oldest] = -1
        slot_of[missing] = freed
        np.testing.assert_array_equal(slots, slot_of[ids])
    rows, slots = np.empty((2, n_slots), dtype=np.int32)
    n = table.residents(rows, slots)
    np.testing.assert_array_equal(rows[:n], np.flatnonzero(slot_of >= 0))
    np.testing.assert_array_equal(slots[:n], slot_of[slot_of >= 0])
    everything = np.empty(n_rows, dtype=np.int32)
    assert table.lookup(np.arange(n_rows, dtype=np.int32), everything) == n
    np.testing.assert_array_equal(everything, slot_of)


def test_protected_rows_of_many_threads_worth():
    """The room beside protected rows is counted to the row, those of the view itself left out."""
    n = 600_000
    table = Table(n, 3 * n)
    recent = np.arange(0, n, 2)  # one half of the slots
    assert table.plan(recent, 0, 0) is not None
    for extra, fits in ((1, False), (0, True)):
        # A third of the recent rows again, and new ones for all that is left or one more.
        again = recent[: n // 6]
        ids = np.append(again, n + np.arange(n - len(recent) + extra))
        assert (table.plan(ids, 1, 0) is not None) == fits
        assert table.raw.in_use == (n if fits else len(recent))


def test_rows_that_do_not_fit_change_nothing():
    table = Table(4, 10)
    table.plan([1, 2, 3], 3, 0)
    before = table.residents()
    assert table.plan([4, 5], 4, 3) is None  # 1, 2 and 3 are protected
    assert table.plan([0, 4, 5, 6, 7], 4, 9) is None
    assert table.residents() == before
    assert table.raw.listed == 3
    # Neither the number of the view nor the age of 1, 2 and 3 has been touched.
    assert table.plan([1, 4, 5], 4, 4) == ((2, 3), [0, 3, 1], [(4, 3, -1), (5, 1, 2)])


def test_protection_ends_at_the_view_that_is_named():
    table = Table(3, 10)
    for view, row in enumerate((7, 8, 9)):
        table.plan([row], view, 0)
    assert table.plan([1, 2], 3, 1) is None
    assert table.plan([1, 2], 3, 2) == ((2, 1), [0, 1], [(1, 0, 7), (2, 1, 8)])


def test_an_empty_view_and_an_empty_table():
    table = Table(0, 5)
    assert table.plan([], 0, 0) == ((0, -1), [], [])
    assert table.plan([2], 1, 0) is None
    assert table.lookup([0, 4]) == [-1, -1]
    assert table.residents() == {}


def test_clear_forgets_rows_but_not_the_number_of_views():
    table = Table(2, 5)
    table.plan([3, 4], 6, 0)
    table.raw.clear()
    assert (table.raw.in_use, table.raw.listed, table.raw.n_rows) == (0, 0, 5)
    assert table.lookup([3, 4]) == [-1, -1]
    with pytest.raises(ValueError, match="view"):
        table.plan([3], 6, 0)
    assert table.plan([4], 7, 0) == ((1, -1), [0], [(4, 0, -1)])
    table.raw.clear(9)
    assert table.plan([8], 8, 0) == ((1, -1), [0], [(8, 0, -1)])
    table.raw.clear(3)
    with pytest.raises(ValueError, match="outside"):
        table.plan([4], 9, 0)


@pytest.mark.parametrize(
    "ids, message",
    [([-1, 2], "outside"), ([2, 10], "outside"), ([2, 2], "ascend"), ([1, 3, 2], "ascend")],
)
def test_bad_ids_are_refused_and_change_nothing(ids, message):
    table = Table(4, 10)
    table.plan([1, 2], 0, 0)
    with pytest.raises(ValueError, match=message):
        table.plan(ids, 1, 0)
    with pytest.raises(ValueError, match=message):
        table.lookup(ids)
    assert table.residents() == {1: 0, 2: 1}
    assert table.raw.listed == 2
    assert table.plan([5], 1, 0) == ((1, -1), [2], [(5, 2, -1)])


def test_bad_arguments_are_refused():
    table = _C.SlotTable(4, 10)
    ids, room, short = int32([1, 2]), np.empty(2, np.int32), np.empty(1, np.int32)
    for place in range(4):
        outputs = [room] * 4
        outputs[place] = short
        with pytest.raises(ValueError, match="room"):
            table.plan(ids, 0, 0, *outputs)
    with pytest.raises(ValueError, match="room"):
        table.lookup(ids, short)
    with pytest.raises(TypeError):
        table.lookup(ids.astype(np.int64), room)
    for view in (-1, 2**31):
        with pytest.raises(ValueError, match="view"):
            table.plan(ids, view, 0, *[room] * 4)
    assert table.in_use == 0
    table.plan(ids, 0, 0, room, *np.empty((3, 2), np.int32))
    for outputs in ((short, room), (room, short)):
        with pytest.raises(ValueError, match="room"):
            table.residents(*outputs)
    for n in (-1, 2**31):
        with pytest.raises(ValueError, match="n_slots"):
            _C.SlotTable(n, 1)
        with pytest.raises(ValueError, match="n_rows"):
            _C.SlotTable(1, n)
        with pytest.raises(ValueError, match="n_rows"):
            table.clear(n)
