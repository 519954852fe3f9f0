"""The culler on a trained scene: how much more than needed it brings, and whether it drops rows."""

from __future__ import annotations

from typing import Any

import torch


@torch.no_grad()
def check_culling(pipeline: Any) -> dict[str, Any]:
    """Compare, on every held-out view, the working set with all rows.

    Needs all rows on the device at once, so it comes after memory was measured.

    Returns:
        ``visible_share``: mean share of rows that the culler brings to the device;
        ``culled_per_drawn``: mean ratio of those to the rows that the rasterizer draws of all rows;
        ``rows_dropped``: rows drawn of all rows but not of the working set, summed over views;
        ``largest_render_difference``: between the two images, of a colour range of 1.
        Nothing for a method without a culler.
    """
    model = pipeline.model
    if not hasattr(model, "engine"):
        return {}
    from gsscale_nerfstudio.cull import View
    from gsscale_nerfstudio.engines import Viewpoint, WorkingSet
    from gsscale_nerfstudio.engines.colors import Colors
    from gsscale_nerfstudio.rasterize.spherical_harmonics import sh_colors

    pipeline.eval()
    rows = {name: v.to(model.device).contiguous() for name, v in model.gauss_params.items()}
    sh = torch.cat([rows.pop("features_dc")[:, None], rows.pop("features_rest")], dim=1)
    ids = torch.arange(model.num_points, dtype=torch.int32)
    layout = model.engine.store.layout
    shares, ratios, dropped, difference = [], [], 0, 0.0
    for camera, _ in pipeline.datamanager.fixed_indices_eval_dataloader:
        view = View.from_camera(camera)
        viewmat = view.on(model.device).viewmat
        viewpoint = Viewpoint.of(view, layout, model.device)
        colors = sh[:, 0]
        if layout.sh_degree > 0:
            colors = sh_colors(sh, rows["means"] - viewpoint.position, layout.sh_degree)
        everything = WorkingSet(ids, rows, Colors(colors, viewpoint))
        working = model.engine.fetch(view)
        part = model.draw(working, view, viewmat)
        whole = model.draw(everything, view, viewmat)
        drawn = int((whole.radii > 0).sum())
        shares.append(len(working) / model.num_points)
        ratios.append(len(working) / max(1, drawn))
        dropped += drawn - int((part.radii > 0).sum())
        difference = max(difference, float((part.rgb - whole.rgb).abs().max()))
    return {
        "visible_share": sum(shares) / len(shares),
        "culled_per_drawn": sum(ratios) / len(ratios),
        "rows_dropped": dropped,
        "largest_render_difference": difference,
    }
