"""Nerfstudio's full-image data manager, with data sets checked before training starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.datamanagers.full_images_datamanager import (
    FullImageDatamanager,
    FullImageDatamanagerConfig,
)
from nerfstudio.data.dataparsers.base_dataparser import DataParser
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.data.utils.dataloaders import FixedIndicesEvalDataloader
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from gsscale_nerfstudio.cull import View
from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.images import (
    DiskImages,
    EvalImages,
    ImageDataset,
    ListedImages,
    Placement,
    Uploads,
    check_cameras,
    explained,
    place,
)
from gsscale_nerfstudio.view_order import reorder, seen_by


@dataclass
class GSScaleDatamanagerConfig(FullImageDatamanagerConfig):
    """splatfacto's options; where images are kept, and their order, are gsscale's."""

    _target: type = field(default_factory=lambda: GSScaleDatamanager)
    cache_images: Literal["auto", "gpu", "cpu", "disk"] = "auto"  # type: ignore[assignment]
    """Where decoded images are kept. gpu: all on the device (Nerfstudio makes it cpu with more than
    500 training images). cpu: all in page-locked host memory, uploaded one ahead. disk: read in
    training, by threads that know the order of images; those that image_memory_gb holds stay in
    memory, the others are read again in each epoch. auto: cpu if image_memory_gb holds them all,
    training and evaluation, else disk."""
    image_memory_gb: float | None = None
    """With cache_images auto or disk: host memory, in 10^9 bytes, for decoded training images,
    those read ahead included. The decoders' own needs come on top, a thread's as many as four
    images, of a fisheye lens six, of FISHEYE624 24.
    Unset: a quarter of the memory that is available (in a container, within its limit) when the
    first image is needed."""
    max_thread_workers: int | None = None
    """With cache_images auto or disk: number of threads that read images. Unset: one for each core
    that this process may use, or fewer, so that what they take beside image_memory_gb is no more
    than that. (For gpu and cpu Nerfstudio reads with two threads, and a number is
    refused.)"""
    view_lookahead: int = 1
    """Choose the next training image among the next N of Nerfstudio's random order: the one with
    the largest share of Gaussians that the present one sees, too. Each still comes once per epoch.
    With the resident engine and a cache smaller than the scene, fewer Gaussians cross the link
    between host and GPU; the host engine gains nothing. Images in a row are then alike, which costs
    quality: on an aerial scene, 16 took 0.24 dB and 0.01 of SSIM, and made a sixth more Gaussians.
    1: Nerfstudio's order."""
    train_list: Path | None = None
    """Text file with the names of training images, one on a line, as a.jpg or left/a.jpg. With
    every dataparser, whose own split no longer counts. Unset: all that eval_list does not have, or,
    without one, the dataparser's split."""
    eval_list: Path | None = None
    """Text file with the names of held-out images, for evaluation in training, ns-eval and
    ns-render. Unset: all that train_list does not have, or, without one, the dataparser's split."""


class GSScaleDatamanager(FullImageDatamanager):
    """Hands out whole images and their cameras, and knows which comes next.

    Training cameras stay on the CPU, where the culler wants them. The next image is copied to the
    device, on a stream of its own, while the present one is trained.

    Attributes:
        row_centres: gives [n, 3] float32, the centres of some thousand rows; they tell which views
            overlap. Without it ``view_lookahead`` has no effect.
        before_eval_image: called before each of all held-out images.

    Raises:
        GSScaleError: the data set cannot be loaded, or has cameras that cannot be rendered.
    """

    config: GSScaleDatamanagerConfig
    row_centres: Callable[[], np.ndarray] | None = None
    before_eval_image: Callable[[], None] = staticmethod(lambda: None)

    def __init__(
        self, config: GSScaleDatamanagerConfig, device: torch.device | str = "cpu", **kwargs: Any
    ) -> None:
        if config.view_lookahead < 1:
            raise GSScaleError(
                "--pipeline.datamanager.view-lookahead is the number of images that the next one "
                f"is chosen from: 1 (Nerfstudio's order) or more, not {config.view_lookahead}"
            )
        if config.cache_images in ("gpu", "cpu"):
            for flag, value, says in (
                ("image-memory-gb", config.image_memory_gb, "bounds nothing"),
                ("max-thread-workers", config.max_thread_workers, "has no effect"),
            ):
                if value is not None:
                    raise GSScaleError(
                        f"--pipeline.datamanager.{flag} {says} when all images are cached; leave "
                        f"it out, or --pipeline.datamanager.cache-images {config.cache_images}"
                    )
        if config.image_memory_gb is not None and not config.image_memory_gb > 0:
            raise GSScaleError(
                "--pipeline.datamanager.image-memory-gb is memory for images, in 10^9 bytes: more "
                f"than 0, not {config.image_memory_gb:g}"
            )
        if not config.camera_res_scale_factor > 0:
            raise GSScaleError(
                "--pipeline.datamanager.camera-res-scale-factor is what the sides of images are "
                f"multiplied by: more than 0, not {config.camera_res_scale_factor:g}"
            )
        if config.max_thread_workers is not None and config.max_thread_workers < 1:
            raise GSScaleError(
                "--pipeline.datamanager.max-thread-workers is the number of threads that read "
                f"images: 1 or more, not {config.max_thread_workers}"
            )
        with explained(config.data or config.dataparser.data, RuntimeError):
            super().__init__(config, device=device, **kwargs)
        # Put in order like the later ones, when there are rows.
        self._first_epoch, self.train_unseen_cameras = self.train_unseen_cameras, []
        self._last_queued: int | None = None
        self._views: list[View] = []
        for dataset in (self.train_dataset, self.eval_dataset):
            check_cameras(dataset)
        self._cameras: dict[int, Cameras] = {}
        self._uploads = Uploads(torch.device(device))

    @property
    def dataparser(self) -> DataParser:
        """What finds images, cameras and points, and splits them."""
        return self._dataparser

    @dataparser.setter
    def dataparser(self, parser: DataParser) -> None:
        # Nerfstudio sets it before it asks for the first split.
        lists = self.config.train_list, self.config.eval_list
        self._dataparser = parser if lists == (None, None) else ListedImages(parser, *lists)

    @property
    def dataset_type(self) -> type[InputDataset]:
        """What reads the images."""
        return ImageDataset

    def next_train(self, step: int) -> tuple[Cameras, dict[str, Any]]:
        """The next training image, on the device, and its camera, on the CPU.

        Both in the order of :meth:`upcoming`; the camera is shared between calls and not to be
        changed.
        """
        images: list[dict[str, Any]] | DiskImages = self.cached_train
        on_disk = images if isinstance(images, DiskImages) else None
        if on_disk is not None:
            on_disk.announce(self.upcoming(on_disk.ahead))
        index, following = self.upcoming(2)
        data = self._uploads.take(index, images[index])
        # One that is still being read can be waited for during this step's work.
        if on_disk is None or on_disk.ready(following):
            self._uploads.start(following, images[following])
        # Last: if the device has no room for an image, the next call gives the same one.
        del self.train_unseen_cameras[0]
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

    def resume_state(self) -> dict[str, Any]:
        """The order of images from here on, in plain values."""
        state: dict[str, Any] = {
            "sampling": self._sampling(),
            "queue": list(self.train_unseen_cameras),
            "first_epoch": list(self._first_epoch),
            "last_queued": self._last_queued,
            "eval_queue": list(self.eval_unseen_cameras),
        }
        # Whichever of these Nerfstudio's way of sampling has. The one without a generator of its
        # own draws from numpy's.
        if hasattr(self, "random_generator"):
            state["generator"] = self.random_generator.getstate()
        if hasattr(self, "train_unsampled_epoch_count"):
            state["unsampled_epochs"] = self.train_unsampled_epoch_count.tolist()
        return state

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on with the order of :meth:`resume_state`, if it is one of the same images."""
        if state["sampling"] != self._sampling():
            CONSOLE.print(
                "gsscale: the checkpoint's order of images is one of other images, or sampled in "
                "another way; a new one begins."
            )
            return
        self.train_unseen_cameras = list(state["queue"])
        self._first_epoch = list(state["first_epoch"])
        self._last_queued = state["last_queued"]
        self.eval_unseen_cameras = list(state["eval_queue"])
        if "generator" in state:
            self.random_generator.setstate(state["generator"])
        if "unsampled_epochs" in state:
            self.train_unsampled_epoch_count = np.array(state["unsampled_epochs"])

    def _sampling(self) -> dict[str, Any]:
        """What an order of images is one of."""
        return {
            "strategy": self.config.train_cameras_sampling_strategy,
            "train_images": len(self.train_dataset),
            "eval_images": len(self.eval_dataset),
        }

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

    @cached_property
    def _placement(self) -> Placement:
        """Where images are kept. Decided when the first is needed, not by ``ns-export``."""
        config = self.config
        datasets = (self.train_dataset, self.eval_dataset)
        return place(
            config.cache_images,
            datasets,
            torch.device(self.device),
            config.cache_images_type,
            config.image_memory_gb,
            config.max_thread_workers,
        )

    @property
    def image_placement(self) -> Placement:
        """Where images are kept, and what memory they will take there.

        Raises:
            GSScaleError: a file is missing or no image.
        """
        with explained(self.config.data):
            return self._placement

    def get_train_rays_per_batch(self) -> int:
        """Pixels of the first training image, for the log."""
        # Nerfstudio looks at the image, at every step: from the disk it would be read each time.
        camera = self.train_camera(0)
        return int(camera.height) * int(camera.width)

    def image_bytes_to_come(self) -> int:
        """Host memory that images are still going to take."""
        placement, to_come = self.image_placement, 0
        for split, size in zip(("cached_train", "cached_eval"), placement.in_host, strict=True):
            images = self.__dict__.get(split)  # asking for it would read them
            if images is None:
                to_come += size
            elif isinstance(images, DiskImages):
                to_come += max(0, size - images.kept_bytes)
        return to_come

    def _load_images(  # type: ignore[override]
        self, split: Literal["train", "eval"], cache_images_device: str
    ) -> list[dict[str, Tensor]] | DiskImages:
        with explained(self.config.data):
            placement = self._placement
            if placement.where == "disk":
                return self._on_disk(split, placement)
            images = super()._load_images(split, placement.where)
        for data in images:
            # Undistortion cuts images out of larger ones. Their rows lie apart, and the copy to the
            # device would first gather them in ordinary memory, at every step.
            if not data["image"].is_contiguous():
                pinned = data["image"].is_pinned()
                whole = data["image"].contiguous()
                data["image"] = whole.pin_memory() if pinned else whole
        return images

    def _on_disk(self, split: Literal["train", "eval"], placement: Placement) -> DiskImages:
        image_type, (train, held_out) = self.config.cache_images_type, placement.sizes
        if split == "eval":  # one image, and the next
            budget = 2 * max(held_out, default=0)
            return DiskImages.of(self.eval_dataset, image_type, held_out, budget, threads=2)
        return DiskImages.of(
            self.train_dataset,
            image_type,
            train,
            placement.budget,
            placement.threads,
            page_lock=torch.device(self.device).type == "cuda",
        )

    @property
    def fixed_indices_eval_dataloader(self) -> EvalImages:  # type: ignore[override]
        """All held-out cameras and images, on the device one after the other."""
        device = torch.device(self.device)
        before_each = self.before_eval_image
        return EvalImages(self.eval_dataset.cameras, self.cached_eval, device, before_each)

    @property
    def eval_dataloader(self) -> FixedIndicesEvalDataloader:
        """Held-out cameras and images, read anew: ``ns-render spiral`` begins at the first.

        Raises:
            GSScaleError: there are none.
        """
        if len(self.eval_dataset) == 0:
            raise GSScaleError(
                "ns-render spiral begins at the first held-out image, and none is held out; use "
                "ns-render interpolate --pose-source train, or a camera path"
            )
        return FixedIndicesEvalDataloader(self.eval_dataset, device=self.device)
