"""Nerfstudio's flags of the trainer, which gsscale's own honours."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from nerfstudio.scripts import train as ns_train

from gsscale_nerfstudio import checkpoint
from tests.runs import make_config, tiny_scene, train


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_scene(tmp_path_factory.mktemp("flags") / "scene", points=50)


@pytest.mark.parametrize("only_latest, saved", [(True, [4]), (False, [2, 4])])
def test_which_checkpoints_are_kept(only_latest, saved, scene, tmp_path):
    config = make_config(scene, tmp_path, steps=5)
    config.steps_per_save = 2
    config.save_only_latest_checkpoint = only_latest
    assert checkpoint.steps_in(train(config).checkpoint_dir) == saved


@pytest.mark.parametrize("loaded", [True, False])
def test_whether_schedulers_go_on(loaded, scene, tmp_path):
    first = train(make_config(scene, tmp_path / "first", steps=3))
    config = make_config(scene, tmp_path / "second")
    config.load_dir = first.checkpoint_dir
    config.load_scheduler = loaded
    trainer = config.setup()
    trainer.setup()
    assert trainer.optimizers.schedulers["means"].last_epoch == (3 if loaded else 0)


def test_a_training_that_starts_paused_waits(scene, tmp_path):
    config = make_config(scene, tmp_path, steps=2)
    config.start_paused = True
    trainer = config.setup()
    trainer.setup()
    steps = []

    def go_on() -> None:
        time.sleep(0.5)
        steps.append(trainer.pipeline.model.engine.step_count)
        trainer.training_state = "training"

    user = threading.Thread(target=go_on)
    user.start()
    trainer.train()
    user.join()
    steps.append(trainer.pipeline.model.engine.step_count)
    assert steps == [0, 2]


def test_settings_of_a_file(scene, tmp_path):
    saved = make_config(scene, tmp_path / "saved", steps=2)
    saved.save_config()
    config = make_config(scene, tmp_path / "not there", steps=1)
    config.load_config = saved.get_base_dir() / "config.yml"
    ns_train.main(config)
    assert checkpoint.steps_in(saved.get_checkpoint_dir()) == [1]
    assert not (tmp_path / "not there").exists()
