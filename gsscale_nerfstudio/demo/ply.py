"""Point clouds as PLY files: writing coloured points, counting the points of any file.

Written out here because the usual reader and writer for this format is under the GPL.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gsscale_nerfstudio.demo.textures import Array
from gsscale_nerfstudio.errors import GSScaleError

_POINT = np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3)])
_HEADER = """\
ply
format binary_little_endian 1.0
element vertex {count}
property float x
property float y
property float z
property uchar red
property uchar green
property uchar blue
end_header
"""


def write_points(path: Path, points: Array, colors: NDArray[np.uint8]) -> None:
    """Write points [n, 3] with their colours RGB [n, 3]."""
    records = np.empty(len(points), _POINT)
    records["xyz"], records["rgb"] = points, colors
    path.write_bytes(_HEADER.format(count=len(points)).encode() + records.tobytes())


def count_points(path: Path) -> int:
    """The number of points that the header of a PLY file announces."""
    with path.open("rb") as file:
        for line in file:
            words = line.split()
            if words[:2] == [b"element", b"vertex"]:
                return int(words[2])
            if words == [b"end_header"]:
                break
    raise GSScaleError(f"{path} is not a point cloud: its header names no number of points.")
