"""A training of gsscale on made-up rows over a scene, set up in this process.

The rows are those of ``step.py``, and so are the views: the scene's cameras over every tile, each
with its own image.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.plan import PlanError
from benchmarks.scene import dataparser_arguments
from benchmarks.sharing import SharedGpu

if TYPE_CHECKING:
    from benchmarks.fixed_rows import FixedScene


@dataclass
class MadeUpArgs(SharedGpu):
    """What to train."""

    scene: Path
    """Folder with a transforms.json or with a COLMAP model in sparse/0; it needs a point cloud."""
    rows: float
    """Number of Gaussians: 1e8."""
    visible: float = 0.05
    """Share of them that a view sees on average, at most."""
    engine: str = "auto"
    """Engine of gsscale."""
    seed: int = 42
    """Seed of rows and training."""
    overrides: tuple[str, ...] = ()
    """Settings as ns-train names them: NAME=VALUE."""
    dataparser_overrides: tuple[str, ...] = ()
    """Settings of the dataparser: eval-interval=4."""
    output: Path | None = None
    """File to write. Default: docs/results/KIND-SCENE-ROWS-DATE.json."""
    commit: str | None = None
    """What is measured, where git can't tell. Default: $GSSCALE_COMMIT, then git."""

    def check(self) -> None:
        """Raise on arguments that would only fail minutes later."""
        if self.rows < 1:
            raise PlanError("--rows must be at least 1")
        self.check_sharing()
        if self.output is not None and self.output.exists():
            raise PlanError(f"{self.output} exists: name another --output")
        dataparser_arguments(self.scene, list(self.dataparser_overrides))

    def own_settings(self) -> list[str]:
        """Settings of this benchmark."""
        return []

    def settings(self) -> list[str]:
        """All settings: full resolution, all SH bands, the budget, ours, then the user's."""
        model = "pipeline.model"
        common = [f"{model}.num-downscales=0", f"{model}.sh-degree-interval=1"]
        if self.cap_gb is not None:
            common.append(f"{model}.vram-budget-gb={self.cap_gb}")
        return [*common, *self.own_settings(), *self.overrides]

    def command(self, script: str, *own: object) -> str:
        """The call to do the same again; folders of this machine are left out."""
        words = ["python", f"benchmarks/{script}", "--scene", self.scene.resolve().name]
        words += ["--rows", f"{self.rows:g}", "--visible", str(self.visible), *map(str, own)]
        words += ["--engine", self.engine, "--seed", str(self.seed)]
        words += self.sharing_words(recorded=True)
        words += ["--overrides", *self.overrides] if self.overrides else []
        if self.dataparser_overrides:
            words += ["--dataparser-overrides", *self.dataparser_overrides]
        return shlex.join(words)


class Stopwatch:
    """Seconds by what they went into."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def over(self, name: str) -> Iterator[None]:
        """Add what happens inside."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, timed."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.over(name):
                return function(*args, **kwargs)

        return call


def make_trainer(args: MadeUpArgs, steps: int, work: Path) -> Any:
    """Cap the GPU's memory, and build Nerfstudio's trainer with its files in ``work``."""
    from nerfstudio.scripts import train as ns_train

    from benchmarks import ns_config
    from benchmarks.memory_cap import cap_gpu_memory
    from benchmarks.offline import ensure_lpips_backbone

    if args.cap_gb is not None:
        cap_gpu_memory(args.cap_gb, args.cuda_gb)
    config = ns_config.parse(
        ns_config.train_arguments(
            method="gsscale",
            scene=args.scene,
            steps=steps,
            seed=args.seed,
            engine=args.engine,
            overrides=args.settings(),
            dataparser_overrides=list(args.dataparser_overrides),
            output_dir=work,
        )
    )
    config.save_config()
    ensure_lpips_backbone(work)
    ns_train._set_random_seed(args.seed)
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    return trainer


def make_up(trainer: Any, args: MadeUpArgs, watch: Stopwatch) -> FixedScene:
    """Give a trainer, before its first step, the rows, and the flight over them."""
    from benchmarks import fixed_rows, flight
    from benchmarks.step_methods import fill_store

    model, data = trainer.pipeline.model, trainer.pipeline.datamanager
    if model.camera_optimizer.config.mode != "off" or model.config.use_bilateral_grid:
        raise PlanError(
            "poses and bilateral grids are those of the scene's images, and there are more views; "
            "leave camera-optimizer.mode and use-bilateral-grid out"
        )
    with watch.over("reading images"):
        split = flight.images_in_memory(data)
    with watch.over("making rows"):
        degree = model.config.sh_degree
        scene = fixed_rows.fit(split, int(args.rows), args.visible, args.seed, degree)
        fill_store(model.engine, scene.rows)
    flight.fly_over(data, split, scene.cameras)
    return scene


def close_writers() -> None:
    """Let go of TensorBoard's file, which Nerfstudio keeps open as long as the process lives."""
    from nerfstudio.utils import writer

    for each in writer.EVENT_WRITERS:
        if isinstance(each, writer.TensorboardWriter):
            each.tb_writer.close()
    writer.EVENT_WRITERS.clear()
