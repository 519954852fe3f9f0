"""The whole reference: against gsplat's torch code with the slow loop, finite differences."""

from __future__ import annotations

import pytest
import torch
from gsplat.cuda._torch_impl import (
    _fully_fused_projection,
    _quat_scale_to_covar_preci,
    _spherical_harmonics,
)
from torch import Tensor

from gsscale_nerfstudio.rasterize import Rendering

from .agreement import (
    assert_none,
    draw_with_gradients,
    gradient_differences,
    rendering_differences,
)
from .scenes import Camera, Scene, camera, draw, empty_scenes, random_loss, scene
from .slow_compositing import composite_slowly


def draw_slowly(scene: Scene, camera: Camera, *, antialiased: bool) -> tuple[Tensor, ...]:
    """rgb, alpha, depth and the projected means, every step from somebody else's code."""
    covars, _ = _quat_scale_to_covar_preci(scene.quats, scene.scales, compute_preci=False)
    radii, means2d, depths, conics, compensations = (
        output[0]
        for output in _fully_fused_projection(
            scene.means,
            covars,
            camera.viewmat[None],
            camera.K[None],
            camera.width,
            camera.height,
            calc_compensations=True,
        )
    )
    means2d.retain_grad()
    colors = scene.colors
    if scene.sh_degree is not None:
        dirs = scene.means - torch.inverse(camera.viewmat)[:3, 3]
        colors = (_spherical_harmonics(scene.sh_degree, dirs, colors) + 0.5).clamp_min(0)
    opacities = scene.opacities * compensations if antialiased else scene.opacities
    image, alpha = composite_slowly(
        means2d,
        conics,
        torch.cat([colors, depths[:, None]], 1),
        opacities,
        depths,
        radii,
        camera.width,
        camera.height,
    )
    return image[..., :3], alpha, image[..., 3:] / alpha.clamp(min=1e-10), means2d


@pytest.mark.parametrize(
    ("sh_degree", "antialiased", "view"),
    [
        (None, False, camera(22, 18)),
        (0, False, camera(22, 18, yaw=0.2)),
        (3, True, camera(17, 25, yaw=-0.3)),
        (2, True, camera(30, 12, focal=0.5)),
    ],
)
def test_everything_matches_the_slow_pipeline(
    sh_degree: int | None, antialiased: bool, view: Camera
) -> None:
    gaussians = scene(40, sh_degree=sh_degree, size=0.12)
    # Without needles, and with directions not differentiated: the two places where gsplat's torch
    # code (no derivative of SH in the direction) or kernel (1e-6 in the compensation's) differ.
    gaussians.scales.clamp_min_(0.06)

    rendering, got = draw_with_gradients(gaussians, view, depth=True, antialiased=antialiased)
    leaves = gaussians.leaves()
    viewmat = view.viewmat.clone().requires_grad_()
    *images, means2d = draw_slowly(leaves, view._replace(viewmat=viewmat), antialiased=antialiased)
    random_loss(*images).backward()

    assert rendering.alpha.amax() > 0.9
    for image, want in zip((rendering.rgb, rendering.alpha, rendering.depth), images, strict=True):
        torch.testing.assert_close(image, want, rtol=1e-7, atol=1e-7)
    expected = {name: getattr(leaves, name).grad for name in ("quats", "scales", "opacities")}
    expected |= {"colors": leaves.colors.grad, "means2d": means2d.grad}
    if not sh_degree:
        expected |= {"means": leaves.means.grad, "viewmat": viewmat.grad}
    for name, want in expected.items():
        scale = float(want.abs().amax())
        torch.testing.assert_close(got[name], want, rtol=1e-5, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("antialiased", [False, True])
def test_gradients_match_finite_differences(antialiased: bool) -> None:
    """Along a random direction in the space of each input, SH directions and camera included."""
    gaussians, view = scene(40, sh_degree=3, size=0.12), camera(29, 21, yaw=0.2)
    gaussians.scales.clamp_min_(0.06)
    _, gradients = draw_with_gradients(gaussians, view, depth=True, antialiased=antialiased)

    def loss(name: str, offset: Tensor) -> Tensor:
        if name == "viewmat":
            rendering = draw(
                gaussians,
                view._replace(viewmat=view.viewmat + offset),
                depth=True,
                antialiased=antialiased,
            )
        else:
            moved = gaussians._replace(**{name: getattr(gaussians, name) + offset})
            rendering = draw(moved, view, depth=True, antialiased=antialiased)
        return random_loss(rendering.rgb, rendering.alpha, rendering.depth)

    step = 1e-7
    del gradients["means2d"]
    for name, gradient in gradients.items():
        direction = torch.randn(gradient.shape, dtype=torch.float64)
        numeric = (loss(name, step * direction) - loss(name, -step * direction)) / (2 * step)
        analytic = (gradient * direction).sum()
        torch.testing.assert_close(analytic, numeric, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("antialiased", [False, True])
@pytest.mark.parametrize("view", [camera(160, 120), camera(97, 61, yaw=0.3)])
def test_float32_agrees_with_float64(view: Camera, antialiased: bool) -> None:
    single, view = scene(1500, sh_degree=3).to(torch.float32), view.to(torch.float32)
    options = {"depth": True, "absgrad": True, "antialiased": antialiased}
    got, gradients = draw_with_gradients(single, view, **options)
    want, expected = draw_with_gradients(
        single.to(torch.float64), view.to(torch.float64), **options
    )
    assert got.rgb.dtype == gradients["means2d"].dtype == torch.float32
    assert_none(rendering_differences(got, want) + gradient_differences(gradients, expected))


def test_absolute_gradient_of_the_projected_means() -> None:
    gaussians, view = scene(60, size=0.1), camera(40, 30)
    _, signed = draw_with_gradients(gaussians, view)
    _, absolute = draw_with_gradients(gaussians, view, absgrad=True)
    larger = absolute["means2d"] - signed["means2d"].abs()
    assert (larger >= -1e-12).all() and (larger > 1e-3).any()
    del signed["means2d"]
    for name, gradient in signed.items():
        torch.testing.assert_close(absolute[name], gradient, msg=name)


def test_depth_only_on_request_and_zero_where_nothing_is() -> None:
    gaussians, view = scene(12, size=0.03), camera(60, 40)
    assert draw(gaussians, view).depth is None
    rendering = draw(gaussians, view, depth=True)
    assert rendering.depth.shape == rendering.alpha.shape == (40, 60, 1)
    empty = rendering.alpha == 0
    assert empty.any() and not rendering.depth[empty].any()
    assert (rendering.depth[~empty] > 0.9).all()  # the nearest mean that shows is that far


@pytest.mark.parametrize("absgrad", [False, True])
@pytest.mark.parametrize(("name", "gaussians"), empty_scenes())
def test_nothing_visible_still_has_gradients(name: str, gaussians: Scene, absgrad: bool) -> None:
    n, view = len(gaussians.means), camera(20, 15)
    rendering, gradients = draw_with_gradients(gaussians, view, depth=True, absgrad=absgrad)
    assert rendering.rgb.shape == (15, 20, 3) and not rendering.rgb.any()
    assert rendering.alpha.shape == rendering.depth.shape == (15, 20, 1)
    assert not rendering.alpha.any() and not rendering.depth.any()
    assert rendering.radii.shape == (n,) and rendering.radii.dtype == torch.int32
    assert not rendering.radii.any()
    assert rendering.means2d.shape == (n, 2)
    assert gradients["means2d"].shape == (n, 2) and not gradients["means2d"].any()
    assert gradients["viewmat"].shape == (4, 4) and not gradients["viewmat"].any()
    for leaf in ("means", "quats", "scales", "opacities", "colors"):
        assert gradients[leaf].shape == getattr(gaussians, leaf).shape
        assert not gradients[leaf].any()


def test_inputs_without_gradients() -> None:
    gaussians, view = scene(30, size=0.1), camera(20, 15)
    with torch.no_grad():
        rendering = draw(gaussians.leaves(), view)
    assert not rendering.rgb.requires_grad
    with pytest.raises(RuntimeError, match="gradients enabled"):
        rendering.means2d_grad()
    colors = gaussians.colors.clone().requires_grad_()
    draw(gaussians._replace(colors=colors), view, absgrad=True).rgb.sum().backward()
    assert colors.grad.any()


def test_means2d_grad_before_backward_says_what_is_missing() -> None:
    rendering: Rendering = draw(scene(30).leaves(), camera(20, 15), absgrad=True)
    with pytest.raises(RuntimeError, match=r"backward\(\)"):
        rendering.means2d_grad()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_window_is_a_part_of_the_image(device: str) -> None:
    """Its pixels and, of a loss on them, all gradients."""
    gaussians = scene(400, size=0.1).to(torch.float32).to(device)
    view = camera(90, 70).to(torch.float32).to(device)
    left, top, right, bottom = window = (32, 16, 90, 48)
    results = []
    for part in (False, True):
        leaves = gaussians.leaves()
        options = {"window": window} if part else {}
        rendering = draw(leaves, view, depth=True, absgrad=True, **options)
        images = [rendering.rgb, rendering.alpha, rendering.depth]
        if not part:
            images = [image[top:bottom, left:right] for image in images]
        random_loss(*images).backward()
        gradients = {name: getattr(leaves, name).grad for name in leaves._fields[:5]}
        gradients["means2d"] = rendering.means2d_grad()
        results.append((images, gradients, rendering.radii))
    (images, gradients, radii), (window_images, window_gradients, window_radii) = results
    assert torch.equal(radii, window_radii)
    for image, expected in zip(window_images, images, strict=True):
        assert image.shape[:2] == (32, 58)
        torch.testing.assert_close(image, expected, rtol=1e-4, atol=1e-4)
    for name, expected in gradients.items():
        error = (window_gradients[name] - expected).abs().max() / expected.abs().max()
        # A pixel's depth is divided by its alpha; gsplat's backward pass rounds accordingly.
        assert error < (1e-4 if device == "cpu" else 5e-3), (name, float(error))
