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


def everything_kernels_read(tables: _C.SkipTables) -> list[np.ndarray]:
    """What the tables do to rows of every stamp: gathered, settled, bounded."""
    n = tables.step + 1
    rng = np.random.default_rng(n)
    store = HostStore(LAYOUT, max_rows=n)
    store.resize(n)
    used = LAYOUT.optimized
    store.params.numpy()[:n, :used] = rng.normal(size=(n, used))
    store.exp_avg.numpy()[:n, :used] = rng.normal(size=(n, used))
    store.exp_avg_sq.numpy()[:n, :used] = rng.random((n, used)) * 1e-12
    store.bookkeeping("stamp").numpy()[:] = np.arange(n)
    gathered = np.empty((n, LAYOUT.width), dtype=np.float32)
    _C.gather_settled(store.kernel_rows, tables, np.arange(n, dtype=np.int32), gathered)
    _C.refresh_spheres(store.kernel_rows, tables, 0, n)
    _C.settle_range(store.kernel_rows, tables, 0, n)
    arrays = (store.params, store.exp_avg, store.exp_avg_sq, store.spheres)
    return [gathered] + [array.numpy()[:n].copy() for array in arrays]


def assert_same(some: list[np.ndarray], others: list[np.ndarray]) -> None:
    for one, other in zip(some, others, strict=True):
        np.testing.assert_array_equal(one, other)


@settings(deadline=None, max_examples=15)
@given(
    # Before and beyond the horizon, and where the arrays grow.
    start=st.sampled_from([0, 1, 263, 264, 265, 266, 700, 1022, 1023, 2047]),
    data=st.data(),
)
def test_ahead_equals_advance(start, data):
    """Whether looked ahead or not, with whatever rates, the history and its tables are the same."""
    looking, plain = make_history(1e-8), make_history(1e-8)
    for step in range(start):
        lr = np.linspace(0.5, 1, len(GROUPS)) * 0.999**step
        looking.advance(lr)
        plain.advance(lr)
    rates = st.lists(st.floats(0, 3), min_size=len(GROUPS), max_size=len(GROUPS)).map(np.array)
    before = looking.tables
    did_before = everything_kernels_read(before)
    for _ in range(3):
        lr = data.draw(rates)
        ahead = [looking.ahead(other) for other in data.draw(st.lists(rates, max_size=2))]
        ahead.append(looking.ahead(lr))
        # Nothing has happened yet.
        assert_same(everything_kernels_read(looking.tables), everything_kernels_read(plain.tables))
        assert looking.advance(lr) == plain.advance(lr)
        expected = everything_kernels_read(plain.tables)
        assert ahead[-1].step == looking.step == plain.step == plain.tables.step
        assert_same(everything_kernels_read(ahead[-1]), expected)
        assert_same(everything_kernels_read(looking.tables), expected)
        np.testing.assert_array_equal(looking.reach, plain.reach)
    assert_same(everything_kernels_read(before), did_before)


def test_tables_in_use_do_not_see_later_steps():
    history = make_history(1e-8)
    for _ in range(history.horizon + 50):
        history.advance(np.full(len(GROUPS), 0.5))
    tables, ahead = history.tables, history.ahead(np.full(len(GROUPS), 0.7))
    did, will = everything_kernels_read(tables), everything_kernels_read(ahead)
    for step in range(1200):
        history.advance(np.full(len(GROUPS), 0.7 if step == 0 else 0.1))
    assert_same(everything_kernels_read(tables), did)
    assert_same(everything_kernels_read(ahead), will)


def test_looking_ahead_is_forgotten_where_the_history_is_changed():
    lr = np.full(len(GROUPS), 0.5)
    for change in (lambda h: h.rebound(lr / 2), lambda h: h.restart(900)):
        looking, plain = make_history(1e-8), make_history(1e-8)
        for history in (looking, plain):
            for _ in range(10):
                history.advance(lr)
        looking.ahead(lr)
        for history in (looking, plain):
            change(history)
            history.advance(lr)
        assert looking.step == plain.step
        assert_same(everything_kernels_read(looking.tables), everything_kernels_read(plain.tables))


def test_rates_changed_in_place_are_new_rates():
    """A caller may keep one array for the learning rates and write to it."""
    lr = np.full(len(GROUPS), 0.5)
    looking, plain = make_history(1e-8), make_history(1e-8)
    looking.ahead(lr)
    lr *= 0.5
    looking.advance(lr)
    plain.advance(lr)
    assert_same(everything_kernels_read(looking.tables), everything_kernels_read(plain.tables))


def test_tables_that_do_not_fit_together_are_refused():
    """Kernels index by what these arrays say, so none of it is taken on trust."""
    history = make_history(1e-8)
    for _ in range(history.horizon + 50):
        history.advance(np.full(len(GROUPS), 0.5))
    good = {
        "step": history.step,
        "skip": history._skip,
        "tail": history._tail,
        "eps_scale": history._eps_scale,
        "decay1": history._decay1,
        "decay2": history._decay2,
        "eps": history._eps,
        "reach": history.reach,
        "group": history._group,
        "beta1": 0.9,
        "beta2": 0.999,
    }
    assert_same(
        everything_kernels_read(_C.SkipTables(**good)), everything_kernels_read(history.tables)
    )
    beyond, below = history._group.copy(), history._group.copy()
    beyond[-1], below[0] = len(GROUPS) + 1, -1
    bad: list[dict] = [
        {"step": -1},
        {"skip": history._skip[:, :-1].copy()},
        {"skip": history._skip[:-1]},
        {"tail": history._tail[:49]},
        {"eps_scale": history._eps_scale[: history.step]},
        {"decay1": history._decay1[1:]},
        {"decay2": history._decay2[1:]},
        {"eps": history._eps[1:]},
        {"reach": history.reach[1:]},
        {"group": beyond},
        {"group": below},
        {"group": np.repeat(history._group, 9)},
    ]
    for change in bad:
        with pytest.raises(ValueError):
            _C.SkipTables(**{**good, **change})
    with pytest.raises(TypeError):
        _C.SkipTables(**{**good, "skip": history._skip.astype(np.float32)})
