"""How closely two renderings of one scene must agree when one of them is computed in float32.

The bounds have three parts, because float32 does three different things to a rendering:

- It rounds: relative errors of 1e-7 per operation, a few 1e-7 per image value. The *median* is held
  to that. Of gradients less can be asked: gsplat's backward starts from the transmittance as
  1 - alpha, known to 6e-8, so that at a pixel with a transmittance of 1e-3 everything is off by
  6e-5, and up to ten times that where more is hidden. A wrong formula moves the median by far more.
- It cancels: det = xx yy - xy^2 of an elongated ellipse with variances of 1e3 squared pixels loses
  1e6 * 6e-8 / (0.3 * 2e3), about 1e-4 of its value, and so does the conic. Gradients of occluded
  Gaussians are small differences of large sums. A *high quantile* is held to what such cases reach.
- It decides differently: alpha >= 1/255 or T > 1e-4 can fall either way, as can the order of two
  almost equal depths. That happens at one pixel in thousands and changes it by 1/255, at worst by
  0.1 (T = 0.1 before an alpha of 0.999). So a *few* pixels may be off by that, none by more. The
  norm of a gradient, which one such pixel or needle can dominate, is held to a tenth.

The bounds are several times what the reference in float32 shows against itself in float64 once it
is given gsplat's formulas for the determinant and for the backward's transmittance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsscale_nerfstudio.rasterize import Rendering

from .scenes import Camera, Scene, draw, random_loss


def draw_with_gradients(
    scene: Scene, camera: Camera, **options: bool
) -> tuple[Rendering, dict[str, Tensor]]:
    """A rendering, and the gradients of a random linear loss of all that was drawn."""
    scene = scene.leaves()
    camera = camera._replace(viewmat=camera.viewmat.detach().clone().requires_grad_())
    rendering = draw(scene, camera, **options)
    random_loss(rendering.rgb, rendering.alpha, rendering.depth).backward()
    names = ("means", "quats", "scales", "opacities", "colors")
    gradients = {name: getattr(scene, name).grad for name in names}
    gradients |= {"viewmat": camera.viewmat.grad, "means2d": rendering.means2d_grad()}
    return rendering, gradients


def assert_renderings_agree(got: Rendering, want: Rendering) -> None:
    """``want`` is the float64 one."""
    radii, expected_radii = got.radii.cpu(), want.radii.cpu()
    # ceil() of a rounded number: rarely one more or less, and then perhaps on or off the screen.
    differ = radii != expected_radii
    assert differ.double().mean() <= 2e-3
    both = (radii > 0) & (expected_radii > 0)
    assert ((radii - expected_radii)[both].abs() <= 1).all()
    # Positions far off the screen are large numbers, hence the relative part.
    torch.testing.assert_close(
        got.means2d.cpu().double()[both], want.means2d.cpu()[both], rtol=1e-5, atol=1e-4
    )
    for name in ("rgb", "alpha", "depth"):
        image, expected = getattr(got, name), getattr(want, name)
        assert (image is None) == (expected is None)
        if image is None:
            continue
        assert image.shape == expected.shape, name
        error = (image.detach().cpu().double() - expected.detach()).abs().amax(-1).flatten()
        assert error.median() <= 2e-6, f"{name}: median error {error.median():.1e}"
        assert error.quantile(0.99) <= 5e-4, f"{name}: 99 % error {error.quantile(0.99):.1e}"
        assert error.amax() <= 0.1 * expected.detach().abs().amax(), f"{name}: {error.amax():.1e}"


def assert_gradients_agree(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """``want`` holds the float64 ones."""
    for name, expected in want.items():
        gradient = got[name].cpu().double()
        assert gradient.shape == expected.shape, name
        total = float((gradient - expected).norm() / expected.norm())
        assert total <= 0.1, f"{name}: relative error {total:.1e}"
        if name == "viewmat":
            continue  # one sum over all rows: rows and quantiles mean nothing
        gradient, expected = (g.reshape(len(g), -1) for g in (gradient, expected))
        size = expected.norm(dim=1)
        reached = size > 0
        # What one decision hides the other may show: see above.
        assert (gradient.any(1) & ~reached).double().mean() <= 5e-3, name
        # A row whose gradient cancels to almost nothing is measured against the others'.
        error = (gradient - expected).norm(dim=1) / (size + 1e-3 * size[reached].median())
        error = error[reached]
        assert error.median() <= 1e-3, f"{name}: median relative error {error.median():.1e}"
        assert error.quantile(0.95) <= 1e-2, f"{name}: 95 % error {error.quantile(0.95):.1e}"
