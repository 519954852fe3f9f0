"""``ns-render`` on gsscale runs: the next view is prepared ahead, and spirals can be rendered."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from nerfstudio.cameras.cameras import Cameras
from nerfstudio.pipelines.base_pipeline import Pipeline

from gsscale_nerfstudio.datamanager import GSScaleDatamanager
from gsscale_nerfstudio.pipeline import GSScalePipeline


def adapt_ns_render() -> None:
    """Let ``ns-render``, if that is what is running, tell the model the cameras of its path.

    Nerfstudio has no place for that, hence its function is wrapped, which for runs of other methods
    does what it did. Its spiral insists on data managers that it knows; ours becomes one of them.
    """
    # Whoever is about to render has imported it. We cannot, at the top: it imports all plugins.
    render: Any = sys.modules.get("nerfstudio.scripts.render")
    if render is None or hasattr(render._render_trajectory_video, "__wrapped__"):
        return
    render._render_trajectory_video = _with_path(render._render_trajectory_video)
    # Only the second argument of isinstance, which a tuple is as good for as a class.
    render.RandomCamerasDataManager = (render.RandomCamerasDataManager, GSScaleDatamanager)


def _with_path(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def render_trajectory(pipeline: Pipeline, cameras: Cameras, *args: Any, **kwargs: Any) -> None:
        if not isinstance(pipeline, GSScalePipeline):
            return original(pipeline, cameras, *args, **kwargs)
        # One after the other, because their size is changed before the first is rendered.
        pipeline.model.path = (cameras[i : i + 1] for i in range(1, len(cameras)))
        try:
            return original(pipeline, cameras, *args, **kwargs)
        finally:
            pipeline.model.path = iter(())

    return render_trajectory
