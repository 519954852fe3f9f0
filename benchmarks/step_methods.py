"""One training step of splatfacto and of gsscale, on rows that were made up, as Nerfstudio does it.

What is left out of ``Trainer.train_iteration`` is the data manager's image cache, the strategies'
callbacks (no densification, no statistics for it) and the log.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.engine.optimizers import Optimizers
from torch import Tensor, nn

from benchmarks.fixed_rows import FixedRows, FixedScene
from gsscale_nerfstudio.engines import Engine

STEP = 30_000
"""What the models are told that the first step is: all SH bands, full resolution, densification
over."""

_SEEDS = 100
"""Points that a model is built from; they give way to our rows."""

Mark = Callable[[], None]


class Method(Protocol):
    """A way to train, ready for its first step. Views are indices of the scene's cameras."""

    def step(self, view: int, upcoming: list[int], mark: Mark) -> None:
        """Train on ``view``; the next calls will be for ``upcoming``.

        ``mark`` is called at the start, after the loss, after the backward pass and at the end.
        """

    def visible(self) -> int:
        """Rows that the last view saw: drawn ones, or those that the culler brought."""

    def counters(self) -> dict[str, float] | None:
        """What the method counts by itself, summed up so far."""


class NerfstudioMethod:
    """A model, its optimizers and a step of Nerfstudio's trainer.

    Args:
        config: trainer config, of splatfacto or gsscale.
        split: the training images' ``DataparserOutputs``.
        scene: rows and cameras.
        device: where to train.
    """

    def __init__(self, config: Any, split: Any, scene: FixedScene, device: torch.device) -> None:
        self.config = config
        self.cameras = scene.cameras
        self.device = device
        # As VanillaPipeline builds it.
        self.model = config.pipeline.model.setup(
            scene_box=split.scene_box,
            num_train_data=len(scene.cameras),
            metadata=split.metadata,
            device=device,
            grad_scaler=None,
            seed_points=tuple(
                split.metadata[name][:_SEEDS] for name in ("points3D_xyz", "points3D_rgb")
            ),
        )
        self.model.to(device)
        self._fill_before(scene.rows)
        self.optimizers = Optimizers(config.optimizers, self.model.get_param_groups())
        self._fill_after(scene.rows)
        self.model.train()
        self._scaler = torch.amp.GradScaler(device.type, enabled=False)
        self._truths: dict[tuple[int, int], Tensor] = {}
        self._step = STEP

    def _fill_before(self, rows: FixedRows) -> None:
        """Replace the rows, where the optimizers take the tensors that there are."""

    def _fill_after(self, rows: FixedRows) -> None:
        """Replace the rows, where optimizers come first."""

    def _camera(self, view: int) -> Cameras:
        """One camera as the data manager hands it out: cut out and moved to the device."""
        camera = self.cameras[view : view + 1].to(self.device)
        camera.metadata = {"cam_idx": view}
        return camera

    def _announce(self, upcoming: list[int]) -> None:
        """Tell the model which view comes next."""

    def step(self, view: int, upcoming: list[int], mark: Mark) -> None:
        mark()
        self.model.step = self._step
        self._announce(upcoming)
        self.optimizers.zero_grad_all()
        outputs = self.model.get_outputs(self._camera(view))
        height, width, _ = outputs["rgb"].shape
        batch = {"image": truth_image(self._truths, height, width, self.device)}
        metrics = self.model.get_metrics_dict(outputs, batch)
        losses = self.model.get_loss_dict(outputs, batch, metrics)
        loss = functools.reduce(torch.add, losses.values())
        mark()
        loss.backward()
        mark()
        self.optimizers.optimizer_scaler_step_all(self._scaler)  # type: ignore[arg-type]
        self.optimizers.scheduler_step_all(self._step)
        self._step += 1
        mark()


class Splatfacto(NerfstudioMethod):
    """Nerfstudio's own method: all rows and their optimizer state on the GPU."""

    def _fill_before(self, rows: FixedRows) -> None:
        self.model.gauss_params = nn.ParameterDict(device_rows(rows, self.device))

    def _fill_after(self, rows: FixedRows) -> None:
        # get_outputs hands this to the strategy, which only retains a gradient there.
        self.model.optimizers = self.optimizers.optimizers

    def visible(self) -> int:
        radii = self.model.info["radii"].reshape(self.model.num_points, -1)
        return int((radii > 0).all(dim=1).sum())

    def counters(self) -> dict[str, float] | None:
        return None


class GSScale(NerfstudioMethod):
    """Rows in host memory."""

    def _fill_after(self, rows: FixedRows) -> None:
        fill_store(self.model.engine, rows)
        # Its callbacks would take this from the trainer: metrics are made only for the log.
        self.model._steps_per_log = self.config.logging.steps_per_log
        self._cut: dict[int, Cameras] = {}

    def _camera(self, view: int) -> Cameras:
        """One camera as gsscale's data manager hands it out: on the CPU, cut out only once."""
        if view not in self._cut:
            self._cut[view] = self.cameras[view : view + 1]
            self._cut[view].metadata = {"cam_idx": view}
        return self._cut[view]

    def _announce(self, upcoming: list[int]) -> None:
        look_ahead = self.model.engine.look_ahead
        self.model.upcoming = [self._camera(view) for view in upcoming[:look_ahead]]

    def visible(self) -> int:
        return len(self.model.engine.current)

    def counters(self) -> dict[str, float] | None:
        counters = getattr(self.model.engine, "counters", None)
        return None if counters is None else {k: float(v) for k, v in counters.items()}


def fill_store(engine: Engine, rows: FixedRows) -> None:
    """Let an engine's rows be ``rows``, in Morton order."""
    engine.store.resize(0)
    for values in rows.chunks():
        engine.store.append(values, stamp=0)
    engine.store.sort()
    engine.rows_changed()


def device_rows(rows: FixedRows, device: torch.device) -> dict[str, nn.Parameter]:
    """All rows as parameters on the device, filled chunk by chunk."""
    groups = {
        name: torch.empty(rows.rows, *shape, device=device) for name, shape in rows.shapes.items()
    }
    first = 0
    for values in rows.chunks():
        end = first + len(values["means"])
        for name, group in groups.items():
            group[first:end] = values[name]
        first = end
    return {name: nn.Parameter(group) for name, group in groups.items()}


def truth_image(cache: dict[tuple[int, int], Tensor], h: int, w: int, device: Any) -> Tensor:
    """[h, w, 3] random uint8 on the device, one for all views of a size.

    What it shows doesn't change the time of a step, and a scene's own images would be in the way:
    how many of them are kept on the GPU is a setting of the data manager.
    """
    if (h, w) not in cache:
        cache[h, w] = torch.randint(0, 256, (h, w, 3), dtype=torch.uint8, device=device)
    return cache[h, w]
