"""Where a data set's images are kept: on the device, in host memory or on the disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from nerfstudio.cameras.cameras import CameraType
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.utils.rich_utils import CONSOLE
from PIL import Image

from gsscale_nerfstudio.store.memory import available_memory

_SHARE = 4
"""Images may take one part in this many of the host memory that is available: rows need it, too."""


@dataclass(frozen=True)
class Placement:
    """What :func:`place` decided.

    Attributes:
        where: Nerfstudio's names, or ``disk``. With that:
        budget: bytes for images in memory.
        threads: how many read images.
        sizes: bytes of each image when decoded, for each data set.
    """

    where: Literal["cpu", "gpu", "disk"]
    budget: int = 0
    threads: int = 0
    sizes: tuple[list[int], ...] = ()


def place(
    wanted: Literal["auto", "gpu", "cpu", "disk"],
    datasets: Sequence[InputDataset],
    device: torch.device,
    image_type: Literal["uint8", "float32"],
    memory_gb: float | None = None,
    threads: int | None = None,
) -> Placement:
    """Decide where images are kept, and say so when it is the disk.

    Args:
        wanted: ``auto``: in memory if all images fit into the budget, else on the disk.
        datasets: whose images are to be kept.
        device: they are used there; on the CPU nothing is page-locked.
        image_type: element type.
        memory_gb: the budget, in 10^9 bytes. None: a quarter of the available host memory.
        threads: that read from the disk. None: one for each core that this process may use.

    Raises:
        OSError: a file is missing or no image.
        ValueError: an image is not as large as its camera says.
    """
    # Nerfstudio page-locks with "cpu", which needs CUDA; "gpu" is its name for the device.
    in_memory: Literal["cpu", "gpu"] = "gpu" if device.type == "cpu" else "cpu"
    if wanted == "gpu":
        return Placement("gpu")
    if wanted == "cpu":
        return Placement(in_memory)
    threads = threads or len(os.sched_getaffinity(0))
    sizes = tuple(decoded_bytes(data, image_type, threads) for data in datasets)
    every = [size for data in sizes for size in data]
    needed = every if in_memory == "gpu" else map(_page_locked, every)
    available = available_memory()
    budget = available // _SHARE if memory_gb is None else int(memory_gb * 1e9)
    if wanted == "auto" and sum(needed) <= budget:
        return Placement(in_memory)
    of = f" of the {available / 1e9:.1f} GB available" if memory_gb is None else ""
    CONSOLE.print(
        f"gsscale: the {len(every):,} images, {sum(every) / 1e9:.1f} GB when decoded, are read "
        f"from the disk as they are needed, by {threads} threads, and stay in memory up to "
        f"{budget / 1e9:.1f} GB{of} (--pipeline.datamanager.image-memory-gb; --pipeline.datamanager"
        ".cache-images cpu keeps all)",
        highlight=False,
        soft_wrap=True,
    )
    return Placement("disk", budget, threads, sizes)


def decoded_bytes(
    dataset: InputDataset, image_type: Literal["uint8", "float32"], threads: int
) -> list[int]:
    """Bytes of each image and its mask when decoded; only the heads of the files are read.

    The data set's cameras are still those of the files. Undistorted images are smaller.

    Args:
        dataset: whose images.
        image_type: element type.
        threads: that read at a time.

    Raises:
        OSError: a file is missing or no image.
        ValueError: an image or mask is not as large as its camera says.
    """
    element = 4 if image_type == "float32" else 1
    outputs = dataset._dataparser_outputs
    cameras = dataset.cameras
    masks: Sequence[Path | None] = outputs.mask_filenames or [None] * len(dataset)
    # Undistorting these makes a mask.
    masked = (cameras.camera_type == CameraType.FISHEYE624.value).flatten().tolist()

    def size(index: int) -> int:
        camera = int(cameras.width[index]), int(cameras.height[index])
        bands = _bands(outputs.image_filenames[index], camera, dataset.scale_factor)
        # As InputDataset: without transparency where it is painted over, grey becomes colour.
        channels = 4 if bands == 4 and outputs.alpha_color is None else 3
        mask = masks[index]
        if mask is not None:
            _bands(mask, camera, dataset.scale_factor)
        return camera[0] * camera[1] * (channels * element + int(masked[index] or mask is not None))

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(size, range(len(dataset))))


def _bands(file: Path, camera: tuple[int, int], scale: float) -> int:
    """Channels of an image file, which must be as large as its camera."""
    with Image.open(file) as header:
        size = tuple(int(side * scale) if scale != 1 else side for side in header.size)
        if size != camera:
            raise ValueError(
                f"{file} has {size[0]} x {size[1]} pixels, its camera {camera[0]} x {camera[1]}"
            )
        return len(header.getbands())


def _page_locked(size: int) -> int:
    """Bytes that torch takes for ``size`` of page-locked memory: the next power of two."""
    return 1 << max(0, size - 1).bit_length()
