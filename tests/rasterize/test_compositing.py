"""Compositing and its hand-written backward against the slow loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gsscale_nerfstudio.rasterize.compositing import composite

from .scenes import random_loss
from .slow_compositing import composite_slowly

Splats = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def splats(
    n: int,
    width: int,
    height: int,
    *,
    sigma: tuple[float, float] = (1.0, 5.0),
    length: tuple[float, float] | None = None,
    opacity: tuple[float, float] = (0.05, 0.95),
    margin: float = 6.0,
    channels: int = 3,
    seed: int = 0,
) -> Splats:
    """Random ellipses, in float64, some of them beyond the image's border, some not drawn.

    ``sigma`` bounds their standard deviations in pixels, ``length``, if given, those of one axis.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        values = torch.rand(*shape, generator=generator, dtype=torch.float64)
        return low + (high - low) * values

    size = torch.tensor([width, height], dtype=torch.float64)
    means2d = uniform(0, 1, n, 2) * (size + 2 * margin) - margin
    angle, s1, s2 = uniform(0, 3.14, n), uniform(*sigma, n), uniform(*(length or sigma), n)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(n, 2, 2)
    inverse = rotation @ torch.diag_embed(torch.stack([s1, s2], -1) ** -2) @ rotation.mT
    conics = inverse.flatten(1)[:, [0, 1, 3]]
    radii = (3 * torch.maximum(s1, s2)).ceil().int()
    radii[::13] = 0
    return (
        means2d,
        conics,
        uniform(-0.2, 1, n, channels),
        uniform(*opacity, n),
        uniform(1, 5, n),
        radii,
    )


def check(inputs: Splats, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Values and all gradients, to the rounding of float64; returns the image."""
    *tensors, depths, radii = inputs
    results = []
    for function in (composite, composite_slowly):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        if function is composite_slowly:
            leaves[0] = tensors[0].expand(height, width, -1, -1).clone().requires_grad_()
            image = composite_slowly(*leaves, depths, radii, width, height)
        else:
            image = composite(*leaves, depths, radii, width, height, absgrad=True)
        random_loss(*image).backward()
        results.append((leaves, image))
    (fast, fast_image), (slow, slow_image) = results

    per_pixel = slow[0].grad
    expected = [per_pixel.sum((0, 1)), *(leaf.grad for leaf in slow[1:])]
    for got, want in zip(fast_image, slow_image, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    for leaf, want in zip(fast, expected, strict=True):
        torch.testing.assert_close(leaf.grad, want, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(fast[0].absgrad, per_pixel.abs().sum((0, 1)), rtol=1e-8, atol=1e-9)
    return fast_image


@pytest.mark.parametrize(("width", "height"), [(16, 16), (18, 17), (7, 5), (33, 9)])
def test_image_sizes(width: int, height: int) -> None:
    _, alpha = check(splats(24, width, height), width, height)
    assert alpha.shape == (height, width, 1)
    assert alpha.amax() > 0.5


def test_almost_opaque_gaussians_are_clamped() -> None:
    """Beyond 0.999 alpha is constant: no gradient reaches opacity or shape, at those pixels."""
    width, height = 20, 18
    inputs = splats(12, width, height, sigma=(3, 6), opacity=(0.9985, 1.0), margin=0)
    # A mean on a pixel's centre has sigma = 0: the clamp must act there.
    inputs[0][1:] = inputs[0][1:].floor() + 0.5
    check(inputs, width, height)


def test_pixels_stop_before_the_gaussian_that_would_saturate_them() -> None:
    width, height = 18, 12
    inputs = splats(40, width, height, sigma=(4, 9), opacity=(0.6, 0.99), margin=0)
    _, alpha = check(inputs, width, height)
    assert (alpha > 1 - 1e-3).double().mean() > 0.5
    assert alpha.amax() < 1 - 1e-4  # the transmittance never reaches 1e-4


def test_large_and_tiny_gaussians() -> None:
    width, height = 18, 17
    large = splats(7, width, height, sigma=(30, 400), opacity=(0.1, 0.4), margin=50)
    tiny = splats(20, width, height, sigma=(0.55, 0.7), seed=1)
    check(tuple(torch.cat(pair) for pair in zip(large, tiny, strict=True)), width, height)


def test_faint_gaussians_are_skipped() -> None:
    """Opacities around 1/255: most never reach it, the others only near their centre."""
    width, height = 17, 19
    _, alpha = check(splats(40, width, height, opacity=(0.0, 0.012)), width, height)
    assert 0 < (alpha == 0).double().mean() < 1


def test_opacity_zero_has_zero_gradients() -> None:
    inputs = splats(6, 10, 10)
    inputs[3][::2] = 0
    check(inputs, 10, 10)


def test_indefinite_conics_are_skipped_where_sigma_is_negative() -> None:
    width, height = 18, 18
    inputs = splats(16, width, height)
    inputs[1][::2, 1] = 1.05 * (inputs[1][::2, 0] * inputs[1][::2, 2]).sqrt()
    check(inputs, width, height)


def test_needles() -> None:
    """det / (a c) below 1e-3: the inverse of the conic loses digits, as the fast code notices."""
    width, height = 18, 17
    inputs = splats(16, width, height, sigma=(0.5, 0.6), length=(50, 90), margin=0)
    a, b, c = inputs[1].unbind(-1)
    assert ((a * c - b * b) / (a * c)).median() < 1e-3
    check(inputs, width, height)


def test_equal_depths_keep_their_order() -> None:
    width, height = 16, 16
    inputs = splats(10, width, height, sigma=(3, 6), opacity=(0.5, 0.9), margin=0)
    inputs[4].fill_(2.0)
    check(inputs, width, height)


@pytest.mark.parametrize("channels", [1, 4, 7])
def test_any_number_of_channels(channels: int) -> None:
    check(splats(10, 12, 11, channels=channels), 12, 11)


def test_batches_split_the_work_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, size = splats(40, 50, 34, margin=0), (50, 34)
    whole = composite(*inputs, *size)
    monkeypatch.setattr("gsscale_nerfstudio.rasterize.block_lists._BATCH_ELEMENTS", 1)
    for got, want in zip(composite(*inputs, *size), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)


def test_nothing_drawn() -> None:
    *tensors, depths, radii = splats(5, 10, 10)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    color, alpha = composite(*leaves, depths, torch.zeros_like(radii), 10, 10, absgrad=True)
    assert not color.any() and not alpha.any()
    random_loss(color, alpha).backward()
    for leaf in leaves:
        assert leaf.grad.shape == leaf.shape and not leaf.grad.any()
    assert leaves[0].absgrad.shape == (5, 2) and not leaves[0].absgrad.any()


def test_absolute_gradient_only_on_request() -> None:
    *tensors, depths, radii = splats(5, 10, 10)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    random_loss(*composite(*leaves, depths, radii, 10, 10)).backward()
    assert not hasattr(leaves[0], "absgrad")
