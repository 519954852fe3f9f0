"""Rows to leaves and gradients of leaves to rows: Triton kernels, or torch where there are none."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from gsscale_nerfstudio.engines.colors import Viewpoint, coefficient_gradients, evaluate
from gsscale_nerfstudio.engines.working_set import LEAVES, WorkingSet, leaf_gradients
from gsscale_nerfstudio.store.layout import STATISTICS, RowLayout


def kernels_run_on(device: torch.device) -> bool:
    """Whether Triton's kernels do: on a GPU, or where Triton is told to interpret, as in tests."""
    # Triton is not imported here: a machine without a GPU can do without it.
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def unpack(
    rows: Tensor,
    layout: RowLayout,
    attributes: dict[str, Tensor],
    viewpoint: Viewpoint,
    positions: Tensor | None = None,
) -> None:
    """Queue the filling of attributes from rows, on the current stream.

    Args:
        rows: [n, width] float32, on the attributes' device or in page-locked host memory.
        layout: of the rows.
        attributes: see :func:`.empty_attributes`.
        viewpoint: from where their colours are seen.
        positions: [n] int32, where each row goes, in memory of either kind; None for 0 .. n - 1.
    """
    n, device = len(rows), attributes["means"].device
    if n == 0:
        return
    if not kernels_run_on(device):
        places = slice(None) if positions is None else positions.long()
        for name in LEAVES:
            columns = rows[:, layout.columns[name]]
            attributes[name][places] = columns.unflatten(1, layout.shapes[name])
        wanted = attributes["slopes"].numel() > 0
        attributes["colors"][places], slopes = evaluate(rows, layout, viewpoint, wanted)
        if slopes is not None:
            attributes["slopes"][:, places] = slopes
        return
    from gsscale_nerfstudio.engines import kernels, staging_kernels

    with kernels.LAUNCH:
        staging_kernels.unpack_rows[(-(-n // kernels.PACK.rows),)](
            rows,
            rows if positions is None else positions,
            **attributes,
            **kernels.color_arguments(layout, viewpoint),
            n=n,
            total=len(attributes["means"]),
            SCATTER=positions is not None,
            SLOPES=attributes["slopes"].numel() > 0,
            **kernels.tile_of(layout, kernels.PACK),
        )


@torch.no_grad()
def pack(
    working: WorkingSet, layout: RowLayout, rows: Tensor, add_at: Tensor | None = None
) -> None:
    """Queue the writing of a view's gradients and statistics, on the current stream.

    Args:
        working: the view's working set, after its backward pass.
        layout: of the rows.
        rows: [n, width] float32, written: in page-locked host memory. There is no copy of it on the
            device, where memory is what this saves.
        add_at: [n] int32 on the device, ascending: add to these rows of ``rows``, which may be
            more, instead of writing row by row.
    """
    n, colors = len(working), working.colors
    viewpoint, of_colors = colors.viewpoint, colors.gradients()
    device = of_colors.device
    if n == 0:
        return
    means, grads = working.leaves["means"].detach(), leaf_gradients(working)
    statistics = working.statistics() if working.statistics is not None else None
    columns = layout.bookkeeping
    if not kernels_run_on(device):
        packed = torch.zeros(n, layout.width)
        for name, grad in grads.items():
            packed[:, layout.columns[name]] = grad.flatten(1)
        first = layout.columns["features_dc"].start
        of_coefficients = coefficient_gradients(means, layout, viewpoint, of_colors)
        packed[:, first : layout.optimized] = of_coefficients
        for name, values in zip(STATISTICS, statistics or (), strict=False):
            packed[:, columns[name]] = values
        if add_at is None:
            rows.copy_(packed)
        else:
            rows.index_add_(0, add_at, packed)
        return
    from gsscale_nerfstudio.engines import kernels, staging_kernels

    norms, seen, radii = statistics if statistics is not None else (rows,) * 3
    with kernels.LAUNCH:
        staging_kernels.pack_gradients[(-(-n // kernels.PACK.rows),)](
            rows,
            *grads.values(),
            of_colors,
            means,
            norms,
            seen,
            radii,
            **kernels.color_arguments(layout, viewpoint),
            add_at=rows if add_at is None else add_at,
            n=n,
            ADD=add_at is not None,
            HAS_STATISTICS=statistics is not None,
            GRAD2D=columns["grad2d"],
            COUNT=columns["count"],
            MAX_RADIUS=columns["max_radius"],
            **kernels.tile_of(layout, kernels.PACK),
        )
