"""A budget that is asked for in the viewer reaches the engine between steps, on its own thread."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from gsscale_nerfstudio.budget_changes import BudgetChanges
from gsscale_nerfstudio.engines import Budget, HostEngine
from gsscale_nerfstudio.engines.budget import IN_TENSORS
from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.memory_plan import Circumstances, Gpu, make_plan
from gsscale_nerfstudio.store import HostStore, RowLayout
from tests.engines.driving import random_rows
from tests.runs import make_config, tiny_scene

GIVEN = Circumstances(
    RowLayout(0), rows=100, wanted=1000, view_rows=50, view_pixels=1_000_000, memory=10**10,
    headroom=10**8, images=0, gpu=Gpu(free=8 * 10**9, budget=None),
)  # fmt: skip


@pytest.fixture
def engine() -> HostEngine:
    store = HostStore(RowLayout(0), max_rows=1000)
    store.append(random_rows(100, store.layout), stamp=0)
    return HostEngine(store, torch.device("cpu"))


def test_the_plan_follows(engine):
    changes = BudgetChanges(engine)
    changes.begin(make_plan(GIVEN), GIVEN)
    before = changes.plan
    changes.ask(4.0)
    assert "4 GB" in changes.said and changes.plan is before and engine.budget == Budget()
    changes.apply(7)
    assert changes.said == "The budget is 4 GB since step 7."
    assert engine.budget == Budget(4.0)
    assert changes.plan.gpu.available == int(IN_TENSORS * 4e9)
    assert changes.plan.host is before.host


def test_the_last_one_counts(engine):
    changes = BudgetChanges(engine)
    for gigabytes in (4.0, 3.0, 5.0):
        changes.ask(gigabytes)
    changes.apply(0)
    assert engine.budget == Budget(5.0)


def test_what_the_plan_refuses(engine):
    changes = BudgetChanges(engine)
    changes.begin(make_plan(GIVEN), GIVEN)
    before = changes.plan
    changes.ask(0.3)
    changes.apply(1)
    assert changes.said.startswith("Refused: ") and "what the largest training view" in changes.said
    assert changes.said.endswith("No budget is set, and training goes on.")
    assert engine.budget == Budget() and changes.plan is before


def test_what_the_engine_refuses(engine, monkeypatch):
    engine.budget = Budget(6.0)
    changes = BudgetChanges(engine)
    changes.begin(make_plan(GIVEN), GIVEN)
    before = changes.plan

    def refuse(budget: Budget) -> None:
        raise GSScaleError("too small")

    monkeypatch.setattr(engine, "set_budget", refuse)
    changes.ask(2.0)
    changes.apply(1)
    assert changes.said == "Refused: too small. It stays at 6 GB, and training goes on."
    assert changes.plan is before


def test_the_plan_is_for_the_rows_of_now(engine):
    """A view that has grown since the start may be too large for a budget that it once fitted."""
    few = replace(GIVEN, rows=1, view_rows=1_000_000, memory=10**12)  # now 100 times as many
    changes = BudgetChanges(engine)
    changes.begin(make_plan(few), few)
    changes.ask(0.9)
    changes.apply(1)
    assert "100,000,000 Gaussians" in changes.said


def test_training_thread_applies_it_between_steps(tmp_path, monkeypatch):
    trainer = make_config(tiny_scene(tmp_path / "scene"), tmp_path, steps=4).setup()
    trainer.setup()
    pipeline, engine = trainer.pipeline, trainer.pipeline.model.engine
    asked = threading.Event()
    applied = []
    set_budget = engine.set_budget

    def record(budget: Budget) -> None:
        applied.append((threading.current_thread(), engine.step_count, engine._under_way, budget))
        set_budget(budget)

    def from_elsewhere() -> None:
        pipeline._budget_changes.ask(2.0)
        asked.set()

    train_step = pipeline.get_train_loss_dict

    def in_step(step: int) -> object:
        if step == 1:
            threading.Thread(target=from_elsewhere).start()
            asked.wait(60)
        return train_step(step)

    monkeypatch.setattr(engine, "set_budget", record)
    monkeypatch.setattr(pipeline, "get_train_loss_dict", in_step)
    trainer.train()
    assert applied == [(threading.main_thread(), 2, False, Budget(2.0))]
    assert engine.step_count == 4
