"""Checkpoints of splatfacto and of gsscale are the same to each other."""

from __future__ import annotations

import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.utils import eval_utils
from nerfstudio.utils.eval_utils import eval_setup

from gsscale_nerfstudio import checkpoint
from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.evaluation import leave_moments_on_disk
from gsscale_nerfstudio.store import GROUPS
from gsscale_nerfstudio.trainer import GSScaleTrainerConfig
from tests.runs import make_config, tiny_scene, train


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_scene(tmp_path_factory.mktemp("checkpoint") / "scene")


def test_numpys_scalars_and_the_lpips_network_are_no_obstacle(scene, tmp_path):
    """splatfacto's checkpoints have both; test_splatfacto_exchange.py has more."""
    source = train(make_config(scene, tmp_path / "source", steps=5))
    path = next(source.checkpoint_dir.glob("*.ckpt"))
    state = torch.load(path)
    state["pipeline"]["_model.lpips.net.weight"] = torch.zeros(3)
    state["optimizers"]["means"]["param_groups"][0]["lr"] = np.float64(1e-4)
    state["schedulers"]["means"]["_last_lr"] = [np.float64(1e-4)]
    torch.save(state, path)

    config = make_config(scene, tmp_path / "resumed", steps=1)
    config.load_dir = source.checkpoint_dir
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A checkpoint with a large record, as rows make it, between small ones."""
    path = tmp_path_factory.mktemp("whole") / "step-000000002.ckpt"
    rows = torch.arange(1 << 19, dtype=torch.float32)
    checkpoint.save({"step": 2, "a": torch.ones(99), "rows": rows, "b": [0.5]}, path, path.parent)
    return path.read_bytes()


@given(cut=st.floats(0, 1, exclude_max=True))
@example(cut=0.0)
@settings(max_examples=60, deadline=None)
def test_a_file_cut_anywhere_is_not_whole(whole, tmp_path_factory, cut):
    path = tmp_path_factory.getbasetemp() / "cut.ckpt"
    path.write_bytes(whole)
    assert checkpoint.is_whole(path)
    for length in (int(cut * len(whole)), len(whole) - 1 - int(cut * 2000)):
        path.write_bytes(whole[:length])
        assert not checkpoint.is_whole(path)


def test_overwritten_bytes_are_found_where_there_are_checksums(whole, tmp_path):
    """In what describes the tensors, in all heads and in the directory; not inside of tensors."""
    path = tmp_path / "step-000000002.ckpt"
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        directory = archive.start_dir
    assert any(record.filename.endswith("data.pkl") and record.CRC for record in records)
    places = [record.header_offset for record in records] + [directory]
    with open(path, "rb") as file:
        for record in records:
            file.seek(record.header_offset + 26)
            start = record.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
            if 0 < record.file_size <= 1 << 20 and record.CRC != 0:
                places += [start, start + record.file_size - 1]
    for place in places:
        broken = bytearray(whole)
        broken[place] ^= 0xFF
        path.write_bytes(broken)
        assert not checkpoint.is_whole(path), place


def test_the_newest_whole_one_is_taken_with_a_warning(whole, tmp_path, capsys):
    for step in (1, 2, 10):
        checkpoint.path_of(tmp_path, step).write_bytes(whole)
    (tmp_path / "step-best.ckpt").write_bytes(whole)  # a user's copy is none of ours
    assert checkpoint.newest_step(tmp_path) == 10 and "gsscale" not in capsys.readouterr().out
    checkpoint.path_of(tmp_path, 10).write_bytes(b"")
    assert checkpoint.newest_step(tmp_path) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "step-000000010.ckpt" in said and "using step 2 instead" in said
    assert checkpoint.newest_step(tmp_path / "none") is None


def test_what_torch_cannot_read_ends_with_a_sentence(whole, tmp_path):
    path = checkpoint.path_of(tmp_path, 2)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"no pickle")
    checkpoint.path_of(tmp_path, 1).write_bytes(whole)
    assert checkpoint.is_whole(path)
    with pytest.raises(GSScaleError, match=r"cannot be read.*--load-step \(1\)"):
        checkpoint.load(path)


def test_a_checkpoint_that_was_replaced_meanwhile(tmp_path):
    with pytest.raises(GSScaleError, match="has replaced it by a newer one"):
        checkpoint.load(tmp_path / "step-000000001.ckpt")


def test_commands_do_not_read_moments(scene, tmp_path, monkeypatch):
    """They map the file, and nobody touches the moments there."""
    config = make_config(scene, tmp_path, steps=4)
    config.steps_per_save = 2
    config.save_only_latest_checkpoint = False
    trainer = train(config)
    assert checkpoint.steps_in(trainer.checkpoint_dir) == [2, 3]
    config.load_step = 1  # as in the settings of a run that was resumed from another one's
    file = tmp_path / "config.yml"
    file.write_text(yaml.dump(config))
    loaded = []
    load = torch.load

    def watched(path, **kwargs):
        assert kwargs["mmap"]
        loaded.append(load(path, **kwargs))
        return loaded[-1]

    monkeypatch.setattr(torch, "load", watched)
    _, pipeline, path, step = eval_setup(file, test_mode="inference")
    assert step == 3 and path == checkpoint.path_of(trainer.checkpoint_dir, 3)
    means = loaded[0]["pipeline"]["_model.gauss_params.means"]
    assert torch.equal(pipeline.model.means, means)
    # Rows that are only looked at have no moments in memory.
    store = pipeline.model.engine.store
    assert not store.exp_avg[: len(store)].any()


@pytest.mark.parametrize("folder", ["missing", "empty"])
def test_a_run_without_checkpoints_ends_with_a_sentence(folder, scene, tmp_path, capsys):
    config = make_config(scene, tmp_path)
    if folder == "empty":
        config.get_checkpoint_dir().mkdir(parents=True)
    config.save_config()
    with pytest.raises(SystemExit):
        eval_setup(config.get_base_dir() / "config.yml")
    said = " ".join(capsys.readouterr().out.split())
    assert f"gsscale: there is no checkpoint in {config.get_checkpoint_dir()}" in said
    assert "--steps-per-save" in said


def test_other_methods_are_loaded_by_nerfstudio(scene, tmp_path):
    """The loader that gsscale's commands use leaves them alone."""
    leave_moments_on_disk(GSScaleTrainerConfig)
    config = TrainerConfig(load_dir=tmp_path, load_step=3)
    with pytest.raises(AssertionError, match="does not exist"):  # Nerfstudio's own words
        eval_utils.eval_load_checkpoint(config, None)


def test_the_folder_written_to_does_not_say_what_is_loaded(scene, tmp_path):
    source = train(make_config(scene, tmp_path / "source", steps=4))
    own = make_config(scene, tmp_path / "own", steps=2)
    train(own)
    own.load_dir = source.checkpoint_dir
    again = own.setup()  # the same timestamp, hence the same folder
    again.setup()
    assert again._start_step == 4


def test_a_run_whose_only_checkpoint_is_damaged_can_be_trained_again(scene, tmp_path, capsys):
    """Under the same name; what loads it ends with a sentence."""
    config = make_config(scene, tmp_path, steps=2)
    config.timestamp = "run"
    path = next(train(config).checkpoint_dir.glob("*.ckpt"))
    path.write_bytes(path.read_bytes()[:-200])
    file = tmp_path / "config.yml"
    file.write_text(yaml.dump(config))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        eval_setup(file, test_mode="inference")
    assert f"({path.name}: truncated or damaged)" in " ".join(capsys.readouterr().out.split())
    again = train(config)
    assert again._start_step == 0 and checkpoint.is_whole(path)
    assert eval_setup(file, test_mode="inference")[3] == 1


def in_a_save(run: Path) -> subprocess.Popen[str]:
    """A process that saves until it is killed."""
    code = f"""
import time
from pathlib import Path
from gsscale_nerfstudio import checkpoint, streamed

def save(state, path):
    path.write_bytes(bytes(1000))
    print("saving", flush=True)
    time.sleep(600)

streamed.save = save
run = Path({str(run)!r})
checkpoint.save({{}}, run / "nerfstudio_models" / "step-000000005.ckpt", run)
"""
    # Not from the source tree, where the package has no compiled module.
    child = subprocess.Popen([sys.executable, "-c", code], stdout=-1, text=True, cwd=run)
    assert child.stdout is not None and child.stdout.readline() == "saving\n"
    return child


@pytest.mark.parametrize("by", ["folder", "file"])
def test_what_a_killed_save_has_left_is_removed_on_resuming(scene, tmp_path, capsys, by):
    """But not what a run is writing that is still alive."""
    source = train(make_config(scene, tmp_path / "source", steps=2))
    left = source.base_dir / ".unfinished.ckpt.tmp"
    config = make_config(scene, tmp_path / by, steps=2)
    if by == "folder":
        config.load_dir = source.checkpoint_dir
    else:
        config.load_checkpoint = next(source.checkpoint_dir.glob("*.ckpt"))

    def resumed() -> str:
        capsys.readouterr()
        trainer = config.setup()
        trainer.setup()
        assert trainer._start_step == 2
        return " ".join(capsys.readouterr().out.split())

    child = in_a_save(source.base_dir)
    try:
        assert "removed" not in resumed() and left.exists()
    finally:
        child.kill()
        child.communicate()
    assert left.stat().st_size == 1000
    assert f"removed {left}, 1e-06 GB" in resumed() and not left.exists()
    assert "removed" not in resumed()
