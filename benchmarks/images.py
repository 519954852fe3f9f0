"""JPEGs of held-out views, small enough for the documentation."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nerfstudio.pipelines.base_pipeline import VanillaPipeline
from PIL import Image

from benchmarks import perceptual

MAX_BYTES = 100_000
MAX_SIDE = 1200
"""Longest side of a single view, in pixels; a pair is twice as wide."""


def spread(total: int, count: int) -> list[int]:
    """At most ``count`` indices of ``range(total)``, evenly spaced, the first included."""
    count = min(total, count)
    return [index * total // count for index in range(count)]


def save_views(pipeline: VanillaPipeline, folder: Path, stem: str, count: int) -> list[Path]:
    """Write ``STEM-viewNNN.jpg`` (truth | render) and ``STEM-viewNNN-render.jpg`` of some views."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for index, truth, render in held_out_views(pipeline, count):
        pair = np.concatenate([truth, render], axis=1)
        for name, pixels, side in (
            (f"{stem}-view{index:03d}.jpg", pair, 2 * MAX_SIDE),
            (f"{stem}-view{index:03d}-render.jpg", render, MAX_SIDE),
        ):
            (folder / name).write_bytes(to_jpeg(pixels, side))
            written.append(folder / name)
    return written


@torch.no_grad()
def held_out_views(
    pipeline: VanillaPipeline, count: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Index, truth and render of some held-out views; images are ``[H, W, 3]`` uint8."""
    model: Any = pipeline.model
    data: Any = pipeline.datamanager
    pipeline.eval()
    chosen = set(spread(len(data.eval_dataset), count))
    for index, (camera, batch) in enumerate(data.fixed_indices_eval_dataloader):
        if index in chosen:
            outputs = model.get_outputs_for_camera(camera)
            truth = model.composite_with_background(
                model.get_gt_img(batch["image"]), outputs["background"]
            )
            yield index, _to_uint8(truth), _to_uint8(outputs["rgb"])
    pipeline.train()


@torch.no_grad()
def metrics_of_views(
    pipeline: VanillaPipeline, perceptual_too: bool = False
) -> list[dict[str, float]]:
    """The metrics of each held-out view, as Nerfstudio averages them.

    Args:
        pipeline: of a training.
        perceptual_too: with those of :mod:`benchmarks.perceptual`.
    """
    views = pipeline.datamanager.fixed_indices_eval_dataloader
    return _metrics(pipeline, views, perceptual_too)


@torch.no_grad()
def metrics_of_training_views(pipeline: VanillaPipeline, count: int) -> list[dict[str, float]]:
    """The same of at most ``count`` of the views that were trained on, evenly spread."""
    data: Any = pipeline.datamanager
    cameras, images = data.train_dataset.cameras, data.cached_train
    chosen = spread(len(data.train_dataset), count)
    return _metrics(pipeline, ((cameras[i : i + 1], images[i]) for i in chosen))


def _metrics(
    pipeline: VanillaPipeline, views: Any, perceptual_too: bool = False
) -> list[dict[str, float]]:
    model: Any = pipeline.model
    pipeline.eval()
    metrics = []
    for camera, batch in views:
        outputs = model.get_outputs_for_camera(camera=camera.to(pipeline.device))
        metrics.append(model.get_image_metrics_and_images(outputs, batch)[0])
        if perceptual_too:
            truth = model.composite_with_background(
                model.get_gt_img(batch["image"]), outputs["background"]
            )
            metrics[-1].update(perceptual.measures(truth, outputs["rgb"]))
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


def _to_uint8(image: torch.Tensor) -> np.ndarray:
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
