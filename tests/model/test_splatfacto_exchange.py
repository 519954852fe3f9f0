"""Checkpoints go from splatfacto to gsscale and back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.models.splatfacto import SplatfactoModel

from gsscale_nerfstudio.model import GSScaleModel
from gsscale_nerfstudio.store.order import morton_order
from tests.model import splatfacto
from tests.model.splatfacto import splatfacto_config
from tests.runs import make_config, rows_of, tiny_scene, train


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_scene(tmp_path_factory.mktemp("exchange") / "scene", points=120)


@pytest.fixture
def on_the_cpu() -> Iterator[None]:
    with splatfacto.on_the_cpu():
        yield


def test_splatfactos_checkpoint_goes_on_in_gsscale(on_the_cpu, scene, tmp_path, capsys):
    source = train(splatfacto_config(scene, tmp_path / "splatfacto", steps=4))
    assert type(source.pipeline.model) is SplatfactoModel
    state = torch.load(source.checkpoint_dir / "step-000000003.ckpt")
    assert "_model.lpips.weight" in state["pipeline"]
    expected = rows_of(state["pipeline"], state["optimizers"])

    config = make_config(scene, tmp_path / "gsscale", steps=2)
    config.load_dir = source.checkpoint_dir
    trainer = config.setup()
    trainer.setup()
    assert "begin anew" in capsys.readouterr().out
    engine = trainer.pipeline.model.engine
    assert engine.step_count == 4 and trainer._start_step == 4
    # The same rows, now in Morton order.
    optimizers = {k: v.state_dict() for k, v in trainer.optimizers.optimizers.items()}
    rows = rows_of(trainer.pipeline.state_dict(), optimizers)
    assert sorted(rows.tolist()) == sorted(expected.tolist())
    store = engine.store
    order = morton_order(store.params, store.layout.columns["means"].start, len(store))
    assert torch.equal(order, torch.arange(len(store), dtype=torch.int32))
    trainer.train()
    assert engine.step_count == 6
    saved = torch.load(trainer.checkpoint_dir / "step-000000005.ckpt", weights_only=True)
    assert saved["schedulers"]["means"]["last_epoch"] == 6


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_gsscales_checkpoint_goes_on_in_splatfacto(on_the_cpu, scene, tmp_path, moments):
    source = train(make_config(scene, tmp_path / "gsscale", steps=4, moment_dtype=moments))
    assert isinstance(source.pipeline.model, GSScaleModel)
    state = torch.load(source.checkpoint_dir / "step-000000003.ckpt")
    config = splatfacto_config(scene, tmp_path / "splatfacto", steps=2)
    config.load_dir = source.checkpoint_dir
    trainer = config.setup()
    assert type(trainer) is Trainer
    trainer.setup()
    assert trainer._start_step == 4
    optimizers = {k: v.state_dict() for k, v in trainer.optimizers.optimizers.items()}
    rows = rows_of(trainer.pipeline.state_dict(), optimizers)
    assert torch.equal(rows, rows_of(state["pipeline"], state["optimizers"]))
    assert optimizers["means"]["state"][0]["step"] == 4
    trainer.train()


def test_gaussians_alone_begin_with_fresh_moments(scene, tmp_path, capsys):
    source = train(make_config(scene, tmp_path / "source", steps=3))
    path = source.checkpoint_dir / "step-000000002.ckpt"
    state = torch.load(path)
    torch.save({name: state[name] for name in ("step", "pipeline")}, path)

    config = make_config(scene, tmp_path / "resumed", steps=2)
    config.load_checkpoint = path
    trainer = config.setup()
    trainer.setup()
    store = trainer.pipeline.model.engine.store
    assert "begin anew" in capsys.readouterr().out
    assert not store.exp_avg[: len(store)].any() and not store.exp_avg_sq[: len(store)].any()
    trainer.train()
    assert (trainer.checkpoint_dir / "step-000000004.ckpt").exists()


def _poses_and_grids(config: TrainerConfig) -> None:
    config.pipeline.model.camera_optimizer.mode = "SO3xR3"
    config.pipeline.model.use_bilateral_grid = True


def _no_bands(config: TrainerConfig) -> None:
    config.pipeline.model.sh_degree = 0


def _mcmc(config: TrainerConfig) -> None:
    if hasattr(config.pipeline.model, "strategy"):
        config.pipeline.model.strategy = "mcmc"


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("change", [_poses_and_grids, _no_bands, _mcmc])
def test_what_is_beside_the_rows_goes_with_them(on_the_cpu, scene, tmp_path, change, back):
    """Poses and grids with their moments, learning rates, schedules."""
    makers = (splatfacto_config, make_config)[:: -1 if back else 1]
    configs = [make(scene, tmp_path / str(i), steps=4 - i) for i, make in enumerate(makers)]
    for config in configs:
        change(config)
    source = train(configs[0])
    state = torch.load(source.checkpoint_dir / "step-000000003.ckpt")
    configs[1].load_dir = source.checkpoint_dir
    trainer = configs[1].setup()
    trainer.setup()
    loaded = trainer.pipeline.state_dict()
    beside = [name for name in state["pipeline"] if "camera_opt" in name or "bil_grids" in name]
    assert bool(beside) == (change is _poses_and_grids)
    assert all(torch.equal(loaded[name], state["pipeline"][name]) for name in beside)
    for name, optimizer in trainer.optimizers.optimizers.items():
        before, now = state["optimizers"][name], optimizer.state_dict()
        assert now["param_groups"][0]["lr"] == pytest.approx(before["param_groups"][0]["lr"])
        assert now["state"][0]["step"] == before["state"][0]["step"] == 4
        if name in ("camera_opt", "bilateral_grid"):
            assert torch.equal(now["state"][0]["exp_avg"], before["state"][0]["exp_avg"])
    for name, scheduler in trainer.optimizers.schedulers.items():
        assert scheduler.last_epoch == state["schedulers"][name]["last_epoch"] == 4
    trainer.train()
    assert (trainer.checkpoint_dir / "step-000000006.ckpt").exists()
