"""The penalties' pull where rows are on the GPU: that of the host's kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gsscale_nerfstudio import _C
from gsscale_nerfstudio.engines.working_set import working_set
from gsscale_nerfstudio.optim import AdamHistory, MeanNoise, Pull
from gsscale_nerfstudio.optim.device_tables import DeviceTables
from gsscale_nerfstudio.store import GROUPS, HostStore, RowLayout
from tests.engines.driving import DEVICES, make_engine, make_optimizers, random_rows
from tests.engines.driving import ring_of_views as views_around
from tests.engines.test_noise import admitted, viewpoint_on
from tests.optim.pulled_rows import LR, LRS, PULL

N = 600
STEP = 300
FIRST = 2000
NOISES = [None, MeanNoise(rate=2e4, horizon=101)]


def case(layout: RowLayout, noise: MeanNoise | None, pull: Pull = PULL):
    """A history, and rows of all stamps, sizes and opacities, as views have left them or not."""
    history = AdamHistory(
        layout, LR, dict.fromkeys(GROUPS, 1e-15), noise=noise, pull=pull, count=lambda: N
    )
    for _ in range(STEP):
        history.advance(LRS)
    store = HostStore(layout, max_rows=N)
    values = random_rows(N, layout)
    values["opacities"] = torch.empty(N, 1).uniform_(-7, 3)
    store.append(values, stamp=0)
    used = slice(0, layout.optimized)
    size = 10.0 ** torch.empty(N, 1).uniform_(-8, -4)
    first, second = torch.randn(N, layout.optimized), torch.rand(N, layout.optimized)
    store.exp_avg[:N, used] = (0.3 * size * first).to(store.exp_avg.dtype)
    store.exp_avg_sq[:N, used] = (size.square() * second).to(store.exp_avg.dtype)
    store.exp_avg[: N // 10] = store.exp_avg_sq[: N // 10] = 0
    store.bookkeeping("stamp")[:] = torch.arange(N) % (STEP + 1)
    return history, store


def settled_here(store: HostStore, history: AdamHistory) -> Tensor:
    rows = torch.empty(N, store.layout.width)
    ids = np.arange(N, dtype=np.int32)
    _C.gather_settled(store.kernel_rows, history.tables, ids, rows.numpy())
    return rows


def assert_close_to_moves(got: Tensor, expected: Tensor, before: Tensor) -> None:
    """Both have moved from where they were, alike."""
    moved = (expected - before).abs()
    assert moved.max() > 1
    assert ((got - expected).abs() <= 2e-4 * moved + 2e-5).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cached", [1.0, 0.5])
@pytest.mark.parametrize("noise", NOISES)
def test_gathered_rows_are_the_hosts(device, cached, noise):
    """Rows in the cache, and rows that are read from the host store."""
    layout = RowLayout(1)
    history, store = case(layout, noise)
    cache, slots = admitted(store, device)
    slots = torch.where(torch.arange(N, device=device) < cached * N, slots, -1).int()
    rows = torch.arange(N, dtype=torch.int32, device=device)
    tables = DeviceTables(history, torch.device(device))
    leaves = cache.gather(slots, tables, viewpoint_on(device), False, rows)
    expected = settled_here(store, history)
    for name in ("scales", "opacities"):
        columns = layout.columns[name]
        assert_close_to_moves(
            leaves[name].cpu().flatten(1), expected[:, columns], store.params[:N, columns]
        )
    # Noise goes by the size and opacity that are left.
    moved = expected[:, layout.columns["means"]] - store.params[:N, layout.columns["means"]]
    got = leaves["means"].cpu() - store.params[:N, layout.columns["means"]]
    torch.testing.assert_close(got, moved, rtol=5e-3, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_stepped_rows_and_their_spheres_are_the_hosts(device, noise, moments):
    layout = RowLayout(1, moments)
    history, store = case(layout, noise)
    cache, slots = admitted(store, device)
    tables = DeviceTables(history, torch.device(device))
    attributes = cache.gather(slots, tables, viewpoint_on(device), training=True)
    ids = torch.arange(N, dtype=torch.int32)
    working = working_set(ids, attributes, layout, viewpoint_on(device), training=True)
    spheres = cache.step(slots, working, tables, LRS).cpu()
    at = slots.long().cpu()
    got = [array.cpu()[at].float() for array in (cache.params, cache.exp_avg, cache.exp_avg_sq)]

    before = store.params[:N].clone()
    lr = np.append(LRS, 0.0)[layout.group_of_column].astype(np.float32)
    none = np.zeros((N, layout.width), np.float32)
    _C.settle_and_step(store.kernel_rows, history.tables, ids.numpy(), none, lr)
    pulled = slice(layout.columns["scales"].start, layout.columns["opacities"].stop)
    assert_close_to_moves(got[0][:, pulled], store.params[:N, pulled], before[:, pulled])
    for mine, its in zip(got[1:], (store.exp_avg, store.exp_avg_sq), strict=True):
        its = its[:N, pulled].float()
        # Rounded by chance to one of two neighbours, where moments are narrow.
        error = 0.01 if layout.narrow else 1e-3
        assert (
            (mine[:, pulled] - its).abs() <= error * its.abs() + 1e-3 * its.abs().median()
        ).all()
        assert its[1 : N // 10, 0].abs().min() > 0  # of those that no view has shown, too
    # What will be drawn next depends on every bit of the mean.
    means = layout.columns["means"]
    same = (got[0][:, means] == store.params[:N, means]).all(1)
    assert same.float().mean() > (0.5 if noise else 0.99)
    torch.testing.assert_close(spheres[same], store.spheres[:N][same], rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_come_and_go_are_pulled_at_as_dense_ones(device):
    """A cache of a third of the rows, refreshed in the middle; nothing but the pull moves them."""
    layout = RowLayout(1)
    values = random_rows(3000, layout)
    values["opacities"][:] = 1.0
    engine = make_engine(values, layout, device, 1500)
    engine.pull = Pull(opacity=0.01, scale=0.0, horizon=10)
    steps = 14
    optimizers, _ = make_optimizers(engine.parameters(), True, steps)
    engine.restart(FIRST)
    engine.store.exp_avg_sq[:3000, layout.columns["opacities"]] = 1e-10  # as views have left it
    w = torch.full((), 1.0, dtype=torch.float64)
    m, v = torch.zeros_like(w), torch.full_like(w, 1e-10)
    views = views_around()
    for step in range(steps):
        view = views[step * 5 % len(views)]
        working = engine.begin(view)
        engine.announce([views[(step + k) * 5 % len(views)] for k in (1, 2)])
        for name, leaf in working.leaves.items():
            leaf.grad = torch.zeros_like(leaf)
            if name == "opacities":  # a view's own rows have the penalty in their loss
                o = torch.sigmoid(leaf.detach())
                leaf.grad += 0.01 / 3000 * o * (1 - o)
        lr = optimizers["opacities"].param_groups[0]["lr"]
        for name in GROUPS:
            optimizers[name].step()
        if step == 7:
            engine.rows_changed()
        o = torch.sigmoid(w)
        g = 0.01 / 3000 * o * (1 - o)
        m += 0.1 * (g - m)
        v += 0.001 * (g * g - v)
        denominator = (v / (1 - 0.999 ** (FIRST + step + 1))).sqrt()
        w -= lr * m / (1 - 0.9 ** (FIRST + step + 1)) / denominator
    assert engine._fitted is not None and engine.counters["rows_missed"] > 1500
    engine.settle()
    moved = 1.0 - engine.store.column("opacities")[:, 0].double()
    assert 1 - w > 1e-3
    assert (moved / (1 - w) - 1).abs().max() < 0.05
    assert float(moved.mean() / (1 - w)) == pytest.approx(1, abs=0.02)
