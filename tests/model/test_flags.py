"""Nerfstudio's flags that reach into the rows; see test_same_as_splatfacto.py, too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gsscale_nerfstudio.cull import View
from gsscale_nerfstudio.engines.working_set import LEAVES
from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.store import GROUPS
from gsscale_nerfstudio.supported import refuse_unsupported
from tests.runs import make_config, tiny_scene, train


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_scene(tmp_path_factory.mktemp("flags") / "scene")


def means_of(trainer) -> torch.Tensor:
    return trainer.pipeline.model.means.clone()


def test_log_gradients_covers_the_gaussians(scene, tmp_path, monkeypatch):
    config = make_config(scene, tmp_path)
    config.log_gradients = True
    trainer = config.setup()
    trainer.setup()
    trainer.pipeline.train()
    for callback in trainer.callbacks:
        callback.run_callback_at_location(0, callback.where_to_run[0])
    _, _, metrics = trainer.train_iteration(0)
    # Those of SH coefficients are formed row by row while rows are stepped.
    for name in GROUPS:
        assert (f"Gradients/gauss_params.{name}" in metrics) == (name in LEAVES)
    assert metrics["Gradients/gauss_params.means"] > 0
    assert metrics["Gradients/Total"] >= metrics["Gradients/gauss_params.means"]


def test_gradient_clipping_clips(scene, tmp_path):
    """Adam divides a constant factor out again; a norm that varies from step to step shows."""
    plain = train(make_config(scene, tmp_path / "plain", steps=6))
    config = make_config(scene, tmp_path / "clipped", steps=6)
    config.optimizers["means"]["optimizer"].max_norm = 1e-9
    clipped = train(config)
    moments = clipped.pipeline.model.engine.store
    norm = moments.column("means", moments.exp_avg).norm()
    assert 0 < norm < 1e-9
    assert not torch.equal(means_of(plain), means_of(clipped))


@pytest.mark.parametrize("name", ["features_dc", "features_rest"])
def test_clipping_of_coefficients_is_refused(scene, tmp_path, capsys, name):
    config = make_config(scene, tmp_path, steps=1)
    config.optimizers[name]["optimizer"].max_norm = 1.0
    with pytest.raises(SystemExit):
        train(config)
    said = " ".join(capsys.readouterr().out.split())
    assert f"--optimizers.{name.replace('_', '-')}.optimizer.max-norm" in said


def test_learning_rate_flags_reach_the_rows(scene, tmp_path):
    config = make_config(scene, tmp_path, steps=4)
    config.optimizers["means"]["optimizer"].lr = 0.0
    config.optimizers["means"]["scheduler"] = None
    trainer = config.setup()
    trainer.setup()
    before = means_of(trainer)
    colors = trainer.pipeline.model.features_dc.clone()
    trainer.train()
    assert torch.equal(means_of(trainer), before)
    assert not torch.equal(trainer.pipeline.model.features_dc, colors)


def test_scale_regularization_has_splatfactos_weight(scene, tmp_path):
    """On a view that sees all rows it is splatfacto's mean over all Gaussians."""
    config = make_config(scene, tmp_path, use_scale_regularization=True, max_gauss_ratio=2.0)
    trainer = config.setup()
    trainer.setup()
    model = trainer.pipeline.model
    everything = model.engine.fetch(View(np.eye(4), np.eye(3), 1, 1))
    scales = torch.randn(len(model.engine.store), 3)
    model.engine.current = replace(everything, leaves={"scales": scales})
    ratio = scales.exp().amax(-1) / scales.exp().amin(-1)
    expected = 0.1 * (torch.maximum(ratio, torch.tensor(2.0)) - 2.0).mean()
    torch.testing.assert_close(model._penalties_of_the_view()["scale_reg"], expected)


def test_moving_the_model_leaves_the_rows(scene, tmp_path):
    trainer = train(make_config(scene, tmp_path, steps=2))
    model = trainer.pipeline.model
    address = model.engine.store.params.data_ptr()
    model.to(torch.float64).to("cpu")
    assert model.engine.store.params.data_ptr() == address
    assert model.means.dtype == torch.float32
    assert model.means.data_ptr() == address  # a view, no copy


def test_metrics_of_steps_that_are_logged(scene, tmp_path):
    config = make_config(scene, tmp_path)
    config.logging.steps_per_log = 3
    trainer = config.setup()
    trainer.setup()
    trainer.pipeline.train()
    has = []
    for step in range(7):
        for callback in trainer.callbacks:
            callback.run_callback_at_location(step, callback.where_to_run[0])
        has.append("psnr" in trainer.train_iteration(step)[2])
    assert has == [step % 3 == 0 for step in range(7)]


def test_several_gpus_are_refused(scene, tmp_path):
    trainer = make_config(scene, tmp_path).setup()
    trainer.setup()
    trainer.world_size = 2
    with pytest.raises(GSScaleError, match=r"--machine\.num-devices 1"):
        refuse_unsupported(trainer.optimizers, trainer)
