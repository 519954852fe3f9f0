"""Triton kernels for densification: what it reads of cached rows, and the opacity reset.

They do for rows in GPU memory what ``summarize`` and ``limit_opacities`` of
``csrc/kernels/rows.cpp`` do for rows of the host store.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gsscale_nerfstudio.engines.kernels import LAUNCH, RUN_ON_CPU
from gsscale_nerfstudio.engines.moment_kernels import load_moment, store_moment
from gsscale_nerfstudio.engines.streams import mark_current, wait
from gsscale_nerfstudio.optim.device_tables import DeviceTables
from gsscale_nerfstudio.store import GROUPS, RowLayout

SLOTS = 1024 if RUN_ON_CPU else 128
"""Slots per program, one a thread."""

_SCALES, _OPACITIES = GROUPS.index("scales"), GROUPS.index("opacities")

Arrays = tuple[Tensor, Tensor, Tensor]
"""A cache's params, exp_avg and exp_avg_sq, [slots, width] each."""


@triton.jit
def _slots_of(w, slots, n, step, STAMP: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr):
    """This program's places in ``slots``, which exist; first element and stamp of each row."""
    i = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    live = i < n
    at = tl.load(slots + i, mask=live, other=0).to(tl.int64) * WIDTH
    stamp = tl.load(w + at + STAMP, mask=live, other=0.0).to(tl.int32)
    stamp = tl.where(live, stamp, step)
    return i, live, at, stamp


@triton.jit
def skipped(group, stamp, step, skip, tail, live, HORIZON: tl.constexpr, N_GROUPS: tl.constexpr):
    """S(stamp, step) of a group, for each row."""
    gap = step - stamp
    near = gap <= HORIZON
    s = tl.load(skip + tl.where(near, gap, 0) * N_GROUPS + group, mask=live & near, other=0.0)
    return s + tl.load(tail + stamp * N_GROUPS + group, mask=live & (gap > HORIZON), other=0.0)


@triton.jit
def settled_element(
    w, m, v, at, live, group, stamp, step, eps, skip, tail, eps_scale, HORIZON: tl.constexpr,
    N_GROUPS: tl.constexpr,
):  # fmt: skip
    """One element of each row, as it would be if the row were settled."""
    s = skipped(group, stamp, step, skip, tail, live, HORIZON, N_GROUPS)
    f = tl.load(eps_scale + stamp, mask=live, other=1.0)
    now = tl.load(w + at, mask=live, other=0.0)
    first = load_moment(m + at, live)
    second = load_moment(v + at, live)
    return now - tl.div_rn(s * first, tl.sqrt_rn(second) + eps * f)


@triton.jit(do_not_specialize=["n", "n_rows", "step"])
def _summarize(
    w, m, v, rows, slots, out, skip, tail, eps_scale, eps_of, step, n, n_rows,
    SCALE: tl.constexpr, OPACITY: tl.constexpr, STAMP: tl.constexpr, GRAD2D: tl.constexpr,
    COUNT: tl.constexpr, MAX_RADIUS: tl.constexpr, SCALES: tl.constexpr, OPACITIES: tl.constexpr,
    HORIZON: tl.constexpr, N_GROUPS: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    i, live, at, stamp = _slots_of(w, slots, n, step, STAMP, WIDTH, SLOTS)
    eps = tl.load(eps_of + SCALE)
    largest = settled_element(
        w, m, v, at + SCALE, live, SCALES, stamp, step, eps, skip, tail, eps_scale, HORIZON,
        N_GROUPS,
    )  # fmt: skip
    for axis in tl.static_range(1, 3):
        scale = settled_element(
            w, m, v, at + SCALE + axis, live, SCALES, stamp, step, eps, skip, tail, eps_scale,
            HORIZON, N_GROUPS,
        )  # fmt: skip
        largest = tl.maximum(largest, scale, propagate_nan=tl.PropagateNan.ALL)
    opacity = settled_element(
        w, m, v, at + OPACITY, live, OPACITIES, stamp, step, tl.load(eps_of + OPACITY), skip, tail,
        eps_scale, HORIZON, N_GROUPS,
    )  # fmt: skip
    sum_of_norms = tl.load(w + at + GRAD2D, mask=live, other=0.0)
    count = tl.load(w + at + COUNT, mask=live, other=1.0)
    radius = tl.load(w + at + MAX_RADIUS, mask=live, other=0.0)
    zero = tl.zeros([SLOTS], tl.float32)
    tl.store(w + at + GRAD2D, zero, mask=live)
    tl.store(w + at + COUNT, zero, mask=live)
    tl.store(w + at + MAX_RADIUS, zero, mask=live)
    # Rows ascend, so the host's memory is written almost in one piece.
    row = tl.load(rows + i, mask=live, other=0).to(tl.int64)
    tl.store(out + row, tl.div_rn(sum_of_norms, tl.maximum(count, 1.0)), mask=live)
    tl.store(out + n_rows + row, radius, mask=live)
    tl.store(out + 2 * n_rows + row, largest, mask=live)
    tl.store(out + 3 * n_rows + row, opacity, mask=live)


@triton.jit(do_not_specialize=["n", "step", "most"])
def _limit(
    w, m, v, slots, skip, tail, eps_scale, eps_of, step, n, most,
    OPACITY: tl.constexpr, STAMP: tl.constexpr, OPACITIES: tl.constexpr, HORIZON: tl.constexpr,
    N_GROUPS: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    _i, live, at, stamp = _slots_of(w, slots, n, step, STAMP, WIDTH, SLOTS)
    now = settled_element(
        w, m, v, at + OPACITY, live, OPACITIES, stamp, step, tl.load(eps_of + OPACITY), skip, tail,
        eps_scale, HORIZON, N_GROUPS,
    )  # fmt: skip
    zero = tl.zeros([SLOTS], tl.float32)
    # Without moments it will not move until its next gradient, whatever the row's stamp says.
    tl.store(w + at + OPACITY, tl.where(now > most, most, now), mask=live)
    store_moment(m + at + OPACITY, zero, live)
    store_moment(v + at + OPACITY, zero, live)


def summarize_slots(
    arrays: Arrays,
    rows: Tensor,
    slots: Tensor,
    out: Tensor,
    layout: RowLayout,
    tables: DeviceTables,
) -> None:
    """Mean 2-D gradient, largest radius, largest log-scale and opacity, settled, of cached rows.

    Their statistics become zero. Returns when ``out`` has been written.

    Args:
        arrays: of the cache.
        rows: [n] int32 on the device or page-locked, ascending.
        slots: [n] int32 likewise, where each row is.
        out: [4, rows of the store] float32, page-locked.
        layout: of the rows.
        tables: the Adam history.
    """
    n, b = len(slots), layout.bookkeeping
    if n > 0:
        with LAUNCH:
            _summarize[(triton.cdiv(n, SLOTS),)](
                *arrays, rows, slots, out, tables.skip, tables.tail, tables.eps_scale, tables.eps,
                tables.history.step, n, out.shape[1],
                SCALE=layout.columns["scales"].start, OPACITY=layout.columns["opacities"].start,
                STAMP=b["stamp"], GRAD2D=b["grad2d"], COUNT=b["count"],
                MAX_RADIUS=b["max_radius"], SCALES=_SCALES, OPACITIES=_OPACITIES,
                HORIZON=tables.history.horizon, N_GROUPS=tables.skip.shape[1], WIDTH=layout.width,
                SLOTS=SLOTS,
            )  # fmt: skip
    wait(mark_current(arrays[0].device))


def limit_slots(
    arrays: Arrays, slots: Tensor, most: float, layout: RowLayout, tables: DeviceTables
) -> None:
    """Clamp the settled opacity logits of cached rows to ``most`` and zero their moments.

    ``slots`` [n] int32, where they are, are on the device or page-locked.
    """
    n = len(slots)
    if n > 0:
        with LAUNCH:
            _limit[(triton.cdiv(n, SLOTS),)](
                *arrays, slots, tables.skip, tables.tail, tables.eps_scale, tables.eps,
                tables.history.step, n, most,
                OPACITY=layout.columns["opacities"].start, STAMP=layout.bookkeeping["stamp"],
                OPACITIES=_OPACITIES, HORIZON=tables.history.horizon,
                N_GROUPS=tables.skip.shape[1], WIDTH=layout.width, SLOTS=SLOTS,
            )  # fmt: skip
