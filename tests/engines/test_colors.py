"""Colours, and gradients of their coefficients without tensors of either, against autograd."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from nerfstudio.models.splatfacto import RGB2SH
from torch import Tensor

from gsscale_nerfstudio.engines.colors import Viewpoint
from gsscale_nerfstudio.engines.packing import pack, unpack
from gsscale_nerfstudio.engines.working_set import WorkingSet, empty_attributes, working_set
from gsscale_nerfstudio.store import GROUPS, RowLayout
from tests.engines.driving import DEVICES, random_rows

N = 300
POSITION = (0.3, -0.7, 0.2)

CASES = [(layout, degree) for layout in range(5) for degree in range(layout + 1)]


@pytest.fixture(params=["kernels", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """On a CPU Triton's interpreter and torch; on a GPU the kernels."""
    if request.param == "torch":
        if torch.cuda.is_available():
            pytest.skip("a GPU has kernels")
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return request.param


def rows_of(values: dict[str, Tensor], layout: RowLayout) -> Tensor:
    rows = torch.full((N, layout.width), 7.0)  # bookkeeping must not show
    for name in GROUPS:
        rows[:, layout.columns[name]] = values[name].flatten(1)
    return rows


def unpacked(
    rows: Tensor, layout: RowLayout, viewpoint: Viewpoint, positions: Tensor | None = None
) -> WorkingSet:
    attributes = empty_attributes(layout, N, viewpoint, training=True)
    unpack(rows, layout, attributes, viewpoint, positions)
    return working_set(
        torch.arange(N, dtype=torch.int32), attributes, layout, viewpoint, training=True
    )


def by_autograd(values: dict[str, Tensor], layout: RowLayout, degree: int) -> dict[str, Tensor]:
    """Colours in float64 with gsplat's own torch code; what they depend on."""
    from gsplat.cuda._torch_impl import _spherical_harmonics

    leaves = {n: values[n].double().requires_grad_() for n in GROUPS}
    leaves["position"] = torch.tensor(POSITION, dtype=torch.float64, requires_grad=True)
    if layout.sh_degree == 0:
        return {**leaves, "colors": leaves["features_dc"] * 1}
    # gsplat's code expects degrees' bases only, and normalizes without a gradient.
    directions = leaves["means"] - leaves["position"]
    directions = directions / directions.norm(dim=-1, keepdim=True)
    coefficients = torch.cat([leaves["features_dc"][:, None], leaves["features_rest"]], dim=1)
    colors = _spherical_harmonics(degree, directions, coefficients)
    return {**leaves, "colors": (colors + 0.5).clamp_min(0)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("layout", "degree"), CASES)
def test_colors_and_all_their_gradients(
    backend: str, device: str, layout: int, degree: int
) -> None:
    rows_layout = RowLayout(layout)
    values = random_rows(N, rows_layout)
    values["features_dc"] *= 8
    expected = by_autograd(values, rows_layout, degree)
    position = torch.tensor(POSITION, device=device, requires_grad=True)
    viewpoint = Viewpoint(position, degree)
    working = unpacked(rows_of(values, rows_layout).to(device), rows_layout, viewpoint)
    colors = working.colors.values
    if layout > 0:
        assert 0.02 < (colors == 0).float().mean() < 0.6  # some are clamped
    torch.testing.assert_close(
        colors.detach().cpu().double(), expected["colors"].detach(), rtol=0, atol=2e-6
    )

    weights = torch.randn(N, 3, generator=torch.Generator().manual_seed(5))
    colors.backward(weights.to(device))
    expected["colors"].backward(weights.double())
    grads = torch.full((N, rows_layout.width), 9.0)
    if device == "cuda":
        grads = grads.pin_memory()
    pack(working, rows_layout, grads)
    if device == "cuda":
        torch.cuda.synchronize()
    for name in ("means", "features_dc", "features_rest"):
        want = expected[name].grad
        want = torch.zeros_like(expected[name]) if want is None else want
        got = grads[:, rows_layout.columns[name]].unflatten(1, want.shape[1:]).double()
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5, msg=name)
    want = expected["position"].grad
    if degree == 0:
        assert position.grad is None
    else:
        torch.testing.assert_close(position.grad.cpu().double(), want, rtol=1e-4, atol=1e-3)
    for name in ("scales", "quats", "opacities"):
        assert not grads[:, rows_layout.columns[name]].any()
    assert not grads[:, rows_layout.optimized :].any()


@pytest.mark.parametrize("device", DEVICES)
def test_a_black_points_gaussian_does_not_stay_black(backend: str, device: str) -> None:
    """Its colour is 0 and not clamped: torch's clamp, which gsplat has, lets the gradient pass."""
    layout = RowLayout(3)
    values = random_rows(N, layout)
    values["features_rest"] = torch.zeros_like(values["features_rest"])
    values["features_dc"] = RGB2SH(torch.zeros(N, 3))
    viewpoint = Viewpoint(torch.tensor(POSITION, device=device), 3)
    working = unpacked(rows_of(values, layout).to(device), layout, viewpoint)
    assert not working.colors.values.any()
    working.colors.values.sum().backward()
    assert working.colors.gradients().eq(1).all()


@pytest.mark.parametrize("device", DEVICES)
def test_rows_go_to_their_places(backend: str, device: str) -> None:
    """As a view's hot and cold rows do, in two parts."""
    layout = RowLayout(2)
    rows = rows_of(random_rows(N, layout), layout).to(device)
    viewpoint = Viewpoint(torch.tensor(POSITION, device=device), 2)
    whole = empty_attributes(layout, N, viewpoint, training=True)
    unpack(rows, layout, whole, viewpoint)
    parts = empty_attributes(layout, N, viewpoint, training=True)
    order = torch.randperm(N, dtype=torch.int32)
    for part in (order[:100], order[100:]):
        unpack(rows[part.long()], layout, parts, viewpoint, part.to(device))
    for name, values in whole.items():
        assert values.numel() and torch.equal(parts[name], values), name


def test_two_backward_passes_add_up(backend: str) -> None:
    layout = RowLayout(1)
    viewpoint = Viewpoint(torch.tensor(POSITION), 1)
    working = unpacked(rows_of(random_rows(N, layout), layout), layout, viewpoint)
    colors = working.colors.values
    (colors.sum() + (2 * colors).sum()).backward(retain_graph=True)
    once = working.colors.gradients().clone()
    colors.sum().backward()
    torch.testing.assert_close(3 * working.colors.gradients(), 4 * once)


def test_no_gradient_is_a_gradient_of_zeros(backend: str) -> None:
    """A loss that does not look at colours: of depth, say."""
    layout = RowLayout(1)
    viewpoint = Viewpoint(torch.tensor(POSITION), 1)
    working = unpacked(rows_of(random_rows(N, layout), layout), layout, viewpoint)
    working.leaves["means"].sum().backward()
    grads = torch.full((N, layout.width), 9.0)
    pack(working, layout, grads)
    assert grads[:, layout.columns["means"]].eq(1).all()
    assert not grads[:, layout.columns["means"].stop :].any()


def test_a_view_that_is_done_takes_no_memory(backend: str) -> None:
    """At once, not when Python next looks for rings of objects: the next view needs the room."""
    layout = RowLayout(1)
    viewpoint = Viewpoint(torch.tensor(POSITION), 1)
    working = unpacked(rows_of(random_rows(N, layout), layout), layout, viewpoint)
    working.colors.values.sum().backward()
    kept = [weakref.ref(working.colors.values), weakref.ref(working.leaves["means"])]
    gc.disable()
    try:
        del working
        assert [tensor() for tensor in kept] == [None, None]
    finally:
        gc.enable()
