"""splatfacto with gsplat's own MCMCStrategy: what gsscale's strategy mcmc is to be compared with.

Nerfstudio 1.1.5 has no such method, so it is named to Nerfstudio by an environment variable:

    NERFSTUDIO_METHOD_CONFIGS=splatfacto-mcmc=benchmarks.mcmc_splatfacto:method \\
    python benchmarks/compare.py --scene DIR --steps 30000 --methods splatfacto-mcmc gsscale \\
        --overrides pipeline.model.stop-split-at=25000 gsscale:pipeline.model.strategy=mcmc

Everything is on the device and dense: each step adds noise to all Gaussians and pulls at all of
them. Flags and defaults are gsscale's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from gsplat.strategy import MCMCStrategy
from nerfstudio.configs.method_configs import method_configs
from nerfstudio.models.splatfacto import SplatfactoModel, SplatfactoModelConfig
from nerfstudio.plugins.types import MethodSpecification
from torch import Tensor


@dataclass
class MCMCModelConfig(SplatfactoModelConfig):
    """splatfacto's options, and those of the strategy."""

    _target: type = field(default_factory=lambda: MCMCModel)
    cull_alpha_thresh: float = 0.005
    max_gs_num: int = 1_000_000
    noise_lr: float = 5e5
    mcmc_opacity_reg: float = 0.01
    mcmc_scale_reg: float = 0.01


class MCMCModel(SplatfactoModel):
    """splatfacto that grows by relocation."""

    config: MCMCModelConfig

    def populate_modules(self) -> None:
        super().populate_modules()
        config = self.config
        self.strategy = _Strategy(
            cap_max=config.max_gs_num,
            noise_lr=config.noise_lr,
            refine_start_iter=config.warmup_length,
            refine_stop_iter=config.stop_split_at,
            refine_every=config.refine_every,
            min_opacity=config.cull_alpha_thresh,
            verbose=True,
        )
        self.strategy_state = self.strategy.initialize_state()

    def step_cb(self, optimizers: Any, step: int) -> None:
        super().step_cb(optimizers, step)
        self.schedulers = optimizers.schedulers

    def step_post_backward(self, step: int) -> None:
        with torch.no_grad():
            self.strategy.step_post_backward(
                params=self.gauss_params,
                optimizers=self.optimizers,
                state=self.strategy_state,
                step=step,
                info=self.info,
                lr=self.schedulers["means"].get_last_lr()[0],
            )

    def get_loss_dict(
        self, outputs: Any, batch: Any, metrics_dict: Any = None
    ) -> dict[str, Tensor]:
        losses = super().get_loss_dict(outputs, batch, metrics_dict)
        opacities, scales = torch.sigmoid(self.opacities), torch.exp(self.scales)
        losses["mcmc_opacity_reg"] = self.config.mcmc_opacity_reg * opacities.mean()
        losses["mcmc_scale_reg"] = self.config.mcmc_scale_reg * scales.mean()
        return losses


class _Strategy(MCMCStrategy):
    """With what splatfacto asks of any strategy."""

    absgrad = False


def _config() -> Any:
    config: Any = copy.deepcopy(method_configs["splatfacto"])
    config.method_name = "splatfacto-mcmc"
    config.pipeline.model = MCMCModelConfig()
    return config


method = MethodSpecification(config=_config(), description="splatfacto with gsplat's MCMCStrategy.")
