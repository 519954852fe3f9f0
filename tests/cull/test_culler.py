"""The culler against gsplat: it never drops a row that gsplat draws, and keeps few that it does not.

gsplat's torch projection stands for its kernels. Where versions and kernels differ in how large they
draw a row, every rule is checked.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from gsplat.cuda._torch_impl import (
    _fully_fused_projection,
    _persp_proj,
    _quat_scale_to_covar_preci,
    _world_to_cam,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from gsscale_nerfstudio.cull import Culler, View

BLUR = 0.3

# -- what gsplat draws ---------------------------------------------------------------------------


def gsplat_viewmat(camera_to_world: Tensor) -> Tensor:
    """[4, 4] world -> camera of an OpenGL pose [3, 4], in the float32 steps that splatfacto takes."""
    rotation = (camera_to_world[:, :3] * torch.tensor([1.0, -1.0, -1.0])).T
    viewmat = torch.eye(4)
    viewmat[:3, :3], viewmat[:3, 3] = rotation, -rotation @ camera_to_world[:, 3]
    return viewmat


def drawn_by_torch(means: Tensor, covars: Tensor, view: View, viewmat: Tensor) -> Tensor:
    """Rows [n] bool to which gsplat's own torch projection gives a radius."""
    K = torch.tensor(view.K, dtype=torch.float32)
    radii, *_ = _fully_fused_projection(
        means, covars, viewmat[None], K[None], view.width, view.height, BLUR, view.near, view.far
    )
    return radii[0] > 0


def drawn_with(radius_of: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The kernels' tests of depth and image borders, around radii [n, 2] from 2D covariances."""

    def drawn(means: Tensor, covars: Tensor, view: View, viewmat: Tensor) -> Tensor:
        K = torch.tensor(view.K, dtype=torch.float32)
        size = torch.tensor([view.width, view.height])
        in_camera, covars_in_camera = _world_to_cam(means, covars, viewmat[None])
        centres, covars2d = _persp_proj(
            in_camera, covars_in_camera, K[None], view.width, view.height
        )
        radii = radius_of(covars2d[0] + BLUR * torch.eye(2))
        depths = in_camera[0, :, 2]
        inside = ((centres[0] + radii > 0) & (centres[0] - radii < size)).all(dim=1)
        return inside & (depths >= view.near) & (depths <= view.far)

    return drawn


def radius_14_packed(covars2d: Tensor) -> Tensor:
    """Three standard deviations along the longer axis; eigenvalues kept sqrt(0.1) off their mean."""
    mean = covars2d.diagonal(dim1=1, dim2=2).sum(dim=1) / 2
    distance = (mean**2 - torch.linalg.det(covars2d)).clamp(min=0.1).sqrt()
    return torch.ceil(3.0 * (mean + distance).sqrt())[:, None]


def radius_15(covars2d: Tensor) -> Tensor:
    """3.33 standard deviations, per image axis."""
    return torch.ceil(3.33 * covars2d.diagonal(dim1=1, dim2=2).sqrt())


RULES = {
    "torch": drawn_by_torch,
    "1.4 packed": drawn_with(radius_14_packed),
    "1.5": drawn_with(radius_15),
}

# -- cameras and rows --------------------------------------------------------------------------------


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
    """means, quats, scales of rows whose drawing is in the balance, at all depths and sizes.

    Most are put so far outside of a border that they just about reach it. Others lie around the near
    plane, behind the camera, or far off.
    """
    fx, fy, cx, cy = view.K[0, 0], view.K[1, 1], view.K[0, 2], view.K[1, 2]
    z = view.near * 10 ** rng.uniform(-0.5, 5, n)
    sigma = 10 ** rng.uniform(-4, 1, n) * np.where(rng.random(n) < 0.5, z, 1)
    u, v = rng.uniform(-0.5, 1.5, n) * view.width, rng.uniform(-0.5, 1.5, n) * view.height
    beyond = 3 * sigma * max(fx, fy) / z * rng.uniform(0, 1.6, n) + rng.uniform(0, 4, n)
    side = rng.integers(0, 5, n)  # 4: anywhere
    u = np.select([side == 0, side == 1], [-beyond, view.width + beyond], u)
    v = np.select([side == 2, side == 3], [-beyond, view.height + beyond], v)
    at_near = rng.random(n) < 0.1
    z[at_near] = view.near + rng.normal(0, 1, at_near.sum()) * 3 * sigma[at_near]
    in_camera = np.column_stack([(u - cx) / fx * z, (v - cy) / fy * z, z])
    means = (in_camera - view.viewmat[:3, 3]) @ view.viewmat[:3, :3]
    scales = sigma[:, None] * 10 ** (-4 * rng.random((n, 3)) ** 3)
    scales[np.arange(n), rng.integers(0, 3, n)] = sigma
    # A third of the rows points away from its border, which makes the most of the longest axis.
    quats = rng.standard_normal((n, 4))
    return tuple(torch.tensor(a, dtype=torch.float32) for a in (means, quats, scales))


def culled(means: Tensor, scales: Tensor, view: View, reach: Tensor | float = 0.0) -> Tensor:
    """Ids from a culler over these rows."""
    n = len(means)
    culler = Culler(Culler.spheres_of(means, scales, reach), torch.empty(-(-n // 256), 8))
    culler.refresh(n)
    ids = culler.cull(view, n)
    assert ids.dtype == torch.int32 and (ids.diff() > 0).all()
    return ids


def kept_mask(ids: Tensor, n: int) -> Tensor:
    mask = torch.zeros(n, dtype=torch.bool)
    mask[ids.long()] = True
    return mask


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
@settings(max_examples=120, deadline=None)
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
    means, quats, scales = rows_at_borders(rng, view, n)
    covars, _ = _quat_scale_to_covar_preci(quats, scales, compute_preci=False)
    drawn = RULES[rule](means, covars, view, gsplat_viewmat(camera.camera_to_worlds[0]))
    dropped = drawn & ~kept_mask(culled(means, scales, view), n)
    assert not dropped.any(), torch.cat([means, scales], dim=1)[dropped]


@given(st.integers(0, 2**32 - 1), st.floats(-4, 2))
@settings(max_examples=60, deadline=None)
def test_rows_may_move_as_far_as_announced(seed: int, log_reach: float) -> None:
    rng = np.random.default_rng(seed)
    camera = nerfstudio_camera(rng, rng.standard_normal(3), (600, 400), (250, 300), (640, 480))
    view = View.from_camera(camera)
    means, quats, scales = rows_at_borders(rng, view, 1000)
    reach = torch.tensor(10**log_reach * rng.random(1000), dtype=torch.float32)
    kept = kept_mask(culled(means, scales, view, reach), 1000)
    covars, _ = _quat_scale_to_covar_preci(quats, scales, compute_preci=False)
    viewmat = gsplat_viewmat(camera.camera_to_worlds[0])
    for _ in range(5):
        way = torch.nn.functional.normalize(torch.randn(1000, 3), dim=1)
        moved = means + 0.999 * reach[:, None] * way
        assert not (drawn_by_torch(moved, covars, view, viewmat) & ~kept).any()


# -- few rows too many -------------------------------------------------------------------------------


def terrain(rng: np.random.Generator, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """A hilly ground of 100 x 100, covered with flat and elongated rows of varied size."""
    xy = rng.uniform(-50, 50, (n, 2))
    height = 3 * np.sin(xy[:, 0] / 7) * np.cos(xy[:, 1] / 9)
    means = np.column_stack([xy, height + rng.normal(0, 0.1, n)])
    spacing = 100 / np.sqrt(n)
    scales = spacing * rng.lognormal(0, 0.5, (n, 1)) * rng.lognormal(0, [0.5, 0.5, 1.0], (n, 3))
    quats = rng.standard_normal((n, 4))
    return tuple(torch.tensor(a, dtype=torch.float32) for a in (means, quats, 0.5 * scales))


def looking_down(x: float, y: float, height: float, tilt: float) -> Tensor:
    """[3, 4] OpenGL pose above the terrain, turned ``tilt`` radians from straight down."""
    cos, sin = np.cos(tilt), np.sin(tilt)
    back = np.array([0, -sin, cos])
    up = np.array([0, cos, sin])
    axes = np.column_stack([[1, 0, 0], up, back])
    return torch.tensor(np.column_stack([axes, [x, y, height]]), dtype=torch.float32)


@pytest.mark.parametrize(("width", "height"), [(800, 600), (2000, 1500)])
def test_superset_is_small(width: int, height: int) -> None:
    rng = np.random.default_rng(0)
    n = 120_000
    means, quats, scales = terrain(rng, n)
    covars, _ = _quat_scale_to_covar_preci(quats, scales, compute_preci=False)
    drawn = kept = 0
    for i in range(6):
        pose = looking_down(*rng.uniform(-30, 30, 2), height=25, tilt=0.15 * i)
        camera = Cameras(
            pose[None], 0.7 * width, 0.7 * width, width / 2, height / 2, width, height
        )
        view = View.from_camera(camera)
        exact = drawn_by_torch(means, covars, view, gsplat_viewmat(pose))
        ids = culled(means, scales, view)
        assert not (exact & ~kept_mask(ids, n)).any()
        drawn, kept = drawn + int(exact.sum()), kept + len(ids)
    assert drawn > 0.1 * 6 * n
    assert kept < 1.1 * drawn, f"{kept / drawn - 1:.1%} more rows than gsplat draws"


# -- the class ---------------------------------------------------------------------------------------


@pytest.fixture
def scene() -> tuple[Culler, View, int]:
    """A culler with room for more rows than are in use."""
    n = 3000
    means, _, scales = terrain(np.random.default_rng(1), n)
    spheres = torch.full((2 * n, 4), torch.nan)
    spheres[:n] = Culler.spheres_of(means, scales)
    culler = Culler(spheres, torch.empty(-(-2 * n // 256), 8))
    culler.refresh(n)
    pose = looking_down(0.0, 0.0, 20.0, 0.3)
    return culler, View.from_camera(Cameras(pose[None], 60.0, 60.0, 40.0, 30.0, 80, 60)), n


def test_each_answer_is_a_tensor_of_its_own(scene: tuple[Culler, View, int]) -> None:
    culler, view, n = scene
    first = culler.cull(view, n)
    before = first.clone()
    assert 0 < len(first) < n
    assert len(culler.cull(view, n // 2)) < len(first)
    torch.testing.assert_close(first, before)


def test_answers_go_where_they_are_told(scene: tuple[Culler, View, int]) -> None:
    culler, view, n = scene
    expected = culler.cull(view, n)
    out = torch.empty(len(expected), dtype=torch.int32)
    ids = culler.cull(view, n, out)
    assert ids.data_ptr() == out.data_ptr()
    torch.testing.assert_close(ids, expected)
    with pytest.raises(ValueError, match=f"room for 3 ids.*{len(expected)} rows"):
        culler.cull(view, n, torch.empty(3, dtype=torch.int32))


def test_no_rows(scene: tuple[Culler, View, int]) -> None:
    culler, view, _ = scene
    culler.refresh(0)
    assert culler.cull(view, 0).shape == (0,)


def test_refresh_follows_changed_and_added_rows(scene: tuple[Culler, View, int]) -> None:
    culler, view, n = scene
    seen = culler.cull(view, n)
    unseen = torch.tensor(np.setdiff1d(np.arange(n), seen.numpy())[::7], dtype=torch.int32)
    somewhere = culler.spheres[int(seen[0])].clone()
    culler.spheres[unseen.long()] = somewhere
    culler.refresh(n, unseen)
    assert torch.isin(unseen, culler.cull(view, n)).all()

    culler.spheres[n : 2 * n] = somewhere
    added = torch.arange(n, 2 * n, dtype=torch.int32)
    culler.refresh(2 * n, added)
    assert torch.isin(added, culler.cull(view, 2 * n)).all()
