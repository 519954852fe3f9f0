"""Row kernels on part of a view, and what they forward."""

from __future__ import annotations

import numpy as np
import pytest

from gsscale_nerfstudio import _C
from gsscale_nerfstudio.optim.history import AdamHistory
from gsscale_nerfstudio.store import GROUPS, HostStore, RowLayout

N, STEPS = 3000, 400


class Scene:
    """Rows in the middle of a training: stamps of 0 .. STEPS, also beyond the horizon."""

    def __init__(self, degree: int, spheres: bool = True) -> None:
        layout = self.layout = RowLayout(degree)
        rng = np.random.default_rng(degree)
        self.store = store = HostStore(layout, max_rows=N)
        store.resize(N)
        used = layout.optimized
        store.params.numpy()[:N, :used] = rng.normal(size=(N, used))
        store.exp_avg.numpy()[:N, :used] = rng.normal(size=(N, used))
        store.exp_avg_sq.numpy()[:N, :used] = rng.random((N, used))
        store.bookkeeping("stamp").numpy()[:] = rng.integers(0, STEPS + 1, N)
        self.history = AdamHistory(layout, dict.fromkeys(GROUPS, 0.1), dict.fromkeys(GROUPS, 1e-15))
        for _ in range(STEPS):
            self.history.advance(np.linspace(0.01, 0.1, len(GROUPS)))
        self.ids = np.sort(rng.choice(N, N // 2, replace=False)).astype(np.int32)
        self.grads = rng.normal(size=(len(self.ids), layout.width)).astype(np.float32)
        picked = rng.random(len(self.ids)) < 0.4
        self.pick, self.others = (np.flatnonzero(p).astype(np.int32) for p in (picked, ~picked))
        self.lr = np.full(layout.width, 0.05, np.float32) * (np.arange(layout.width) < used)

    def gather(self, pick: np.ndarray | None = None) -> np.ndarray:
        n = len(self.ids) if pick is None else len(pick)
        out = np.full((n + 1, self.layout.width), np.nan, dtype=np.float32)
        _C.gather_settled(self.store.kernel_rows, self.history.tables, self.ids, out, pick)
        assert np.isnan(out[n]).all()
        return out[:n]

    def step(self, pick: np.ndarray | None = None, forward: np.ndarray | None = None) -> None:
        _C.settle_and_step(
            self.store.kernel_rows,
            self.history.tables,
            self.ids,
            self.grads,
            self.lr,
            pick=pick,
            forward=forward,
        )

    def arrays(self) -> list[np.ndarray]:
        store = self.store
        arrays = (store.params, store.exp_avg, store.exp_avg_sq, store.spheres)
        return [array.numpy()[:N].copy() for array in arrays]


@pytest.mark.parametrize("degree", [0, 3])
def test_gathering_a_pick_is_gathering_all_and_picking(degree):
    scene = Scene(degree)
    before, everything = scene.arrays(), scene.gather()
    np.testing.assert_array_equal(scene.gather(scene.pick), everything[scene.pick])
    for array, old in zip(scene.arrays(), before, strict=True):
        np.testing.assert_array_equal(array, old)


@pytest.mark.parametrize("degree", [0, 3])
def test_two_picks_equal_one_step(degree):
    whole, parts = Scene(degree), Scene(degree)
    whole.step()
    parts.step(parts.pick)
    # Only the rows of the pick have moved.
    stamps = parts.store.bookkeeping("stamp").numpy()
    picked = parts.ids[parts.pick]
    assert (stamps[picked] == STEPS + 1).all()
    assert (np.delete(stamps, picked) <= STEPS).all()
    parts.step(parts.others)
    for array, expected in zip(parts.arrays(), whole.arrays(), strict=True):
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("degree", [0, 3])
def test_stepped_rows_are_forwarded(degree):
    plain, scene = Scene(degree), Scene(degree)
    plain.step()
    forward = np.full((len(scene.pick) + 1, scene.layout.width), np.nan, dtype=np.float32)
    scene.step(scene.pick, forward)
    params = scene.store.params.numpy()
    np.testing.assert_array_equal(forward[:-1], params[scene.ids[scene.pick]])
    assert np.isnan(forward[-1]).all()
    scene.step(scene.others)
    for array, expected in zip(scene.arrays(), plain.arrays(), strict=True):
        np.testing.assert_array_equal(array, expected)

    again = Scene(degree)
    forward = np.full((len(again.ids), again.layout.width), np.nan, dtype=np.float32)
    again.step(forward=forward)
    np.testing.assert_array_equal(forward, again.store.params.numpy()[again.ids])
    np.testing.assert_array_equal(again.store.params, plain.store.params)


def test_an_empty_pick_does_nothing():
    scene = Scene(0)
    before, none = scene.arrays(), scene.pick[:0]
    assert scene.gather(none).shape == (0, scene.layout.width)
    scene.step(none, np.empty((0, scene.layout.width), dtype=np.float32))
    for array, old in zip(scene.arrays(), before, strict=True):
        np.testing.assert_array_equal(array, old)


@pytest.mark.parametrize(
    "pick, message",
    [([-1, 3], "outside"), ([0, N // 2], "outside"), ([4, 4], "ascend"), ([1, 5, 2], "ascend")],
)
def test_bad_picks_are_refused(pick, message):
    scene = Scene(0)
    pick, before = np.array(pick, dtype=np.int32), scene.arrays()
    with pytest.raises(ValueError, match=message):
        scene.gather(pick)
    with pytest.raises(ValueError, match=message):
        scene.step(pick)
    for array, old in zip(scene.arrays(), before, strict=True):
        np.testing.assert_array_equal(array, old)


def test_bad_buffers_and_picked_ids_are_refused():
    scene = Scene(0)
    n, width = len(scene.pick), scene.layout.width
    for shape in ((n - 1, width), (n, width - 16)):
        with pytest.raises(ValueError, match="forward"):
            scene.step(scene.pick, np.empty(shape, dtype=np.float32))
        with pytest.raises(ValueError, match="out must"):
            _C.gather_settled(
                scene.store.kernel_rows,
                scene.history.tables,
                scene.ids,
                np.empty(shape, dtype=np.float32),
                scene.pick,
            )
    with pytest.raises(TypeError):
        scene.step(scene.pick.astype(np.int64))
    for bad in (-1, N):
        scene.ids[scene.pick[7]] = bad
        with pytest.raises(ValueError, match="store"):
            scene.step(scene.pick)
        with pytest.raises(ValueError, match="store"):
            scene.gather(scene.pick)
