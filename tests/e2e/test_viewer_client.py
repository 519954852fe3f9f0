"""Nerfstudio's viewer on gsscale, as a client without a page sees it: also on a GPU's machine."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.utils.eval_utils import eval_setup
from nerfstudio.viewer.utils import CameraState, get_camera

from benchmarks.fixed_rows import train_split
from benchmarks.viewer_client import ViewerClient
from tests.e2e.serving import Server, difference, serving
from tests.engines.driving import DEVICES
from tests.runs import edit_json, make_config, tiny_scene, train

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("device", DEVICES)]

WIDTH, HEIGHT = 512, 384
"""Of a picture while nothing moves: what the viewer begins with, in the scene's shape."""
GAUSSIANS = {"random_init": True, "num_random": 1000, "random_scale": 1.0}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without its points: reading them takes Open3D, which not every such machine has."""
    folder = tiny_scene(tmp_path_factory.mktemp("viewer") / "scene")
    edit_json(folder, lambda transforms: transforms.pop("ply_file_path"))
    return folder


@pytest.fixture(scope="module")
def cameras(scene: Path) -> Cameras:
    return train_split(make_config(scene, scene)).cameras


class Viewing:
    """A client that looks through the scene's cameras."""

    def __init__(self, client: ViewerClient, server: Server, cameras: Cameras) -> None:
        self.client, self._server = client, server
        self._poses = cameras.camera_to_worlds.double().numpy()
        self._fov = fov_of(cameras)

    def through(self, camera: int) -> np.ndarray:
        """The picture through one of them, when no other comes any more."""
        pictures = self.client.pictures
        sent = self.client.look(self._poses[camera], self._fov, WIDTH / HEIGHT)

        def rests() -> bool:
            if not pictures or pictures[-1].size() != (WIDTH, HEIGHT):
                return False
            return sent < pictures[-1].arrived < time.perf_counter() - 1

        self._server.until(rests, f"a picture of full size, after {len(pictures)}")
        return pictures[-1].pixels()


def fov_of(cameras: Cameras) -> float:
    return 2 * math.atan(float(cameras.height[0] / 2 / cameras.fy[0]))


@pytest.mark.parametrize("engine", ["resident", "host"])
def test_training(scene, cameras, tmp_path, device, engine):
    words = [f"--pipeline.model.{k.replace('_', '-')}={v}" for k, v in GAUSSIANS.items()]
    with (
        serving(
            tmp_path / "log", "ns-train", "gsscale", "--data", scene, "--output-dir", tmp_path,
            "--vis", "viewer", "--max-num-iterations", 10_000_000, *words,
            "--pipeline.model.engine", engine, "--pipeline.model.vram-budget-gb", 2,
            "--pipeline.model.num-downscales", 0, "--pipeline.model.stop-split-at", 0,
            after=("nerfstudio-data", "--eval-mode", "interval", "--eval-interval", 4),
            device=device,
        ) as server,
        ViewerClient(server.port) as client,
    ):  # fmt: skip
        client.look(cameras.camera_to_worlds[0].double().numpy(), fov_of(cameras), WIDTH / HEIGHT)

        def goes_on() -> None:
            before = client.step or 0
            server.until(lambda: (client.step or 0) > before, "another step in the panel")

        server.until(lambda: client.pictures, "a picture")
        goes_on()
        pictures = len(client.pictures)
        server.until(lambda: len(client.pictures) > pictures, "a picture of a later step")

        # Now nothing but the camera changes the picture.
        client.press("Pause Training")
        view = Viewing(client, server, cameras)
        one, another, again = (view.through(camera) for camera in (0, 2, 0))
        assert difference(one, again) < 0.5 < 5 < difference(one, another)
        client.press("Resume Training")
        goes_on()


def test_a_saved_run(scene, cameras, tmp_path, device):
    config = make_config(scene, tmp_path, steps=20, **GAUSSIANS)
    config.machine.device_type = device
    config.save_config()
    train(config)
    run = config.get_base_dir() / "config.yml"
    with (
        serving(tmp_path / "log", "ns-viewer", "--load-config", run, device=device) as server,
        ViewerClient(server.port) as client,
    ):
        seen = Viewing(client, server, cameras).through(1)
    _, pipeline, _, _ = eval_setup(run, test_mode="inference")
    state = CameraState(
        fov_of(cameras), WIDTH / HEIGHT, cameras.camera_to_worlds[1], CameraType.PERSPECTIVE
    )
    drawn = pipeline.model.get_outputs_for_camera(get_camera(state, HEIGHT, WIDTH).to(device))
    assert seen.std() > 5
    assert difference(seen, 255 * drawn["rgb"].numpy(force=True)) < 2  # JPEG's
