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


def assert_none(differences: list[str]) -> None:
    """Fail with all of them: where there is a GPU, one run is to tell everything."""
    assert not differences, "\n".join(differences)


def rendering_differences(got: Rendering, want: Rendering) -> list[str]:
    """What is beyond the bounds, with the largest errors; ``want`` is the float64 one."""
    found = _Findings()
    radii, expected_radii = got.radii.cpu(), want.radii.cpu()
    # ceil() of a rounded number: rarely one more or less, and then perhaps on or off the screen.
    both = (radii > 0) & (expected_radii > 0)
    off = (radii - expected_radii).abs()
    differ, most = (off > 0).double().mean(), torch.where(both, off, 0).amax()
    if differ > 2e-3 or most > 1:
        drawn = f"{int((radii > 0).sum())} and {int((expected_radii > 0).sum())} drawn"
        found.add(f"radii: {differ:.1%} differ, {drawn}, by {most} px", off, radii, expected_radii)
    # Positions far off the screen are large numbers, hence the relative part.
    means2d, expected_means2d = got.means2d.cpu().double(), want.means2d.cpu()
    off = (means2d - expected_means2d).abs() - 1e-5 * expected_means2d.abs()
    off = torch.where(both, off.amax(1), 0)
    found.check("means2d: error", off.amax(), 1e-4, off, means2d, expected_means2d)
    for name in ("rgb", "alpha", "depth"):
        image, expected = getattr(got, name), getattr(want, name)
        if image is None or expected is None:
            assert image is expected, name
            continue
        assert image.shape == expected.shape, name
        image, expected = image.detach().cpu().double(), expected.detach()
        error = (image - expected).abs().amax(-1)
        values = (error, image, expected)
        found.check(f"{name}: median error", error.median(), 2e-6, *values)
        found.check(f"{name}: 99 % error", error.quantile(0.99), 5e-4, *values)
        found.check(f"{name}: error", error.amax(), 0.1 * expected.abs().amax(), *values)
    return found.differences


def gradient_differences(got: dict[str, Tensor], want: dict[str, Tensor]) -> list[str]:
    """What is beyond the bounds, with the largest errors; ``want`` holds the float64 ones."""
    found = _Findings()
    for name, expected in want.items():
        gradient = got[name].cpu().double()
        assert gradient.shape == expected.shape, name
        rows, expected_rows = (g.reshape(len(g), -1) for g in (gradient, expected))
        off = (rows - expected_rows).norm(dim=1)
        values = (off, rows, expected_rows)
        found.check(f"{name}: relative error", off.norm() / expected.norm(), 0.1, *values)
        if name == "viewmat":
            continue  # one sum over all rows: rows and quantiles mean nothing
        size = expected_rows.norm(dim=1)
        reached = size > 0
        # What one decision hides the other may show: see above.
        hidden = rows.any(1) & ~reached
        found.check(f"{name}: rows that it reaches in vain", hidden.double().mean(), 5e-3, *values)
        # A row whose gradient cancels to almost nothing is measured against the others'.
        error = off / (size + 1e-3 * size[reached].median())
        values = (torch.where(reached, error, 0), rows, expected_rows)
        found.check(f"{name}: median relative error", error[reached].median(), 1e-3, *values)
        found.check(f"{name}: 95 % error", error[reached].quantile(0.95), 1e-2, *values)
    return found.differences


class _Findings:
    """What is beyond its bound: each with the largest errors, where they are, and both values."""

    def __init__(self) -> None:
        self.differences: list[str] = []

    def check(
        self, what: str, size: Tensor, bound: float | Tensor, off: Tensor, got: Tensor, want: Tensor
    ) -> None:
        """Take note if ``size`` is above ``bound``, or not a number."""
        if not size <= bound:
            self.add(f"{what} {size:.1e} > {bound:.1e}", off, got, want)

    def add(self, what: str, off: Tensor, got: Tensor, want: Tensor) -> None:
        """Take note. ``off`` are the errors [...], ``got`` and ``want`` [...] or [..., C]."""
        lines = [what]
        for flat in off.flatten().argsort(descending=True)[:5]:
            at = tuple(int(i) for i in torch.unravel_index(flat, off.shape))
            values = " for ".join(
                str([float(f"{value:.5g}") for value in tensor[at].flatten()])
                for tensor in (got, want)
            )
            lines.append(f"  {float(off[at]):.1e} at {list(at)}: {values}")
        self.differences.append("\n".join(lines))
