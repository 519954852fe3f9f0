"""Somebody looks on while a model is trained: still for a while, then flying over the scene."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from nerfstudio.cameras.cameras import Cameras
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation, Slerp

from benchmarks import camera_stamp
from benchmarks.errors import BenchmarkError
from benchmarks.viewer_client import ViewerClient

MESSAGES_PER_S = 10
PER_CAMERA = 10
"""Messages from one of the scene's cameras to the next: a second's flight."""
PATIENCE_S = 120.0


def path_along(cameras: Cameras, messages: int) -> NDArray[np.float64]:
    """Poses [messages + 1, 3, 4] from the first camera to the second and so on."""
    needed = -(-messages // PER_CAMERA) + 1
    if messages > camera_stamp.LARGEST or needed > len(cameras):
        most = min(camera_stamp.LARGEST, PER_CAMERA * (len(cameras) - 1)) / MESSAGES_PER_S
        raise BenchmarkError(f"the flight can take {most:.1f} seconds at most: lower --seconds")
    poses = cameras.camera_to_worlds[:needed].double().numpy()
    at = np.arange(messages + 1) / PER_CAMERA
    between = Slerp(np.arange(needed), Rotation.from_matrix(poses[:, :, :3]))
    places = [np.interp(at, np.arange(needed), place) for place in poses[:, :, 3].T]
    return np.concatenate([between(at).as_matrix(), np.stack(places, axis=1)[:, :, None]], axis=2)


@dataclass(frozen=True)
class Sight:
    """A picture that has come."""

    arrived: float
    number: int
    """Of the camera that it shows."""
    size: tuple[int, int]


class Onlooker:
    """Measures what the viewer does to a training, and what the training does to the viewer.

    Args:
        trainer: trains, in another thread; it is stopped in the end.
        cameras: gives the lens, that of the first one.
        path: where to look from; its pictures are stamped.
        seconds: how long each phase takes.
        warmup: training steps before the first phase.
        stops: how often the camera comes to rest on its way.
    """

    def __init__(
        self,
        trainer: Any,
        cameras: Cameras,
        path: NDArray[np.float64],
        seconds: float,
        warmup: int,
        stops: int,
    ) -> None:
        self.trainer, self.path = trainer, path
        self.seconds, self.warmup, self.stops = seconds, warmup, stops
        height, width = int(cameras.height[0]), int(cameras.width[0])
        self.fov = 2 * float(np.arctan(height / 2 / float(cameras.fy[0])))
        self.aspect = width / height
        self.over = threading.Event()
        """To be set when training has ended."""
        self._sights: list[Sight] = []

    def run(self) -> dict[str, Any]:
        """All phases. Returns what was measured."""
        viewer = self.trainer.viewer_state
        self._full_side = viewer.control_panel.max_res
        try:
            self._until(lambda: self.trainer.step >= self.warmup, "the training's first steps")
            alone = self._steps_per_s()
            with ViewerClient(viewer.viser_server.get_port()) as self._client:
                sent = self._look(0)
                first_picture_s = self._rest(0) - sent
                return {
                    "it_per_s_alone": alone,
                    "it_per_s_still": self._steps_per_s(),
                    "first_full_picture_s": first_picture_s,
                    **self._fly(),
                }
        finally:
            self.trainer.stop_training = True

    def _fly(self) -> dict[str, Any]:
        """Follow the path, with its stops."""
        messages = len(self.path) - 1
        sent: dict[int, float] = {}
        moving: list[Sight] = []
        rests: list[float] = []
        moved_s, steps, number = 0.0, 0, 0
        for stop in range(1, self.stops + 1):
            before, step, start = len(self._look_up()), self.trainer.step, time.perf_counter()
            while number < messages * stop // self.stops:
                number += 1
                sent[number] = self._look(number)
                time.sleep(1 / MESSAGES_PER_S)
            steps += self.trainer.step - step
            moved_s += time.perf_counter() - start
            moving += self._look_up()[before:]
            rests.append(self._rest(number) - sent[number])
        waits = [self._first(each) - at for each, at in sent.items()]
        sizes = sorted((sight.size for sight in moving), key=math.prod)
        return {
            "it_per_s_moving": steps / moved_s,
            "messages": messages,
            "picture_ms_median": 1e3 * float(np.median(waits)),
            "picture_ms_p95": 1e3 * float(np.quantile(waits, 0.95)),
            "pictures_per_s_moving": len(moving) / moved_s,
            "moving_sizes": [sizes[at] for at in (0, len(sizes) // 2, -1) if sizes],
            "full_size": self._sights[-1].size,
            "full_picture_s": rests,
        }

    def _look(self, number: int) -> float:
        """Move the camera; when the message left."""
        return self._client.look(self.path[number], self.fov, self.aspect)

    def _look_up(self) -> list[Sight]:
        """All pictures so far."""
        for picture in self._client.pictures[len(self._sights) :]:
            number = camera_stamp.read(picture.pixels())
            self._sights.append(Sight(picture.arrived, number, picture.size()))
        return self._sights

    def _first(self, number: int, side: int = 0) -> float:
        """When a camera, or one after it, was first seen in a picture of this size."""
        return min(
            (
                sight.arrived
                for sight in self._look_up()
                if sight.number >= number and max(sight.size) >= side
            ),
            default=math.inf,
        )

    def _rest(self, number: int) -> float:
        """Wait where the camera is, until it is seen at full size; when that was."""
        side = self._full_side
        self._until(lambda: self._first(number, side) < math.inf, "a picture of full size")
        return self._first(number, side)

    def _steps_per_s(self) -> float:
        step, start = self.trainer.step, time.perf_counter()
        time.sleep(self.seconds)
        return (self.trainer.step - step) / (time.perf_counter() - start)

    def _until(self, happened: Callable[[], bool], what: str) -> None:
        deadline = time.perf_counter() + PATIENCE_S
        while not happened():
            if self.over.wait(0.005):
                raise BenchmarkError(f"training ended before {what}")
            if time.perf_counter() > deadline:
                raise BenchmarkError(f"{PATIENCE_S:.0f} s without {what}")
