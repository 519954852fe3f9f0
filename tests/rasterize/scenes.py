"""Random scenes with the awkward cases in them, and cameras to look at them with."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gsscale_nerfstudio.rasterize import Rendering, rasterize
from gsscale_nerfstudio.rasterize.spherical_harmonics import sh_colors


class Camera(NamedTuple):
    viewmat: Tensor
    K: Tensor
    width: int
    height: int

    def to(self, *args: Any) -> Camera:
        return Camera(self.viewmat.to(*args), self.K.to(*args), self.width, self.height)


class Scene(NamedTuple):
    means: Tensor
    quats: Tensor
    scales: Tensor
    opacities: Tensor
    colors: Tensor
    sh_degree: int | None

    def to(self, *args: Any) -> Scene:
        return Scene(*(tensor.to(*args) for tensor in self[:5]), self.sh_degree)

    def leaves(self) -> Scene:
        """Fresh leaf tensors that require gradients."""
        return Scene(*(t.detach().clone().requires_grad_() for t in self[:5]), self.sh_degree)


def camera(width: int, height: int, *, yaw: float = 0.0, focal: float = 1.0) -> Camera:
    """A camera near the origin that looks along +z, turned by ``yaw`` radians about y.

    Its focal lengths differ and its principal point is off the centre, so that a mix-up shows.
    """
    cos, sin = math.cos(yaw), math.sin(yaw)
    viewmat = torch.eye(4, dtype=torch.float64)
    viewmat[:3, :3] = torch.tensor([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
    viewmat[:3, 3] = torch.tensor([0.1, -0.05, 0.2])
    K = torch.zeros(3, 3, dtype=torch.float64)
    K[0, 0], K[1, 1] = focal * width, focal * 1.1 * width
    K[0, 2], K[1, 2], K[2, 2] = 0.52 * width, 0.47 * height, 1
    return Camera(viewmat, K, width, height)


def scene(
    n: int, *, sh_degree: int | None = None, size: float = 0.05, seed: int = 0, bands: int = 16
) -> Scene:
    """``n`` Gaussians in front of :func:`camera`, in float64.

    A tenth each is behind the camera or nearer than the near plane, far to the side, large, needle
    thin, and almost opaque (some beyond 0.999).
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    means = torch.stack([3 * uniform(n) - 1.5, 2.4 * uniform(n) - 1.2, 1 + 4 * uniform(n)], -1)
    scales = size * torch.exp(0.5 * normal(n, 3))
    opacities = 0.05 + 0.9 * uniform(n)
    tenth = torch.arange(n) % 10
    means[tenth == 1, 2] = 0.4 - 2 * uniform(int((tenth == 1).sum()))
    means[tenth == 2, 0] *= 4
    scales[tenth == 3] *= 8
    scales[tenth == 4, 0] *= 6
    scales[tenth == 4, 1:] *= 0.05
    opacities[tenth == 5] = 0.99 + 0.01 * uniform(int((tenth == 5).sum()))
    colors = uniform(n, 3) if sh_degree is None else 0.4 * normal(n, bands, 3)
    return Scene(means, normal(n, 4), scales, opacities, colors, sh_degree)


def empty_scenes() -> list[tuple[str, Scene]]:
    """Scenes of which :func:`camera` sees nothing, by name."""
    behind = scene(7, sh_degree=2)
    behind.means[:, 2] = -3
    nothing = Scene(*(tensor[:0] for tensor in behind[:5]), 2)
    return [("nothing there", nothing), ("all behind", behind)]


def draw(scene: Scene, camera: Camera, **options: Any) -> Rendering:
    """:func:`rasterize` with defaults for what a test is not about."""
    settings = {"depth": False, "absgrad": False, "antialiased": False} | options
    colors = seen_colors(scene, camera)
    return rasterize(*scene[:4], colors, *camera, **settings)


def seen_colors(scene: Scene, camera: Camera) -> Tensor:
    """A scene's colours [n, 3] as a camera sees them."""
    if scene.sh_degree is None:
        return scene.colors
    position = torch.linalg.inv(camera.viewmat)[:3, 3]
    return sh_colors(scene.colors, scene.means - position, scene.sh_degree)


def random_loss(*images: Tensor | None) -> Tensor:
    """A linear functional of images with fixed random weights: every pixel counts differently."""
    generator = torch.Generator().manual_seed(11)
    loss = torch.zeros(())
    for image in images:
        if image is not None:
            weights = torch.randn(image.shape, generator=generator, dtype=torch.float64)
            loss = loss.to(image) + (image * weights.to(image)).sum()
    return loss
