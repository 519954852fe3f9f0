"""gsscale's training against plain tensors with torch.optim.Adam: the same numbers come out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gsscale_nerfstudio.cull import View
from gsscale_nerfstudio.engines import Engine, HostEngine, WorkingSet
from gsscale_nerfstudio.rasterize import Rendering, rasterize
from gsscale_nerfstudio.store import GROUPS, HostStore, RowLayout
from tests.engines.driving import (
    DEVICES,
    LR,
    colors_of,
    largest_errors,
    make_optimizers,
    random_rows,
    ring_of_views,
)

STEPS = 200


def draw(values: dict[str, Tensor] | WorkingSet, view: View) -> Rendering:
    """Rows given by all their groups, or a working set."""
    if isinstance(values, WorkingSet):
        leaves, colors = values.leaves, values.colors.values
    else:
        leaves, colors = values, colors_of(values, view)
    device = leaves["means"].device
    return rasterize(
        leaves["means"],
        leaves["quats"],
        torch.exp(leaves["scales"]),
        torch.sigmoid(leaves["opacities"]).squeeze(-1),
        colors,
        torch.from_numpy(view.viewmat).float().to(device),
        torch.from_numpy(view.K).float().to(device),
        view.width,
        view.height,
        depth=False,
        absgrad=True,
        antialiased=False,
    )


def loss_of(rendering: Rendering, target: Tensor) -> Tensor:
    return ((rendering.rgb - target) ** 2).mean()


def train_dense(
    values: dict[str, Tensor], targets: list[Tensor], eps: float, steps: int = STEPS
) -> dict[str, Tensor]:
    leaves = {name: torch.nn.Parameter(v.clone()) for name, v in values.items()}
    optimizers, schedulers = make_optimizers({n: [p] for n, p in leaves.items()}, False, STEPS, eps)
    views = ring_of_views()
    for step in range(steps):
        i = (step * 5) % len(views)
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        loss_of(draw(leaves, views[i]), targets[i]).backward()
        for name in GROUPS:
            optimizers[name].step()
            schedulers[name].step()
    return {name: leaf.detach() for name, leaf in leaves.items()}


def train_rows(
    engine: Engine, targets: list[Tensor], eps: float, steps: int = STEPS, interrupt=None
) -> None:
    optimizers, schedulers = make_optimizers(engine.parameters(), True, STEPS, eps)
    views = ring_of_views()
    for step in range(steps):
        i = (step * 5) % len(views)
        if interrupt is not None:
            interrupt(step, views)
        working = engine.begin(views[i])
        loss_of(draw(working, views[i]), targets[i]).backward()
        for name in GROUPS:
            optimizers[name].step()
            schedulers[name].step()
    engine.settle()


def make_engine(values: dict[str, Tensor], layout: RowLayout, device: str) -> Engine:
    store = HostStore(layout, max_rows=200_000)
    store.append(values, stamp=0)
    return HostEngine(store, torch.device(device))


def scene(n: int, layout: RowLayout) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Gaussians, and images of others nearby: a scene that there is something to learn from.

    (Noise as the target would do for dense Adam, too, but amplifies float32 rounding: dense Adam
    started one part in 10^7 away would then end 10^-5 away from itself.)
    """
    truth = random_rows(n, layout)
    with torch.no_grad():
        targets = [draw(truth, view).rgb for view in ring_of_views()]
    generator = torch.Generator().manual_seed(9)
    start = {
        name: v + 0.05 * torch.randn(v.shape, generator=generator) for name, v in truth.items()
    }
    return start, targets


def test_two_hundred_steps_equal_dense_adam():
    """Learning-rate schedules on, a third of the rows visible at a time."""
    layout = RowLayout(1)
    values, targets = scene(300, layout)
    dense = train_dense(values, targets, 1e-15)
    engine = make_engine(values, layout, "cpu")
    shares = [len(engine.fetch(view)) / 300 for view in ring_of_views()]
    assert 0.05 < np.mean(shares) < 0.6
    train_rows(engine, targets, 1e-15)
    errors = largest_errors(engine.store, dense)
    moved = {name: float((dense[name] - values[name]).abs().max()) for name in GROUPS}
    assert min(moved.values()) > 1e-3, moved
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.gpu
def test_working_sets_of_any_size_reach_the_device():
    """Larger than a chunk of page-locked memory, growing and shrinking: what arrives is whole."""
    layout = RowLayout(3)
    values = random_rows(200_000, layout)
    engine = make_engine(values, layout, "cuda")
    far = ring_of_views()[0]
    for distance in (0.1, 3.0, 40.0, 0.1, 40.0):
        viewmat = np.eye(4)
        viewmat[2, 3] = distance
        view = View(viewmat, far.K, far.width, far.height)
        working = engine.fetch(view)
        seen = {name: v[working.ids.long()] for name, v in values.items()}
        for name, leaf in working.leaves.items():
            assert torch.equal(leaf.cpu(), seen[name])
        colors = colors_of(seen, view)
        torch.testing.assert_close(working.colors.values.cpu(), colors, rtol=1e-5, atol=1e-5)
    assert len(working) > 100_000


def test_renders_in_between_do_not_disturb():
    layout = RowLayout(1)
    values, targets = scene(150, layout)
    plain, watched = (make_engine(values, layout, "cpu") for _ in range(2))
    train_rows(plain, targets, 1e-15, steps=40)

    def render(step: int, views: list[View]) -> None:
        if step % 3 == 0:
            with torch.no_grad():
                draw(watched.fetch(views[step % len(views)]), views[step % len(views)])

    train_rows(watched, targets, 1e-15, 40, render)
    for name in GROUPS:
        assert torch.equal(plain.store.column(name), watched.store.column(name))


def test_blocks_follow_the_rows_that_were_stepped():
    layout = RowLayout(1)
    values, targets = scene(600, layout)
    engine = make_engine(values, layout, "cpu")
    before = engine.store.blocks[:3].clone()
    train_rows(engine, targets, 1e-15, steps=3)
    blocks = engine.store.blocks[:3].clone()
    assert not torch.equal(blocks, before)
    engine.culler.refresh(600)
    assert torch.equal(engine.store.blocks[:3], blocks)


@pytest.mark.parametrize("device", DEVICES)
def test_drawing_the_working_set_is_drawing_everything(device):
    layout = RowLayout(1)
    values = random_rows(3000, layout)
    engine = make_engine(values, layout, device)
    everything = {name: v.to(device) for name, v in values.items()}
    for view in ring_of_views():
        working = engine.fetch(view)
        assert 0 < len(working) < 3000
        part, whole = draw(working, view), draw(everything, view)
        assert int((part.radii > 0).sum()) == int((whole.radii > 0).sum())
        torch.testing.assert_close(part.rgb, whole.rgb, rtol=0, atol=1e-6)
        torch.testing.assert_close(part.alpha, whole.alpha, rtol=0, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_a_view_that_sees_nothing_trains(device):
    layout = RowLayout(1)
    values = random_rows(50, layout)
    values["means"][:, 2] = -abs(values["means"][:, 2]) - 5
    engine = make_engine(values, layout, device)
    optimizers, _ = make_optimizers(engine.parameters(), True, STEPS)
    working = engine.begin(ring_of_views()[0])
    assert len(working) == 0
    loss_of(draw(working, ring_of_views()[0]), torch.rand(3).to(device)).backward()
    for optimizer in optimizers.values():
        optimizer.step()
    assert engine.step_count == 1
    engine.settle()
    assert torch.equal(engine.store.column("means"), values["means"])


def test_a_missing_optimizer_step_is_noticed():
    layout = RowLayout(1)
    engine = make_engine(random_rows(50, layout), layout, "cpu")
    optimizers, _ = make_optimizers(engine.parameters(), True, STEPS)
    view = ring_of_views()[0]
    working = engine.begin(view)
    loss_of(draw(working, view), torch.rand(3)).backward()
    optimizers["means"].step()
    with pytest.raises(RuntimeError, match="were not stepped"):
        engine.begin(view)


def test_a_rising_learning_rate_keeps_the_culler_conservative(monkeypatch):
    """A warm-up outgrows the bound that the spheres were computed with."""
    layout = RowLayout(1)
    values, targets = scene(150, layout)
    engine = make_engine(values, layout, "cpu")
    optimizers, _ = make_optimizers(engine.parameters(), True, STEPS)
    refreshed = []
    refresh = engine.refresh_bounds
    monkeypatch.setattr(engine, "refresh_bounds", lambda: refreshed.append(1) or refresh())
    views = ring_of_views()
    for step in range(15):
        view = views[(step * 5) % len(views)]
        for name in ("means", "scales"):
            optimizers[name].param_groups[0]["lr"] = LR[name] * 1.5 ** min(step, 12)
        working = engine.begin(view)
        loss_of(draw(working, view), targets[(step * 5) % len(views)]).backward()
        for name in GROUPS:
            optimizers[name].step()
        everything = settled_copy(engine)
        for other in views:
            whole = draw(everything, other)
            part = draw(engine.fetch(other), other)
            assert int((part.radii > 0).sum()) == int((whole.radii > 0).sum())
    # 1.5^12 is 130: eight doublings, not one refresh of all rows at every step.
    assert 0 < len(refreshed) <= 8


def settled_copy(engine: Engine) -> dict[str, Tensor]:
    """All rows, settled; in the store only the last step is completed."""
    from gsscale_nerfstudio import _C

    engine._finish_step()
    n, layout = len(engine.store), engine.store.layout
    out = np.empty((n, layout.width), dtype=np.float32)
    ids = np.arange(n, dtype=np.int32)
    _C.gather_settled(engine.store.kernel_rows, engine.history.tables, ids, out)
    rows = torch.from_numpy(out)
    return {
        name: rows[:, columns].unflatten(1, layout.shapes[name]).contiguous()
        for name, columns in layout.columns.items()
    }
