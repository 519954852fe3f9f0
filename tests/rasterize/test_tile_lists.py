"""Tile lists: every tile with a pixel that gsplat would draw, little else, in gsplat's order.

What is needed is found by brute force, pixel by pixel: in float64, and in float32 with gsplat's
formula, whose rounding makes other pixels visible.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from gsscale_nerfstudio import rasterize
from gsscale_nerfstudio.rasterize.projection import PER_AXIS
from gsscale_nerfstudio.rasterize.tile_lists import SQUARE, TILE, TileLists, tile_lists

from .scenes import Camera, Scene, camera, draw, random_loss, scene

# The interpreter computes with numpy, which tells of every NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

Pairs = list[tuple[int, int]]
"""(tile, Gaussian)"""


class Splats(NamedTuple):
    """What :func:`tile_lists` takes."""

    means2d: Tensor
    radii: Tensor
    depths: Tensor
    conics: Tensor
    opacities: Tensor


def splats(
    n: int, width: int, height: int, *, size: float = 6.0, aspect: float = 10.0, seed: int = 0
) -> Splats:
    """Ellipses in and around the image as gsplat projects them: blurred, with 3-sigma squares."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(7, n, generator=generator, dtype=torch.float64)
    means2d = torch.stack([(2 * uniform[0] - 0.5) * width, (2 * uniform[1] - 0.5) * height], -1)
    short = size * (2 * uniform[2] - 1).exp()
    long = short * aspect ** uniform[3]
    angle = (uniform[4] * 12).round() * math.pi / 12 + 0.01 * (uniform[4] - 0.5)
    cos, sin = angle.cos(), angle.sin()
    xx = (cos * long) ** 2 + (sin * short) ** 2 + 0.3
    yy = (sin * long) ** 2 + (cos * short) ** 2 + 0.3
    xy = cos * sin * (long**2 - short**2)
    conics = torch.stack([yy, -xy, xx], -1) / (xx * yy - xy * xy)[:, None]
    radii = (3 * (long**2 + 0.3).sqrt()).ceil().int()
    depths = (1 + 6 * uniform[5]).round()  # many equal ones
    opacities = uniform[6] * torch.tensor([1.0, 1.0, 0.02])[torch.arange(n) % 3]
    opacities[::7] = 1 / 255
    opacities[3::7] = 1
    radii[5::11] = 0
    return Splats(means2d.float(), radii, depths.float(), conics.float(), opacities.float())


def square_pairs(given: Splats, columns: int, rows: int) -> Tensor:
    """Whether gsplat lists a Gaussian in a tile, or in that around it. [n, rows, columns]"""
    radii = given.radii if given.radii.dim() == 2 else given.radii[:, None].expand(-1, 2)
    reach = radii.float() / SQUARE
    centre = given.means2d / SQUARE
    first = (centre - reach).floor().nan_to_num(0.0, 3e38, -3e38)
    end = (centre + reach).ceil().nan_to_num(0.0, 3e38, -3e38)
    x, y = (torch.arange(count) * TILE // SQUARE for count in (columns, rows))
    in_columns = (x >= first[:, :1]) & (x < end[:, :1])
    in_rows = (y >= first[:, 1:]) & (y < end[:, 1:])
    return in_rows[:, :, None] & in_columns[:, None, :] & (radii > 0).all(1)[:, None, None]


def visible_pairs(given: Splats, columns: int, rows: int, dtype: torch.dtype) -> Tensor:
    """Whether any pixel of a tile reaches 1/255. [n, rows, columns]"""
    visible = []
    x = torch.arange(columns * TILE, dtype=dtype) + 0.5
    y = torch.arange(rows * TILE, dtype=dtype)[:, None] + 0.5
    for mean, conic, opacity in zip(given.means2d, given.conics, given.opacities, strict=True):
        a, b, c = conic.to(dtype)
        dx, dy = mean[0].to(dtype) - x, mean[1].to(dtype) - y
        sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
        alpha = (opacity.to(dtype) * torch.exp(-sigma)).nan_to_num(0.999)  # as CUDA's min
        # A little less than 1/255: __expf rounds too.
        pixels = ~(sigma < 0) & (alpha >= (1 - 1e-6) / 255)
        visible.append(pixels.view(rows, TILE, columns, TILE).any(3).any(1))
    return torch.stack(visible)


def pairs_of(lists: TileLists) -> Pairs:
    """The lists' pairs in their order, after a check of the offsets."""
    offsets, total = lists.offsets, len(lists.gaussians)
    assert offsets.dtype == lists.gaussians.dtype == torch.int32
    ends = [*offsets.flatten().tolist(), total]
    assert ends[0] == 0 and ends == sorted(ends)
    gaussians = lists.gaussians.tolist()
    return [
        (tile, i)
        for tile, (start, end) in enumerate(itertools.pairwise(ends))
        for i in gaussians[start:end]
    ]


def check(given: Splats, width: int, height: int) -> tuple[int, int, int]:
    """Assert all but tightness; numbers of pairs: needed, listed, and of gsplat's squares."""
    lists = tile_lists(*given, width, height)
    columns, rows = -(-width // TILE), -(-height // TILE)
    assert lists.offsets.shape == (1, rows, columns)
    pairs = pairs_of(lists)
    square = square_pairs(given, columns, rows)
    needed = visible_pairs(given, columns, rows, torch.float64)
    needed |= visible_pairs(given, columns, rows, torch.float32)
    needed &= square
    listed = torch.zeros_like(square)
    for place, i in pairs:
        assert not listed[i, place // columns, place % columns]
        listed[i, place // columns, place % columns] = True
    assert not (needed & ~listed).any()
    assert not (listed & ~square).any()
    depths = given.depths.tolist()
    assert pairs == sorted(pairs, key=lambda pair: (pair[0], depths[pair[1]], pair[1]))
    return int(needed.sum()), len(pairs), int(square.sum())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    width=st.integers(1, 100),
    height=st.integers(1, 100),
    log_size=st.floats(-3, 5),
    log_aspect=st.floats(0, 8),
)
def test_lists_are_complete_in_order_and_within_gsplats(
    seed: int, width: int, height: int, log_size: float, log_aspect: float
) -> None:
    sizes = {"size": math.exp(log_size), "aspect": math.exp(log_aspect)}
    check(splats(30, width, height, seed=seed, **sizes), width, height)


@pytest.mark.parametrize("seed", range(4))
def test_needles_of_which_float32_knows_little(seed: int) -> None:
    """sigma's terms reach 1e6 here and cancel: its rounding decides what gsplat draws."""
    generator = torch.Generator().manual_seed(seed)
    n, width, height = 40, 800, 600
    uniform = torch.rand(4, n, generator=generator, dtype=torch.float64)
    angle = torch.tensor([0.25, 0.75, 0.2, 0.55]).double().repeat(n // 4) * math.pi
    axis = torch.stack([angle.cos(), angle.sin()], -1)
    long = 300 + 1500 * uniform[0] ** 2
    covariances = long[:, None, None] ** 2 * axis[:, :, None] * axis[:, None, :]
    covariances += 0.3 * torch.eye(2, dtype=torch.float64)
    inverse = torch.linalg.inv(covariances)
    given = Splats(
        (uniform[1:3].T * torch.tensor([width, height])).float(),
        (3 * long).ceil().int(),
        torch.ones(n),
        inverse.flatten(1)[:, [0, 1, 3]].float(),
        (torch.exp(3 * uniform[3]) / 255).float(),
    )
    needed, listed, square = check(given, width, height)
    assert needed < listed < 0.05 * square


@pytest.mark.parametrize(("size", "aspect"), [(0.5, 10.0), (3.0, 3.0), (6.0, 10.0), (30.0, 2.0)])
def test_lists_hold_little_else(size: float, aspect: float) -> None:
    given = splats(600, 320, 240, size=size, aspect=aspect)
    given.opacities[given.opacities < 1.1 / 255] = 0.3  # an ellipse smaller than a pixel
    needed, listed, square = check(given, 320, 240)
    assert listed <= 1.01 * needed
    assert listed < 0.9 * square


def test_two_radii() -> None:
    """gsplat >= 1.5: a rectangle of its own for each axis."""
    given = splats(100, 100, 90, seed=1)
    both = torch.stack([given.radii, given.radii // 2], -1)
    both[4, 1] = 0
    needed, listed, _ = check(given._replace(radii=both), 100, 90)
    assert 0 < needed <= listed
    equal = given._replace(radii=given.radii[:, None].repeat(1, 2))
    one, two = tile_lists(*given, 100, 90), tile_lists(*equal, 100, 90)
    assert torch.equal(one.gaussians, two.gaussians) and torch.equal(one.offsets, two.offsets)


def test_more_than_one_program() -> None:
    given = splats(2500, 64, 48, size=2.0, aspect=2.0)
    needed, listed, _ = check(given, 64, 48)
    assert 1000 < needed <= listed


@pytest.mark.parametrize(
    "change",
    [
        {"radii": 0},
        {"opacities": 0.99 / 255},
        {"opacities": 0.0},
        {"opacities": -1.0},
        {"means2d": 1e6},
        {"means2d": -1e6},
        {"means2d": math.nan},
        {"means2d": math.inf},
    ],
    ids=str,
)
def test_nothing_to_draw(change: dict[str, float]) -> None:
    given = splats(20, 50, 40)
    for name, value in change.items():
        getattr(given, name).fill_(value)
    lists = tile_lists(*given, 50, 40)
    assert lists.offsets.shape[1:] == (5, 7) and not lists.offsets.any()
    assert lists.gaussians.shape == (0,) and lists.gaussians.dtype == torch.int32


def test_values_of_what_is_not_drawn_do_no_harm() -> None:
    given = splats(60, 50, 40, seed=2)
    want = tile_lists(*given, 50, 40)
    for i, value in enumerate([math.nan, math.inf, -math.inf, 1e38, -1.0]):
        for tensor in (given.means2d, given.depths, given.conics, given.opacities):
            tensor[5 + 11 * i] = value
    assert not given.radii[5::11].any()
    got = tile_lists(*given, 50, 40)
    assert torch.equal(got.gaussians, want.gaussians) and torch.equal(got.offsets, want.offsets)


@pytest.mark.parametrize(
    "conic",
    [
        (math.nan, 0, 1),
        (1, math.nan, 1),
        (1, 0, math.inf),
        (-math.inf, 0, 1),
        (1, 1, 1),
        (1, 2, 1),
        (0, 0, 0),
        (0, 0, 1),
        (-1, 0, -1),
        (1e20, 0, 1e20),
        (1e-38, 0, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("opacity", [0.5, math.nan, math.inf])
def test_what_has_no_ellipse_keeps_its_square(
    conic: tuple[float, float, float], opacity: float
) -> None:
    given = splats(1, 80, 60)
    given.means2d.copy_(torch.tensor([[30.0, 31.0]]))
    given.radii.fill_(20)
    given.opacities.fill_(opacity)
    given.conics.copy_(torch.tensor([conic]))
    _, listed, square = check(given, 80, 60)
    assert listed == square == 64


def test_faint_gaussians_that_are_drawn_all_the_same() -> None:
    """gsplat takes the smaller of 0.999 and an alpha, also when that is not a number."""
    given = splats(1, 80, 60)
    given.means2d.copy_(torch.tensor([[30.0, 31.0]]))
    given.radii.fill_(20)
    given.opacities.fill_(1e-3)
    given.conics.fill_(math.nan)
    needed, listed, _ = check(given, 80, 60)
    assert needed == listed == 64


@pytest.mark.parametrize("short", [True, False])
def test_squares_are_numbered_with_16_bits_or_32(
    monkeypatch: pytest.MonkeyPatch, short: bool
) -> None:
    given = splats(80, 100, 60, seed=3)
    monkeypatch.setattr(rasterize.tile_lists, "_SHORT", 7 * 4 if short else 7 * 4 - 1)
    sorted_types = []
    sort = torch.sort
    monkeypatch.setattr(torch, "sort", lambda t, **k: sorted_types.append(t.dtype) or sort(t, **k))
    needed, listed, _ = check(given, 100, 60)
    assert 100 < needed <= listed
    assert sorted_types == [torch.float32, torch.int16 if short else torch.int32]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [256, 257])
def test_as_many_squares_as_16_bits_count_and_more(rows: int) -> None:
    width, height = 256 * SQUARE, rows * SQUARE
    given = splats(2, width, height)
    given.means2d.copy_(torch.tensor([[4088.0, 4094.0], [4000.0, 4000.0]]))
    given.radii.fill_(60)
    given.conics.copy_(torch.tensor([[0.01, 0.0, 0.01]]).expand(2, 3))
    given.opacities.fill_(0.5)
    given = Splats(*(tensor.cuda() for tensor in given))
    pairs = pairs_of(tile_lists(*given, width, height))
    assert len(pairs) > 60 and pairs[-1] == (4 * 256 * rows - 1, 0)


def test_no_gradient_flows_and_views_are_fine() -> None:
    given = splats(40, 50, 40)
    want = tile_lists(*given, 50, 40)
    opacities = torch.stack([given.opacities, given.opacities], -1)[:, 0]
    means2d = given.means2d.clone().requires_grad_()
    got = tile_lists(*given._replace(means2d=means2d, opacities=opacities), 50, 40)
    assert torch.equal(got.gaussians, want.gaussians) and torch.equal(got.offsets, want.offsets)
    assert not got.gaussians.requires_grad


def test_the_host_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []

    def count(name: str) -> None:
        original = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda tensor: waits.append(name) or original(tensor))

    count("item")
    count("tolist")
    tile_lists(*splats(40, 50, 40), 50, 40)
    assert len(waits) == 1


@pytest.mark.gpu
def test_other_threads_reach_the_device_while_the_host_waits() -> None:
    given = Splats(*(t.cuda() for t in splats(1000, 160, 120)))
    tile_lists(*given, 160, 120)  # compiled, and its memory there
    torch.cuda.synchronize()
    waiting, longest = threading.Event(), [0.0]

    def work_beside() -> None:
        stream = torch.cuda.Stream()
        stream.record_event()
        waiting.wait()
        while waiting.is_set():
            start = time.perf_counter()
            stream.record_event().query()
            longest[0] = max(longest[0], time.perf_counter() - start)
            time.sleep(1e-3)

    beside = threading.Thread(target=work_beside)
    beside.start()
    waiting.set()
    torch.cuda._sleep(1_000_000_000)  # half a second
    start = time.perf_counter()
    tile_lists(*given, 160, 120)
    waited = time.perf_counter() - start
    waiting.clear()
    beside.join()
    assert waited > 0.2
    assert longest[0] < 0.3 * waited


def faint(gaussians: Scene) -> Scene:
    gaussians.opacities.mul_(0.02)
    return gaussians


def layers(gaussians: Scene) -> Scene:
    gaussians.opacities.clamp_min_(0.4)
    return gaussians


SCENES = {
    "mixed": lambda: scene(3000),
    "tiny": lambda: scene(3000, size=0.003, seed=1),
    "huge": lambda: scene(300, size=0.8, seed=2),
    "layers": lambda: layers(scene(2000, size=0.15, seed=3)),
    "faint": lambda: faint(scene(3000, seed=4)),
}


def draw_with_gsplat(gaussians: Scene, view: Camera, antialiased: bool) -> tuple[Tensor, ...]:
    """gsplat's own rendering: rgb, alpha, and the means2d that get its gradients."""
    from gsplat import rasterization

    image, alpha, info = rasterization(
        *gaussians[:5],
        view.viewmat[None],
        view.K[None],
        view.width,
        view.height,
        near_plane=0.01,
        far_plane=1e10,
        packed=False,
        absgrad=True,
        render_mode="RGB",
        rasterize_mode="antialiased" if antialiased else "classic",
    )
    return image[0], alpha[0], info["means2d"]


@pytest.mark.gpu
@pytest.mark.parametrize("antialiased", [False, True])
@pytest.mark.parametrize("view", [camera(160, 120), camera(97, 61, yaw=0.3), camera(1000, 700)])
@pytest.mark.parametrize("name", SCENES)
def test_the_image_is_gsplats_bit_by_bit(name: str, view: Camera, antialiased: bool) -> None:
    gaussians = SCENES[name]().to(torch.float32).to("cuda")
    view = view.to(torch.float32).to("cuda")
    ours, theirs = gaussians.leaves(), gaussians.leaves()
    rendering = draw(ours, view, absgrad=True, antialiased=antialiased)
    rgb, alpha, means2d = draw_with_gsplat(theirs, view, antialiased)
    assert rendering.alpha.any()
    assert torch.equal(rendering.alpha, alpha)
    assert torch.equal(rendering.rgb, rgb)

    random_loss(rendering.rgb, rendering.alpha).backward()
    random_loss(rgb, alpha).backward()
    # Sums over pixels, in another order. What the projection makes of them for needles, seen almost
    # from their tip, is all rounding: test_gsplat_parity.py has bounds for that.
    gradients = {
        name: (getattr(ours, name).grad, getattr(theirs, name).grad)
        for name in ("opacities", "colors")
    }
    gradients["means2d"] = (rendering.means2d_grad(), means2d.absgrad.reshape(-1, 2))
    for name, (got, want) in gradients.items():
        assert (got - want).abs().amax() <= 1e-3 * want.abs().amax(), name


@pytest.mark.gpu
def test_lists_on_the_gpu_are_fewer_and_in_gsplats_order() -> None:
    """What the kernels list when compiled, on more Gaussians than brute force could look at."""
    from gsplat.cuda._wrapper import isect_offset_encode, isect_tiles

    width, height = 1600, 1201
    given = Splats(*(t.cuda() for t in splats(100_000, width, height, size=2.0, seed=7)))
    if PER_AXIS:  # one that differs for each axis
        given = given._replace(radii=torch.stack([given.radii, given.radii // 2], -1))
    columns, rows = -(-width // SQUARE), -(-height // SQUARE)
    ours = tile_lists(*given, width, height)
    _, ids, order = isect_tiles(
        given.means2d[None], given.radii[None], given.depths[None], SQUARE, columns, rows
    )
    theirs = TileLists(isect_offset_encode(ids, 1, columns, rows), order)
    lists = dict.fromkeys(itertools.product(range(2 * rows), range(2 * columns)), ())
    listed = pairs_of(ours)
    for place, pairs in itertools.groupby(listed, key=lambda pair: pair[0]):
        lists[divmod(place, ours.offsets.shape[2])] = tuple(i for _, i in pairs)
    every = pairs_of(theirs)
    for place, pairs in itertools.groupby(every, key=lambda pair: pair[0]):
        row, column = divmod(place, columns)
        square = [i for _, i in pairs]
        for quarter in itertools.product((2 * row, 2 * row + 1), (2 * column, 2 * column + 1)):
            tile = lists.pop(quarter)
            kept = set(tile)
            assert len(kept) == len(tile)
            assert list(tile) == [i for i in square if i in kept]
    assert not any(lists.values())
    assert len(listed) < 0.5 * 4 * len(every)
