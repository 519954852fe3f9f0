"""Rows in page-locked memory, read by a kernel on the GPU."""

from __future__ import annotations

import pytest
import torch

from gsscale_nerfstudio.engines import HostEngine
from gsscale_nerfstudio.optim import DeferredAdamConfig
from gsscale_nerfstudio.store import GROUPS, HostStore, RowLayout

pytestmark = pytest.mark.gpu


def copy_rows_on_gpu(rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows of page-locked host memory, fetched by a kernel that runs on the GPU."""
    import triton
    import triton.language as tl

    @triton.jit
    def copy(source, ids, target, WIDTH: tl.constexpr):
        row = tl.load(ids + tl.program_id(0)).to(tl.int64)
        columns = tl.arange(0, WIDTH)
        values = tl.load(source + row * WIDTH + columns)
        tl.store(target + tl.program_id(0) * WIDTH + columns, values)

    target = torch.empty(len(ids), rows.shape[1], device="cuda")
    copy[(len(ids),)](rows, ids.cuda(), target, WIDTH=rows.shape[1])
    return target.cpu()


def test_rows_are_locked_as_they_come_and_read_across_chunks():
    layout = RowLayout(3)
    store = HostStore(layout)
    store.resize(1000)
    engine = HostEngine(store, torch.device("cuda"))
    for name in GROUPS:
        DeferredAdamConfig(lr=0.1, eps=1e-15).setup(engine.parameters()[name])
    locked = [array.pinned_rows for array in store._arrays]
    assert min(locked) >= 1000
    assert max(locked) < 200_000  # not far ahead of their use
    store.resize(200_000)  # 51 MB: three chunks
    assert min(array.pinned_rows for array in store._arrays) >= 200_000
    for array in (store.params, store.exp_avg, store.exp_avg_sq):
        array[:200_000] = torch.randn(200_000, layout.width)
        ids = torch.cat([torch.arange(0, 200_000, 997), torch.tensor([65_535, 65_536, 199_999])])
        assert torch.equal(copy_rows_on_gpu(array, ids), array[ids])
