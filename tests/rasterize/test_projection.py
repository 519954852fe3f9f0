"""Projection and culling against gsplat's own torch implementation."""

from __future__ import annotations

import pytest
import torch
from gsplat.cuda._torch_impl import _fully_fused_projection, _quat_scale_to_covar_preci
from torch import Tensor

from benchmarks.cpu_splatfacto import PER_AXIS
from gsscale_nerfstudio.rasterize.projection import Projection, project

from .scenes import Camera, Scene, camera, scene

pytestmark = pytest.mark.skipif(PER_AXIS, reason="draws as gsplat 1.4, with one radius")

CAMERAS = [camera(160, 120), camera(97, 61, yaw=0.3), camera(40, 90, yaw=-0.4, focal=0.4)]


def ours(scene: Scene, camera: Camera, near: float = 0.01, far: float = 1e10) -> Projection:
    return project(scene.means, scene.quats, scene.scales, *camera, near=near, far=far)


def gsplats(scene: Scene, camera: Camera, near: float = 0.01, far: float = 1e10) -> list[Tensor]:
    """radii, means2d, depths, conics, compensations of all rows."""
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
    return [output[0] for output in outputs]


@pytest.mark.parametrize("view", CAMERAS)
def test_values_match_gsplat(view: Camera) -> None:
    gaussians = scene(2000)
    radii, *expected = gsplats(gaussians, view)
    projection = ours(gaussians, view)

    assert torch.equal(projection.radii, radii)
    assert 0.2 < (radii > 0).double().mean() < 0.95  # both outcomes of the cull occur
    assert torch.equal(projection.visible, radii.nonzero().squeeze(1))
    for got, want in zip(projection.splats, expected, strict=True):
        # gsplat's determinant cancels digits that ours keeps.
        torch.testing.assert_close(got, want[radii > 0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("view", CAMERAS)
def test_gradients_match_gsplat(view: Camera) -> None:
    def gradients(project_with) -> list[Tensor]:
        gaussians, viewmat = scene(500).leaves(), view.viewmat.clone().requires_grad_()
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
        return [output[radii > 0] for output in (*outputs, damped)]

    expected = gradients(visible_only)
    for got, want in zip(gradients(lambda *args: ours(*args).splats), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_near_and_far_planes() -> None:
    gaussians = scene(300)
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
    assert projection.radii[0] == projection.radii[3] == 0
    sum(output.sum() for output in projection.splats).backward()
    for tensor in gaussians[:3]:
        assert tensor.grad.isfinite().all()
        assert not tensor.grad[projection.radii == 0].any()
        assert tensor.grad[projection.radii > 0].any()


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


def test_huge_gaussian_keeps_a_positive_radius() -> None:
    """Its radius exceeds an int32; it must be drawn, not wrap around."""
    gaussians = scene(1)
    gaussians.scales.fill_(1e9)
    assert ours(gaussians, CAMERAS[0]).radii.item() == 2**30
