"""Training that is killed at random moments goes on at its newest checkpoint, and ends the same."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
import torch

from gsscale_nerfstudio import checkpoint
from tests.runs import differences, make_config, seeded, tiny_scene

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("GSSCALE_KILLS", "3"))
STEPS = 32 * KILLS  # more than all processes can get to before they are killed
SAVES = 8
"""How many saves a process lives to see, at most; it saves at every other step."""
PERIOD = 0.1
"""Seconds from one save to the next, or somewhat more."""


def run(scene: Path, output: Path) -> None:
    """What a user starts again and again, in a process of its own.

    Appends a line to ``output / "log"`` when training begins (its first step) and after each save.
    """
    torch.set_num_threads(1)
    config = make_config(
        scene, output, STEPS, warmup_length=5, refine_every=10, reset_alpha_every=3,
        densify_grad_thresh=0.02, cull_alpha_thresh=0.005, sh_degree_interval=15, max_gaussians=600,
    )  # fmt: skip
    config.timestamp = "run"
    config.steps_per_save = 2
    config.steps_per_eval_image = config.steps_per_eval_all_images = 0
    folder = config.get_checkpoint_dir()
    newest, config.load_step = config.load_step, None
    if newest is not None:
        config.load_dir = folder
        config.max_num_iterations = STEPS - (newest + 1)
    seeded(0 if newest is None else random.randrange(1000))
    with open(output / "log", "a", buffering=1) as log:
        trainer = config.setup()
        trainer.setup()
        save = trainer.save_checkpoint

        def logged(step: int) -> None:
            save(step)
            print("saved", step, file=log)

        trainer.save_checkpoint = logged
        print("begins", trainer._start_step, file=log)
        trainer.train()


def log_of(output: Path, what: str) -> list[int]:
    lines = [line.split() for line in (output / "log").read_text().splitlines()]
    return [int(step) for word, step in lines if word == what]


def test_killed_at_random_moments(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # set for tests of kernels; users run without them
    scene = tiny_scene(tmp_path / "scene")
    # The server of processes must not import the package from the source tree, where it has no
    # compiled module; its processes must find these tests, and not somebody else's.
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    # Processes that start with everything imported, or most of the time would go into that.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gsscale_nerfstudio.config", "open3d"])
    folders = {}
    for name in ("killed", "left alone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log").touch()
        folders[name] = tmp_path / name / "scene" / "gsscale" / "run" / "nerfstudio_models"
    output, folder = tmp_path / "killed", folders["killed"]

    lost, in_a_save = [], 0
    for kill in range(KILLS):
        process = context.Process(target=run, args=(scene, output))
        process.start()
        before, wait_for = len(log_of(output, "saved")), random.randint(0, SAVES)
        while len(log_of(output, "begins")) <= kill or (
            len(log_of(output, "saved")) < before + wait_for
        ):
            assert process.is_alive()
            time.sleep(0.005)
        time.sleep(random.uniform(0, PERIOD))
        process.kill()
        process.join()
        assert process.exitcode == -9
        newest, finished = checkpoint.newest_step(folder), log_of(output, "saved")
        assert newest == (finished[-1] if finished else None) or newest > max([-1, *finished])
        lost.append(-1 if newest is None else newest)
        in_a_save += any(folder.parent.glob(".unfinished*"))

    for name in folders:
        process = context.Process(target=run, args=(scene, tmp_path / name))
        process.start()
        process.join(300)
        assert process.exitcode == 0
    # Each process but the first began where the newest checkpoint of the one before it ends.
    assert log_of(output, "begins") == [0, *(step + 1 for step in lost)]
    print(f"{KILLS} kills, {in_a_save} of them in a save; resumed at {log_of(output, 'begins')}")
    whole, resumed = (
        torch.load(checkpoint.path_of(path, STEPS - 1), weights_only=True)
        for path in (folders["left alone"], folder)
    )
    assert differences(whole, resumed) == []
