"""Engines driven with given gradients, beside dense Adam on plain tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from nerfstudio.engine.schedulers import ExponentialDecaySchedulerConfig
from torch import Tensor

from gsscale_nerfstudio.cull import View
from gsscale_nerfstudio.engines import Engine, HostEngine, ResidentEngine
from gsscale_nerfstudio.engines.working_set import LEAVES, WorkingSet
from gsscale_nerfstudio.optim import DeferredAdamConfig
from gsscale_nerfstudio.rasterize.spherical_harmonics import sh_colors
from gsscale_nerfstudio.store import GROUPS, HostStore, RowLayout

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZE = (64, 48)
LR = {
    "means": 1.6e-4,
    "scales": 0.005,
    "quats": 0.001,
    "opacities": 0.05,
    "features_dc": 0.0025,
    "features_rest": 0.0025 / 20,
}


class FixedBudget:
    """A budget that always allows the same number of cached rows."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def cache_rows(self, *_: object) -> int:
        return self.rows


def ring_of_views(count: int = 12) -> list[View]:
    """Cameras inside of the cloud, looking outwards: each sees a part of it."""
    views = []
    for i in range(count):
        angle = 2 * math.pi * i / count
        c, s = math.cos(angle), math.sin(angle)
        viewmat = np.eye(4)
        viewmat[:3, :3] = [[c, 0, -s], [0, 1, 0], [s, 0, c]]
        viewmat[:3, 3] = [0, 0, 0.3]
        K = np.array([[60.0, 0, SIZE[0] / 2], [0, 60.0, SIZE[1] / 2], [0, 0, 1]])
        views.append(View(viewmat, K, *SIZE))
    return views


def random_rows(n: int, layout: RowLayout) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    values = {
        name: 0.3 * torch.randn(n, *shape, generator=generator)
        for name, shape in layout.shapes.items()
    }
    values["means"] = 4 * (torch.rand(n, 3, generator=generator) - 0.5)
    values["scales"] = torch.log(0.02 + 0.1 * torch.rand(n, 3, generator=generator))
    return values


def make_engine(
    values: dict[str, Tensor], layout: RowLayout, device: str, cache_rows: int | None
) -> Engine:
    """A host engine, or a resident one with room for ``cache_rows`` rows."""
    store = HostStore(layout, max_rows=200_000)
    store.append(values, stamp=0)
    store.sort()
    if cache_rows is None:
        return HostEngine(store, torch.device(device))
    return ResidentEngine(store, torch.device(device), FixedBudget(cache_rows))


def make_optimizers(
    parameters: dict[str, list], deferred: bool, steps: int, eps: float = 1e-15
) -> tuple[dict, dict]:
    optimizers, schedulers = {}, {}
    for name in GROUPS:
        if deferred:
            optimizers[name] = DeferredAdamConfig(lr=LR[name], eps=eps).setup(parameters[name])
        else:
            optimizers[name] = torch.optim.Adam(parameters[name], lr=LR[name], eps=eps)
        final = LR[name] / 100 if name in ("means", "opacities") else LR[name]
        config = ExponentialDecaySchedulerConfig(lr_final=final, max_steps=steps)
        schedulers[name] = config.setup().get_scheduler(optimizers[name], lr_init=LR[name])
    return optimizers, schedulers


def gradient(leaf: Tensor, step: int) -> Tensor:
    """A gradient that depends on the values, so that what was wrong once stays wrong."""
    return 0.01 * torch.sin(3 * leaf + 0.1 * step)


def gradient_of_colors(colors: Tensor, step: int) -> Tensor:
    """Small where a colour is almost 0: rounding decides there whether it is clamped."""
    return gradient(colors, step) * colors


def colors_of(values: dict[str, Tensor], view: View, degree: int | None = None) -> Tensor:
    """The colours of given rows; differentiable. With all bands unless a degree is given."""
    dc, rest = values["features_dc"], values["features_rest"]
    every = math.isqrt(1 + rest.shape[1]) - 1
    if every == 0:
        return dc
    coefficients = torch.cat([dc[:, None], rest], dim=1)
    directions = values["means"] - view.on(dc.device).camera_position
    return sh_colors(coefficients, directions, every if degree is None else degree)


class Seen(NamedTuple):
    """The rows that had a gradient at a step, and the view that saw them."""

    ids: Tensor
    view: View


def in_view(means: Tensor, view: View) -> Tensor:
    """[n] bool: centre inside of the image; only such rows get a gradient, as in rendering."""
    viewmat, K = (torch.from_numpy(m).double() for m in (view.viewmat, view.K))
    points = (means.double().cpu() @ viewmat[:3, :3].T + viewmat[:3, 3]) @ K.T
    pixels = points[:, :2] / points[:, 2:]
    inside = (pixels > 0).all(1) & (pixels[:, 0] < view.width) & (pixels[:, 1] < view.height)
    return inside & (points[:, 2] > view.near)


def around(step: int) -> View:
    """Another part of the ring at each step."""
    views = ring_of_views()
    return views[step * 5 % len(views)]


def give_gradients(working: WorkingSet, drawn: Tensor, step: int) -> None:
    """What rendering and backward leave behind; only rows that are ``drawn`` [n] have a share."""
    means = working.leaves["means"].detach()
    times = drawn.to(means)
    colors = working.colors.values
    colors.backward(gradient_of_colors(colors.detach(), step) * times[:, None])
    for leaf in working.leaves.values():
        grad = gradient(leaf.detach(), step) * times[:, None]
        leaf.grad = grad if leaf.grad is None else leaf.grad + grad
    norms = torch.sin(15 * means[:, 0]).abs() * times
    working.statistics = lambda: (norms, times, 0.01 * norms)


def drive(
    engine: Engine,
    steps: int,
    announce: Callable[[int], bool] = lambda step: True,
    before_step: Callable[[int], None] = lambda step: None,
    in_step: Callable[[int, dict], None] = lambda step, optimizers: None,
    after_step: Callable[[int], None] = lambda step: None,
    view_at: Callable[[int], View] = around,
) -> list[Seen]:
    """Train with :func:`gradient`; returns which rows had one at each step."""
    optimizers, schedulers = make_optimizers(engine.parameters(), True, steps)
    seen = []
    for step in range(steps):
        before_step(step)
        view = view_at(step)
        working = engine.begin(view)
        drawn = in_view(working.leaves["means"].detach(), view)
        seen.append(Seen(working.ids[drawn].clone(), view))
        if announce(step):
            engine.announce([view_at(step + k) for k in range(1, 9)])
        in_step(step, optimizers)
        give_gradients(working, drawn, step)
        for name in GROUPS:
            optimizers[name].step()
            schedulers[name].step()
        after_step(step)
    return seen


def dense(
    values: dict[str, Tensor],
    seen: list[Seen],
    steps: int,
    in_step: Callable[[int, dict], None] = lambda step, optimizers: None,
) -> dict[str, Tensor]:
    """What dense Adam makes of the same gradients, which rows outside of a view do not get."""
    leaves = {name: torch.nn.Parameter(v.clone()) for name, v in values.items()}
    optimizers, schedulers = make_optimizers({n: [p] for n, p in leaves.items()}, False, steps)
    for step, (ids, view) in enumerate(seen):
        in_step(step, optimizers)
        for leaf in leaves.values():
            leaf.grad = torch.zeros_like(leaf)
        colors = colors_of({name: leaf[ids.long()] for name, leaf in leaves.items()}, view)
        colors.backward(gradient_of_colors(colors.detach(), step))
        for name in LEAVES:
            leaf = leaves[name]
            leaf.grad[ids.long()] += gradient(leaf.detach()[ids.long()], step)
        for name in GROUPS:
            optimizers[name].step()
            schedulers[name].step()
    return {name: leaf.detach() for name, leaf in leaves.items()}


def copies(store: HostStore) -> dict[str, Tensor]:
    return {name: store.column_copy(name) for name in GROUPS}


def largest_errors(store: HostStore, expected: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: float((store.column(name) - expected[name]).abs().max() / expected[name].abs().max())
        for name in GROUPS
        if expected[name].numel()
    }


def unordered_error(store: HostStore, other: HostStore) -> float:
    """Largest distance of a row to the nearest of the other store, both ways.

    Rounding may exchange two neighbours in Morton order: a duplicate and its source, say.
    """
    tables = [
        torch.cat([s.column(name).flatten(1) for name in GROUPS], dim=1) for s in (store, other)
    ]
    differences = (tables[0][:, None] - tables[1][None]).abs() / tables[0].abs().amax(dim=0)
    distances = differences.amax(dim=-1)
    return float(torch.maximum(distances.amin(dim=0).max(), distances.amin(dim=1).max()))
