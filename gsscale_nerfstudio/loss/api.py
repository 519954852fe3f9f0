"""One call for the loss of a view: Triton kernels on CUDA, the reference elsewhere.

The reference takes more time and memory; gradients and values are the same.
"""

from __future__ import annotations

from torch import Tensor

from gsscale_nerfstudio.versions import installed

from .reference import WINDOW_SIZE, photometric_loss_reference

FUSED = installed("triton") >= (3, 4)
"""Whether this Triton compiles the kernels. They keep running sums in tuples and take weights from
one, which earlier versions (of PyTorch up to 2.7) cannot."""


def photometric_loss(render: Tensor, truth: Tensor, ssim_lambda: float) -> Tensor:
    """``(1 - lambda) * mean |truth - render| + lambda * (1 - SSIM(truth, render))``, as splatfacto.

    Nothing here waits for the GPU.

    Args:
        render: Differentiable, values in [0, 1]. [H, W, 3] float32
        truth: No gradient is computed for it. [H, W, 3] float32
        ssim_lambda: Weight of the SSIM term, in [0, 1].

    Returns:
        A scalar on the images' device.
    """
    if not (FUSED and render.is_cuda and min(render.shape[:2]) >= WINDOW_SIZE):
        return photometric_loss_reference(render, truth, ssim_lambda)
    # Imported here: a machine without CUDA can do without Triton.
    from .fused import fused_photometric_loss

    return fused_photometric_loss(render, truth, ssim_lambda)
