"""Images from the disk, and their cameras, are those that Nerfstudio caches, bit for bit."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.datamanagers.full_images_datamanager import (
    FullImageDatamanager,
    FullImageDatamanagerConfig,
)
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import Image

from gsscale_nerfstudio.datamanager import GSScaleDatamanagerConfig
from gsscale_nerfstudio.images import undistort_cameras, undistorted
from tests import runs

BROWN = {"k1": -0.12, "k2": 0.03, "p1": 0.002, "p2": -0.004}
INTRINSICS = ("w", "h", "fl_x", "fl_y", "cx", "cy")


def distort(content, **parameters):
    content.update(parameters)


def fisheye(content):
    content.update(camera_model="OPENCV_FISHEYE", k1=0.05, k2=-0.01, k3=0.002, k4=0.0)


def lens_each(content):
    """Each frame has a lens of its own; that of the last one draws straight lines."""
    last = len(content["frames"]) - 1
    for place, frame in enumerate(content["frames"]):
        frame.update({name: content[name] for name in INTRINSICS}, **dict.fromkeys(BROWN, 0.0))
        if place < last:
            frame.update(k1=-0.05 * (place + 1), cx=content["cx"] + place)
    for name in INTRINSICS:
        del content[name]


def masks(scene, content):
    distort(content, **BROWN)
    for place, frame in enumerate(content["frames"]):
        mask = np.full((48, 64), 255, np.uint8)
        mask[place : place + 20, 5:30] = 0
        Image.fromarray(mask).save(scene / f"mask{place}.png")
        frame["mask_path"] = f"mask{place}.png"


def rewritten(scene, content, ending, mode, **options):
    for frame in content["frames"]:
        file = scene / frame["file_path"]
        image = Image.open(file).convert(mode)
        if mode == "RGBA":
            image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(file.with_suffix(ending), **options)
        frame["file_path"] = str(file.with_suffix(ending).relative_to(scene))


CASES = {
    "straight lines": lambda scene, content: None,
    "perspective": lambda scene, content: distort(content, **BROWN),
    "fisheye": lambda scene, content: fisheye(content),
    "a lens each": lambda scene, content: lens_each(content),
    "masks": masks,
    "transparent": lambda scene, content: rewritten(scene, content, ".png", "RGBA"),
    "grey": lambda scene, content: rewritten(scene, content, ".jpg", "L"),
    "JPEG": lambda scene, content: rewritten(scene, content, ".jpg", "RGB", quality=60),
}


def manager(kind, scene, **config):
    parser = NerfstudioDataParserConfig(
        data=scene, load_3D_points=True, eval_mode="interval", eval_interval=4
    )
    config = {"cache_images": "gpu", "cache_images_type": "uint8", **config}
    return kind(dataparser=parser, **config).setup(device="cpu")


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert ours[name].dtype == value.dtype
            assert torch.equal(ours[name], value), name
            assert ours[name].is_contiguous()
        else:
            assert ours[name] == value


def same_camera(ours, theirs):
    for name in ("fx", "fy", "cx", "cy", "width", "height", "camera_to_worlds", "camera_type"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


@pytest.mark.parametrize("keep, image_type", [("some", "uint8"), ("all", "float32")])
@pytest.mark.parametrize("case", CASES)
def test_pixels_masks_and_cameras(case, keep, image_type, tmp_path):
    scene = runs.tiny_scene(tmp_path / "scene", points=50)
    runs.edit_json(scene, lambda content: CASES[case](scene, content))
    theirs = manager(FullImageDatamanagerConfig, scene, cache_images_type=image_type)
    pixels = 64 * 48 * (4 if image_type == "float32" else 1)
    ours = manager(
        GSScaleDatamanagerConfig,
        scene,
        cache_images="disk",
        cache_images_type=image_type,
        image_memory_gb=1 if keep == "all" else 4 * 5 * pixels / 1e9,
        max_thread_workers=3,
    )
    for step in range(2 * len(theirs.train_dataset) + 1):
        their_camera, their_data = theirs.next_train(step)
        camera, data = ours.next_train(step)
        same(data, their_data)
        same_camera(camera, their_camera)
        assert camera.metadata["cam_idx"] == their_camera.metadata["cam_idx"]
    pairs = list(ours.fixed_indices_eval_dataloader)
    assert len(pairs) == len(ours.fixed_indices_eval_dataloader) == 2
    their_pairs = theirs.fixed_indices_eval_dataloader
    for (camera, data), (their_camera, their_data) in zip(pairs, their_pairs, strict=True):
        same(data, their_data)
        same_camera(camera, their_camera)
    camera, data = ours.next_eval(0)
    same(data, their_pairs[data["image_idx"]][1])
    # Every camera at once, as the viewer and the order of views want them.
    same_camera(ours.train_dataset.cameras, theirs.train_dataset.cameras)
    same_camera(ours.eval_dataset.cameras, theirs.eval_dataset.cameras)


def test_scaled_images(tmp_path):
    scene = runs.tiny_scene(tmp_path / "scene", points=50)
    runs.edit_json(scene, lambda content: CASES["JPEG"](scene, content))
    theirs = manager(FullImageDatamanagerConfig, scene, camera_res_scale_factor=0.4)
    ours = manager(
        GSScaleDatamanagerConfig, scene, camera_res_scale_factor=0.4, cache_images="disk"
    )
    camera, data = ours.next_train(0)
    their_camera, their_data = theirs.next_train(0)
    assert data["image"].shape == (19, 25, 3)
    same(data, their_data)
    same_camera(camera, their_camera)


class OneImage:
    """The part of a data set, and of a data manager, that Nerfstudio's function reads."""

    def __init__(self, camera: Cameras) -> None:
        self.cameras = camera
        self.pixels = torch.randint(0, 256, (60, 80, 3), dtype=torch.uint8)

    def __len__(self) -> int:
        return 1

    def get_data(self, index, image_type):
        return {"image_idx": index, "image": self.pixels.clone()}


def test_a_lens_that_makes_a_mask():
    """FISHEYE624 changes the size of the image, and cuts out a circle."""
    camera = Cameras(
        camera_to_worlds=torch.eye(4)[None, :3],
        fx=torch.tensor([[30.0]]),
        fy=torch.tensor([[30.0]]),
        cx=torch.tensor([[40.5]]),
        cy=torch.tensor([[29.0]]),
        width=torch.tensor([[80]]),
        height=torch.tensor([[60]]),
        distortion_params=torch.tensor([[0.4, -0.2, 0.1, 0, 0, 0, 0.001, 0, 0, 0, 0, 0]]),
        camera_type=CameraType.FISHEYE624,
        metadata={"fisheye_crop_radius": 25.0},
    )
    dataset = OneImage(camera)
    files = copy.deepcopy(camera)
    ours = undistorted(dataset, files, 0, "uint8")
    cameras = copy.deepcopy(camera)
    undistort_cameras(cameras)

    base = FullImageDatamanager.__new__(FullImageDatamanager)
    torch.nn.Module.__init__(base)
    base.train_dataset, base.device = dataset, "cpu"
    base.config = FullImageDatamanagerConfig(cache_images_type="uint8")
    (theirs,) = base._load_images("train", "gpu")
    same(ours, theirs)
    assert ours["mask"].any() and not ours["mask"].all()
    same_camera(cameras, dataset.cameras)
    assert cameras.width.item() == 50
