"""The host runs ahead of the device: what it waits for in a step is known and counted."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from gsscale_nerfstudio.trainer import GSScaleTrainer
from tests.runs import make_config, tiny_scene, train

WARMUP, STEPS = 12, 5
WAIT = "called a synchronizing"
"""What torch says of a wait. The first time that it is asked to, it says that it may miss some."""


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["host", "resident"])
def test_a_step_waits_within_no_call_of_torch(tmp_path, monkeypatch, engine):
    """Such a call waits inside of the driver, which keeps out the engine's worker for as long.

    The one wait for the number of listed tiles, and those for gradients and rows, are for events.
    """
    waits: list[str] = []
    one_step = GSScaleTrainer.train_iteration

    def train_iteration(self: GSScaleTrainer, step: int) -> Any:
        if step < WARMUP:
            return one_step(self, step)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return one_step(self, step)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                waits.extend(
                    f"step {step}: {w.filename}:{w.lineno}" for w in said if WAIT in str(w.message)
                )

    monkeypatch.setattr(GSScaleTrainer, "train_iteration", train_iteration)
    config = make_config(
        tiny_scene(tmp_path / "scene"),
        tmp_path / "out",
        steps=WARMUP + STEPS,
        engine=engine,
        warmup_length=1000,
    )
    config.machine.device_type = "cuda"
    config.logging.steps_per_log = 1000  # what is logged is read from the device
    train(config)
    assert not waits


@pytest.mark.gpu
def test_torch_tells_of_its_waits() -> None:
    """What the test above listens to."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        torch.ones(1, device="cuda").item()
        torch.cuda.set_sync_debug_mode("default")
    assert any(WAIT in str(w.message) for w in said)
