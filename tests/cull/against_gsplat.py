"""What gsplat draws, and what the culler keeps of the same rows.

gsplat's torch projection stands for its kernels; where versions and kernels differ in how large
they draw a row, each rule is written out around it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gsplat.cuda._torch_impl import _fully_fused_projection, _persp_proj, _world_to_cam
from torch import Tensor

from gsscale_nerfstudio.cull import Culler, View

BLUR = 0.3


def gsplat_viewmat(camera_to_world: Tensor) -> Tensor:
    """[4, 4] world -> camera of an OpenGL pose [3, 4], in splatfacto's float32 steps."""
    rotation = (camera_to_world[:, :3] * torch.tensor([1.0, -1.0, -1.0])).T
    viewmat = torch.eye(4)
    viewmat[:3, :3], viewmat[:3, 3] = rotation, -rotation @ camera_to_world[:, 3]
    return viewmat


def drawn_by_torch(means: Tensor, covars: Tensor, view: View, viewmat: Tensor) -> Tensor:
    """Rows [n] bool to which gsplat's own torch projection gives a radius."""
    K = torch.tensor(view.K, dtype=torch.float32)
    radii, *_ = _fully_fused_projection(
        means, covars, viewmat[None], K[None], view.width, view.height, BLUR, view.near, view.far
    )
    # One radius a row, or, since gsplat 1.5, one for each axis.
    return (radii.reshape(len(means), -1) > 0).all(dim=1)


def drawn_with(radius_of: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The kernels' tests of depth and borders, around radii [n, 2] from 2D covariances.

    A window's borders stand for the image's.
    """

    def drawn(means: Tensor, covars: Tensor, view: View, viewmat: Tensor) -> Tensor:
        K = torch.tensor(view.K, dtype=torch.float32)
        left, top, right, bottom = view.whole_window
        low, high = torch.tensor([left, top]), torch.tensor([right, bottom])
        in_camera, covars_in_camera = _world_to_cam(means, covars, viewmat[None])
        centres, covars2d = _persp_proj(
            in_camera, covars_in_camera, K[None], view.width, view.height
        )
        radii = radius_of(covars2d[0] + BLUR * torch.eye(2))
        depths = in_camera[0, :, 2]
        inside = ((centres[0] + radii > low) & (centres[0] - radii < high)).all(dim=1)
        return inside & (depths >= view.near) & (depths <= view.far)

    return drawn


def radius_14_packed(covars2d: Tensor) -> Tensor:
    """Three standard deviations along the longer axis, kept sqrt(0.1) above the mean."""
    mean = covars2d.diagonal(dim1=1, dim2=2).sum(dim=1) / 2
    distance = (mean**2 - torch.linalg.det(covars2d)).clamp(min=0.1).sqrt()
    return torch.ceil(3.0 * (mean + distance).sqrt())[:, None]


def radius_15(covars2d: Tensor) -> Tensor:
    """3.33 standard deviations, per image axis."""
    return torch.ceil(3.33 * covars2d.diagonal(dim1=1, dim2=2).sqrt())


RULES = {
    "torch": drawn_by_torch,
    "1.4 packed": drawn_with(radius_14_packed),
    "1.5": drawn_with(radius_15),
}


def culled(means: Tensor, scales: Tensor, view: View, reach: Tensor | float = 0.0) -> Tensor:
    """Rows [n] bool that a culler keeps."""
    n = len(means)
    culler = Culler(Culler.spheres_of(means, scales, reach), torch.empty(-(-n // 256), 8))
    culler.refresh(n)
    ids = culler.cull(view, n)
    assert ids.dtype == torch.int32 and (ids.diff() > 0).all()
    kept = torch.zeros(n, dtype=torch.bool)
    kept[ids.long()] = True
    return kept
