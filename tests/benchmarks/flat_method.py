"""A Nerfstudio method that trains on any machine in no time: every pixel gets one learned colour.

Registered through ``NERFSTUDIO_METHOD_CONFIGS=flat=flat_method:flat`` it stands in for splatfacto,
which needs a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from nerfstudio.configs.base_config import ViewerConfig
from nerfstudio.data.datamanagers.full_images_datamanager import FullImageDatamanagerConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.models.base_model import Model, ModelConfig
from nerfstudio.pipelines.base_pipeline import VanillaPipelineConfig
from nerfstudio.plugins.types import MethodSpecification
from torchmetrics.functional.image import peak_signal_noise_ratio


@dataclass
class FlatModelConfig(ModelConfig):
    """Start colour."""

    _target: type = field(default_factory=lambda: FlatModel)
    start: float = 0.0
    memory_ends_at: int = -1
    """Image of training at which there is no more GPU memory."""


class FlatModel(Model):
    """One colour."""

    num_points = 7

    def populate_modules(self) -> None:
        self.colour = torch.nn.Parameter(torch.full((3,), self.config.start))
        self.drawn = 0

    def get_param_groups(self):
        return {"colour": [self.colour]}

    def state_dict(self, *args, **kwargs):
        print("a checkpoint is written")
        return super().state_dict(*args, **kwargs)

    def get_outputs(self, camera):
        if self.training:
            if self.drawn == self.config.memory_ends_at:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            self.drawn += 1
        shape = (int(camera.height.item()), int(camera.width.item()), 3)
        return {"rgb": self.colour.expand(shape), "background": torch.zeros(3)}

    @torch.no_grad()
    def get_outputs_for_camera(self, camera, obb_box=None):
        return self.get_outputs(camera)

    def get_gt_img(self, image):
        return image.float() / 255 if image.dtype == torch.uint8 else image

    def composite_with_background(self, image, background):
        return image

    def get_loss_dict(self, outputs, batch, metrics_dict=None):
        return {"loss": (outputs["rgb"] - self.get_gt_img(batch["image"])).square().mean()}

    def get_image_metrics_and_images(self, outputs, batch):
        psnr = peak_signal_noise_ratio(outputs["rgb"], self.get_gt_img(batch["image"]), 1.0)
        return {"psnr": float(psnr), "ssim": 0.5, "lpips": 0.1}, {}


flat = MethodSpecification(
    config=TrainerConfig(
        method_name="flat",
        pipeline=VanillaPipelineConfig(
            datamanager=FullImageDatamanagerConfig(dataparser=NerfstudioDataParserConfig()),
            model=FlatModelConfig(),
        ),
        optimizers={"colour": {"optimizer": AdamOptimizerConfig(lr=0.05), "scheduler": None}},
        viewer=ViewerConfig(),
        vis="viewer",
    ),
    description="one colour",
)
