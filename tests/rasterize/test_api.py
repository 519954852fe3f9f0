"""Dispatch to gsplat, with a stand-in for its kernels."""

from __future__ import annotations

from typing import Any

import gsplat.cuda._wrapper
import pytest
import torch

from gsscale_nerfstudio.rasterize import api, gradients, tile_lists
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

    def projection(means, covars, quats, scales, viewmats, Ks, width, height, **options):
        # Not those that the blur lowers: gsplat does that itself.
        assert not two_radii or options.pop("opacities") is tensors[3]
        asked["projection"] = {"covars": covars, "size": (width, height), **options}
        assert viewmats.shape == (1, 4, 4) and Ks.shape == (1, 3, 3)
        both = torch.stack([radii, radii // 2], -1) if two_radii else radii
        compensations = torch.full((1, 3), 0.5) if options["calc_compensations"] else None
        return both, means[None, :, :2] * 10, means[None, :, 2], quats[None, :, :3], compensations

    def lists(means2d, its_radii, depths, conics, opacities, *size: int):
        assert means2d.shape == (3, 2) and depths.shape == (3,) and conics.shape == (3, 3)
        asked["lists"] = {"radii": its_radii.shape, "size": size}
        asked["opacities"] = opacities
        return tile_lists.TileLists("offsets", "gaussians")

    def pixels(means2d, conics, channels, opacities, lists, width, height, **options):
        asked["pixels"] = {"lists": lists, **options, "opacities": opacities}
        assert torch.equal(channels[0, :, :3], colors)
        image = (means2d.sum() + conics.sum()) * torch.ones(1, height, width, channels.shape[-1])
        return image, image[..., :1] / 2

    monkeypatch.setattr(api, "PER_AXIS", two_radii)
    monkeypatch.setattr(gsplat.cuda._wrapper, "fully_fused_projection", projection)
    monkeypatch.setattr(gradients, "rasterize_pixels", pixels)
    monkeypatch.setattr(tile_lists, "tile_lists", lists)
    gaussians, view = scene(3).to(torch.float32).leaves(), camera(40, 50)
    *tensors, _ = gaussians
    colors = tensors[4]
    rendering = _rasterize_gsplat(
        *tensors,
        *view,
        depth=depth,
        absgrad=True,
        antialiased=antialiased,
        near=0.2,
        far=30.0,
        window=(0, 0, 40, 50),
    )

    opacities = asked["pixels"].pop("opacities")
    assert torch.equal(opacities[0], tensors[3] * (0.5 if antialiased else 1))
    assert torch.equal(asked.pop("opacities"), opacities[0])
    assert asked == {
        "projection": {
            "covars": None,
            "size": (40, 50),
            "near_plane": 0.2,
            "far_plane": 30.0,
            "calc_compensations": antialiased,
        },
        "lists": {"radii": (3, 2) if two_radii else (3,), "size": (40, 50)},
        "pixels": {"lists": ("offsets", "gaussians"), "absgrad": True},
    }
    assert rendering.rgb.shape == (50, 40, 3) and rendering.alpha.shape == (50, 40, 1)
    if depth:  # accumulated depth, divided by the accumulated opacity, half of it
        torch.testing.assert_close(rendering.depth, torch.full((50, 40, 1), 2.0))
    else:
        assert rendering.depth is None
    assert rendering.radii.tolist() == [3, 0, 9] and rendering.radii.dtype == torch.int32
    assert rendering.means2d.shape == (3, 2)

    rendering.rgb.sum().backward()
    node = rendering.means2d_node
    assert node.grad.shape == (1, 3, 2)  # retained
    node.absgrad = node.grad.abs() + 1  # what its backward does
    assert torch.equal(rendering.means2d_grad(), node.absgrad[0])


def test_the_cpu_never_reaches_gsplats_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gsplat.cuda._wrapper, "fully_fused_projection", None)
    assert draw(scene(30), camera(20, 15)).alpha.any()
