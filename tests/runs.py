"""Small in-process training runs, set up as ns-train does it."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

from gsscale_nerfstudio.config import gsscale
from gsscale_nerfstudio.demo.scene import write_scene
from gsscale_nerfstudio.store import GROUPS
from gsscale_nerfstudio.trainer import GSScaleTrainer, GSScaleTrainerConfig


def tiny_scene(path: Path, images: int = 8, points: int = 300) -> Path:
    return write_scene(path, images=images, width=64, height=48, points=points)


def edit_json(scene: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Apply ``change`` to the scene's transforms."""
    file = scene / "transforms.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def make_config(scene: Path, output: Path, steps: int = 3, **model: Any) -> GSScaleTrainerConfig:
    config = copy.deepcopy(gsscale.config)
    assert isinstance(config, GSScaleTrainerConfig)
    config.data = config.pipeline.datamanager.data = scene
    config.pipeline.datamanager.dataparser = NerfstudioDataParserConfig(  # type: ignore[attr-defined]
        load_3D_points=True, eval_mode="interval", eval_interval=4
    )
    config.machine.device_type = "cpu"
    config.output_dir = output
    config.vis = "tensorboard"
    config.max_num_iterations = steps
    config.set_timestamp()
    config.viewer.quit_on_train_completion = True
    config.pipeline.model.num_downscales = 0  # type: ignore[attr-defined]
    for name, value in model.items():
        assert hasattr(config.pipeline.model, name)
        setattr(config.pipeline.model, name, value)
    return config


def train(config: GSScaleTrainerConfig) -> GSScaleTrainer:
    trainer = config.setup()
    trainer.setup()
    trainer.train()
    return trainer


def rows_of(pipeline: dict, optimizers: dict) -> torch.Tensor:
    """[n, 3 * 59]: each Gaussian's parameters and moments."""
    columns = [pipeline[f"_model.gauss_params.{name}"] for name in GROUPS]
    for moment in ("exp_avg", "exp_avg_sq"):
        columns += [optimizers[name]["state"][0][moment] for name in GROUPS]
    return torch.cat([column.detach().flatten(1) for column in columns], dim=1)


def seeded(seed: int) -> None:
    """Seed all generators, as ns-train does it."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Paths at which two nested states are not the same, bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        found = [f"{where}: {a.keys() ^ b.keys()}"] if a.keys() != b.keys() else []
        return found + [d for k in a if k in b for d in differences(a[k], b[k], f"{where}/{k}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [d for i, (x, y) in pairs for d in differences(x, y, f"{where}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.shape == b.shape and torch.equal(a, b) else [where]
    return [] if a == b else [where]
