"""The cache's bookkeeping beside a cache of one row at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
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
        slots = np.full(len(ids), -7, dtype=np.int32)
        moves = np.full((len(ids), 3), -7, dtype=np.int32)
        done = self.raw.plan(int32(ids), view, protect_from, slots, moves)
        if done is None:
            return None
        return done, slots.tolist(), [tuple(move) for move in moves[: done[0]].tolist()]

    def expect(self, ids, view: int) -> None:
        self.raw.expect(int32(ids), view)

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


BLOCK = 64
"""Rows that leave in the same order."""


class Model:
    """What the table should do, one row at a time."""

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        self.slot: dict[int, int] = {}
        self.used: dict[int, int] = {}
        self.block_used: dict[int, int] = {}
        self.block_expected: dict[int, set[int]] = {}
        self.free: list[int] = []
        self.handed_out = 0

    def expect(self, ids, view: int) -> None:
        for block in {row // BLOCK for row in ids}:
            self.block_expected.setdefault(block, set()).add(view)

    def urgency(self, row: int, view: int, protect_from: int) -> int:
        """Rows with the lowest leave first."""
        block = row // BLOCK
        used = self.block_used[block]
        if used >= protect_from or used == view:
            return 1
        coming = [v for v in self.block_expected.get(block, ()) if v > view]
        return -(min(coming) - view - 1) if coming else -32 - min(31, view - used)

    def plan(self, ids, view: int, protect_from: int):
        misses = [row for row in ids if row not in self.slot]
        may_leave = [row for row in self.slot if row not in ids and self.used[row] < protect_from]
        empty = self.free[::-1] + list(range(self.handed_out, self.n_slots))
        if len(misses) > len(empty) + len(may_leave):
            return None
        self.block_used.update({row // BLOCK: view for row in ids})
        may_leave = sorted((self.urgency(row, view, protect_from), row) for row in may_leave)
        moves, newest = [], -1
        leaving = sorted(row for _, row in may_leave[: max(0, len(misses) - len(empty))])
        for row in misses:
            gone = -1
            if self.free:
                slot = self.free.pop()
            elif self.handed_out < self.n_slots:
                slot = self.handed_out
                self.handed_out += 1
            else:
                gone = leaving.pop(0)
                slot = self.slot.pop(gone)
                newest = max(newest, self.used.pop(gone))
            moves.append((row, slot, gone))
            self.slot[row] = slot
        self.used.update(dict.fromkeys(ids, view))
        return (len(misses), newest), [self.slot[row] for row in ids], moves

    def drop(self, ids) -> None:
        for row in ids:
            if row in self.slot:
                self.free.append(self.slot.pop(row))
                self.used.pop(row)

    def expect_like(self, row: int, other: int) -> None:
        known = self.block_expected.get(row // BLOCK, set())
        self.block_expected.setdefault(other // BLOCK, set()).update(known)

    def rename(self, moved: dict[int, int]) -> None:
        """Give rows new ids; others keep theirs."""
        for row, now in moved.items():
            self.expect_like(row, now)
            if row in self.used:
                old = self.block_used.get(now // BLOCK, -1)
                self.block_used[now // BLOCK] = max(old, self.used[row])
        self.slot = {moved.get(row, row): slot for row, slot in self.slot.items()}
        self.used = {moved.get(row, row): view for row, view in self.used.items()}

    def permute(self, place: dict[int, int]) -> None:
        old, self.block_expected, self.block_used = self.block_expected, {}, {}
        for row, now in place.items():
            known = self.block_expected.setdefault(now // BLOCK, set())
            known.update(old.get(row // BLOCK, ()))
        self.slot = {place[row]: slot for row, slot in self.slot.items()}
        self.used = {place[row]: view for row, view in self.used.items()}
        for row, view in self.used.items():
            before = self.block_used.get(row // BLOCK, -1)
            self.block_used[row // BLOCK] = max(before, view)

    def resize(self, n_rows: int) -> None:
        """Blocks behind the last row are as new if rows come again."""
        end = -(-n_rows // BLOCK)
        for known in (self.block_expected, self.block_used):
            for block in [block for block in known if block >= end]:
                del known[block]


class TableMachine(RuleBasedStateMachine):
    """Random views, some of them too large, against the model; rows come in runs."""

    scale = 1

    def __init__(self) -> None:
        super().__init__()
        self.n_slots, self.n_rows = 24 * self.scale, 60 * self.scale
        self.table, self.model = Table(self.n_slots, self.n_rows), Model(self.n_slots)
        self.view = self.protected = -1

    @rule(
        runs=st.lists(st.tuples(st.integers(0, 59), st.integers(1, 9)), max_size=5),
        skipped=st.sampled_from([1, 1, 1, 5]),
        protect=st.integers(0, 6),
    )
    def plan(self, runs, skipped, protect):
        s = self.scale
        ids = sorted({row for first, n in runs for row in range(first * s, (first + n) * s)})
        ids = [row for row in ids if row < self.n_rows]
        view = self.view + skipped
        keep = max(self.protected, min(view, view - protect))
        expected = self.model.plan(ids, view, keep)
        assert self.table.plan(ids, view, keep) == expected
        if expected is not None:
            self.view, self.protected = view, keep

    @rule(
        first=st.integers(0, 59),
        n=st.integers(0, 20),
        distance=st.integers(1, 30),
    )
    def expect(self, first, n, distance):
        ids = list(range(first * self.scale, min((first + n) * self.scale, self.n_rows)))
        last = self.view  # of those that had room
        self.table.expect(ids, last + distance)
        self.model.expect(ids, last + distance)

    @rule(
        gone=st.sets(st.integers(0, 59), max_size=20),
        more=st.integers(0, 12),
        slots=st.sampled_from([0, 0, 3]),
    )
    def edit(self, gone, more, slots):
        """Some rows go, those from the end take their places, and others are appended."""
        gone = sorted(self.scale * row for row in gone)
        more, slots = more * self.scale, slots * self.scale
        gone = [row for row in gone if row < self.n_rows]
        n = self.n_rows - len(gone)
        sources = [row for row in range(n, self.n_rows) if row not in gone]
        targets = [row for row in gone if row < n]
        self.table.raw.drop(int32(gone))
        self.model.drop(gone)
        self.table.raw.rename(int32(sources), int32(targets))
        self.model.rename(dict(zip(sources, targets, strict=True)))
        self.n_rows, self.n_slots = n + more, self.n_slots + slots
        self.model.n_slots = self.n_slots
        self.table.raw.resize(self.n_slots, self.n_rows)
        self.model.resize(self.n_rows)
        parents = [row // 2 for row in range(n, self.n_rows)] if n else []
        if parents:
            self.table.raw.expect_like(int32(parents), int32(range(n, self.n_rows)))
            for parent, row in zip(parents, range(n, self.n_rows), strict=True):
                self.model.expect_like(parent, row)
        self.protected = max(self.protected, self.view + 1)

    @rule(first=st.integers(0, 59), n=st.integers(0, 9))
    def rewrite(self, first, n):
        """Rows that the host store has anew: the same views are expected to need them."""
        ids = list(range(first * self.scale, min((first + n) * self.scale, self.n_rows)))
        self.table.raw.drop(int32(ids))
        self.model.drop(ids)
        self.protected = max(self.protected, self.view + 1)

    @rule(seed=st.integers(0, 99))
    def permute(self, seed):
        order = np.random.default_rng(seed).permutation(self.n_rows)
        self.table.raw.permute(int32(order))
        self.model.permute({int(old): new for new, old in enumerate(order)})
        self.protected = max(self.protected, self.view + 1)

    @rule(more=st.sampled_from([None, 0, 30]))
    @precondition(lambda self: self.view > 20)
    def clear(self, more):
        if more is not None:
            self.n_rows = (60 + more) * self.scale
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


class LargeTableMachine(TableMachine):
    """Many blocks, of which views use parts."""

    scale = 50


class AlignedTableMachine(TableMachine):
    """Views use whole blocks."""

    scale = BLOCK


TestTableMachine = TableMachine.TestCase
TestTableMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLargeTableMachine = LargeTableMachine.TestCase
TestLargeTableMachine.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
TestAlignedTableMachine = AlignedTableMachine.TestCase
TestAlignedTableMachine.settings = TestLargeTableMachine.settings


@pytest.mark.usefixtures("four_threads")
def test_many_threads_worth_of_rows():
    """Parts of one view go to several threads; numpy follows the table over the whole store."""
    n_rows, n_slots = 3_000_000, 1_000_000
    rng = np.random.default_rng(0)
    table = _C.SlotTable(n_slots, n_rows)
    slot_of = np.full(n_rows, -1, dtype=np.int32)
    used = np.full(n_rows, -1)
    block_of = np.arange(n_rows) // BLOCK
    block_used = np.full(block_of[-1] + 1, -1)
    needed = np.zeros((40, len(block_used)), dtype=bool)  # by view
    for view in range(12):
        first = rng.integers(0, n_rows - 900_000)
        ids = (first + np.flatnonzero(rng.random(900_000) < 0.5)).astype(np.int32)
        slots, moves = np.empty(len(ids), np.int32), np.empty((len(ids), 3), np.int32)
        misses, newest = table.plan(ids, view, view, slots, moves)
        rows_in, slots_in, rows_out = moves.T

        missing = ids[slot_of[ids] < 0]
        used[ids] = view
        block_used[block_of[ids]] = view
        resident = np.flatnonzero(slot_of >= 0)
        empty = min(len(missing), n_slots - len(resident))
        away = resident[used[resident] < view]
        due = block_used - view - 32
        for distance in reversed(range(30)):
            if view + 1 + distance < len(needed):
                due[needed[view + 1 + distance]] = -distance
        due[block_used == view] = 1
        oldest = np.sort(away[np.lexsort((away, due[block_of[away]]))][: len(missing) - empty])
        assert misses == len(missing)
        assert newest == (used[oldest].max() if len(oldest) else -1)
        np.testing.assert_array_equal(rows_in[:misses], missing)
        np.testing.assert_array_equal(rows_out[:misses], np.append(np.full(empty, -1), oldest))
        freed = np.append(np.arange(len(resident), len(resident) + empty), slot_of[oldest])
        np.testing.assert_array_equal(slots_in[:misses], freed)
        slot_of[oldest] = -1
        slot_of[missing] = freed
        np.testing.assert_array_equal(slots, slot_of[ids])
        if view % 4 == 0:
            start = rng.integers(0, n_rows - 900_000)
            told = (start + np.flatnonzero(rng.random(900_000) < 0.2)).astype(np.int32)
            table.expect(told, view + 6)
            needed[view + 6, block_of[told]] = True
    rows, slots = np.empty((2, n_slots), dtype=np.int32)
    n = table.residents(rows, slots)
    np.testing.assert_array_equal(rows[:n], np.flatnonzero(slot_of >= 0))
    np.testing.assert_array_equal(slots[:n], slot_of[slot_of >= 0])
    everything = np.empty(n_rows, dtype=np.int32)
    assert table.lookup(np.arange(n_rows, dtype=np.int32), everything) == n
    np.testing.assert_array_equal(everything, slot_of)


@pytest.mark.usefixtures("four_threads")
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
    # Neither the number of the view nor the age of 1, 2 and 3 has been touched.
    assert table.plan([1, 4, 5], 4, 4) == ((2, 3), [0, 3, 1], [(4, 3, -1), (5, 1, 2)])


def test_protection_ends_at_the_view_that_is_named():
    table = Table(3, 1000)
    for view, row in enumerate((700, 800, 900)):
        table.plan([row], view, 0)
    assert table.plan([1, 2], 3, 1) is None
    assert table.plan([1, 2], 3, 2) == ((2, 1), [0, 1], [(1, 0, 700), (2, 1, 800)])


def test_what_is_needed_soon_stays():
    table = Table(4, 2000)
    table.plan([100, 200, 300, 400], 0, 0)
    table.expect([100], 2)
    table.expect([200, 300], 5)
    # 400 is not expected by anybody; 300 and 200 later than 100. Of equals the lower row leaves.
    assert table.plan([1000], 1, 1)[2] == [(1000, 3, 400)]
    assert table.plan([1100, 1200], 2, 2)[2] == [(1100, 0, 100), (1200, 3, 1000)]
    # By now 100 had its turn and 1000 and 1100 are nobody's; 200 and 300 are needed at once.
    assert table.plan([200, 300, 1300], 5, 5)[2] == [(1300, 0, 1100)]


def test_neighbours_of_what_stays_leave_last():
    """Rows 0 to 2 are one block, of which a protected view uses one."""
    table = Table(4, 200)
    table.plan([0, 1, 2, 130], 0, 0)
    table.expect([130], 3)
    table.plan([0], 1, 1)
    assert table.plan([70], 2, 1)[2] == [(70, 3, 130)]
    assert table.plan([71, 72], 3, 1)[2] == [(71, 1, 1), (72, 2, 2)]


def test_views_can_be_told_thirty_ahead():
    table = Table(2, 5)
    table.plan([0], 7, 0)
    table.expect([1], 37)
    for view in (7, 38):
        with pytest.raises(ValueError, match="ahead"):
            table.expect([1], view)
    with pytest.raises(ValueError, match="ascend"):
        table.expect([2, 1], 8)


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
    assert (table.raw.in_use, table.raw.n_rows) == (0, 5)
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
    assert table.plan([5], 1, 0) == ((1, -1), [2], [(5, 2, -1)])


def test_bad_arguments_are_refused():
    table = _C.SlotTable(4, 10)
    ids, room, short = int32([1, 2]), np.empty(2, np.int32), np.empty(1, np.int32)
    moves = np.empty((2, 3), np.int32)
    for outputs in ((short, moves), (room, moves[:1])):
        with pytest.raises(ValueError, match="room"):
            table.plan(ids, 0, 0, *outputs)
    with pytest.raises(ValueError, match="room"):
        table.lookup(ids, short)
    with pytest.raises(TypeError):
        table.lookup(ids.astype(np.int64), room)
    for view in (-1, 2**31):
        with pytest.raises(ValueError, match="view"):
            table.plan(ids, view, 0, room, moves)
    assert table.in_use == 0
    table.plan(ids, 0, 0, room, moves)
    with pytest.raises(ValueError, match="go back"):
        table.plan(ids, 1, -1, room, moves)
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
