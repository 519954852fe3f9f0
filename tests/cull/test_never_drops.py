"""The culler never drops a row that gsplat draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from gsscale_nerfstudio.cull import View, Window
from tests.cull.against_gsplat import RULES, culled, drawn_by_torch, gsplat_viewmat


def rotation(rng: np.random.Generator) -> np.ndarray:
    q, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    return q * np.sign(np.linalg.det(q))


def nerfstudio_camera(
    rng: np.random.Generator, origin: np.ndarray, f: tuple, c: tuple, size: tuple
) -> Cameras:
    return Cameras(
        camera_to_worlds=torch.tensor(np.column_stack([rotation(rng), origin])[None]).float(),
        fx=float(f[0]),
        fy=float(f[1]),
        cx=float(c[0]),
        cy=float(c[1]),
        width=size[0],
        height=size[1],
    )


def rows_at_borders(rng: np.random.Generator, view: View, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """means, covariances, scales of rows whose drawing is in the balance, at all depths and sizes.

    Most are put so far outside of a border that they just about reach it, many of them as needles
    that are seen at full length. Others lie around the near and far planes or behind the camera.
    """
    fx, fy, cx, cy = view.K[0, 0], view.K[1, 1], view.K[0, 2], view.K[1, 2]
    z = view.near * 10 ** rng.uniform(-0.5, 5, n)
    sigma = 10 ** rng.uniform(-4, 1, n) * np.where(rng.random(n) < 0.5, z, 1)
    u, v = rng.uniform(-0.5, 1.5, n) * view.width, rng.uniform(-0.5, 1.5, n) * view.height
    beyond = 3 * sigma * max(fx, fy) / z * rng.uniform(0, 1.6, n) + rng.uniform(0, 4, n)
    side = rng.integers(0, 5, n)  # 4: anywhere
    left, top, right, bottom = view.whole_window
    u = np.select([side == 0, side == 1], [left - beyond, right + beyond], u)
    v = np.select([side == 2, side == 3], [top - beyond, bottom + beyond], v)
    at_near = rng.random(n) < 0.1
    z[at_near] = view.near + rng.normal(0, 1, at_near.sum()) * 3 * sigma[at_near]
    at_far = rng.random(n) < 0.05
    z[at_far] = view.far * (1 + rng.normal(0, 1e-4, at_far.sum()))
    in_camera = np.column_stack([(u - cx) / fx * z, (v - cy) / fy * z, z])

    axes = rng.standard_normal((n, 3, 3))
    seen_at_full_length = np.column_stack([in_camera[:, :2] / z[:, None], np.zeros(n)])
    seen_at_full_length[:, 2] = -(seen_at_full_length[:, :2] ** 2).sum(axis=1)
    along = rng.random(n) < 0.5
    axes[along, :, 0] = seen_at_full_length[along]
    axes, _ = np.linalg.qr(axes)
    scales = sigma[:, None] * 10 ** (-4 * rng.random((n, 3)) ** 3)
    scales[:, 0] = sigma

    to_world = view.viewmat[:3, :3].T
    means = (in_camera - view.viewmat[:3, 3]) @ to_world.T
    factors = torch.tensor(to_world @ (axes * scales[:, None, :]), dtype=torch.float32)
    return (
        torch.tensor(means, dtype=torch.float32),
        factors @ factors.transpose(1, 2),
        torch.tensor(scales, dtype=torch.float32),
    )


pixels = st.sampled_from([8, 31, 640, 4096]) | st.integers(8, 8192)


@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.sampled_from([1, 255, 256, 1000, 2500]),
    size=st.tuples(pixels, pixels),
    focal=st.floats(0.1, 20),
    focal_ratio=st.floats(0.3, 3),
    centre=st.tuples(st.floats(-1, 2), st.floats(-1, 2)) | st.just((0.5, 0.5)),
    distance=st.sampled_from([0.0, 1.0, 100.0, 1e4]),
    clip=st.sampled_from([(0.01, 1e10), (0.5, 30.0)]),
)
@settings(max_examples=70, deadline=None)
@pytest.mark.parametrize("rule", RULES)
def test_no_drawn_row_is_dropped(
    rule: str,
    seed: int,
    n: int,
    size: tuple[int, int],
    focal: float,
    focal_ratio: float,
    centre: tuple[float, float],
    distance: float,
    clip: tuple[float, float],
) -> None:
    rng = np.random.default_rng(seed)
    f = (focal * max(size), focal * focal_ratio * max(size))
    c = (centre[0] * size[0], centre[1] * size[1])
    camera = nerfstudio_camera(rng, distance * rng.standard_normal(3), f, c, size)
    view = View.from_camera(camera, near=clip[0], far=clip[1])
    means, covars, scales = rows_at_borders(rng, view, n)
    drawn = RULES[rule](means, covars, view, gsplat_viewmat(camera.camera_to_worlds[0]))
    dropped = drawn & ~culled(means, scales, view)
    assert not dropped.any(), torch.cat([means, scales], dim=1)[dropped]


@given(
    seed=st.integers(0, 2**32 - 1),
    focal=st.floats(0.1, 20),
    centre=st.tuples(st.floats(-1, 2), st.floats(-1, 2)) | st.just((0.5, 0.5)),
    corners=st.tuples(*[st.integers(0, 639)] * 2, *[st.integers(0, 399)] * 2),
)
@settings(max_examples=70, deadline=None)
@pytest.mark.parametrize("rule", ["1.4 packed", "1.5"])
def test_no_row_that_reaches_a_window_is_dropped(
    rule: str, seed: int, focal: float, centre: tuple[float, float], corners: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(seed)
    c = (centre[0] * 640, centre[1] * 400)
    camera = nerfstudio_camera(rng, rng.standard_normal(3), (640 * focal,) * 2, c, (640, 400))
    (left, right), (top, bottom) = sorted(corners[:2]), sorted(corners[2:])
    view = View.from_camera(camera).through(Window(left, top, right + 1, bottom + 1))
    means, covars, scales = rows_at_borders(rng, view, 1000)
    drawn = RULES[rule](means, covars, view, gsplat_viewmat(camera.camera_to_worlds[0]))
    dropped = drawn & ~culled(means, scales, view)
    assert not dropped.any(), torch.cat([means, scales], dim=1)[dropped]


@given(st.integers(0, 2**32 - 1), st.floats(-4, 2))
@settings(max_examples=30, deadline=None)
def test_rows_may_move_as_far_as_announced(seed: int, log_reach: float) -> None:
    rng = np.random.default_rng(seed)
    camera = nerfstudio_camera(rng, rng.standard_normal(3), (600, 400), (250, 300), (640, 480))
    view = View.from_camera(camera)
    means, covars, scales = rows_at_borders(rng, view, 1000)
    reach = torch.tensor(10**log_reach * rng.random(1000), dtype=torch.float32)
    kept = culled(means, scales, view, reach)
    viewmat = gsplat_viewmat(camera.camera_to_worlds[0])
    for _ in range(3):
        way = torch.nn.functional.normalize(torch.randn(1000, 3), dim=1)
        moved = means + 0.999 * reach[:, None] * way
        assert not (drawn_by_torch(moved, covars, view, viewmat) & ~kept).any()
