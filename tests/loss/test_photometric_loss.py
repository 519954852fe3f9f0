"""The Triton kernels against pytorch_msssim in float64; interpreted where there is no GPU.

Interpreting a row costs some 40 ms, so images are small there and tiles are cut to them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_msssim import SSIM
from torch import Tensor

from gsscale_nerfstudio.loss import api, photometric_loss
from gsscale_nerfstudio.loss.fused import TILE, fused_photometric_loss
from gsscale_nerfstudio.loss.reference import photometric_loss_reference

DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            torch.cuda.is_available(), reason="with a GPU, kernels are compiled, not interpreted"
        ),
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def splatfactos_loss(render: Tensor, truth: Tensor, ssim_lambda: float) -> Tensor:
    """As splatfacto's get_loss_dict computes it."""
    ssim = SSIM(data_range=1.0, size_average=True, channel=3)
    l1 = torch.abs(truth - render).mean()
    simloss = 1 - ssim(truth.permute(2, 0, 1)[None], render.permute(2, 0, 1)[None])
    return (1 - ssim_lambda) * l1 + ssim_lambda * simloss


def with_gradient(loss: Any, render: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    render = render.detach().clone().requires_grad_()
    value = loss(render, *args)
    value.backward()
    assert render.grad is not None
    return value.detach(), render.grad


def assert_fused_agrees(
    render: Tensor,
    truth: Tensor,
    ssim_lambda: float = 0.2,
    tile: tuple[int, int] = TILE,
    atol: float = 1e-4,
) -> None:
    """Value, and gradient in units of 1 / values, which is what L1's are multiples of."""
    value, gradient = with_gradient(fused_photometric_loss, render, truth, ssim_lambda, tile)
    expected, expected_gradient = with_gradient(
        splatfactos_loss, render.double().cpu(), truth.double().cpu(), ssim_lambda
    )
    assert value.shape == () and value.dtype == torch.float32
    assert gradient.shape == render.shape
    torch.testing.assert_close(value.cpu().double(), expected, rtol=1e-5, atol=atol / 100)
    torch.testing.assert_close(
        gradient.cpu().double() * render.numel(),
        expected_gradient * render.numel(),
        rtol=1e-5,
        atol=atol,
    )


@pytest.mark.parametrize("ssim_lambda", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("size", [(11, 11), (40, 31), (8, 20)])
def test_without_a_gpu_the_loss_is_splatfactos(size: tuple[int, int], ssim_lambda: float) -> None:
    render, truth = torch.rand(2, *size, 3)
    for loss in photometric_loss, photometric_loss_reference:
        got = with_gradient(loss, render, truth, ssim_lambda)
        want = with_gradient(splatfactos_loss, render, truth, ssim_lambda)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("size", "tile", "ssim_lambda"),
    [
        ((11, 11), (11, 64), 1.0),  # one window
        ((12, 47), (12, 256), 0.0),
        ((22, 21), (11, 32), 0.2),  # windows begin in each of 2 x 2 tiles
        ((13, 11), (12, 32), 0.2),  # windows begin in one of 2 x 2 tiles
    ],
)
def test_agrees_for_any_size(
    device: str, size: tuple[int, int], tile: tuple[int, int], ssim_lambda: float
) -> None:
    render, truth = torch.rand(2, *size, 3, device=device)
    assert_fused_agrees(render, truth, ssim_lambda, tile)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(64, 48), (75, 100), (100, 75), (377, 501), (1200, 1601)])
def test_agrees_with_tiles_as_used(size: tuple[int, int]) -> None:
    truth = torch.rand(*size, 3, device="cuda")
    render = (truth + 0.1 * torch.randn_like(truth)).clamp(0, 1)
    assert_fused_agrees(render, truth)
    assert torch.equal(
        photometric_loss(render, truth, 0.2), fused_photometric_loss(render, truth, 0.2)
    )


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    height=st.integers(11, 13),
    width=st.integers(11, 21),
    ssim_lambda=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_agrees_wherever_images_end(
    device: str, height: int, width: int, ssim_lambda: float, seed: int
) -> None:
    torch.manual_seed(seed)
    render, truth = torch.rand(2, height, width, 3, device=device)
    assert_fused_agrees(render, truth, ssim_lambda, tile=(13, 32))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("images", ["identical", "constant", "black", "binary", "nearly equal"])
def test_awkward_images(device: str, images: str) -> None:
    truth = torch.rand(11, 14, 3, device=device)
    render = {
        "identical": truth,
        "constant": torch.full_like(truth, 0.7),
        "black": torch.zeros_like(truth),
        "binary": (torch.rand_like(truth) > 0.5).float(),
        "nearly equal": truth + 1e-3 * torch.randn_like(truth),
    }[images]
    if images in ("constant", "black"):
        truth = torch.full_like(truth, 0.2)
    elif images == "binary":
        truth = (truth > 0.5).float()
    # Without variance SSIM is a quotient of two roundings plus C2 = 9e-4 each.
    flat = images in ("constant", "black")
    assert_fused_agrees(render, truth, tile=(11, 64), atol=2e-3 if flat else 1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_flows_on_through_strided_images(device: str) -> None:
    """A loss that is scaled, of a render that is no leaf and not contiguous."""
    leaf, truth = torch.rand(2, 3, 12, 14, device=device)
    truth = truth.permute(1, 2, 0)

    def of_leaf(loss: Any) -> tuple[Tensor, Tensor]:
        def scaled(leaf: Tensor, truth: Tensor) -> Tensor:
            return -2.5 * loss(torch.clamp(leaf.permute(1, 2, 0), 0.1, 0.8) * 0.9, truth)

        return with_gradient(scaled, leaf, truth)

    got = of_leaf(lambda *images: fused_photometric_loss(*images, 0.2, (12, 64)))
    want = of_leaf(lambda *images: splatfactos_loss(*images, 0.2))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
def test_keeps_three_maps_and_none_without_a_gradient(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    render, truth = torch.rand(2, 11, 13, 3, device=device)
    allocated = []
    new_empty = Tensor.new_empty

    def recording(self: Tensor, *size: int, **options: Any) -> Tensor:
        if not options:  # those of the interpreter have some
            allocated.append(size)
        return new_empty(self, *size, **options)

    monkeypatch.setattr(Tensor, "new_empty", recording)
    plain = fused_photometric_loss(render, truth, 0.2, (11, 64))
    render.requires_grad_()
    with torch.no_grad():
        without = fused_photometric_loss(render, truth, 0.2, (11, 64))
    assert allocated == [(1,), (1,)]  # the programs' sums
    loss = fused_photometric_loss(render, truth, 0.2, (11, 64))
    assert allocated[2:] == [(3, 1, 3, 3), (1,)]
    assert loss.grad_fn is not None and without.grad_fn is None and plain.grad_fn is None
    assert torch.equal(loss, plain) and torch.equal(loss, without)


def test_refuses_what_the_kernels_cannot_read() -> None:
    image = torch.rand(20, 20, 3)
    huge = torch.rand(1).expand(30000, 30000, 3)
    for render, truth, reason in [
        (image, image[:, :19], "cannot compare"),
        (image[:10], image[:10], "cannot compare"),
        (image[..., :1], image[..., :1], "cannot compare"),
        (image, image.double(), "float32"),
        (image.half(), image, "float32"),
        (huge, huge, "32-bit"),
    ]:
        with pytest.raises(ValueError, match=reason):
            fused_photometric_loss(render, truth, 0.2)


class OnGpu(Tensor):
    """A CPU tensor that says otherwise."""

    is_cuda = True  # type: ignore[assignment]


@pytest.mark.parametrize("new_enough", [True, False])
def test_a_triton_that_cannot_compile_the_kernels_is_not_asked_to(
    monkeypatch: pytest.MonkeyPatch, new_enough: bool
) -> None:
    monkeypatch.setattr(api, "FUSED", new_enough)
    calls: list[Any] = []
    monkeypatch.setattr(
        "gsscale_nerfstudio.loss.fused.fused_photometric_loss",
        lambda *args: calls.append(args) or splatfactos_loss(*args),
    )
    render, truth = torch.rand(2, 12, 20, 3)
    loss = photometric_loss(render.as_subclass(OnGpu), truth, 0.2)
    assert len(calls) == new_enough
    torch.testing.assert_close(loss.as_subclass(Tensor), splatfactos_loss(render, truth, 0.2))


@pytest.mark.gpu
def test_images_smaller_than_the_window_are_left_to_the_reference() -> None:
    render, truth = torch.rand(2, 8, 20, 3, device="cuda")
    with pytest.warns(UserWarning, match="Skipping Gaussian Smoothing"):
        loss = photometric_loss(render, truth, 0.2)
    torch.testing.assert_close(loss, splatfactos_loss(render, truth, 0.2))


@pytest.mark.gpu
def test_never_waits_for_the_gpu_and_needs_few_images_of_memory() -> None:
    render, truth = torch.rand(2, 1000, 800, 3, device="cuda")
    render.requires_grad_()
    runs = [torch.autograd.grad(photometric_loss(render, truth, 0.2), render)[0]]  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        runs += torch.autograd.grad(photometric_loss(render, truth, 0.2), render)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    image_bytes = 4 * render.numel()
    assert torch.cuda.max_memory_allocated() - before <= 4.1 * image_bytes  # 3 maps, the gradient
    assert torch.equal(*runs)  # no atomics
