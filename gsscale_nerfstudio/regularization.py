"""Terms of the loss that are sums over Gaussians.

splatfacto averages them over all Gaussians. Here each Gaussian has the same weight as there, and a
loss has the terms of the view's. Those of strategy mcmc act on the others, too: see :class:`.Pull`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gsscale_nerfstudio.model_config import GSScaleModelConfig


def term_names(config: GSScaleModelConfig) -> tuple[str, ...]:
    """The terms that a model's settings ask for, under splatfacto's names."""
    names = ["scale_reg"]
    if config.strategy == "mcmc":
        weighted = ("mcmc_opacity_reg", "mcmc_scale_reg")
        names += [name for name in weighted if getattr(config, name) > 0]
    return tuple(names)


def penalties(
    config: GSScaleModelConfig, step: int, n: int, leaves: Mapping[str, Tensor]
) -> Tensor:
    """What some rows add to the terms.

    Args:
        config: weights and schedules.
        step: Nerfstudio's step counter.
        n: number of all Gaussians.
        leaves: of the rows, [m, ...] each.

    Returns:
        One value for each of :func:`term_names`.
    """
    values = {
        "scale_reg": lambda: _needles(config, step, leaves["scales"]) / n,
        "mcmc_opacity_reg": lambda: (
            config.mcmc_opacity_reg * torch.sigmoid(leaves["opacities"]).sum() / n
        ),
        "mcmc_scale_reg": lambda: (
            config.mcmc_scale_reg * torch.exp(leaves["scales"]).sum() / (3 * n)
        ),
    }
    return torch.stack([values[name]() for name in term_names(config)])


def _needles(config: GSScaleModelConfig, step: int, scales: Tensor) -> Tensor:
    """PhysGaussian's penalty of needles with log-scales [m, 3]; 0 at most steps."""
    if not (config.use_scale_regularization and step % 10 == 0):
        return torch.zeros((), device=scales.device)
    scales = torch.exp(scales)
    ratio = scales.amax(dim=-1) / scales.amin(dim=-1)
    return 0.1 * torch.clamp_min(ratio - config.max_gauss_ratio, 0.0).sum()
