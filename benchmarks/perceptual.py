"""How different two images look, by measures that need no trained weights."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.errors import BenchmarkError

SMALLEST = 161
"""Pixels of the shorter side from which on MS-SSIM's five scales have a window each."""


def check(shorter_side: int) -> None:
    """Raise where :func:`measures` cannot be had.

    Args:
        shorter_side: of the images, in pixels.

    Raises:
        BenchmarkError: FLIP's package is missing, or images are too small.
    """
    try:
        import flip_evaluator  # noqa: F401
    except ImportError as error:
        raise BenchmarkError(
            "--perceptual needs FLIP: pip install flip-evaluator, or leave it out"
        ) from error
    if shorter_side < SMALLEST:
        raise BenchmarkError(
            f"--perceptual needs images of {SMALLEST} pixels and more to a side, not "
            f"{shorter_side}; leave it out"
        )


@torch.no_grad()
def measures(truth: Tensor, render: Tensor) -> dict[str, float]:
    """MS-SSIM (1 is alike) and the mean of FLIP (0 is alike; sRGB, 67 pixels to the degree).

    Args:
        truth: [H, W, 3], in [0, 1].
        render: likewise.
    """
    import flip_evaluator
    from pytorch_msssim import ms_ssim

    def batch(image: Tensor) -> Tensor:
        return image.clamp(0, 1).permute(2, 0, 1)[None]

    def array(image: Tensor) -> np.ndarray:
        return np.ascontiguousarray(image.clamp(0, 1).float().cpu().numpy())

    _, flip, _ = flip_evaluator.evaluate(array(truth), array(render), "LDR", applyMagma=False)
    return {
        "ms_ssim": float(ms_ssim(batch(truth), batch(render), data_range=1.0)),
        "flip": float(flip),
    }
