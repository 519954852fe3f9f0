"""LPIPS, built when it is first asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gsscale_nerfstudio.errors import warn


class LazyLPIPS:
    """The LPIPS metric where its weights can be had, None where they cannot.

    torchmetrics downloads AlexNet when the metric is built, so splatfacto does not even start on an
    offline machine. This one is built at the first evaluation; if that fails, one warning is
    printed and the metric is left out. It is no submodule, so checkpoints do not carry the network.
    """

    def __init__(self) -> None:
        self._metric: Any = None
        self._unavailable = False

    def __call__(self, truth: Tensor, render: Tensor) -> Tensor | None:
        """LPIPS of two image batches [1, 3, H, W] in 0 .. 1, or None."""
        if self._metric is None and not self._unavailable:
            try:
                from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

                # The network draws its first weights, and training is to draw what it would have
                # drawn without an evaluation: a resumed run may evaluate earlier or later.
                with torch.random.fork_rng(devices=[]):
                    self._metric = LearnedPerceptualImagePatchSimilarity(normalize=True)
            except Exception as error:  # whatever a missing network or package raises
                self._unavailable = True
                warn(
                    "LPIPS is left out of the metrics: its weights could not be loaded "
                    f"({type(error).__name__}). With a network they are downloaded at the first "
                    "evaluation."
                )
        if self._metric is None:
            return None
        # cuDNN may take gigabytes for its fastest convolutions where the GPU has them, whatever the
        # budget says; PyTorch's own unfold one layer's input at a time.
        with torch.backends.cudnn.flags(enabled=False):
            return self._metric.to(truth.device)(truth, render)
