"""Checkpoints of splatfacto and of gsscale are the same to each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gsscale_nerfstudio import checkpoint
from gsscale_nerfstudio.store import GROUPS
from tests.runs import make_config, tiny_scene, train


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_scene(tmp_path_factory.mktemp("checkpoint") / "scene")


def test_a_checkpoint_as_splatfacto_writes_it_is_taken_over(scene, tmp_path):
    """Rows, moments and step; the LPIPS network and numpy's scalars do not get in the way."""
    source = train(make_config(scene, tmp_path / "source", steps=5))
    state = torch.load(next(source.checkpoint_dir.glob("*.ckpt")))
    state["pipeline"]["_model.lpips.net.weight"] = torch.zeros(3)
    state["optimizers"]["means"]["param_groups"][0]["lr"] = np.float64(1e-4)
    state["schedulers"]["means"]["_last_lr"] = [np.float64(1e-4)]
    folder = tmp_path / "splatfacto"
    folder.mkdir()
    torch.save(state, folder / "step-000000004.ckpt")

    config = make_config(scene, tmp_path / "resumed", steps=1)
    config.load_dir = folder
    trainer = config.setup()
    trainer.setup()
    engine = trainer.pipeline.model.engine
    assert engine.step_count == 5 and trainer._start_step == 5
    for name in GROUPS:
        assert torch.equal(
            engine.store.column(name), state["pipeline"][f"_model.gauss_params.{name}"]
        )
        moments = state["optimizers"][name]["state"][0]
        assert torch.equal(engine.store.column(name, engine.store.exp_avg), moments["exp_avg"])
        assert torch.equal(
            engine.store.column(name, engine.store.exp_avg_sq), moments["exp_avg_sq"]
        )
    assert (engine.store.bookkeeping("stamp") == 5).all()


def test_torch_adam_loads_what_deferred_adam_saves(scene, tmp_path):
    trainer = train(make_config(scene, tmp_path, steps=3))
    state = torch.load(next(trainer.checkpoint_dir.glob("*.ckpt")))
    for name in GROUPS:
        rows = torch.nn.Parameter(state["pipeline"][f"_model.gauss_params.{name}"])
        adam = torch.optim.Adam([rows], lr=0.1)
        adam.load_state_dict(state["optimizers"][name])
        rows.grad = torch.ones_like(rows)
        adam.step()
        assert adam.state[rows]["step"] == 4


def test_files_hold_no_numpy_scalars():
    """Older and newer torch and numpy must read what we write."""
    nested = {"a": [np.float64(1.5), (np.int64(2), {"b": np.float32(0.5)})], "c": torch.ones(2)}
    plain = checkpoint.plain(nested)
    assert type(plain["a"][0]) is float and type(plain["a"][1][0]) is int
    assert type(plain["a"][1][1]["b"]) is float and plain["c"] is nested["c"]
