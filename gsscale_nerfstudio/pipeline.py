"""Nerfstudio's pipeline, with errors a user can read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from nerfstudio.pipelines.base_pipeline import VanillaPipeline, VanillaPipelineConfig

from gsscale_nerfstudio.datamanager import GSScaleDatamanager
from gsscale_nerfstudio.errors import readable_errors
from gsscale_nerfstudio.model import GSScaleModel
from gsscale_nerfstudio.view_order import SAMPLES


@dataclass
class GSScalePipelineConfig(VanillaPipelineConfig):
    """Pipeline of gsscale."""

    _target: type = field(default_factory=lambda: GSScalePipeline)


class GSScalePipeline(VanillaPipeline):
    """Tells the model which cameras come next, and the data manager where the rows are.

    Ends with a sentence where a scene, a setting or a checkpoint is wrong.
    """

    datamanager: GSScaleDatamanager
    model: GSScaleModel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with readable_errors():
            super().__init__(*args, **kwargs)
        self.datamanager.row_centres = self._row_centres

    def _row_centres(self) -> np.ndarray:
        """[n, 3] float32, centres of at most :data:`SAMPLES` rows, evenly spaced in the store."""
        means = self.model.engine.store.column("means")
        # Not settled, some perhaps being stepped by a worker or written back by the GPU: only the
        # order of views depends on them.
        return means[:: max(1, -(-len(means) // SAMPLES))].numpy().copy()

    def load_pipeline(self, loaded_state: dict[str, Any], step: int) -> None:
        with readable_errors():
            super().load_pipeline(loaded_state, step)

    def get_train_loss_dict(self, step: int) -> Any:
        camera, batch = self.datamanager.next_train(step)
        upcoming = self.datamanager.upcoming(self.model.engine.look_ahead)
        self.model.upcoming = [self.datamanager.train_camera(index) for index in upcoming]
        outputs = self.model(camera)
        metrics = self.model.get_metrics_dict(outputs, batch)
        return outputs, self.model.get_loss_dict(outputs, batch, metrics), metrics
