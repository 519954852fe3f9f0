"""Triton kernels of the row cache: rows over the link, settled leaves out, gradients in.

They do what ``csrc/kernels/rows.cpp`` does, with the same formulas (:class:`.AdamHistory`). A tile
is a few rows by all columns, so that each row is one contiguous piece of memory on either side of
the link. All pointers to rows are to ``[*, WIDTH]`` float32, or, of moments, int16 for bfloat16;
host arrays are page-locked.
"""

# Triton wants its block sizes and column numbers in capitals, as constants of the compilation.

from __future__ import annotations

import os
import threading
from contextlib import nullcontext
from typing import Any, NamedTuple

import triton
import triton.language as tl

from gsscale_nerfstudio.engines.color_kernels import (
    coefficient_gradients,
    color_table,
    store_colors,
)
from gsscale_nerfstudio.engines.colors import Viewpoint
from gsscale_nerfstudio.engines.leaf_kernels import load_leaves, store_leaves
from gsscale_nerfstudio.engines.moment_kernels import load_moment, round_moments, store_moment
from gsscale_nerfstudio.engines.pull_kernels import (
    OPACITY_SUM,
    SCALE_SUM,
    pull_length,
    pulled,
    sum_since,
)
from gsscale_nerfstudio.store import RowLayout

RUN_ON_CPU = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton then runs kernels on CPU tensors, in numpy: how they are tested without a GPU."""

LAUNCH = threading.Lock() if RUN_ON_CPU else nullcontext()
"""Held while a kernel is launched: Triton's interpreter cannot run in two threads at once."""


class Tile(NamedTuple):
    """How a kernel is cut into programs."""

    rows: int
    warps: int


# On an H200, of 1.4 M rows: 1.15 ms instead of 1.37 with 16 rows and 4 warps, and 1.33 instead of
# 1.64 with 16 and 4. More rows do not fit into registers.
GATHER = Tile(256 if RUN_ON_CPU else 4, 1)
STEP = Tile(256 if RUN_ON_CPU else 8, 4)
PACK = Tile(256 if RUN_ON_CPU else 16, 4)  # the link is slower than any of them

LINK_TILE = 256 if RUN_ON_CPU else 8
"""Rows that one program moves over the link at a time."""

LINK_PROGRAMS = 96
"""Programs that move rows over the link: they saturate it and leave the GPU to the others."""


def tile_of(layout: RowLayout, tile: Tile) -> dict[str, Any]:
    """The constants by which kernels find their way in a tile of rows."""
    return {
        "DEGREE": layout.sh_degree,
        "SH": layout.columns["features_dc"].start,
        "WIDTH": layout.width,
        "COLUMNS": triton.next_power_of_2(layout.width),
        "ROWS": tile.rows,
        "num_warps": tile.warps,
    }


def color_arguments(layout: RowLayout, viewpoint: Viewpoint) -> dict[str, Any]:
    """What kernels need to evaluate colours, or their derivatives."""
    position = viewpoint.position.detach()
    return {
        "table": color_table(layout, position.device),
        "position": position,
        "bands_end": viewpoint.bands_end(layout),
    }


@triton.jit(do_not_specialize=["n"])
def exchange_rows(
    host_w,
    host_m,
    host_v,
    cache_w,
    cache_m,
    cache_v,
    moves,
    n,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """For each of ``moves`` [n, 3], (row that comes, slot, row that leaves it), with -1 for none:
    write the row that leaves to the host, then read the one that comes."""
    column = tl.arange(0, COLUMNS)[None, :]
    inside = column < WIDTH
    # Few programs walk through all slots: the link is saturated by some dozen of them, and the
    # other multiprocessors are left to the rasterizer that runs at the same time.
    start = tl.program_id(0) * ROWS
    while start < n:
        i = start + tl.arange(0, ROWS)
        live = i < n
        coming = tl.load(moves + 3 * i, mask=live, other=-1).to(tl.int64)
        slot = tl.load(moves + 3 * i + 1, mask=live, other=0).to(tl.int64)
        leaving = tl.load(moves + 3 * i + 2, mask=live, other=-1).to(tl.int64)
        cached = slot[:, None] * WIDTH + column
        source = coming[:, None] * WIDTH + column
        target = leaving[:, None] * WIDTH + column
        reads = (coming >= 0)[:, None] & inside
        writes = (leaving >= 0)[:, None] & inside
        new_w = tl.load(host_w + source, mask=reads)
        new_m = tl.load(host_m + source, mask=reads)
        new_v = tl.load(host_v + source, mask=reads)
        tl.store(host_w + target, tl.load(cache_w + cached, mask=writes), mask=writes)
        tl.store(host_m + target, tl.load(cache_m + cached, mask=writes), mask=writes)
        tl.store(host_v + target, tl.load(cache_v + cached, mask=writes), mask=writes)
        tl.store(cache_w + cached, new_w, mask=reads)
        tl.store(cache_m + cached, new_m, mask=reads)
        tl.store(cache_v + cached, new_v, mask=reads)
        start += tl.num_programs(0) * ROWS


@triton.jit
def quotient(a, b):
    """a / b to two units in the last place: a sixth of the instructions of the exact one."""
    return a / b


@triton.jit
def root(x):
    """The square root, to as much."""
    return tl.sqrt(x)


@triton.jit
def _skip(
    stamp,
    step,
    column,
    inside,
    group,
    skip,
    tail,
    eps_scale,
    decay,
    log2_beta1,
    log2_beta2,
    HORIZON: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """S(s, t) of each element, and per row f, beta1^gap, beta2^gap; see ``skip_of`` in rows.cpp."""
    gap = step - stamp
    near = gap <= HORIZON
    k = tl.where(near, gap, 0)
    in_table = near[:, None] & inside
    beyond = (gap > HORIZON)[:, None] & inside
    s_near = tl.load(skip + k[:, None] * GROUPS + group, mask=in_table, other=0.0)
    s_far = tl.load(tail + stamp[:, None] * GROUPS + group, mask=beyond, other=0.0)
    f = tl.load(eps_scale + stamp)
    far = gap.to(tl.float32)
    d1 = tl.where(near, tl.load(decay + 2 * k), tl.exp2(far * log2_beta1))
    d2 = tl.where(near, tl.load(decay + 2 * k + 1), tl.exp2(far * log2_beta2))
    return s_near + s_far, f, d1, d2


@triton.jit
def _pulled(
    w, v, s, column, since, step, eps_f, d1, d2, sums, scale_weight, opacity_weight,
    m_share, v_decay,
):  # fmt: skip
    """See :func:`.pulled`, for a tile of settled rows; elements of other groups are left alone."""
    is_scale = (column >= 3) & (column < 6)
    weight = tl.where(is_scale, scale_weight, tl.where(column == 10, opacity_weight, 0.0))
    of_scales = sum_since(sums, since, step, SCALE_SUM)[:, None]
    of_opacities = sum_since(sums, since, step, OPACITY_SUM)[:, None]
    length = pull_length(tl.where(is_scale, of_scales, of_opacities), s, m_share)
    return pulled(w, v, length, is_scale, weight, eps_f, d1[:, None], d2[:, None], v_decay)


@triton.jit(do_not_specialize=["n", "step", "bands_end"])
def gather_leaves(
    cache_w,
    cache_m,
    cache_v,
    host_w,
    host_m,
    host_v,
    slots,
    rows,
    means,
    scales,
    quats,
    opacities,
    colors,
    slopes,
    offsets,
    table,
    position,
    bands_end,
    group_of,
    eps_of,
    skip,
    tail,
    eps_scale,
    decay,
    log2_beta1,
    log2_beta2,
    sums,
    scale_weight,
    opacity_weight,
    m_share,
    v_decay,
    step,
    n,
    FROM_HOST: tl.constexpr,
    SLOPES: tl.constexpr,
    NOISE: tl.constexpr,
    PULL: tl.constexpr,
    STAMP: tl.constexpr,
    DEGREE: tl.constexpr,
    SH: tl.constexpr,
    HORIZON: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Settled leaves of rows and their colours; the rows themselves stay as they are.

    With NOISE, ``offsets`` [n, 3] are added to the means; see ``noise_kernels.py``.
    Rows with a slot >= 0 come from the cache; the others, if FROM_HOST, from the host store.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = i < n
    column = tl.arange(0, COLUMNS)[None, :]
    inside = column < WIDTH
    slot = tl.load(slots + i, mask=live, other=0).to(tl.int64)
    cached = live & (slot >= 0)
    here = slot[:, None] * WIDTH + column
    take = cached[:, None] & inside
    w = tl.load(cache_w + here, mask=take, other=0.0)
    stamp = tl.load(cache_w + slot * WIDTH + STAMP, mask=cached, other=0.0)
    if FROM_HOST:
        absent = live & (slot < 0)
        row = tl.load(rows + i, mask=live, other=0).to(tl.int64)
        there = row[:, None] * WIDTH + column
        fetch = absent[:, None] & inside
        w += tl.load(host_w + there, mask=fetch, other=0.0)
        stamp += tl.load(host_w + row * WIDTH + STAMP, mask=absent, other=0.0)
    since = tl.where(live, stamp.to(tl.int32), step)
    behind = (since < step)[:, None]
    group = tl.load(group_of + column, mask=inside, other=0)
    eps = tl.load(eps_of + column, mask=inside, other=1.0)
    s, f, d1, d2 = _skip(
        since,
        step,
        column,
        inside,
        group,
        skip,
        tail,
        eps_scale,
        decay,
        log2_beta1,
        log2_beta2,
        HORIZON,
        GROUPS,
    )
    m = load_moment(cache_m + here, take & behind)
    v = load_moment(cache_v + here, take & behind)
    if FROM_HOST:
        m += load_moment(host_m + there, fetch & behind)
        v += load_moment(host_v + there, fetch & behind)
    # As the host rounds: a row looks the same, bit by bit, wherever it is settled to be looked at;
    # but where it is pulled at, which logarithms of many kinds do.
    w -= tl.div_rn(s * m, tl.sqrt_rn(v) + eps * f[:, None])
    if PULL:
        w, _m, _v = _pulled(
            w, v, s, column, since, step, eps * f[:, None], d1, d2, sums, scale_weight,
            opacity_weight, m_share, v_decay,
        )  # fmt: skip
    if NOISE:
        means_at = i[:, None].to(tl.int64) * 3 + column
        w += tl.load(offsets + means_at, mask=live[:, None] & (column < 3), other=0.0)
    store_leaves(w, column, i, live, means, scales, quats, opacities)
    store_colors(
        w, column, i, live, n, table, position, bands_end, colors, slopes, SLOPES, DEGREE, SH
    )


@triton.jit(do_not_specialize=["n", "step", "bands_end"])
def settle_and_step_rows(
    cache_w,
    cache_m,
    cache_v,
    slots,
    spheres,
    offsets,
    g_means,
    g_scales,
    g_quats,
    g_opacities,
    g_colors,
    means,
    norms,
    seen,
    radii,
    table,
    position,
    bands_end,
    group_of,
    eps_of,
    reach_of,
    step_size_of_group,
    skip,
    tail,
    eps_scale,
    decay,
    log2_beta1,
    log2_beta2,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    inv_sqrt_bias2,
    sums,
    scale_weight,
    opacity_weight,
    m_share,
    v_decay,
    step,
    n,
    HAS_STATISTICS: tl.constexpr,
    NOISE: tl.constexpr,
    PULL: tl.constexpr,
    STAMP: tl.constexpr,
    GRAD2D: tl.constexpr,
    COUNT: tl.constexpr,
    MAX_RADIUS: tl.constexpr,
    KEY: tl.constexpr,
    DEGREE: tl.constexpr,
    SH: tl.constexpr,
    HORIZON: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Settle cached rows to step t and apply Adam step t + 1, in place; new spheres [n, 4] out.

    With NOISE, ``offsets`` [n, 3] are added to the settled means; see ``noise_kernels.py``.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = i < n
    column = tl.arange(0, COLUMNS)[None, :]
    inside = column < WIDTH
    slot = tl.load(slots + i, mask=live, other=0).to(tl.int64)
    at = slot[:, None] * WIDTH + column
    take = live[:, None] & inside
    w = tl.load(cache_w + at, mask=take, other=0.0)
    m = load_moment(cache_m + at, take)
    v = load_moment(cache_v + at, take)
    stamp = tl.load(cache_w + slot * WIDTH + STAMP, mask=live, other=0.0).to(tl.int32)
    stamp = tl.where(live, stamp, step)
    group = tl.load(group_of + column, mask=inside, other=0)
    eps = tl.load(eps_of + column, mask=inside, other=1.0)
    s, f, d1, d2 = _skip(
        stamp,
        step,
        column,
        inside,
        group,
        skip,
        tail,
        eps_scale,
        decay,
        log2_beta1,
        log2_beta2,
        HORIZON,
        GROUPS,
    )
    w -= quotient(s * m, root(v) + eps * f[:, None])
    before = v
    m *= d1[:, None]
    v *= d2[:, None]
    if PULL:
        w, more_m, more_v = _pulled(
            w, before, s, column, stamp, step, eps * f[:, None], d1, d2, sums, scale_weight,
            opacity_weight, m_share, v_decay,
        )  # fmt: skip
        m += more_m
        v += more_v

    row_of = i.to(tl.int64)
    row = row_of[:, None]
    if NOISE:
        w += tl.load(offsets + row * 3 + column, mask=take & (column < 3), other=0.0)
    g = load_leaves(column, i, live, g_means, g_scales, g_quats, g_opacities)
    g += coefficient_gradients(
        column, i, live, means, position, table, bands_end, g_colors, DEGREE, SH
    )

    step_size = tl.load(step_size_of_group + group, mask=inside, other=0.0)
    m += (g - m) * one_minus_beta1
    v = v * beta2 + g * g * one_minus_beta2
    w -= quotient(step_size * m, root(v) * inv_sqrt_bias2 + eps)
    # Denormals would never end decaying.
    m = tl.where(tl.abs(m) < 1.17549435e-38, 0.0, m)
    v = tl.where(v < 1.17549435e-38, 0.0, v)
    m, v = round_moments(cache_m, m, v, cache_w + slot * WIDTH + KEY, live, column, step + 1)

    w = tl.where(column == STAMP, (step + 1).to(tl.float32), w)
    if HAS_STATISTICS:
        norm = tl.load(norms + i, mask=live, other=0.0)[:, None]
        times = tl.load(seen + i, mask=live, other=0.0)[:, None]
        radius = tl.load(radii + i, mask=live, other=0.0)[:, None]
        w += tl.where(column == GRAD2D, norm, 0.0) + tl.where(column == COUNT, times, 0.0)
        w = tl.where((column == MAX_RADIUS) & (radius > w), radius, w)
    tl.store(cache_w + at, w, mask=take)
    store_moment(cache_m + at, m, take)
    store_moment(cache_v + at, v, take)

    # The culler's sphere, as write_sphere in rows.cpp: room for all that skipped steps can add.
    now = tl.load(eps_scale + step)
    reach = tl.load(reach_of + column, mask=inside, other=0.0)
    motion = quotient(reach * m, root(v) + eps * now)
    is_mean = column < 3
    is_scale = (column >= 3) & (column < 6)
    tl.store(spheres + row * 4 + column, w, mask=take & is_mean)
    moved = tl.sum(tl.where(is_mean, motion * motion, 0.0), 1)
    distance = tl.sum(tl.where(is_mean, tl.abs(w), 0.0), 1)
    grown = tl.where(motion < 0.0, w - motion, w)
    # The culler keeps what is not a number, which a maximum would lose.
    odd = tl.sum(tl.where(is_scale, grown - grown, 0.0), 1)
    largest = tl.max(tl.where(is_scale, grown, float("-inf")), 1) + odd
    radius = 3.3301 * tl.exp(largest) + root(moved) + 1e-6 * distance
    tl.store(spheres + 4 * row_of + 3, radius, mask=live)
