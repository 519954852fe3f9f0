"""Projection and culling against gsplat's own torch implementation."""

from __future__ import annotations

import math

import pytest
import torch
from gsplat.cuda._torch_impl import _fully_fused_projection, _quat_scale_to_covar_preci
from torch import Tensor

from gsscale_nerfstudio.rasterize.projection import PER_AXIS, Projection, project

from .scenes import Camera, Scene, camera, scene

CAMERAS = [camera(160, 120), camera(97, 61, yaw=0.3), camera(40, 90, yaw=-0.4, focal=0.4)]


def ours(
    scene: Scene,
    camera: Camera,
    near: float = 0.01,
    far: float = 1e10,
    *,
    antialiased: bool = False,
    per_axis: bool = PER_AXIS,
) -> Projection:
    planes = {"near": near, "far": far}
    return project(*scene[:4], *camera, antialiased=antialiased, per_axis=per_axis, **planes)


def as_opaque_as_can_be(gaussians: Scene) -> Scene:
    """Then 3.33 standard deviations are drawn: gsplat's torch code does not ask for opacities."""
    return gaussians._replace(opacities=torch.full_like(gaussians.opacities, math.inf))


def gsplats(scene: Scene, camera: Camera, near: float = 0.01, far: float = 1e10) -> list[Tensor]:
    """radii [n, 2], means2d, depths, conics, compensations of all rows."""
    covars, _ = _quat_scale_to_covar_preci(scene.quats, scene.scales, compute_preci=False)
    outputs = _fully_fused_projection(
        scene.means,
        covars,
        camera.viewmat[None],
        camera.K[None],
        camera.width,
        camera.height,
        near_plane=near,
        far_plane=far,
        calc_compensations=True,
    )
    radii, *others = (output[0] for output in outputs)
    return [radii.view(len(radii), -1).expand(-1, 2), *others]


@pytest.mark.parametrize("view", CAMERAS)
def test_values_match_gsplat(view: Camera) -> None:
    gaussians = as_opaque_as_can_be(scene(2000))
    radii, *expected = gsplats(gaussians, view)
    projection = ours(gaussians, view)

    assert torch.equal(projection.radii, radii)
    drawn = (radii > 0).all(1)
    assert 0.2 < drawn.double().mean() < 0.95  # both outcomes of the cull occur
    assert torch.equal(projection.visible, drawn.nonzero().squeeze(1))
    for got, want in zip(projection.splats, expected, strict=True):
        # gsplat's determinant cancels digits that ours keeps.
        torch.testing.assert_close(got, want[drawn], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("antialiased", [False, True])
@pytest.mark.parametrize("view", CAMERAS)
def test_rectangles_hold_what_reaches_1_in_255_and_little_else(
    view: Camera, antialiased: bool
) -> None:
    """gsplat 1.5's rule for opacities, which its torch code leaves out."""
    gaussians = scene(2000)
    gaussians.opacities[::7] *= 0.01
    _, rows, splats = ours(as_opaque_as_can_be(gaussians), view, per_axis=True)
    radii = ours(gaussians, view, antialiased=antialiased, per_axis=True).radii[rows]
    opacities = gaussians.opacities[rows, None]
    if antialiased:
        opacities = opacities * splats.compensations[:, None]
    covariances = torch.linalg.inv(splats.conics[:, [0, 1, 1, 2]].view(-1, 2, 2))
    variances = covariances.diagonal(dim1=1, dim2=2)

    def largest_alpha(distances: Tensor) -> Tensor:
        """Of all points so far from the centre along one axis of the image."""
        return opacities * torch.exp(-distances.square() / (2 * variances))

    drawn = radii.any(1)
    assert (largest_alpha(radii)[drawn] <= (1 + 1e-6) / 255).all()
    assert (largest_alpha(radii - 1)[drawn] >= (1 - 1e-6) / 255).all()

    reach = (2 * variances * (255 * opacities).clamp_min(1).log()).sqrt().ceil()
    low, high = splats.means2d - reach, splats.means2d + reach
    inside = ((high > 0) & (low < torch.tensor([view.width, view.height]))).all(1)
    shows = (opacities > 1 / 255).squeeze(1)
    assert not shows.all() and not inside.all()
    assert torch.equal(drawn, shows & inside)


def test_without_a_number_for_an_opacity_a_gaussian_is_drawn() -> None:
    """As in gsplat's kernels: it is to show in the image, and in the loss."""
    gaussians = scene(100)
    want = ours(as_opaque_as_can_be(gaussians), CAMERAS[0], per_axis=True)
    gaussians.opacities.fill_(math.nan)
    assert want.radii.any()
    assert torch.equal(ours(gaussians, CAMERAS[0], per_axis=True).radii, want.radii)
    gaussians.opacities.fill_(-1.0)
    assert not ours(gaussians, CAMERAS[0], per_axis=True).radii.any()


@pytest.mark.parametrize("view", CAMERAS)
def test_gradients_match_gsplat(view: Camera) -> None:
    def gradients(project_with) -> list[Tensor]:
        gaussians = as_opaque_as_can_be(scene(500)).leaves()
        viewmat = view.viewmat.clone().requires_grad_()
        outputs = project_with(gaussians, view._replace(viewmat=viewmat))
        generator = torch.Generator().manual_seed(3)
        loss = sum(
            (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum()
            for out in outputs
        )
        loss.backward()
        return [gaussians.means.grad, gaussians.quats.grad, gaussians.scales.grad, viewmat.grad]

    def visible_only(gaussians: Scene, camera: Camera) -> list[Tensor]:
        radii, *outputs, compensations = gsplats(gaussians, camera)
        # gsplat's kernel, unlike its torch twin, takes 1 / (2 (rho + 1e-6)) as the derivative.
        rho = compensations.detach()
        damped = rho + (compensations - rho) * (rho / (rho + 1e-6))
        return [output[radii[:, 0] > 0] for output in (*outputs, damped)]

    expected = gradients(visible_only)
    for got, want in zip(gradients(lambda *args: ours(*args).splats), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_near_and_far_planes() -> None:
    gaussians = as_opaque_as_can_be(scene(300))
    near, far = 2.0, 3.5
    radii, *_ = gsplats(gaussians, CAMERAS[0], near, far)
    projection = ours(gaussians, CAMERAS[0], near, far)
    assert torch.equal(projection.radii, radii)
    assert ((projection.splats.depths >= near) & (projection.splats.depths <= far)).all()


def test_rows_that_are_culled_get_zero_gradients() -> None:
    """Also those whose projection is inf or nan: in the camera's plane, without a rotation."""
    gaussians, view = scene(20), camera(64, 48)
    gaussians.means[0] = -view.viewmat[:3, 3]
    gaussians.quats[3] = 0
    gaussians = gaussians.leaves()
    projection = ours(gaussians, view)
    assert not projection.radii[[0, 3]].any()
    sum(output.sum() for output in projection.splats).backward()
    for tensor in gaussians[:3]:
        assert tensor.grad.isfinite().all()
        assert not tensor.grad[projection.radii[:, 0] == 0].any()
        assert tensor.grad[projection.radii[:, 0] > 0].any()


def test_a_flat_gaussian_seen_edge_on_has_a_finite_gradient() -> None:
    gaussians, view = scene(1), camera(64, 48)
    view.viewmat.copy_(torch.eye(4))
    flat = gaussians._replace(
        means=torch.tensor([[0.0, 0.0, 2.0]], dtype=torch.float64),
        quats=torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64),
        scales=torch.tensor([[0.0, 0.1, 0.1]], dtype=torch.float64),
    ).leaves()
    projection = ours(flat, view)
    assert projection.splats.compensations.item() == 0
    projection.splats.compensations.sum().backward()
    assert flat.scales.grad.isfinite().all()


@pytest.mark.parametrize("per_axis", [False, True])
def test_huge_gaussian_keeps_a_positive_radius(per_axis: bool) -> None:
    """Its radius exceeds an int32; it must be drawn, not wrap around."""
    gaussians = scene(1)
    gaussians.scales.fill_(1e9)
    assert ours(gaussians, CAMERAS[0], per_axis=per_axis).radii.tolist() == [[2**30] * 2]
