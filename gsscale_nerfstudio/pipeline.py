"""Nerfstudio's pipeline, with errors a user can read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nerfstudio.pipelines.base_pipeline import VanillaPipeline, VanillaPipelineConfig

from gsscale_nerfstudio.errors import readable_errors


@dataclass
class GSScalePipelineConfig(VanillaPipelineConfig):
    """Pipeline of gsscale."""

    _target: type = field(default_factory=lambda: GSScalePipeline)


class GSScalePipeline(VanillaPipeline):
    """Ends with a sentence where a scene, a setting or a checkpoint is wrong."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with readable_errors():
            super().__init__(*args, **kwargs)

    def load_pipeline(self, loaded_state: dict[str, Any], step: int) -> None:
        with readable_errors():
            super().load_pipeline(loaded_state, step)
