"""The cameras of the demo: pinholes on a rising and falling orbit around the village."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gsscale_nerfstudio.demo.textures import Array

_TARGET = np.array([0.0, 0.0, 0.25])
_DISTANCE = 7.0
_ELEVATION = np.radians(49.0)
_SWING = np.radians(10.0)
_SWINGS = 5
_VIEW_ANGLE = np.radians(50.0)


@dataclass(frozen=True)
class Pinhole:
    """Intrinsics shared by all images, in pixels; pixel (0, 0) covers 0..1 in x and y."""

    width: int
    height: int

    @property
    def focal(self) -> float:
        """Focal length in pixels, the same in x and y."""
        return self.width / 2 / np.tan(_VIEW_ANGLE / 2)

    def directions(self, camera_to_world: Array, pixels: Array) -> Array:
        """Unit world directions [n, 3] through image positions ``pixels`` [n, 2] (x right, y down).

        Cameras follow OpenGL: x right, y up, and the view runs along -z.
        """
        right = (pixels[:, 0] - self.width / 2) / self.focal
        down = (pixels[:, 1] - self.height / 2) / self.focal
        rays = np.stack([right, -down, -np.ones(len(pixels))], axis=1) @ camera_to_world[:3, :3].T
        return rays / np.linalg.norm(rays, axis=1, keepdims=True)


def look_at(eye: Array, target: Array) -> Array:
    """Camera-to-world [4, 4] in OpenGL's convention, upright, at ``eye`` [3], facing ``target``."""
    back = (eye - target) / np.linalg.norm(eye - target)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(back, right), back], axis=1)
    pose[:3, 3] = eye
    return pose


def orbit(count: int) -> list[Array]:
    """``count`` camera-to-world matrices, once around the village, swinging between two heights.

    The lowest still looks down steeply enough to have no horizon in the image: every pixel shows
    a surface that can be reconstructed.
    """
    poses = []
    for turn in np.arange(count) / count * 2 * np.pi:
        elevation = _ELEVATION + _SWING * np.sin(_SWINGS * turn)
        distance = _DISTANCE * (1.0 + 0.06 * np.cos(3 * turn))
        level, upward = np.cos(elevation), np.sin(elevation)
        outward = np.array([np.cos(turn) * level, np.sin(turn) * level, upward])
        poses.append(look_at(_TARGET + distance * outward, _TARGET))
    return poses
