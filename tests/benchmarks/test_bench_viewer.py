"""viewer.py, on a few thousand rows."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from benchmarks import camera_stamp, machine, viewer, viewer_flight
from benchmarks.errors import BenchmarkError
from benchmarks.viewer import ViewerArgs
from benchmarks.viewer_flight import PER_CAMERA, path_along
from tests.benchmarks.flat_flight import flight
from tests.runs import tiny_scene


def test_a_training_is_looked_at(tmp_path, monkeypatch, make_comparison):
    monkeypatch.setattr(machine, "describe_apart", lambda: make_comparison().machine)
    args = ViewerArgs(
        tiny_scene(tmp_path / "scene"),
        rows=500,
        visible=0.5,
        seconds=2.0,
        warmup=5,
        stops=2,
        max_res=128,
        overrides=("machine.device-type=cpu",),
        dataparser_overrides=("eval-mode=interval", "eval-interval=4"),
        output=tmp_path / "viewer.json",
        commit="abc",
    )
    console = Console(file=io.StringIO(), width=200)
    viewer.measure(args, console)
    report = json.loads(args.output.read_text())
    assert report["kind"] == "viewer" and "--seconds 2.0" in report["command"]
    assert report["rows"] == 500 and report["messages"] == 20
    assert report["it_per_s_alone"] > 0
    # Nerfstudio lets training wait as long as the camera moves.
    assert report["it_per_s_moving"] < max(report["it_per_s_alone"], report["it_per_s_still"])
    assert 0 < report["picture_ms_median"] <= report["picture_ms_p95"]
    assert report["full_size"] == [128, 96] and len(report["full_picture_s"]) == 2
    assert min(report["full_picture_s"]) > 0 and report["pictures_per_s_moving"] > 0
    assert all(height <= 96 for _, height in report["moving_sizes"])
    assert "128x96" in console.file.getvalue()


@pytest.mark.parametrize("number", [0, 1, 15, 16, 700, camera_stamp.LARGEST])
def test_a_stamp_comes_through_compression(number):
    image = torch.rand(30, 17, 3)
    camera_stamp.stamp(image, number)
    file = io.BytesIO()
    Image.fromarray((255 * image).byte().numpy()).save(file, "jpeg", quality=40)
    assert camera_stamp.read(np.asarray(Image.open(file), dtype=float)) == number


def test_a_path_goes_through_the_cameras():
    cameras = flight().cameras
    path = path_along(cameras, 2 * PER_CAMERA + 5)
    poses = cameras.camera_to_worlds.numpy()
    assert np.allclose(path[::PER_CAMERA], poses[:3], atol=1e-6)
    assert np.allclose(path[-1], (poses[2] + poses[3]) / 2, atol=1e-6)
    with pytest.raises(BenchmarkError, match=r"7\.0 seconds at most"):
        path_along(cameras, 7 * PER_CAMERA + 1)


def test_a_training_that_ends_is_not_waited_for():
    class Ended:
        step = 0
        viewer_state = type("", (), {"control_panel": type("", (), {"max_res": 8})})

    cameras = flight().cameras
    onlooker = viewer_flight.Onlooker(Ended(), cameras, path_along(cameras, 10), 1, 1, 1)
    onlooker.over.set()
    with pytest.raises(BenchmarkError, match="ended before the training's first steps"):
        onlooker.run()
