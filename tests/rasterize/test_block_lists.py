"""Block lists: nothing that shows may be missing, nothing that gsplat would not draw may appear."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gsscale_nerfstudio.rasterize.block_lists import BLOCK, block_batches, grid_size

from .slow_compositing import in_tile


def lists(width: int, height: int, *tensors: Tensor) -> dict[int, list[int]]:
    """Block -> its Gaussians, padding removed; every block appears at most once."""
    result: dict[int, list[int]] = {}
    n = len(tensors[0])
    for blocks, rows in block_batches(*tensors, width, height):
        for block, row in zip(blocks.tolist(), rows.tolist(), strict=True):
            assert block not in result
            result[block] = [i for i in row if i != n]
            assert row == result[block] + [n] * (len(row) - len(result[block]))
    return result


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    log_size=st.floats(-0.5, 5),
    aspect=st.floats(1, 200),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    per_axis=st.booleans(),
)
def test_lists_are_complete_sorted_and_within_gsplats_tiles(
    seed: int,
    width: int,
    height: int,
    log_size: float,
    aspect: float,
    dtype: torch.dtype,
    per_axis: bool,
) -> None:
    n = 20
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(8, n, generator=generator, dtype=torch.float64)
    means2d = torch.stack([(2 * uniform[0] - 0.5) * width, (2 * uniform[1] - 0.5) * height], -1)
    sharp, long = math.exp(log_size) * torch.ones(n), aspect * math.exp(log_size) * uniform[2]
    cos, sin = (3.2 * uniform[3]).cos(), (3.2 * uniform[3]).sin()
    xx = cos**2 * sharp**2 + sin**2 * long**2 + 0.3
    yy = sin**2 * sharp**2 + cos**2 * long**2 + 0.3
    xy = cos * sin * (sharp**2 - long**2)
    det = xx * yy - xy * xy
    conics = torch.stack([yy, -xy, xx], -1) / det[:, None]
    sides = (3 * torch.stack([xx, yy], -1).sqrt()).ceil().int() * (uniform[4] > 0.1).int()[:, None]
    radii = sides if per_axis else sides.amax(1)
    depths = (1 + 6 * uniform[5]).round()  # many equal depths
    means2d, conics, opacities, depths = (
        tensor.to(dtype) for tensor in (means2d, conics, uniform[6], depths)
    )

    found = lists(width, height, means2d, conics, opacities, depths, radii)

    columns, lines = grid_size(width, height)
    centres = torch.stack(
        torch.meshgrid(torch.arange(width) + 0.5, torch.arange(height) + 0.5, indexing="xy"), -1
    ).to(dtype)
    delta = means2d - centres[:, :, None]
    a, b, c = conics.unbind(-1)
    dx, dy = delta.unbind(-1)
    alpha = opacities * torch.exp(-0.5 * (a * dx * dx + c * dy * dy) - b * dx * dy)
    for block in range(columns * lines):
        row = found.get(block, [])
        assert row == sorted(row, key=lambda i: (depths[i].item(), i))
        x, y = block % columns * BLOCK, block // columns * BLOCK
        shows = (alpha[y : y + BLOCK, x : x + BLOCK] >= 1 / 255).any(0).any(0)
        for i in range(n):
            reach = radii[i].expand(2).tolist()
            drawn = reach[0] > 0 and in_tile(means2d[i].tolist(), reach, x // 16, y // 16)
            if i in row:
                assert drawn
            elif drawn:
                assert not shows[i]
    assert not found.keys() - set(range(columns * lines))


def test_blocks_without_a_visible_trace_are_left_out() -> None:
    """The point of blocks: a small Gaussian in a tile's corner concerns one of four."""
    found = lists(
        32,
        32,
        torch.tensor([[4.0, 4.0]]),
        torch.tensor([[1.0, 0.0, 1.0]]),
        torch.tensor([0.5]),
        torch.tensor([1.0]),
        torch.tensor([3], dtype=torch.int32),
    )
    assert found == {0: [0]}


def test_tiles_that_the_square_does_not_touch_are_left_out() -> None:
    """Even where alpha would be above 1/255: gsplat cuts off there, visibly."""
    found = lists(
        48,
        48,
        torch.tensor([[24.0, 24.0]]),
        torch.tensor([[0.01, 0.0, 0.01]]),
        torch.tensor([0.9]),
        torch.tensor([1.0]),
        torch.tensor([3], dtype=torch.int32),
    )
    assert found == {6 * y + x: [0] for y in (2, 3) for x in (2, 3)}


def test_a_rectangle_without_an_area_is_left_out() -> None:
    found = lists(
        32,
        32,
        torch.tensor([[4.0, 4.0]]).expand(3, 2),
        torch.tensor([[1.0, 0.0, 1.0]]).expand(3, 3),
        torch.tensor([0.5]).expand(3),
        torch.tensor([1.0]).expand(3),
        torch.tensor([[3, 0], [3, 3], [0, 3]], dtype=torch.int32),
    )
    assert found == {0: [1]}


@pytest.mark.parametrize("far_away", [1e20, -1e20, math.inf])
def test_edges_beyond_the_range_of_integers(far_away: float) -> None:
    found = lists(
        16,
        16,
        torch.tensor([[far_away, 8.0], [8.0, 8.0]]),
        torch.tensor([[1e-12, 0.0, 1e-12]]).expand(2, 3),
        torch.tensor([0.5, 0.5]),
        torch.tensor([1.0, 2.0]),
        torch.tensor([2**30, 2**30], dtype=torch.int32),
    )
    assert found == {block: [1] for block in range(4)}
