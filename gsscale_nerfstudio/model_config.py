"""The model's options: splatfacto's and gsscale's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nerfstudio.models.splatfacto import SplatfactoModelConfig


def _model() -> type:
    from gsscale_nerfstudio.model import GSScaleModel

    return GSScaleModel


@dataclass
class GSScaleModelConfig(SplatfactoModelConfig):
    """splatfacto's options; memory, engine, moments and strategy are gsscale's."""

    _target: type = field(default_factory=_model)
    max_gaussians: int | None = None
    """Largest number of Gaussians. Each takes 784 bytes of host memory at SH degree 3 (528 with
    moments of 16 bits). When the limit is reached, densification goes on with the most needed ones
    only. Training does not begin if host memory cannot hold them. Unset: as many as host memory
    holds at the time. GPU memory and speed depend on the Gaussians that a view sees, not on
    this."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """How Adam's two moments of each Gaussian are kept. "bfloat16" (16 bits, rounded
    stochastically) takes a third less host memory (528 bytes a Gaussian instead of 784 at SH degree
    3), sends a third less over the link between host and GPU, and lets the resident engine's cache
    hold half as many Gaussians again. It is no longer exactly dense Adam, but of the same quality
    on three scenes."""
    engine: Literal["auto", "host", "resident"] = "auto"
    """Where Adam runs. "resident": on the GPU, in a cache of Gaussians that takes GPU memory up to
    the budget; fast. "host": on the CPU; takes the least GPU memory, 700 to 1020 bytes for
    each Gaussian that a view sees, and is slower. "auto": resident where there is a GPU, until the
    measured rates of link and host memory say that the other one is clearly faster."""
    strategy: Literal["default", "mcmc"] = "default"
    """How the scene grows. "default": splatfacto's cloning, splitting and pruning by gradients.
    "mcmc": gsplat's MCMCStrategy. Each step adds noise to faint Gaussians; each refinement
    relocates those with an opacity of at most 0.005 (or cull-alpha-thresh, if that is set) to
    opaque ones, and grows the scene by 5 %, up to max-gs-num."""
    max_gs_num: int = 1_000_000
    """Largest number of Gaussians with strategy mcmc; max-gaussians, if set, holds, too."""
    noise_lr: float = 5e5
    """Size of strategy mcmc's noise, as a multiple of the means' learning rate; 0 for none."""
    mcmc_opacity_reg: float = 0.01
    """Weight of the mean opacity in the loss, with strategy mcmc."""
    mcmc_scale_reg: float = 0.01
    """Weight of the mean scale in the loss, with strategy mcmc."""
    cull_alpha_thresh: float | None = None  # type: ignore[assignment]
    """Opacity below which a Gaussian is removed; with strategy mcmc, up to which it is relocated.
    Unset: splatfacto's 0.1, with mcmc gsplat's 0.005."""
    vram_budget_gb: float | None = None
    """GPU memory, in 10^9 bytes, that training may take in all, CUDA's own included. The larger,
    the fewer Gaussians cross the link between host and GPU with the resident engine. Views for
    which it is too small are drawn in parts. Unset: 90 % of what is free, which is also the most
    that is ever taken. The viewer can change it while training."""


@dataclass
class GSScaleBigModelConfig(GSScaleModelConfig):
    """The same with splatfacto-big's defaults: with them, nothing was asked for by the user."""

    cull_alpha_thresh: float | None = 0.005
    densify_grad_thresh: float = 0.0005
