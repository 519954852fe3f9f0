"""Bad input ends in a sentence that names cause and remedy, or simply works."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import Nerfstudio
from nerfstudio.engine.optimizers import RAdamOptimizerConfig
from PIL import Image

from gsscale_nerfstudio import checkpoint
from gsscale_nerfstudio.optim import DeferredAdamConfig
from gsscale_nerfstudio.seeding import seed_rows
from gsscale_nerfstudio.store import GROUPS, HostStore, RowLayout
from gsscale_nerfstudio.trainer import GSScaleTrainer, GSScaleTrainerConfig
from tests.runs import edit_json, make_config, tiny_scene, train

INTRINSICS = ("w", "h", "fl_x", "fl_y", "cx", "cy")


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_scene(tmp_path_factory.mktemp("master") / "scene")


@pytest.fixture
def scene(master: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(master, tmp_path / "scene"))


def ends_with_a_sentence(config, capsys, *words: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        train(config)
    assert stopped.value.code == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "gsscale:" in said
    for word in words:
        assert word in said, said


def test_no_images_listed(scene, tmp_path, capsys):
    edit_json(scene, lambda c: c.update(frames=[]))
    ends_with_a_sentence(make_config(scene, tmp_path), capsys, "scene", "at least one image")


def test_all_cameras_at_one_place(scene, tmp_path, capsys):
    def at_the_origin(transforms):
        for frame in transforms["frames"]:
            for row in frame["transform_matrix"][:3]:
                row[3] = 0.0

    edit_json(scene, at_the_origin)
    ends_with_a_sentence(make_config(scene, tmp_path), capsys, "--auto-scale-poses False")


def test_image_files_missing(scene, tmp_path, capsys):
    shutil.rmtree(scene / "images")
    ends_with_a_sentence(make_config(scene, tmp_path), capsys, "images are there", "frame_")


def test_image_file_damaged(scene, tmp_path, capsys):
    image = sorted((scene / "images").iterdir())[1]
    image.write_bytes(image.read_bytes()[:100])
    ends_with_a_sentence(make_config(scene, tmp_path), capsys, image.name, "mend the file")


@pytest.mark.parametrize("mode", ["P", "LA", "1", "I;16"])
def test_pixels_that_are_no_colours(mode, scene, tmp_path, capsys):
    image = sorted((scene / "images").iterdir())[1]
    Image.open(image).convert("I" if mode == "I;16" else mode).convert(mode).save(image)
    ends_with_a_sentence(make_config(scene, tmp_path), capsys, image.name, f"are {mode} in", "RGB")


def test_mask_damaged(scene, tmp_path, capsys):
    def masked(content):
        content["frames"][1]["mask_path"] = "mask.png"
        for frame in content["frames"]:
            frame.setdefault("mask_path", "white.png")

    edit_json(scene, masked)
    with Image.open(next((scene / "images").iterdir())) as image:
        Image.new("L", image.size, 255).save(scene / "white.png")
        Image.effect_noise(image.size, 99).save(scene / "mask.png")
    (scene / "mask.png").write_bytes((scene / "mask.png").read_bytes()[:100])
    name = next((scene / "images").glob("*_0001*")).name
    ends_with_a_sentence(make_config(scene, tmp_path), capsys, name, "its mask", "mend the file")


def test_no_such_folder(tmp_path, capsys):
    ends_with_a_sentence(make_config(tmp_path / "nowhere", tmp_path), capsys, "nowhere", "--data")


@pytest.mark.parametrize(
    "file, words",
    [
        ("sparse/0/cameras.bin", "`colmap --colmap-path sparse/0`"),
        ("colmap/sparse/0/cameras.txt", "`colmap --colmap-path colmap/sparse/0`"),
        ("transforms_train.json", "`blender-data`"),
        ("README", "name its format"),
    ],
)
def test_another_format_than_the_one_named(file, words, tmp_path, capsys):
    path = tmp_path / "scene" / file
    path.parent.mkdir(parents=True)
    path.touch()
    ends_with_a_sentence(make_config(tmp_path / "scene", tmp_path), capsys, words)


def test_colmap_model_elsewhere(scene, tmp_path, capsys):
    config = make_config(scene, tmp_path)
    config.pipeline.datamanager.dataparser = ColmapDataParserConfig(data=scene)
    ends_with_a_sentence(config, capsys, "--colmap-path", "none in the usual places")
    (scene / "sparse").mkdir()
    (scene / "sparse" / "cameras.txt").touch()
    ends_with_a_sentence(config, capsys, "--colmap-path", ": it is sparse")


def test_a_question_that_nobody_can_answer(scene, tmp_path, capsys, monkeypatch):
    def ask(*args, **kwargs):
        raise EOFError("EOF when reading a line")

    monkeypatch.setattr(Nerfstudio, "_generate_dataparser_outputs", ask)
    ends_with_a_sentence(make_config(scene, tmp_path), capsys, "--downscale-factor 1")


def test_output_where_nothing_can_be_written(scene, tmp_path, capsys):
    (tmp_path / "file").touch()
    config = make_config(scene, tmp_path)
    config.output_dir = tmp_path / "file"
    with pytest.raises(SystemExit):
        config.save_config()
    assert "choose another --output-dir" in " ".join(capsys.readouterr().out.split())


def test_no_gpu(scene, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = make_config(scene, tmp_path)
    config.machine.device_type = "cuda"
    ends_with_a_sentence(config, capsys, "--machine.device-type cuda", "nvidia-smi")


@pytest.mark.parametrize("degree", [-1, 5])
def test_no_such_sh_degree(degree, scene, tmp_path, capsys):
    config = make_config(scene, tmp_path, sh_degree=degree)
    ends_with_a_sentence(config, capsys, "--pipeline.model.sh-degree", "0 to 4")


@pytest.mark.parametrize("wrong", [0, -1, float("nan")])
def test_amounts_that_are_not_positive(wrong, scene, tmp_path, capsys):
    config = make_config(scene, tmp_path)
    config.pipeline.datamanager.camera_res_scale_factor = wrong
    ends_with_a_sentence(config, capsys, "camera-res-scale-factor", "more than 0")
    config = make_config(scene, tmp_path, vram_budget_gb=wrong)
    ends_with_a_sentence(config, capsys, "vram-budget-gb", "more than 0")
    config = make_config(scene, tmp_path)
    config.pipeline.datamanager.image_memory_gb = wrong
    ends_with_a_sentence(config, capsys, "image-memory-gb", "more than 0")


def test_camera_without_pixels(scene, tmp_path, capsys):
    edit_json(scene, lambda c: c.update(w=0, h=0))
    ends_with_a_sentence(make_config(scene, tmp_path), capsys, "has no pixels", "frame_")


def test_images_that_are_scaled_to_nothing(scene, tmp_path, capsys):
    config = make_config(scene, tmp_path)
    config.pipeline.datamanager.camera_res_scale_factor = 0.001
    ends_with_a_sentence(config, capsys, "has no pixels", "raise --pipeline.datamanager.camera-res")


def test_pose_that_is_not_finite(scene, tmp_path, capsys):
    edit_json(scene, lambda c: c["frames"][1]["transform_matrix"][0].__setitem__(3, float("nan")))
    config = make_config(scene, tmp_path)
    ends_with_a_sentence(config, capsys, "a pose that is finite", "--auto-scale-poses False")
    config = make_config(scene, tmp_path)
    parser = config.pipeline.datamanager.dataparser
    parser.orientation_method = parser.center_method = "none"
    parser.auto_scale_poses = False
    ends_with_a_sentence(config, capsys, "pose that is not finite (1 of", "frame_")


def test_images_of_mixed_sizes_work(scene, tmp_path):
    def per_frame(content):
        for frame in content["frames"]:
            frame.update({key: content[key] for key in INTRINSICS})
        frame = content["frames"][1]
        Image.open(scene / frame["file_path"]).crop((0, 0, 40, 30)).save(scene / frame["file_path"])
        frame.update(w=40, h=30)
        for key in INTRINSICS:
            del content[key]

    edit_json(scene, per_frame)
    trainer = train(make_config(scene, tmp_path, steps=12))
    sizes = {tuple(d["image"].shape[:2]) for d in trainer.pipeline.datamanager.cached_train}
    assert sizes == {(48, 64), (30, 40)}


def test_a_camera_that_sees_nothing_works(scene, tmp_path):
    def look_away(content):
        pose = np.array(content["frames"][1]["transform_matrix"])
        pose[:3, [0, 2]] *= -1
        pose[:3, 3] *= 50
        content["frames"][1]["transform_matrix"] = pose.tolist()

    edit_json(scene, look_away)
    trainer = train(make_config(scene, tmp_path, steps=12))
    assert trainer.pipeline.model.engine.step_count == 12


def test_too_little_host_memory(scene, tmp_path, capsys):
    config = make_config(scene, tmp_path, max_gaussians=10**11)
    ends_with_a_sentence(config, capsys, "GiB of host memory", "lower --pipeline.model.max-gauss")
    config = make_config(scene, tmp_path, max_gaussians=-5)
    ends_with_a_sentence(config, capsys, "--pipeline.model.max-gaussians", "1 or more, not -5")


def test_capacity_below_the_point_cloud(scene, tmp_path, capsys):
    config = make_config(scene, tmp_path, max_gaussians=10)
    ends_with_a_sentence(
        config, capsys, "there is room for, 10;", "raise --pipeline.model.max-gaussians"
    )


def points_of(n: int, broken: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    xyz = torch.rand(n, 3)
    xyz[:broken, 1] = float("nan")
    return xyz, torch.randint(0, 255, (n, 3), dtype=torch.uint8)


def seeded(config, points: tuple[torch.Tensor, torch.Tensor]) -> HostStore:
    store = HostStore(RowLayout(config.sh_degree))
    seed_rows(store, config, points)
    return store


def test_points_that_are_not_finite_are_left_out(scene, tmp_path, capsys):
    config = make_config(scene, tmp_path).pipeline.model
    store = seeded(config, points_of(50, broken=7))
    assert len(store) == 43
    assert all(store.column(name).isfinite().all() for name in GROUPS)
    assert "7 of 50 points" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("n", [0, 1, 3])
def test_too_few_points_start_at_random(n, scene, tmp_path, capsys):
    config = make_config(scene, tmp_path).pipeline.model
    assert len(seeded(config, points_of(n))) == config.num_random
    assert f"{n} usable points" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("change", [{"ply_file_path": "nowhere.ply"}, {"ply_file_path": None}])
def test_no_points_are_told_where_training_begins(change, scene, tmp_path, capsys):
    edit_json(scene, lambda content: content.update(change))
    if change["ply_file_path"] is None:
        edit_json(scene, lambda content: content.pop("ply_file_path"))
    config = make_config(scene, tmp_path, num_random=100)
    trainer = train(config)
    said = " ".join(capsys.readouterr().out.split())
    assert "no 3D points that could be read" in said and "100 random Gaussians" in said
    resumed = make_config(scene, tmp_path, num_random=100)
    resumed.load_dir = trainer.checkpoint_dir
    train(resumed)
    wanted = make_config(scene, tmp_path, num_random=100, random_init=True)
    train(wanted)
    assert "no 3D points" not in capsys.readouterr().out


@pytest.mark.parametrize("saved", [False, True])
def test_an_interrupted_training_tells_what_is_saved(saved, scene, tmp_path, capsys, monkeypatch):
    config = make_config(scene, tmp_path, steps=9)
    config.steps_per_save = 2 if saved else 20
    one_step = GSScaleTrainer.train_iteration

    def interrupted(self, step):
        if step == 5:
            raise KeyboardInterrupt  # what Ctrl-C does
        return one_step(self, step)

    monkeypatch.setattr(GSScaleTrainer, "train_iteration", interrupted)
    with pytest.raises(SystemExit) as stopped:
        train(config)
    assert stopped.value.code == 130
    said = " ".join(capsys.readouterr().out.split())
    folder = config.get_checkpoint_dir()
    left = f"to go on from step 4 give --load-dir {folder}" if saved else "every 20 steps"
    assert "gsscale: interrupted; " in said and left in said


def test_ctrl_c_ends_the_viewer_of_a_finished_training(scene, tmp_path, capsys, monkeypatch):
    def left_on(self):
        after_train(self)
        raise KeyboardInterrupt

    after_train = GSScaleTrainer._after_train
    monkeypatch.setattr(GSScaleTrainer, "_after_train", left_on)
    with pytest.raises(SystemExit) as stopped:
        train(make_config(scene, tmp_path))
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "training is complete; to go on from step 2" in said and "interrupted" not in said


def test_ctrl_c_while_data_are_loaded(scene, tmp_path, capsys, monkeypatch):
    def interrupted(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(GSScaleTrainerConfig, "get_checkpoint_dir", lambda self: tmp_path)
    monkeypatch.setattr("gsscale_nerfstudio.pipeline.GSScalePipeline.__init__", interrupted)
    with pytest.raises(SystemExit) as stopped:
        train(make_config(scene, tmp_path))
    assert stopped.value.code == 130
    assert "interrupted before training began" in capsys.readouterr().out


def test_a_step_without_a_folder(scene, tmp_path, capsys):
    config = make_config(scene, tmp_path)
    config.load_step = 75
    ends_with_a_sentence(config, capsys, "--load-step 75", "add --load-dir")


def test_what_is_left_to_train_is_named(scene, tmp_path, capsys, monkeypatch):
    config = make_config(scene, tmp_path, steps=9)
    config.steps_per_save = 2
    one_step = GSScaleTrainer.train_iteration

    def interrupted(self, step):
        if step == 5:
            raise KeyboardInterrupt
        return one_step(self, step)

    monkeypatch.setattr(GSScaleTrainer, "train_iteration", interrupted)
    with pytest.raises(SystemExit):
        train(config)
    said = " ".join(capsys.readouterr().out.split())
    assert f"{config.get_checkpoint_dir()} --max-num-iterations 4, and the other flags" in said


def test_data_that_lie_elsewhere_are_told(scene, tmp_path, capsys):
    """A flag of the dataparser was forgotten, say: Gaussians are beside what cameras see."""

    def resume(**flags):
        config = make_config(scene, tmp_path / "resumed", steps=1)
        config.load_dir = trainer.checkpoint_dir
        for name, value in flags.items():
            setattr(config.pipeline.datamanager.dataparser, name, value)
        capsys.readouterr()
        train(config)
        return " ".join(capsys.readouterr().out.split())

    trainer = train(make_config(scene, tmp_path))
    file = trainer.base_dir / "dataparser_transforms.json"
    for flags in ({"scale_factor": 0.5}, {"center_method": "none"}):
        said = resume(**flags)
        assert "moved or scaled otherwise" in said and str(file) in said
    assert "moved or scaled" not in resume()
    file.unlink()
    assert "moved or scaled" not in resume(scale_factor=0.5)  # nobody can tell


def test_images_that_were_trained_and_are_held_out_now(scene, tmp_path, capsys):
    trainer = train(make_config(scene, tmp_path))
    held_out = {file.name for file in trainer.pipeline.datamanager.eval_dataset.image_filenames}
    assert "metrics will flatter" not in capsys.readouterr().out
    file = trainer.pipeline.datamanager.train_dataset.image_filenames[0]
    (tmp_path / "eval.txt").write_text("\n".join([file.name, *held_out]))
    again = make_config(scene, tmp_path, steps=1)
    again.pipeline.datamanager.eval_list = tmp_path / "eval.txt"
    again.load_dir = trainer.checkpoint_dir
    train(again)
    said = " ".join(capsys.readouterr().out.split())
    assert f"1 of the {1 + len(held_out)} images that are held out now" in said


def test_several_processes_are_refused_before_they_are_there(scene, tmp_path, capsys):
    config = make_config(scene, tmp_path)
    config.machine.num_devices = 2
    with pytest.raises(SystemExit):
        config.save_config()  # what ns-train does before it starts them
    assert "--machine.num-devices 1" in capsys.readouterr().out
    assert not config.get_base_dir().exists()


def test_a_run_that_begins_anew_among_its_checkpoints_says_so(scene, tmp_path, capsys):
    """As ``ns-train --load-config`` does."""
    config = make_config(scene, tmp_path)
    trainer = train(config)
    words = f"will write over the checkpoints in {trainer.checkpoint_dir}"
    assert words not in " ".join(capsys.readouterr().out.split())
    train(config)
    assert words in " ".join(capsys.readouterr().out.split())


def test_smaller_images_that_are_not_there(scene, tmp_path, capsys):
    config = make_config(scene, tmp_path)
    config.pipeline.datamanager.dataparser.downscale_factor = 2
    words = "made smaller before, in images_2", "camera-res-scale-factor 0.5"
    ends_with_a_sentence(config, capsys, *words)


def test_duplicate_points_have_a_size(scene, tmp_path):
    config = make_config(scene, tmp_path).pipeline.model
    store = seeded(config, (torch.ones(10, 3), torch.zeros(10, 3)))
    assert store.column("scales").isfinite().all()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: setattr(c.optimizers["means"]["optimizer"], "weight_decay", 0.1), "weight"),
        (lambda c: c.optimizers["quats"].update(optimizer=RAdamOptimizerConfig()), "RAdam"),
        (lambda c: setattr(c.optimizers["scales"]["optimizer"], "eps", 0.0), "eps > 0"),
        (lambda c: setattr(c, "mixed_precision", True), "mixed precision"),
        (lambda c: setattr(c, "use_grad_scaler", True), "gradient scaling"),
        (lambda c: setattr(c, "max_num_iterations", 0), "--max-num-iterations"),
        (lambda c: setattr(c.logging, "steps_per_log", 0), "--logging.steps-per-log"),
        (lambda c: setattr(c.pipeline.model, "refine_every", 0), "--pipeline.model.refine-every"),
        (lambda c: setattr(c.pipeline.model, "reset_alpha_every", 0), "reset-alpha-every"),
        (lambda c: c.gradient_accumulation_steps.update(means=2), "gradient accumulation"),
    ],
)
def test_settings_that_cannot_be_honoured(change, words, scene, tmp_path, capsys):
    config = make_config(scene, tmp_path)
    change(config)
    if config.mixed_precision:
        config.mixed_precision = False  # Nerfstudio drops it on the CPU; check the refusal itself
        trainer = config.setup()
        trainer.mixed_precision = True
        with pytest.raises(SystemExit):
            trainer.setup()
        assert words in " ".join(capsys.readouterr().out.split())
        return
    ends_with_a_sentence(config, capsys, words)


def test_deferred_adam_wants_row_groups():
    from gsscale_nerfstudio.errors import GSScaleError

    with pytest.raises(GSScaleError, match="ordinary parameters"):
        DeferredAdamConfig(lr=0.1).setup([torch.nn.Parameter(torch.zeros(3))])


def test_truncated_checkpoint_falls_back_to_the_one_before(scene, tmp_path, capsys):
    config = make_config(scene, tmp_path, steps=6)
    config.steps_per_save = 2
    config.save_only_latest_checkpoint = False
    trainer = train(config)
    folder = trainer.checkpoint_dir
    assert checkpoint.steps_in(folder) == [2, 4, 5]
    newest = folder / "step-000000005.ckpt"
    newest.write_bytes(newest.read_bytes()[:-200])

    again = make_config(scene, tmp_path / "again", steps=2)
    again.load_dir = folder
    resumed = train(again)
    assert resumed._start_step == 5
    assert "step-000000005.ckpt" in " ".join(capsys.readouterr().out.split())

    named = make_config(scene, tmp_path / "named", steps=2)
    named.load_checkpoint = newest
    ends_with_a_sentence(named, capsys, "truncated or damaged", "--load-step (2, 4)")

    for path in folder.glob("*.ckpt"):
        path.write_bytes(b"no checkpoint")
    none = make_config(scene, tmp_path / "none", steps=2)
    none.load_dir = folder
    ends_with_a_sentence(none, capsys, "can be read")


def test_resuming_from_a_folder_without_checkpoints(scene, tmp_path, capsys):
    config = make_config(scene, tmp_path)
    config.load_dir = tmp_path
    ends_with_a_sentence(config, capsys, str(tmp_path), "--load-dir", "nerfstudio_models")


def test_a_folder_is_no_checkpoint(scene, tmp_path, capsys):
    config = make_config(scene, tmp_path)
    config.load_checkpoint = tmp_path
    ends_with_a_sentence(config, capsys, f"{tmp_path} is a folder", "--load-dir")


def test_evaluation_of_no_images(scene, tmp_path, capsys):
    config = make_config(scene, tmp_path)
    config.pipeline.datamanager.dataparser.eval_mode = "fraction"  # a tenth of eight
    pipeline = train(config).pipeline
    with pytest.raises(SystemExit):
        pipeline.get_average_eval_image_metrics()
    assert "no image is held out" in " ".join(capsys.readouterr().out.split())


def test_a_failed_save_keeps_the_checkpoint_before(scene, tmp_path, monkeypatch):
    path = tmp_path / "models" / "step-000000001.ckpt"
    checkpoint.save({"step": 1}, path, scratch=tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    from gsscale_nerfstudio.errors import GSScaleError

    with pytest.raises(GSScaleError, match="No space left"):
        checkpoint.save({"step": 2}, path, scratch=tmp_path)
    assert torch.load(path) == {"step": 1}
    assert list(tmp_path.glob(".*.tmp")) == []


def test_checkpoint_of_another_sh_degree(scene, tmp_path, capsys):
    trainer = train(make_config(scene, tmp_path, steps=2))
    other = make_config(scene, tmp_path / "other", steps=2, sh_degree=1)
    other.load_dir = trainer.checkpoint_dir
    ends_with_a_sentence(other, capsys, "features_rest", "--pipeline.model.sh-degree")
