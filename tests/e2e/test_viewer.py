"""Nerfstudio's viewer on gsscale, in a browser: pictures, camera, and the panel."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.serving import Tab, find_browser, serving, tab
from tests.runs import make_config, tiny_scene, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> str:
    return find_browser()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_scene(tmp_path_factory.mktemp("viewer") / "scene")


def see_a_picture(page: Tab) -> None:
    """Wait until the scene is drawn; there is nothing else that could be."""
    page.until(lambda: "Connected" in page.text(), "a connection to the server")
    page.until(lambda: "gsscale" in page.text(), "the panel")
    page.until(lambda: page.picture().std(axis=(0, 1)).mean() > 5, "a picture of the scene")


def turn_the_camera(page: Tab) -> None:
    before = page.still_picture()
    page.drag(150, 40)
    page.changed_picture(before, "another picture from another place")


def see_depth(page: Tab) -> None:
    color = page.still_picture()
    page.choose("Output type", "depth")
    depth = page.changed_picture(color, "a picture of depth")
    page.choose("Output type", "rgb")
    page.changed_picture(depth, "a picture of colours again")


def see_what_is_in_a_box(page: Tab) -> None:
    """Gaussians inside of the crop box, before the colour that the user has chosen."""
    page.page.get_by_label("Enable").nth(1).check()  # the first one is of the split screen
    height = page.page.get_by_label("Crop center").locator("xpath=following::input[2]")
    height.fill("-1")
    height.press("Enter")
    background = page.page.locator("input.mantine-ColorInput-input").first
    background.fill("#ff0000")
    background.press("Enter")
    red = np.array([255.0, 0.0, 0.0])

    def red_share() -> float:
        return float((np.abs(page.picture() - red).max(axis=2) < 10).mean())

    page.until(lambda: 0.1 < red_share() < 0.9, "something in a box, and red around it")


def step_of(page: Tab) -> int:
    return int(re.search(r"Step: (\d+)", page.text())[1])


def number(text: str) -> float:
    return float(re.match(r"[\d,.]+", text)[0].replace(",", ""))


def test_training(browser, scene, tmp_path):
    """With a cache, in Triton's interpreter, so that there is a budget to change."""
    with (
        serving(
            tmp_path / "log", "ns-train", "gsscale", "--data", scene, "--output-dir", tmp_path,
            "--vis", "viewer", "--max-num-iterations", 100_000,
            "--pipeline.model.engine", "resident", "--pipeline.model.vram-budget-gb", 2,
            "--pipeline.model.num-downscales", 0,
            "--pipeline.model.warmup-length", 10, "--pipeline.model.refine-every", 5,
            "--pipeline.model.densify-grad-thresh", 0.004, "--pipeline.model.max-gaussians", 400,
            after=("nerfstudio-data", "--eval-mode", "interval", "--eval-interval", 4),
        ) as server,
        tab(server, browser) as page,
    ):  # fmt: skip
        see_a_picture(page)

        # The panel: what is known only in training, and it changes.
        page.until(lambda: "visible, training" in page.table(), "numbers of training")
        first = page.table()
        assert 0 < number(first["visible, training"]) <= 400
        assert number(first["in host memory"]) <= 400
        assert number(first["on the GPU"]) <= number(first["room on the GPU"])
        page.until(
            lambda: first["visible, training"] != page.table()["visible, training"],
            "other numbers",
        )

        # Nothing but the camera and the page's settings changes the picture any more.
        page.page.get_by_role("button", name="Pause Training").click()
        page.page.get_by_role("button", name="Resume Training").wait_for()
        turn_the_camera(page)

        # Another budget: one that is refused, and one that is not.
        def ask_for(gigabytes: str) -> None:
            page.page.get_by_label("VRAM budget, GB").fill(gigabytes)
            page.page.get_by_role("button", name="Train with this budget").click()

        ask_for("0.1")
        page.until(lambda: "will begin with 0.1 GB" in page.text(), "the request")
        page.page.get_by_role("button", name="Resume Training").click()
        page.until(lambda: "Refused" in page.text(), "a refusal")
        assert "It stays at 2 GB, and training goes on." in page.text()
        ask_for("1.5")
        page.until(lambda: "The budget is 1.5 GB since step" in page.text(), "another budget")
        step = step_of(page)
        page.until(lambda: step_of(page) > step, "training goes on")


def test_a_saved_run(browser, scene, tmp_path):
    config = make_config(scene, tmp_path, steps=20)
    config.save_config()
    train(config)
    run = config.get_base_dir() / "config.yml"
    with (
        serving(tmp_path / "log", "ns-viewer", "--load-config", run) as server,
        tab(server, browser) as page,
    ):
        see_a_picture(page)
        page.until(lambda: "visible, last render" in page.table(), "the panel")
        before = page.table()
        assert before["in host memory"] == "300"
        assert 0 < number(before["visible, last render"]) <= 300
        turn_the_camera(page)
        see_depth(page)
        see_what_is_in_a_box(page)
        assert not {"link rate", "visible, training"} & page.table().keys()
        assert "VRAM budget" not in page.text() and "Memory plan" not in page.text()
