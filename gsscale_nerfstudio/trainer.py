"""Nerfstudio's trainer, with checkpoints that cannot be lost and errors a user can read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.utils.decorators import check_main_thread

from gsscale_nerfstudio import checkpoint
from gsscale_nerfstudio.errors import readable_errors


@dataclass
class GSScaleTrainerConfig(TrainerConfig):
    """Trainer configuration of gsscale."""

    _target: type = field(default_factory=lambda: GSScaleTrainer)

    def get_checkpoint_dir(self) -> Path:
        """Folder of this run's checkpoints.

        ``ns-eval`` and its siblings ask for it and then load the newest file there, come what may.
        This is the last moment to steer them past a damaged one.
        """
        folder = super().get_checkpoint_dir()
        if self.load_step is None:
            with readable_errors():
                self.load_step = checkpoint.newest_step(folder)
        return folder


class GSScaleTrainer(Trainer):
    """What ``ns-train gsscale`` runs."""

    def setup(self, test_mode: Literal["test", "val", "inference"] = "val") -> None:
        with readable_errors():
            super().setup(test_mode)

    def train(self) -> None:
        with readable_errors():
            super().train()

    def _load_checkpoint(self) -> None:
        config = self.config
        if config.load_dir is not None:
            if config.load_step is None:
                config.load_step = checkpoint.newest_step(config.load_dir)
            checkpoint.require_whole(config.load_dir / f"step-{config.load_step or 0:09d}.ckpt")
        elif config.load_checkpoint is not None:
            checkpoint.require_whole(config.load_checkpoint)
        super()._load_checkpoint()

    @check_main_thread
    def save_checkpoint(self, step: int) -> None:
        """Write ``step-NNNNNNNNN.ckpt``, in Nerfstudio's format, atomically."""
        path = self.checkpoint_dir / f"step-{step:09d}.ckpt"
        # Taken between steps, but Nerfstudio lets the viewer's thread render at that time.
        with self.train_lock:
            state = {
                "step": step,
                "pipeline": self.pipeline.state_dict(),
                "optimizers": {k: v.state_dict() for k, v in self.optimizers.optimizers.items()},
                "schedulers": {k: v.state_dict() for k, v in self.optimizers.schedulers.items()},
                "scalers": self.grad_scaler.state_dict(),
            }
        checkpoint.save(state, path, scratch=self.base_dir)
        if self.config.save_only_latest_checkpoint:
            for other in self.checkpoint_dir.glob("*.ckpt"):
                if other != path:
                    other.unlink()
