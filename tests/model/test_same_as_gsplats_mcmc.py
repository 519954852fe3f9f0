"""gsscale's strategy mcmc beside splatfacto with gsplat's own MCMCStrategy, trained on the CPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from gsplat.cuda import _torch_impl

from benchmarks import cpu_splatfacto, mcmc_splatfacto
from tests.model.splatfacto import on_the_cpu, splatfacto_config
from tests.runs import make_config, seeded, tiny_scene

STEPS = 101
SETTINGS = dict(warmup_length=5, refine_every=10, sh_degree=1, max_gs_num=420, num_downscales=0)


def trained(config: Any, **settings: Any) -> Any:
    for name, value in {**SETTINGS, **settings}.items():
        setattr(config.pipeline.model, name, value)
    seeded(5)
    trainer = config.setup()
    trainer.setup()
    trainer.train()
    return trainer


def psnr_of(trainer: Any) -> float:
    trainer.pipeline.eval()
    return trainer.pipeline.get_average_eval_image_metrics()["psnr"]


@pytest.fixture(autouse=True)
def _gsplat_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def covariances(*args: Any, **kwargs: Any) -> Any:
        return _torch_impl._quat_scale_to_covar_preci(*args, **kwargs)

    monkeypatch.setattr("gsplat.strategy.ops.compute_relocation", cpu_splatfacto.relocation)
    monkeypatch.setattr("gsplat.strategy.ops.quat_scale_to_covar_preci", covariances)


def test_it_grows_as_large_and_looks_as_good(tmp_path: Path) -> None:
    """Random numbers differ; what comes out does not."""
    scene = tiny_scene(tmp_path / "scene")
    theirs = splatfacto_config(scene, tmp_path / "theirs", STEPS)
    theirs.pipeline.model = copy.deepcopy(mcmc_splatfacto.method.config.pipeline.model)
    with on_the_cpu():
        dense = trained(theirs)
        expected = psnr_of(dense)
    ours = trained(make_config(scene, tmp_path / "ours", STEPS), strategy="mcmc")
    assert ours.pipeline.model.num_points == dense.pipeline.model.num_points == 420
    assert psnr_of(ours) == pytest.approx(expected, abs=0.4)
    opacities = [
        torch.sigmoid(trainer.pipeline.model.opacities.detach()).mean().item()
        for trainer in (ours, dense)
    ]
    assert opacities[0] == pytest.approx(opacities[1], rel=0.1)
