"""Pictures that say which camera of a path they show: its number, in three grey squares.

A square is a block of JPEG's, and its shades are far enough apart to come through the compression.
The squares are one below the other, where the viewer's smallest pictures have room for them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.models.base_model import Model
from numpy.typing import NDArray
from torch import Tensor

SIDE = 8
SQUARES = 3
SHADES = 16
LARGEST = SHADES**SQUARES - 1


def stamp(image: Tensor, number: int) -> None:
    """Write ``number`` into the upper left corner of an image [h, w, 3] in 0..1."""
    for square in range(SQUARES):
        shade = number // SHADES**square % SHADES
        image[SIDE * square : SIDE * (square + 1), :SIDE] = (shade + 0.5) / SHADES


def read(pixels: NDArray[np.float64]) -> int:
    """The number in the corner of an image [h, w, 3], 0 to 255."""
    corner = pixels[: SQUARES * SIDE, :SIDE].reshape(SQUARES, -1)
    shades = (corner.mean(axis=1) * SHADES / 256).astype(int)
    return int(shades @ SHADES ** np.arange(SQUARES))


def stamp_pictures(model: Model, path: NDArray[np.float64]) -> None:
    """From now on the model's pictures outside of training have the number of their camera.

    Args:
        model: draws them.
        path: [n, 3, 4], camera to world; a camera counts as the nearest of these.
    """
    draw = model.get_outputs_for_camera

    def draw_and_stamp(camera: Cameras, obb_box: Any = None) -> dict[str, Any]:
        outputs = draw(camera, obb_box)
        pose = camera.camera_to_worlds[0].numpy(force=True)
        stamp(outputs["rgb"], int(np.abs(path - pose).sum(axis=(1, 2)).argmin()))
        return outputs

    model.get_outputs_for_camera = draw_and_stamp  # type: ignore[method-assign]
