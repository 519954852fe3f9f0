"""Rows that noise moves. As a script it checks them and prints the instruction set in use."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gsscale_nerfstudio import _C
from gsscale_nerfstudio.optim import AdamHistory, MeanNoise
from gsscale_nerfstudio.store import GROUPS, HostStore, RowLayout

LAYOUT = RowLayout(0)
NOISE = MeanNoise(rate=5e3, horizon=100)
SCALES = (0.05, 0.02, 0.08)
QUAT = (0.9, -0.3, 0.2, 0.4)
FAINT = -5.0  # opacity 0.0067


def store_of(n: int, logit: float = FAINT) -> HostStore:
    """Rows that differ in nothing but their keys."""
    store = HostStore(LAYOUT, max_rows=n)
    values = {name: torch.zeros(n, *shape) for name, shape in LAYOUT.shapes.items()}
    values["scales"][:] = torch.tensor(SCALES).log()
    values["quats"][:] = torch.tensor(QUAT)
    values["opacities"][:] = logit
    store.append(values, stamp=0)
    return store


def history_of(noise: MeanNoise | None, lr: float = 1e-3) -> AdamHistory:
    return AdamHistory(LAYOUT, dict.fromkeys(GROUPS, lr), dict.fromkeys(GROUPS, 1e-15), noise=noise)


def lr_at(step: int) -> np.ndarray:
    return np.full(len(GROUPS), 1e-3 * 0.98**step)


def per_column(lrs: np.ndarray) -> np.ndarray:
    return np.append(lrs, 0.0)[LAYOUT.group_of_column].astype(np.float32)


def gathered(store: HostStore, history: AdamHistory) -> Tensor:
    rows = torch.empty(len(store), LAYOUT.width)
    ids = np.arange(len(store), dtype=np.int32)
    _C.gather_settled(store.kernel_rows, history.tables, ids, rows.numpy())
    return rows


def stepped(store: HostStore, history: AdamHistory, ids: np.ndarray, lrs: np.ndarray) -> None:
    """A step of the rows ``ids`` without gradients."""
    grads = np.zeros((len(ids), LAYOUT.width), np.float32)
    _C.settle_and_step(store.kernel_rows, history.tables, ids, grads, per_column(lrs))
    history.advance(lrs)


def check_draws_agree(n: int = 3000) -> None:
    """Gather, settle and step see the same draw."""
    torch.manual_seed(0)
    store, history = store_of(n), history_of(NOISE)
    store.exp_avg[:n, : LAYOUT.optimized] = 0.01 * torch.randn(n, LAYOUT.optimized)
    store.exp_avg_sq[:n, : LAYOUT.optimized] = torch.rand(n, LAYOUT.optimized)
    for step in range(300):
        if step % 40 == 0:
            stepped(store, history, np.arange(step, n, 17, dtype=np.int32), lr_at(step))
        else:
            history.advance(lr_at(step))
    before = store.params[:n].clone(), store.exp_avg[:n].clone(), store.exp_avg_sq[:n].clone()
    seen = gathered(store, history)
    assert torch.equal(seen, gathered(store, history))
    moved = (seen - before[0])[:, LAYOUT.columns["means"]]
    assert moved.abs().amax(dim=1).min() > 0
    mean = seen[:, LAYOUT.columns["means"]]

    _C.settle_range(store.kernel_rows, history.tables, 0, n)
    assert torch.equal(store.column("means"), mean)
    for array, values in zip((store.params, store.exp_avg, store.exp_avg_sq), before, strict=True):
        array[:n] = values
    # Learning rates of 0: what is left of the step is that rows are settled.
    _C.settle_and_step(
        store.kernel_rows,
        history.tables,
        np.arange(n, dtype=np.int32),
        np.zeros((n, LAYOUT.width), np.float32),
        np.zeros(LAYOUT.width, np.float32),
    )
    assert torch.equal(store.column("means"), mean)


if __name__ == "__main__":
    check_draws_agree()
    print(_C.isa())
