"""One small village as data sets of several formats, with lenses that bend straight lines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from nerfstudio.data.utils.colmap_parsing_utils import rotmat2qvec
from PIL import Image

from gsscale_nerfstudio.demo import scene as demo
from gsscale_nerfstudio.demo.cameras import Pinhole, orbit
from gsscale_nerfstudio.demo.ply import write_points
from gsscale_nerfstudio.demo.textures import Array
from gsscale_nerfstudio.demo.village import build_village

WIDTH, HEIGHT, IMAGES, POINTS = 62, 50, 6, 200


@dataclass(frozen=True)
class BentLens(Pinhole):
    """A pinhole behind OpenCV's lens: Brown's (k1, k2, p1, p2), or the fisheye's (k1, k2, k3, k4).

    Attributes:
        coefficients: four, in OpenCV's order.
        fisheye: which of the two they are of.
    """

    coefficients: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    fisheye: bool = False

    def directions(self, camera_to_world: Array, pixels: Array) -> Array:
        centre = np.array([self.width / 2, self.height / 2])
        bent = ((pixels - centre) / self.focal)[:, None]
        undo = cv2.fisheye.undistortPoints if self.fisheye else cv2.undistortPoints
        straight = undo(bent, np.eye(3), np.array(self.coefficients))[:, 0]
        return super().directions(camera_to_world, straight * self.focal + centre)


@dataclass(frozen=True)
class Straight(Pinhole):
    """A pinhole with any focal lengths and centre, in pixels."""

    fx: float
    fy: float
    cx: float
    cy: float

    def directions(self, camera_to_world: Array, pixels: Array) -> Array:
        straight = (pixels - [self.cx, self.cy]) / [self.fx, self.fy]
        centre = np.array([self.width / 2, self.height / 2])
        return super().directions(camera_to_world, straight * self.focal + centre)


@dataclass(frozen=True)
class Village:
    """Images, poses (OpenGL's, camera to world) and points of the demo's village."""

    lens: Pinhole
    poses: list[Array]
    images: list[Array]
    points: Array
    colors: Array

    @property
    def names(self) -> list[str]:
        return [f"{number:03d}.png" for number in range(len(self.images))]

    def write_images(self, folder: Path, images: list[Array] | None = None) -> None:
        folder.mkdir(parents=True)
        for name, image in zip(self.names, self.images if images is None else images, strict=True):
            Image.fromarray(image).save(folder / name)

    def shrunk(self, width: int, height: int) -> list[Array]:
        size = (width, height)
        box = Image.Resampling.BOX
        return [np.asarray(Image.fromarray(image).resize(size, box)) for image in self.images]


def picture(lens: Pinhole, pose: Array) -> Array:
    """[height, width, 3] uint8."""
    return demo.to_bytes(demo._render(build_village(0), lens, pose, 2))


def village(lens: Pinhole) -> Village:
    world, poses = build_village(0), orbit(IMAGES)
    images = [picture(lens, pose) for pose in poses]
    # Points where a pinhole sees some, whatever the lens.
    pinhole, rng = Pinhole(lens.width, lens.height), np.random.default_rng(0)
    points, colors = demo._sparse_points(world, pinhole, poses, POINTS, rng)
    return Village(lens, poses, images, points, demo.to_bytes(colors))


def write_colmap(scene: Village, folder: Path, model: str, parameters: list[float]) -> Path:
    """``images/`` and a reconstruction in COLMAP's text format in ``colmap/sparse/0``."""
    scene.write_images(folder / "images")
    sparse = folder / "colmap" / "sparse" / "0"
    sparse.mkdir(parents=True)
    numbers = " ".join(map(str, parameters))
    (sparse / "cameras.txt").write_text(f"1 {model} {WIDTH} {HEIGHT} {numbers}\n")
    lines = []
    for number, (name, pose) in enumerate(zip(scene.names, scene.poses, strict=True), 1):
        world_to_camera = np.linalg.inv(pose @ np.diag([1.0, -1.0, -1.0, 1.0]))
        place = [*rotmat2qvec(world_to_camera[:3, :3]), *world_to_camera[:3, 3]]
        lines += [f"{number} {' '.join(map(str, place))} 1 {name}", ""]
    (sparse / "images.txt").write_text("\n".join(lines) + "\n")
    rows = [
        f"{number} {' '.join(map(str, [*point, *color]))} 0.5 1 0"
        for number, (point, color) in enumerate(zip(scene.points, scene.colors, strict=True), 1)
    ]
    (sparse / "points3D.txt").write_text("\n".join(rows) + "\n")
    return folder


def write_transforms(scene: Village, folder: Path, **content: object) -> Path:
    """``transforms.json``, as Nerfstudio and Instant NGP have it, with ``images/`` and points."""
    scene.write_images(folder / "images")
    write_points(folder / "points.ply", scene.points, scene.colors)
    frames = [
        {"file_path": f"images/{name}", "transform_matrix": pose.tolist()}
        for name, pose in zip(scene.names, scene.poses, strict=True)
    ]
    lens = {"w": WIDTH, "h": HEIGHT, "cx": WIDTH / 2, "cy": HEIGHT / 2, "fl_x": scene.lens.focal}
    content = {**lens, "fl_y": scene.lens.focal, "frames": frames, **content}
    (folder / "transforms.json").write_text(json.dumps(content))
    return folder


def write_blender(scene: Village, folder: Path) -> Path:
    """As NeRF's synthetic scenes: a file of cameras for each split, pictures with transparency."""
    folder.mkdir()
    write_points(folder / "points.ply", scene.points, scene.colors)
    for split, every in {"train": (0, 1, 3, 4), "val": (2,), "test": (2, 5)}.items():
        (folder / split).mkdir()
        frames = []
        for number in every:
            picture = Image.fromarray(scene.images[number])
            picture.putalpha(255)
            picture.save(folder / split / f"r_{number}.png")
            place = {"transform_matrix": scene.poses[number].tolist()}
            frames.append({"file_path": f"./{split}/r_{number}", **place})
        angle = 2 * np.arctan(WIDTH / 2 / scene.lens.focal)
        cameras = json.dumps({"camera_angle_x": angle, "frames": frames})
        (folder / f"transforms_{split}.json").write_text(cameras)
    return folder
