"""Nerfstudio's order of images, known ahead."""

from __future__ import annotations

import torch
from nerfstudio.data.datamanagers.full_images_datamanager import (
    FullImageDatamanager,
    FullImageDatamanagerConfig,
)
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

from gsscale_nerfstudio.datamanager import GSScaleDatamanagerConfig
from tests import runs


def managers(scene):
    parser = NerfstudioDataParserConfig(
        data=scene, load_3D_points=True, eval_mode="interval", eval_interval=4
    )
    return [
        config(
            dataparser=parser,
            cache_images="gpu",
            cache_images_type="uint8",
            train_cameras_sampling_seed=7,
        ).setup(device="cpu")
        for config in (FullImageDatamanagerConfig, GSScaleDatamanagerConfig)
    ]


def test_cameras_come_in_nerfstudios_order_and_are_known_ahead(tmp_path):
    theirs, ours = managers(runs.tiny_scene(tmp_path / "scene"))
    steps = 3 * len(ours.train_dataset) + 2
    seen = []
    for step in range(steps):
        ahead = ours.upcoming(5 if step % 2 else 1)
        camera, data = ours.next_train(step)
        expected, their_data = theirs.next_train(step)
        seen.append(camera.metadata["cam_idx"])
        assert seen[-1] == expected.metadata["cam_idx"] == ahead[0]
        assert torch.equal(data["image"], their_data["image"])
        assert torch.equal(camera.camera_to_worlds, expected.camera_to_worlds)
        assert torch.equal(camera.fx, expected.fx)
    epoch = len(ours.train_dataset)
    for start in range(0, steps - epoch, epoch):
        assert sorted(seen[start : start + epoch]) == list(range(epoch))


def test_what_is_handed_out_is_not_the_cached_dictionary(tmp_path):
    _, ours = managers(runs.tiny_scene(tmp_path / "scene"))
    for step in range(2 * len(ours.train_dataset)):
        _, data = ours.next_train(step)
        data.clear()
    assert all("image" in cached for cached in ours.cached_train)


def test_images_that_were_cut_out_are_stored_in_one_piece(tmp_path, monkeypatch):
    _, ours = managers(runs.tiny_scene(tmp_path / "scene"))
    base = FullImageDatamanager._load_images

    def cut(self, *arguments):
        images = base(self, *arguments)
        for data in images:
            data["image"] = data["image"][:-1, :-1]
        return images

    monkeypatch.setattr(FullImageDatamanager, "_load_images", cut)
    images = ours._load_images("train", "gpu")
    assert all(data["image"].is_contiguous() for data in images)
    assert images[0]["image"].shape == (47, 63, 3)
