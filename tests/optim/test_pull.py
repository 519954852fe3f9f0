"""The penalties' pull on rows that no view shows: that of dense Adam, the same for whoever asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from gsscale_nerfstudio import _C
from gsscale_nerfstudio.optim import AdamHistory, MeanNoise, Pull
from gsscale_nerfstudio.store import GROUPS, HostStore
from tests.isa import run_with_isa
from tests.optim import pulled_rows
from tests.optim.noisy_rows import NOISE, per_column
from tests.optim.pulled_rows import (
    LAYOUT,
    LR,
    LRS,
    PULL,
    check_everyone_agrees,
    gathered,
    gradient_of_penalties,
    history_of,
    pulled_store,
)

N = 400
FIRST = 2000
"""Steps of training before these."""
PULLED = slice(LAYOUT.columns["scales"].start, LAYOUT.columns["scales"].stop)
OPACITY = LAYOUT.columns["opacities"].start


@dataclass
class Training:
    """The same gradients of views, with dense Adam in float64 and with deferred rows."""

    dense: Tensor
    """[n, 4] log-scales and opacity logits."""
    deferred: Tensor
    without: Tensor
    """Dense, without penalties."""


def train(seen: float, photometric: float, steps: int, every: int = 100) -> Training:
    """Of ``N`` rows, ``seen`` is the share that each step's view shows.

    Args:
        seen: each row's chance.
        photometric: size of a view's gradients, beside those of the penalties at the start.
        steps: of training.
        every: steps after which all rows are settled, as refinements do.
    """
    generator = torch.Generator().manual_seed(3)
    store, history = pulled_store(N), history_of(PULL, N)
    begin(store, history)
    start = elements(store.params[:N]).double()
    size = photometric * gradient_of_penalties(start, N)
    left = seen * size.square()  # second moments, as views have left them
    store.exp_avg_sq[:N, PULLED], store.exp_avg_sq[:N, OPACITY] = left[:, :3], left[:, 3]
    dense = [Dense(start, left, with_penalties) for with_penalties in (True, False)]
    for step in range(FIRST + 1, FIRST + steps + 1):
        shown = torch.rand(N, generator=generator) < seen
        views = torch.randn(N, 4, generator=generator).double() * size * shown[:, None]
        for one in dense:
            one.step(views, step)
        ids = torch.nonzero(shown).flatten().int()
        # A view's own rows have the penalties in their loss.
        now = elements(gathered(store, history))[ids.long()].double()
        grads = torch.zeros(len(ids), LAYOUT.width)
        both = (views[ids.long()] + gradient_of_penalties(now, N)).float()
        grads[:, PULLED], grads[:, OPACITY] = both[:, :3], both[:, 3]
        _C.settle_and_step(
            store.kernel_rows, history.tables, ids.numpy(), grads.numpy(), per_column(LRS)
        )
        history.advance(LRS)
        if (step - FIRST) % every == 0:
            _C.settle_range(store.kernel_rows, history.tables, 0, N)
            history.all_settled()
    return Training(dense[0].w, elements(gathered(store, history)), dense[1].w)


def begin(store: HostStore, history: AdamHistory) -> None:
    """Be at step ``FIRST``, without moments."""
    history.restart(FIRST)
    store.bookkeeping("stamp").fill_(FIRST)


def elements(rows: Tensor) -> Tensor:
    """[n, 4]: what is pulled at."""
    return torch.cat([rows[:, PULLED], rows[:, OPACITY : OPACITY + 1]], 1)


class Dense:
    """torch.optim.Adam's formula in float64."""

    def __init__(self, start: Tensor, second: Tensor, penalties: bool) -> None:
        self.w, self.m, self.v = start.clone(), torch.zeros_like(start), second.clone()
        self.penalties = penalties
        self.lr = torch.tensor([LR["scales"]] * 3 + [LR["opacities"]], dtype=torch.float64)

    def step(self, gradient: Tensor, t: int) -> None:
        if self.penalties:
            gradient = gradient + gradient_of_penalties(self.w, N)
        self.m += 0.1 * (gradient - self.m)
        self.v += 0.001 * (gradient.square() - self.v)
        denominator = (self.v / (1 - 0.999**t)).sqrt() + 1e-15
        self.w -= self.lr * (self.m / (1 - 0.9**t)) / denominator


@pytest.mark.parametrize("photometric", [10, 100])
@pytest.mark.parametrize("seen", [0.65, 0.2, 0.03])
def test_rows_that_views_show_now_and_then_are_pulled_at_as_dense_ones(seen, photometric):
    run = train(seen, photometric, steps=600)
    pull = run.dense - run.without
    error = (run.deferred - run.dense).abs()
    for group, what in (("scales", slice(0, 3)), ("opacities", slice(3, 4))):
        moved = pull[:, what].abs().mean()
        assert moved > 0.005, group
        assert error[:, what].mean() < 0.02 * moved, group
        got = float((run.deferred - run.without)[:, what].mean())
        assert got == pytest.approx(float(pull[:, what].mean()), rel=0.02), group


def test_rows_that_no_view_shows_are_gone_when_dense_ones_are():
    """Nothing but the pull acts on them: Adam takes whole steps, and they are dead within 100."""
    run = train(0.0, 1.0, steps=100)
    opacity = [torch.sigmoid(w[:, 3]) for w in (run.dense, run.deferred)]
    assert opacity[0].max() < 0.005 and opacity[1].max() < 0.005
    shrunk = [run.without[:, :3] - w[:, :3] for w in (run.dense, run.deferred)]
    assert float((shrunk[1] / shrunk[0]).median()) == pytest.approx(1, abs=0.35)


@pytest.mark.parametrize("gaps", [(10, 1), (10, 10), (20, 10), (33, 33)])
@pytest.mark.parametrize("logit", [3.0, 5.0, 7.0])
def test_opaque_rows_without_moments_sink_no_faster_than_dense_ones(logit, gaps):
    """As an opacity falls from 1 its gradient grows, and Adam knows the smaller ones only."""
    store, history = pulled_store(1), history_of(PULL, N)
    store.column("opacities")[:] = logit
    begin(store, history)
    dense = Dense(elements(store.params[:1]).double(), torch.zeros(1, 4).double(), True)
    t = FIRST
    for gap in gaps:
        for _ in range(gap):
            t += 1
            dense.step(torch.zeros(1, 4).double(), t)
            history.advance(LRS)
        _C.settle_range(store.kernel_rows, history.tables, 0, 1)
        history.all_settled()
    first, second = store.exp_avg[0, OPACITY], store.exp_avg_sq[0, OPACITY]
    assert first / second.sqrt() < 7.3  # no gradients make it more, see AdamHistory.stride
    fallen = logit - store.column("opacities").item()
    assert fallen == pytest.approx(logit - float(dense.w[0, 3]), rel=0.3)


def test_learning_rates_may_jump():
    """Whatever a schedule does, the pull goes down, by what dense Adam goes down."""
    store, history = pulled_store(N), history_of(PULL, N)
    begin(store, history)
    left = (30 * gradient_of_penalties(elements(store.params[:N]), N)).square()
    store.exp_avg_sq[:N, PULLED], store.exp_avg_sq[:N, OPACITY] = left[:, :3], left[:, 3]
    dense = Dense(elements(store.params[:N]).double(), left.double(), True)
    start, lr = dense.w.clone(), dense.lr
    for step, factor in enumerate([1.0] * 9 + [10.0] + [0.1] * 9 + [3.0] * 3, FIRST + 1):
        dense.lr = factor * lr
        dense.step(torch.zeros(N, 4).double(), step)
        history.advance(factor * LRS)
        moved = elements(gathered(store, history)).double() - start
        assert (moved <= 0).all()
    expected = dense.w - start
    assert float((moved - expected).abs().mean() / expected.abs().mean()) < 0.05


def test_however_seldom_rows_are_settled_there_are_bounds():
    seldom, still = Pull(0.01, 0.01, horizon=10**7), dict(LR, opacities=0.0)
    assert history_of(seldom, N).pull_reach == np.inf
    for pull, rates in ((seldom, LR), (PULL, still)):
        store = pulled_store(N)
        eps = dict.fromkeys(GROUPS, 1e-15)
        history = AdamHistory(LAYOUT, rates, eps, noise=NOISE, pull=pull, count=lambda: N)
        _C.refresh_spheres(store.kernel_rows, history.tables, 0, N)
        assert store.spheres[:N].isfinite().all()


@pytest.mark.parametrize("every", [10, 50])
def test_it_does_not_matter_much_how_often_rows_are_settled(every):
    seldom, often = (train(0.1, 30.0, 200, every=k).deferred for k in (200, every))
    moved = (seldom - train(0.1, 30.0, 1).without).abs().mean()
    assert (often - seldom).abs().mean() < 0.05 * moved


def test_whoever_settles_a_row_sees_the_same():
    check_everyone_agrees()


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set_agrees_with_itself(isa):
    (used,) = run_with_isa([pulled_rows.__file__], isa)
    assert used in ("baseline", isa)


def test_no_pull_is_todays_training_bit_for_bit():
    ends = []
    for pull in (None, Pull(0.0, 0.0, 101)):
        store, history = pulled_store(N), history_of(pull, N)
        store.exp_avg[:N] = 0.1
        for _ in range(7):
            history.advance(LRS)
        ends.append(gathered(store, history))
    assert torch.equal(*ends)


@pytest.mark.parametrize("pull, group", [(Pull(0.01, 0.0, 9), 3), (Pull(0.0, 0.01, 9), 0)])
def test_each_penalty_pulls_at_its_own(pull, group):
    store, history = pulled_store(N), history_of(pull, N)
    history.advance(LRS)
    moved = elements(gathered(store, history)) - elements(store.params[:N])
    others = slice(0, 3) if group == 3 else slice(3, 4)
    assert (moved[:, group] < 0).all() and not moved[:, others].any()


def test_a_row_has_its_share_of_the_mean():
    """The weight is that among the rows of the moment."""
    ends = []
    for n in (N, 10 * N):
        store = pulled_store(N)
        store.exp_avg_sq[:N] = 1e-6  # as views have left it: steps are in proportion
        history = history_of(PULL, n)
        for _ in range(50):
            history.advance(LRS)
        ends.append((elements(gathered(store, history)) - elements(store.params[:N])).double())
    assert ends[0].abs().min() > 0
    torch.testing.assert_close(ends[0], 10 * ends[1], rtol=0.01, atol=5e-6)


@pytest.mark.parametrize("noise", [NOISE, MeanNoise(rate=200.0, horizon=NOISE.horizon)])
def test_spheres_have_room_for_noise_of_what_is_pulled_down(noise):
    """Noise grows as opacities fall; what is opaque for good is not held for larger."""
    n = 2000
    store = pulled_store(n)
    store.column("opacities")[:] = torch.linspace(-6, 3, n)[:, None]
    store.exp_avg_sq[: n // 2] = 1e-18  # pulled down by 20 in these steps
    store.exp_avg_sq[n // 2 :] = 1.0
    history = history_of(PULL, n, noise)
    begin(store, history)
    history.rebound(LRS)
    _C.refresh_spheres(store.kernel_rows, history.tables, 0, n)
    spheres = store.spheres[:n].clone()
    fallen = 0
    for step in range(noise.horizon - 1):
        history.advance(LRS)
        if step % 20 == 19:
            rows = gathered(store, history)
            moved = (rows[:, LAYOUT.columns["means"]] - store.column("means")).norm(dim=1)
            reach = moved + 3.33 * rows[:, LAYOUT.columns["scales"]].amax(dim=1).exp()
            assert (reach <= spheres[:, 3] + 1e-5).all()
            fallen = int((rows[:, OPACITY] < store.params[:n, OPACITY] - 1).sum())
    assert fallen > 900
    size = 3.33 * store.column("scales")[-1].max().exp()
    torch.testing.assert_close(spheres[-1, 3], size, rtol=1e-3, atol=1e-4)


def refused_tables(change: Callable[[AdamHistory], None]) -> None:
    history = history_of(PULL, 1)
    for _ in range(3):
        history.advance(LRS)
    change(history)
    history._tables = None
    assert history.tables


def test_tables_must_cover_all_stamps():
    def shorten(history: AdamHistory) -> None:
        history._sums_before = history._sums_before[:2]

    with pytest.raises(ValueError, match="sums_before must cover"):
        refused_tables(shorten)


def test_the_scene_decides_how_many_rows_there_are():
    store = HostStore(LAYOUT, max_rows=10)
    history = AdamHistory(LAYOUT, LR, dict.fromkeys(GROUPS, 1e-15), pull=PULL, count=store.__len__)
    assert history.pull_weights == PULL.weights(0)
    store.resize(7)
    assert history.pull_weights == (0.01 / 21, 0.01 / 7)
    assert np.isfinite(history.pull_reach)
