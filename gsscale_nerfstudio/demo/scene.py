"""Writes the demo's village as a data set that Nerfstudio reads: images, cameras, sparse points."""

from __future__ import annotations

import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gsscale_nerfstudio.demo.cameras import Pinhole, orbit
from gsscale_nerfstudio.demo.ply import write_points
from gsscale_nerfstudio.demo.raytrace import World, radiance
from gsscale_nerfstudio.demo.textures import Array
from gsscale_nerfstudio.demo.village import build_village
from gsscale_nerfstudio.errors import GSScaleError

_CAMERAS_FILE = "transforms.json"
_POINTS_FILE = "points3d.ply"
# Rays traced at a time: keeps the tables of rays against shapes at some tens of megabytes.
_BATCH = 1 << 16
_MOST_THREADS = 16
# Standard deviation of a sparse point's position, as structure from motion would leave it.
_POINT_NOISE = 0.004


def to_bytes(color: Array) -> NDArray[np.uint8]:
    """Colours in 0..1 as 8-bit values."""
    return (np.clip(color, 0.0, 1.0) * 255.0).round().astype(np.uint8)


def _render(world: World, lens: Pinhole, pose: Array, supersample: int) -> Array:
    """The image [h, w, 3] in 0..1, each pixel the mean of ``supersample`` squared rays."""
    across = (np.arange(lens.width * supersample) + 0.5) / supersample
    down = (np.arange(lens.height * supersample) + 0.5) / supersample
    positions = np.stack(np.meshgrid(across, down), axis=-1).reshape(-1, 2)
    directions = lens.directions(pose, positions)
    batches = [directions[start : start + _BATCH] for start in range(0, len(directions), _BATCH)]
    color = np.concatenate([radiance(world, pose[:3, 3], batch)[0] for batch in batches])
    fine = color.reshape(lens.height, supersample, lens.width, supersample, 3)
    return fine.mean(axis=(1, 3))


def _sparse_points(
    world: World, lens: Pinhole, poses: list[Array], count: int, rng: np.random.Generator
) -> tuple[Array, Array]:
    """``count`` points [n, 3] on what the cameras see, a little off, and their colours [n, 3]."""
    points, colors = [], []
    per_camera = np.bincount(rng.integers(len(poses), size=count), minlength=len(poses))
    for pose, share in zip(poses, per_camera, strict=True):
        positions = rng.random((share, 2)) * [lens.width, lens.height]
        directions = lens.directions(pose, positions)
        color, distance = radiance(world, pose[:3, 3], directions)
        seen = np.isfinite(distance)
        points.append(pose[:3, 3] + distance[seen, None] * directions[seen])
        colors.append(color[seen])
    exact = np.concatenate(points)
    return exact + rng.normal(scale=_POINT_NOISE, size=exact.shape), np.concatenate(colors)


def _fill(
    folder: Path, lens: Pinhole, images: int, points: int, supersample: int, seed: int
) -> None:
    """Write all files of the scene into the existing, empty ``folder``."""
    world = build_village(seed)
    poses = orbit(images)
    names = [f"images/frame_{number:04d}.png" for number in range(images)]
    (folder / "images").mkdir()

    def draw(name: str, pose: Array) -> None:
        Image.fromarray(to_bytes(_render(world, lens, pose, supersample))).save(folder / name)

    # NumPy leaves the interpreter's lock to others while it computes, so threads are enough.
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        list(pool.map(draw, names, poses))
    xyz, color = _sparse_points(world, lens, poses, points, np.random.default_rng([seed, 1]))
    write_points(folder / _POINTS_FILE, xyz, to_bytes(color))
    cameras = {
        "camera_model": "OPENCV",
        "fl_x": lens.focal,
        "fl_y": lens.focal,
        "cx": lens.width / 2,
        "cy": lens.height / 2,
        "w": lens.width,
        "h": lens.height,
        "ply_file_path": _POINTS_FILE,
        "frames": [
            {"file_path": name, "transform_matrix": pose.tolist()}
            for name, pose in zip(names, poses, strict=True)
        ],
    }
    (folder / _CAMERAS_FILE).write_text(json.dumps(cameras, indent=1) + "\n", encoding="utf-8")


def write_scene(
    path: Path,
    images: int = 40,
    width: int = 160,
    height: int = 120,
    points: int = 2000,
    supersample: int = 2,
    seed: int = 0,
) -> Path:
    """Write a scene in Nerfstudio's format to the folder ``path``, whole or not at all.

    The same arguments give the same files. An earlier scene at ``path`` is replaced; a folder that
    holds anything else is left alone.

    Args:
        path: Where ``transforms.json``, ``images/`` and ``points3d.ply`` go.
        images: Number of cameras, equally spaced along one orbit.
        width: Of the images, in pixels; the view is 50 degrees wide whatever the resolution.
        height: Of the images, in pixels.
        points: Number of sparse points on visible surfaces.
        supersample: Rays per pixel along each axis.
        seed: Varies the village and the choice of points.

    Returns:
        ``path``.
    """
    if path.exists() and not (path / _CAMERAS_FILE).is_file():
        raise GSScaleError(f"{path} exists and is no scene: choose another folder for the scene.")
    path.parent.mkdir(parents=True, exist_ok=True)
    # A sibling of the scene, so that moving into place is a rename and never a copy.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
        draft = Path(scratch) / "new"
        draft.mkdir()
        _fill(draft, Pinhole(width, height), images, points, supersample, seed)
        if path.exists():
            path.rename(Path(scratch) / "old")
        draft.rename(path)
    return path
