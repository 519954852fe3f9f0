"""settle_and_step against torch.optim.Adam."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gsscale_nerfstudio import _C
from gsscale_nerfstudio.optim.history import AdamHistory
from gsscale_nerfstudio.store import GROUPS, HostStore, RowLayout
from tests.isa import run_with_isa
from tests.optim import dense_adam
from tests.optim.dense_adam import run_against_dense_adam


@pytest.mark.parametrize("degree", [0, 1, 2, 3, 4])
def test_equals_dense_adam(degree):
    assert run_against_dense_adam(degree) < 1e-5


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set_equals_dense_adam(isa):
    """The choice is made once per process, so the narrower kernels run in a new one."""
    used, error = run_with_isa([dense_adam.__file__], isa)
    assert used in ("baseline", isa)
    assert float(error) < 1e-5


def test_statistics_add_up_and_do_not_disturb_the_moments():
    layout = RowLayout(1)
    store = HostStore(layout, max_rows=3)
    store.resize(3)
    history = AdamHistory(layout, dict.fromkeys(GROUPS, 0.1), dict.fromkeys(GROUPS, 1e-15))
    columns = layout.bookkeeping
    ids = np.array([0, 2], dtype=np.int32)
    for radius in (0.5, 0.25):
        grads = np.zeros((2, layout.width), dtype=np.float32)
        grads[:, columns["grad2d"]] = [1.5, 2.0]
        grads[:, columns["count"]] = 1
        grads[:, columns["max_radius"]] = radius
        _C.settle_and_step(
            store.kernel_rows, history.tables, ids, grads, np.zeros(layout.width, np.float32)
        )
        history.advance(np.zeros(len(GROUPS)))
    assert store.bookkeeping("grad2d").tolist() == [3.0, 0.0, 4.0]
    assert store.bookkeeping("count").tolist() == [2.0, 0.0, 2.0]
    assert store.bookkeeping("max_radius").tolist() == [0.5, 0.0, 0.5]
    assert store.bookkeeping("stamp").tolist() == [2.0, 0.0, 2.0]
    assert not store.exp_avg[:3].any() and not store.exp_avg_sq[:3].any()


@pytest.mark.parametrize("ids", [[-1], [3]])
def test_ids_outside_of_the_store_are_refused(ids):
    layout = RowLayout(0)
    store = HostStore(layout, max_rows=3)
    history = AdamHistory(layout, dict.fromkeys(GROUPS, 0.1), dict.fromkeys(GROUPS, 1e-15))
    out = np.zeros((1, layout.width), dtype=np.float32)
    with pytest.raises(ValueError, match="outside"):
        _C.gather_settled(store.kernel_rows, history.tables, np.array(ids, np.int32), out)


def test_moments_that_decay_to_denormals_become_zero():
    layout = RowLayout(0)
    store = HostStore(layout, max_rows=1)
    store.resize(1)
    store.exp_avg[0, 0], store.exp_avg_sq[0, 0] = 1e-37, 1e-36
    history = AdamHistory(layout, dict.fromkeys(GROUPS, 0.1), dict.fromkeys(GROUPS, 1e-15))
    for _ in range(5000):
        history.advance(np.zeros(len(GROUPS)))
    _C.settle_range(store.kernel_rows, history.tables, 0, 1)
    assert store.exp_avg[0, 0] == 0 and store.exp_avg_sq[0, 0] == 0


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_broken_row_stays_visible_to_the_culler(axis):
    """NaN in any scale must reach the sphere, which the culler then keeps."""
    layout = RowLayout(0)
    store = HostStore(layout, max_rows=1)
    store.resize(1)
    store.column("scales")[0, axis] = float("nan")
    history = AdamHistory(layout, dict.fromkeys(GROUPS, 0.1), dict.fromkeys(GROUPS, 1e-15))
    _C.refresh_spheres(store.kernel_rows, history.tables, 0, 1)
    assert store.spheres[0, 3].isnan()


def test_spheres_enclose_wherever_skipped_steps_lead():
    """Rows left alone for up to 2000 steps stay inside of the sphere of their last step."""
    layout = RowLayout(0)
    n = 500
    store = HostStore(layout, max_rows=n)
    store.resize(n)
    used = layout.optimized
    store.params[:, :used] = torch.randn(n, used)
    lr = dict.fromkeys(GROUPS, 0.02)
    history = AdamHistory(layout, lr, dict.fromkeys(GROUPS, 1e-15))
    ids = np.arange(n, dtype=np.int32)
    per_column = np.append([0.02] * len(GROUPS), 0)[layout.group_of_column].astype(np.float32)
    for _ in range(30):
        grads = torch.zeros(n, layout.width)
        grads[:, :used] = torch.randn(n, used)
        _C.settle_and_step(store.kernel_rows, history.tables, ids, grads.numpy(), per_column)
        history.advance(np.full(len(GROUPS), 0.02))
    spheres = store.spheres[:n].clone()
    moved = 0.0
    for step in range(2000):
        history.advance(np.full(len(GROUPS), 0.02))
        if step % 199 == 0:
            rows = np.empty((n, layout.width), dtype=np.float32)
            _C.gather_settled(store.kernel_rows, history.tables, ids, rows)
            means = torch.from_numpy(rows[:, layout.columns["means"]])
            sigma = torch.from_numpy(rows[:, layout.columns["scales"]]).amax(dim=1).exp()
            motion = (means - spheres[:, :3]).norm(dim=1)
            moved = max(moved, float(motion.max()))
            assert (motion + 3.33 * sigma <= spheres[:, 3]).all()
    assert moved > 0.02
