"""A flight over a flat field, as a dataparser would give it: no files, no images."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from nerfstudio.cameras.cameras import Cameras

WIDE, DEEP = 8.0, 4.0


def flight(points: int = 3000, slope: float = 0.0) -> Any:
    """Points of a field and 8 cameras, a unit above them, that look straight down.

    Each sees 1 x 0.8 of the field's 8 x 4, which is 2.5 %.
    """
    random = torch.Generator().manual_seed(1)
    xyz = torch.rand(points, 3, generator=random) * torch.tensor([WIDE, DEEP, 0.05])
    xyz[:, 2] += slope * xyz[:, 0]
    poses = torch.eye(4)[:3].repeat(8, 1, 1)
    x = torch.arange(8) + 0.5
    poses[:, :, 3] = torch.stack([x, torch.full((8,), DEEP / 2), 1 + slope * x], dim=1)
    cameras = Cameras(poses, fx=50.0, fy=50.0, cx=25.0, cy=20.0, width=50, height=40)
    rgb = torch.randint(0, 256, (points, 3), generator=random, dtype=torch.uint8)
    metadata = {"points3D_xyz": xyz, "points3D_rgb": rgb}
    return SimpleNamespace(cameras=cameras, metadata=metadata)
