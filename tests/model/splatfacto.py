"""splatfacto itself on the CPU, with our rasterizer in gsplat's place."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from nerfstudio.configs.method_configs import method_configs
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.models import splatfacto

from benchmarks import cpu_splatfacto
from tests.runs import make_config


class Network(torch.nn.Module):
    """In LPIPS's place: splatfacto's checkpoints have its weights, and it would be downloaded."""

    def __init__(self, normalize: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self, truth: torch.Tensor, render: torch.Tensor) -> torch.Tensor:
        return (truth - render).abs().mean()


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """splatfacto trains without a GPU, without gsplat's kernels and without a download."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity", Network)
        patch.setattr(splatfacto, "rasterization", cpu_splatfacto.rasterization)
        patch.setattr(torch.Tensor, "cuda", lambda self, *_, **__: self)
        with torch._dynamo.config.patch(disable=True):  # compiling takes longer than a run
            yield


def splatfacto_config(scene: Path, output: Path, steps: int = 3) -> TrainerConfig:
    """``ns-train splatfacto`` on what :func:`tests.runs.make_config` trains gsscale on."""
    ours = make_config(scene, output, steps)
    config = copy.deepcopy(method_configs["splatfacto"])
    for name in ("data", "machine", "output_dir", "vis", "viewer", "max_num_iterations"):
        setattr(config, name, getattr(ours, name))
    config.pipeline.datamanager.data = scene
    config.pipeline.datamanager.dataparser = ours.pipeline.datamanager.dataparser
    config.pipeline.model.num_downscales = 0
    config.set_timestamp()
    return config
