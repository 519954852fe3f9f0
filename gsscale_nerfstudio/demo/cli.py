"""``gsscale-demo``: makes a village, trains on it and shows how well unseen views came out."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from nerfstudio.utils.rich_utils import CONSOLE
from rich.table import Table

from gsscale_nerfstudio.demo.commands import run, say, shell_line
from gsscale_nerfstudio.demo.picture import read_views, write_picture
from gsscale_nerfstudio.demo.plan import EVAL_INTERVAL, SIZES, Plan
from gsscale_nerfstudio.demo.ply import count_points
from gsscale_nerfstudio.demo.scene import write_scene
from gsscale_nerfstudio.errors import GSScaleError, readable_errors

# Nerfstudio's training log: the step and its share of all.
_STEP = re.compile(r"^(\d+) \(\d+\.\d+%\)")
_REPORTS = 6


@dataclass
class Demo:
    """Train gsscale on a small made-up village and look at views that it has not seen.

    Runs ns-train, ns-eval and ns-export as you would run them on your own data, and prints their
    command lines. Takes about three minutes on two CPU cores.
    """

    output_dir: Path = Path("demo")
    """Folder for everything that the demo writes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What to train on; auto takes a GPU if there is one."""
    steps: int | None = None
    """Training steps, one image each. Default: 1000 on the CPU, 3000 on a GPU."""
    image_size: tuple[int, int] | None = None
    """Width and height of the images. Default: 160 120 on the CPU, 480 360 on a GPU."""
    images: int = 40
    """Number of images; every sixth is held out for evaluation."""
    points: int | None = None
    """Number of sparse points that the Gaussians start from. Default: 2500, on a GPU 10000."""
    seed: int = 0
    """Varies the village and the training."""

    def main(self) -> None:
        """Run the demo."""
        start = time.monotonic()
        plan = self._plan()
        size = SIZES[plan.device]
        width, height = self.image_size or (size.width, size.height)
        points = size.points if self.points is None else self.points
        say(f"Making {self.images} images of {width} x {height} of a village in {plan.scene}")
        try:
            write_scene(plan.scene, self.images, width, height, points, seed=self.seed)
        except OSError as error:
            raise GSScaleError(
                f"could not write the scene: {error}; choose another --output-dir."
            ) from error
        logs = plan.folder / "logs"
        train_seconds = run(
            plan.train(), plan.environment, logs / "train.log", _Progress(plan.steps)
        )
        run(plan.evaluate(), plan.environment, logs / "eval.log")
        run(plan.export(), plan.environment, logs / "export.log")
        self._report(plan, points, train_seconds, start)

    def _plan(self) -> Plan:
        """Fill in what was left to us, and refuse what cannot work."""
        available = torch.cuda.is_available()
        if self.device == "cuda" and not available:
            raise GSScaleError("there is no usable GPU: use --device cpu.")
        if self.images <= EVAL_INTERVAL:
            raise GSScaleError(f"--images {self.images} is too few: use more than {EVAL_INTERVAL}.")
        device = "cuda" if available and self.device != "cpu" else "cpu"
        chosen = [self.steps, self.points, *(self.image_size or ())]
        if any(number is not None and number < 1 for number in chosen):
            raise GSScaleError("--steps, --points and --image-size must be positive.")
        return Plan(
            folder=self.output_dir,
            name=datetime.now().strftime("%Y-%m-%d_%H%M%S"),
            device=device,
            steps=SIZES[device].steps if self.steps is None else self.steps,
            seed=self.seed,
        )

    def _report(self, plan: Plan, points: int, train_seconds: float, start: float) -> None:
        """Write the picture and print the numbers and what to look at."""
        views = read_views(plan.views)
        picture = plan.folder / "views.png"
        write_picture(picture, views)
        results = json.loads(plan.metrics.read_text(encoding="utf-8"))["results"]
        constant = float(np.mean([view.constant_psnr for view in views]))
        table = Table(title=f"{len(views)} held-out views", show_header=False)
        table.add_row("PSNR", f"{results['psnr']:.2f} dB")
        table.add_row("PSNR of the best one-colour images", f"{constant:.2f} dB")
        table.add_row("SSIM", f"{results['ssim']:.3f}")
        table.add_row("Gaussians", f"{points:,} -> {count_points(plan.splat):,}")
        table.add_row("training steps", f"{plan.steps:,} on {plan.device}")
        table.add_row("training time, with start-up", f"{train_seconds:.0f} s")
        table.add_row("time in all", f"{time.monotonic() - start:.0f} s")
        CONSOLE.print("", table)
        say(f"Truth, rendering, error: {picture}")
        say(f"Gaussians:               {plan.splat} (drop it on https://superspl.at/editor)")
        say(f"Viewer:                  {shell_line(plan.view(), plan.environment)}")


class _Progress:
    """Turns Nerfstudio's log, a line every few steps, into a handful of lines."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._start = time.monotonic()
        self._reported = 0

    def __call__(self, line: str) -> None:
        match = _STEP.match(line)
        if match is None:
            return
        step = int(match.group(1))
        if step * _REPORTS // self._steps > self._reported:
            self._reported = step * _REPORTS // self._steps
            say(f"  step {step} of {self._steps}, {time.monotonic() - self._start:.0f} s")


def entrypoint() -> None:
    """The console script."""
    with readable_errors():
        tyro.cli(Demo).main()


if __name__ == "__main__":
    entrypoint()
