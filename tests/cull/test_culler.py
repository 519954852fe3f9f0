"""Culler: few rows more than gsplat draws, and what the class promises its callers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gsplat.cuda._torch_impl import _quat_scale_to_covar_preci
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from gsscale_nerfstudio.cull import Culler, View
from tests.cull.against_gsplat import culled, drawn_by_torch, gsplat_viewmat


def terrain(rng: np.random.Generator, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """means, quats, scales: a hilly ground of 100 x 100, covered with rows of varied shape."""
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
        camera = Cameras(pose[None], 0.7 * width, 0.7 * width, width / 2, height / 2, width, height)
        view = View.from_camera(camera)
        exact = drawn_by_torch(means, covars, view, gsplat_viewmat(pose))
        mask = culled(means, scales, view)
        assert not (exact & ~mask).any()
        drawn, kept = drawn + int(exact.sum()), kept + int(mask.sum())
    assert drawn > 0.1 * 6 * n
    assert kept < 1.1 * drawn, f"{kept / drawn - 1:.1%} more rows than gsplat draws"


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
