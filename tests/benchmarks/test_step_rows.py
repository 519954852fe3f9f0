"""The made-up rows: how many, where, how many of them a view sees, and that they are the same."""

from __future__ import annotations

import pytest
import torch

from benchmarks import fixed_rows
from benchmarks.fixed_rows import FixedRows, RowsError, fit
from gsscale_nerfstudio.cull import Culler, View
from gsscale_nerfstudio.store import GROUPS
from tests.benchmarks.flat_flight import DEEP, WIDE, flight


def everything(rows: FixedRows) -> dict[str, torch.Tensor]:
    chunks = list(rows.chunks())
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in GROUPS}


@pytest.mark.parametrize("points", [3000, 12_000])  # fewer and more than there are rows
def test_rows_are_complete_and_sane(points, monkeypatch):
    monkeypatch.setattr(fixed_rows, "CHUNK_ROWS", 640)
    n = 10_000
    scene = fit(flight(points), n, 0.02, seed=3)
    assert scene.rows.tiles > 1
    rows = everything(scene.rows)
    for name, values in rows.items():
        assert values.shape == (n, *scene.rows.shapes[name]), name
        assert values.dtype == torch.float32 and values.isfinite().all(), name
    assert torch.allclose(rows["quats"].norm(dim=1), torch.ones(n))
    assert 0.45 < rows["opacities"].sigmoid().mean() < 0.55
    assert (rows["features_rest"] != 0).all() and rows["features_rest"].abs().max() < 0.1
    # A row's square, times the rows, is the area that they cover.
    area = (rows["scales"].exp() / fixed_rows._SIZE).square().mean() * n
    covered = WIDE * DEEP * scene.rows.tiles
    assert 0.6 * covered < area < 1.6 * covered


def test_the_same_seed_gives_the_same_rows():
    first, again = (everything(fit(flight(), 5000, 0.02, seed=3).rows) for _ in range(2))
    other = everything(fit(flight(), 5000, 0.02, seed=4).rows)
    for name in GROUPS:
        assert torch.equal(first[name], again[name])
    assert not torch.equal(first["means"], other["means"])


@pytest.mark.parametrize("visible", [1.0, 0.02, 0.005])
def test_as_few_tiles_as_views_need(visible):
    split = flight(slope=0.5)
    scene = fit(split, 20_000, visible, seed=0)
    assert scene.visible_share <= fixed_rows.SHARE_TOLERANCE * visible
    assert len(scene.cameras) == 8 * scene.rows.tiles
    if visible == 1.0:
        assert scene.rows.tiles == 1
    else:
        # Every view sees less of it all; fewer tiles would not have done.
        assert scene.visible_share > fixed_rows.SHARE_TOLERANCE * visible / 3
    rows = everything(scene.rows)
    spheres = Culler.spheres_of(rows["means"], rows["scales"].exp())
    culler = Culler(spheres, torch.empty(-(-len(spheres) // 256), 8))
    culler.refresh(len(spheres))
    views = [View.from_camera(scene.cameras[i : i + 1]) for i in range(len(scene.cameras))]
    counts = torch.tensor([len(culler.cull(view, len(spheres))) for view in views])
    assert counts.min() > 0, "a camera over nothing"
    assert float(counts.float().mean()) / 20_000 == pytest.approx(scene.visible_share, rel=0.15)


def test_tiles_do_not_overlap():
    scene = fit(flight(), 9000, 0.01, seed=0).rows
    assert scene.tiles >= 3
    means = everything(scene)["means"]
    per_tile = 9000 // scene.tiles
    first, second = means[:per_tile], means[per_tile : 2 * per_tile]
    along = scene.sides[1] / scene.sides[1].norm()
    apart = (second @ along).median() - (first @ along).median()
    assert apart == pytest.approx(float(scene.sides[1].norm()), rel=0.1)


def test_a_camera_keeps_its_lens_and_direction():
    split = flight()
    scene = fit(split, 5000, 0.01, seed=0)
    for name in ("fx", "cy", "width", "height", "camera_type"):
        tiled, single = getattr(scene.cameras, name), getattr(split.cameras, name)
        assert torch.equal(tiled, single.repeat(scene.rows.tiles, 1))
    rotations = scene.cameras.camera_to_worlds[:, :, :3]
    assert torch.equal(rotations, torch.eye(3).expand_as(rotations))


def test_scenes_and_shares_that_do_not_work():
    split = flight()
    del split.metadata["points3D_xyz"]
    with pytest.raises(RowsError, match="point cloud"):
        fit(split, 1000, 0.5, seed=0)
    with pytest.raises(RowsError, match=r"of 4 rows .* up to 4 times; raise --visible"):
        fit(flight(), 4, 1e-4, seed=0)
