"""The panel's texts; that a browser shows them is seen in tests/e2e/test_viewer.py."""

from __future__ import annotations

import gc
import re
import threading
import time
import weakref
from pathlib import Path

import pytest
import viser
from nerfstudio.viewer.utils import parse_object
from nerfstudio.viewer.viewer_elements import ViewerElement

from gsscale_nerfstudio import panel as panel_module
from gsscale_nerfstudio.memory_plan import MemoryPlan, Part, Side
from gsscale_nerfstudio.panel import Panel, engine_text, plan_text
from tests.runs import make_config, tiny_scene

TOLD = {"rows": 1234567.0, "host_memory_gb": 3.456}
MEANS = {
    "visible_rows": 4321.0, "hit_rate": 0.734, "link_mb": 12.3, "link_gb_per_s": 1.5,
    "host_wait_ms": 0.1, "cull_ms": 0.2,
}  # fmt: skip
GPU = {
    "gpu_allocated_gb": 1.0, "gpu_reserved_gb": 1.25, "link_wait_ms": 0.5,
    "cached_rows": 5000.0, "cache_capacity": 6000.0,
}  # fmt: skip


def cells(text: str) -> dict[str, str]:
    rows = [re.fullmatch(r"\| (.*) \| (.*) \|", line) for line in text.splitlines()]
    return {row[1]: row[2] for row in rows if row is not None and row[2].strip(" -:")}


def test_text_before_the_first_step():
    expected = {"in host memory": "1,234,567", "host memory": "3.46 GB"}
    assert cells(engine_text(TOLD, None)) == expected
    expected["visible, last render"] = "77"
    assert cells(engine_text(TOLD, 77)) == expected


def test_text_with_everything():
    assert cells(engine_text(TOLD | MEANS | GPU, 77)) == {
        "in host memory": "1,234,567",
        "on the GPU": "5,000",
        "room on the GPU": "6,000",
        "visible, last render": "77",
        "visible, training": "4,321",
        "hit rate": "73%",
        "host memory": "3.46 GB",
        "GPU memory": "1.00 GB",
        "reserved there": "1.25 GB",
        "link, a view": "12.3 MB",
        "link rate": "1.50 GB/s",
        "wait for link": "0.5 ms",
    }


def test_text_of_a_plan():
    host = Side("host memory", (Part("store", 10**9, 2 * 10**9), Part("images", 0, 0)), 8 * 10**9)
    text = plan_text(MemoryPlan(5000, 0.0, host, None, ("it is tight",)))
    assert text.splitlines() == [
        "| GB | now | full | of |",
        "| :-- | --: | --: | --: |",
        "| **host memory** | 1.00 | 2.00 | 8.00 |",
        "| store | 1.00 | 2.00 |  |",
        "",
        "Full is with 5,000 Gaussians.",
        "",
        "it is tight",
    ]
    assert plan_text(None) == ""


@pytest.fixture
def server():
    server = viser.ViserServer(port=0, verbose=False)
    yield server
    server.stop()


def contents(panel: Panel) -> list[str]:
    return [handle.content for handle, _ in panel._texts]


@pytest.fixture
def trainer(tmp_path: Path):
    trainer = make_config(tiny_scene(tmp_path / "scene"), tmp_path, steps=3).setup()
    trainer.setup()
    return trainer


def test_nerfstudio_finds_it(trainer):
    found = parse_object(trainer.pipeline, ViewerElement, "Custom Elements")
    assert found == [("Custom Elements/panel", trainer.pipeline.panel)]


def test_it_is_kept_up_to_date_while_somebody_looks(trainer, server, monkeypatch):
    monkeypatch.setattr(panel_module, "_SECONDS", 0.01)
    watched = threading.Event()
    monkeypatch.setattr(Panel, "watched", property(lambda self: watched.is_set()))
    panel = trainer.pipeline.panel
    panel.install(server)
    before = contents(panel)
    assert "300" in before[0] and "training" not in before[0] and before[1] == ""
    trainer.train()
    time.sleep(0.1)
    assert contents(panel) == before
    watched.set()
    deadline = time.monotonic() + 60
    told, plan = "", ""
    while not ("training" in told and plan) and time.monotonic() < deadline:
        time.sleep(0.01)
        told, plan = contents(panel)  # one is written after the other
    assert "visible, training" in cells(told)
    assert "**host memory**" in plan and "GPU" not in plan


def test_its_thread_ends_with_it(trainer, server, monkeypatch):
    monkeypatch.setattr(panel_module, "_SECONDS", 0.01)
    panel = Panel(trainer.pipeline.model, trainer.pipeline._budget_changes)
    before = set(threading.enumerate())
    panel.install(server)
    (thread,) = (t for t in set(threading.enumerate()) - before if t.name == "gsscale-panel")
    gone = weakref.ref(panel)
    del panel
    gc.collect()
    thread.join(60)
    assert not thread.is_alive() and gone() is None


def test_a_budget_is_asked_for_where_it_has_an_effect(trainer, server, monkeypatch):
    pipeline = trainer.pipeline
    monkeypatch.setattr(type(pipeline.model.engine), "bounded", True)
    pipeline.model.engine.budget = type(pipeline.model.engine.budget)(3.5)
    buttons, fields = [], []
    add_button, add_number = server.gui.add_button, server.gui.add_number
    monkeypatch.setattr(
        server.gui, "add_button", lambda *a, **k: buttons.append(add_button(*a, **k)) or buttons[-1]
    )
    monkeypatch.setattr(
        server.gui, "add_number", lambda *a, **k: fields.append(add_number(*a, **k)) or fields[-1]
    )
    pipeline.panel.install(server)
    (button,), (field,) = buttons, fields
    assert field.value == 3.5
    field.value = 2.5
    assert pipeline._budget_changes._wanted.empty(), "typing is not asking"
    for click in button._impl.update_cb:
        click(None)
    assert pipeline._budget_changes._wanted.get() == 2.5
    pipeline.panel.refresh()
    assert contents(pipeline.panel)[1] == "The next training step will begin with 2.5 GB."
