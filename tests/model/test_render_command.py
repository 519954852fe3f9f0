"""``ns-render`` in this process, where one can see who culls and gathers what."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from nerfstudio.scripts import render

from gsscale_nerfstudio.engines import HostEngine
from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.render_command import adapt_ns_render
from tests.runs import make_config, tiny_scene, train

FRAMES = 5


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration file of a run with two held-out images."""
    folder = tmp_path_factory.mktemp("render")
    settings = make_config(tiny_scene(folder / "scene"), folder / "out")
    train(settings)
    settings.save_config()
    return settings.get_base_dir() / "config.yml"


@pytest.fixture
def ns_render(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[bytes]]:
    """Runs the command; returns the frames."""
    ffmpeg = tmp_path / "bin" / "ffmpeg"
    ffmpeg.parent.mkdir()
    ffmpeg.touch(mode=0o755)  # asked for even where there is no video
    monkeypatch.setenv("PATH", str(ffmpeg.parent), prepend=":")

    def run(name: str, *arguments: object) -> list[bytes]:
        folder = tmp_path / name
        given = (*arguments, "--load-config", config, "--output-path", folder)
        given += ("--output-format", "images", "--image-format", "png")
        monkeypatch.setattr(sys, "argv", ["ns-render", *map(str, given)])
        render.entrypoint()
        return [file.read_bytes() for file in sorted(folder.glob("*.png"))]

    return run


@pytest.mark.parametrize(
    "path",
    [
        ("interpolate", "--interpolation-steps", FRAMES, "--downscale-factor", 2),
        ("spiral", "--seconds", 1, "--frame-rate", FRAMES),
    ],
    ids=lambda path: path[0],
)
def test_the_next_view_is_prepared_while_the_present_one_is_drawn(ns_render, monkeypatch, path):
    ahead: list[tuple[str, bool]] = []

    def watch(name: str) -> None:
        original = getattr(HostEngine, name)

        def watched(self, *args, **kwargs):
            ahead.append((name, threading.current_thread() is not threading.main_thread()))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(HostEngine, name, watched)

    watch("_cull")
    watch("_gather")
    frames = ns_render("ahead", *path)
    first, others = ahead[:2], ahead[2:]
    assert first == [("_cull", False), ("_gather", False)]
    assert others == [("_cull", True), ("_gather", True)] * (FRAMES - 1)

    monkeypatch.setattr(HostEngine, "announce_fetch", lambda *_: None)
    ahead.clear()
    assert ns_render("apart", *path) == frames
    assert not any(in_worker for _, in_worker in ahead)
    assert len(set(frames)) == FRAMES


@pytest.mark.parametrize("kind", ["fisheye", "equirectangular", "omnidirectional", "vr180"])
def test_a_path_of_other_cameras_than_pinholes_ends_in_a_sentence(
    ns_render, tmp_path, capsys, kind
):
    """The path as Nerfstudio's viewer saves it."""
    file = tmp_path / "path.json"
    pose = torch.eye(4).flatten().tolist()
    path = {"render_height": 40, "render_width": 56, "seconds": 1, "crop": None}
    path["camera_path"] = [{"camera_to_world": pose, "fov": 60}] * 2
    file.write_text(json.dumps({**path, "camera_type": "perspective"}))
    assert len(ns_render("straight", "camera-path", "--camera-path-filename", file)) == 2
    file.write_text(json.dumps({**path, "camera_type": kind}))
    with pytest.raises(SystemExit) as ended:
        ns_render("bent", "camera-path", "--camera-path-filename", file)
    assert ended.value.code == 1
    said = " ".join(capsys.readouterr().out.split())
    assert kind.upper() in said and "gsscale draws pinholes' only; choose Perspective" in said


def test_other_methods_are_rendered_as_ever(monkeypatch):
    given: list[tuple] = []

    def original(*args, **kwargs):
        given.append((args, kwargs))

    module = SimpleNamespace(_render_trajectory_video=original, RandomCamerasDataManager=int)
    monkeypatch.setitem(sys.modules, "nerfstudio.scripts.render", module)
    for _ in range(2):  # get_checkpoint_dir is called more than once
        adapt_ns_render()
    module._render_trajectory_video("pipeline", "cameras", seconds=2.0)
    assert given == [(("pipeline", "cameras"), {"seconds": 2.0})]
    assert module._render_trajectory_video.__wrapped__ is original
    assert isinstance(1, module.RandomCamerasDataManager)
    assert not isinstance("another data manager", module.RandomCamerasDataManager)


def test_a_spiral_without_held_out_images_ends_in_a_sentence(config):
    settings = yaml.load(config.read_text(), Loader=yaml.Loader)
    datamanager = settings.pipeline.datamanager.setup(device="cpu", test_mode="test")
    camera, _ = datamanager.eval_dataloader.get_camera(image_idx=0)
    assert torch.equal(
        camera.camera_to_worlds[0], datamanager.eval_dataset.cameras.camera_to_worlds[0]
    )
    datamanager.eval_dataset._dataparser_outputs.image_filenames.clear()
    with pytest.raises(GSScaleError, match="none is held out; use ns-render interpolate"):
        datamanager.eval_dataloader  # noqa: B018
