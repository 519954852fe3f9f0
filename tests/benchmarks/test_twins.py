"""twins.py on a tiny scene: both methods stay together, and it tells when they don't."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import twins
from benchmarks.plan import PlanError
from benchmarks.twins import TwinsArgs
from gsscale_nerfstudio.engines import colors
from tests.model import splatfacto
from tests.runs import make_config, tiny_scene, train

SETTINGS = ("machine.device-type=cpu", "pipeline.model.num-downscales=0")


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> TwinsArgs:
    folder = tmp_path_factory.mktemp("twins")
    scene = tiny_scene(folder / "scene")
    trainer = train(make_config(scene, folder / "out", steps=7))
    (checkpoint,) = trainer.checkpoint_dir.glob("*.ckpt")
    ours = ("gsscale:pipeline.model.vram-budget-gb=3", *SETTINGS)  # splatfacto has no such setting
    return TwinsArgs(
        scene, checkpoint, (1, 4), "host", ours, ("eval-mode=interval", "eval-interval=4")
    )


@pytest.fixture(autouse=True)
def _splatfacto_on_the_cpu():
    with splatfacto.on_the_cpu():
        yield


def measure(args: TwinsArgs) -> tuple[dict[tuple[int, str], twins.Apart], str]:
    console = Console(file=io.StringIO(), width=200)
    found = twins.measure(args, console)
    return {(one.mark, one.name): one for one in found}, console.file.getvalue()


def test_both_do_the_same(args):
    found, said = measure(args)
    assert len(found) == 2 * (6 * 3 + 3) and "exp_avg_sq of features_rest" in said
    for (mark, name), one in found.items():
        assert one.difference < 1e-3, (mark, name)
        assert one.rows_apart < 0.02, (mark, name)
    assert found[4, "count"].difference == 0
    assert found[1, "exp_avg of opacities"].difference > 0 or found[4, "means"].difference > 0


def test_a_gradient_that_does_not_arrive_is_seen(args, monkeypatch):
    through = colors._Connect.backward

    def some_of(ctx, gradient):
        return through(ctx, gradient * (torch.arange(len(gradient)) > 9)[:, None])

    monkeypatch.setattr(
        colors._Connect,
        "backward",
        lambda ctx, g: through(ctx, g * (torch.arange(len(g)) > 9)[:, None]),
    )
    found, _ = measure(args)
    one = found[1, "exp_avg of features_dc"]
    assert one.difference > 1e-3 and one.rows_apart > 0


def test_rows_that_changed_are_not_compared(args):
    refined = TwinsArgs(**{**vars(args), "marks": (1, 4)})
    refined.overrides = (
        *SETTINGS,
        "pipeline.model.warmup-length=5",
        "pipeline.model.refine-every=3",
        "pipeline.model.densify-grad-thresh=1e-9",
        "pipeline.model.reset-alpha-every=1000",
    )
    with pytest.raises(PlanError, match="smaller --marks"):
        measure(refined)


@pytest.mark.parametrize("marks", [(), (0, 1), (3, 2), (2, 2)])
def test_marks_that_mean_nothing(args, marks):
    with pytest.raises(PlanError, match="ascending"):
        twins.measure(TwinsArgs(args.scene, args.checkpoint, marks), Console())


def test_no_checkpoint(args):
    with pytest.raises(PlanError, match="no checkpoint"):
        twins.measure(TwinsArgs(args.scene, Path("missing.ckpt")), Console())
