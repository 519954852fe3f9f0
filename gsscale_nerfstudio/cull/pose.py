"""World to camera, for planes and for gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def world_to_camera(camera_to_world: Tensor) -> Tensor:
    """[4, 4] world-to-camera matrix in OpenCV axes of a rigid camera-to-world pose.

    Differentiable, for the camera optimizer.

    Args:
        camera_to_world: [3 or 4, 4], axes right, up, backward (OpenGL).
    """
    turn = camera_to_world.new_ones(3)
    turn[1:] = -1  # y and z turn round
    rotation = camera_to_world[:3, :3] * turn
    translation = -rotation.T @ camera_to_world[:3, 3:4]
    bottom = torch.zeros_like(camera_to_world[:1])
    bottom[0, 3] = 1
    return torch.cat([torch.cat([rotation.T, translation], dim=1), bottom])
