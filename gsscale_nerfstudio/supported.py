"""Which of Nerfstudio's training settings can be honoured."""

from __future__ import annotations

from typing import Any

import torch
from nerfstudio.engine.optimizers import Optimizers

from gsscale_nerfstudio.engines.working_set import LEAVES
from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.optim import DeferredAdam
from gsscale_nerfstudio.store import GROUPS


def require_device(device: str) -> None:
    """Stop before anything is loaded if there is no such device.

    Raises:
        GSScaleError: it is a GPU, and there is none.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise GSScaleError(
            "--machine.device-type cuda needs a GPU, and torch finds none (does nvidia-smi? is "
            "CUDA_VISIBLE_DEVICES empty? was PyTorch built for CUDA?); leave it out to train on "
            "the CPU"
        )


def require_one_process(count: int) -> None:
    """Stop where Nerfstudio would train, or trains, in several processes.

    Raises:
        GSScaleError: there are more than one.
    """
    if count > 1:
        raise GSScaleError("training on several GPUs is not supported; use --machine.num-devices 1")


def refuse_unsupported(optimizers: Optimizers, trainer: Any) -> None:
    """Stop before the first step if a setting of the run cannot be honoured.

    Raises:
        GSScaleError: names the setting and what to do.
    """
    if trainer.config.max_num_iterations < 1:
        raise GSScaleError(
            "--max-num-iterations is the number of steps to train: 1 or more, not "
            f"{trainer.config.max_num_iterations}"
        )
    if trainer.config.logging.steps_per_log < 1:
        raise GSScaleError(
            "--logging.steps-per-log is the number of steps from one line of the log to the next: "
            f"1 or more, not {trainer.config.logging.steps_per_log}"
        )
    for name in GROUPS:
        if not isinstance(optimizers.optimizers[name], DeferredAdam):
            raise GSScaleError(
                f"the optimizer of '{name}' is {type(optimizers.optimizers[name]).__name__}; rows "
                "in host memory are optimized by DeferredAdam (DeferredAdamConfig), whose results "
                "are Adam's"
            )
        clipped = trainer.config.optimizers[name]["optimizer"].max_norm is not None
        if clipped and name not in LEAVES:
            raise GSScaleError(
                f"the gradient of '{name}' cannot be clipped, because it is never there as a "
                "whole: it is formed row by row while rows are stepped; remove "
                f"--optimizers.{name.replace('_', '-')}.optimizer.max-norm"
            )
        if trainer.gradient_accumulation_steps[name] != 1:
            raise GSScaleError(
                f"gradient accumulation for '{name}' is not supported, because each step has its "
                "own working set; remove --gradient-accumulation-steps for the Gaussians"
            )
    if trainer.mixed_precision or trainer.use_grad_scaler:
        raise GSScaleError(
            "mixed precision and gradient scaling are not supported (splatfacto trains in float32 "
            "too); remove --mixed-precision and --use-grad-scaler"
        )
    require_one_process(trainer.world_size)
