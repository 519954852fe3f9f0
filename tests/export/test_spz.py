"""An SPZ file, decoded as its specification says, holds what was exported."""

from __future__ import annotations

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from nerfstudio.data.scene_box import OrientedBox

from gsscale_nerfstudio.export import gaussians, spz, write
from tests.export.models import trained
from tests.rasterize.scenes import Scene, camera, draw


@dataclass
class Decoded:
    version: int
    sh_degree: int
    fraction: int
    flags: int
    means: np.ndarray
    opacities: np.ndarray
    """After the sigmoid."""
    dc: np.ndarray
    scales: np.ndarray
    quats: np.ndarray
    """x, y, z, w."""
    rest: np.ndarray


def decode(path: Path) -> Decoded:
    """A reader, from the format's specification and, for what it leaves open, its first reader."""
    data = gzip.decompress(path.read_bytes())
    magic, version, n, degree, fraction, flags, reserved = struct.unpack("<IIIBBBB", data[:16])
    assert magic == 0x5053474E and reserved == 0
    stream = np.frombuffer(data, np.uint8, offset=16)
    bases = (degree + 1) ** 2 - 1
    sizes = [9, 1, 3, 3, 4, 3 * bases]
    assert len(stream) == n * sum(sizes)
    positions, alphas, colors, scales, rotations, rest = (
        part.reshape(n, size).astype(np.int64)
        for part, size in zip(np.split(stream, np.cumsum(sizes)[:-1] * n), sizes, strict=True)
    )
    low, middle, high = np.moveaxis(positions.reshape(n, 3, 3), 2, 0)
    fixed = low + (middle << 8) + (high << 16)
    fixed -= (fixed >> 23) << 24
    return Decoded(
        version,
        degree,
        fraction,
        flags,
        means=fixed / 2.0**fraction,
        opacities=alphas[:, 0] / 255,
        dc=(colors / 255 - 0.5) / 0.15,
        scales=scales / 16 - 10,
        quats=np.array([unpacked(int(word)) for word in rotations @ [1, 1 << 8, 1 << 16, 1 << 24]]),
        rest=(rest.reshape(n, bases, 3) - 128) / 128,
    )


def unpacked(word: int) -> list[float]:
    largest, others = word >> 30, []
    for shift in (20, 10, 0):
        field = word >> shift & 1023
        others.append((-1) ** (field >> 9) * (field & 511) / 511 * 0.5**0.5)
    others.insert(largest, max(0.0, 1 - sum(x * x for x in others)) ** 0.5)
    return others


def exact(model, keep: np.ndarray) -> dict[str, np.ndarray]:
    return {name: value.double().numpy()[keep] for name, value in model.gauss_params.items()}


def near(actual: np.ndarray, expected: np.ndarray, step: float) -> None:
    """Rounded to multiples of a step, and no better: the bound is what it should be."""
    worst = np.abs(actual - expected).max()
    assert 0.4 * step < worst < 0.501 * step


@pytest.mark.parametrize("sh_degree", [0, 1, 2, 3])
def test_each_attribute_is_within_its_step(sh_degree, tmp_path, monkeypatch):
    monkeypatch.setattr(gaussians, "_PIECE", 700)
    model = trained(3000, sh_degree)
    model.gauss_params["features_rest"] *= 0.25
    keep = model.gauss_params["opacities"][:, 0].numpy() >= -5.5373
    assert write(model, tmp_path / "a.spz", "sh") == (keep.sum(), 3000)
    ours, truth = decode(tmp_path / "a.spz"), exact(model, keep)
    assert (ours.version, ours.sh_degree, ours.flags) == (3, sh_degree, 0)
    farthest = np.abs(truth["means"]).max() * 2**ours.fraction
    assert farthest < 2**23 and (farthest > 2**22 or ours.fraction == 20)
    assert np.abs(ours.means - truth["means"]).max() <= 0.5 / 2**ours.fraction
    near(ours.opacities, 1 / (1 + np.exp(-truth["opacities"][:, 0])), 1 / 255)
    dc = truth["features_dc"]
    if sh_degree == 0:  # colours are kept before a sigmoid
        dc = (1 / (1 + np.exp(-dc)) - 0.5) / 0.28209479177387814
    near(ours.dc, dc.clip(-0.5 / 0.15, 0.5 / 0.15), 1 / 0.15 / 255)
    near(ours.scales, truth["scales"], 1 / 16)
    if sh_degree > 0:
        near(ours.rest, truth["features_rest"].clip(-1, 127 / 128), spz._SH_BUCKET / 128)
    quats = truth["quats"][:, [1, 2, 3, 0]] / np.linalg.norm(truth["quats"], axis=1)[:, None]
    quats *= np.sign((quats * ours.quats).sum(axis=1, keepdims=True))
    largest = np.abs(quats) == np.abs(quats).max(axis=1, keepdims=True)
    near(ours.quats[~largest], quats[~largest], 0.5**0.5 / 511)
    assert np.abs(ours.quats - quats)[largest].max() < 3 * 0.5**0.5 / 511


def test_it_is_one_gzip_stream(tmp_path, monkeypatch):
    """Browsers stop at the end of the first one, or refuse what follows."""
    monkeypatch.setattr(gaussians, "_PIECE", 100)
    write(trained(1000, 1), tmp_path / "a.spz", "sh")
    stream = zlib.decompressobj(31)
    plain = stream.decompress((tmp_path / "a.spz").read_bytes())
    assert stream.eof and stream.unused_data == b""
    assert plain == gzip.decompress((tmp_path / "a.spz").read_bytes())


def test_box_and_one_colour(tmp_path):
    model = trained(1000, 2)
    box = OrientedBox.from_params((0.1, 0.0, -0.2), (0.3, 0.0, 0.1), (1.5, 1.0, 2.0))
    count, of = write(model, tmp_path / "a.spz", "rgb", box)
    ours = decode(tmp_path / "a.spz")
    assert 10 < count == len(ours.means) < of == 1000
    assert ours.sh_degree == 0 and ours.rest.shape == (count, 0, 3)
    kept = box.within(model.gauss_params["means"]).reshape(-1).numpy()
    kept &= model.gauss_params["opacities"][:, 0].numpy() >= -5.5373
    near(ours.dc, exact(model, kept)["features_dc"].clip(-10 / 3, 10 / 3), 1 / 0.15 / 255)


def test_far_ones_are_drawn_in_and_look_the_same(tmp_path):
    """So that one that strayed does not cost all others their precision."""
    model = trained(100, 0)
    model.gauss_params["opacities"].fill_(1)
    model.gauss_params["means"][7] = torch.tensor([1e4, -2e4, 5e3])
    write(model, tmp_path / "a.spz", "sh")
    ours, truth = decode(tmp_path / "a.spz"), exact(model, np.arange(100))
    assert ours.fraction == 12 and np.abs(ours.means[7]).max() == pytest.approx(2048, abs=0.001)
    ratio = ours.means[7] / truth["means"][7]
    assert ratio == pytest.approx([2048 / 2e4] * 3, rel=1e-5)
    assert ours.scales[7] == pytest.approx(truth["scales"][7] + np.log(ratio[0]), abs=1 / 32)
    others = np.arange(100) != 7
    assert np.abs(ours.means - truth["means"])[others].max() <= 0.5 / 4096


def test_antialiased_is_said(tmp_path):
    write(trained(10, 0, antialiased=True), tmp_path / "a.spz", "sh")
    assert decode(tmp_path / "a.spz").flags == 1


def test_a_file_of_none(tmp_path):
    model = trained(10, 1)
    model.gauss_params["opacities"].fill_(-9)
    assert write(model, tmp_path / "a.spz", "sh") == (0, 10)
    assert len(decode(tmp_path / "a.spz").means) == 0


def test_more_than_readers_take_is_said(tmp_path, monkeypatch, capsys):
    write(trained(100, 0), tmp_path / "a.spz", "sh")
    assert "many readers" not in capsys.readouterr().out
    monkeypatch.setattr(spz, "_MOST_READ", 50)
    write(trained(100, 0), tmp_path / "a.spz", "sh")
    assert "many readers of .spz take (50)" in " ".join(capsys.readouterr().out.split())


def test_images_are_the_same_to_40_db(tmp_path):
    model = trained(600, 3)
    values = model.gauss_params
    values["means"] += torch.tensor([0.0, 0.0, 4.0])
    values["scales"].mul_(0.7).sub_(2)
    values["features_rest"] *= 0.1
    values["opacities"].fill_(1.5)
    write(model, tmp_path / "a.spz", "sh")
    ours = decode(tmp_path / "a.spz")
    sh = np.concatenate([ours.dc[:, None], ours.rest], axis=1)
    quats, opacities = ours.quats[:, [3, 0, 1, 2]], ours.opacities
    packed = (ours.means, quats, np.exp(ours.scales), opacities, sh)
    view = camera(96, 72)

    def image(attributes) -> torch.Tensor:
        tensors = [torch.as_tensor(value).double() for value in attributes]
        return draw(Scene(*tensors, sh_degree=3), view).rgb.clamp(0, 1)

    original = image(
        (
            values["means"],
            values["quats"],
            values["scales"].exp(),
            values["opacities"].sigmoid()[:, 0],
            torch.cat([values["features_dc"][:, None], values["features_rest"]], dim=1),
        )
    )
    assert original.std() > 0.1
    assert -10 * torch.log10((image(packed) - original).square().mean()) > 40


def test_niantics_reader_reads_the_same(tmp_path):
    """Through gaussforge, which is built on it."""
    gaussforge = pytest.importorskip("gaussforge")
    write(trained(500, 3), tmp_path / "a.spz", "sh")
    ours = decode(tmp_path / "a.spz")
    theirs = gaussforge.GaussForge().read((tmp_path / "a.spz").read_bytes(), "spz")["data"]
    assert theirs["numPoints"] == len(ours.means)

    def floats(name: str) -> np.ndarray:
        return np.frombuffer(theirs[name], np.float32).reshape(len(ours.means), -1)

    wxyz = ours.quats[:, [3, 0, 1, 2]]
    for name, expected in (
        ("positions", ours.means),
        ("scales", ours.scales),
        ("rotations", wxyz),
        ("colors", ours.dc),
        ("sh", ours.rest.reshape(len(ours.means), -1)),
    ):
        np.testing.assert_allclose(floats(name), expected, atol=1e-5, err_msg=name)
    inside = (ours.opacities > 0) & (ours.opacities < 1)
    alphas = 1 / (1 + np.exp(-floats("alphas")[:, 0].astype(np.float64)))
    np.testing.assert_allclose(alphas[inside], ours.opacities[inside], atol=1e-5)
