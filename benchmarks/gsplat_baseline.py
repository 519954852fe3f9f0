"""A strong GPU-only baseline: gsplat as its own trainer uses it, with what makes it fast.

All rows and their Adam state are on the GPU. ``packed=True`` keeps intermediate results of visible
rows only, L1 and SSIM are one fused loss, Adam is one fused kernel per group. Unlike splatfacto
there is no random background and no PSNR at every step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.fixed_rows import FixedScene
from benchmarks.step_methods import Mark, device_rows, truth_image
from gsscale_nerfstudio.cull import View


class GsplatTrainer:
    """One step of 3D Gaussian Splatting on ``gsplat.rasterization``.

    Args:
        config: splatfacto's trainer config: learning rates, the weight of SSIM.
        scene: rows and cameras.
        device: a CUDA device.

    Raises:
        RuntimeError: the fused loss can't be imported.
    """

    def __init__(self, config: Any, scene: FixedScene, device: torch.device) -> None:
        from gsplat import rasterization

        try:
            from gsscale_nerfstudio.loss import photometric_loss  # type: ignore[import-not-found,unused-ignore]
        except ImportError as error:
            raise RuntimeError(
                f"the baseline needs the fused loss of gsscale_nerfstudio.loss ({error}); install "
                "a version that has it"
            ) from error
        self._rasterization, self._loss = rasterization, photometric_loss
        self.device = device
        self.ssim_lambda = config.pipeline.model.ssim_lambda
        self.sh_degree = scene.rows.sh_degree
        self.params = device_rows(scene.rows, device)
        groups = [
            {"params": [param], "lr": config.optimizers[name]["optimizer"].lr}
            for name, param in self.params.items()
        ]
        self.optimizer = torch.optim.Adam(groups, eps=1e-15, fused=True)
        views = [View.from_camera(scene.cameras[i : i + 1]) for i in range(len(scene.cameras))]
        self._sizes = [(view.width, view.height) for view in views]
        self._viewmats = torch.stack([_float(view.viewmat) for view in views]).to(device)
        self._Ks = torch.stack([_float(view.K) for view in views]).to(device)
        self._truths: dict[tuple[int, int], Tensor] = {}
        self._visible = 0

    def step(self, view: int, upcoming: list[int], mark: Mark) -> None:
        mark()
        p = self.params
        self.optimizer.zero_grad(set_to_none=True)
        width, height = self._sizes[view]
        render, _, info = self._rasterization(
            means=p["means"],
            quats=p["quats"],
            scales=torch.exp(p["scales"]),
            opacities=torch.sigmoid(p["opacities"]).squeeze(-1),
            colors=torch.cat([p["features_dc"][:, None], p["features_rest"]], dim=1),
            viewmats=self._viewmats[view : view + 1],
            Ks=self._Ks[view : view + 1],
            width=width,
            height=height,
            near_plane=0.01,
            far_plane=1e10,
            sh_degree=self.sh_degree,
            packed=True,
            absgrad=True,
        )
        truth = truth_image(self._truths, height, width, self.device).float() / 255
        loss = self._loss(render[0], truth, self.ssim_lambda)
        mark()
        loss.backward()
        mark()
        self.optimizer.step()
        self._visible = len(info["gaussian_ids"])
        mark()

    def visible(self) -> int:
        return self._visible

    def counters(self) -> dict[str, float] | None:
        return None


def _float(array: Any) -> Tensor:
    return torch.from_numpy(array).float()
