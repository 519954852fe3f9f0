"""What a run that meets with an error leaves behind: the steps before it, and how to go on."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from nerfstudio.engine.trainer import Trainer

from gsscale_nerfstudio import checkpoint, streamed
from gsscale_nerfstudio.densify.strategy import RowStrategy
from gsscale_nerfstudio.engines import HostEngine
from gsscale_nerfstudio.engines.returns import SphereReturns
from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.store.memory import ReservedArray
from gsscale_nerfstudio.trainer import GSScaleTrainer
from tests.runs import differences, make_config, seeded, tiny_scene, train
from tests.shortage import Shortage

FAILS = 4
"""The step that fails, the last one of the first epoch but one."""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_scene(tmp_path_factory.mktemp("last words") / "scene")


def config_of(scene: Path, output: Path, steps: int = 2 * FAILS, engine: str = "host") -> Any:
    """Backgrounds are drawn, images read again in each epoch."""
    config = make_config(scene, output, steps, engine=engine, background_color="random")
    config.pipeline.datamanager.cache_images = "disk"
    config.pipeline.datamanager.image_memory_gb = 4e-5  # of six images it holds four
    return config


def set_up(config: Any) -> GSScaleTrainer:
    seeded(1)
    trainer = config.setup()
    trainer.setup()
    return trainer


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def ends(trainer: GSScaleTrainer) -> None:
    with pytest.raises(SystemExit) as stopped:
        trainer.train()
    assert stopped.value.code == 1


def saved(trainer: GSScaleTrainer) -> Any:
    """The only checkpoint of a run."""
    (path,) = trainer.checkpoint_dir.glob("*.ckpt")
    return torch.load(path, weights_only=True)


def expected(config: Any) -> Any:
    """The checkpoint of a run that ends by plan before the step that fails."""
    config.max_num_iterations = FAILS
    trainer = set_up(config)
    trainer.train()
    return saved(trainer)


def hide(trainer: GSScaleTrainer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Take away the image of the step that fails, for good. Returns the place where it was."""
    monkeypatch.setattr("gsscale_nerfstudio.images.dataset._PAUSE", 0.0)
    data = trainer.pipeline.datamanager
    assert data.image_placement.where == "disk"  # all files were looked at
    file = data.train_dataset.image_filenames[data.upcoming(FAILS + 1)[FAILS]]
    file.rename(file.with_suffix(".hidden"))
    return file


@pytest.mark.parametrize("engine", ["host", "resident"])
def test_an_image_that_cannot_be_read(tmp_path, monkeypatch, capsys, engine):
    scene = tiny_scene(tmp_path / "scene")
    whole = expected(config_of(scene, tmp_path / "whole", engine=engine))
    failing = set_up(config_of(scene, tmp_path / "failing", engine=engine))
    file = hide(failing, monkeypatch)
    ends(failing)
    told = said(capsys)
    assert f"steps up to {FAILS - 1} are saved" in told
    assert f"--load-dir {failing.checkpoint_dir}" in told
    assert str(file) in told and "mend the file" in told
    assert whole["step"] == FAILS - 1 and differences(whole, saved(failing)) == []

    file.with_suffix(".hidden").rename(file)
    again = config_of(scene, tmp_path / "resumed", steps=2, engine=engine)
    again.load_dir = failing.checkpoint_dir
    resumed = train(again)
    assert resumed._start_step == FAILS and saved(resumed)["step"] == FAILS + 1


def test_memory_that_runs_out_for_good_in_the_middle_of_a_step(
    scene, tmp_path, monkeypatch, capsys
):
    """When poses are stepped, and the image and the background were drawn."""

    def with_poses(name: str) -> Any:
        config = config_of(scene, tmp_path / name)
        config.pipeline.model.camera_optimizer.mode = "SO3xR3"
        return config

    whole = expected(with_poses("whole"))
    failing = set_up(with_poses("failing"))
    shortage = Shortage(monkeypatch)
    shortage.place("rows", "gsscale_nerfstudio.engines.host.HostEngine._step_rows")
    one_step = GSScaleTrainer.train_iteration

    def train_iteration(self: GSScaleTrainer, step: int) -> Any:
        shortage.wanted = ["rows"] * 5 if step == FAILS else []
        return one_step(self, step)

    monkeypatch.setattr(GSScaleTrainer, "train_iteration", train_iteration)
    ends(failing)
    assert len(shortage.hits) > 1
    told = said(capsys)
    assert f"steps up to {FAILS - 1} are saved" in told and "camera-res-scale-factor" in told
    assert differences(whole, saved(failing)) == []


def test_memory_that_cannot_be_locked_for_spheres(scene, tmp_path, monkeypatch, capsys):
    """It is asked for before rows are stepped."""
    whole = expected(config_of(scene, tmp_path / "whole", engine="resident"))
    failing = set_up(config_of(scene, tmp_path / "failing", engine="resident"))
    reserve, asked = SphereReturns.reserve, []

    def scarce(self: SphereReturns, n: int) -> Any:
        asked.append(n)
        if len(asked) > FAILS:
            raise GSScaleError("CUDA could not page-lock")
        return reserve(self, n)

    monkeypatch.setattr(SphereReturns, "reserve", scarce)
    ends(failing)
    assert f"steps up to {FAILS - 1} are saved" in said(capsys)
    assert differences(whole, saved(failing)) == []


def test_an_evaluation_that_fails(scene, tmp_path, monkeypatch, capsys):
    """The steps before it are saved, as before any other error."""
    config = config_of(scene, tmp_path / "failing")
    config.steps_per_eval_all_images = FAILS
    failing = set_up(config)

    def fails(*args: Any, **options: Any) -> Any:
        raise GSScaleError("an image is gone; bring it back")

    monkeypatch.setattr(failing.pipeline.model, "get_image_metrics_and_images", fails)
    failing.config.steps_per_eval_image = failing.config.steps_per_eval_batch = 0
    ends(failing)
    told = said(capsys)
    assert f"steps up to {FAILS} are saved" in told and "bring it back" in told
    assert saved(failing)["step"] == FAILS


def test_an_error_of_the_worker(scene, tmp_path, monkeypatch, capsys):
    """It is met by whoever wants the result, and once more when the worker is waited for."""
    whole = expected(config_of(scene, tmp_path / "whole"))
    failing = set_up(config_of(scene, tmp_path / "failing"))
    prepare = HostEngine._prepare_ahead

    def fails(self: HostEngine, views: Any, step: int) -> Any:
        if step >= FAILS:
            raise GSScaleError("CUDA could not page-lock")
        return prepare(self, views, step)

    monkeypatch.setattr(HostEngine, "_prepare_ahead", fails)
    ends(failing)
    assert f"steps up to {FAILS - 1} are saved" in said(capsys)
    assert differences(whole, saved(failing)) == []


def test_memory_that_cannot_be_locked_for_new_rows(scene, tmp_path, monkeypatch, capsys):
    """A refinement that cannot begin has changed no row, but for its statistics."""
    steps = {"warmup_length": 2, "refine_every": 4, "densify_grad_thresh": 0.02}
    trainer = set_up(make_config(scene, tmp_path, 14, engine="host", **steps))
    store = trainer.pipeline.model.engine.store
    before = len(store)
    refine, found = RowStrategy.refine, []

    def noted(self: RowStrategy, engine: Any, step: int) -> None:
        engine.settle()
        found[:] = [store.params[:before].clone()]
        refine(self, engine, step)

    def cannot(self: ReservedArray, rows: int) -> None:
        raise GSScaleError("CUDA could not page-lock")

    with monkeypatch.context() as patch:
        patch.setattr(RowStrategy, "refine", noted)
        patch.setattr(ReservedArray, "pinned_rows", before)
        patch.setattr(ReservedArray, "pin", cannot)
        ends(trainer)
    told = said(capsys)
    assert "steps up to 12 are saved" in told and "page-lock" in told
    for name, column in store.layout.columns.items():
        rows = saved(trainer)["pipeline"][f"_model.gauss_params.{name}"].flatten(1)
        assert len(rows) == before
        assert torch.equal(rows, found[0][:, column])

    config = make_config(scene, tmp_path / "resumed", 14, engine="host", **steps)
    config.load_dir = trainer.checkpoint_dir
    assert len(train(config).pipeline.model.engine.store) > before


def test_a_save_that_fails_keeps_the_error(scene, tmp_path, monkeypatch, capsys):
    failing = set_up(config_of(scene, tmp_path))

    def refine(self: RowStrategy, engine: Any, step: int) -> None:
        if step == FAILS:
            raise GSScaleError("the first error")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RowStrategy, "refine", refine)
    monkeypatch.setattr(streamed, "save", full)
    ends(failing)
    told = said(capsys)
    assert f"the steps up to {FAILS} could not be saved" in told and "No space left" in told
    assert told.endswith("gsscale: the first error")
    assert list(failing.checkpoint_dir.glob("*")) == []


@pytest.mark.parametrize("saves", [0, FAILS - 1])
def test_nothing_is_saved_twice(scene, tmp_path, monkeypatch, capsys, saves):
    """Nor when the first step of all fails."""
    config = config_of(scene, tmp_path)
    config.steps_per_save = saves
    failing = set_up(config)
    draw = failing.pipeline._draw

    def next_one(step: int) -> Any:
        if step == (FAILS if saves else 0):
            raise GSScaleError("the first error")
        return draw(step)

    written = []
    save = checkpoint.save
    monkeypatch.setattr(failing.pipeline, "_draw", next_one)
    monkeypatch.setattr(checkpoint, "save", lambda *a, **k: (written.append(1), save(*a, **k)))
    ends(failing)
    assert len(written) == (1 if saves else 0)
    assert "steps up to" not in said(capsys)


def test_a_full_disk_is_not_the_end(scene, tmp_path, monkeypatch, capsys):
    """But it is when there will be no other save."""
    config = config_of(scene, tmp_path, steps=8)
    config.steps_per_save = 2
    trainer = set_up(config)
    stream, full_at = streamed.save, [4, 7]
    kept = {}

    def full(state: Any, path: Path) -> None:
        kept[state["step"]] = checkpoint.steps_in(trainer.checkpoint_dir)
        if state["step"] in full_at:
            raise OSError(28, "No space left on device")
        stream(state, path)

    monkeypatch.setattr(streamed, "save", full)
    ends(trainer)
    told = said(capsys)
    assert kept == {2: [], 4: [2], 6: [2], 7: [6]}
    assert "saving failed after step 4 ([Errno 28] No space left on device); training goes" in told
    assert "written after step 6" in told and told.count("saving failed") == 1
    assert "step-000000007.ckpt" in told and "--output-dir" in told
    assert checkpoint.steps_in(trainer.checkpoint_dir) == [6]
    assert not list(trainer.base_dir.glob(".unfinished*"))


def test_an_old_checkpoint_that_cannot_be_removed_is_not_the_end(
    scene, tmp_path, monkeypatch, capsys
):
    config = config_of(scene, tmp_path, steps=4)
    config.steps_per_save = 2

    def cannot(path: Path) -> None:
        raise GSScaleError(f"could not remove an earlier checkpoint than {path.name}")

    monkeypatch.setattr(checkpoint, "remove_others", cannot)
    trainer = set_up(config)
    trainer.train()
    told = said(capsys)
    assert told.count("could not remove") == 2 and "saving failed" not in told
    assert checkpoint.steps_in(trainer.checkpoint_dir) == [2, 3]


def at_step(trainer: GSScaleTrainer, step: int, do: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``do()`` happen when a step has drawn its image."""
    draw = trainer.pipeline._draw

    def drawn(number: int) -> Any:
        result = draw(number)
        if number == step:
            do()
        return result

    monkeypatch.setattr(trainer.pipeline, "_draw", drawn)


def interrupted(trainer: GSScaleTrainer) -> int:
    """Its exit status."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as stopped:
        trainer.train()
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_training_after_the_step(scene, tmp_path, monkeypatch, capfd, number):
    whole = expected(config_of(scene, tmp_path / "whole"))
    stopped = set_up(config_of(scene, tmp_path / "stopped"))
    at_step(stopped, FAILS - 1, lambda: os.kill(os.getpid(), number), monkeypatch)
    assert interrupted(stopped) == 128 + number
    told = capfd.readouterr()
    assert "ending after this step" in told.err
    left = f"interrupted; to go on from step {FAILS - 1} give --load-dir {stopped.checkpoint_dir}"
    assert left in " ".join(told.out.split())
    assert whole["step"] == FAILS - 1 and differences(whole, saved(stopped)) == []


def test_a_second_signal_ends_training_at_once(scene, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gsscale_nerfstudio.interruption._SAME", 0.0)
    stopped = set_up(config_of(scene, tmp_path))

    def twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    at_step(stopped, FAILS, twice, monkeypatch)
    assert interrupted(stopped) == 130
    assert "nothing is saved" in said(capsys) and stopped._done[0] == FAILS - 1


def test_a_signal_ends_a_pause(scene, tmp_path, monkeypatch, capsys):
    """In the viewer training can be paused: then there is no step to wait for."""
    stopped = set_up(config_of(scene, tmp_path))
    later = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))

    def pause() -> None:
        stopped.training_state = "paused"
        later.start()

    at_step(stopped, FAILS, pause, monkeypatch)
    assert interrupted(stopped) == 130
    assert f"to go on from step {FAILS} " in said(capsys)


@pytest.mark.parametrize("late", [False, True])
def test_a_signal_ends_a_finished_training(scene, tmp_path, monkeypatch, capsys, late):
    """Late: when the viewer is left on. Else while the last step is saved, which is done."""
    config = config_of(scene, tmp_path)
    config.viewer.quit_on_train_completion = False
    stopped = set_up(config)
    seen = []

    def viewer(self: Trainer) -> None:
        seen.append(late)
        os.kill(os.getpid(), signal.SIGINT)

    save = checkpoint.save

    def save_last(*args: Any, **kwargs: Any) -> None:
        if not late:
            os.kill(os.getpid(), signal.SIGINT)
        save(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", save_last)
    monkeypatch.setattr(Trainer, "_train_complete_viewer", viewer)
    assert interrupted(stopped) == 0
    assert saved(stopped)["step"] == 2 * FAILS - 1 and seen == [True] * late


def test_a_signal_ends_an_evaluation_between_images(scene, tmp_path, monkeypatch, capsys):
    config = config_of(scene, tmp_path)
    config.steps_per_eval_all_images = FAILS
    stopped = set_up(config)
    compute = stopped.pipeline.model.get_image_metrics_and_images
    images = []

    def one(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        images.append(stopped._done[0])
        return compute(*args)

    monkeypatch.setattr(stopped.pipeline.model, "get_image_metrics_and_images", one)
    assert len(stopped.pipeline.datamanager.eval_dataset) > 1
    assert interrupted(stopped) == 130
    assert images == [FAILS] and saved(stopped)["step"] == FAILS


def test_signals_in_quick_succession_are_one(scene, tmp_path, monkeypatch):
    stopped = set_up(config_of(scene, tmp_path))

    def interrupt() -> None:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)

    at_step(stopped, FAILS, interrupt, monkeypatch)
    assert interrupted(stopped) == 130 and saved(stopped)["step"] == FAILS


def test_a_signal_whose_terminal_is_gone(scene, tmp_path, monkeypatch):
    """Ctrl-C also ends what reads our output, as tee."""
    stopped = set_up(config_of(scene, tmp_path))

    def gone(*args: Any) -> int:
        raise BrokenPipeError

    def interrupt() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", gone)
            os.kill(os.getpid(), signal.SIGINT)

    at_step(stopped, FAILS, interrupt, monkeypatch)
    assert interrupted(stopped) == 130 and saved(stopped)["step"] == FAILS


@pytest.mark.parametrize(
    "engine, where",
    [
        ("host", "_step_picked"),
        ("host", "_step_rest"),  # the worker's
        ("host", "_step_recorded"),
        ("resident", "_step_recorded"),
        ("resident", "_returns.send"),  # rows are stepped, and the history does not know
    ],
)
def test_a_step_that_is_half_done_is_not_saved(scene, tmp_path, monkeypatch, capsys, engine, where):
    """Rows are stepped while the next view is drawn: the error comes a step later."""
    config = config_of(scene, tmp_path, engine=engine)
    config.steps_per_save = 2
    failing = set_up(config)
    owner, (*parts, name) = failing.pipeline.model.engine, where.split(".")
    for part in parts:
        owner = getattr(owner, part)
    original = getattr(owner, name)

    def fail(*args: Any) -> None:
        if failing.step < FAILS:
            return original(*args)
        raise ValueError("unheard of")

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(ValueError, match="unheard of"):
        failing.train()
    told = said(capsys)
    assert "could not be saved: the error struck while Gaussians" in told or "saved" not in told
    assert saved(failing)["step"] == FAILS - 2


def test_a_signal_that_is_ignored_stays_so(scene, tmp_path, monkeypatch):
    """As under nohup."""
    trainer = set_up(config_of(scene, tmp_path))
    at_step(trainer, FAILS, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert saved(trainer)["step"] == 2 * FAILS - 1


def test_an_error_that_nobody_expected(scene, tmp_path, monkeypatch, capsys):
    """Steps are saved, and earlier checkpoints stay, for it may have left anything behind."""
    whole = expected(config_of(scene, tmp_path / "whole"))
    config = config_of(scene, tmp_path / "failing")
    config.steps_per_save = 2
    failing = set_up(config)

    def fail(*args: Any) -> None:
        raise ValueError("unheard of")

    at_step(
        failing, FAILS, lambda: setattr(failing.pipeline.model, "get_loss_dict", fail), monkeypatch
    )
    with pytest.raises(ValueError, match="unheard of"):
        failing.train()
    assert f"steps up to {FAILS - 1} are saved" in said(capsys)
    steps = checkpoint.steps_in(failing.checkpoint_dir)
    assert steps == [FAILS - 2, FAILS - 1]
    last = torch.load(checkpoint.path_of(failing.checkpoint_dir, FAILS - 1), weights_only=True)
    assert differences(whole, last) == []


@pytest.mark.parametrize("times", [1, 2])
def test_memory_that_runs_out_in_an_evaluation_ends_no_training(
    scene, tmp_path, monkeypatch, capsys, times
):
    config = config_of(scene, tmp_path)
    config.steps_per_eval_image = FAILS
    trainer = set_up(config)
    shortage = Shortage(monkeypatch)
    shortage.place("image", "gsscale_nerfstudio.datamanager.GSScaleDatamanager.next_eval_image")
    shortage.wanted = ["image"] * times
    trainer.train()
    assert shortage.hits == ["image"] * times
    assert ("no evaluation after step" in said(capsys)) == (times == 2)
    assert saved(trainer)["step"] == 2 * FAILS - 1
