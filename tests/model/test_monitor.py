"""What a training says of its memory and of the link."""

from __future__ import annotations

import re
import time
from pathlib import Path

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gsscale_nerfstudio.engines import waits
from gsscale_nerfstudio.engines.waits import COUNTER, LinkWaits
from gsscale_nerfstudio.monitor import Monitor
from gsscale_nerfstudio.store import RowLayout
from tests.engines.driving import drive, make_engine, random_rows
from tests.runs import make_config, tiny_scene, train

ROWS = 400
PAGE = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text()


def test_means_are_over_the_views_since_the_last_time():
    layout = RowLayout(0)
    engine = make_engine(random_rows(ROWS, layout), layout, "cpu", None)
    twice, once = Monitor(engine), Monitor(engine)
    answers, rows = [], []

    def after_step(step: int) -> None:
        rows.append(len(engine.current))
        if step in (1, 5):
            answers.append(twice.ask())

    drive(engine, 6, after_step=after_step)
    means = [sum(rows[:2]) / 2, sum(rows[2:]) / 4]
    assert [answer["visible_rows"] for answer in answers] == pytest.approx(means)
    assert means[0] != means[1]
    bytes_of_row = 2 * 4 * layout.width
    assert [answer["link_mb"] for answer in answers] == pytest.approx(
        [bytes_of_row * mean / 1e6 for mean in means]
    )
    assert all(0 < answer["hit_rate"] < 1 for answer in answers)
    assert all(answer["cull_ms"] > 0 and answer["host_wait_ms"] > 0 for answer in answers)
    whole = once.ask()
    assert whole["visible_rows"] == pytest.approx(sum(rows) / 6)
    counters = engine.counters
    assert whole["hit_rate"] == pytest.approx(1 - counters["rows_missed"] / counters["rows"])
    assert (whole["hits"] + whole["misses"], whole["misses"]) == (
        sum(rows),
        counters["rows_missed"],
    )
    of_both = [sum(answer[name] for answer in answers) for name in ("hits", "misses")]
    assert of_both == [whole["hits"], whole["misses"]]


def test_without_a_view_there_are_no_means():
    layout = RowLayout(0)
    engine = make_engine(random_rows(ROWS, layout), layout, "cpu", None)
    state = Monitor(engine).ask()
    assert state.keys() == {"rows", "host_memory_gb"}
    assert state["rows"] == ROWS
    assert state["host_memory_gb"] == pytest.approx(psutil.Process().memory_info().rss / 1e9, 0.2)


def test_a_cache_tells_how_full_it_is():
    layout = RowLayout(0)
    engine = make_engine(random_rows(ROWS, layout), layout, "cpu", ROWS)
    monitor = Monitor(engine)
    drive(engine, 24)  # twice around: the second time, all is there
    first = monitor.ask()
    assert first["cache_capacity"] == ROWS
    assert first["visible_rows"] < first["cached_rows"] <= ROWS
    assert first["hit_rate"] == pytest.approx(
        1 - first["cached_rows"] / (24 * first["visible_rows"])
    )


class Event:
    """A point in a stream that is reached when the test says so."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at: float | None = None

    def query(self) -> bool:
        return self.at is not None

    def elapsed_time(self, later: Event) -> float:
        assert self.at is not None and later.at is not None
        return later.at - self.at


def test_waits_are_counted_when_the_device_is_past_them(monkeypatch):
    queued: list[object] = []

    class Stream:
        record_event = queued.append

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    monkeypatch.setattr(waits, "wait_in_stream", lambda mark, device: queued.append(mark))
    counters: dict[str, float] = {}
    link, device = LinkWaits(counters), torch.device("cuda")
    link.wait(None, device)
    assert not queued
    link.wait("first", device)  # type: ignore[arg-type]
    link.wait("second", device)  # type: ignore[arg-type]
    before, first, after, _, second, _ = queued
    assert (first, second) == ("first", "second") and not counters
    before.at, after.at = 5.0, 12.0  # type: ignore[attr-defined]
    link.wait("third", device)  # type: ignore[arg-type]
    assert counters == {COUNTER: pytest.approx(7e-3)}


@pytest.mark.gpu
def test_waits_are_timed_on_the_device():
    device = torch.device("cuda")
    side, counters = torch.cuda.Stream(), {}
    link = LinkWaits(counters)
    for _ in range(3):
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)  # some 10 ms
        began = time.perf_counter()
        link.wait(side.record_event(), device)
        assert time.perf_counter() - began < 5e-3
        torch.cuda.synchronize()
    link.wait(side.record_event(), device)  # nothing to wait for
    torch.cuda.synchronize()
    link.wait(side.record_event(), device)
    assert 15e-3 < counters[COUNTER] < 100e-3


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_scene(tmp_path_factory.mktemp("monitor") / "scene")


def test_event_file_and_console(scene, tmp_path, capsys, monkeypatch):
    config = make_config(scene, tmp_path, steps=5)
    config.logging.steps_per_log = 2
    asked = []
    ask = Monitor.ask
    monkeypatch.setattr(Monitor, "ask", lambda self: asked.append(1) or ask(self))
    trainer = train(config)
    assert len(asked) == 3, "at steps that are logged, and no others"
    assert re.search(r"^4 \(80.00%\) +\S+", capsys.readouterr().out, re.M)
    events = EventAccumulator(str(trainer.base_dir))
    events.Reload()
    prefix = "Train Metrics Dict/gsscale/"
    names = {t.removeprefix(prefix) for t in events.Tags()["scalars"] if t.startswith(prefix)}
    assert names > {"rows", "visible_rows", "hit_rate", "link_mb", "host_memory_gb"}
    visible = events.Scalars(prefix + "visible_rows")
    assert [event.step for event in visible] == [0, 2, 4]
    rows = trainer.pipeline.model.num_points
    assert all(0 < event.value <= rows for event in visible)
    assert [event.value for event in events.Scalars(prefix + "rows")] == [rows] * 3


def test_every_name_is_on_the_page(scene, tmp_path, monkeypatch):
    layout = RowLayout(0)
    engine = make_engine(random_rows(ROWS, layout), layout, "cpu", ROWS)
    monitor = Monitor(engine)
    drive(engine, 2)
    engine.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1e9)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2e9)
    told = monitor.ask()
    assert told["gpu_allocated_gb"] == 1 and told["gpu_reserved_gb"] == 2
    named = re.findall(r"^\| `gsscale/(\w+)` \|", PAGE, re.M)
    assert sorted(named) == sorted(told)
