"""Triton kernels for noise on means: what ``csrc/kernels/noise.h`` does, for rows in GPU memory.

Random numbers are the same ones, Philox of the row as it is stored; what makes normal ones of them
rounds differently here and there. One thread has a row: with a row in a warp's hands, as in
``kernels.py``, all of its threads would draw the same numbers.
"""

# Triton wants its block sizes and column numbers in capitals, as constants of the compilation.

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from gsscale_nerfstudio.engines.kernels import LAUNCH
from gsscale_nerfstudio.engines.moment_kernels import load_moment
from gsscale_nerfstudio.engines.pull_kernels import (
    OPACITY_SUM,
    SCALE_SUM,
    VARIANCE_SUM,
    pull_length,
    pulled,
    sum_since,
)
from gsscale_nerfstudio.engines.slot_kernels import SLOTS, Arrays, settled_element, skipped
from gsscale_nerfstudio.optim.device_tables import DeviceTables
from gsscale_nerfstudio.store import GROUPS, RowLayout

_SKIPPED = tl.constexpr(0)
_OWN = tl.constexpr(1)
"""Two independent draws of a stored row: for steps that it skips, and for its own next step."""

_SCALES = tl.constexpr(GROUPS.index("scales"))
_QUATS = tl.constexpr(GROUPS.index("quats"))
_OPACITIES = tl.constexpr(GROUPS.index("opacities"))


@triton.jit
def _uniform(x):
    """In (0, 1), never an end of it."""
    return ((x >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def _normals(x, y, z, stamp, key, WHICH: tl.constexpr):
    """Three standard normal numbers of each row, given its mean, stamp and key as stored."""
    seed = key.to(tl.uint32, bitcast=True).to(tl.uint64) + (tl.full([], WHICH, tl.uint64) << 32)
    a, b, c, d = tl.philox(
        seed,
        x.to(tl.uint32, bitcast=True),
        y.to(tl.uint32, bitcast=True),
        z.to(tl.uint32, bitcast=True),
        stamp.to(tl.uint32, bitcast=True),
    )
    far, turn = tl.sqrt(-2.0 * tl.log(_uniform(a))), 6.28318531 * _uniform(b)
    third = tl.sqrt(-2.0 * tl.log(_uniform(c))) * tl.cos(6.28318531 * _uniform(d))
    return far * tl.cos(turn), far * tl.sin(turn), third


@triton.jit
def _faintness(logit):
    """gsplat's share of the noise by opacity; none from 0.3 on, where it would be below 2e-13."""
    opacity = 1.0 / (1.0 + tl.exp(-logit))
    share = 1.0 / (1.0 + tl.exp(tl.minimum(100.0 * (opacity - 0.005), 80.0)))
    return tl.where(logit > -0.85, 0.0, share)


@triton.jit
def _offset(a, b, c, r, x, y, t, logit, z0, z1, z2, deviation):
    """R S S z g, times the deviation; of log-scales, quaternion, logit and normal numbers."""
    amount = deviation * _faintness(logit)
    a, b, c = tl.exp(2.0 * a) * z0, tl.exp(2.0 * b) * z1, tl.exp(2.0 * c) * z2
    unit = 1.0 / tl.sqrt(r * r + x * x + y * y + t * t)
    r, x, y, t = r * unit, x * unit, y * unit, t * unit
    d0 = (1 - 2 * (y * y + t * t)) * a + 2 * (x * y - r * t) * b + 2 * (x * t + r * y) * c
    d1 = 2 * (x * y + r * t) * a + (1 - 2 * (x * x + t * t)) * b + 2 * (y * t - r * x) * c
    d2 = 2 * (x * t - r * y) * a + 2 * (y * t + r * x) * b + (1 - 2 * (x * x + y * y)) * c
    return amount * d0, amount * d1, amount * d2


@triton.jit
def _stored(w, at, host_w, there, cached, absent, FROM_HOST: tl.constexpr):
    """An element of each row as it is stored, in the cache or on the host."""
    value = tl.load(w + at, mask=cached, other=0.0)
    if FROM_HOST:
        value += tl.load(host_w + there, mask=absent, other=0.0)
    return value


@triton.jit
def _settled(
    w, m, v, at, host_w, host_m, host_v, there, cached, absent, group, column, since, step, eps_of,
    skip, tail, eps_scale, FROM_HOST: tl.constexpr, HORIZON: tl.constexpr, N_GROUPS: tl.constexpr,
):  # fmt: skip
    """An element of each row as it would be if the row were settled, but for noise and pull."""
    eps = tl.load(eps_of + column)
    value = settled_element(
        w, m, v, at + column, cached, group, since, step, eps, skip, tail, eps_scale, HORIZON,
        N_GROUPS,
    )  # fmt: skip
    if FROM_HOST:
        value += settled_element(
            host_w, host_m, host_v, there + column, absent, group, since, step, eps, skip, tail,
            eps_scale, HORIZON, N_GROUPS,
        )  # fmt: skip
    return value


@triton.jit
def _pulled_at(
    value, v, at, host_v, there, cached, absent, column, length, is_scale, weight, eps_of, f, d2,
    v_decay, FROM_HOST: tl.constexpr,
):  # fmt: skip
    """A settled element of each row, pulled at."""
    second = load_moment(v + at + column, cached)
    if FROM_HOST:
        second += load_moment(host_v + there + column, absent)
    eps_f = tl.load(eps_of + column) * f
    value, _m, _v = pulled(value, second, length, is_scale, weight, eps_f, 1.0, d2, v_decay)
    return value


@triton.jit(do_not_specialize=["n", "step"])
def _draw(
    w, m, v, host_w, host_m, host_v, slots, rows, offsets, own, skip, tail, eps_scale, eps_of,
    sums, scale_weight, opacity_weight, m_share, v_decay, log2_beta2, step, n,
    FROM_HOST: tl.constexpr, DRAW_OWN: tl.constexpr, PULL: tl.constexpr, STAMP: tl.constexpr,
    KEY: tl.constexpr, HORIZON: tl.constexpr, N_GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = i < n
    slot = tl.load(slots + i, mask=live, other=0).to(tl.int64)
    cached, absent = live & (slot >= 0), live & (slot < 0)
    at = tl.where(cached, slot, 0) * WIDTH
    there = at
    if FROM_HOST:
        there = tl.load(rows + i, mask=absent, other=0).to(tl.int64) * WIDTH
    x = _stored(w, at, host_w, there, cached, absent, FROM_HOST)
    y = _stored(w, at + 1, host_w, there + 1, cached, absent, FROM_HOST)
    z = _stored(w, at + 2, host_w, there + 2, cached, absent, FROM_HOST)
    key = _stored(w, at + KEY, host_w, there + KEY, cached, absent, FROM_HOST)
    stamp = _stored(w, at + STAMP, host_w, there + STAMP, cached, absent, FROM_HOST)
    since = tl.where(live, stamp.to(tl.int32), step)
    z0, z1, z2 = _normals(x, y, z, stamp, key, _SKIPPED)

    s0 = _settled(
        w, m, v, at, host_w, host_m, host_v, there, cached, absent, _SCALES, 3, since, step, eps_of,
        skip, tail, eps_scale, FROM_HOST, HORIZON, N_GROUPS,
    )  # fmt: skip
    s1 = _settled(
        w, m, v, at, host_w, host_m, host_v, there, cached, absent, _SCALES, 4, since, step, eps_of,
        skip, tail, eps_scale, FROM_HOST, HORIZON, N_GROUPS,
    )  # fmt: skip
    s2 = _settled(
        w, m, v, at, host_w, host_m, host_v, there, cached, absent, _SCALES, 5, since, step, eps_of,
        skip, tail, eps_scale, FROM_HOST, HORIZON, N_GROUPS,
    )  # fmt: skip
    q0 = _settled(
        w, m, v, at, host_w, host_m, host_v, there, cached, absent, _QUATS, 6, since, step, eps_of,
        skip, tail, eps_scale, FROM_HOST, HORIZON, N_GROUPS,
    )  # fmt: skip
    q1 = _settled(
        w, m, v, at, host_w, host_m, host_v, there, cached, absent, _QUATS, 7, since, step, eps_of,
        skip, tail, eps_scale, FROM_HOST, HORIZON, N_GROUPS,
    )  # fmt: skip
    q2 = _settled(
        w, m, v, at, host_w, host_m, host_v, there, cached, absent, _QUATS, 8, since, step, eps_of,
        skip, tail, eps_scale, FROM_HOST, HORIZON, N_GROUPS,
    )  # fmt: skip
    q3 = _settled(
        w, m, v, at, host_w, host_m, host_v, there, cached, absent, _QUATS, 9, since, step, eps_of,
        skip, tail, eps_scale, FROM_HOST, HORIZON, N_GROUPS,
    )  # fmt: skip
    logit = _settled(
        w, m, v, at, host_w, host_m, host_v, there, cached, absent, _OPACITIES, 10, since, step,
        eps_of, skip, tail, eps_scale, FROM_HOST, HORIZON, N_GROUPS,
    )  # fmt: skip
    if PULL:
        decay2 = tl.exp2((step - since).to(tl.float32) * log2_beta2)
        f = tl.load(eps_scale + since)
        s = skipped(_SCALES, since, step, skip, tail, live, HORIZON, N_GROUPS)
        length = pull_length(sum_since(sums, since, step, SCALE_SUM), s, m_share)
        s0 = _pulled_at(
            s0, v, at, host_v, there, cached, absent, 3, length, live, scale_weight, eps_of, f,
            decay2, v_decay, FROM_HOST,
        )  # fmt: skip
        s1 = _pulled_at(
            s1, v, at, host_v, there, cached, absent, 4, length, live, scale_weight, eps_of, f,
            decay2, v_decay, FROM_HOST,
        )  # fmt: skip
        s2 = _pulled_at(
            s2, v, at, host_v, there, cached, absent, 5, length, live, scale_weight, eps_of, f,
            decay2, v_decay, FROM_HOST,
        )  # fmt: skip
        s = skipped(_OPACITIES, since, step, skip, tail, live, HORIZON, N_GROUPS)
        length = pull_length(sum_since(sums, since, step, OPACITY_SUM), s, m_share)
        logit = _pulled_at(
            logit, v, at, host_v, there, cached, absent, 10, length, live & False, opacity_weight,
            eps_of, f, decay2, v_decay, FROM_HOST,
        )  # fmt: skip
    variance = sum_since(sums, since, step, VARIANCE_SUM)
    o0, o1, o2 = _offset(
        s0, s1, s2, tl.where(live, q0, 1.0), q1, q2, q3, logit, z0, z1, z2, tl.sqrt(variance)
    )
    out = i.to(tl.int64) * 3
    tl.store(offsets + out, o0, mask=live)
    tl.store(offsets + out + 1, o1, mask=live)
    tl.store(offsets + out + 2, o2, mask=live)
    if DRAW_OWN:
        o0, o1, o2 = _normals(x, y, z, stamp, key, _OWN)
        tl.store(own + out, o0, mask=live)
        tl.store(own + out + 1, o1, mask=live)
        tl.store(own + out + 2, o2, mask=live)


@triton.jit
def _reached(w, m, v, at, live, column, reach_of, eps_of, now):
    """An element of each row, and where skipped steps may take it at most: up and down."""
    value = tl.load(w + at + column, mask=live, other=0.0)
    first = load_moment(m + at + column, live)
    second = load_moment(v + at + column, live)
    eps = tl.load(eps_of + column)
    motion = tl.load(reach_of + column) * first / (tl.sqrt(second) + eps * now)
    return value, tl.maximum(value, value - motion), tl.minimum(value, value - motion)


@triton.jit(do_not_specialize=["n", "step"])
def _step(
    w, m, v, slots, own, spheres, eps_scale, eps_of, reach_of, deviation, room, pull_reach, step, n,
    KEY: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = i < n
    at = tl.load(slots + i, mask=live, other=0).to(tl.int64) * WIDTH
    now = tl.load(eps_scale + step)
    s0, up0, _0 = _reached(w, m, v, at, live, 3, reach_of, eps_of, now)
    s1, up1, _1 = _reached(w, m, v, at, live, 4, reach_of, eps_of, now)
    s2, up2, _2 = _reached(w, m, v, at, live, 5, reach_of, eps_of, now)
    logit, _3, lowest = _reached(w, m, v, at, live, 10, reach_of, eps_of, now)
    if pull_reach > 0:
        lowest -= pull_reach / tl.sqrt(load_moment(v + at + 10, live))
    q0 = tl.load(w + at + 6, mask=live, other=1.0)
    q1 = tl.load(w + at + 7, mask=live, other=0.0)
    q2 = tl.load(w + at + 8, mask=live, other=0.0)
    q3 = tl.load(w + at + 9, mask=live, other=0.0)
    drawn = i.to(tl.int64) * 3
    z0 = tl.load(own + drawn, mask=live, other=0.0)
    z1 = tl.load(own + drawn + 1, mask=live, other=0.0)
    z2 = tl.load(own + drawn + 2, mask=live, other=0.0)
    d0, d1, d2 = _offset(s0, s1, s2, q0, q1, q2, q3, logit, z0, z1, z2, deviation)
    x = tl.load(w + at, mask=live, other=0.0) + d0
    y = tl.load(w + at + 1, mask=live, other=0.0) + d1
    z = tl.load(w + at + 2, mask=live, other=0.0) + d2
    tl.store(w + at, x, mask=live)
    tl.store(w + at + 1, y, mask=live)
    tl.store(w + at + 2, z, mask=live)

    # What the row will draw next is known: its sphere gets room for it.
    key = tl.load(w + at + KEY, mask=live, other=0.0)
    z0, z1, z2 = _normals(x, y, z, tl.zeros([ROWS], tl.float32) + (step + 1), key, _SKIPPED)
    largest = tl.maximum(tl.maximum(up0, up1), up2)
    length = tl.sqrt(z0 * z0 + z1 * z1 + z2 * z2)
    sphere = spheres + 4 * i.to(tl.int64)
    radius = tl.load(sphere + 3, mask=live, other=0.0)
    radius += room * _faintness(lowest) * tl.exp(2.0 * largest) * length
    tl.store(sphere, x, mask=live)
    tl.store(sphere + 1, y, mask=live)
    tl.store(sphere + 2, z, mask=live)
    tl.store(sphere + 3, radius, mask=live)


def draw_noise(
    arrays: Arrays,
    host_arrays: Arrays,
    slots: Tensor,
    rows: Tensor | None,
    layout: RowLayout,
    tables: DeviceTables,
    own: bool,
) -> tuple[Tensor, Tensor]:
    """What noise adds to rows as they are settled, and numbers for the step that follows.

    Args:
        arrays: of the cache.
        host_arrays: of the store.
        slots: [n] int32 on the device; where it is -1 the row is read from the host store.
        rows: [n] int32 on the device; None if all rows have slots.
        layout: of the rows.
        tables: the Adam history, with noise.
        own: whether the rows will be stepped.

    Returns:
        Offsets [n, 3] of settled means; [n, 3] standard normal for :func:`step_noise`, if ``own``.
    """
    n = len(slots)
    offsets = torch.empty(n, 3, device=slots.device)
    normals = torch.empty(n, 3, device=slots.device) if own else offsets
    with LAUNCH:
        _draw[(triton.cdiv(n, SLOTS),)](
            *arrays, *host_arrays, slots, slots if rows is None else rows, offsets, normals,
            tables.skip, tables.tail, tables.eps_scale, tables.eps, step=tables.history.step, n=n,
            **tables.pull(slots), log2_beta2=tables.log2_beta2, FROM_HOST=rows is not None,
            DRAW_OWN=own, STAMP=layout.bookkeeping["stamp"], HORIZON=tables.history.horizon,
            N_GROUPS=tables.skip.shape[1], **_constants(layout),
        )  # fmt: skip
    return offsets, normals


def step_noise(
    arrays: Arrays,
    slots: Tensor,
    normals: Tensor,
    spheres: Tensor,
    layout: RowLayout,
    tables: DeviceTables,
    lrs: np.ndarray,
) -> None:
    """Add a step's own noise to resident rows, after Adam's; takes no memory.

    Args:
        arrays: of the cache.
        slots: [n] int32 on the device, all >= 0.
        normals: [n, 3], drawn before the step.
        spheres: [n, 4] of the rows, without noise; they follow, with room for what is to come.
        layout: of the rows.
        tables: the Adam history up to the step before.
        lrs: [len(GROUPS)] learning rates of the step.
    """
    n, history = len(slots), tables.history
    assert history.noise is not None
    with LAUNCH:
        _step[(triton.cdiv(n, SLOTS),)](
            *arrays, slots, normals, spheres, tables.eps_scale, tables.eps, tables.reach,
            history.noise.variance(lrs) ** 0.5, history.noise_room, history.pull_reach,
            history.step, n,
            **_constants(layout),
        )  # fmt: skip


def _constants(layout: RowLayout) -> dict[str, Any]:
    return {"KEY": layout.bookkeeping["key"], "WIDTH": layout.width, "ROWS": SLOTS}
