"""What the demo runs: its command lines, and where each of them leaves its results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gsscale_nerfstudio.demo.commands import find_script


@dataclass(frozen=True)
class Size:
    """What a device manages in about two minutes.

    ``growth`` is the screen-space gradient from which Gaussians are split or duplicated: the lower,
    the more of them.
    """

    steps: int
    width: int
    height: int
    points: int
    growth: float


SIZES = {
    "cpu": Size(steps=1000, width=160, height=120, points=2500, growth=0.003),
    "cuda": Size(steps=3000, width=480, height=360, points=10_000, growth=0.0008),
}

# Every sixth image is held out: neighbours on the orbit remain on both sides of it.
EVAL_INTERVAL = 6


@dataclass(frozen=True)
class Plan:
    """One run: what is trained on, for how long and where the results go.

    Args:
        folder: Holds everything that the demo writes.
        name: Of this run; keeps the checkpoints of several runs apart.
        device: ``cpu`` or ``cuda``.
        steps: Optimizer steps, one image each.
        seed: Of the training.
    """

    folder: Path
    name: str
    device: str
    steps: int
    seed: int

    @property
    def scene(self) -> Path:
        """The data set."""
        return self.folder / "scene"

    @property
    def config(self) -> Path:
        """What ``ns-train`` leaves for the other commands to load."""
        return self.folder / "runs" / "village" / "gsscale" / self.name / "config.yml"

    @property
    def metrics(self) -> Path:
        """The means over the held-out views, JSON."""
        return self.folder / "metrics.json"

    @property
    def views(self) -> Path:
        """The renderings of the held-out views, one folder a run."""
        return self.config.parent / "views"

    @property
    def splat(self) -> Path:
        """The trained Gaussians as a PLY file."""
        return self.folder / "splat.ply"

    @property
    def environment(self) -> dict[str, str]:
        """Variables for the commands."""
        if self.device == "cuda":
            return {}
        return {
            # What makes ns-eval and ns-export, which have no flag for it, use the CPU.
            "CUDA_VISIBLE_DEVICES": "",
            # Tensors this small gain little from threads, but lose tenfold where other processes
            # or a container's quota take a core away: the threads then wait for each other.
            "OMP_NUM_THREADS": "1",
            # Compiling splatfacto's one small compiled function takes longer than it saves.
            "TORCHDYNAMO_DISABLE": "1",
        }

    def train(self) -> list[str]:
        """``ns-train``: splatfacto's schedule squeezed into ``steps``, and nothing but training."""
        flags: dict[str, object] = {
            "data": self.scene,
            "output-dir": self.folder / "runs",
            "experiment-name": "village",
            "timestamp": self.name,
            "machine.device-type": self.device,
            "machine.seed": self.seed,
            "vis": "tensorboard",
            "viewer.quit-on-train-completion": True,
            "logging.local-writer.max-log-size": 0,
            "max-num-iterations": self.steps,
            # Once, at the end.
            "steps-per-save": self.steps,
            "steps-per-eval-image": 0,
            "steps-per-eval-all-images": 0,
            "pipeline.model.num-downscales": 0,
            # Never: the village is matte, a colour is the same from everywhere.
            "pipeline.model.sh-degree-interval": self.steps,
            "pipeline.model.warmup-length": self.steps // 6,
            "pipeline.model.refine-every": max(1, self.steps // 12),
            "pipeline.model.stop-split-at": self.steps * 3 // 4,
            "pipeline.model.densify-grad-thresh": SIZES[self.device].growth,
            # By their error alone: in images this small everything is large on the screen.
            "pipeline.model.stop-screen-size-at": 0,
            # Never: recovering from a reset takes more steps than there are.
            "pipeline.model.reset-alpha-every": 1000,
            "pipeline.model.cull-alpha-thresh": 0.05,
        }
        words = [find_script("ns-train"), "gsscale"]
        for name, value in flags.items():
            words += [f"--{name}", str(value)]
        dataparser = ["nerfstudio-data", "--eval-mode", "interval"]
        return [*words, *dataparser, "--eval-interval", str(EVAL_INTERVAL)]

    def evaluate(self) -> list[str]:
        """``ns-eval``: metrics and pictures of the held-out views."""
        return [
            *(find_script("ns-eval"), "--load-config", str(self.config)),
            *("--output-path", str(self.metrics), "--render-output-path", str(self.views)),
        ]

    def export(self) -> list[str]:
        """``ns-export``: the Gaussians in the format that splat viewers read."""
        return [
            *(find_script("ns-export"), "gaussian-splat", "--load-config", str(self.config)),
            *("--output-dir", str(self.folder), "--output-filename", self.splat.name),
        ]

    def view(self) -> list[str]:
        """``ns-viewer``: not run, but offered to the user."""
        return [find_script("ns-viewer"), "--load-config", str(self.config)]
