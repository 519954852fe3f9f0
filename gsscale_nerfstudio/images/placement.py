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

from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.images.disk import STAGED
from gsscale_nerfstudio.store.memory import available_memory

_SHARE = 4
"""Images may take one part in this many of the host memory that is available: rows need it, too."""

_COLORS = ("L", "RGB", "RGBA")
"""Pixels whose numbers Nerfstudio reads as colours, rightly: not palette indices, CMYK, 16 bits."""

_DECODING = {
    CameraType.FISHEYE.value: {"uint8": 6, "float32": 4},
    CameraType.FISHEYE624.value: {"uint8": 24, "float32": 9},
}
"""Images' worth of memory, masks included, that a thread takes while it reads one: rounded up from
peaks at 9 megapixels (23.5 and 8.7 for FISHEYE624). Undistortion makes maps of floats for these."""

_DECODING_OTHERS = {"uint8": 4, "float32": 4}
"""The same of perspective cameras. A JPEG that needs no undistortion takes 1, as uint8."""


@dataclass(frozen=True)
class Placement:
    """What :func:`place` decided.

    Attributes:
        where: Nerfstudio's names, or ``disk``.
        sizes: bytes of each image when decoded, for each data set.
        in_host: bytes of host memory that images will take, for each data set.
        on_gpu: bytes of GPU memory that images will take.
        budget: with ``disk``, bytes for training images in memory.
        threads: with ``disk``, how many read them.
    """

    where: Literal["cpu", "gpu", "disk"]
    sizes: tuple[list[int], ...]
    in_host: tuple[int, ...]
    on_gpu: int = 0
    budget: int = 0
    threads: int = 0


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
        datasets: whose images are to be kept; those of training first.
        device: they are used there; on the CPU nothing is page-locked.
        image_type: element type.
        memory_gb: the budget, in 10^9 bytes. None: a quarter of the available host memory.
        threads: that read from the disk. None: one for each core that this process may use, but
            only so many that what they take beside the budget is no more than the budget.

    Raises:
        OSError: a file is missing or no image.
        ValueError: an image is not as large as its camera says.
    """
    cores = len(os.sched_getaffinity(0))
    sizes = tuple(decoded_bytes(data, image_type, threads or cores) for data in datasets)
    every = [size for data in sizes for size in data]
    # The present one and the next.
    shown = 2 * max(every, default=0) if device.type == "cuda" else 0
    if device.type == "cpu":  # Nerfstudio page-locks with "cpu", which needs CUDA
        in_memory = Placement("gpu", sizes, tuple(map(sum, sizes)))
    else:
        locked = tuple(sum(map(_page_locked, data)) for data in sizes)
        in_memory = Placement("cpu", sizes, locked, shown)
    if wanted == "gpu" and device.type == "cuda":  # Nerfstudio's name for the device
        return Placement("gpu", sizes, (0,) * len(sizes), sum(every))
    if wanted in ("gpu", "cpu"):
        return in_memory
    available = available_memory()
    budget = available // _SHARE if memory_gb is None else int(memory_gb * 1e9)
    if wanted == "auto" and sum(in_memory.in_host) <= budget:
        return in_memory
    decoding = _decoding_bytes(datasets[0], sizes[0], image_type)
    threads = threads or max(1, min(cores, budget // max(1, decoding)))
    of = f" of the {available / 1e9:.1f} GB available" if memory_gb is None else ""
    CONSOLE.print(
        f"gsscale: the {len(every):,} images, {sum(every) / 1e9:.1f} GB when decoded, are read "
        f"from the disk as they are needed, by {threads} threads, and stay in memory up to "
        f"{budget / 1e9:.1f} GB{of} (--pipeline.datamanager.image-memory-gb; --pipeline.datamanager"
        ".cache-images cpu keeps all)",
        highlight=False,
        soft_wrap=True,
    )
    in_host = _in_host(sizes, budget, threads, decoding, page_lock=device.type == "cuda")
    return Placement("disk", sizes, in_host, shown, budget, threads)


def _in_host(
    sizes: tuple[list[int], ...], budget: int, threads: int, decoding: int, page_lock: bool
) -> tuple[int, ...]:
    """Bytes that images from the disk take in host memory: training's, and of others two each."""
    train, *others = sizes
    largest = max(train, default=0)
    taken = min(budget, sum(train)) + decoding * min(threads, len(train))
    if page_lock:
        taken += STAGED * _page_locked(largest)
    return taken, *(2 * max(data, default=0) for data in others)


def _decoding_bytes(
    dataset: InputDataset, sizes: list[int], image_type: Literal["uint8", "float32"]
) -> int:
    """Bytes that a thread takes, at most, while it reads an image whose :func:`decoded_bytes`
    are among ``sizes``."""
    kinds = dataset.cameras.camera_type.flatten().tolist()
    return max(
        (
            size * _DECODING.get(kind, _DECODING_OTHERS)[image_type]
            for size, kind in zip(sizes, kinds, strict=True)
        ),
        default=0,
    )


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
        GSScaleError: an image is of another kind than Nerfstudio knows.
    """
    element = 4 if image_type == "float32" else 1
    outputs = dataset._dataparser_outputs
    cameras = dataset.cameras
    masks: Sequence[Path | None] = outputs.mask_filenames or [None] * len(dataset)
    # Undistorting these makes a mask.
    masked = (cameras.camera_type == CameraType.FISHEYE624.value).flatten().tolist()

    def size(index: int) -> int:
        camera = int(cameras.width[index]), int(cameras.height[index])
        file = outputs.image_filenames[index]
        mode = _mode(file, camera, dataset.scale_factor)
        if mode not in _COLORS:
            raise GSScaleError(
                f"the pixels of the image {file} are {mode} in Pillow's words, and Nerfstudio "
                f"knows {', '.join(_COLORS)} only; save it and others like it as RGB of 8 bits"
            )
        # As InputDataset: without transparency where it is painted over, grey becomes colour.
        channels = 4 if mode == "RGBA" and outputs.alpha_color is None else 3
        mask = masks[index]
        if mask is not None:
            _mode(mask, camera, dataset.scale_factor)
        return camera[0] * camera[1] * (channels * element + int(masked[index] or mask is not None))

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(size, range(len(dataset))))


def _mode(file: Path, camera: tuple[int, int], scale: float) -> str:
    """What Pillow calls the pixels of an image file, which must be as large as its camera."""
    with Image.open(file) as header:
        size = tuple(int(side * scale) if scale != 1 else side for side in header.size)
        if size != camera:
            raise ValueError(
                f"{file} has {size[0]} x {size[1]} pixels, its camera {camera[0]} x {camera[1]}"
            )
        return header.mode


def _page_locked(size: int) -> int:
    """Bytes that torch takes for ``size`` of page-locked memory: the next power of two."""
    return 1 << max(0, size - 1).bit_length()
