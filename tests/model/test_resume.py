"""Training that was stopped and resumed ends with the same bits as training that was not."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.model.test_bad_input import ends_with_a_sentence
from tests.runs import differences, edit_json, make_config, seeded, tiny_scene, train

STOP = 14
"""Steps before and after the stop. 9 images are an epoch: it comes in the middle of the second, and
in the middle of 3 and of 4 steps over which gradients accumulate."""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scene of which each view sees a part."""
    made = tiny_scene(tmp_path_factory.mktemp("resume") / "scene", images=12)

    def narrow(transforms: dict[str, Any]) -> None:
        transforms["fl_x"] *= 4
        transforms["fl_y"] *= 4

    edit_json(made, narrow)
    return made


class DrawingLPIPS:
    """Draws its weights when it is built, as the real one does; needs no download."""

    def __init__(self, normalize: bool) -> None:
        self.weight = torch.rand(())

    def to(self, device: torch.device) -> DrawingLPIPS:
        return self

    def __call__(self, truth: torch.Tensor, render: torch.Tensor) -> torch.Tensor:
        return self.weight


@pytest.fixture(autouse=True)
def _others_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """LPIPS does, and what is set up after the checkpoint was loaded may."""
    monkeypatch.setattr(
        "torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity", DrawingLPIPS
    )

    def set_up(*args: Any, **kwargs: Any) -> None:
        random.random(), np.random.rand(), torch.rand(())  # noqa: NPY002

    monkeypatch.setattr("nerfstudio.utils.profiler.setup_profiler", set_up)


def busy_config(scene: Path, output: Path, steps: int, variant: str = "plain"):
    """All that a training does, within 28 steps; between two refinements when it is stopped."""
    config = make_config(
        scene,
        output,
        steps=steps,
        warmup_length=5,
        refine_every=6,
        reset_alpha_every=2,
        sh_degree_interval=6,
        cull_alpha_thresh=0.12,
        densify_grad_thresh=0.004,
        densify_size_thresh=0.1,
        num_downscales=1,
        resolution_schedule=17,
        engine="resident" if variant.startswith("resident") else "host",
        moment_dtype="bfloat16" if variant.endswith("16 bits") else "float32",
    )
    config.steps_per_save = STOP - 1
    config.steps_per_eval_image = 9
    config.save_only_latest_checkpoint = False
    if variant in ("other modules", "accumulated gradients"):
        config.pipeline.model.camera_optimizer.mode = "SO3xR3"
        config.pipeline.model.use_bilateral_grid = True
    if variant == "accumulated gradients":
        config.gradient_accumulation_steps = {"camera_opt": 4, "bilateral_grid": 3}
    if variant == "view lookahead":
        config.pipeline.datamanager.view_lookahead = 4
    elif variant == "farthest points":
        config.pipeline.datamanager.train_cameras_sampling_strategy = "fps"
        config.pipeline.datamanager.fps_reset_every = 8  # of 9: one has to wait
    return config


def last_checkpoint(trainer) -> dict[str, Any]:
    return torch.load(trainer.checkpoint_dir / f"step-{2 * STOP - 1:09d}.ckpt", weights_only=True)


@pytest.mark.parametrize(
    "variant",
    [
        "plain",
        "other modules",
        "accumulated gradients",
        "view lookahead",
        "farthest points",
        "resident",
        "16 bits",
        "resident, 16 bits",
    ],
)
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_stopped(
    scene, tmp_path, variant, capsys
):
    seeded(1)
    whole = train(busy_config(scene, tmp_path / "whole", 2 * STOP, variant))
    printed = capsys.readouterr().out
    grown = re.findall(r"(\d+) GSs duplicated, (\d+) GSs split", printed)
    assert all(sum(map(int, column)) > 10 for column in zip(*grown, strict=True))
    assert sum(map(int, re.findall(r"(\d+) GSs pruned", printed))) > 10

    seeded(1)
    stopped = train(busy_config(scene, tmp_path / "stopped", STOP, variant))
    seeded(2)
    config = busy_config(scene, tmp_path / "resumed", STOP, variant)
    config.load_dir = stopped.checkpoint_dir
    resumed = train(config)
    assert resumed._start_step == STOP
    assert differences(last_checkpoint(whole), last_checkpoint(resumed)) == []


def test_a_save_leaves_the_engine_where_loading_starts_it(scene, tmp_path):
    """Else a view would bring in other rows at the edge of what it may see."""
    stopped = train(busy_config(scene, tmp_path / "stopped", STOP))
    config = busy_config(scene, tmp_path / "resumed", STOP)
    config.load_dir = stopped.checkpoint_dir
    resumed = config.setup()
    resumed.setup()
    before, after = (trainer.pipeline.model.engine for trainer in (stopped, resumed))
    n = len(after.store)
    assert n == len(before.store) and before.step_count == after.step_count == STOP
    for engine in (before, after):
        engine.store.bookkeeping("key").zero_()  # never read where there is no noise
    for name in ("spheres", "params", "exp_avg", "exp_avg_sq"):
        assert torch.equal(getattr(before.store, name)[:n], getattr(after.store, name)[:n]), name
    assert before.store.unsorted_share == after.store.unsorted_share
    assert before.history.stride(1) == after.history.stride(1)
    assert before._visible.known_step == after._visible.known_step == STOP
    assert not before._announced


def test_other_images_get_a_new_order(scene, tmp_path, capsys):
    stopped = train(busy_config(scene, tmp_path / "stopped", 3))
    config = busy_config(tiny_scene(tmp_path / "fewer", images=8), tmp_path / "resumed", 3)
    config.load_dir = stopped.checkpoint_dir
    resumed = train(config)
    assert "order of images is one of other images" in " ".join(capsys.readouterr().out.split())
    assert resumed.step == 5


@pytest.mark.parametrize("before, now", [("mcmc", "default"), ("default", "mcmc")])
def test_another_strategy_is_told(scene, tmp_path, capsys, before, now):
    stopped = train(make_config(scene, tmp_path / "stopped", steps=2, strategy=before))
    told = []
    for strategy in (before, now):
        capsys.readouterr()
        config = make_config(scene, tmp_path / strategy, steps=2, strategy=strategy)
        config.load_dir = stopped.checkpoint_dir
        train(config)
        told.append(
            f"to keep {before} give --pipeline.model.strategy {before}" in capsys.readouterr().out
        )
        state = torch.load(config.get_checkpoint_dir() / "step-000000003.ckpt")
        assert state["gsscale"]["pipeline"]["strategy"] == strategy
    assert told == [False, True]


def test_statistics_of_another_run_are_refused(scene, tmp_path, capsys):
    stopped = train(busy_config(scene, tmp_path / "stopped", 3))
    path = stopped.checkpoint_dir / "step-000000002.ckpt"
    state = torch.load(path)
    statistics = state["gsscale"]["pipeline"]["engine"]["store"]["statistics"]
    statistics["count"] = statistics["count"][:-1].clone()
    torch.save(state, path)
    config = busy_config(scene, tmp_path / "resumed", 3)
    config.load_dir = stopped.checkpoint_dir
    ends_with_a_sentence(config, capsys, "put together from two runs")


def test_new_learning_rates_are_ignored(scene, tmp_path):
    """As in Nerfstudio; of a schedule the share to which it falls, and how soon, is the new one."""
    stopped = train(make_config(scene, tmp_path / "stopped", steps=3))
    config = make_config(scene, tmp_path / "resumed", steps=3)
    config.load_dir = stopped.checkpoint_dir
    for name in ("means", "opacities"):
        config.optimizers[name]["optimizer"].lr *= 10
    config.optimizers["means"]["scheduler"].max_steps = 12  # from 1.6e-3 to 1.6e-6
    resumed = train(config)
    rates = {k: v.param_groups[0]["lr"] for k, v in resumed.optimizers.optimizers.items()}
    assert rates["opacities"] == 0.05
    assert rates["means"] == pytest.approx(1.6e-4 * 1e-3 ** (6 / 12))


MODULES = {
    "camera-optimizer.mode": ("camera_opt", "_model.camera_optimizer.pose_adjustment"),
    "use-bilateral-grid True": ("bilateral_grid", "_model.bil_grids.grids"),
}


def with_module(config, flag: str):
    if flag == "camera-optimizer.mode":
        config.pipeline.model.camera_optimizer.mode = "SE3"
    else:
        config.pipeline.model.use_bilateral_grid = True
    return config


@pytest.mark.parametrize("flag", MODULES)
def test_a_module_that_was_forgotten_is_named(scene, tmp_path, capsys, flag):
    stopped = train(with_module(busy_config(scene, tmp_path / "stopped", 2), flag))
    config = busy_config(scene, tmp_path / "resumed", 2)
    config.load_dir = stopped.checkpoint_dir
    ends_with_a_sentence(config, capsys, "to go on from it add", f"--pipeline.model.{flag}")


@pytest.mark.parametrize("flag", MODULES)
def test_a_module_that_is_added_begins_anew(scene, tmp_path, flag):
    stopped = train(busy_config(scene, tmp_path / "stopped", 2))
    config = with_module(busy_config(scene, tmp_path / "resumed", 2), flag)
    config.load_dir = stopped.checkpoint_dir
    resumed = train(config)
    state = torch.load(resumed.checkpoint_dir / "step-000000003.ckpt", weights_only=True)
    group, entry = MODULES[flag]
    assert entry in state["pipeline"]
    assert state["schedulers"][group]["last_epoch"] == 2
    assert state["schedulers"]["means"]["last_epoch"] == 4


@pytest.mark.parametrize("flag", MODULES)
def test_modules_of_other_images_are_refused(scene, tmp_path, capsys, flag):
    stopped = train(with_module(busy_config(scene, tmp_path / "stopped", 2), flag))
    fewer = tiny_scene(tmp_path / "fewer", images=8)
    config = with_module(busy_config(fewer, tmp_path / "resumed", 2), flag)
    config.load_dir = stopped.checkpoint_dir
    ends_with_a_sentence(config, capsys, "of 9 training images, and there are 6")


def test_grids_of_another_shape_are_refused(scene, tmp_path, capsys):
    config = busy_config(scene, tmp_path / "stopped", 2)
    config.pipeline.model.grid_shape = (5, 4, 3)
    stopped = train(with_module(config, "use-bilateral-grid True"))
    config = with_module(busy_config(scene, tmp_path / "resumed", 2), "use-bilateral-grid True")
    config.load_dir = stopped.checkpoint_dir
    ends_with_a_sentence(config, capsys, "--pipeline.model.grid-shape 5 4 3")


def test_another_methods_checkpoint_is_refused(scene, tmp_path, capsys):
    stopped = train(busy_config(scene, tmp_path / "stopped", 2))
    path = stopped.checkpoint_dir / "step-000000001.ckpt"
    state = torch.load(path)
    state["optimizers"] = {name: {} for name in ("proposal_networks", "fields", "camera_opt")}
    torch.save(state, path)
    config = busy_config(scene, tmp_path / "resumed", 2)
    config.load_dir = stopped.checkpoint_dir
    ends_with_a_sentence(config, capsys, "it is another method's", "fields")


def test_the_entry_holds_plain_values_only(scene, tmp_path):
    """So that any torch and numpy reads it, also where only such values may be read."""
    stopped = train(busy_config(scene, tmp_path / "stopped", 2, "farthest points"))
    state = torch.load(stopped.checkpoint_dir / "step-000000001.ckpt")

    def kinds(value: Any) -> set[type]:
        inside = value.values() if isinstance(value, dict) else value
        if isinstance(value, (dict, list, tuple)):
            return set().union(*map(kinds, inside), {type(value)})
        return {type(value)}

    plain = {dict, list, tuple, int, float, str, torch.Tensor, type(None)}
    assert kinds(state["gsscale"]) <= plain
