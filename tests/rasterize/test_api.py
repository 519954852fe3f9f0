"""Dispatch to gsplat, with a stand-in for its kernels."""

from __future__ import annotations

from typing import Any

import gsplat.rendering
import pytest
import torch
from torch import Tensor

from gsscale_nerfstudio.rasterize.api import _rasterize_gsplat

from .scenes import camera, draw, scene


@pytest.mark.parametrize("two_radii", [False, True], ids=["gsplat 1.4", "gsplat 1.5"])
@pytest.mark.parametrize("depth", [False, True])
@pytest.mark.parametrize("antialiased", [False, True])
def test_what_gsplat_is_asked_and_how_its_answer_is_read(
    monkeypatch: pytest.MonkeyPatch, two_radii: bool, depth: bool, antialiased: bool
) -> None:
    asked: dict[str, Any] = {}
    radii = torch.tensor([[3, 0, 9]], dtype=torch.int32)

    def rasterization(**arguments: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        asked.update(arguments)
        means2d = arguments["means"][None, :, :2] * 10
        image = means2d.sum() * torch.ones(1, 5, 4, 4 if depth else 3)
        both = torch.stack([radii, radii // 2], -1)
        meta = {"means2d": means2d, "radii": both if two_radii else radii}
        return image, image[..., :1] / 2, meta

    monkeypatch.setattr(gsplat.rendering, "rasterization", rasterization)
    gaussians, view = scene(3, sh_degree=2).to(torch.float32).leaves(), camera(4, 5)
    *tensors, sh_degree = gaussians
    rendering = _rasterize_gsplat(
        *tensors,
        *view,
        sh_degree=sh_degree,
        depth=depth,
        absgrad=True,
        antialiased=antialiased,
        near=0.2,
        far=30.0,
    )

    for name, tensor in zip(
        ("means", "quats", "scales", "opacities", "colors"), tensors, strict=True
    ):
        assert asked.pop(name) is tensor
    assert asked.pop("viewmats").shape == (1, 4, 4) and asked.pop("Ks").shape == (1, 3, 3)
    assert asked == {
        "width": 4,
        "height": 5,
        "near_plane": 0.2,
        "far_plane": 30.0,
        "sh_degree": 2,
        "packed": False,
        "render_mode": "RGB+ED" if depth else "RGB",
        "absgrad": True,
        "rasterize_mode": "antialiased" if antialiased else "classic",
    }
    assert rendering.rgb.shape == (5, 4, 3) and rendering.alpha.shape == (5, 4, 1)
    assert rendering.depth.shape == (5, 4, 1) if depth else rendering.depth is None
    assert rendering.radii.tolist() == [3, 0, 9] and rendering.radii.dtype == torch.int32
    assert rendering.means2d.shape == (3, 2)

    rendering.rgb.sum().backward()
    node = rendering.means2d_node
    assert node.grad.shape == (1, 3, 2)  # retained
    node.absgrad = node.grad.abs() + 1  # what gsplat's backward does
    assert torch.equal(rendering.means2d_grad(), node.absgrad[0])


def test_the_cpu_never_reaches_gsplats_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gsplat.rendering, "rasterization", None)
    assert draw(scene(30), camera(20, 15)).alpha.any()
