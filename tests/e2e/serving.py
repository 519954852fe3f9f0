"""Nerfstudio's viewer as a process, and a page of it in Chromium without a display."""

from __future__ import annotations

import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PATIENCE = 300.0
"""Seconds until something that has not come is a failure: CI's machines are slow at times."""

_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",  # WebGL without one
]  # fmt: skip
_CODE = """
import sys
from importlib.metadata import entry_points
name = sys.argv[0] = sys.argv.pop(1)
sys.exit(entry_points(group="console_scripts")[name].load()())
"""
"""A console script, also of packages that were installed without theirs."""
_LOCAL_ONLY = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
"""The page's logo is on the web; waiting for it would be waiting for nothing."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A running console script that serves the viewer."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.port, self._log = process, port, log
        self.url = f"http://127.0.0.1:{port}/"

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def until(self, happened: Callable[[], object], what: str) -> None:
        """Wait for something, as long as the process lives."""
        deadline = time.monotonic() + PATIENCE
        while not happened():
            assert self.process.poll() is None, f"it ended\n{self.output[-4000:]}"
            assert time.monotonic() < deadline, f"not in time: {what}\n{self.output[-4000:]}"
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.url, timeout=10) as page:
                return page.status == 200
        except (urllib.error.URLError, OSError):
            return False


@contextmanager
def serving(
    log: Path, name: str, *before: object, after: tuple[object, ...] = (), device: str = "cpu"
) -> Iterator[Server]:
    """Run the console script ``name``, with the viewer's flags between other arguments.

    Args:
        log: file for its output.
        name: of the script.
        before: arguments.
        after: arguments behind the viewer's, a dataparser's for instance.
        device: "cpu" hides the GPU from it.

    Yields:
        The :class:`Server`, once it answers; afterwards it and its children have ended.
    """
    port = _free_port()
    viewer = [
        "--viewer.websocket-host", "127.0.0.1", "--viewer.websocket-port", port,
        "--viewer.max-num-display-images", 0,  # training images would be in front of the picture
    ]  # fmt: skip
    arguments = map(str, (*before, *viewer, *after))
    without_gpu = {
        "TRITON_INTERPRET": "1",  # so that there is a cache without a GPU
        "CUDA_VISIBLE_DEVICES": "",
    }
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", _CODE, name, *arguments],
            cwd=log.parent,  # or the source tree would be found before the installed package
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                **(without_gpu if device == "cpu" else {}),
                "TORCHDYNAMO_DISABLE": "1",
                "OMP_NUM_THREADS": "1",
                "COLUMNS": "200",
            },
            start_new_session=True,
        )
    try:
        server = Server(process, port, log)
        server.until(server._answers, f"{name} serves a page")
        yield server
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Tab:
    """The viewer's page."""

    def __init__(self, page, server: Server) -> None:
        self.page, self._server = page, server

    def until(self, happened: Callable[[], object], what: str) -> None:
        def look() -> object:
            self.page.wait_for_timeout(1)  # lets Playwright handle what the page has sent
            return happened()

        try:
            self._server.until(look, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\nthe page says: {self.text()}") from None

    def text(self) -> str:
        return self.page.inner_text("body")

    def table(self) -> dict[str, str]:
        """What the panel says: its tables of two columns."""
        rows = self.page.evaluate(
            "[...document.querySelectorAll('tr')]"
            ".map(row => [...row.cells].map(cell => cell.innerText))"
        )
        return dict(row for row in rows if len(row) == 2)

    def picture(self) -> np.ndarray:
        """The middle of the canvas, [h, w, 3] float, 0 to 255."""
        clip = {"x": 100, "y": 100, "width": 760, "height": 600}
        png = self.page.screenshot(clip=clip, timeout=PATIENCE * 1000)
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=float)

    def still_picture(self) -> np.ndarray:
        """The picture, when it has come to rest."""
        pictures = [self.picture()]

        def rests() -> bool:
            pictures.append(self.picture())
            return difference(pictures[-2], pictures[-1]) < 0.5

        self.until(rests, "a picture that does not change")
        return pictures[-1]

    def changed_picture(self, before: np.ndarray, what: str) -> np.ndarray:
        """The picture, when it is another one and has come to rest."""
        self.until(lambda: difference(before, self.picture()) > 3, what)
        return self.still_picture()

    def choose(self, label: str, option: str) -> None:
        """Choose one of a drop-down's options."""
        self.page.get_by_label(label).click()
        self.page.get_by_role("option", name=option, exact=True).click()

    def drag(self, dx: int, dy: int) -> None:
        """Turn the camera about the scene."""
        mouse = self.page.mouse
        mouse.move(480, 400)
        mouse.down()
        mouse.move(480 + dx, 400 + dy, steps=10)
        mouse.up()


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over pixels and channels, in levels of 255."""
    return float(np.abs(a - b).mean())


def find_browser() -> str:
    """Path of a browser that can be driven; skips the test where there is none."""
    pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no browser: apt-get install chromium")
    return path


@contextmanager
def tab(server: Server, browser_path: str) -> Iterator[Tab]:
    """Open the page in a browser with a profile of its own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=browser_path, args=[*_FLAGS, _LOCAL_ONLY], timeout=PATIENCE * 1000
        )
        try:
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            page.set_default_timeout(PATIENCE * 1000)
            page.goto(server.url)
            yield Tab(page, server)
        finally:
            browser.close()
