"""gsplat's CUDA kernels, through ``rasterize``, against the reference in float64 on the CPU.

Both see the same numbers: scenes and cameras are rounded to float32 first. What remains is
gsplat's own float32 arithmetic, for which ``agreement.py`` gives the bounds and their reasons.
"""

from __future__ import annotations

import pytest
import torch

from gsscale_nerfstudio.rasterize import Rendering

from .agreement import (
    assert_none,
    draw_with_gradients,
    gradient_differences,
    rendering_differences,
)
from .scenes import Camera, Scene, camera, draw, empty_scenes, scene

pytestmark = pytest.mark.gpu

CAMERAS = [
    camera(160, 120),
    camera(97, 61, yaw=0.3),
    camera(250, 40, yaw=-0.2, focal=0.6),
    camera(33, 140, focal=1.5),
]


def compare(gaussians: Scene, view: Camera, **options: bool) -> Rendering:
    """Assert that both backends agree; returns gsplat's rendering."""
    gaussians, view = gaussians.to(torch.float32), view.to(torch.float32)
    want, expected = draw_with_gradients(
        gaussians.to(torch.float64), view.to(torch.float64), **options
    )
    got, gradients = draw_with_gradients(gaussians.to("cuda"), view.to("cuda"), **options)
    assert got.rgb.is_cuda and got.rgb.dtype == torch.float32
    assert got.radii.dtype == torch.int32
    assert_none(rendering_differences(got, want) + gradient_differences(gradients, expected))
    return got


@pytest.mark.parametrize("absgrad", [False, True])
@pytest.mark.parametrize("antialiased", [False, True])
@pytest.mark.parametrize("view", CAMERAS)
def test_views(view: Camera, antialiased: bool, absgrad: bool) -> None:
    compare(scene(2000, sh_degree=3), view, depth=True, antialiased=antialiased, absgrad=absgrad)


@pytest.mark.parametrize("sh_degree", [None, 0, 1, 2, 3])
def test_sh_degrees(sh_degree: int | None) -> None:
    """All 16 coefficients are there; the bands above the degree must get a zero gradient."""
    compare(scene(1000, sh_degree=sh_degree, seed=1), CAMERAS[1], depth=True)


def test_without_depth() -> None:
    assert compare(scene(1000), CAMERAS[0]).depth is None


def test_almost_opaque_gaussians() -> None:
    """Small and centred on pixels: there alpha exceeds 0.999, and a third of the opacity's gradient
    is cut off. Ten pixels apart, so that no other one hides it."""
    gaussians, view = scene(150, sh_degree=1, size=0.006, seed=2), CAMERAS[0]
    gaussians.scales.clamp_(0.003, 0.012)
    gaussians.opacities.copy_(torch.linspace(0.9992, 1.0, 150))
    index = torch.arange(150, dtype=torch.float64)
    pixels = torch.stack([10 * (index % 15) + 5.5, 10 * (index // 15) + 5.5, torch.ones(150)], -1)
    in_camera = 2 * pixels @ torch.linalg.inv(view.K).T
    gaussians.means.copy_((in_camera - view.viewmat[:3, 3]) @ view.viewmat[:3, :3])
    compare(gaussians, view, absgrad=True)


def test_many_layers() -> None:
    """Most pixels stop at a transmittance of 1e-4, long before their list ends."""
    gaussians = scene(1500, size=0.15, seed=3)
    gaussians.opacities.clamp_min_(0.4)
    rendering = compare(gaussians, CAMERAS[0], absgrad=True)
    assert (rendering.alpha > 0.999).double().mean() > 0.5


def test_faint_gaussians() -> None:
    """Opacities around 1/255, below which a contribution is skipped."""
    gaussians = scene(2000, seed=4)
    gaussians.opacities.mul_(0.02)
    compare(gaussians, CAMERAS[0], depth=True, absgrad=True)


def test_near_and_far() -> None:
    gaussians, view = scene(1000).to(torch.float32), camera(64, 48).to(torch.float32)
    planes = {"near": 2.0, "far": 3.0}
    got = draw(gaussians.to("cuda"), view.to("cuda"), **planes)
    want = draw(gaussians.to(torch.float64), view.to(torch.float64), **planes)
    assert 0 < (want.radii > 0).sum() < 500
    assert_none(rendering_differences(got, want))


@pytest.mark.parametrize("absgrad", [False, True])
@pytest.mark.parametrize(("name", "gaussians"), empty_scenes())
def test_nothing_visible(name: str, gaussians: Scene, absgrad: bool) -> None:
    n = len(gaussians.means)
    view = camera(20, 15).to(torch.float32)
    rendering, gradients = draw_with_gradients(
        gaussians.to(torch.float32).to("cuda"), view.to("cuda"), depth=True, absgrad=absgrad
    )
    for image in (rendering.rgb, rendering.alpha, rendering.depth):
        assert image.is_cuda and image.shape[:2] == (15, 20) and not image.any()
    assert rendering.radii.shape == (n,) and not rendering.radii.any()
    assert gradients["means2d"].shape == (n, 2)
    for name, gradient in gradients.items():
        assert gradient.is_cuda and not gradient.any(), name
