"""``gsscale-export`` writes the PLY file that ``ns-export gaussian-splat`` writes."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.export import Export, cli, gaussians, ply, write
from tests.export.models import trained

plyfile = pytest.importorskip("plyfile")
exporter = pytest.importorskip("nerfstudio.scripts.exporter")  # needs open3d

BOX = {
    "obb_center": (0.1, 0.0, -0.2),
    "obb_rotation": (0.3, 0.0, 0.1),
    "obb_scale": (1.5, 1.0, 2.0),
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    """Make both exporters load a model of ours."""

    def use(model: object) -> None:
        def setup(*_: object, **__: object) -> tuple[object, ...]:
            return None, SimpleNamespace(model=model), None, None

        monkeypatch.setattr(exporter, "eval_setup", setup)
        monkeypatch.setattr(cli, "eval_setup", setup)

    return use


@pytest.mark.parametrize("box", [{}, BOX], ids=["all", "box"])
@pytest.mark.parametrize(("color", "theirs"), [("sh", "sh_coeffs"), ("rgb", "rgb")])
@pytest.mark.parametrize("sh_degree", [0, 3])
def test_the_file_is_that_of_ns_export(run, tmp_path, monkeypatch, sh_degree, color, theirs, box):
    monkeypatch.setattr(gaussians, "_PIECE", 256)  # torch rounds alike in whole vectors
    run(trained(1000, sh_degree))
    exporter.ExportGaussianSplat(
        load_config=tmp_path, output_dir=tmp_path, ply_color_mode=theirs, **box
    ).main()
    Export(tmp_path, output=tmp_path / "deep" / "ours.ply", color=color, **box).main()
    expected, written = tmp_path / "splat.ply", tmp_path / "deep" / "ours.ply"
    assert written.read_bytes() == expected.read_bytes()
    assert [path.name for path in written.parent.iterdir()] == ["ours.ply"]
    assert 20 < plyfile.PlyData.read(written)["vertex"].count < 950


def test_what_is_not_finite_is_left_out(run, tmp_path):
    """Alone: ns-export then leaves out everything if it is a position."""
    model = trained(50, 1)
    model.gauss_params["opacities"].fill_(1)
    model.gauss_params["means"][3, 1] = float("nan")
    model.gauss_params["features_rest"][7, 2, 0] = float("inf")
    assert write(model, tmp_path / "a.ply", "sh") == (48, 50)
    vertex = plyfile.PlyData.read(tmp_path / "a.ply")["vertex"]
    assert np.isfinite(vertex["y"]).all() and vertex.count == 48


def test_a_failure_leaves_the_old_file(run, tmp_path, monkeypatch):
    path = tmp_path / "a.ply"
    path.write_text("old")
    monkeypatch.setattr(ply, "_records", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(trained(50, 1), path, "sh")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.ply"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_file_that_cannot_be_written_is_named_with_what_helps(tmp_path, monkeypatch, code):
    def fail(*args: object) -> list[float]:
        raise OSError(code, os.strerror(code), str(tmp_path / ".a.ply.17"))

    monkeypatch.setitem(cli._WRITERS, ".ply", fail)
    with pytest.raises(GSScaleError) as told:
        write(trained(50, 1), tmp_path / "a.ply", "sh")
    said = str(told.value)
    assert f"could not write {tmp_path / 'a.ply'}: {os.strerror(code)}; " in said
    assert ("free disk space" in said) == (code == errno.ENOSPC)
    assert "choose another --output" in said and ".a.ply" not in said


def test_wrong_input_is_told(run, tmp_path: Path):
    with pytest.raises(GSScaleError, match="--obb-scale"):
        Export(tmp_path, obb_center=(0, 0, 0)).main()
    run(torch.nn.Linear(1, 1))
    with pytest.raises(GSScaleError, match="no run of gsscale or splatfacto"):
        Export(tmp_path).main()
    run(trained(50, 1))
    with pytest.raises(GSScaleError, match=r"end in \.ply or \.spz"):
        Export(tmp_path, output=tmp_path / "splat.txt").main()
    (tmp_path / "folder.ply").mkdir()
    with pytest.raises(GSScaleError, match=r"folder\.ply.*another --output"):
        Export(tmp_path, output=tmp_path / "folder.ply").main()
    assert [path.name for path in tmp_path.iterdir()] == ["folder.ply"]


def test_a_box_with_nothing_inside_is_refused(run, tmp_path: Path):
    run(trained(50, 1))
    box = {"obb_center": (900.0, 0.0, 0.0), "obb_rotation": (0.0, 0.0, 0.0)}
    with pytest.raises(GSScaleError, match="no Gaussian is inside"):
        Export(tmp_path, output=tmp_path / "a.ply", obb_scale=(1.0, 1.0, 1.0), **box).main()
    with pytest.raises(GSScaleError, match="more than 0, not -1 1 1"):
        Export(tmp_path, output=tmp_path / "a.ply", obb_scale=(-1.0, 1.0, 1.0), **box).main()
    assert not list(tmp_path.iterdir())


OTHERS = [
    "!!python/object:no_such_module.Config {}",
    "!!python/object:nerfstudio.engine.trainer.TrainerConfig {method_name: no_such_method}",
    "!!python/object:nerfstudio.engine.trainer.TrainerConfig\npipeline: !!python",
]
"""Runs of methods that are not installed, and a file that ends too early."""


@pytest.mark.parametrize("content", [None, "{}", "[1, 2", *OTHERS])
def test_what_is_no_run_is_refused(content, tmp_path: Path):
    config = tmp_path / "config.yml"
    if content is not None:
        config.write_text(content)
    for path in (config, tmp_path):
        with pytest.raises(GSScaleError, match=r"outputs/\.\.\./config\.yml"):
            Export(path).main()
