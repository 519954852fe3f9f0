"""Nerfstudio's pipeline, with errors a user can read."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from nerfstudio.cameras.cameras import Cameras
from nerfstudio.engine.callbacks import (
    TrainingCallback,
    TrainingCallbackAttributes,
    TrainingCallbackLocation,
)
from nerfstudio.pipelines.base_pipeline import VanillaPipeline, VanillaPipelineConfig

from gsscale_nerfstudio import memory_plan, resuming
from gsscale_nerfstudio.budget_changes import BudgetChanges
from gsscale_nerfstudio.datamanager import GSScaleDatamanager
from gsscale_nerfstudio.errors import GSScaleError, readable_errors, warn
from gsscale_nerfstudio.model import GSScaleModel
from gsscale_nerfstudio.panel import Panel
from gsscale_nerfstudio.random_state import restore_random_state, torch_random_state
from gsscale_nerfstudio.view_order import SAMPLES


@dataclass
class GSScalePipelineConfig(VanillaPipelineConfig):
    """Pipeline of gsscale."""

    _target: type = field(default_factory=lambda: GSScalePipeline)


@dataclass(frozen=True)
class _Drawn:
    """What chance, or the order of images, has decided of a step.

    Attributes:
        camera, batch: see :meth:`.GSScaleDatamanager.next_train`.
        upcoming: cameras that come next.
        random: states of torch's generators afterwards.
    """

    camera: Cameras
    batch: dict[str, Any]
    upcoming: list[Cameras]
    random: dict[str, Any]


class GSScalePipeline(VanillaPipeline):
    """Tells the model which cameras come next, and the data manager where the rows are.

    Ends with a sentence where a scene, a setting or a checkpoint is wrong.
    """

    datamanager: GSScaleDatamanager
    model: GSScaleModel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with readable_errors():
            super().__init__(*args, **kwargs)
        # Not settled, and with the resident engine some are newer on the GPU: only the order of
        # views depends on them.
        self.datamanager.row_centres = lambda: self.model.engine.row_centres(SAMPLES)
        self._drawn: _Drawn | None = None
        self._again = False
        self._budget_changes = BudgetChanges(self.model.engine)
        self.panel = Panel(self.model, self._budget_changes)
        """For Nerfstudio's viewer, which looks for such elements."""

    def get_training_callbacks(
        self, training_callback_attributes: TrainingCallbackAttributes
    ) -> list[TrainingCallback]:
        return [
            *super().get_training_callbacks(training_callback_attributes),
            TrainingCallback(
                [TrainingCallbackLocation.BEFORE_TRAIN_ITERATION], self._budget_changes.apply
            ),
        ]

    def load_pipeline(self, loaded_state: dict[str, Any], step: int) -> None:
        with readable_errors():
            resuming.require_same_images(self.model, loaded_state)
            super().load_pipeline(loaded_state, step)

    def get_average_eval_image_metrics(self, *args: Any, **kwargs: Any) -> Any:
        """Means over all held-out images, which training does not ask for if there are none."""
        if len(self.datamanager.eval_dataset) == 0:
            with readable_errors():
                raise GSScaleError(
                    "there is nothing to evaluate, because no image is held out; train again with "
                    "some that are (--pipeline.datamanager.eval-list, or the data set's own split)"
                )
        # In training, errors are the trainer's to tell: it saves what it has first.
        training = bool(self.model.engine.optimizers)
        with nullcontext() if training else readable_errors():
            return super().get_average_eval_image_metrics(*args, **kwargs)

    def plan_memory(self) -> None:
        """Print what training will keep where; the host store then leaves room for the others.

        Raises:
            GSScaleError: it cannot work with the memory that there is.
        """
        given = memory_plan.measure(self.model, self.datamanager)
        plan = memory_plan.make_plan(given)
        memory_plan.show(plan, given.rows)
        if self.model.config.vram_budget_gb is not None and not self.model.engine.bounded:
            warn("--pipeline.model.vram-budget-gb has no effect, because there is no GPU")
        self._budget_changes.begin(plan, given)
        store = self.model.engine.store
        store.claims, store.beside_row = self.datamanager.image_bytes_to_come, plan.beside_row

    def tell_without_points(self) -> None:
        """Print where Gaussians begin, if the data set has no points and they were wanted."""
        config, points = self.model.config, self.datamanager.train_dataparser_outputs.metadata
        if config.random_init or "points3D_xyz" in points:
            return
        warn(
            "the data set has no 3D points that could be read, and training starts from "
            f"{config.num_random:,} random Gaussians; for better results give it points "
            "(nerfstudio-data: a .ply file that is there, as ply_file_path in transforms.json; "
            "blender-data: --ply-path)"
        )

    def resume_state(self) -> dict[str, Any]:
        """What exact resuming takes beside Nerfstudio's own entries of a checkpoint."""
        return {
            "engine": self.model.engine.resume_state(),
            "datamanager": self.datamanager.resume_state(),
            "strategy": self.model.config.strategy,
            "images": [str(file) for file in self.datamanager.train_dataset.image_filenames],
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`resume_state` gave, once all other entries are loaded."""
        self.model.engine.resume(state["engine"])
        self.datamanager.resume(state["datamanager"])
        resuming.tell_other_strategy(state.get("strategy"), self.model.config.strategy)
        held_out = self.datamanager.eval_dataset.image_filenames
        resuming.tell_held_out_images(state.get("images"), held_out)

    def get_train_loss_dict(self, step: int) -> Any:
        again, self._again = self._again, False
        if again and self._drawn is not None:
            restore_random_state(self._drawn.random, self.device)
        else:
            self._drawn = None  # or two images would be held
            self._drawn = self._draw(step)
        camera, batch = self._drawn.camera, self._drawn.batch
        self.model.upcoming = list(self._drawn.upcoming)
        outputs = self.model(camera)
        metrics = self.model.get_metrics_dict(outputs, batch)
        return outputs, self.model.get_loss_dict(outputs, batch, metrics), metrics

    def _draw(self, step: int) -> _Drawn:
        camera, batch = self.datamanager.next_train(step)
        upcoming = self.datamanager.upcoming(self.model.engine.look_ahead)
        cameras = [self.datamanager.train_camera(index) for index in upcoming]
        return _Drawn(camera, batch, cameras, torch_random_state(self.device))

    def draw_again(self) -> None:
        """Let the next step be one of the present image and the same random numbers."""
        self._again = True

    def put_back(self) -> None:
        """The present step will not be done: a later run begins with its image."""
        if self._drawn is not None:
            index = (self._drawn.camera.metadata or {})["cam_idx"]
            self.datamanager.train_unseen_cameras.insert(0, index)
            restore_random_state(self._drawn.random, self.device)

    def step_ended(self) -> None:
        """The present step will not be done again."""
        self._drawn = None
        self._again = False
