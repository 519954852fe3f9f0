"""Front-to-back alpha compositing of projected Gaussians, with a hand-written backward.

At pixel centre p, with d = mean2d - p and (a, b, c) the conic, Gaussian i has

    sigma_i = (a d_x^2 + c d_y^2) / 2 + b d_x d_y,    alpha_i = min(0.999, o_i exp(-sigma_i))

and is skipped if sigma_i < 0 or alpha_i < 1/255. In order of depth, T_1 = 1,
T_{i+1} = T_i (1 - alpha_i), compositing stops before the Gaussian that would bring
T_{i+1} <= 1e-4. With w_i = alpha_i T_i, over those that are left,

    colour = sum_i w_i c_i,    alpha = 1 - T_end

Backward, with g the gradient of a pixel's colour, h that of its alpha, and D_i = g . c_i:

    dL/dc_i     = w_i g
    B_i         = sum_{j > i} w_j D_j - h T_end                    (what lies behind i)
    dL/dalpha_i = T_i D_i - B_i / (1 - alpha_i)
    dL/dsigma_i = -alpha_i dL/dalpha_i = alpha_i / (1 - alpha_i) B_i - w_i D_i =: v_i

v_i is zero where o_i exp(-sigma_i) > 0.999. Everything else follows from v's moments over the
pixels: dL/do = -sum v / o, dL/da = sum v d_x^2 / 2, dL/db = sum v d_x d_y,
dL/dc = sum v d_y^2 / 2, dL/dmean2d = sum v (a d_x + b d_y, b d_x + c d_y). The sum of the
absolute values of the last line's terms is the absolute gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .block_lists import BLOCK, MIN_ALPHA, BlockBatch, block_batches, grid_size

MAX_ALPHA = 0.999
MIN_TRANSMITTANCE = 1e-4


def composite(
    means2d: Tensor,
    conics: Tensor,
    colors: Tensor,
    opacities: Tensor,
    depths: Tensor,
    radii: Tensor,
    width: int,
    height: int,
    *,
    absgrad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Composite ``n`` projected Gaussians into an image.

    Differentiable with respect to ``means2d``, ``conics``, ``colors`` and ``opacities``.

    Args:
        means2d: Projected means in pixels. With ``absgrad``, backward sets the attribute
            ``absgrad``, [n, 2], on this very tensor. [n, 2]
        conics: Inverse 2D covariances (xx, xy, yy), in 1 / pixel^2. [n, 3]
        colors: Any number of channels. [n, C]
        opacities: In [0, 1]. [n]
        depths: What to sort by. [n]
        radii: Half the side of gsplat's square, or halves of both sides, in pixels; 0 for a
            Gaussian that is not drawn. [n] or [n, 2] int32
        width: Image width in pixels.
        height: Image height in pixels.
        absgrad: Whether to compute the absolute gradient of ``means2d``.

    Returns:
        The composited colours, [H, W, C], and alphas, [H, W, 1].
    """
    with torch.no_grad():
        batches = block_batches(means2d, conics, opacities, depths, radii, width, height)
    image: Tensor = _Composite.apply(
        means2d, conics, colors, opacities, batches, width, height, absgrad
    )
    return image[..., :-1].contiguous(), image[..., -1:].contiguous()


class _Composite(torch.autograd.Function):
    """Image of colours and, as the last channel, alpha; [H, W, C + 1]."""

    @staticmethod
    def forward(
        ctx: Any,
        means2d: Tensor,
        conics: Tensor,
        colors: Tensor,
        opacities: Tensor,
        batches: list[BlockBatch],
        width: int,
        height: int,
        absgrad: bool,
    ) -> Tensor:
        ctx.save_for_backward(means2d, conics, colors, opacities)
        ctx.batches, ctx.absgrad = batches, absgrad
        table = _table(means2d, conics, opacities, colors)
        columns, lines = grid_size(width, height)
        image = table.new_zeros(columns * lines, BLOCK * BLOCK, colors.shape[1] + 1)
        for batch in batches:
            drawn = _Drawn(batch, table, columns)
            image[batch.blocks, :, :-1] = drawn.weights @ drawn.colors.transpose(1, 2)
            image[batch.blocks, :, -1] = 1 - drawn.transmittance
        return _from_blocks(image, columns, width, height)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        means2d, conics, colors, opacities = ctx.saved_tensors
        table = _table(means2d, conics, opacities, colors)
        columns, _ = grid_size(grad.shape[1], grad.shape[0])
        grads = _to_blocks(grad)
        # Rows: the six moments of v, the two absolute gradients, the colours.
        total = table.new_zeros(8 + colors.shape[1], table.shape[1])
        for batch in ctx.batches:
            drawn = _Drawn(batch, table, columns)
            sums = drawn.backward(grads[batch.blocks], ctx.absgrad)
            total.index_add_(1, batch.rows.flatten(), sums.flatten(1))

        total = total[:, :-1]
        v, vx, vy, vxx, vxy, vyy = total[:6]
        a, b, c = conics.unbind(-1)
        if ctx.absgrad:
            means2d.absgrad = total[6:8].T.contiguous()
        return (
            torch.stack([a * vx + b * vy, b * vx + c * vy], -1),
            torch.stack([vxx / 2, vxy, vyy / 2], -1),
            total[8:].T,
            # Without opacity a Gaussian is drawn nowhere, and v is zero too.
            torch.where(opacities > 0, -v / opacities, 0),
            *(None,) * 4,
        )


class _Drawn:
    """A batch of ``B`` blocks composited: P = 64 pixels each, lists of L Gaussians.

    Backward makes it anew instead of keeping it: the arrays of the whole image would not fit the
    cache, nor, in a large view, the memory.

    Attributes:
        weights: w_i at every pixel. [B, P, L]
        colors: Of the listed Gaussians. [B, C, L]
        transmittance: T_end. [B, P]
    """

    def __init__(self, batch: BlockBatch, table: Tensor, columns: int) -> None:
        size, length = batch.rows.shape
        listed = table.index_select(1, batch.rows.flatten()).view(-1, size, length)
        x, y, self._a, self._b, self._c, opacity = listed[:6, :, None]
        self.colors = listed[6:].transpose(0, 1)
        centres = torch.arange(BLOCK, device=table.device) + 0.5
        # Distances along x, [B, 8, L], and along y, [B, 8, L]: all else is their outer product.
        self._dx = x - (batch.blocks[:, None] % columns * BLOCK + centres)[..., None]
        self._dy = y - (batch.blocks[:, None] // columns * BLOCK + centres)[..., None]

        exponent = (-0.5 * self._a * self._dx.square())[:, None] + (
            -0.5 * self._c * self._dy.square()
        )[:, :, None]
        exponent.addcmul_((-self._b * self._dy)[:, :, None], self._dx[:, None])
        exponent = exponent.view(size, BLOCK * BLOCK, length)
        # The masks below cost as much as all the arithmetic, and most batches need none of them.
        if exponent.amax() > 0:
            exponent.masked_fill_(exponent > 0, -torch.inf)
        alpha = exponent.exp_().mul_(opacity)
        self._clamped = alpha > MAX_ALPHA if opacity.amax() > MAX_ALPHA else None
        if self._clamped is not None:
            alpha.clamp_max_(MAX_ALPHA)
        torch.threshold_(alpha, _just_below(MIN_ALPHA, alpha.dtype), 0.0)

        after = torch.cumprod(1 - alpha, -1)
        if after[..., -1].amin() <= MIN_TRANSMITTANCE:
            stopped = after <= MIN_TRANSMITTANCE
            alpha.masked_fill_(stopped, 0)
            # T only falls, so its smallest value before the stop is the last one.
            self.transmittance = after.masked_fill(stopped, 1).amin(-1)
        else:
            self.transmittance = after[..., -1]
        self._alpha = alpha
        self.weights = alpha.clone()
        self.weights[..., 1:] *= after[..., :-1]

    def backward(self, grad: Tensor, absgrad: bool) -> Tensor:
        """Sums over each block's pixels, for a pixel gradient of [B, P, C + 1].

        Returns:
            sum v times (1, d_x, d_y, d_x^2, d_x d_y, d_y^2), the absolute gradient of mean2d in
            x and y, and that of the colours. [8 + C, B, L]
        """
        g, h = grad[..., :-1], grad[..., -1]
        weighted = (g @ self.colors).mul_(self.weights)
        behind = torch.empty_like(weighted)
        behind[..., 0] = -h * self.transmittance
        behind[..., 1:] = weighted[..., 1:].flip(-1)
        behind = behind.cumsum(-1).flip(-1)
        v = behind.mul_(self._alpha / (1 - self._alpha)).sub_(weighted)
        if self._clamped is not None:
            v.masked_fill_(self._clamped, 0)

        dx, dy = self._dx, self._dy
        v = v.unflatten(1, (BLOCK, BLOCK))
        along_x, along_y, along_y_dx = v.sum(1), v.sum(2), (v * dx[:, None]).sum(2)
        moments = [
            along_x.sum(1),
            (along_x * dx).sum(1),
            (along_y * dy).sum(1),
            (along_x * dx * dx).sum(1),
            (along_y_dx * dy).sum(1),
            (along_y * dy * dy).sum(1),
        ]
        if absgrad:
            v.abs_()
            for at_x, at_y in ((self._a, self._b), (self._b, self._c)):
                slope = (at_x * dx)[:, None] + (at_y * dy)[:, :, None]
                moments.append(slope.abs_().mul_(v).sum((1, 2)))
        else:
            moments += [torch.zeros_like(moments[0])] * 2
        color_grads = (g.transpose(1, 2) @ self.weights).transpose(0, 1)
        return torch.cat([torch.stack(moments), color_grads])


def _table(means2d: Tensor, conics: Tensor, opacities: Tensor, colors: Tensor) -> Tensor:
    """All that a pixel needs of a Gaussian, one column each, and a last, transparent column
    that list padding refers to. [6 + C, n + 1]"""
    return F.pad(torch.cat([means2d, conics, opacities[:, None], colors], 1).T, (0, 1))


def _from_blocks(blocks: Tensor, columns: int, width: int, height: int) -> Tensor:
    """[number of blocks, P, C] -> [H, W, C]"""
    image = blocks.view(-1, columns, BLOCK, BLOCK, blocks.shape[-1]).transpose(1, 2)
    return image.reshape(-1, columns * BLOCK, blocks.shape[-1])[:height, :width]


def _to_blocks(image: Tensor) -> Tensor:
    """[H, W, C] -> [number of blocks, P, C], zeros where a block sticks out of the image."""
    height, width, channels = image.shape
    columns, lines = grid_size(width, height)
    padded = F.pad(image, (0, 0, 0, columns * BLOCK - width, 0, lines * BLOCK - height))
    blocks = padded.view(lines, BLOCK, columns, BLOCK, channels).transpose(1, 2)
    return blocks.reshape(-1, BLOCK * BLOCK, channels)


def _just_below(value: float, dtype: torch.dtype) -> float:
    """The largest number of ``dtype`` smaller than ``value`` is in it."""
    return torch.nextafter(
        torch.tensor(value, dtype=dtype), torch.tensor(-math.inf, dtype=dtype)
    ).item()
