"""The written scene: its images, cameras and points belong together, also for Nerfstudio."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from gsscale_nerfstudio.demo import scene as scene_module
from gsscale_nerfstudio.demo.cameras import Pinhole, orbit
from gsscale_nerfstudio.demo.ply import count_points
from gsscale_nerfstudio.demo.raytrace import radiance, trace
from gsscale_nerfstudio.demo.scene import write_scene
from gsscale_nerfstudio.demo.village import build_village
from gsscale_nerfstudio.errors import GSScaleError

STRAIGHT = np.eye(3)
TINY = {"images": 7, "width": 64, "height": 48, "points": 300}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_scene(tmp_path_factory.mktemp("data") / "scene", images=8, points=800)


@pytest.fixture(scope="module")
def meta(folder):
    return json.loads((folder / "transforms.json").read_text())


@pytest.fixture(scope="module")
def parsed(folder):
    """The scene as Nerfstudio reads it, in the coordinates it was written in."""
    from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

    config = NerfstudioDataParserConfig(
        data=folder,
        load_3D_points=True,
        orientation_method="none",
        center_method="none",
        auto_scale_poses=False,
        eval_mode="all",
    )
    return config.setup().get_dataparser_outputs("train")


def color_errors(folder, meta, parsed, bend=STRAIGHT, shift=0.0):
    """Differences [k] between points' colours and those of the pixels that they project to.

    Over all images and all points that are visible there. ``bend`` is multiplied onto the cameras'
    axes and ``shift`` added to image positions, to see that the check notices.
    """
    xyz = parsed.metadata["points3D_xyz"].double().numpy()
    rgb = parsed.metadata["points3D_rgb"].numpy() / 255.0
    world = build_village(seed=0)
    errors = []
    for frame in meta["frames"]:
        pose = np.array(frame["transform_matrix"])
        pixels = np.asarray(Image.open(folder / frame["file_path"])) / 255.0
        offset = xyz - pose[:3, 3]
        reach = np.linalg.norm(offset, axis=1)
        # Whether something is in front of a point does not depend on how the camera is turned.
        free = trace(world, pose[:3, 3], offset / reach[:, None]).distance > reach - 0.05
        right, up, back = (offset @ (pose[:3, :3] @ bend)).T
        x = meta["fl_x"] * right / -back + meta["cx"] + shift
        y = meta["fl_y"] * -up / -back + meta["cy"] + shift
        inside = (back < 0) & (x >= 0) & (x < meta["w"]) & (y >= 0) & (y < meta["h"]) & free
        seen = pixels[y[inside].astype(int), x[inside].astype(int)]
        errors.append(np.abs(seen - rgb[inside]).mean(axis=1))
    return np.concatenate(errors)


def test_points_have_the_colours_of_the_pixels_they_project_to(folder, meta, parsed):
    errors = color_errors(folder, meta, parsed)
    assert len(errors) > 3 * len(parsed.metadata["points3D_rgb"])
    assert np.median(errors) < 0.02
    assert np.mean(errors < 0.1) > 0.8


@pytest.mark.parametrize(
    ("bend", "shift"),
    [
        (np.diag([1.0, -1.0, -1.0]), 0.0),  # OpenCV's axes
        (np.diag([-1.0, 1.0, 1.0]), 0.0),  # mirrored
        (np.diag([1.0, -1.0, 1.0]), 0.0),  # upside down
        (STRAIGHT, 2.0),  # two pixels off
    ],
)
def test_the_colour_check_notices_wrong_cameras(folder, meta, parsed, bend, shift):
    errors = color_errors(folder, meta, parsed, bend, shift)
    assert len(errors) == 0 or np.median(errors) > 0.03


def test_nerfstudio_casts_the_rays_that_the_images_were_traced_with(parsed):
    import torch

    lens, poses = Pinhole(160, 120), orbit(8)
    coords = torch.tensor([[0.5, 0.5], [119.5, 0.5], [30.25, 140.75]])  # (row, column)
    for number in (0, 3):
        bundle = parsed.cameras.generate_rays(number, coords=coords)
        expected = lens.directions(poses[number], coords.flip(-1).double().numpy())
        np.testing.assert_allclose(bundle.directions.numpy(), expected, atol=1e-6)
        np.testing.assert_allclose(
            bundle.origins.numpy(), np.tile(poses[number][:3, 3], (3, 1)), atol=1e-6
        )


def test_pixels_are_averages_over_their_own_area(folder, meta):
    world, lens = build_village(0), Pinhole(160, 120)
    inside = (np.arange(8) + 0.5) / 8
    offsets = np.stack(np.meshgrid(inside, inside), axis=-1).reshape(-1, 2)
    for number in (0, 5):
        frame = meta["frames"][number]
        pixels = np.asarray(Image.open(folder / frame["file_path"])) / 255.0
        pose = np.array(frame["transform_matrix"])
        corners = np.random.default_rng(number).integers([160, 120], size=(300, 2))
        positions = (corners[:, None] + offsets).reshape(-1, 2)
        color, _ = radiance(world, pose[:3, 3], lens.directions(pose, positions))
        area = color.reshape(300, 64, 3).mean(axis=1)
        error = pixels[corners[:, 1], corners[:, 0]] - area
        # Four rays against 64: what is left is sampling noise at edges.
        assert np.sqrt((error**2).mean()) < 0.05


def test_files_are_complete(folder, meta):
    assert sorted(p.name for p in folder.iterdir()) == ["images", "points3d.ply", "transforms.json"]
    assert len(meta["frames"]) == 8
    assert count_points(folder / meta["ply_file_path"]) == 800
    for frame in meta["frames"]:
        with Image.open(folder / frame["file_path"]) as image:
            assert image.size == (meta["w"], meta["h"]) == (160, 120)
            assert image.mode == "RGB"
        rotation = np.array(frame["transform_matrix"])[:3, :3]
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(rotation) > 0
        right, up, back = rotation.T
        assert right[2] == pytest.approx(0.0) and up[2] > 0.0 and back[2] > 0.0
    view_angle = 2 * np.arctan(meta["w"] / 2 / meta["fl_x"])
    assert np.degrees(view_angle) == pytest.approx(50.0)


def test_no_camera_sees_the_sky():
    world, lens = build_village(0), Pinhole(160, 120)
    corners = np.array([[0.0, 0.0], [160.0, 0.0], [80.0, 0.0]])
    for pose in orbit(40):
        assert np.all(
            np.isfinite(trace(world, pose[:3, 3], lens.directions(pose, corners)).distance)
        )


def test_images_are_too_varied_for_one_colour_to_explain(folder):
    images = [np.asarray(Image.open(path)) / 255.0 for path in (folder / "images").iterdir()]
    best = [-10 * np.log10(image.var(axis=(0, 1)).mean()) for image in images]
    assert np.mean(best) < 14.0


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_seed_gives_one_scene(tmp_path):
    first = contents(write_scene(tmp_path / "a", **TINY))
    assert contents(write_scene(tmp_path / "b", **TINY)) == first
    other = contents(write_scene(tmp_path / "c", **TINY, seed=1))
    assert other.keys() == first.keys()
    assert all(other[name] != first[name] for name in first if not name.endswith(".json"))


def test_a_failure_leaves_no_half_written_scene(tmp_path, monkeypatch):
    before = contents(write_scene(tmp_path / "old", **TINY))

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(scene_module, "write_points", fail)
    for name in ("new", "old"):
        with pytest.raises(OSError, match="disk full"):
            write_scene(tmp_path / name, **TINY, seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert contents(tmp_path / "old") == before


def test_an_earlier_scene_is_replaced(tmp_path):
    write_scene(tmp_path / "scene", **{**TINY, "images": 9})
    write_scene(tmp_path / "scene", **TINY)
    assert len(list((tmp_path / "scene" / "images").iterdir())) == TINY["images"]
    assert [path.name for path in tmp_path.iterdir()] == ["scene"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(GSScaleError, match="no scene"):
        write_scene(tmp_path, **TINY)
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_loads_in_nerfstudios_data_manager(folder):
    from nerfstudio.data.datamanagers.full_images_datamanager import FullImageDatamanagerConfig
    from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

    parser = NerfstudioDataParserConfig(
        data=folder, load_3D_points=True, eval_mode="interval", eval_interval=6
    )
    manager = FullImageDatamanagerConfig(
        dataparser=parser, cache_images="gpu", cache_images_type="uint8"
    ).setup(device="cpu", test_mode="val")
    assert len(manager.train_dataset) == 6
    assert len(manager.eval_dataset) == 2
    camera, batch = manager.next_train(0)
    assert tuple(batch["image"].shape) == (120, 160, 3)
    assert int(camera.width) == 160
    # Poses are centred and scaled to the unit cube: the points have to follow.
    points = manager.train_dataparser_outputs.metadata["points3D_xyz"]
    assert float(points[:, :2].abs().max()) < 3.0
