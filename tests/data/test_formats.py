"""Scenes of several formats are trained and evaluated, with cameras and points where they belong.

Whether they are shows in the images: where a training camera sees a sparse point, the image has
that point's colour. docs/data.md has the command lines.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from nerfstudio.data.dataparsers.instant_ngp_dataparser import InstantNGPDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

from gsscale_nerfstudio.cull import View
from gsscale_nerfstudio.datamanager import GSScaleDatamanager
from gsscale_nerfstudio.demo.cameras import Pinhole
from gsscale_nerfstudio.trainer import GSScaleTrainer
from tests.data.formats import (
    HEIGHT,
    WIDTH,
    BentLens,
    Straight,
    Village,
    picture,
    village,
    write_blender,
    write_colmap,
    write_transforms,
)
from tests.model.splatfacto import Network
from tests.runs import edit_json, make_config, train

STRAIGHT = Pinhole(WIDTH, HEIGHT)
F, CX, CY = STRAIGHT.focal, WIDTH / 2, HEIGHT / 2
PINHOLE = [F, F, CX, CY]
SPLIT = {"eval_mode": "interval", "eval_interval": 3}

seen_through = cache(village)


@pytest.fixture(autouse=True)
def _no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity", Network)


def trained(
    parser: DataParserConfig, output: Path, where: str = "auto", **model: Any
) -> GSScaleTrainer:
    """A run of three steps, with images kept ``where``; held-out views were looked at."""
    config = make_config(parser.data, output, steps=3, **model)
    config.pipeline.datamanager.dataparser = parser
    config.pipeline.datamanager.cache_images = where
    trainer = train(config)
    metrics = trainer.pipeline.get_average_eval_image_metrics()
    assert 3 < metrics["psnr"] < 60
    return trainer


def color_error(trainer: GSScaleTrainer, of_held_out: bool = False) -> float:
    """How far images are from their points' colours, of 1, in the median over points and views."""
    manager = trainer.pipeline.datamanager
    assert isinstance(manager, GSScaleDatamanager)
    points = manager.train_dataset.metadata["points3D_xyz"].double().numpy()
    colors = manager.train_dataset.metadata["points3D_rgb"].double().numpy() / 255
    errors = []
    images = manager.cached_eval if of_held_out else manager.cached_train
    for index in range(len(images)):
        view = View.from_camera(
            manager.eval_dataset.cameras[index : index + 1]
            if of_held_out
            else manager.train_camera(index)
        )
        image = images[index]["image"].double().numpy()[..., :3] / 255
        seen = points @ view.viewmat[:3, :3].T + view.viewmat[:3, 3]
        x, y, _ = np.floor((seen / seen[:, 2:]) @ view.K.T).astype(int).T
        inside = (
            (seen[:, 2] > 0) & (x >= 0) & (x < image.shape[1]) & (y >= 0) & (y < image.shape[0])
        )
        assert inside.sum() > 30
        errors.append(np.abs(image[y[inside], x[inside]] - colors[inside]).mean(-1))
    return float(np.median(np.concatenate(errors)))


def stem(file: Path) -> int:
    """The number of an image."""
    return int(file.stem.removeprefix("r_"))


def lens_error(trainer: GSScaleTrainer, scene: Village) -> float:
    """How far images are from what their cameras, taken for pinholes, would see; of 1, in mean."""
    manager = trainer.pipeline.datamanager
    assert isinstance(manager, GSScaleDatamanager)
    errors = []
    for index, file in enumerate(manager.train_dataset.image_filenames):
        camera = manager.train_camera(index)
        lens = Straight(
            int(camera.width),
            int(camera.height),
            *map(float, (camera.fx, camera.fy, camera.cx, camera.cy)),
        )
        expected = picture(lens, scene.poses[stem(file)])
        image = manager.cached_train[index]["image"].numpy()
        errors.append(np.abs(image.astype(float) - expected).mean() / 255)
    return float(np.mean(errors))


def held_out(trainer: GSScaleTrainer, split: str) -> list[int]:
    parser = trainer.config.pipeline.datamanager.dataparser.setup()
    return [stem(file) for file in parser.get_dataparser_outputs(split=split).image_filenames]


def training(trainer: GSScaleTrainer) -> list[int]:
    return [stem(file) for file in trainer.pipeline.datamanager.train_dataset.image_filenames]


# -- formats -------------------------------------------------------------------------------------


def colmap(folder: Path) -> DataParserConfig:
    write_colmap(seen_through(STRAIGHT), folder, "PINHOLE", PINHOLE)
    return ColmapDataParserConfig(data=folder, **SPLIT)


def nerfstudio(folder: Path) -> DataParserConfig:
    write_transforms(seen_through(STRAIGHT), folder, ply_file_path="points.ply")
    return NerfstudioDataParserConfig(data=folder, load_3D_points=True, **SPLIT)


def blender(folder: Path) -> DataParserConfig:
    write_blender(seen_through(STRAIGHT), folder)
    return BlenderDataParserConfig(data=folder, ply_path=Path("points.ply"))


def instant_ngp(folder: Path) -> DataParserConfig:
    angle = 2 * np.arctan(CX / F)
    write_transforms(seen_through(STRAIGHT), folder, camera_angle_x=angle, fl_x=F)
    return InstantNGPDataParserConfig(data=folder, **SPLIT)


@pytest.mark.parametrize("write", [nerfstudio, colmap, blender])
def test_cameras_points_and_images_belong_together(
    write: Callable[[Path], DataParserConfig], tmp_path: Path
) -> None:
    trainer = trained(write(tmp_path / "scene"), tmp_path)
    assert training(trainer) == ([1, 2, 4, 5] if write is not blender else [0, 1, 3, 4])
    assert lens_error(trainer, seen_through(STRAIGHT)) < 1e-6
    assert color_error(trainer) < 0.08
    assert trainer.pipeline.model.num_points > 150


def test_instant_ngp_has_no_points(tmp_path: Path) -> None:
    """So Gaussians begin anywhere; poses are scaled by a third, and not turned."""
    trainer = trained(instant_ngp(tmp_path / "scene"), tmp_path, num_random=300)
    assert lens_error(trainer, seen_through(STRAIGHT)) < 1e-6
    assert trainer.pipeline.model.num_points == 300
    pose = trainer.pipeline.datamanager.train_dataset.cameras.camera_to_worlds[0].numpy()
    expected = seen_through(STRAIGHT).poses[1][:3] * [1, 1, 1, 0.3333]
    np.testing.assert_allclose(pose, expected, rtol=1e-6)


# -- COLMAP's camera models ----------------------------------------------------------------------


def brown(*coefficients: float) -> BentLens:
    return BentLens(WIDTH, HEIGHT, coefficients)


def fisheye(*coefficients: float) -> BentLens:
    return BentLens(WIDTH, HEIGHT, coefficients, fisheye=True)


MODELS: dict[str, tuple[Pinhole, list[float]]] = {
    "SIMPLE_PINHOLE": (STRAIGHT, [F, CX, CY]),
    "PINHOLE": (STRAIGHT, PINHOLE),
    "SIMPLE_RADIAL": (brown(-0.3, 0, 0, 0), [F, CX, CY, -0.3]),
    "RADIAL": (brown(-0.4, 0.2, 0, 0), [F, CX, CY, -0.4, 0.2]),
    "OPENCV": (brown(-0.3, 0.1, 0.03, -0.02), [*PINHOLE, -0.3, 0.1, 0.03, -0.02]),
    "SIMPLE_RADIAL_FISHEYE": (fisheye(0.6, 0, 0, 0), [F, CX, CY, 0.6]),
    "RADIAL_FISHEYE": (fisheye(0.6, -0.2, 0, 0), [F, CX, CY, 0.6, -0.2]),
    "OPENCV_FISHEYE": (fisheye(0.6, -0.2, 0.1, 0), [*PINHOLE, 0.6, -0.2, 0.1, 0]),
}


@pytest.mark.parametrize("model", MODELS)
def test_what_a_lens_bent_is_straight_again(model: str, tmp_path: Path) -> None:
    lens, parameters = MODELS[model]
    write_colmap(seen_through(lens), tmp_path / "scene", model, parameters)
    is_straight_again(tmp_path, seen_through(lens))


@pytest.mark.parametrize("where", ["auto", "disk"])
def test_a_fisheye_without_distortion_is_one_all_the_same(where: str, tmp_path: Path) -> None:
    """Where its coefficients are 0 Nerfstudio takes it for a pinhole."""
    scene = seen_through(fisheye(0, 0, 0, 0))
    write_colmap(scene, tmp_path / "scene", "OPENCV_FISHEYE", [*PINHOLE, 0, 0, 0, 0])
    is_straight_again(tmp_path, scene, where)


def is_straight_again(folder: Path, scene: Village, where: str = "auto") -> None:
    """Training on the scene, which ``folder`` has, is with what a pinhole would have seen."""
    trainer = trained(ColmapDataParserConfig(data=folder / "scene", **SPLIT), folder, where)
    as_taken = [
        np.abs(image.astype(float) - picture(STRAIGHT, pose)).mean() / 255
        for image, pose in zip(scene.images, scene.poses, strict=True)
    ]
    # Undistorted images are a little blurred.
    assert lens_error(trainer, scene) <= 0.7 * float(np.mean(as_taken))


UNKNOWN = {
    "FULL_OPENCV": [*PINHOLE, 0.1, *[0.0] * 7],
    "FOV": [*PINHOLE, 0.1],
    "THIN_PRISM_FISHEYE": [*PINHOLE, 0.1, *[0.0] * 7],
    "OPENCV_FISHEYE": [*PINHOLE, 0.0, 0.0, 0.0, 0.1],
}


@pytest.mark.parametrize("model", UNKNOWN)
def test_what_nerfstudio_does_not_know_ends_with_a_sentence(model, tmp_path, capsys) -> None:
    scene = write_colmap(seen_through(STRAIGHT), tmp_path / "scene", model, UNKNOWN[model])
    parser = ColmapDataParserConfig(data=scene, **SPLIT)
    with pytest.raises((NotImplementedError, ValueError), match=r"not supported|K4.* is non-zero"):
        parser.setup().get_dataparser_outputs(split="train")  # what splatfacto ends with
    with pytest.raises(SystemExit):
        trained(parser, tmp_path)
    assert "colmap image_undistorter" in " ".join(capsys.readouterr().out.split())


def ends_early(scene: Path, parser: ColmapDataParserConfig) -> None:
    for name in ("cameras", "images", "points3D"):
        (scene / "colmap/sparse/0" / f"{name}.txt").unlink()
        (scene / "colmap/sparse/0" / f"{name}.bin").write_bytes(b"12345")


def without_points(scene: Path, parser: ColmapDataParserConfig) -> None:
    (scene / "colmap/sparse/0/points3D.txt").write_text("# none\n")


def with_a_space(scene: Path, parser: ColmapDataParserConfig) -> None:
    first = sorted((scene / "images").iterdir())[0]
    file = scene / "colmap/sparse/0/images.txt"
    file.write_text(file.read_text().replace(first.name, f"DJI {first.name}"))
    first.rename(first.with_name(f"DJI {first.name}"))


def with_one_list(scene: Path, parser: ColmapDataParserConfig) -> None:
    names = sorted(file.name for file in (scene / "images").iterdir())
    (scene / "train_list.txt").write_text("\n".join(names))


def all_held_out(scene: Path, parser: ColmapDataParserConfig) -> None:
    parser.eval_mode, parser.eval_interval = "interval", 1


def shrunk_by_nothing(scene: Path, parser: ColmapDataParserConfig) -> None:
    parser.downscale_factor = 0


@pytest.mark.parametrize(
    "spoil, words",
    [
        (shrunk_by_nothing, "--downscale-factor must be 1 or more"),
        (ends_early, "ends too early"),
        (without_points, "--load-3D-points False"),
        (with_a_space, "must not have spaces"),
        (with_one_list, "val_list.txt"),
        (all_held_out, "--eval-mode all"),
    ],
)
def test_colmap_models_with_which_nobody_can_train(spoil, words, tmp_path, capsys) -> None:
    scene = write_colmap(seen_through(STRAIGHT), tmp_path / "scene", "PINHOLE", PINHOLE)
    parser = ColmapDataParserConfig(data=scene, downscale_factor=1, **SPLIT)
    spoil(scene, parser)
    with pytest.raises(SystemExit):
        trained(parser, tmp_path)
    assert words in " ".join(capsys.readouterr().out.split())


# -- lists of images -----------------------------------------------------------------------------

LISTS = {"train": [5, 0, 3], "val": [4], "test": [1, 2]}


def with_lists_of_names(scene: Path, lists: dict[str, list[int]]) -> None:
    def add(content: dict[str, Any]) -> None:
        for split, numbers in lists.items():
            content[f"{split}_filenames"] = [f"images/{number:03d}.png" for number in numbers]

    edit_json(scene, add)


def with_text_files(scene: Path, lists: dict[str, list[int]]) -> None:
    for split, numbers in lists.items():
        names = "\n".join(f"{number:03d}.png" for number in numbers)
        (scene / f"{split}_list.txt").write_text(names + "\n")


@pytest.mark.parametrize(
    ("write", "add"), [(nerfstudio, with_lists_of_names), (colmap, with_text_files)]
)
def test_lists_of_images(write, add, tmp_path: Path) -> None:
    parser = write(tmp_path / "scene")
    add(tmp_path / "scene", LISTS)
    trainer = trained(parser, tmp_path)
    assert training(trainer) == sorted(LISTS["train"])
    assert len(trainer.pipeline.datamanager.eval_dataset) == 1  # val's, while training
    assert held_out(trainer, "test") == LISTS["test"]  # ns-eval's
    assert color_error(trainer) < 0.08


@pytest.mark.parametrize(
    ("write", "add"), [(nerfstudio, with_lists_of_names), (colmap, with_text_files)]
)
def test_lists_for_training_and_testing_only_are_not_enough(write, add, tmp_path, capsys) -> None:
    parser = write(tmp_path / "scene")
    add(tmp_path / "scene", {"train": [0, 3, 5], "test": [1], "validation": [2]})
    with pytest.raises(SystemExit):
        trained(parser, tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    assert "split val is missing" in said
    assert ("val_filenames" if write is nerfstudio else "val_list.txt") in said


# -- smaller images ------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [nerfstudio, colmap])
def test_images_a_third_as_large(write, tmp_path: Path) -> None:
    """A downscale factor of 3 reads images_3/, where sizes were rounded down."""
    parser = write(tmp_path / "scene")
    scene = seen_through(STRAIGHT)
    scene.write_images(tmp_path / "scene" / "images_3", scene.shrunk(WIDTH // 3, HEIGHT // 3))
    parser.downscale_factor = 3
    trainer = trained(parser, tmp_path)
    camera = trainer.pipeline.datamanager.train_camera(0)
    assert (camera.width, camera.height) == (WIDTH // 3, HEIGHT // 3) == (20, 16)
    assert camera.fx == pytest.approx(F / 3)
    assert trainer.pipeline.datamanager.train_dataset.image_filenames[0].parent.name == "images_3"


def test_images_that_were_rounded_otherwise(tmp_path: Path, capsys) -> None:
    parser = colmap(tmp_path / "scene")
    scene = seen_through(STRAIGHT)
    scene.write_images(tmp_path / "scene" / "images_3", scene.shrunk(21, 17))
    parser.downscale_factor = 3
    with pytest.raises(SystemExit):
        trained(parser, tmp_path)
    assert "21 x 17 pixels, its camera 20 x 16" in " ".join(capsys.readouterr().out.split())
    parser.downscale_rounding_mode = "round"
    trained(parser, tmp_path)


@pytest.mark.parametrize("cache_images", ["disk", "gpu"])
def test_any_factor_without_a_folder_of_smaller_images(cache_images: str, tmp_path: Path) -> None:
    config = make_config(tmp_path / "scene", tmp_path)
    config.pipeline.datamanager.dataparser = colmap(tmp_path / "scene")
    config.pipeline.datamanager.cache_images = cache_images
    config.pipeline.datamanager.camera_res_scale_factor = 0.6
    trainer = train(config)
    camera = trainer.pipeline.datamanager.train_camera(0)
    assert (camera.width, camera.height) == (37, 30)
    assert lens_error(trainer, seen_through(STRAIGHT)) < 0.05
