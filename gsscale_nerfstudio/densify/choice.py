"""Which strategy grows the scene."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nerfstudio.models.splatfacto import SplatfactoModelConfig

from gsscale_nerfstudio.densify.mcmc import RowMCMCStrategy
from gsscale_nerfstudio.densify.strategy import RowStrategy, pause_after_reset
from gsscale_nerfstudio.errors import GSScaleError

if TYPE_CHECKING:
    from gsscale_nerfstudio.model_config import GSScaleModelConfig

_FLAGS = {
    "default": (
        "densify_grad_thresh",
        "densify_size_thresh",
        "split_screen_size",
        "cull_scale_thresh",
        "cull_screen_size",
        "stop_screen_size_at",
        "reset_alpha_every",
        "use_absgrad",
    ),
    "mcmc": ("max_gs_num", "noise_lr", "mcmc_opacity_reg", "mcmc_scale_reg"),
}
"""What is said to one strategy only."""

_CULL_ALPHA_THRESH = {"default": SplatfactoModelConfig.cull_alpha_thresh, "mcmc": 0.005}
"""Where none is given. With gsplat's MCMC strategy splatfacto's would relocate what the scene
consists of."""


def make_strategy(config: GSScaleModelConfig, num_images: int) -> RowStrategy | RowMCMCStrategy:
    """The strategy that ``config`` names.

    Args:
        config: the model's.
        num_images: in the training set.

    Raises:
        GSScaleError: flags of the other strategy were set, or values that mean nothing.
    """
    _refuse(config)
    threshold = config.cull_alpha_thresh
    if threshold is None:
        threshold = _CULL_ALPHA_THRESH[config.strategy]
    if config.strategy == "mcmc":
        return RowMCMCStrategy(
            cap_max=config.max_gs_num,
            noise_lr=config.noise_lr,
            refine_start_iter=config.warmup_length,
            refine_stop_iter=config.stop_split_at,
            refine_every=config.refine_every,
            min_opacity=threshold,
            verbose=True,
            opacity_reg=config.mcmc_opacity_reg,
            scale_reg=config.mcmc_scale_reg,
        )
    reset_every = config.reset_alpha_every * config.refine_every
    return RowStrategy(
        prune_opa=threshold,
        grow_grad2d=config.densify_grad_thresh,
        grow_scale3d=config.densify_size_thresh,
        grow_scale2d=config.split_screen_size,
        prune_scale3d=config.cull_scale_thresh,
        prune_scale2d=config.cull_screen_size,
        refine_scale2d_stop_iter=config.stop_screen_size_at,
        refine_start_iter=config.warmup_length,
        refine_stop_iter=config.stop_split_at,
        reset_every=reset_every,
        refine_every=config.refine_every,
        pause_refine_after_reset=pause_after_reset(num_images, config.refine_every, reset_every),
        absgrad=config.use_absgrad,
        revised_opacity=False,
        verbose=True,
    )


def _refuse(config: GSScaleModelConfig) -> None:
    for name in ("refine_every", "reset_alpha_every"):
        if getattr(config, name) < 1:
            raise GSScaleError(
                f"--pipeline.model.{name.replace('_', '-')} is how often: 1 or more, not "
                f"{getattr(config, name)}; --pipeline.model.stop-split-at 0 ends all of it"
            )
    other = "default" if config.strategy == "mcmc" else "mcmc"
    lost = [name for name in _FLAGS[other] if getattr(config, name) != getattr(type(config), name)]
    if lost:
        flags = ", ".join(f"--pipeline.model.{name.replace('_', '-')}" for name in lost)
        raise GSScaleError(
            f"strategy {config.strategy} has no use for {flags}: only strategy {other} has; leave "
            f"them at their defaults, or train with --pipeline.model.strategy {other}"
        )
    if config.max_gs_num < 1:
        raise GSScaleError(
            f"--pipeline.model.max-gs-num must be at least 1, not {config.max_gs_num}"
        )
    threshold = config.cull_alpha_thresh
    if threshold is not None and not 0 <= threshold < 1:
        raise GSScaleError(
            f"--pipeline.model.cull-alpha-thresh is an opacity: 0 or more and below 1, not "
            f"{threshold}"
        )
    for name in ("noise_lr", "mcmc_opacity_reg", "mcmc_scale_reg"):
        if not 0 <= getattr(config, name) < float("inf"):
            raise GSScaleError(
                f"{name.replace('_', '-')} must be 0 or more, not {getattr(config, name)}; 0 turns "
                "it off"
            )
