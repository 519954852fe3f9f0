"""View: Nerfstudio's camera conventions, what is refused, and the planes' geometry."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import Cameras, CameraType

from gsscale_nerfstudio.cull import View
from gsscale_nerfstudio.errors import GSScaleError

DRAWN = (CameraType.PERSPECTIVE, CameraType.FISHEYE, CameraType.FISHEYE624)


def pose(seed: int = 0) -> torch.Tensor:
    """A random rigid camera-to-world matrix [3, 4]."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    rotation *= np.sign(np.linalg.det(rotation))
    return torch.tensor(np.column_stack([rotation, rng.uniform(-5, 5, 3)]), dtype=torch.float32)


def camera(camera_to_worlds: torch.Tensor | None = None, **changes: object) -> Cameras:
    values: dict = dict(fx=500.0, fy=450.0, cx=310.0, cy=250.0, width=640, height=480)
    poses = pose() if camera_to_worlds is None else camera_to_worlds
    return Cameras(camera_to_worlds=poses[None] if poses.ndim == 2 else poses, **values | changes)


def pixel(view: View, point: np.ndarray) -> np.ndarray:
    """(u, v, depth) of a world point."""
    in_camera = view.viewmat @ np.append(point, 1.0)
    u, v, z = view.K @ in_camera[:3]
    return np.array([u / z, v / z, z])


def test_points_land_where_an_opengl_camera_sees_them() -> None:
    camera_to_world = pose().numpy().astype(np.float64)
    right, up, back, origin = camera_to_world.T
    view = View.from_camera(camera())
    np.testing.assert_allclose(pixel(view, origin - 2 * back), [310, 250, 2], atol=1e-3)
    # To the right is a larger u; up is a smaller v.
    np.testing.assert_allclose(pixel(view, origin - 2 * back + right), [560, 250, 2], atol=1e-3)
    np.testing.assert_allclose(pixel(view, origin - 2 * back + up), [310, 25, 2], atol=1e-3)
    assert (view.width, view.height, view.near, view.far) == (640, 480, 0.01, 1e10)


def test_a_pixels_ray_projects_back_to_it() -> None:
    one = camera()
    rays = one.generate_rays(0, coords=torch.tensor([[37.5, 401.5]]))  # (row, column)
    point = (rays.origins + 3 * rays.directions)[0].numpy().astype(np.float64)
    np.testing.assert_allclose(pixel(View.from_camera(one), point)[:2], [401.5, 37.5], atol=1e-2)


@pytest.mark.parametrize("shape", [(3, 4), (1, 3, 4), (4, 4), (1, 4, 4)])
def test_an_optimized_pose_replaces_the_cameras(shape: tuple[int, ...]) -> None:
    other = torch.eye(4)
    other[:3] = pose(1)
    given = other[: shape[-2]].reshape(shape).requires_grad_()
    expected = View.from_camera(camera(pose(1)))
    np.testing.assert_array_equal(View.from_camera(camera(), given).viewmat, expected.viewmat)


def test_the_cameras_current_resolution_counts() -> None:
    one = camera()
    one.rescale_output_resolution(0.25)
    view = View.from_camera(one)
    assert (view.width, view.height) == (160, 120)
    np.testing.assert_allclose(view.K[0], [125, 0, 77.5])


@pytest.mark.parametrize("camera_type", DRAWN)
def test_undistorted_types_are_accepted(camera_type: CameraType) -> None:
    assert View.from_camera(camera(camera_type=camera_type)).width == 640


@pytest.mark.parametrize("camera_type", [t for t in CameraType if t not in DRAWN])
def test_other_types_are_refused_by_name(camera_type: CameraType) -> None:
    with pytest.raises(GSScaleError, match=f"{camera_type.name}.*convert"):
        View.from_camera(camera(camera_type=camera_type))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (camera(torch.stack([pose(0), pose(1)])), "one camera at a time.*2"),
        (camera(width=0), "0 x 480 pixels"),
        (camera(height=-3), "640 x -3 pixels"),
        (camera(pose() * NAN), "pose.*not finite"),
        (camera(pose() * INF), "pose.*not finite"),
        (camera(fx=NAN), "intrinsics"),
        (camera(cy=INF), "intrinsics"),
        (camera(fy=0.0), "focal length"),
        (camera(fx=-500.0), "focal length"),
    ],
)
def test_what_cannot_be_drawn_is_refused(one: Cameras, message: str) -> None:
    with pytest.raises(GSScaleError, match=message):
        View.from_camera(one)


@pytest.mark.parametrize(("near", "far"), [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (NAN, 1.0)])
def test_empty_depth_ranges_are_refused(near: float, far: float) -> None:
    with pytest.raises(GSScaleError, match="near must be"):
        View.from_camera(camera(), near=near, far=far)


def test_matrices_of_several_views_are_refused() -> None:
    with pytest.raises(GSScaleError, match="4 x 4"):
        View(np.eye(4)[None], np.eye(3), 8, 8)


def test_planes_enclose_the_image_and_little_more() -> None:
    view = View.from_camera(camera(), near=0.5, far=100.0)
    planes = view.planes()
    assert planes.shape == (6, 5) and planes.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(planes[:, :3], axis=1), 1, rtol=1e-6)
    assert (planes[:, 4] >= 1).all()

    def outside_of(u: float, v: float, z: float) -> list[int]:
        """Planes that reject a point of no extent seen at pixel (u, v) and depth z."""
        x, y = (u - 310) / 500 * z, (v - 250) / 450 * z
        world = np.linalg.inv(view.viewmat) @ [x, y, z, 1]
        return np.flatnonzero(planes[:, :3] @ world[:3] + planes[:, 3] < 0).tolist()

    assert outside_of(310, 250, 10) == []
    # gsplat gives a point a radius of ceil(3 sqrt(0.3 + 0.1)) = 2 pixels.
    for u, v in [(-1.9, 250), (641.9, 250), (310, -1.9), (310, 481.9)]:
        assert outside_of(u, v, 10) == []
    for side, (u, v) in enumerate([(-4, 250), (644, 250), (310, -4), (310, 484)]):
        assert outside_of(u, v, 10) == [side]
    assert outside_of(310, 250, 0.499) == [4]
    assert outside_of(310, 250, 100.1) == [5]
