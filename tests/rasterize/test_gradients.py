"""The rasterizer's backward kernel against the reference's float64."""

from __future__ import annotations

import gsplat
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from gsscale_nerfstudio.rasterize import gradients
from gsscale_nerfstudio.rasterize.compositing import composite
from gsscale_nerfstudio.rasterize.gradients import CHUNK, pixel_gradients, rasterize_pixels
from gsscale_nerfstudio.rasterize.tile_lists import tile_lists

from .test_compositing import splats

# The interpreter computes with numpy, which tells of every NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NAMES = ("means2d", "conics", "colors", "opacities", "absolute")


def derivatives(image: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(image.shape, generator=generator, dtype=torch.float64)


def check(
    n: int,
    width: int,
    height: int,
    *,
    absgrad: bool = True,
    clamp: float | None = None,
    **options: object,
) -> dict[str, Tensor]:
    """Assert equality to float32's rounding; returns the kernel's results."""
    *tensors, depths, radii = splats(n, width, height, **options)  # type: ignore[arg-type]
    given = [tensor.float() for tensor in tensors]
    if clamp is not None:
        given[3].clamp_(min=clamp)
    leaves = [tensor.double().requires_grad_() for tensor in given]
    image, alpha = composite(*leaves, depths, radii, width, height, absgrad=absgrad)
    v_image, v_alpha = derivatives(image), derivatives(alpha, 1)
    torch.autograd.backward((image, alpha), (v_image, v_alpha))
    want = [*(leaf.grad for leaf in leaves), leaves[0].absgrad if absgrad else None]

    means2d, conics, _, opacities = given
    lists = tile_lists(means2d, radii, depths.float(), conics, opacities, width, height)
    got = pixel_gradients(
        *(tensor[None] for tensor in given),
        lists.offsets,
        lists.gaussians,
        *(tensor.detach().float()[None] for tensor in (image, alpha, v_image, v_alpha)),
        absgrad=absgrad,
    )
    results = dict(zip(NAMES, got, strict=True))
    for name, theirs in zip(NAMES, want, strict=True):
        if theirs is None:
            assert results[name].numel() == 0
            continue
        ours = results[name][0]
        assert ours.shape == theirs.shape and ours.dtype == torch.float32
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max(), name
    return results


@pytest.mark.parametrize("absgrad", [True, False])
def test_autograd_gets_them_where_gsplat_has_them(
    monkeypatch: pytest.MonkeyPatch, absgrad: bool
) -> None:
    *tensors, depths, radii = splats(30, 20, 18)

    def gsplats(means2d, conics, channels, opacities, width, height, *rest):
        assert rest == (8, lists.offsets, lists.gaussians) and not torch.is_grad_enabled()
        drawn = (t[0].double() for t in (means2d, conics, channels, opacities))
        image, alpha = composite(*drawn, depths, radii, width, height)
        return image[None].float(), alpha[None].float()

    monkeypatch.setattr(gsplat.cuda._wrapper, "rasterize_to_pixels", gsplats)
    given = [tensor.float()[None] for tensor in tensors]
    means2d, conics, _, opacities = (tensor[0] for tensor in given)
    lists = tile_lists(means2d, radii, depths.float(), conics, opacities, 20, 18)
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    # Not the leaf itself: it is what comes out of the projection that keeps them.
    node = leaves[0] * 1
    image, alpha = rasterize_pixels(node, *leaves[1:], lists, 20, 18, absgrad=absgrad)
    (image.square().sum() + alpha.sum()).backward()
    want = pixel_gradients(
        *given, *lists, image, alpha, 2 * image, torch.ones_like(alpha), absgrad=True
    )
    for leaf, gradient in zip(leaves, want[:4], strict=True):
        assert torch.equal(leaf.grad, gradient)
    assert torch.equal(node.absgrad, want[4]) if absgrad else not hasattr(node, "absgrad")


@pytest.mark.parametrize("size", [(40, 30), (16, 16), (1, 1), (7, 21)])
def test_derivatives_are_those_of_the_reference(size: tuple[int, int]) -> None:
    results = check(60, *size, seed=size[0])
    assert all(result.any() for result in results.values())


@pytest.mark.parametrize("last", ["_last", "_last_by_sum"])
def test_layers_until_nothing_shows_through(last: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels are done at different Gaussians of the same tile, and many are never looked at."""
    monkeypatch.setattr(gradients, "_last", getattr(gradients, last))
    results = check(200, 20, 20, opacity=(0.6, 1.0), sigma=(4.0, 9.0))
    hidden = (results["opacities"][0] == 0).double().mean()
    assert 0.1 < hidden < 0.9


def test_alpha_that_is_cut_off_has_no_derivative() -> None:
    check(20, 24, 16, clamp=0.9995, sigma=(2.0, 4.0))


@pytest.mark.parametrize("channels", [1, 4])
def test_any_number_of_channels(channels: int) -> None:
    check(40, 20, 20, channels=channels)


def test_absolute_values_are_left_out() -> None:
    check(40, 20, 20, absgrad=False)


@pytest.mark.parametrize("n", [CHUNK - 1, CHUNK, CHUNK + 1])
def test_lists_that_end_with_a_chunk_or_do_not(n: int) -> None:
    check(n, 8, 8, margin=0.0)


def test_nothing_is_drawn() -> None:
    results = check(13, 8, 8, margin=0.0, opacity=(0.0, 0.003), absgrad=False)
    assert not any(result.any() for result in results.values())


def one_tile(given: list[Tensor]) -> dict[str, Tensor]:
    """Gradients of Gaussians that are all in the list of the only tile."""
    n = len(given[0])
    generator = torch.Generator().manual_seed(5)
    pixels = [torch.rand(1, 8, 8, channels, generator=generator) for channels in (3, 1, 3, 1)]
    lists = torch.zeros(1, 1, 1, dtype=torch.int32), torch.arange(n, dtype=torch.int32)
    got = pixel_gradients(*(t[None] for t in given), *lists, *pixels, absgrad=True)
    return dict(zip(NAMES, (t[0] for t in got), strict=True))


def test_a_broken_colour_is_no_one_elses_concern_where_it_is_not_drawn() -> None:
    given = [t.float() for t in splats(30, 8, 8, margin=0.0)[:4]]
    given[0][7] = 1000.0  # listed, and far away
    want = one_tile(given)
    given[2][7] = float("nan")
    got = one_tile(given)
    for name in NAMES:
        assert torch.equal(got[name], want[name]) and want[name].any(), name


def test_an_opacity_that_is_not_a_number_hides_what_is_behind() -> None:
    """gsplat takes the smaller of 0.999 and it."""
    given = [t.float() for t in splats(30, 8, 8, margin=0.0)[:4]]
    others = torch.arange(30) != 3
    given[3][3] = 1e30
    want = one_tile(given)
    given[3][3] = float("nan")
    got = one_tile(given)
    for name in NAMES:
        assert torch.equal(got[name][others], want[name][others]), name
    assert want["colors"][2].abs().max() > 100 * want["colors"][4].abs().max() > 0
