"""Rows to leaves and gradients of leaves to rows: Triton kernels, or torch where there are none."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from gsscale_nerfstudio.engines.working_set import WorkingSet, row_gradients
from gsscale_nerfstudio.store import RowLayout


def kernels_run_on(device: torch.device) -> bool:
    """Whether Triton's kernels do: on a GPU, or where Triton is told to interpret, as in tests."""
    # Triton is not imported here: a machine without a GPU can do without it.
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def unpack(
    rows: Tensor, layout: RowLayout, attributes: dict[str, Tensor], positions: Tensor | None = None
) -> None:
    """Queue the filling of attributes from rows, on the current stream.

    Args:
        rows: [n, width] float32, on the attributes' device or in page-locked host memory.
        layout: of the rows.
        attributes: see :func:`.empty_attributes`.
        positions: [n] int32, where each row goes, in memory of either kind; None for 0 .. n - 1.
    """
    n, device = len(rows), attributes["means"].device
    if n == 0:
        return
    if not kernels_run_on(device):
        places = slice(None) if positions is None else positions.long()
        for name, columns in _attribute_columns(layout).items():
            attributes[name][places] = rows[:, columns].unflatten(1, attributes[name].shape[1:])
        return
    from gsscale_nerfstudio.engines import kernels, staging_kernels

    with kernels.LAUNCH:
        staging_kernels.unpack_rows[(-(-n // kernels.TILE),)](
            rows,
            rows if positions is None else positions,
            **attributes,
            n=n,
            SCATTER=positions is not None,
            **_tile(layout, kernels.TILE),
        )


@torch.no_grad()
def pack(working: WorkingSet, layout: RowLayout, rows: Tensor) -> None:
    """Queue the writing of a view's gradients and statistics, on the current stream.

    Args:
        working: the view's working set, after its backward pass.
        layout: of the rows.
        rows: [n, width] float32, written: in page-locked host memory. There is no copy of it on the
            device, where memory is what this saves.
    """
    n, device = len(working), working.sh.device
    if n == 0:
        return
    grads = row_gradients(working)
    statistics = working.statistics() if working.statistics is not None else None
    columns = layout.bookkeeping
    if not kernels_run_on(device):
        rows.zero_()
        for name, where in layout.columns.items():
            rows[:, where] = grads[name].flatten(1)
        for name, values in zip(("grad2d", "count", "max_radius"), statistics or (), strict=False):
            rows[:, columns[name]] = values
        return
    from gsscale_nerfstudio.engines import kernels, staging_kernels

    norms, seen, radii = statistics if statistics is not None else (rows,) * 3
    with kernels.LAUNCH:
        staging_kernels.pack_gradients[(-(-n // kernels.TILE),)](
            rows,
            *grads.values(),
            *(grad.stride(0) for grad in grads.values()),
            norms,
            seen,
            radii,
            n=n,
            HAS_STATISTICS=statistics is not None,
            GRAD2D=columns["grad2d"],
            COUNT=columns["count"],
            MAX_RADIUS=columns["max_radius"],
            **_tile(layout, kernels.TILE),
        )


def _attribute_columns(layout: RowLayout) -> dict[str, slice]:
    columns = dict(layout.columns)
    columns["sh"] = slice(columns.pop("features_dc").start, columns.pop("features_rest").stop)
    return columns


def _tile(layout: RowLayout, rows: int) -> dict[str, Any]:
    return {
        "SH": layout.columns["features_dc"].start,
        "OPTIMIZED": layout.optimized,
        "WIDTH": layout.width,
        "COLUMNS": 1 << (layout.width - 1).bit_length(),
        "ROWS": rows,
    }
