"""The photometric loss in plain torch, and the constants of its SSIM."""

from __future__ import annotations

import torch
from pytorch_msssim import SSIM
from torch import Tensor

WINDOW_SIZE = 11  # pixels
WINDOW_SIGMA = 1.5  # pixels
K1, K2 = 0.01, 0.03

_ssim = SSIM(
    data_range=1.0,
    size_average=True,
    win_size=WINDOW_SIZE,
    win_sigma=WINDOW_SIGMA,
    channel=3,
    K=(K1, K2),
)


def photometric_loss_reference(render: Tensor, truth: Tensor, ssim_lambda: float) -> Tensor:
    """The loss of :func:`.api.photometric_loss`, for images of any size and floating dtype.

    A side shorter than the window is not blurred; pytorch_msssim warns of that.
    """
    l1 = torch.abs(truth - render).mean()
    ssim = _ssim(truth.permute(2, 0, 1)[None], render.permute(2, 0, 1)[None])
    return (1 - ssim_lambda) * l1 + ssim_lambda * (1 - ssim)
