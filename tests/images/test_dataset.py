"""The fast JPEG decoder's pixels are Pillow's."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.data.scene_box import SceneBox
from PIL import Image

from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.images import ImageDataset, dataset


def picture(height=101, width=83, channels=3):
    """Noise on a ramp: every coefficient, and colours that clip."""
    rng = np.random.default_rng(3)
    ramp = np.linspace(-40, 300, width)[None, :, None]
    noise = rng.normal(0, 40, (height, width, channels))
    return Image.fromarray((ramp + noise).clip(0, 255).astype(np.uint8).squeeze())


def reader(kind, file, scale=1.0):
    one = kind.__new__(kind)
    one._dataparser_outputs = SimpleNamespace(image_filenames=[file])
    one.scale_factor = scale
    return one


FILES = {
    "4:4:4": ("a.jpg", {"subsampling": 0}),
    "4:2:2": ("a.jpg", {"subsampling": 1, "quality": 30}),
    "4:2:0": ("a.JPEG", {"subsampling": 2, "optimize": True}),
    "progressive": ("a.jpg", {"progressive": True}),
    "restarts": ("a.jpg", {"restart_marker_rows": 2}),
    "turned": ("a.jpg", {"exif": {274: 6}}),
    "RGB inside": ("a.jpg", {"keep_rgb": True}),
    "two pictures": ("a.jpg", {"format": "MPO", "save_all": True}),
    "JPEG called PNG": ("a.png", {"format": "JPEG"}),
}


@pytest.mark.parametrize("case", FILES)
def test_jpegs(case, tmp_path, monkeypatch):
    name, options = FILES[case]
    if "exif" in options:
        exif = Image.Exif()
        exif.update(options["exif"])
        options = {**options, "exif": exif}
    if "save_all" in options:
        options = {**options, "append_images": [picture(50, 50)]}
    file = tmp_path / name
    picture().save(file, **{"format": "JPEG", **options})
    expected = reader(InputDataset, file).get_numpy_image(0)
    # So that it cannot be Pillow that decodes.
    monkeypatch.setattr(InputDataset, "get_numpy_image", None)
    pixels = reader(ImageDataset, file).get_numpy_image(0)
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize(
    "format, mode",
    [
        ("JPEG", "L"),
        ("JPEG", "CMYK"),
        ("PNG", "L"),
        ("PNG", "P"),
        ("PNG", "RGB"),
        ("PNG", "RGBA"),
        ("WebP", "RGB"),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_everything_else(format, mode, scale, tmp_path):
    file = tmp_path / f"a.{format}"
    picture().convert(mode).save(file, format)
    expected = reader(InputDataset, file, scale).get_numpy_image(0)
    np.testing.assert_array_equal(reader(ImageDataset, file, scale).get_numpy_image(0), expected)


def test_scaled_jpegs(tmp_path):
    file = tmp_path / "a.jpg"
    picture().save(file)
    expected = reader(InputDataset, file, 0.5).get_numpy_image(0)
    np.testing.assert_array_equal(reader(ImageDataset, file, 0.5).get_numpy_image(0), expected)


@pytest.mark.parametrize("cut", [0, 10, 700, 3000, -50])
def test_a_truncated_jpeg_is_an_error(cut, tmp_path):
    file = tmp_path / "a.jpg"
    picture().save(file)
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(OSError):
        reader(InputDataset, file).get_numpy_image(0)
    with pytest.raises(OSError, match=r"a\.jpg|(?i:truncated)"):
        reader(ImageDataset, file).get_numpy_image(0)


def test_another_decoder_is_not_used(tmp_path, monkeypatch):
    """Each library brings a libjpeg of its own; they need not have the same arithmetic."""
    real = dataset.decode_jpeg
    assert dataset.same_as_pillow()
    file = tmp_path / "a.jpg"
    picture().save(file)
    expected = reader(InputDataset, file).get_numpy_image(0)

    def unlike(content, mode):
        return real(content, mode=mode) ^ 1

    def missing(content, mode):
        raise RuntimeError("not compiled with libjpeg support")

    for decoder in (unlike, missing):
        monkeypatch.setattr(dataset, "decode_jpeg", decoder)
        dataset.same_as_pillow.cache_clear()
        try:
            assert not dataset.same_as_pillow()
            pixels = reader(ImageDataset, file).get_numpy_image(0)
        finally:
            dataset.same_as_pillow.cache_clear()
        np.testing.assert_array_equal(pixels, expected)


def test_a_camera_is_as_large_as_its_image(tmp_path):
    """Also where 0.7 of 90 is 62.99999999999999 in float64, and 63 in float32."""
    Image.new("RGB", (90, 80)).save(tmp_path / "a.png")
    cameras = Cameras(
        camera_to_worlds=torch.eye(4)[None, :3],
        fx=50.0,
        fy=50.0,
        cx=45.0,
        cy=40.0,
        width=90,
        height=80,
    )
    scene_box = SceneBox(torch.tensor([[-1.0, -1, -1], [1, 1, 1]]))
    outputs = DataparserOutputs([tmp_path / "a.png"], cameras, scene_box=scene_box)
    images = ImageDataset(outputs, 0.7)
    assert images.get_numpy_image(0).shape == (56, 62, 3)
    assert (int(images.cameras.height), int(images.cameras.width)) == (56, 62)
    assert float(images.cameras.fx) == pytest.approx(35)


def test_a_file_that_cannot_be_read_for_a_moment_is_read_again(tmp_path, monkeypatch):
    """As on a network file system; what is broken for good ends with a sentence."""
    file = tmp_path / "a.png"
    picture().save(file)
    left, pauses = 1, []

    def hiccup(self, index):
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError(116, "Stale file handle")
        return np.asarray(picture())

    monkeypatch.setattr(ImageDataset, "get_numpy_image", hiccup)
    monkeypatch.setattr(dataset.time, "sleep", pauses.append)
    images = reader(ImageDataset, file)
    images._dataparser_outputs.alpha_color = images._dataparser_outputs.mask_filenames = None
    images.metadata, images.mask_color = {}, None
    assert images.get_data(0)["image"].shape == (101, 83, 3)
    assert len(pauses) == 1
    left = 2
    with pytest.raises(GSScaleError, match=r"a\.png .*Stale file handle.*mend the file"):
        images.get_data(0)
    assert len(pauses) == 2
