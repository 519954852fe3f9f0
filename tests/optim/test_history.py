"""Settling against the step-by-step loop of dense Adam."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsscale_nerfstudio import _C
from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.optim.history import AdamHistory
from gsscale_nerfstudio.store import GROUPS, HostStore, RowLayout

LAYOUT = RowLayout(0)


def make_history(eps: float, betas: tuple[float, float] = (0.9, 0.999)) -> AdamHistory:
    return AdamHistory(LAYOUT, dict.fromkeys(GROUPS, 1.0), dict.fromkeys(GROUPS, eps), betas)


def dense_loop(w, m, v, start, lrs, eps, beta1, beta2):
    """Adam with zero gradients for steps start+1 .. start+len(lrs), in float64."""
    w, m, v = (np.array(x, dtype=np.float64) for x in (w, m, v))
    for i, lr in enumerate(lrs, start=start + 1):
        m, v = beta1 * m, beta2 * v
        w = w - lr * (m / (1 - beta1**i)) / (np.sqrt(v / (1 - beta2**i)) + eps)
    return w, m, v


def eps_drift(m, v, start, lrs, eps, beta1, beta2):
    """How far the closed form can be off: it takes eps' share of the denominator from the first
    skipped step, eps f_1, and the k-th has eps f_k, f_k = sqrt((1 - beta2^(s+k)) / beta2^k)."""
    m, root = np.abs(m.astype(np.float64)), np.sqrt(v.astype(np.float64))
    total, first = np.zeros_like(m), None
    for k, lr in enumerate(lrs, start=1):
        i = start + k
        f = np.sqrt((1 - beta2**i) / beta2**k) if beta2**k > 0 else np.inf
        first = f if first is None else first
        term = lr * np.sqrt(1 - beta2**i) / (1 - beta1**i) * (beta1 / np.sqrt(beta2)) ** k * m
        total += term * (1 / (root + eps * first) - 1 / (root + eps * f))
    return 1.001 * total


def schedule(kind: str, n: int) -> np.ndarray:
    steps = np.arange(n)
    return {
        "constant": np.full(n, 0.01),
        "exponential": 0.01 * np.exp(-steps / max(1, n) * 5),
        "warm-up": 0.01 * np.minimum(1, (steps + 1) / max(1, n / 2)),
        "steps": np.where((steps // 100) % 2 == 0, 0.01, 0.001),
    }[kind]


@settings(deadline=None, max_examples=60)
@given(
    start=st.integers(0, 3000),
    gap=st.one_of(st.integers(0, 400), st.integers(0, 10_000)),
    eps=st.sampled_from([1e-15, 1e-12, 1e-10, 1e-8]),
    betas=st.sampled_from([(0.9, 0.999), (0.8, 0.99), (0.95, 0.9999), (0.0, 0.9)]),
    kind=st.sampled_from(["constant", "exponential", "warm-up", "steps"]),
    magnitude=st.floats(-6, 2),
    seed=st.integers(0, 2**16),
)
def test_settle_equals_the_loop(start, gap, eps, betas, kind, magnitude, seed):
    rng = np.random.default_rng(seed)
    store = HostStore(LAYOUT, max_rows=4)
    store.resize(4)
    used = LAYOUT.optimized
    w = rng.normal(size=(4, used)).astype(np.float32)
    g = (10.0**magnitude * rng.normal(size=(4, used))).astype(np.float32)
    m = (0.3 * g).astype(np.float32)
    v = (0.2 * g * g).astype(np.float32)
    arrays = (store.params, store.exp_avg, store.exp_avg_sq)
    for array, values in zip(arrays, (w, m, v), strict=True):
        array.numpy()[:4, :used] = values
    store.bookkeeping("stamp").fill_(start)
    lrs = schedule(kind, start + gap)
    history = make_history(eps, betas)
    for lr in lrs:
        history.advance(np.full(len(GROUPS), lr))
    _C.settle_range(store.kernel_rows, history.tables, 0, 4)

    expected_w, expected_m, expected_v = dense_loop(w, m, v, start, lrs[start:], eps, *betas)
    # Besides float32 rounding, of the row's motion and of w itself, only eps can set the two apart.
    moved = np.abs(expected_w - w)
    drift = eps_drift(m, v, start, lrs[start:], eps, *betas)
    got_w = store.params.numpy()[:4, :used]
    assert np.all(np.abs(got_w - expected_w) <= drift + 2e-5 * moved + 3e-7 * np.abs(w) + 1e-12)
    for got, expected in ((store.exp_avg, expected_m), (store.exp_avg_sq, expected_v)):
        got = got.numpy()[:4, :used]
        assert np.all(np.abs(got - expected) <= 2e-5 * np.abs(expected) + 1.2e-38)
    assert (store.bookkeeping("stamp") == start + gap).all()


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_gather_gives_settled_rows_and_leaves_the_store_alone(degree):
    layout = RowLayout(degree)
    rng = np.random.default_rng(degree)
    store = HostStore(layout, max_rows=1000)
    store.resize(1000)
    used = layout.optimized
    for array in (store.params, store.exp_avg):
        array.numpy()[:, :used] = rng.normal(size=(1000, used))
    store.exp_avg_sq.numpy()[:, :used] = rng.random((1000, used))
    history = AdamHistory(layout, dict.fromkeys(GROUPS, 0.1), dict.fromkeys(GROUPS, 1e-15))
    for _ in range(700):
        history.advance(np.linspace(0.01, 0.1, len(GROUPS)))
    # Gaps of 0, of less than the horizon, and beyond it.
    store.bookkeeping("stamp")[:] = torch_stamps = np_to_torch(rng.integers(0, 701, size=1000))
    before = [a.clone() for a in (store.params, store.exp_avg, store.exp_avg_sq)]
    ids = np.sort(rng.choice(1000, 300, replace=False)).astype(np.int32)
    out = np.empty((300, layout.width), dtype=np.float32)
    _C.gather_settled(store.kernel_rows, history.tables, ids, out)
    for array, old in zip((store.params, store.exp_avg, store.exp_avg_sq), before, strict=True):
        assert np.array_equal(array.numpy(), old.numpy())
    _C.settle_range(store.kernel_rows, history.tables, 0, 1000)
    np.testing.assert_allclose(
        out[:, :used], store.params.numpy()[ids, :used], rtol=1e-6, atol=1e-7
    )
    stamp = layout.bookkeeping["stamp"]
    assert np.array_equal(out[:, stamp], torch_stamps.numpy()[ids])


def np_to_torch(values: np.ndarray):
    import torch

    return torch.from_numpy(values.astype(np.float32))


def test_reach_bounds_every_later_motion():
    history = make_history(1e-15)
    lr = np.full(len(GROUPS), 1.0)
    for _ in range(50):
        history.advance(lr)
    reach = history.reach[0]
    start = history.step
    for _ in range(2000):
        history.advance(lr)
        gap = history.step - start
        skipped = history._skip[gap, 0] if gap <= history.horizon else history._tail[start, 0]
        assert skipped <= reach


def test_outgrown_learning_rate_is_reported_once():
    history = make_history(1e-15)
    assert not history.advance(np.full(len(GROUPS), 1.0))
    assert history.advance(np.full(len(GROUPS), 1.5))
    assert not history.advance(np.full(len(GROUPS), 2.9))


@pytest.mark.parametrize("betas", [(0.99, 0.9), (0.9999, 0.99999)])
def test_betas_that_cannot_be_deferred_are_refused(betas):
    with pytest.raises(GSScaleError, match="betas"):
        make_history(1e-15, betas)


def test_eps_zero_is_refused():
    with pytest.raises(GSScaleError, match="eps"):
        make_history(0.0)
