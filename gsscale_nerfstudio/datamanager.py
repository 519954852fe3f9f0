"""Nerfstudio's full-image data manager, with data sets checked before training starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.datamanagers.full_images_datamanager import (
    FullImageDatamanager,
    FullImageDatamanagerConfig,
)
from nerfstudio.data.datasets.base_dataset import InputDataset
from torch import Tensor

from gsscale_nerfstudio.cull import View
from gsscale_nerfstudio.engines.streams import Mark, SideStream, wait_in_stream
from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.view_order import reorder, seen_by


@dataclass
class GSScaleDatamanagerConfig(FullImageDatamanagerConfig):
    """Options of splatfacto's data manager, and the order of training images."""

    _target: type = field(default_factory=lambda: GSScaleDatamanager)
    view_lookahead: int = 1
    """Choose the next training image among the next N of Nerfstudio's random order: the one with
    the largest share of Gaussians that the present one sees, too. Each still comes once per epoch.
    With the resident engine and a cache smaller than the scene, fewer Gaussians cross the link:
    faster, or as fast with less GPU memory. The host engine sends every view's Gaussians in any
    case. Images in a row are then alike, which costs quality: on an aerial scene, 16 took 0.01 of
    SSIM and made a sixth more Gaussians. 1: Nerfstudio's order."""


class GSScaleDatamanager(FullImageDatamanager):
    """Hands out whole images and their cameras, and knows which comes next.

    Training cameras stay on the CPU, where the culler wants them. The next image is copied to the
    device, on a stream of its own, while the present one is trained.

    Attributes:
        row_centres: gives [n, 3] float32, the centres of some thousand rows; they tell which views
            overlap. Without it ``view_lookahead`` has no effect.

    Raises:
        GSScaleError: the data set cannot be loaded, or has cameras that cannot be rendered.
    """

    config: GSScaleDatamanagerConfig
    row_centres: Callable[[], np.ndarray] | None = None

    def __init__(
        self, config: GSScaleDatamanagerConfig, device: torch.device | str = "cpu", **kwargs: Any
    ) -> None:
        if config.view_lookahead < 1:
            raise GSScaleError(
                "--pipeline.datamanager.view-lookahead is the number of images that the next one "
                f"is chosen from: 1 (Nerfstudio's order) or more, not {config.view_lookahead}"
            )
        with _explained(config.data or config.dataparser.data):
            super().__init__(config, device=device, **kwargs)
        # Put in order like the later ones, when there are rows.
        self._first_epoch, self.train_unseen_cameras = self.train_unseen_cameras, []
        self._last_queued: int | None = None
        self._views: list[View] = []
        for dataset in (self.train_dataset, self.eval_dataset):
            check_cameras(dataset)
        self._cameras: dict[int, Cameras] = {}
        self._uploads = Uploads(torch.device(device))
        if torch.device(device).type == "cpu":
            # "gpu" means the device; "cpu" would page-lock the images, which needs CUDA.
            self.config.cache_images = "gpu"

    def next_train(self, step: int) -> tuple[Cameras, dict[str, Any]]:
        """The next training image, on the device, and its camera, on the CPU.

        Both in the order of :meth:`upcoming`; the camera is shared between calls and not to be
        changed.
        """
        (index,) = self.upcoming(1)
        del self.train_unseen_cameras[0]
        data = self._uploads.take(index, self.cached_train[index])
        (following,) = self.upcoming(1)
        self._uploads.start(following, self.cached_train[following])
        return self.train_camera(index), data

    def upcoming(self, n: int) -> list[int]:
        """Indices of the ``n`` training images that :meth:`next_train` will give next.

        They do not change any more: engines prepare views that were announced.
        """
        while len(self.train_unseen_cameras) < n:
            self.train_unseen_cameras += self._next_epoch()
        return self.train_unseen_cameras[:n]

    def _next_epoch(self) -> list[int]:
        """Indices of one more epoch's images: Nerfstudio's permutation, or one that follows it."""
        epoch, self._first_epoch = self._first_epoch or self.sample_train_cameras(), []
        window = self.config.view_lookahead
        if window > 1 and self.row_centres is not None:
            if not self._views:
                every = range(len(self.train_dataset))
                self._views = [View.from_camera(self.train_camera(index)) for index in every]
            # Asked anew in each epoch, because rows move and grow; with the order 20 ms for 200
            # views. A camera optimizer's corrections are too small to matter here.
            sees = seen_by(self._views, self.row_centres())
            epoch = reorder(epoch, self._last_queued, sees, window)
        self._last_queued = epoch[-1]
        return epoch

    def train_camera(self, index: int) -> Cameras:
        """One training camera, [1], on the CPU; its metadata has the image's ``cam_idx``."""
        camera = self._cameras.get(index)
        if camera is None:
            # Reading the images comes first, because undistorting them changes the cameras.
            self.cached_train  # noqa: B018
            camera = self.train_dataset.cameras[index : index + 1]
            camera.metadata = {**(camera.metadata or {}), "cam_idx": index}
            self._cameras[index] = camera
        return camera

    def _load_images(
        self, split: Literal["train", "eval"], cache_images_device: Literal["cpu", "gpu"]
    ) -> list[dict[str, Tensor]]:
        with _explained(self.config.data):
            images = super()._load_images(split, cache_images_device)
        for data in images:
            # Undistortion cuts images out of larger ones. Their rows lie apart, and the copy to the
            # device would first gather them in ordinary memory, at every step.
            if not data["image"].is_contiguous():
                pinned = data["image"].is_pinned()
                whole = data["image"].contiguous()
                data["image"] = whole.pin_memory() if pinned else whole
        return images


class Uploads:
    """Copies of one image's tensors to the device, one image ahead of their use.

    Args:
        device: where they go.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = SideStream(device)
        self._ahead: tuple[int, dict[str, Any], Mark] | None = None

    def start(self, index: int, data: dict[str, Any]) -> None:
        """Begin to copy image ``index``; overlaps with the device's work if it is page-locked."""
        with self._stream.active():
            self._ahead = index, self._copied(data), self._stream.mark()

    def take(self, index: int, data: dict[str, Any]) -> dict[str, Any]:
        """The tensors of image ``index`` on the device, in a dictionary of their own."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != index:
            return self._copied(data)
        _, copies, arrived = ahead
        wait_in_stream(arrived, self._device)
        for name, copy in copies.items():
            if isinstance(copy, Tensor) and copy is not data[name]:
                # Made on the other stream, freed when the current one has used it.
                copy.record_stream(torch.cuda.current_stream(self._device))
        return copies

    def _copied(self, data: dict[str, Any]) -> dict[str, Any]:
        # A copy of the dictionary, too: nobody is to change the cached one.
        copies = dict(data)
        for name in ("image", "mask"):
            if name in data:
                copies[name] = data[name].to(self._device, non_blocking=True)
        return copies


@contextmanager
def _explained(data: Any) -> Iterator[None]:
    """Nerfstudio's parsers stop where the data surprises them; say which data and what to check."""
    try:
        yield
    except (AssertionError, LookupError, OSError, TypeError, ValueError) as error:
        raise GSScaleError(
            f"the data set {data} could not be loaded ({type(error).__name__}: {error}); check "
            "that the folder exists, that it has at least one image with a pose, that its images "
            "are there, whole, and as large as their cameras say, and that its format is the one "
            "named on the command line (nerfstudio-data, colmap, blender-data, ...)"
        ) from error


def check_cameras(dataset: InputDataset) -> None:
    """Refuse cameras that have no pixels or no place.

    Raises:
        GSScaleError: names the first image concerned.
    """
    cameras = dataset.cameras
    if len(cameras) == 0:
        return  # no held-out images; the training images were checked by Nerfstudio
    checks = {
        "has no pixels": ((cameras.width < 1) | (cameras.height < 1)).flatten(),
        "has a pose that is not finite": ~cameras.camera_to_worlds.isfinite().flatten(1).all(dim=1),
        "has a focal length that is not positive and finite": ~(
            (cameras.fx > 0) & (cameras.fy > 0) & cameras.fx.isfinite() & cameras.fy.isfinite()
        ).flatten(),
    }
    for what, wrong in checks.items():
        if wrong.any():
            first = dataset.image_filenames[int(wrong.nonzero()[0, 0])]
            raise GSScaleError(
                f"the camera of {first} {what} ({int(wrong.sum())} of {len(wrong)} cameras); mend "
                "or remove it in the data set's transforms.json or COLMAP model. One bad pose "
                "spoils all if poses are centred (--orientation-method, --center-method)"
            )
