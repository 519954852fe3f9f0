"""Metrics of views, and pictures of held-out ones, small enough for the documentation."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nerfstudio.pipelines.base_pipeline import VanillaPipeline
from PIL import Image
from torch import Tensor

from benchmarks.errors import BenchmarkError
from benchmarks.kept import KeptViews

MAX_BYTES = 100_000
MAX_SIDE = 1200
"""Longest side of a single view, in pixels; a pair is twice as wide."""

Crop = tuple[int, int, int, int]
"""A detail: left and upper edge, width, height, in pixels of the image."""


def spread(total: int, count: int) -> list[int]:
    """At most ``count`` indices of ``range(total)``, evenly spaced, the first included."""
    count = min(total, count)
    return [index * total // count for index in range(count)]


def check_crop(crop: Crop, width: int, height: int) -> None:
    """Raise unless a detail lies within images.

    Raises:
        BenchmarkError: it does not.
    """
    x, y, wide, high = crop
    if min(x, y) < 0 or min(wide, high) < 1 or x + wide > width or y + high > height:
        raise BenchmarkError(
            f"--crop X Y W H is a part of the held-out images, which have {width} x {height} "
            f"pixels, not {' '.join(map(str, crop))}"
        )


def save_views(
    kept: KeptViews, folder: Path, stem: str, count: int, crop: Crop | None = None
) -> list[Path]:
    """Write ``STEM-viewNNN.jpg`` (truth | render) and ``STEM-viewNNN-render.jpg`` of some views,
    and ``STEM-viewNNN-detail.png`` (truth | render) of a detail, pixel by pixel.

    Args:
        kept: the views.
        folder: where to.
        stem: first part of the names.
        count: of views, evenly spread over all.
        crop: the detail; None for none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chosen, written = set(spread(len(kept), count)), []
    for place, (index, *images) in enumerate(kept):
        if place not in chosen:
            continue
        truth, render = map(_to_uint8, images)
        files = {
            "": to_jpeg(np.concatenate([truth, render], axis=1), 2 * MAX_SIDE),
            "-render": to_jpeg(render, MAX_SIDE),
        }
        if crop is not None:
            files["-detail"] = to_png(*(_part(image, crop) for image in (truth, render)))
        for what, content in files.items():
            kind = "png" if what == "-detail" else "jpg"
            written.append(folder / f"{stem}-view{index:03d}{what}.{kind}")
            written[-1].write_bytes(content)
    return written


@torch.no_grad()
def metrics_of_views(
    pipeline: VanillaPipeline, seen: Callable[[int, Tensor, Tensor], None] | None = None
) -> list[dict[str, float]]:
    """The metrics of each held-out view, as Nerfstudio averages them.

    Args:
        pipeline: of a training.
        seen: gets the index, the truth and the render of each, [H, W, 3], on the device.
    """
    return _metrics(pipeline, pipeline.datamanager.fixed_indices_eval_dataloader, seen)


@torch.no_grad()
def metrics_of_training_views(pipeline: VanillaPipeline, count: int) -> list[dict[str, float]]:
    """The same of at most ``count`` of the views that were trained on, evenly spread."""
    data: Any = pipeline.datamanager
    cameras, images = data.train_dataset.cameras, data.cached_train
    chosen = spread(len(data.train_dataset), count)
    return _metrics(pipeline, ((cameras[i : i + 1], images[i]) for i in chosen))


def _metrics(
    pipeline: VanillaPipeline,
    views: Any,
    seen: Callable[[int, Tensor, Tensor], None] | None = None,
) -> list[dict[str, float]]:
    model: Any = pipeline.model
    pipeline.eval()
    metrics = []
    for index, (camera, batch) in enumerate(views):
        outputs = model.get_outputs_for_camera(camera=camera.to(pipeline.device))
        metrics.append(model.get_image_metrics_and_images(outputs, batch)[0])
        if seen is not None:
            truth = model.composite_with_background(
                model.get_gt_img(batch["image"]), outputs["background"]
            )
            seen(index, truth, outputs["rgb"])
    pipeline.train()
    return metrics


def to_jpeg(pixels: np.ndarray, max_side: int, max_bytes: int = MAX_BYTES) -> bytes:
    """Encode ``[H, W, 3]`` uint8, scaled to ``max_side``, coarser and smaller until it fits."""
    image = Image.fromarray(pixels)
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    while True:
        for quality in (92, 85, 75, 65):
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality, optimize=True)
            if buffer.tell() <= max_bytes or max(image.size) <= 16:
                return buffer.getvalue()
        image.thumbnail((image.width * 4 // 5, image.height * 4 // 5), Image.Resampling.LANCZOS)


def to_png(truth: np.ndarray, render: np.ndarray) -> bytes:
    """Two images ``[H, W, 3]`` uint8 side by side, as they are."""
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate([truth, render], axis=1)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _part(image: np.ndarray, crop: Crop) -> np.ndarray:
    x, y, width, height = crop
    return image[y : y + height, x : x + width]


def _to_uint8(image: np.ndarray) -> np.ndarray:
    return np.rint(image.clip(0, 1) * 255).astype(np.uint8)
