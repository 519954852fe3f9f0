"""One camera as the culler sees it: pose, intrinsics, image size and clipping planes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from nerfstudio.cameras.cameras import Cameras, CameraType
from torch import Tensor

from gsscale_nerfstudio.cull.pose import world_to_camera
from gsscale_nerfstudio.errors import GSScaleError

_DRAWN_TYPES = (CameraType.PERSPECTIVE, CameraType.FISHEYE, CameraType.FISHEYE624)
"""Types that Nerfstudio's data managers undistort to the pinhole images that gsplat renders."""

_BLUR_PIXELS = 3.4
"""What gsplat's blur and rounding up add to a radius: e of :meth:`View.planes`."""

_POSITION_ROUNDING = 2.5e-6
"""Float32 error of a point in camera space, as a share of the camera's distance to the origin."""

_RELATIVE_ROUNDING = 1e-5
"""Float32 error of pixel positions and radii, as a share of their size."""


@dataclass(frozen=True)
class Slack:
    """How much rows may have outgrown their bounding spheres, when steps are still under way.

    Attributes:
        growth: factor on every radius, >= 1.
        shift: distance, world units, >= 0.
    """

    growth: float = 1.0
    shift: float = 0.0


EXACT = Slack()


class Window(NamedTuple):
    """A part of an image, in whole pixels: columns left to right - 1, rows top to bottom - 1."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.right - self.left, self.bottom - self.top

    @property
    def pixels(self) -> tuple[slice, slice]:
        """Index of an image [H, W, ...]."""
        return slice(self.top, self.bottom), slice(self.left, self.right)

    def halves(self, multiple: int) -> tuple[Window, Window] | None:
        """Two halves of the longer side, cut at a multiple; None if it is too short for that."""
        width, height = self.size
        half = (max(width, height) // 2 + multiple - 1) // multiple * multiple
        if half >= max(width, height):
            return None
        if width >= height:
            middle = self.left + half
            return self._replace(right=middle), self._replace(left=middle)
        middle = self.top + half
        return self._replace(bottom=middle), self._replace(top=middle)


class OnDevice(NamedTuple):
    """A view's matrices on a device, float32."""

    viewmat: Tensor  # [4, 4]
    K: Tensor  # [3, 3]
    camera_position: Tensor  # [3]
    half_size: Tensor  # [2] half of the image's width and height, in pixels


@dataclass(frozen=True, eq=False)
class View:
    """One pinhole view.

    Attributes:
        viewmat: [4, 4] world -> camera; camera axes right, down, forward (OpenCV).
        K: [3, 3] intrinsics in pixels, without skew; a pixel's centre is at + 0.5.
        width, height: image size in pixels.
        near, far: depths between which rows are drawn; splatfacto's by default.
        window: the part of the image that is drawn; None for all of it. Rows are projected as for
            the whole image.

    Raises:
        GSScaleError: no image can be made with these values.
    """

    viewmat: np.ndarray
    K: np.ndarray
    width: int
    height: int
    near: float = 0.01
    far: float = 1e10
    window: Window | None = None
    _on_device: OnDevice | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.viewmat.shape != (4, 4) or self.K.shape != (3, 3):
            raise GSScaleError(
                f"a view needs a 4 x 4 pose and 3 x 3 intrinsics, not {self.viewmat.shape} and "
                f"{self.K.shape}; pass one camera's matrices"
            )
        if self.width < 1 or self.height < 1:
            raise GSScaleError(
                f"cannot render an image of {self.width} x {self.height} pixels; check the "
                "camera's width and height, and the downscale factors"
            )
        if not np.isfinite(self.viewmat).all():
            raise GSScaleError(
                "the camera's pose has a value that is not finite; check the data set's poses, and "
                "if the camera optimizer is on, lower its learning rate"
            )
        if not np.isfinite(self.K).all() or self.K[0, 0] <= 0 or self.K[1, 1] <= 0:
            raise GSScaleError(
                f"the camera's intrinsics {self.K.tolist()} are not finite, or a focal length is "
                "not positive; check the data set's intrinsics"
            )
        if not 0 < self.near < self.far:
            raise GSScaleError(
                f"the clipping planes {self.near} and {self.far} enclose nothing; near must be "
                "positive and below far"
            )

    @classmethod
    def from_camera(
        cls,
        camera: Cameras,
        camera_to_world: Tensor | None = None,
        near: float = 0.01,
        far: float = 1e10,
        downscale: int = 1,
    ) -> View:
        """The view of one Nerfstudio camera.

        Args:
            camera: ``Cameras`` that hold one camera.
            camera_to_world: [3 or 4, 4] or [1, 3 or 4, 4], used in the place of the camera's pose:
                that of the camera optimizer. Axes right, up, backward (OpenGL).
            near, far: depths between which rows are drawn.
            downscale: the image is this many times smaller than the camera's, rounded down.

        Raises:
            GSScaleError: several cameras, a type that splatfacto cannot render, an empty image, or
                a pose or intrinsics that are not finite.
        """
        if camera.size != 1:
            raise GSScaleError(
                f"gsscale renders one camera at a time and was given {camera.size}; pick one, as "
                "in cameras[i : i + 1]"
            )
        camera_type = int(camera.camera_type.item())
        if camera_type not in [drawn.value for drawn in _DRAWN_TYPES]:
            names = {t.value: t.name for t in CameraType}
            raise GSScaleError(
                f"gsscale cannot render a camera of type {names.get(camera_type, camera_type)}: "
                "the rasterizer draws pinhole images, and of the other types only "
                f"{' and '.join(t.name for t in _DRAWN_TYPES[1:])} are undistorted to them; "
                "convert the images to perspective views first"
            )
        pose = camera.camera_to_worlds if camera_to_world is None else camera_to_world
        K = _matrix(camera.get_intrinsics_matrices()).numpy()
        K[:2] /= downscale
        return cls(
            viewmat=world_to_camera(_matrix(pose)).numpy(),
            K=K,
            width=int(camera.width.item()) // downscale,
            height=int(camera.height.item()) // downscale,
            near=near,
            far=far,
        )

    def through(self, window: Window) -> View:
        """The same view, of which only a part is drawn."""
        part = replace(self, window=window)
        object.__setattr__(part, "_on_device", self._on_device)
        return part

    @property
    def whole_window(self) -> Window:
        """The part that is drawn."""
        return self.window or Window(0, 0, self.width, self.height)

    @cached_property
    def camera_position(self) -> np.ndarray:
        """[3] in world space."""
        return -self.viewmat[:3, :3].T @ self.viewmat[:3, 3]

    def on(self, device: torch.device) -> OnDevice:
        """The view's matrices as float32 tensors on ``device``; the last ones are kept."""
        if self._on_device is None or self._on_device.viewmat.device != device:
            half_size = np.array([self.width / 2, self.height / 2])
            parts = [self.viewmat.ravel(), self.K.ravel(), self.camera_position, half_size]
            # From ordinary memory without blocking: CUDA copies so few bytes before it returns.
            values = torch.from_numpy(np.concatenate(parts)).float().to(device, non_blocking=True)
            on_device = OnDevice(
                values[:16].view(4, 4), values[16:25].view(3, 3), values[25:28], values[28:]
            )
            object.__setattr__(self, "_on_device", on_device)
            return on_device
        return self._on_device

    def same_as(self, other: View) -> bool:
        """Whether both draw the same picture."""
        return self is other or (
            (self.width, self.height, self.near, self.far, self.window)
            == (other.width, other.height, other.near, other.far, other.window)
            and np.array_equal(self.viewmat, other.viewmat)
            and np.array_equal(self.K, other.K)
        )

    def planes(self, slack: Slack = EXACT) -> np.ndarray:
        """[6, 5] float32 (nx, ny, nz, d, k): a row is outside if ``n.p + d + k R < 0`` for one.

        Order: left, right, top, bottom, near, far; world space, ``|n| = 1``. ``p`` is the row's
        centre and ``R = 3.33 sigma + m``, with sigma its largest scale and m how far the centre may
        still move, its own float32 rounding (1e-6 |p|) included.

        No row that gsplat draws is outside. At depth z > 0 gsplat draws a circle of radius
        ``r <= ceil(c sqrt(v + blur))`` around ``u = fx x / z + cx``, where c is 3 or 3.33, v the
        larger eigenvalue of J S J^T, ``J = diag(fx, fy) [I | -l] / z``, S the row's covariance and
        l its direction (x / z, y / z), clamped a little outside of the image. So
        ``z r <= g R + e z`` with ``g = max ||diag(fx, fy) [I | -l]||`` and, not growing with the
        row, ``e = c sqrt(blur) + 1``. A circle that reaches over the left border has u + r > 0 and
        hence ``fx x + (cx + e) z + g R > 0``: a plane. What it rejects is to the left of the image,
        so g is taken over such directions only. (A window's border stands for the image's; the
        directions beyond it go on to where gsplat clamps those of the image.) With
        ``k = max(g, |n|)``, k R covers m, too.

        blur is 0.3, plus 0.1 (or 0.32 with ``packed=True``) for the least distance that gsplat 1.4
        keeps between eigenvalue and mean: ``e = 3 sqrt(0.62) + 1``. gsplat 1.5 has
        ``e = 3.33 sqrt(0.3) + 1``, which is less.

        ``slack`` widens: every R counts as ``slack.growth R + slack.shift``.

        Rounding to float32 in gsplat and in the culler is allowed for. Not allowed for is float32
        overflow in gsplat, which begins at radii of about 1e9 pixels.
        """
        planes = self._planes.copy()
        planes[:, 3] += planes[:, 4] * slack.shift
        planes[:, 4] *= slack.growth
        return planes.astype(np.float32)

    @cached_property
    def _planes(self) -> np.ndarray:
        """:meth:`planes` without slack, float64."""
        fx, fy, cx, cy = self.K[0, 0], self.K[1, 1], self.K[0, 2], self.K[1, 2]
        left, top, right, bottom = self.whole_window
        # Per axis and side: the steepest x / z that gsplat uses for a row beyond the window's
        # border. It clamps a little outside of the image, whatever the window.
        margin_x, margin_y = 0.15 * self.width / fx, 0.15 * self.height / fy
        x_low = _steepest((cx - left) / fx, cx / fx + margin_x)
        x_high = _steepest((right - cx) / fx, (self.width - cx) / fx + margin_x)
        y_low = _steepest((cy - top) / fy, cy / fy + margin_y)
        y_high = _steepest((bottom - cy) / fy, (self.height - cy) / fy + margin_y)
        x_any = _steepest(cx / fx + margin_x, (self.width - cx) / fx + margin_x, x_low, x_high)
        y_any = _steepest(cy / fy + margin_y, (self.height - cy) / fy + margin_y, y_low, y_high)

        def growth(lx: float, ly: float) -> float:
            return float(np.linalg.norm([[fx, 0.0, fx * lx], [0.0, fy, fy * ly]], 2))

        largest = max(self.width, self.height, abs(cx), abs(cy), fx, fy)
        e = _BLUR_PIXELS + _RELATIVE_ROUNDING * largest
        normals, offsets, growths = (
            np.array(column, dtype=np.float64)
            for column in zip(
                ((fx, 0.0, cx - left + e), 0.0, growth(x_low, y_any)),
                ((-fx, 0.0, right - cx + e), 0.0, growth(x_high, y_any)),
                ((0.0, fy, cy - top + e), 0.0, growth(x_any, y_low)),
                ((0.0, -fy, bottom - cy + e), 0.0, growth(x_any, y_high)),
                ((0.0, 0.0, 1.0), -self.near * (1 - _RELATIVE_ROUNDING), 0.0),
                ((0.0, 0.0, -1.0), self.far * (1 + _RELATIVE_ROUNDING), 0.0),
                strict=True,
            )
        )
        rotation, shift = self.viewmat[:3, :3].astype(np.float64), self.viewmat[:3, 3]
        world = normals @ rotation
        rounding = _POSITION_ROUNDING * np.linalg.norm(shift) * np.linalg.norm(normals, axis=1)
        length = np.linalg.norm(world, axis=1)
        # A pose that scales would scale the covariance, too.
        reach = np.maximum(growths * np.linalg.norm(rotation, 2), length) * (1 + _RELATIVE_ROUNDING)
        planes = np.column_stack([world, normals @ shift + offsets + rounding, reach])
        return planes / length[:, None]


def _steepest(*slopes: float) -> float:
    """Largest of |x / z|."""
    return max(abs(slope) for slope in slopes)


def _matrix(tensor: Tensor) -> Tensor:
    """The last two dimensions of a tensor that holds one matrix, float64 on the CPU."""
    return tensor.detach().cpu().double().reshape(tensor.shape[-2:])
