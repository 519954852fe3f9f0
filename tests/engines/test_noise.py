"""Noise on means where rows are on the GPU: that of the host's kernels, draw by draw."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gsscale_nerfstudio import _C
from gsscale_nerfstudio.engines import Viewpoint
from gsscale_nerfstudio.engines.cache import RowCache
from gsscale_nerfstudio.engines.streams import mark_current
from gsscale_nerfstudio.engines.working_set import working_set
from gsscale_nerfstudio.optim import AdamHistory, MeanNoise
from gsscale_nerfstudio.optim.device_tables import DeviceTables
from gsscale_nerfstudio.store import GROUPS, HostStore, RowLayout
from gsscale_nerfstudio.store.keys import keys_of
from tests.engines.driving import DEVICES, LR, make_engine, make_optimizers, random_rows
from tests.engines.driving import ring_of_views as views_around
from tests.optim.test_noise import assert_distributed

LAYOUT = RowLayout(1)
NOISE = MeanNoise(rate=2e4, horizon=101)
N = 600
MEANS = LAYOUT.columns["means"]


def history_of(steps: int) -> AdamHistory:
    history = AdamHistory(LAYOUT, LR, dict.fromkeys(GROUPS, 1e-15), noise=NOISE)
    for step in range(steps):
        history.advance(lrs_at(step))
    return history


def lrs_at(step: int) -> np.ndarray:
    return np.array([LR[name] * 0.99**step for name in GROUPS])


def faint_store(step: int) -> HostStore:
    """Rows with moments, most of them faint, of all stamps up to ``step``."""
    store = HostStore(LAYOUT, max_rows=N)
    values = random_rows(N, LAYOUT)
    values["opacities"] = torch.empty(N, 1).uniform_(-7, 1)
    store.append(values, stamp=0)
    store.exp_avg[:N, : LAYOUT.optimized] = 0.01 * torch.randn(N, LAYOUT.optimized)
    store.exp_avg_sq[:N, : LAYOUT.optimized] = torch.rand(N, LAYOUT.optimized)
    store.bookkeeping("stamp")[:] = torch.arange(N) % (step + 1)
    return store


def admitted(store: HostStore, device: str) -> tuple[RowCache, torch.Tensor]:
    store.pin() if device == "cuda" else None
    cache = RowCache(store, torch.device(device), N)
    admission = cache.admit(torch.arange(N, dtype=torch.int32), 1, 1, None)
    assert admission is not None
    if device == "cuda":
        torch.cuda.synchronize()
    return cache, admission.slots


def viewpoint_on(device: str) -> Viewpoint:
    return Viewpoint(torch.tensor([0.3, 5.0, -0.2], device=device), 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cached", [1.0, 0.5])
@pytest.mark.parametrize("first_id", [0, 20_000_000])
def test_gathered_rows_are_the_hosts(device, cached, first_id):
    """Rows in the cache, and rows that are read from the host store."""
    history, store = history_of(300), faint_store(300)
    store.bookkeeping("key")[:] = keys_of(torch.arange(first_id, first_id + N))
    cache, slots = admitted(store, device)
    slots = torch.where(torch.arange(N, device=device) < cached * N, slots, -1).int()
    rows = torch.arange(N, dtype=torch.int32, device=device)
    leaves = cache.gather(
        slots, DeviceTables(history, torch.device(device)), viewpoint_on(device), False, rows
    )
    ids = np.arange(N, dtype=np.int32)
    expected = torch.empty(N, LAYOUT.width)
    _C.gather_settled(store.kernel_rows, history.tables, ids, expected.numpy())
    quiet = torch.empty(N, LAYOUT.width)
    history.noise = None
    history.rebound(lrs_at(0))
    _C.gather_settled(store.kernel_rows, history.tables, ids, quiet.numpy())
    moved = (expected - quiet)[:, MEANS]
    got = leaves["means"].cpu() - quiet[:, MEANS]
    assert moved.abs().max() > 0.1
    torch.testing.assert_close(got, moved, rtol=2e-3, atol=1e-6)
    for name in ("scales", "quats", "opacities"):
        torch.testing.assert_close(
            leaves[name].cpu().flatten(1), expected[:, LAYOUT.columns[name]], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("device", DEVICES)
def test_equal_rows_with_ids_beyond_2_to_the_24_part(device):
    """Gathered, stepped, and brought back with the keys that they came with."""
    history, store = history_of(3), faint_store(3)
    for array in (store.params, store.exp_avg, store.exp_avg_sq):
        array[:N] = array[0].clone()
    store.column("opacities")[:] = -6.0
    keys = keys_of(torch.arange(20_000_000, 20_000_000 + N))
    store.bookkeeping("key")[:] = keys
    cache, slots = admitted(store, device)
    tables = DeviceTables(history, torch.device(device))
    attributes = cache.gather(slots, tables, viewpoint_on(device), training=True)
    assert len(attributes["means"][:, 0].unique()) > 0.99 * N  # some round to one float
    ids = torch.arange(N, dtype=torch.int32)
    working = working_set(ids, attributes, LAYOUT, viewpoint_on(device), training=True)
    cache.step(slots, working, tables, lrs_at(3))
    cache.write_back(mark_current(torch.device(device)))
    assert len(store.column("means")[:, 0].unique()) > 0.99 * N
    assert torch.equal(store.bookkeeping("key"), keys)


@pytest.mark.parametrize("device", DEVICES)
def test_stepped_rows_and_their_spheres_are_the_hosts(device):
    history, store = history_of(300), faint_store(300)
    cache, slots = admitted(store, device)
    tables = DeviceTables(history, torch.device(device))
    attributes = cache.gather(slots, tables, viewpoint_on(device), training=True)
    ids = torch.arange(N, dtype=torch.int32)
    working = working_set(ids, attributes, LAYOUT, viewpoint_on(device), training=True)
    spheres = cache.step(slots, working, tables, lrs_at(300)).cpu()
    got = cache.params.cpu()[slots.long().cpu()]

    before = store.params[:N, MEANS].clone()
    lr = np.append(lrs_at(300), 0.0)[LAYOUT.group_of_column].astype(np.float32)
    _C.settle_and_step(
        store.kernel_rows, history.tables, ids.numpy(), np.zeros((N, LAYOUT.width), np.float32), lr
    )
    expected = store.params[:N]
    moved = (expected[:, MEANS] - before).abs().max()
    assert moved > 0.1
    torch.testing.assert_close(got[:, MEANS], expected[:, MEANS], rtol=1e-4, atol=1e-5)
    every = slice(0, LAYOUT.optimized + 1)  # and stamps
    torch.testing.assert_close(got[:, every], expected[:, every], rtol=1e-4, atol=1e-5)
    # What will be drawn next depends on every bit of the mean.
    same = (got[:, MEANS] == expected[:, MEANS]).all(1)
    assert same.float().mean() > 0.8
    torch.testing.assert_close(spheres[same], store.spheres[:N][same], rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_spheres_have_room_for_the_noise_to_come(device):
    history, store = history_of(3), faint_store(3)
    history.rebound(lrs_at(3))
    cache, slots = admitted(store, device)
    tables = DeviceTables(history, torch.device(device))
    attributes = cache.gather(slots, tables, viewpoint_on(device), training=True)
    ids = torch.arange(N, dtype=torch.int32)
    working = working_set(ids, attributes, LAYOUT, viewpoint_on(device), training=True)
    tables.foresee(lrs_at(3))
    spheres = cache.step(slots, working, tables, lrs_at(3)).cpu()
    for _ in range(NOISE.horizon):
        history.advance(lrs_at(3))
        tables.record()
        tables.foresee(lrs_at(3))
    leaves = cache.gather(slots, tables, viewpoint_on(device), training=False)
    scales = leaves["scales"].cpu().amax(1).exp()
    moved = (leaves["means"].cpu() - spheres[:, :3]).norm(dim=1)
    assert (moved + 3.33 * scales <= spheres[:, 3] * 1.0001).all()
    assert (moved > 0.5 * scales).sum() > 50  # spheres without it would be too small


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_come_and_go_move_as_dense_ones(device):
    """A cache of a third of the rows, refreshed in the middle; nothing but noise moves them."""
    values = random_rows(3000, LAYOUT)
    for name, value in (("scales", math.log(0.05)), ("quats", 0.5), ("opacities", -5.0)):
        values[name][:] = value
    engine = make_engine(values, LAYOUT, device, 1500)
    engine.noise = MeanNoise(rate=20.0, horizon=10)  # little beside what cameras see
    first = engine.store.column("means").clone()
    steps = 14
    optimizers, _ = make_optimizers(engine.parameters(), True, steps)
    engine.store.bookkeeping("key")[:] = torch.arange(3000)
    views = views_around()
    missed = 0
    for step in range(steps):
        view = views[step * 5 % len(views)]
        working = engine.begin(view)
        engine.announce([views[(step + k) * 5 % len(views)] for k in (1, 2)])
        for leaf in working.leaves.values():
            leaf.grad = torch.zeros_like(leaf)
        for name in GROUPS:
            optimizers[name].step()
        if step == 7:
            engine.rows_changed()
        missed += len(working)
    assert engine._fitted is not None and engine.counters["rows_missed"] > 1500
    engine.settle()
    moved = engine.store.column("means") - first
    g = 1 / (1 + math.exp(100 * (1 / (1 + math.exp(5.0)) - 0.005)))
    deviation = math.sqrt(steps) * 20.0 * LR["means"] * g * 0.05**2
    assert_distributed(moved, deviation**2 * torch.eye(3, dtype=torch.float64))
