"""--pipeline.datamanager.train-list and eval-list: who is trained, and who is evaluated."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import (
    DataParser,
    DataParserConfig,
    DataparserOutputs,
)
from PIL import Image

from gsscale_nerfstudio.datamanager import GSScaleDatamanager
from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.images import ListedImages
from gsscale_nerfstudio.images.lists import NameList
from gsscale_nerfstudio.model import GSScaleModel
from gsscale_nerfstudio.trainer import GSScaleTrainerConfig
from tests.data.formats import HEIGHT, IMAGES, WIDTH
from tests.data.test_formats import (
    STRAIGHT,
    blender,
    colmap,
    color_error,
    instant_ngp,
    nerfstudio,
    seen_through,
    stem,
    with_lists_of_names,
    with_text_files,
)
from tests.e2e.test_commands import command
from tests.model.splatfacto import Network
from tests.model.test_bad_input import ends_with_a_sentence
from tests.runs import edit_json, make_config, train

Write = Callable[[Path], DataParserConfig]
NAMES = [f"{number:03d}.png" for number in range(IMAGES)]


@pytest.fixture(autouse=True)
def _no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity", Network)


def written(path: Path, lines: Iterable[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def listed(
    write: Write,
    folder: Path,
    train: Iterable[str] | None = None,
    held_out: Iterable[str] | None = None,
    **model: Any,
) -> GSScaleTrainerConfig:
    """A run of ten steps, two epochs at least, with lists of these lines."""
    parser = write(folder / "scene")
    config = make_config(parser.data, folder / "out", steps=10, **model)
    manager = config.pipeline.datamanager
    manager.dataparser = parser
    if train is not None:
        manager.train_list = written(folder / "train.txt", train)
    if held_out is not None:
        manager.eval_list = written(folder / "eval.txt", held_out)
    return config


def number_of(image: np.ndarray) -> int:
    """Which picture of the village this is."""
    pictures = seen_through(STRAIGHT).images
    # One that is blended with a background is rounded.
    (found,) = [i for i, other in enumerate(pictures) if np.allclose(other, image, rtol=0, atol=1)]
    return found


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Numbers of the images that losses and that metrics of evaluation were computed of."""
    numbers: dict[str, list[int]] = {"trained": [], "evaluated": []}

    def watch(name: str, which: str) -> None:
        original = getattr(GSScaleModel, name)

        def watched(self, outputs, batch, *args, **kwargs):
            numbers[which].append(number_of(batch["image"].cpu().numpy()))
            return original(self, outputs, batch, *args, **kwargs)

        monkeypatch.setattr(GSScaleModel, name, watched)

    watch("get_loss_dict", "trained")
    watch("get_image_metrics_and_images", "evaluated")
    return numbers


def in_blender(number: int) -> str:
    """Where that format has an image: some are in two folders."""
    return f"{'test' if number in (2, 5) else 'train'}/r_{number}.png"


@pytest.mark.parametrize("write", [nerfstudio, colmap, instant_ngp, blender])
@pytest.mark.parametrize("given_lists", ["both", "train", "eval"])
def test_lists_decide_what_is_trained_and_what_is_evaluated(write, given_lists, seen, tmp_path):
    """The formats' own splits would evaluate 0 and 3, or blender's 2 and 5."""
    name = in_blender if write is blender else NAMES.__getitem__
    held_out, trained = {1, 5}, {0, 2, 3, 4}
    if given_lists == "both":
        trained.remove(3)  # in neither
    config = listed(
        write,
        tmp_path,
        None if given_lists == "eval" else map(name, trained),
        None if given_lists == "train" else map(name, held_out),
    )
    if write is blender:  # picture 2 is there, too
        shutil.rmtree(tmp_path / "scene" / "val")
        (tmp_path / "scene" / "transforms_val.json").unlink()
    trainer = train(config)
    assert set(seen["trained"]) == trained
    assert set(seen["evaluated"]) <= held_out
    seen["evaluated"].clear()
    trainer.pipeline.get_average_eval_image_metrics()
    assert sorted(seen["evaluated"]) == sorted(held_out)
    manager = trainer.pipeline.datamanager
    assert sorted(map(stem, manager.train_dataset.image_filenames)) == sorted(trained)
    # Poses of both are in the coordinates of the points.
    if write is not instant_ngp:
        assert color_error(trainer) < 0.08 and color_error(trainer, of_held_out=True) < 0.08


def test_there_is_a_camera_correction_for_each_image_that_is_trained(tmp_path):
    config = listed(nerfstudio, tmp_path, held_out=NAMES[:4])
    config.pipeline.model.camera_optimizer.mode = "SO3xR3"
    assert train(config).pipeline.model.camera_optimizer.pose_adjustment.shape == (2, 6)


def with_masks(write: Write) -> Write:
    """Of image n, row n is masked."""

    def masked(folder: Path) -> DataParserConfig:
        parser = write(folder)
        (folder / "masks").mkdir()
        for number, name in enumerate(NAMES):
            mask = np.full((HEIGHT, WIDTH), 255, np.uint8)
            mask[number] = 0
            Image.fromarray(mask).save(folder / "masks" / name)
        if write is colmap:
            parser.masks_path = Path("masks")
        else:
            edit_json(folder, add_to_frames)
        return parser

    def add_to_frames(content: dict[str, Any]) -> None:
        for frame in content["frames"]:
            frame["mask_path"] = frame["file_path"].replace("images", "masks")

    return masked


@pytest.mark.parametrize("write", [nerfstudio, colmap])
def test_masks_stay_with_their_images(write, tmp_path):
    config = listed(with_masks(write), tmp_path, held_out=[NAMES[2], NAMES[1]])
    manager = train(config).pipeline.datamanager
    for images, numbers in ((manager.cached_train, [0, 3, 4, 5]), (manager.cached_eval, [1, 2])):
        masked = [(~data["mask"][..., 0]).all(dim=1).nonzero().flatten() for data in images]
        assert [rows.tolist() for rows in masked] == [[number] for number in numbers]


# -- the choice itself ---------------------------------------------------------------------------


@dataclass
class Splits(DataParser):
    """Outputs with these images; everything of image n is n."""

    splits: dict[str, list[int]] = field(default_factory=dict)

    def _generate_dataparser_outputs(self, split: str = "train", **_: Any) -> DataparserOutputs:
        numbers = self.splits[split]
        n, values = len(numbers), torch.tensor(numbers, dtype=torch.float32)
        return DataparserOutputs(
            image_filenames=[Path(f"/images/{number}.png") for number in numbers],
            mask_filenames=[Path(f"/masks/{number}.png") for number in numbers] or None,
            cameras=Cameras(
                camera_to_worlds=values[:, None, None].expand(n, 3, 4),
                fx=values,
                fy=values,
                cx=values,
                cy=values,
                width=values.long(),
                height=values.long(),
                distortion_params=values[:, None].expand(n, 6),
                times=values,
                metadata={"lens": values[:, None], "model": "any"},
            ),
            metadata={
                "depth_filenames": [Path(f"/depths/{number}.png") for number in numbers] or None,
                "points3D_xyz": torch.full((n, 3), float(split == "train")),
                "mask_color": (1.0,) * n,
            },
        )


numbers = st.lists(st.integers(0, 9), max_size=8, unique=True)


@given(train=numbers.filter(bool), val=numbers, test=numbers, data=st.data())
def test_what_an_image_has_stays_with_it(tmp_path_factory, train, val, test, data):
    """Masks, depths and all that cameras have, however the splits overlap."""
    every = sorted({*train, *val, *test})
    choice = data.draw(st.permutations(every).map(lambda order: order[: len(order) // 2]))
    if not choice:
        return
    file = written(tmp_path_factory.mktemp("lists") / "list.txt", map(str, choice))
    parser = Splits(DataParserConfig())
    parser.splits = {"train": train, "val": val, "test": test}
    as_train = ListedImages(parser, file, None)
    as_eval = ListedImages(parser, None, file)
    rest = sorted(set(every) - set(choice))
    for outputs, expected in (
        (as_train.get_dataparser_outputs("train"), sorted(choice)),
        (as_train.get_dataparser_outputs("val"), rest),
        (as_train.get_dataparser_outputs("test"), rest),
        (as_eval.get_dataparser_outputs("train"), rest),
        (as_eval.get_dataparser_outputs("val"), sorted(choice)),
        (as_eval.get_dataparser_outputs("test"), sorted(choice)),
    ):
        for files in (outputs.image_filenames, outputs.mask_filenames):
            assert [stem(file) for file in files] == expected
        assert [stem(file) for file in outputs.metadata["depth_filenames"]] == expected
        cameras = outputs.cameras
        values = [
            cameras.camera_to_worlds[:, 1, 2],
            *(getattr(cameras, name)[:, 0] for name in ("fx", "fy", "cx", "cy", "width", "height")),
            cameras.distortion_params[:, 3],
            cameras.times[:, 0],
            cameras.metadata["lens"][:, 0],
        ]
        assert all(value.tolist() == expected for value in values)
        assert cameras.metadata["model"] == "any"
        # Points are those that came with the training images.
        assert outputs.metadata["points3D_xyz"].tolist() == [[1.0] * 3] * len(train)
        assert outputs.metadata["mask_color"] == (1.0,) * len(train)


FILES = [Path("s/images/left/a.jpg"), Path("s/images/right/a.jpg"), Path("s/images/b.1.png")]


@pytest.mark.parametrize(
    "text, found",
    [
        ("b.1.png", {2}),
        ("b.1\n", {2}),
        ("left/a.jpg\n\n  # right/a.jpg\nb.1.png", {0, 2}),
        ("./right/a  \r\nright/a.jpg\r\n", {1}),
        ("images/right/a.jpg", {1}),
        (str(FILES[0].absolute()), {0}),
        ("\ufeffleft/a.jpg", {0}),
    ],
)
def test_names(tmp_path, text, found):
    (tmp_path / "list.txt").write_text(text, "utf-8")
    assert NameList(tmp_path / "list.txt").find(FILES) == found


@pytest.mark.parametrize("name", ["a.png", "b", "1.png", "up/left/a.jpg", ".", "..", "/left/a.jpg"])
def test_unknown_names(tmp_path, name):
    names = NameList(written(tmp_path / "list.txt", ["b.1.png", name]))
    with pytest.raises(GSScaleError, match="is no image of the data set") as raised:
        names.find(FILES)
    assert str(raised.value).startswith(f"{name} in the list of images {tmp_path / 'list.txt'}")


# -- lists and splits that the data has itself ---------------------------------------------------


@pytest.mark.parametrize("there", [["test"], ["train", "test"]])
def test_lists_beside_colmaps_images_can_be_named(there, tmp_path):
    """Nerfstudio itself would insist on a third."""
    config = listed(colmap, tmp_path)
    scene = tmp_path / "scene"
    with_text_files(scene, {"train": [0, 2], "test": [4, 5]})
    manager = config.pipeline.datamanager
    manager.eval_list = scene / "test_list.txt"
    if "train" in there:
        manager.train_list = scene / "train_list.txt"
    else:
        (scene / "train_list.txt").unlink()
    manager = train(config).pipeline.datamanager
    trained = [0, 2] if "train" in there else [0, 1, 2, 3]
    assert [stem(file) for file in manager.train_dataset.image_filenames] == trained
    assert [stem(file) for file in manager.eval_dataset.image_filenames] == [4, 5]


def test_a_split_that_the_data_does_not_have_is_told(tmp_path, capsys):
    config = listed(nerfstudio, tmp_path, held_out=[NAMES[0]])
    with_lists_of_names(tmp_path / "scene", {"train": [0, 1, 2], "test": [3]})
    manager = train(config).pipeline.datamanager
    assert [stem(file) for file in manager.train_dataset.image_filenames] == [1, 2, 3]
    said = " ".join(capsys.readouterr().out.split())
    assert "no images for val (The dataset's list of filenames for split val is missing.)" in said
    assert "3 images are for training, 1 for evaluation, and 0 are left out" in said


def test_the_data_need_not_have_a_list_for_training(tmp_path, capsys):
    config = listed(nerfstudio, tmp_path, held_out=[NAMES[0]])
    with_lists_of_names(tmp_path / "scene", {"val": [0, 1], "test": [0, 2, 3]})
    manager = train(config).pipeline.datamanager
    assert [stem(file) for file in manager.train_dataset.image_filenames] == [1, 2, 3]
    assert "no images for train" in " ".join(capsys.readouterr().out.split())


def test_a_fault_of_the_list_for_training_is_no_missing_list(tmp_path, capsys):
    """Images that are listed for nothing else would be left out, with a line that nobody reads."""
    config = listed(nerfstudio, tmp_path, held_out=[NAMES[0]])
    with_lists_of_names(tmp_path / "scene", {"train": [0, 1, 2, 3], "val": [0, 1], "test": [0, 1]})
    edit_json(tmp_path / "scene", lambda c: c["train_filenames"].append("images/typo.png"))
    with pytest.raises(SystemExit):
        train(config)
    assert "could not be loaded" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("data", ["absolute", "relative"])
def test_lists_are_found_from_where_the_data_is(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = listed(nerfstudio, tmp_path, held_out=[NAMES[0]])
    manager = config.pipeline.datamanager
    manager.eval_list = Path("eval.txt")
    if data == "relative":
        config.data = manager.data = Path("scene")
    config.save_config()
    saved = yaml.load((config.get_base_dir() / "config.yml").read_text(), Loader=yaml.Loader)
    found = saved.pipeline.datamanager.eval_list
    assert found == (tmp_path / "eval.txt" if data == "absolute" else Path("eval.txt"))
    assert saved.pipeline.datamanager.train_list is None


def test_the_same_image_in_all_splits_is_trained_once(tmp_path):
    config = listed(nerfstudio, tmp_path, held_out=[NAMES[0]])
    config.pipeline.datamanager.dataparser.eval_mode = "all"
    manager = train(config).pipeline.datamanager
    assert [stem(file) for file in manager.train_dataset.image_filenames] == [1, 2, 3, 4, 5]


def test_no_image_is_opened_for_rendering_a_path(tmp_path):
    """Lists are needed there, too: camera corrections belong to training images."""
    config = listed(nerfstudio, tmp_path, held_out=[NAMES[0]])
    shutil.rmtree(tmp_path / "scene" / "images")
    manager = config.pipeline.datamanager.setup(device="cpu", test_mode="inference")
    assert isinstance(manager, GSScaleDatamanager)
    assert len(manager.train_dataset) == 5


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lines, words",
    [
        ({"held_out": ["000.png", "7.png"]}, "7.png in the list of images {eval} is no image"),
        ({"train": ["7.png"]}, "7.png in the list of images {train} is no image"),
        ({"held_out": ["# 000.png", ""]}, "{eval} has no names; write one on each line"),
        ({"train": NAMES[:3], "held_out": NAMES[2:4]}, "002.png is in both lists of images, "),
        ({"held_out": NAMES}, "{eval} has all 6 images, so that none is left for training"),
        ({"train": NAMES}, "{train} has all 6 images, so that none is left for evaluation"),
    ],
)
def test_lists_that_do_not_fit_end_in_a_sentence(lines, words, tmp_path, capsys):
    words = words.format(eval=tmp_path / "eval.txt", train=tmp_path / "train.txt")
    ends_with_a_sentence(listed(nerfstudio, tmp_path, **lines), capsys, words)


def test_both_lists_may_have_all_images_between_them(tmp_path):
    manager = train(listed(nerfstudio, tmp_path, NAMES[1:], NAMES[:1])).pipeline.datamanager
    assert (len(manager.train_dataset), len(manager.eval_dataset)) == (5, 1)


def test_a_name_that_several_images_have_ends_in_a_sentence(tmp_path, capsys):
    config = listed(blender, tmp_path, held_out=["r_2"])  # in val/ and in test/
    scene = tmp_path / "scene"
    words = f"can be {scene / 'test' / 'r_2.png'} or {scene / 'val' / 'r_2.png'}; write"
    ends_with_a_sentence(config, capsys, "r_2 in the list of images", words)


def test_a_list_that_cannot_be_read_ends_in_a_sentence(tmp_path, capsys):
    config = listed(nerfstudio, tmp_path, held_out=NAMES[:1])
    (tmp_path / "eval.txt").write_bytes(b"\xff\xfe0\x000\x00")
    ends_with_a_sentence(config, capsys, "eval.txt cannot be read", "save it as UTF-8")


# -- Nerfstudio's commands -----------------------------------------------------------------------


@pytest.mark.slow
def test_commands_heed_the_lists(tmp_path, monkeypatch):
    nerfstudio(tmp_path / "scene")
    written(tmp_path / "train.txt", ["000.png", "002.png"])
    written(tmp_path / "eval.txt", ["004", "001"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "ffmpeg").touch(mode=0o755)
    command(
        "ns-train", "gsscale", "--data", "scene", "--output-dir", "out", "--experiment-name", "e",
        "--timestamp", "t", "--vis", "tensorboard", "--max-num-iterations", 3,
        "--pipeline.model.num-downscales", 0, "--pipeline.datamanager.train-list", "train.txt",
        "--pipeline.datamanager.eval-list", "eval.txt", "nerfstudio-data",
    )  # fmt: skip
    config = Path("out/e/gsscale/t/config.yml")
    command("ns-eval", "--load-config", config, "--output-path", "eval.json",
            "--render-output-path", "pairs")  # fmt: skip
    assert json.loads(Path("eval.json").read_text())["results"]["psnr"] > 3
    pairs = [np.asarray(Image.open(file)) for file in Path("pairs").glob("*.png")]
    assert sorted(number_of(pair[:, :WIDTH]) for pair in pairs) == [1, 4]

    command("ns-render", "dataset", "--load-config", config, "--output-path", "renders",
            "--split", "train+test", "--rendered-output-names", "gt-rgb",
            "--image-format", "png")  # fmt: skip
    rendered = {str(file.relative_to("renders")) for file in Path("renders").rglob("*.png")}
    assert rendered == {
        f"{split}/gt-rgb/{number:03d}.png"
        for split, numbers in {"train": (0, 2), "test": (1, 4)}.items()
        for number in numbers
    }
    for file in Path("renders").rglob("*.png"):
        assert number_of(np.asarray(Image.open(file))) == stem(file)

    Path("eval.txt").unlink()
    with pytest.raises(AssertionError) as failed:
        command("ns-eval", "--load-config", config, "--output-path", "eval.json")
    said = str(failed.value)
    assert "Traceback" not in said
    assert re.search(r"gsscale:.* list of images eval.txt cannot be read .* config.yml", said)
