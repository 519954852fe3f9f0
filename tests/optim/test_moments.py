"""Moments of 16 bits: stochastic rounding, and what it leaves of Adam."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gsscale_nerfstudio import _C
from gsscale_nerfstudio.optim.history import AdamHistory
from gsscale_nerfstudio.store import GROUPS, HostStore, RowLayout
from gsscale_nerfstudio.store.keys import keys_of

NARROW = torch.bfloat16
LR = 0.01


def history_of(layout: RowLayout) -> AdamHistory:
    return AdamHistory(layout, dict.fromkeys(GROUPS, LR), dict.fromkeys(GROUPS, 1e-15))


def filled(layout: RowLayout, n: int, seed: int = 0) -> HostStore:
    """Rows with moments that bfloat16 can hold, whatever the layout."""
    rng = torch.Generator().manual_seed(seed)
    store, used = HostStore(layout, max_rows=n), layout.optimized
    store.resize(n)
    store.params[:, :used] = torch.randn(n, used, generator=rng)
    store.renew_keys()
    first, second = torch.randn(2, n, used, generator=rng)
    store.exp_avg[:, :used] = (0.01 * first).to(NARROW).to(layout.moments)
    store.exp_avg_sq[:, :used] = (1e-4 * second.square()).to(NARROW).to(layout.moments)
    return store


def step(store: HostStore, history: AdamHistory, grads: Tensor) -> None:
    lr = np.append([LR] * len(GROUPS), 0)[store.layout.group_of_column].astype(np.float32)
    ids = np.arange(len(grads), dtype=np.int32)
    _C.settle_and_step(store.kernel_rows, history.tables, ids, grads.numpy(), lr)
    history.advance(np.full(len(GROUPS), LR))


def gradients(layout: RowLayout, n: int, seed: int) -> Tensor:
    grads = torch.zeros(n, layout.width)
    rng = torch.Generator().manual_seed(seed)
    grads[:, : layout.optimized] = 0.01 * torch.randn(n, layout.optimized, generator=rng)
    return grads


def pairs(n: int = 3000, degree: int = 1) -> list[tuple[HostStore, AdamHistory]]:
    """The same rows with moments of 16 bits and of 32."""
    layouts = RowLayout(degree, NARROW), RowLayout(degree)
    return [(filled(layout, n), history_of(layout)) for layout in layouts]


def check_rounded(narrow: Tensor, wide: Tensor, strays: float = 0.0) -> None:
    """One of the two neighbours, the nearer one the more likely.

    ``strays``: share of elements that may be others, for what was rounded differently before.
    """
    assert narrow.dtype == NARROW and wide.dtype == torch.float32
    below = (wide.view(torch.int32) & -0x10000).view(torch.float32)
    above = (wide.view(torch.int32) + 0xFFFF & -0x10000).view(torch.float32)
    got = narrow.float()
    assert ((got != below) & (got != above)).float().mean() <= strays
    between = below != above
    assert between.sum() > 1000
    share = ((wide - below) / (above - below))[between]
    up = (got == above)[between].float()
    for low in torch.arange(0, 1, 0.25):
        of = (share >= low) & (share < low + 0.25)
        deviation = 0.5 / of.sum().sqrt()
        assert (up[of].mean() - share[of].mean()).abs() < 4 * deviation


@pytest.mark.parametrize("degree", [0, 1, 3])
def test_a_step_rounds_both_moments_up_or_down(degree):
    (store, history), (wide, wides_history) = pairs(degree=degree)
    n, used = len(store), store.layout.optimized
    grads = gradients(store.layout, n, 1)
    for rows, adam in ((store, history), (wide, wides_history)):
        for _ in range(7):  # skipped
            adam.advance(np.full(len(GROUPS), LR))
        step(rows, adam, grads)
    # What the step itself does is done before they are rounded.
    assert (store.params[:, :used] - wide.params[:, :used]).abs().max() < 1e-6
    check_rounded(store.exp_avg[:, :used].flatten(), wide.exp_avg[:, :used].flatten())
    check_rounded(store.exp_avg_sq[:, :used].flatten(), wide.exp_avg_sq[:, :used].flatten())
    assert not store.exp_avg[:, used:].any() and not store.exp_avg_sq[:, used:].any()


def test_settling_rounds_them_too():
    (store, history), (wide, wides_history) = pairs()
    n, used = len(store), store.layout.optimized
    for rows, adam in ((store, history), (wide, wides_history)):
        for _ in range(20):
            adam.advance(np.full(len(GROUPS), LR))
        gathered = torch.empty(n, rows.layout.width)
        ids = np.arange(n, dtype=np.int32)
        _C.gather_settled(rows.kernel_rows, adam.tables, ids, gathered.numpy())
        _C.settle_range(rows.kernel_rows, adam.tables, 0, n)
        assert (gathered[:, :used] - rows.params[:, :used]).abs().max() < 1e-6
    assert (store.params - wide.params).abs().max() < 1e-6
    check_rounded(store.exp_avg[:, :used].flatten(), wide.exp_avg[:, :used].flatten())
    check_rounded(store.exp_avg_sq[:, :used].flatten(), wide.exp_avg_sq[:, :used].flatten())


def test_the_same_step_rounds_in_the_same_way():
    first, second = (filled(RowLayout(1, NARROW), 50) for _ in range(2))
    for store in (first, second):
        history = history_of(store.layout)
        for i in range(3):
            step(store, history, gradients(store.layout, 50, i))
    assert torch.equal(first.exp_avg, second.exp_avg)
    assert torch.equal(first.exp_avg_sq, second.exp_avg_sq)


def test_it_does_not_matter_where_a_row_is():
    layout = RowLayout(1, NARROW)
    store, moved = (filled(layout, 50) for _ in range(2))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    for array in (moved.params, moved.exp_avg, moved.exp_avg_sq):
        array[:50] = array[order]
    grads = gradients(layout, 50, 1)
    step(store, history_of(layout), grads)
    step(moved, history_of(layout), grads[order].contiguous())
    for name in ("params", "exp_avg", "exp_avg_sq"):
        assert torch.equal(getattr(store, name)[:50][order], getattr(moved, name)[:50]), name


@pytest.mark.parametrize("first", [0, 20_000_000, 2**28 - 99])
def test_equal_rows_are_rounded_each_in_its_own_way(first):
    """Whatever their ids; a hundred of them, and 60 columns of 8 bits, do not agree by chance."""
    layout = RowLayout(3, NARROW)
    store, history = filled(layout, 100), history_of(layout)
    for array in (store.params, store.exp_avg, store.exp_avg_sq):
        array[:100] = array[0].clone()
    store.bookkeeping("key")[:] = keys_of(torch.arange(first, first + 100))
    step(store, history, gradients(layout, 1, 1).repeat(100, 1))
    assert len(store.exp_avg_sq[:100].view(torch.int16).unique(dim=0)) == 100


def test_the_mean_square_goes_where_gradients_are():
    """A thousandth of the way at each step is less than half of the last of 8 bits."""
    layout, n = RowLayout(0, NARROW), 400
    store, history = HostStore(layout, max_rows=n), history_of(layout)
    store.resize(n)
    store.renew_keys()
    grads = torch.zeros(n, layout.width)
    grads[:, : layout.optimized] = 0.1
    for _ in range(3000):
        step(store, history, grads)
    want = 0.01 * (1 - 0.999**3000)
    got = store.exp_avg_sq[:, : layout.optimized].float()
    assert got.mean() == pytest.approx(want, rel=0.003)
    assert got.std() < 0.05 * want
    to_nearest = torch.zeros((), dtype=NARROW)
    for _ in range(3000):
        to_nearest = (to_nearest.float() * 0.999 + 1e-5).to(NARROW)
    assert to_nearest < 0.5 * want


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(broken):
    layout = RowLayout(0, NARROW)
    store, history = filled(layout, 40), history_of(layout)
    grads = gradients(layout, 40, 1)
    grads[:, 3] = broken
    step(store, history, grads)
    assert not store.exp_avg[:, 3].isfinite().any() and not store.exp_avg_sq[:, 3].isfinite().any()
    assert not store.spheres[:40, 3].isfinite().any()
    assert store.exp_avg[:, 0].isfinite().all()


def test_opacities_that_are_reset_lose_them():
    layout = RowLayout(0, NARROW)
    store, history = filled(layout, 30), history_of(layout)
    opacity = layout.columns["opacities"].start
    _C.limit_opacities(store.kernel_rows, history.tables, 30, -2.0)
    assert not store.exp_avg[:, opacity].any() and not store.exp_avg_sq[:, opacity].any()
    assert store.exp_avg[:, opacity - 1].all() and store.exp_avg[:, opacity + 1].all()
    assert (store.params[:, opacity] <= -2).all()


def test_spheres_hold_for_the_moments_as_they_were_rounded():
    layout, n = RowLayout(0, NARROW), 2000
    store, history = filled(layout, n), history_of(layout)
    step(store, history, gradients(layout, n, 1))
    stepped = store.spheres[:n].clone()
    _C.refresh_spheres(store.kernel_rows, history.tables, 0, n)
    # The step's sphere is made with eps of one step before.
    assert torch.allclose(store.spheres[:n], stepped, rtol=1e-6)


def test_bytes():
    wide, narrow = RowLayout(3), RowLayout(3, NARROW)
    assert (wide.stored_bytes, narrow.stored_bytes) == (784, 528)
    assert (wide.cached_bytes, narrow.cached_bytes) == (768, 512)
    store = HostStore(narrow, max_rows=5)
    held = (store.params, store.exp_avg, store.exp_avg_sq, store.spheres)
    assert sum(array[0].nbytes for array in held) == narrow.stored_bytes


def test_other_types_are_refused():
    store = HostStore(RowLayout(0), max_rows=4)
    half = np.zeros((4, store.layout.width), np.float16)
    for first, second in ((half, half), (store.exp_avg.numpy(), half.view(np.int16))):
        with pytest.raises(ValueError, match="bfloat16"):
            _C.Rows(store.params.numpy(), first, second, None, store.layout.kernel_columns)
