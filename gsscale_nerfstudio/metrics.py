"""What held-out images are evaluated by: PSNR, SSIM, LPIPS, on the GPU or where there is memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from nerfstudio.model_components.lib_bilagrid import color_correct
from pytorch_msssim import SSIM
from torch import Tensor
from torchmetrics.image import PeakSignalNoiseRatio

from gsscale_nerfstudio.errors import warn
from gsscale_nerfstudio.lpips import LazyLPIPS
from gsscale_nerfstudio.out_of_memory import NoRoomError, retried

T = TypeVar("T")


class ImageMetrics:
    """splatfacto's metrics of a render."""

    def __init__(self) -> None:
        self._psnr = PeakSignalNoiseRatio(data_range=1.0)
        self._ssim = SSIM(data_range=1.0, size_average=True, channel=3)
        self._lpips = LazyLPIPS()
        self._told = False

    def compare(self, truth: Tensor, render: Tensor, color_corrected: bool) -> dict[str, float]:
        """psnr, ssim and, where its network is at hand, lpips.

        Args:
            truth, render: [H, W, 3] in 0 .. 1, on the device that is to compute.
            color_corrected: also, as ``cc_psnr`` and so on, with the render's colours fitted.
        """
        metrics = self._metrics(truth, render)
        if color_corrected:
            fitted = self._metrics(truth, color_correct(render, truth))
            metrics |= {f"cc_{name}": value for name, value in fitted.items()}
        return metrics

    def _metrics(self, truth: Tensor, render: Tensor) -> dict[str, float]:
        truth, render = (torch.moveaxis(image, -1, 0)[None] for image in (truth, render))
        metrics = {
            "psnr": float(self._psnr.to(truth.device)(truth, render)),
            "ssim": float(self._ssim(truth, render)),
        }
        lpips = self._lpips(truth, render)
        return metrics if lpips is None else {**metrics, "lpips": float(lpips)}

    def with_room(
        self,
        compute: Callable[[torch.device], T],
        device: torch.device,
        give_back: Callable[[], None],
    ) -> T:
        """``compute(device)``, or on the CPU if the device's memory runs out in it twice.

        Training gives nothing up for it: what metrics need says nothing of what views do.

        Args:
            compute: on the device that it is told.
            device: the model's.
            give_back: lets the device have the memory that torch keeps for later.

        Raises:
            NoRoomError: memory ran out on the CPU, too.
        """

        def make_room(said: str, tries: int) -> None:
            nonlocal device
            if tries > 1:
                raise NoRoomError(
                    f"neither GPU nor CPU have memory for an image's metrics ({said}); free host "
                    "memory, or evaluate smaller images (camera-res-scale-factor)"
                )
            give_back()
            if tries > 0:
                device = torch.device("cpu")
                self._tell(said)

        return retried(lambda: compute(device), make_room)

    def _tell(self, said: str) -> None:
        if not self._told:
            self._told = True
            warn(
                f"GPU memory ran out in an evaluation's metrics ({said}); where it does, they are "
                "computed on the CPU, which takes longer."
            )
