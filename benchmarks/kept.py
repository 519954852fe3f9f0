"""Held-out views of the evaluation that counts: the best one so far, in the end the last."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor


class KeptViews:
    """Truth and render of each view, in files: in memory they would count as the training's.

    What is made of them takes seconds a view: pictures wait until training is over, and FLIP and
    MS-SSIM are for an evaluation that counts.

    Args:
        folder: for the files, 24 bytes a pixel; it is made when the first view comes.
    """

    def __init__(self, folder: Path) -> None:
        self._present, self._kept = folder / "present", folder / "kept"

    def add(self, index: int, truth: Tensor, render: Tensor) -> None:
        """A view of the present evaluation.

        Args:
            index: of the held-out image.
            truth: [H, W, 3], in [0, 1].
            render: likewise.
        """
        self._present.mkdir(parents=True, exist_ok=True)
        pair = np.stack([image.detach().float().cpu().numpy() for image in (truth, render)])
        np.save(self._present / f"{index:06d}.npy", pair)

    def settle(self, counts: bool) -> None:
        """The present evaluation is over; if it counts, it replaces the one that did so far."""
        if not self._present.exists():
            return
        shutil.rmtree(self._kept if counts else self._present, ignore_errors=True)
        if counts:
            self._present.rename(self._kept)

    def __len__(self) -> int:
        return len(list(self._kept.glob("*.npy")))

    def __iter__(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Index, truth and render of those that count, [H, W, 3] float32."""
        for path in sorted(self._kept.glob("*.npy")):
            truth, render = np.load(path)
            yield int(path.stem), truth, render
