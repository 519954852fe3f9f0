"""``ns-render`` on gsscale runs: the next view is prepared ahead, and spirals can be rendered."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.pipelines.base_pipeline import Pipeline

from gsscale_nerfstudio.datamanager import GSScaleDatamanager
from gsscale_nerfstudio.errors import GSScaleError, readable_errors
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
            with readable_errors():
                # Only camera-path has that argument, None included. In a path between a data set's
                # fisheyes, pinholes are meant: that is what training has made of them.
                if "crop_data" in kwargs:
                    _require_pinholes(cameras)
                return original(pipeline, cameras, *args, **kwargs)
        finally:
            pipeline.model.path = iter(())

    return render_trajectory


def _require_pinholes(path: Cameras) -> None:
    """Refuse a path that asks for other pictures than are drawn.

    Raises:
        GSScaleError: names the type.
    """
    kind = CameraType(int(path.camera_type.flatten()[0]))
    if kind is not CameraType.PERSPECTIVE:
        raise GSScaleError(
            f"the camera path asks for pictures of type {kind.name}, and gsscale draws pinholes' "
            'only; choose Perspective in the viewer when you save the path, or write "camera_type"'
            ': "perspective" in its file'
        )
