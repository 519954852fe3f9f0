"""Rows stay together through every operation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gsscale_nerfstudio import _C
from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.store import GROUPS, HostStore, RowLayout, host, layout
from gsscale_nerfstudio.store.edit import RowEdit
from gsscale_nerfstudio.store.keys import keys_of
from gsscale_nerfstudio.store.memory import ReservedArray, bits_of
from gsscale_nerfstudio.store.order import morton_order

LAYOUT = RowLayout(1)


def ids_of(mask: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.flatnonzero(mask))


class StoreMachine(RuleBasedStateMachine):
    """Random growth, splits, pruning and sorting against a plain dictionary of rows.

    Each row carries an unmistakable name (its first opacity) in the model and in the store.
    """

    layout = LAYOUT

    def __init__(self) -> None:
        super().__init__()
        self.store = HostStore(self.layout, max_rows=20_000)
        self.model: dict[float, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self.next_name = 1
        self.rng = np.random.default_rng(0)

    def names(self) -> np.ndarray:
        return self.store.bookkeeping("key").numpy().copy()

    def snapshot(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        s = self.store
        return tuple(bits_of(a[row]).numpy().copy() for a in (s.params, s.exp_avg, s.exp_avg_sq))

    def fill(self, first: int) -> None:
        s = self.store
        for row in range(first, len(s)):
            s.exp_avg[row] = torch.from_numpy(self.rng.normal(size=LAYOUT.width))
            s.exp_avg_sq[row] = torch.from_numpy(self.rng.random(LAYOUT.width))
            for name in ("grad2d", "count", "max_radius"):
                s.params[row, LAYOUT.bookkeeping[name]] = float(self.rng.random())
            self.name(row)

    def name(self, row: int) -> None:
        self.store.params[row, LAYOUT.bookkeeping["key"]] = self.next_name
        self.model[self.next_name] = self.snapshot(row)
        self.next_name += 1

    @rule(count=st.integers(1, 600), stamp=st.integers(0, 1000))
    def append(self, count, stamp):
        first = len(self.store)
        values = {
            name: torch.from_numpy(self.rng.normal(size=(count, *LAYOUT.shapes[name]))).float()
            for name in GROUPS
        }
        self.store.append(values, stamp)
        assert not self.store.exp_avg[first : first + count].any()
        assert not self.store.exp_avg_sq[first : first + count].any()
        assert (self.store.bookkeeping("stamp")[first:] == stamp).all()
        for name in GROUPS:
            assert torch.equal(self.store.column(name)[first:], values[name])
        self.fill(first)

    @rule(added=st.integers(0, 400), removed=st.floats(0, 1), rewritten=st.floats(0, 0.5))
    def edit(self, added, removed, rewritten):
        names, n = self.names(), len(self.store)
        gone = self.rng.random(n) < removed
        anew = (self.rng.random(n) < rewritten) & ~gone
        self.store.spheres[:n] = self.store.params[:n, :4]
        values, new = (
            torch.from_numpy(self.rng.normal(size=(count, LAYOUT.width))).float()
            for count in (int(anew.sum()), added)
        )
        edit = RowEdit(
            rewritten=ids_of(anew),
            values=values,
            added=new,
            parents=torch.zeros(added, dtype=torch.int64),
            removed=ids_of(gone),
        )
        placement = self.store.apply(edit, stamp=7)
        assert len(self.store) == placement.n == n - gone.sum() + added
        now = placement.now(ids_of(~gone))
        assert torch.equal(
            torch.cat([now, placement.added]).sort().values, torch.arange(placement.n)
        )
        untouched = placement.now(ids_of(~gone & ~anew))
        assert self.names()[untouched.numpy()].tolist() == names[~gone & ~anew].tolist()
        assert torch.equal(self.store.spheres[untouched], self.store.params[untouched, :4])
        for ids, rows in ((placement.now(edit.rewritten), values), (placement.added, new)):
            used = LAYOUT.optimized
            assert torch.equal(self.store.params[ids, :used], rows[:, :used])
            assert (self.store.params[ids, LAYOUT.bookkeeping["stamp"]] == 7).all()
            assert not self.store.params[ids, LAYOUT.bookkeeping["count"]].any()
            assert not self.store.exp_avg[ids].any() and not self.store.exp_avg_sq[ids].any()
            for row in ids.tolist():
                self.name(row)
        for name in names[gone | anew]:
            del self.model[name]

    @rule()
    def sort(self):
        self.store.sort()
        assert self.store.unsorted_share == 0

    @invariant()
    def rows_are_whole(self):
        names = self.names()
        assert sorted(names) == sorted(self.model)
        for row, name in enumerate(names):
            for got, expected in zip(self.snapshot(row), self.model[name], strict=True):
                assert np.array_equal(got, expected)


StoreMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)
TestStore = StoreMachine.TestCase


class NarrowStoreMachine(StoreMachine):
    layout = RowLayout(LAYOUT.sh_degree, torch.bfloat16)


NarrowStoreMachine.TestCase.settings = settings(
    max_examples=10, stateful_step_count=12, deadline=None
)
TestNarrowStore = NarrowStoreMachine.TestCase


@pytest.mark.parametrize("degree, width", [(0, 32), (1, 32), (2, 48), (3, 64), (4, 96)])
def test_row_width_follows_the_sh_degree(degree, width):
    layout = RowLayout(degree)
    assert layout.width == width
    covered = sorted(c for s in layout.columns.values() for c in range(s.start, s.stop))
    assert covered == list(range(layout.optimized))
    assert len(set(layout.bookkeeping.values()) | set(covered)) == layout.optimized + 5


def test_columns_are_views():
    store = HostStore(LAYOUT, max_rows=10)
    store.resize(4)
    store.column("features_rest")[2, 1, 0] = 7
    column = LAYOUT.columns["features_rest"].start + 3
    assert store.params[2, column] == 7
    assert store.column("means").data_ptr() == store.params.data_ptr()
    assert store.column("means").stride() == (LAYOUT.width, 1)


@pytest.mark.parametrize("degree, rows", [(0, 5), (3, 1), (3, 0)])
def test_copies_for_files_share_nothing_with_the_store(degree, rows):
    """Empty columns and single rows count as contiguous already, and are views all the same."""
    store = HostStore(RowLayout(degree))
    store.resize(rows)
    for name in GROUPS:
        copy = store.column_copy(name)
        assert copy.is_contiguous() and copy.shape == store.column(name).shape
        assert copy.untyped_storage().nbytes() == copy.numel() * 4


def test_reserving_is_not_using():
    """Address space for a hundred million rows costs no memory and no time."""
    array = ReservedArray(100_000_000, 64)
    array.tensor[99_999_999, 63] = 1
    with open("/proc/self/smaps_rollup") as smaps:
        resident = next(int(line.split()[1]) for line in smaps if line.startswith("Rss"))
    assert resident < 4 << 20  # KiB
    assert array.tensor[99_999_999, 63] == 1 and array.tensor[50_000_000, 0] == 0


def test_moved_rows_count_as_out_of_order():
    store = HostStore(LAYOUT, max_rows=100)
    store.append({name: torch.rand(50, *LAYOUT.shapes[name]) for name in GROUPS}, stamp=0)
    store.sort()
    mask = torch.zeros(50, dtype=torch.bool)
    mask[:10] = True
    no_rows = torch.empty(0, LAYOUT.width)
    nobody = torch.empty(0, dtype=torch.int64)
    edit = RowEdit(nobody, no_rows, no_rows, nobody, ids_of(mask.numpy()))
    store.apply(edit, stamp=0)  # ten rows from the end fill the holes
    assert store.unsorted_share == 10 / 40


def test_growth_does_not_move_rows():
    store = HostStore(LAYOUT)
    store.resize(10)
    address = store.params.data_ptr()
    store.resize(100_000)
    assert store.params.data_ptr() == address


def test_rows_that_come_back_hold_zeros():
    store = HostStore(LAYOUT, max_rows=100)
    store.resize(50)
    for array in (store.params, store.exp_avg, store.exp_avg_sq):
        array[:50] = 5
    store.resize(10)
    store.resize(60)
    for array in (store.params, store.exp_avg, store.exp_avg_sq):
        assert (array[:10] == 5).all() and not array[10:60].any()


def test_too_much_is_refused_with_the_number_that_fits():
    with pytest.raises(GSScaleError, match="lower --pipeline"):
        HostStore(RowLayout(3), max_rows=10**11)
    store = HostStore(LAYOUT, max_rows=5)
    with pytest.raises(GSScaleError, match="room for, 5"):
        store.resize(6)


def test_morton_order_brings_neighbours_together():
    n = 20_000
    rows = torch.zeros(n, 16)
    rows[:, 2:5] = torch.rand(n, 3)
    rows[0, 2:5] = torch.tensor([1e6, -1e6, float("nan")])  # an outlier must not coarsen the curve
    order = morton_order(rows, 2, n)
    assert torch.equal(order.long().sort().values, torch.arange(n))
    points = rows[order.long(), 2:5]
    step = torch.nanmean((points[1:] - points[:-1]).norm(dim=1).clamp_max(10))
    before = torch.nanmean((rows[1:, 2:5] - rows[:-1, 2:5]).norm(dim=1).clamp_max(10))
    assert step < before / 8


def morton_codes(points: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Bit by bit, of points [n, 3] in a box [2, 3]."""
    share = (points - box[0]) / (box[1] - box[0])
    cells = np.clip(share * np.float32(1 << 21), 0, (1 << 21) - 1).astype(np.int64)
    codes = np.zeros(len(points), np.int64)
    for bit in range(21):
        for axis in range(3):
            codes |= (cells[:, axis] >> bit & 1) << (3 * bit + axis)
    return codes


@pytest.mark.parametrize("n, places", [(0, 1), (1, 1), (3, 3), (150_000, 150_000), (150_000, 9)])
def test_morton_order_is_a_stable_sort(n, places):
    """Also where many rows are at one place: then the lower one comes first."""
    rows = torch.randn(max(places, 1), 16)[torch.randint(places, (max(n, 1),))].contiguous()
    box = np.array([[-1.5, -2, -3], [1.5, 1, 1]], dtype=np.float32)
    order = torch.empty(n, dtype=torch.int32)
    _C.morton_order(rows.numpy(), 2, box, order.numpy())
    codes = morton_codes(rows[:n, 2:5].numpy(), box)
    assert order.tolist() == np.argsort(codes, kind="stable").tolist()


KEYS = torch.tensor([0, 1, 2**24, 2**24 + 1, 20_000_001, 130_000_007, 2**28 - 1, 2**28])


def test_keys_are_ordinary_numbers_that_differ():
    keys = keys_of(KEYS)
    assert keys.dtype == torch.float32 and len(keys.unique()) == len(KEYS)
    assert (keys[1:] >= 1).all() and keys.isfinite().all()
    assert keys[:3].tolist() == KEYS[:3].tolist()
    for by in (20_000_000, 2**28 - 999):
        ids = torch.arange(by, by + 1000)
        assert len(keys_of(ids).unique()) == len(keys_of(ids.int()).unique()) == 1000


def test_rows_beyond_2_to_the_24_have_keys_of_their_own(monkeypatch):
    """Rows that are never written take no memory."""
    monkeypatch.setattr(host, "available_memory", lambda: 1 << 40)
    monkeypatch.setattr(host, "memory_limit", lambda: 1 << 50)
    n = 20_000_000
    store = HostStore(LAYOUT, max_rows=n + 100)
    store.resize(n)
    store.append(rows_of(10), stamp=0)
    assert len(store.bookkeeping("key")[n:].unique()) == 10
    rewritten, parents = torch.arange(n + 2, n + 6), torch.zeros(5, dtype=torch.int64)
    values, added = torch.zeros(4, LAYOUT.width), torch.zeros(5, LAYOUT.width)
    removed = torch.tensor([n + 8])
    store.apply(RowEdit(rewritten, values, added, parents, removed), stamp=3)
    assert len(store) == n + 14
    assert len(store.bookkeeping("key")[n:].unique()) == 14


@pytest.mark.parametrize("n", [0, 1, 5, 4096, 4097, 30_000])
def test_permute_rows(n):
    rows = torch.randn(max(n, 1), 16)
    expected = rows.clone()
    for order in (torch.randperm(n), torch.arange(n).flip(0), torch.arange(n).roll(1)):
        expected[:n] = expected[order]
        _C.permute_rows(rows.numpy(), order.int().numpy())
        assert torch.equal(rows, expected)


def test_permute_refuses_what_is_no_permutation():
    with pytest.raises(ValueError, match="not a permutation"):
        _C.permute_rows(torch.zeros(3, 16).numpy(), np.array([0, 1, 1], dtype=np.int32))


def rows_of(n: int) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(n, *LAYOUT.shapes[name]) for name in GROUPS}


def test_room_leaves_memory_for_a_copy_of_all_rows_and_for_others(monkeypatch):
    monkeypatch.setattr(layout, "STREAMS", False)  # where there is such a copy
    store = HostStore(LAYOUT, max_rows=20_000)
    store.append(rows_of(1000), stamp=0)
    monkeypatch.setattr(host, "available_memory", lambda: free)
    copy = 4 * (3 * LAYOUT.optimized + 3)
    store.claims, store.beside_row = (lambda: 5_000_000), 30.0
    others = host.headroom() + 5_000_000 + 1000 * host.PASSING_BYTES
    free = others + 3000 * copy + 2000 * (store.row_bytes + 30)
    assert store.room() == 2000
    free -= copy + store.row_bytes
    assert store.room() == 1999
    free = others + 1000 * copy
    assert store.room() == 0
    free = 0
    assert store.room() == 0
    free = 1 << 40
    assert store.room() == 19_000


def test_room_without_a_copy(monkeypatch):
    monkeypatch.setattr(layout, "STREAMS", True)
    store = HostStore(LAYOUT, max_rows=20_000)
    store.append(rows_of(1000), stamp=0)
    monkeypatch.setattr(host, "available_memory", lambda: free)
    free = host.headroom() + 1000 * host.PASSING_BYTES + 2000 * store.row_bytes
    assert store.room() == 2000
    store.resize(400)
    free -= 600 * host.PASSING_BYTES
    assert store.room() == 2600
    free = 0
    assert store.room() == 0


def test_removed_rows_leave_their_memory_to_new_ones(monkeypatch):
    monkeypatch.setattr(layout, "STREAMS", False)
    store = HostStore(LAYOUT, max_rows=20_000)
    store.append(rows_of(1000), stamp=0)
    store.resize(400)
    monkeypatch.setattr(host, "available_memory", lambda: free)
    copy = 4 * (3 * LAYOUT.optimized + 3)
    others = host.headroom() + 400 * host.PASSING_BYTES
    free = others + 900 * copy
    assert store.room() == 500  # enough for the copy only
    free = others + 1100 * copy + 100 * store.row_bytes
    assert store.room() == 700


def test_rows_beyond_the_memory_are_refused(monkeypatch):
    store = HostStore(LAYOUT, max_rows=20_000)
    store.append(rows_of(1000), stamp=0)
    rendered = 4 * LAYOUT.width + 16
    monkeypatch.setattr(host, "available_memory", lambda: 500 * rendered)
    store.resize(1500)
    with pytest.raises(GSScaleError, match=r"2,001 Gaussians need .* begin with fewer points"):
        store.resize(2001)
    assert len(store) == 1500
    assert store.taken_bytes == 1500 * rendered
    with pytest.raises(GSScaleError, match="more host memory"):
        store.pin()  # the moments' turn


@pytest.mark.parametrize(
    "memory, named",
    [
        (750, "train with --pipeline.model.moment-dtype bfloat16 ("),
        (500, "even --pipeline.model.moment-dtype bfloat16 is not enough (0.00 GB): free"),
    ],
)
def test_moments_that_do_not_fit_name_the_flags_with_which_rows_do(memory, named, monkeypatch):
    monkeypatch.setattr(layout, "STREAMS", True)
    monkeypatch.setattr(host, "locked_ahead", lambda layout, rows: 0)
    store = HostStore(RowLayout(3), max_rows=1000)
    store.resize(1000)
    monkeypatch.setattr(host, "available_memory", lambda: 1000 * memory - store.taken_bytes)
    with pytest.raises(GSScaleError) as refused:
        store.pin()
    assert named in str(refused.value)
