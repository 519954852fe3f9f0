"""splatfacto with its Gaussians in host memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.engine.callbacks import (
    TrainingCallback,
    TrainingCallbackAttributes,
    TrainingCallbackLocation,
)
from nerfstudio.model_components import renderers
from nerfstudio.model_components.lib_bilagrid import BilateralGrid, total_variation_loss
from nerfstudio.models.splatfacto import SplatfactoModel
from nerfstudio.utils.colors import get_color
from nerfstudio.viewer.render_state_machine import RenderStateMachine
from nerfstudio.viewer_legacy.server import render_state_machine as legacy
from torch import Tensor
from torch.nn import Parameter
from torchmetrics.image import PeakSignalNoiseRatio

from gsscale_nerfstudio.cull import View, world_to_camera
from gsscale_nerfstudio.densify import RowMCMCStrategy, make_strategy
from gsscale_nerfstudio.densify.statistics import screen_statistics
from gsscale_nerfstudio.engines import (
    HostEngine,
    Part,
    ViewInParts,
    Viewpoint,
    WorkingSet,
    make_engine,
)
from gsscale_nerfstudio.errors import GSScaleError, warn
from gsscale_nerfstudio.loss import photometric_loss
from gsscale_nerfstudio.metrics import ImageMetrics
from gsscale_nerfstudio.model_config import GSScaleModelConfig
from gsscale_nerfstudio.monitor import Monitor
from gsscale_nerfstudio.out_of_memory import (
    is_out_of_memory,
    no_room_left,
    no_room_to_densify,
    retried,
)
from gsscale_nerfstudio.parts import Picture, draw_in_parts, draw_windows
from gsscale_nerfstudio.rasterize import Rendering, rasterize
from gsscale_nerfstudio.regularization import penalties, term_names
from gsscale_nerfstudio.seeding import seed_rows
from gsscale_nerfstudio.store import GROUPS, HostStore, RowLayout
from gsscale_nerfstudio.store.gauss_params import GaussParams
from gsscale_nerfstudio.supported import refuse_unsupported


class GSScaleModel(SplatfactoModel):
    """``SplatfactoModel`` whose Gaussians are rows of a host store, brought to the device per view.

    Args:
        config: splatfacto's configuration and gsscale's additions.
        seed_points: xyz [n, 3] and rgb [n, 3] of the sparse point cloud.
    """

    config: GSScaleModelConfig
    engine: HostEngine

    def populate_modules(self) -> None:
        config = self.config
        self.strategy = make_strategy(config, self.num_train_data)  # refuses what cannot be
        layout = RowLayout(config.sh_degree, getattr(torch, config.moment_dtype))
        store = HostStore(layout, config.max_gaussians)
        seed_rows(store, config, self.seed_points)
        self.seed_points = None
        self.upcoming: list[Cameras] = []
        """Cameras that will be trained next, as far as known: [1] each, on the CPU. Set it before
        each training step."""
        self.path: Iterator[Cameras] = iter(())
        """Cameras that will be rendered after the next one, as far as known: [1] each. A render
        takes one, and has it prepared meanwhile."""
        self._views: dict[tuple[int, int], View] = {}
        self._steps_per_log = 1
        self._penalties_in_parts: Tensor | None = None
        self._told_of_grey = False
        self.engine = make_engine(config.engine, store, config.vram_budget_gb)
        if isinstance(self.strategy, RowMCMCStrategy):
            self.engine.noise = self.strategy.noise
            self.engine.pull = self.strategy.pull
        self._monitor = Monitor(self.engine)
        self.shown_rows: int | None = None
        """Gaussians that the last rendered view may see; None if none was rendered."""
        self.gauss_params = GaussParams(  # type: ignore[assignment]
            store,
            settle=lambda: self.engine.settle(),
            replaced=lambda: self.engine.restart(0),
            leaves=self.engine.leaves,
        )
        self.camera_optimizer = config.camera_optimizer.setup(
            num_cameras=self.num_train_data, device="cpu"
        )
        self.psnr = PeakSignalNoiseRatio(data_range=1.0)  # of training images
        self.image_metrics = ImageMetrics()
        self.step = 0
        self.crop_box = None
        if config.background_color == "random":
            # viser's background: what a viewer shows where there is no scene.
            self.background_color = torch.tensor([0.1490, 0.1647, 0.2157])
        else:
            self.background_color = get_color(config.background_color)
        if config.use_bilateral_grid:
            grid_x, grid_y, grid_w = config.grid_shape
            self.bil_grids = BilateralGrid(
                num=self.num_train_data, grid_X=grid_x, grid_Y=grid_y, grid_W=grid_w
            )

    def _apply(self, fn: Any, recurse: bool = True) -> GSScaleModel:
        super()._apply(fn, recurse)
        # The rows stay where they are; only the engine's idea of the rasterizer's device follows.
        if self.device != self.engine.device:
            self.engine.move_to(self.device)
        return self

    @property
    def num_points(self) -> int:
        return len(self.engine.store)

    # -- training --------------------------------------------------------------------------------

    def get_gaussian_param_groups(self) -> dict[str, list[Parameter]]:
        return self.engine.parameters()

    def get_param_groups(self) -> dict[str, list[Parameter]]:
        """All groups; optimizers are stepped in this order.

        The Gaussians' come last: their step is the one that cannot be taken back, should memory run
        out in the step of another.
        """
        groups = super().get_param_groups()
        rows = {name: groups.pop(name) for name in GROUPS}
        return {**groups, **rows}

    def get_training_callbacks(
        self, training_callback_attributes: TrainingCallbackAttributes
    ) -> list[TrainingCallback]:
        optimizers = training_callback_attributes.optimizers
        trainer = training_callback_attributes.trainer
        assert optimizers is not None and trainer is not None
        refuse_unsupported(optimizers, trainer)
        self._steps_per_log = trainer.config.logging.steps_per_log
        return [
            TrainingCallback(
                [TrainingCallbackLocation.BEFORE_TRAIN_ITERATION], self.step_cb, args=[optimizers]
            ),
            TrainingCallback(
                [TrainingCallbackLocation.AFTER_TRAIN_ITERATION], self.step_post_backward
            ),
        ]

    def step_post_backward(self, step: int) -> None:
        assert step == self.step
        try:
            self.strategy.refine(self.engine, step)
        except RuntimeError as error:  # Nerfstudio calls this outside of the step that is retried
            if not is_out_of_memory(error):
                raise
            raise no_room_to_densify(error) from error

    def load_state_dict(self, dict: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        self.step = 30000  # as splatfacto: all SH bands and the full resolution
        if "means" in dict:
            for name in GROUPS:  # checkpoints from before splatfacto's gauss_params
                dict[f"gauss_params.{name}"] = dict[name]
        # splatfacto's checkpoints carry the LPIPS network.
        dict = {k: v for k, v in dict.items() if not k.startswith("lpips.")}
        return super(SplatfactoModel, self).load_state_dict(dict, **kwargs)

    # -- rendering -------------------------------------------------------------------------------

    def get_outputs(self, camera: Any) -> dict[str, Any]:
        """Render one camera from the rows it sees.

        Args:
            camera: one camera; in training the camera optimizer's correction is applied.

        Returns:
            rgb [H, W, 3], depth [H, W, 1] or None, accumulation [H, W, 1], background.

        Raises:
            GSScaleError: a camera that cannot be rendered, or a view that needs more GPU memory
                than there is. Nerfstudio's viewer gets a grey picture in its place.
            torch.OutOfMemoryError: the same in training, where something may still be given up.
        """
        if not isinstance(camera, Cameras):
            print("Called get_outputs with not a camera")
            return {}
        if self.training:  # the trainer knows what to do when memory runs out
            return self._outputs(camera)
        following = next(self.path, None)
        try:
            return self._with_room(camera, following)
        except GSScaleError as error:
            if not _in_viewer():
                raise
            return self._grey(camera, error)

    def _with_room(self, camera: Cameras, following: Cameras | None) -> dict[str, Any]:
        """What is rendered, which only reads, with less in GPU memory if that runs out.

        Nerfstudio renders between steps: its viewer's thread has to wait for the step under way.
        """

        def make_room(said: str, tries: int) -> None:
            # A picture does not cost training its cache, or views in one piece, as long as smaller
            # windows of it may do; one for the viewer never does.
            if self.engine.optimizers:
                if self.engine.show_less(View.from_camera(camera), tries):
                    return
                if _in_viewer():
                    height, width = self.last_size
                    raise GSScaleError(
                        f"the GPU's memory does not hold a picture of {width} x {height} pixels "
                        f"beside training ({said}); lower Max Res in the viewer, or "
                        "--pipeline.model.vram-budget-gb, which the panel can change"
                    )
            if not self.engine.make_room(said, tries):
                raise no_room_left(said, self.num_points, self.last_size)

        return retried(lambda: self._outputs(camera, following), make_room)

    def _grey(self, camera: Cameras, error: GSScaleError) -> dict[str, Any]:
        """What the viewer shows when it cannot be given a picture. An error would end its thread,
        and with it all pictures to come."""
        if not self._told_of_grey:
            self._told_of_grey = True
            warn(f"the viewer shows grey: {error}.")
        # On the CPU: it may be the GPU that has no room.
        size = int(camera.width.item()), int(camera.height.item())
        outputs = self.get_empty_outputs(*size, torch.full((3,), 0.5))
        return {**outputs, "background": outputs["rgb"]}

    def _outputs(self, camera: Cameras, following: Cameras | None = None) -> dict[str, Any]:
        """See :meth:`get_outputs`; outside of training ``following`` may be rendered next."""
        if self.training:
            view, viewmat = self._training_view(camera)
            self.last_size = (view.height, view.width)
            working = self.engine.begin(view, self._viewpoint(view, viewmat))
            self._announce_upcoming()
            rendering = self._draw_to_train(working, view, viewmat)
        else:
            view = View.from_camera(camera)
            self.last_size = (view.height, view.width)
            rendering = self._draw_to_show(view, following)

        background = self._get_background_color()
        rgb = torch.clamp(rendering.rgb + (1 - rendering.alpha) * background, 0.0, 1.0)
        if self.config.use_bilateral_grid and self.training:
            metadata = camera.metadata
            if metadata is not None and "cam_idx" in metadata:
                rgb = self._apply_bilateral_grid(
                    rgb[None], metadata["cam_idx"], view.height, view.width
                ).squeeze(0)
        depth_image = rendering.depth
        if depth_image is not None:
            farthest = depth_image.detach().max()
            depth_image = torch.where(rendering.alpha > 0, depth_image, farthest)
        if not self.training:
            background = background.expand(view.height, view.width, 3)
        return {
            "rgb": rgb,
            "depth": depth_image,
            "accumulation": rendering.alpha,
            "background": background,
        }

    def _draw_to_train(
        self, working: WorkingSet | ViewInParts, view: View, viewmat: Tensor
    ) -> Rendering | Picture:
        """Draw a begun view, and have densification's statistics of it taken while it grows."""
        with_statistics = self.strategy.wants_statistics(self.step)
        self._penalties_in_parts = None
        if isinstance(working, ViewInParts):
            picture = draw_in_parts(working, view, viewmat, self, with_statistics)
            self._penalties_in_parts = picture.penalties
            return picture
        rendering = self.draw(working, view, viewmat)
        if with_statistics:
            working.statistics = lambda: screen_statistics(
                rendering.means2d_grad(), rendering.radii, view
            )
        return rendering

    def _draw_to_show(self, view: View, following: Cameras | None) -> Rendering | Picture:
        viewmat = view.on(self.device).viewmat

        shown = 0

        def draw(part: View) -> Rendering:
            nonlocal shown
            working = self.engine.fetch(part, self._viewpoint(part, viewmat))
            shown += len(working)
            if part is view and following is not None:  # after a view in parts comes another one
                self.engine.announce_fetch(View.from_camera(following))
            return self.draw(working, part, viewmat)

        windows = self.engine.windows(view)
        if len(windows) == 1:
            picture: Rendering | Picture = draw(view)
        else:
            picture = draw_windows(windows, (view.width, view.height), draw)
        self.shown_rows = shown
        return picture

    def _get_background_color(self) -> Tensor:
        # What ns-render asks of a crop box, and splatfacto does not hear.
        asked = renderers.BACKGROUND_COLOR_OVERRIDE
        if asked is not None and not self.training:
            return asked.to(self.device)
        return super()._get_background_color()

    def draw_part(
        self, part: Part, viewmat: Tensor, training: bool
    ) -> tuple[WorkingSet, Rendering]:
        """Bring the rows of a part of the view that is being trained, and draw its window."""
        whole = self.engine.current
        assert isinstance(whole, ViewInParts)
        viewpoint = self._viewpoint(part.view, viewmat)
        working = self.engine.bring_part(whole, part, viewpoint, training)
        return working, self.draw(working, part.view, viewmat)

    def _training_view(self, camera: Cameras) -> tuple[View, Tensor]:
        """The view of a training camera, and its pose with the camera optimizer's gradient."""
        if self.camera_optimizer.config.mode == "off":
            view = self._fixed_view(camera, self.step)
            return view, view.on(self.device).viewmat
        pose = self.camera_optimizer.apply_to_camera(camera)
        view = View.from_camera(camera, pose, downscale=self._downscale_at(self.step))
        return view, world_to_camera(pose[0]).to(self.device)

    def _viewpoint(self, view: View, viewmat: Tensor) -> Viewpoint:
        """From where, and with how many SH bands, colours are seen at the present step."""
        position = view.on(self.device).camera_position
        if viewmat.requires_grad:
            position = torch.linalg.inv_ex(viewmat)[0][:3, 3]
        degree = min(self.step // self.config.sh_degree_interval, self.config.sh_degree)
        return Viewpoint(position, degree)

    def _fixed_view(self, camera: Cameras, step: int) -> View:
        """The view of a camera whose pose nobody optimizes; made once, since it takes a while."""
        downscale = self._downscale_at(step)
        index = (camera.metadata or {}).get("cam_idx")
        if index is None:
            return View.from_camera(camera, downscale=downscale)
        key = (index, downscale)
        if key not in self._views:
            self._views[key] = View.from_camera(camera, downscale=downscale)
        return self._views[key]

    def _downscale_at(self, step: int) -> int:
        """How many times smaller training images are at a step (splatfacto's schedule)."""
        return 2 ** max(self.config.num_downscales - step // self.config.resolution_schedule, 0)

    def _announce_upcoming(self) -> None:
        """Let the engine prepare the next view, if it is known and will find the same rows."""
        cameras, self.upcoming = self.upcoming, []
        if (
            cameras
            and self.camera_optimizer.config.mode == "off"
            and not self.strategy.changes_rows(self.step)
        ):
            self.engine.announce([self._fixed_view(camera, self.step + 1) for camera in cameras])

    def draw(self, working: WorkingSet, view: View, viewmat: Tensor) -> Rendering:
        """Activate a working set's attributes and rasterize them, cropped outside of training.

        Args:
            working: rows on the device.
            view: camera; its pose is taken from ``viewmat``, which may carry a gradient.
            viewmat: [4, 4] world to camera, OpenCV axes.
        """
        leaves, colors = working.leaves, working.colors.values
        if self.crop_box is not None and not self.training:
            inside = self.crop_box.within(leaves["means"]).squeeze(-1)
            leaves = {name: leaf[inside] for name, leaf in leaves.items()}
            colors = colors[inside]
        if self.config.sh_degree == 0:
            colors = torch.sigmoid(colors)
        return rasterize(
            leaves["means"],
            leaves["quats"],
            torch.exp(leaves["scales"]),
            torch.sigmoid(leaves["opacities"]).squeeze(-1),
            colors,
            viewmat,
            view.on(self.device).K,
            view.width,
            view.height,
            depth=self.config.output_depth_during_training or not self.training,
            absgrad=self.strategy.absgrad and self.training,
            antialiased=self.config.rasterize_mode == "antialiased",
            near=view.near,
            far=view.far,
            window=view.window,
        )

    # -- losses and metrics ----------------------------------------------------------------------

    def get_metrics_dict(self, outputs: Any, batch: Any) -> dict[str, Any]:
        """splatfacto's metrics; in training only at steps whose metrics the trainer logs.

        Then those of :class:`.Monitor` come with them, as ``gsscale/NAME``.
        """
        if self.training and self.step % self._steps_per_log != 0:
            return {}
        # torchmetrics remembers its last result, and with it would the whole graph be held.
        outputs = {k: v.detach() if isinstance(v, Tensor) else v for k, v in outputs.items()}
        metrics: dict[str, Any] = super().get_metrics_dict(outputs, batch)
        if self.training:
            metrics |= {f"gsscale/{name}": value for name, value in self._monitor.ask().items()}
        return metrics

    def get_loss_dict(
        self, outputs: Any, batch: Any, metrics_dict: Any = None
    ) -> dict[str, Tensor]:
        config = self.config
        truth = self.composite_with_background(
            self.get_gt_img(batch["image"]), outputs["background"]
        )
        render = outputs["rgb"]
        if "mask" in batch:
            mask = self._downscale_if_required(batch["mask"]).to(self.device)
            truth, render = truth * mask, render * mask
        losses = {
            "main_loss": photometric_loss(render, truth, config.ssim_lambda),
            **self._penalties_of_the_view(),
        }
        if self.training:
            self.camera_optimizer.get_loss_dict(losses)
            if config.use_bilateral_grid:
                losses["tv_loss"] = 10 * total_variation_loss(self.bil_grids.grids)
        return losses

    def _penalties_of_the_view(self) -> dict[str, Tensor]:
        """Regularizations, on the rows of the view."""
        working, names = self.engine.current, term_names(self.config)
        values, self._penalties_in_parts = self._penalties_in_parts, None
        if isinstance(working, WorkingSet):
            values = self.penalties(working.leaves)
        elif values is None:
            values = torch.zeros(len(names), device=self.device)
        return dict(zip(names, values.unbind(), strict=True))

    def penalties(self, leaves: Mapping[str, Tensor]) -> Tensor:
        """See :func:`.regularization.penalties`."""
        return penalties(self.config, self.step, max(1, self.num_points), leaves)

    def get_image_metrics_and_images(
        self, outputs: dict[str, Tensor], batch: dict[str, Tensor]
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Metrics of a render, and truth and render side by side; see :class:`.ImageMetrics`."""
        cuda = self.device.type == "cuda"
        kept = torch.cuda.memory_reserved(self.device) if cuda else 0

        def compute(device: torch.device) -> tuple[dict[str, float], dict[str, Tensor]]:
            image, render, background = (
                t.to(device) for t in (batch["image"], outputs["rgb"], outputs["background"])
            )
            if image.dtype == torch.uint8:
                image = image.float() / 255  # as get_gt_img(), which takes it to the GPU
            truth = self.composite_with_background(self._downscale_if_required(image), background)
            corrected = self.config.color_corrected_metrics
            metrics = self.image_metrics.compare(truth, render, corrected)
            return metrics, {"img": torch.cat([truth, render], dim=1)}

        computed = self.image_metrics.with_room(compute, self.device, self.engine.give_back)
        if cuda and torch.cuda.memory_reserved(self.device) > kept:
            self.engine.give_back()  # or it would count as what views need
        return computed


def _in_viewer() -> bool:
    """Whether it is a thread of Nerfstudio's viewer that asks."""
    return isinstance(threading.current_thread(), (RenderStateMachine, legacy.RenderStateMachine))
