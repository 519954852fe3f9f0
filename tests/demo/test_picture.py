"""Cutting ns-eval's pictures, the baseline, and putting the comparison together."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from gsscale_nerfstudio.demo.picture import View, heat, read_views, write_picture
from gsscale_nerfstudio.errors import GSScaleError


def noise(seed, shape=(12, 16, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_views_are_cut_in_the_order_of_their_numbers(tmp_path):
    pairs = [(noise(2 * number), noise(2 * number + 1)) for number in range(3)]
    for number, pair in enumerate(pairs):
        side_by_side = Image.fromarray(np.concatenate(pair, axis=1))
        side_by_side.save(tmp_path / f"eval_img_{number:04d}.png")
    Image.fromarray(noise(9)).save(tmp_path / "eval_depth_0000.png")
    views = read_views(tmp_path)
    assert len(views) == 3
    for view, (truth, render) in zip(views, pairs, strict=True):
        assert np.array_equal(view.truth, truth)
        assert np.array_equal(view.render, render)


def test_no_views_is_an_error_that_says_where(tmp_path):
    with pytest.raises(GSScaleError, match=str(tmp_path)):
        read_views(tmp_path)


def test_psnr_is_that_of_torchmetrics():
    torch = pytest.importorskip("torch")
    metrics = pytest.importorskip("torchmetrics.image")
    view = View(noise(0), noise(1))
    measure = metrics.PeakSignalNoiseRatio(data_range=1.0)
    expected = measure(torch.tensor(view.render / 255.0), torch.tensor(view.truth / 255.0))
    assert view.psnr == pytest.approx(float(expected), abs=1e-4)


def test_no_other_constant_colour_is_closer():
    view = View(noise(0) // np.array([1, 2, 4], np.uint8), noise(1))
    for color in np.random.default_rng(1).integers(0, 256, (200, 3)):
        constant = np.broadcast_to(color.astype(np.uint8), view.truth.shape)
        assert View(view.truth, constant).psnr <= view.constant_psnr
    mean = view.truth.mean(axis=(0, 1)).round().astype(np.uint8)
    constant = np.broadcast_to(mean, view.truth.shape)
    assert View(view.truth, constant).psnr == pytest.approx(view.constant_psnr, abs=0.01)


def test_heat_is_black_without_error_and_grows_brighter():
    steps = np.arange(0, 65, dtype=np.uint8)
    truth = np.repeat(steps[None, :, None], 3, axis=2)
    colors = heat(View(truth, np.zeros_like(truth)))[0].astype(int)
    assert np.array_equal(colors[0], [0, 0, 0])
    assert np.array_equal(colors[-1], [255, 250, 210])
    assert np.all(np.diff(colors.sum(axis=1)) > 0)


def test_errors_in_either_direction_count():
    dark, light = np.full((4, 4, 3), 10, np.uint8), np.full((4, 4, 3), 40, np.uint8)
    assert np.array_equal(heat(View(dark, light)), heat(View(light, dark)))


def panel(picture, row, column, shape, zoom):
    """The pixels of one panel, found from the layout: gaps of 6, captions of 26."""
    height, width = shape[0] * zoom, shape[1] * zoom
    top = 6 + row * (26 + height + 6) + 26
    left = 6 + column * (width + 6)
    return picture[top : top + height : zoom, left : left + width : zoom]


def test_picture_shows_four_views_as_rows_of_three(tmp_path):
    shape = (120, 160, 3)
    views = [View(noise(2 * number, shape), noise(2 * number + 1, shape)) for number in range(7)]
    write_picture(tmp_path / "views.png", views)
    picture = np.asarray(Image.open(tmp_path / "views.png"))
    assert picture.shape == (6 + 4 * (26 + 240 + 6), 6 + 3 * (320 + 6), 3)
    for row, number in enumerate([0, 2, 4, 6]):
        view = views[number]
        assert np.array_equal(panel(picture, row, 0, shape, 2), view.truth)
        assert np.array_equal(panel(picture, row, 1, shape, 2), view.render)
        assert np.array_equal(panel(picture, row, 2, shape, 2), heat(view))
        caption = picture[6 + row * 272 : 6 + row * 272 + 26]
        assert caption.max() > 200


def test_one_view_is_enough(tmp_path):
    write_picture(tmp_path / "views.png", [View(noise(0), noise(1))])
    assert (tmp_path / "views.png").is_file()
