"""Deferred noise on means: one draw of the right size, the same for whoever asks."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from gsscale_nerfstudio import _C
from gsscale_nerfstudio.store.keys import keys_of
from tests.isa import run_with_isa
from tests.optim import noisy_rows
from tests.optim.noisy_rows import (
    FAINT,
    LAYOUT,
    NOISE,
    QUAT,
    SCALES,
    check_draws_agree,
    gathered,
    history_of,
    lr_at,
    per_column,
    stepped,
    store_of,
)


def unit_covariance() -> Tensor:
    """Of the noise of a step with rate and learning rate 1, by gsplat's formula."""
    w, x, y, z = (torch.tensor(QUAT, dtype=torch.float64) / math.hypot(*QUAT)).tolist()
    R = torch.tensor(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ],
        dtype=torch.float64,
    )
    sigma = R @ torch.tensor(SCALES, dtype=torch.float64).square().diag() @ R.T
    opacity = 1 / (1 + math.exp(-FAINT))
    g = 1 / (1 + math.exp(-100 * ((1 - opacity) - 0.995)))
    return g**2 * sigma @ sigma.T


def assert_distributed(moved: Tensor, covariance: Tensor) -> None:
    """Rows [n, 3] are draws of a normal distribution around 0, by their first four moments."""
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(covariance), moved.double().T, upper=False
    ).T
    error = 4.5 / math.sqrt(len(white))  # so many standard errors
    assert white.mean(0).abs().max() < error
    deviation = white.T @ white / len(white) - torch.eye(3, dtype=torch.float64)
    assert deviation.abs().max() < math.sqrt(2) * error
    assert (white**3).mean(0).abs().max() < math.sqrt(15) * error
    assert ((white**4).mean(0) - 3).abs().max() < math.sqrt(96) * error


@pytest.mark.parametrize("gap", [1, 7, 60, 400])
def test_skipped_steps_add_up_as_dense_ones_do(gap):
    """400 steps lie beyond the history's horizon of 260."""
    store, history = store_of(40_000), history_of(NOISE)
    variance = 0.0
    for step in range(gap):
        history.advance(lr_at(step))
        variance += (NOISE.rate * lr_at(step)[0]) ** 2
    rows = gathered(store, history)
    assert_distributed(rows[:, LAYOUT.columns["means"]], variance * unit_covariance())
    assert torch.equal(rows[:, 3 : LAYOUT.optimized], store.params[:, 3 : LAYOUT.optimized])


def test_rows_of_different_stamps_end_alike():
    """Some are stepped at each step, most are not: all have moved as much as dense ones."""
    n, steps = 40_000, 12
    store, history = store_of(n), history_of(NOISE)
    generator = torch.Generator().manual_seed(4)
    for step in range(steps):
        ids = torch.nonzero(torch.rand(n, generator=generator) < 0.2).flatten().int()
        stepped(store, history, ids.numpy(), lr_at(step))
    assert len(store.bookkeeping("stamp").unique()) > 10
    _C.settle_range(store.kernel_rows, history.tables, 0, n)
    variance = sum((NOISE.rate * lr_at(step)[0]) ** 2 for step in range(steps))
    assert_distributed(store.column("means"), variance * unit_covariance())


def test_a_step_has_its_own_noise():
    store, history = store_of(40_000), history_of(NOISE)
    stepped(store, history, np.arange(40_000, dtype=np.int32), lr_at(0))
    first = store.column("means").clone()
    assert_distributed(first, (NOISE.rate * 1e-3) ** 2 * unit_covariance())
    history.advance(lr_at(0))  # and the next one, which is skipped, knows nothing of it
    second = gathered(store, history)[:, LAYOUT.columns["means"]] - first
    assert_distributed(second, (NOISE.rate * 1e-3) ** 2 * unit_covariance())
    both = torch.stack([first, second], 1).double() / first.std()
    assert (both[:, 0].T @ both[:, 1] / 40_000).abs().max() < 4.5 / math.sqrt(40_000)


def test_whoever_settles_a_row_sees_the_same_draw():
    check_draws_agree()


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set_agrees_with_itself(isa):
    (used,) = run_with_isa([noisy_rows.__file__], isa)
    assert used in ("baseline", isa)


def test_a_row_moves_on_as_it_is_looked_at():
    """What a viewer shows between two steps of a row lies on one line."""
    store, history = store_of(10), history_of(NOISE)
    places = []
    for step in range(3):
        history.advance(lr_at(step))
        places.append(gathered(store, history)[:, LAYOUT.columns["means"]].double())
    lengths = [place.norm(dim=1) for place in places]
    assert (lengths[0] < lengths[1]).all() and (lengths[1] < lengths[2]).all()
    cosine = (places[0] * places[2]).sum(1) / (lengths[0] * lengths[2])
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_keys_tell_rows_at_one_place_apart():
    store, history = store_of(4), history_of(NOISE)
    store.bookkeeping("key")[:] = torch.tensor([3.0, 5.0, 3.0, 0.0])
    history.advance(lr_at(0))
    x = gathered(store, history)[:, 0].tolist()
    assert x[0] == x[2] and len({x[0], x[1], x[3]}) == 3


@pytest.mark.parametrize("first", [0, 20_000_000, 2**28 - 9])
def test_copies_of_one_row_go_ways_of_their_own_however_many_rows_there_are(first):
    store, history = store_of(10), history_of(NOISE)
    store.bookkeeping("key")[:] = keys_of(torch.arange(first, first + 10))
    history.advance(lr_at(0))
    assert len(gathered(store, history)[:, 0].unique()) == 10
    stepped(store, history, np.arange(10, dtype=np.int32), lr_at(1))
    assert len(store.column("means")[:, 0].unique()) == 10


def test_opaque_rows_stay():
    store, history = store_of(100, logit=0.0), history_of(NOISE)
    for step in range(3):
        stepped(store, history, np.arange(50, dtype=np.int32), lr_at(step))
    assert not gathered(store, history)[:, LAYOUT.columns["means"]].any()


def test_no_noise_is_todays_training_bit_for_bit():
    n, ends = 500, []
    for noise in (None, replace(NOISE, rate=0.0)):
        store, history = store_of(n), history_of(noise)
        generator = torch.Generator().manual_seed(2)
        for step in range(20):
            ids = torch.nonzero(torch.rand(n, generator=generator) < 0.3).flatten().int()
            grads = torch.zeros(len(ids), LAYOUT.width)
            grads[:, : LAYOUT.optimized] = torch.randn(
                len(ids), LAYOUT.optimized, generator=generator
            )
            lrs = lr_at(step)
            _C.settle_and_step(
                store.kernel_rows, history.tables, ids.numpy(), grads.numpy(), per_column(lrs)
            )
            history.advance(lrs)
        ends.append([gathered(store, history), store.spheres[:n].clone()])
    assert torch.equal(ends[0][0], ends[1][0]) and torch.equal(ends[0][1], ends[1][1])


def test_spheres_have_room_for_the_noise_until_they_are_refreshed():
    n = 2000
    store, history = store_of(n), history_of(NOISE)
    store.column("opacities")[:] = torch.linspace(-7, 0, n)[:, None]
    store.exp_avg[:n, 10] = 0.03  # opacities sink
    store.exp_avg_sq[:n, 10] = 0.001
    history.rebound(lr_at(0))
    _C.refresh_spheres(store.kernel_rows, history.tables, 0, n)
    spheres = store.spheres[:n].clone()
    outside = without_noise = 0
    for step in range(NOISE.horizon):
        history.advance(lr_at(0))
        if step % 20 == 19:
            rows = gathered(store, history)
            moved = (rows[:, LAYOUT.columns["means"]] - spheres[:, :3]).norm(dim=1)
            reach = moved + 3.33 * rows[:, LAYOUT.columns["scales"]].amax(dim=1).exp()
            outside += int((reach > spheres[:, 3] + 1e-5).sum())
            without_noise += int((reach > 3.34 * max(SCALES)).sum())
    assert outside == 0 and without_noise > 1000
    # Opaque ones are not held for larger than they are.
    torch.testing.assert_close(spheres[-1, 3], torch.tensor(3.33 * max(SCALES)), rtol=1e-3, atol=0)


def test_restarting_does_not_depend_on_what_was_before():
    """A resumed run begins with empty sums; the one that was saved must go on as it does."""
    ends = []
    for steps in (0, 37):
        store, history = store_of(100), history_of(NOISE)
        for _ in range(steps):
            history.advance(1e6 * lr_at(0))  # sums that later steps would vanish in
        if steps:
            history.all_settled()
        else:
            history.restart(37)
        store.bookkeeping("stamp")[:] = 37
        history.rebound(lr_at(0))
        for step in range(5):
            history.advance(lr_at(step))
        ends.append(gathered(store, history))
    assert torch.equal(*ends)


def test_tables_must_cover_all_stamps():
    history = history_of(NOISE)
    for step in range(3):
        history.advance(lr_at(step))
    store = store_of(1)
    assert gathered(store, history).isfinite().all()
    with pytest.raises(ValueError, match="sums_before must cover"):
        history._sums_before = history._sums_before[:2]
        history._tables = None
        assert history.tables
