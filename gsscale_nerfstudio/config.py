"""The registered methods: every default in one place, and splatfacto's where we have no reason."""

from __future__ import annotations

import torch
from nerfstudio.configs.base_config import MachineConfig, ViewerConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.engine.schedulers import ExponentialDecaySchedulerConfig
from nerfstudio.plugins.types import MethodSpecification

from gsscale_nerfstudio.checkpoint import allow_numpy_scalars
from gsscale_nerfstudio.datamanager import GSScaleDatamanagerConfig
from gsscale_nerfstudio.model_config import GSScaleBigModelConfig, GSScaleModelConfig
from gsscale_nerfstudio.optim import DeferredAdamConfig
from gsscale_nerfstudio.pipeline import GSScalePipelineConfig
from gsscale_nerfstudio.trainer import GSScaleTrainerConfig

# Nerfstudio imports this module in every command that may load a checkpoint.
allow_numpy_scalars()

_STEPS = 30000
_EPS = 1e-15


def _rows(lr: float, lr_final: float | None = None) -> dict:
    """Optimizer of one group of row columns."""
    scheduler = None
    if lr_final is not None:
        scheduler = ExponentialDecaySchedulerConfig(lr_final=lr_final, max_steps=_STEPS)
    return {"optimizer": DeferredAdamConfig(lr=lr, eps=_EPS), "scheduler": scheduler}


def _module(lr: float, lr_final: float) -> dict:
    """Optimizer of an ordinary module on the device."""
    return {
        "optimizer": AdamOptimizerConfig(lr=lr, eps=_EPS),
        "scheduler": ExponentialDecaySchedulerConfig(
            lr_final=lr_final, max_steps=_STEPS, warmup_steps=1000, lr_pre_warmup=0
        ),
    }


def _trainer(name: str, model: GSScaleModelConfig, grid_lr: float) -> GSScaleTrainerConfig:
    return GSScaleTrainerConfig(
        method_name=name,
        # Without a GPU Nerfstudio's default device would end in a CUDA error.
        machine=MachineConfig(device_type="cuda" if torch.cuda.is_available() else "cpu"),
        steps_per_eval_image=100,
        steps_per_eval_batch=0,
        steps_per_save=2000,
        steps_per_eval_all_images=1000,
        max_num_iterations=_STEPS,
        mixed_precision=False,
        pipeline=GSScalePipelineConfig(
            datamanager=GSScaleDatamanagerConfig(
                dataparser=NerfstudioDataParserConfig(load_3D_points=True),
                cache_images_type="uint8",
            ),
            model=model,
        ),
        optimizers={
            "means": _rows(1.6e-4, lr_final=1.6e-6),
            "features_dc": _rows(0.0025),
            "features_rest": _rows(0.0025 / 20),
            "opacities": _rows(0.05),
            "scales": _rows(0.005),
            "quats": _rows(0.001),
            "camera_opt": _module(1e-4, lr_final=5e-7),
            "bilateral_grid": _module(grid_lr, lr_final=1e-4),
        },
        viewer=ViewerConfig(num_rays_per_chunk=1 << 15),
        vis="viewer",
    )


gsscale = MethodSpecification(
    config=_trainer("gsscale", GSScaleModelConfig(), grid_lr=2e-3),
    description="splatfacto for scenes larger than the GPU: all Gaussians live in host memory.",
)

gsscale_big = MethodSpecification(
    config=_trainer(
        "gsscale-big",
        GSScaleBigModelConfig(),
        grid_lr=5e-3,
    ),
    description="gsscale with more Gaussians and higher quality, as splatfacto-big.",
)
