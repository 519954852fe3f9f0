"""Which Gaussians a block of pixels has to composite, front to back, batched for vector code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 16
"""Side, in pixels, of gsplat's tiles: a Gaussian is drawn into whole tiles."""

BLOCK = 8
"""Side, in pixels, of our blocks, four to a tile: the smaller, the less is computed in vain."""

MIN_ALPHA = 1 / 255
"""Fainter contributions to a pixel are skipped."""

_BATCH_ELEMENTS = 2**18
"""Pixel-Gaussian pairs per batch: temporaries stay in the cache, call overhead stays small."""


class BlockBatch(NamedTuple):
    """Blocks with lists of similar length, padded to the longest.

    Attributes:
        blocks: Row-major indices of the blocks. [B] int64
        rows: Indices of their Gaussians, front to back; ``n``, one past the last, is padding.
            [B, L] int64
    """

    blocks: Tensor
    rows: Tensor


def grid_size(width: int, height: int) -> tuple[int, int]:
    """Columns and rows of blocks that cover an image; the last ones may stick out."""
    return -(-width // BLOCK), -(-height // BLOCK)


def block_batches(
    means2d: Tensor,
    conics: Tensor,
    opacities: Tensor,
    depths: Tensor,
    radii: Tensor,
    width: int,
    height: int,
) -> list[BlockBatch]:
    """List, for every block of the image, the Gaussians to composite, nearest first.

    gsplat draws a Gaussian into every tile that its rectangle, mean +- radii, touches:
    floor(mean/16 - radius/16) <= tile < ceil(mean/16 + radius/16). Of such a tile, blocks
    are left out that lie outside of the box in which the Gaussian's alpha can reach 1/255, since
    it would be skipped at each of their pixels: the result is the same, with less work.

    Args:
        means2d: Projected means in pixels. [n, 2]
        conics: Inverse 2D covariances (xx, xy, yy). [n, 3]
        opacities: In [0, 1]. [n]
        depths: What to sort by; equal depths keep their order. [n]
        radii: Half the side of gsplat's square, or halves of both sides, in pixels; 0 if the
            Gaussian is not drawn. [n] or [n, 2] int32
        width: Image width in pixels.
        height: Image height in pixels.
    """
    radii = radii.view(len(radii), -1)
    drawn = (radii > 0).all(1).nonzero().squeeze(1)
    order = drawn[torch.argsort(depths[drawn], stable=True)]
    mean, radius = means2d[order], radii[order].to(means2d.dtype)
    reach = _reach(conics[order], opacities[order])
    low = torch.maximum(
        (mean / TILE - radius / TILE).floor() * (TILE // BLOCK), ((mean - reach) / BLOCK).floor()
    )
    high = torch.minimum(
        (mean / TILE + radius / TILE).ceil() * (TILE // BLOCK), ((mean + reach) / BLOCK).ceil()
    )
    columns, lines = grid_size(width, height)
    # Clamped as floats: a far-away edge may not fit an integer.
    limit = mean.new_tensor([columns, lines])
    low = low.clamp_min(0).minimum(limit).long()
    span = (high.clamp_min(0).minimum(limit).long() - low).clamp_min(0)

    # One entry per Gaussian and block, in depth order; a stable sort by block keeps that order.
    counts = span.prod(-1)
    source = torch.repeat_interleave(counts)
    if source.numel() == 0:
        return []
    nth = torch.arange(len(source), device=source.device) - (counts.cumsum(0) - counts)[source]
    line = low[source, 1] + nth // span[source, 0]
    column = low[source, 0] + nth % span[source, 0]
    block, by_block = torch.sort(line * columns + column, stable=True)
    lengths = torch.bincount(block, minlength=columns * lines)
    return list(_pad(order[source[by_block]], lengths, padding=len(radii)))


def _reach(conics: Tensor, opacities: Tensor) -> Tensor:
    """Half the box, in pixels, outside of which opacity exp(-sigma) < 1/255. [m, 2]

    With s = ln(255 opacity), the ellipse sigma = s extends to sqrt(2 s C_xx) along x, where C is
    the inverse of the conic. Where rounding spoils that inverse, the reach is infinite.
    """
    xx, xy, yy = conics.unbind(-1)
    det = xx * yy - xy * xy
    level = (opacities / MIN_ALPHA).log().clamp_min(0)
    reach = (2 * level / det)[:, None].mul(torch.stack([yy, xx], -1)).sqrt()
    # The margins cover what rounding can do to alpha at such a determinant.
    return torch.where((det > 1e-3 * xx * yy)[:, None], reach * 1.01 + 0.1, torch.inf)


def _pad(rows: Tensor, lengths: Tensor, padding: int) -> Iterator[BlockBatch]:
    """Cut the concatenated lists ``rows`` into batches of blocks, longest lists first."""
    starts = lengths.cumsum(0) - lengths
    by_length = torch.argsort(lengths, descending=True)
    descending = lengths[by_length]
    remaining, first = int((lengths > 0).sum()), 0
    while first < remaining:
        longest = int(descending[first])
        size = max(1, _BATCH_ELEMENTS // (longest * BLOCK * BLOCK))
        blocks = by_length[first : min(first + size, remaining)]
        nth = torch.arange(longest, device=rows.device)
        at = (starts[blocks, None] + nth).clamp_max(len(rows) - 1)
        yield BlockBatch(blocks, torch.where(nth < lengths[blocks, None], rows[at], padding))
        first += size
