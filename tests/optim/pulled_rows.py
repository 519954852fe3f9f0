"""Rows that penalties pull at. As a script it checks them and prints the instruction set in use."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gsscale_nerfstudio import _C
from gsscale_nerfstudio.optim import AdamHistory, MeanNoise, Pull
from gsscale_nerfstudio.store import GROUPS, HostStore, RowLayout

LAYOUT = RowLayout(0)
PULL = Pull(opacity=0.01, scale=0.01, horizon=101)
LR = {"means": 1e-4, "scales": 5e-3, "quats": 1e-3, "opacities": 5e-2}
LR = {name: LR.get(name, 2.5e-3) for name in GROUPS}
LRS = np.array([LR[name] for name in GROUPS])


def pulled_store(n: int) -> HostStore:
    """Rows of many sizes and opacities, without moments."""
    store = HostStore(LAYOUT, max_rows=n)
    generator = torch.Generator().manual_seed(1)
    values = {name: torch.zeros(n, *shape) for name, shape in LAYOUT.shapes.items()}
    values["scales"] = torch.empty(n, 3).uniform_(-6, -1, generator=generator)
    values["quats"][:] = torch.tensor([0.9, -0.3, 0.2, 0.4])
    values["opacities"] = torch.empty(n, 1).uniform_(-4, 3, generator=generator)
    store.append(values, stamp=0)
    return store


def history_of(pull: Pull | None, n: int, noise: MeanNoise | None = None) -> AdamHistory:
    eps = dict.fromkeys(GROUPS, 1e-15)
    return AdamHistory(LAYOUT, LR, eps, noise=noise, pull=pull, count=lambda: n)


def gradient_of_penalties(elements: Tensor, n: int) -> Tensor:
    """Of :class:`.Pull`'s terms by log-scales and opacity logits [m, 4], among ``n`` rows."""
    o = torch.sigmoid(elements[:, 3:])
    scales = PULL.scale * torch.exp(elements[:, :3]) / (3 * n)
    return torch.cat([scales, PULL.opacity * o * (1 - o) / n], 1)


def gathered(store: HostStore, history: AdamHistory) -> Tensor:
    rows = torch.empty(len(store), LAYOUT.width)
    ids = np.arange(len(store), dtype=np.int32)
    _C.gather_settled(store.kernel_rows, history.tables, ids, rows.numpy())
    return rows


def check_everyone_agrees(n: int = 3000) -> None:
    """Gather, settle and step see the same rows, with noise on top, too."""
    torch.manual_seed(0)
    for noise in (None, MeanNoise(rate=5e3, horizon=101)):
        store, history = pulled_store(n), history_of(PULL, n, noise)
        store.exp_avg[:n, : LAYOUT.optimized] = 1e-7 * torch.randn(n, LAYOUT.optimized)
        store.exp_avg_sq[:n, : LAYOUT.optimized] = 1e-12 * torch.rand(n, LAYOUT.optimized)
        for _ in range(300):
            history.advance(LRS)
        store.bookkeeping("stamp")[:] = torch.arange(n) % 301
        arrays = (store.params, store.exp_avg, store.exp_avg_sq)
        before = [array[:n].clone() for array in arrays]
        seen = gathered(store, history)
        moved = (seen - before[0])[store.bookkeeping("stamp") < 300]
        assert moved[:, LAYOUT.columns["opacities"]].abs().min() > 0
        optimized = slice(0, LAYOUT.optimized)

        _C.settle_range(store.kernel_rows, history.tables, 0, n)
        assert torch.equal(store.params[:n, optimized], seen[:, optimized])
        settled = [array[:n].clone() for array in arrays]
        for array, values in zip(arrays, before, strict=True):
            array[:n] = values
        # Learning rates of 0: what is left of the step is that rows are settled.
        _C.settle_and_step(
            store.kernel_rows,
            history.tables,
            np.arange(n, dtype=np.int32),
            np.zeros((n, LAYOUT.width), np.float32),
            np.zeros(LAYOUT.width, np.float32),
        )
        assert torch.equal(store.params[:n, optimized], seen[:, optimized])
        torch.testing.assert_close(store.exp_avg[:n], 0.9 * settled[1], rtol=1e-5, atol=1e-20)
        torch.testing.assert_close(store.exp_avg_sq[:n], 0.999 * settled[2], rtol=1e-5, atol=1e-30)


if __name__ == "__main__":
    check_everyone_agrees()
    print(_C.isa())
