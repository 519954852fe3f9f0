"""The row kernels beside torch.optim.Adam; as a script, with the instruction set in use."""

from __future__ import annotations

import numpy as np
import torch

from gsscale_nerfstudio import _C
from gsscale_nerfstudio.optim.history import AdamHistory
from gsscale_nerfstudio.store import GROUPS, HostStore, RowLayout


def run_against_dense_adam(degree: int, steps: int = 200, n: int = 600) -> float:
    """Largest error of the deferred rows, relative to each group's largest value."""
    layout = RowLayout(degree)
    rng = torch.Generator().manual_seed(degree)
    store = HostStore(layout, max_rows=n)
    store.resize(n)
    used = layout.optimized
    store.params[:, :used] = torch.randn(n, used, generator=rng)
    dense = {name: torch.nn.Parameter(store.column(name).flatten(1).clone()) for name in GROUPS}
    lr = {name: 10.0 ** -(1 + i % 3) for i, name in enumerate(GROUPS)}
    adams = {name: torch.optim.Adam([dense[name]], lr=lr[name], eps=1e-15) for name in GROUPS}
    history = AdamHistory(layout, lr, dict.fromkeys(GROUPS, 1e-15))
    for step in range(steps):
        factor = 0.1 ** (step / steps)
        # A tenth of the rows, and now and then none at all.
        seen = torch.rand(n, generator=rng) < (0.1 if step % 17 else 0.0)
        ids = torch.nonzero(seen).flatten().int()
        grads = torch.zeros(len(ids), layout.width)
        grads[:, :used] = torch.randn(len(ids), used, generator=rng) * 0.01
        lrs = np.array([factor * lr[name] for name in GROUPS])
        for name, columns in layout.columns.items():
            dense[name].grad = torch.zeros_like(dense[name])
            dense[name].grad[ids.long()] = grads[:, columns]
            adams[name].param_groups[0]["lr"] = factor * lr[name]
            adams[name].step()
        per_column = np.append(lrs, 0.0)[layout.group_of_column].astype(np.float32)
        _C.settle_and_step(
            store.kernel_rows, history.tables, ids.numpy(), grads.numpy(), per_column
        )
        history.advance(lrs)
    _C.settle_range(store.kernel_rows, history.tables, 0, n)
    worst = 0.0
    for name in GROUPS:
        if dense[name].numel():
            error = (store.column(name).flatten(1) - dense[name]).abs().max()
            worst = max(worst, float(error / dense[name].abs().max()))
    return worst


if __name__ == "__main__":
    print(_C.isa(), run_against_dense_adam(3))
