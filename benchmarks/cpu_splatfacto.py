"""Stock splatfacto on a machine without a GPU, with gsscale's reference rasterizer for gsplat's.

What is left of splatfacto is what gsscale replaces: dense Adam, gsplat's densification, the order
of images. So a comparison on the CPU tells these apart from everything that a GPU does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

METHODS = ("splatfacto", "splatfacto-big", "splatfacto-mcmc")


class _ScreenGradients:
    """What gsplat's strategy asks of ``info["means2d"]``, for one camera."""

    def __init__(self, node: Tensor) -> None:
        self._node = node

    def retain_grad(self) -> None:
        """The rendering has seen to it."""

    @property
    def grad(self) -> Tensor:
        assert self._node.grad is not None
        return self._node.grad.reshape(1, -1, 2)

    @property
    def absgrad(self) -> Tensor:
        return self._node.absgrad.reshape(1, -1, 2)  # type: ignore[attr-defined]


def rasterization(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    near_plane: float,
    far_plane: float,
    render_mode: str,
    sh_degree: int | None,
    absgrad: bool,
    rasterize_mode: str,
    packed: bool = False,
    sparse_grad: bool = False,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """``gsplat.rasterization`` for one camera, as splatfacto calls it."""
    from gsscale_nerfstudio.rasterize import rasterize
    from gsscale_nerfstudio.rasterize.projection import PER_AXIS
    from gsscale_nerfstudio.rasterize.spherical_harmonics import sh_colors

    if packed or sparse_grad or len(viewmats) != 1:
        raise NotImplementedError("only what nerfstudio 1.1.5's splatfacto asks for")
    if sh_degree is not None:
        position = torch.linalg.inv(viewmats[0])[:3, 3]
        colors = sh_colors(colors, means - position, sh_degree)
    drawn = rasterize(
        means,
        quats,
        scales,
        opacities,
        colors,
        viewmats[0],
        Ks[0],
        width,
        height,
        depth="ED" in render_mode,
        absgrad=absgrad,
        antialiased=rasterize_mode == "antialiased",
        near=near_plane,
        far=far_plane,
    )
    image = drawn.rgb if drawn.depth is None else torch.cat([drawn.rgb, drawn.depth], dim=-1)
    radii = drawn.radii[None]
    info = {
        "means2d": _ScreenGradients(drawn.means2d_node),
        # The strategy looks at the longer one of two.
        "radii": torch.stack([radii, radii], dim=-1) if PER_AXIS else radii,
        "width": width,
        "height": height,
        "n_cameras": 1,
        "gaussian_ids": None,
    }
    return image[None], drawn.alpha[None], info


def relocation(
    opacities: Tensor, scales: Tensor, ratios: Tensor, binoms: Tensor
) -> tuple[Tensor, Tensor]:
    """``gsplat.relocation.compute_relocation``, by gsscale's formula."""
    from gsscale_nerfstudio.densify.relocation import share_out
    from gsscale_nerfstudio.store import RowLayout

    layout = RowLayout(0)
    rows = torch.zeros(len(opacities), layout.width)
    rows[:, layout.columns["opacities"]] = torch.logit(opacities).view(-1, 1)
    rows[:, layout.columns["scales"]] = torch.log(scales)
    share_out(rows, ratios, layout, min_opacity=0.0)
    shared = rows[:, layout.columns["opacities"]].view_as(opacities)
    return torch.sigmoid(shared), torch.exp(rows[:, layout.columns["scales"]])


def let_it_run() -> None:
    """Change splatfacto, and gsplat's MCMCStrategy, in this process, for good."""
    from gsplat.cuda import _torch_impl
    from gsplat.strategy import ops
    from nerfstudio.models import splatfacto

    ops.compute_relocation = lambda **given: relocation(**given)
    ops.quat_scale_to_covar_preci = _torch_impl._quat_scale_to_covar_preci

    splatfacto.rasterization = rasterization
    # It moves intrinsics and seed colours to a GPU, whatever the device.
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
