"""The demo's picture: held-out views, what the model renders there, and where the two differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from gsscale_nerfstudio.errors import GSScaleError

_AMPLIFICATION = 4
_ROWS = 4
_PANEL_WIDTH = 320
_GAP = 6
_CAPTION = 26
_PAPER = (24, 26, 30)
_INK = (236, 236, 230)
# Black over violet and orange to pale yellow: brightness grows with the error.
_HEAT = np.array([[0, 0, 0], [88, 20, 110], [220, 80, 60], [250, 180, 60], [255, 250, 210]])

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class View:
    """A held-out image and its rendering, 8-bit RGB [h, w, 3] each."""

    truth: Pixels
    render: Pixels

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio of the rendering, dB."""
        return _psnr(self.truth / 255.0 - self.render / 255.0)

    @property
    def constant_psnr(self) -> float:
        """PSNR, dB, of the best one-colour image: what knowing nothing but the mean would give."""
        truth = self.truth / 255.0
        return _psnr(truth - truth.mean(axis=(0, 1)))


def _psnr(error: NDArray[np.float64]) -> float:
    """PSNR, dB, of an error image in units of the full range."""
    return float(-10.0 * np.log10(np.maximum(np.mean(error**2), 1e-12)))


def read_views(folder: Path) -> list[View]:
    """The views that ``ns-eval --render-output-path`` saved: truth and rendering side by side."""
    views = []
    for path in sorted(folder.glob("eval_img_*.png")):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        half = pixels.shape[1] // 2
        views.append(View(truth=pixels[:, :half], render=pixels[:, half:]))
    if not views:
        raise GSScaleError(f"ns-eval left no pictures of held-out views in {folder}.")
    return views


def heat(view: View) -> Pixels:
    """The mean absolute error over the channels, amplified, as a colour scale [h, w, 3]."""
    error = np.abs(view.truth.astype(np.float64) - view.render).mean(axis=2) / 255.0
    level = np.clip(error * _AMPLIFICATION, 0.0, 1.0)
    stops = np.linspace(0.0, 1.0, len(_HEAT))
    channels = [np.interp(level, stops, _HEAT[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=2).round().astype(np.uint8)


def write_picture(path: Path, views: Sequence[View]) -> None:
    """Stack some of the views, evenly chosen: a row each of truth, rendering and error."""
    chosen = np.unique(np.linspace(0, len(views) - 1, min(_ROWS, len(views))).round().astype(int))
    height, width = views[0].truth.shape[:2]
    # Whole multiples, so that the picture shows the pixels as they are.
    zoom = max(1, round(_PANEL_WIDTH / width))
    width, height = width * zoom, height * zoom
    size = (3 * width + 4 * _GAP, _GAP + len(chosen) * (_CAPTION + height + _GAP))
    picture = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=15)
    for row, index in enumerate(chosen):
        view = views[index]
        top = _GAP + row * (_CAPTION + height + _GAP)
        panels = [
            (f"held-out view {index + 1} of {len(views)}", view.truth),
            (f"rendering, {view.psnr:.1f} dB", view.render),
            (f"error: black 0, white {100 // _AMPLIFICATION} % or more", heat(view)),
        ]
        for column, (caption, pixels) in enumerate(panels):
            left = _GAP + column * (width + _GAP)
            draw.text((left + 2, top + 4), caption, fill=_INK, font=font)
            panel = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            picture.paste(panel, (left, top + _CAPTION))
    picture.save(path)
