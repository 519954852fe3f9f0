"""GPU memory runs out in training, evaluation or the viewer: the run goes on."""

from __future__ import annotations

import random
import threading
import weakref
from typing import Any

import pytest
import torch
from nerfstudio.viewer.render_state_machine import RenderStateMachine

import gsscale_nerfstudio.model
from gsscale_nerfstudio.demo.scene import write_scene
from gsscale_nerfstudio.engines import ResidentEngine
from gsscale_nerfstudio.engines.base import Engine
from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.trainer import GSScaleTrainer
from gsscale_nerfstudio.undo import Undo
from tests.runs import differences, edit_json, make_config, seeded, tiny_scene, train
from tests.shortage import FailingBackward, Shortage

STEPS = 18

IN_FORWARD = {
    "image": "gsscale_nerfstudio.images.Uploads._copied",
    "next image": "gsscale_nerfstudio.images.Uploads.start",
    "rasterize": "gsscale_nerfstudio.model.rasterize",
    "loss": "gsscale_nerfstudio.model.photometric_loss",
    "statistics": "gsscale_nerfstudio.model.screen_statistics",
}
PLACES = {
    "host": {
        **IN_FORWARD,
        "cold rows": "gsscale_nerfstudio.engines.staging.Upload.send",
        "leaves": "gsscale_nerfstudio.engines.host.empty_attributes",
        "gradients": "gsscale_nerfstudio.engines.packing.leaf_gradients",
    },
    "resident": {
        **IN_FORWARD,
        "admit": "gsscale_nerfstudio.engines.cache.RowCache.admit",
        "leaves": "gsscale_nerfstudio.engines.cache.empty_attributes",
        "gradients": "gsscale_nerfstudio.engines.cache.leaf_gradients",
        "tables": "gsscale_nerfstudio.optim.device_tables.DeviceTables.foresee",
    },
}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_scene(tmp_path_factory.mktemp("short") / "scene", images=8)


@pytest.fixture
def shortage(monkeypatch: pytest.MonkeyPatch) -> Shortage:
    """One of the ``later`` places fails at a time, from the third step on."""
    shortage = Shortage(monkeypatch)
    one_step = GSScaleTrainer.train_iteration
    announce, abandon = Engine.announce, Engine.abandon
    survived: list[str] = []

    def announced(self: Engine, views: Any) -> None:
        announce(self, views)
        self._wait_for_worker()  # see tests/engines/test_out_of_memory.py

    def abandoned(self: Engine) -> None:
        survived[:] = shortage.hits
        abandon(self)

    def train_iteration(self: GSScaleTrainer, step: int) -> Any:
        # What fails in the worker comes up one or two steps later.
        if step >= 2 and shortage.later and not shortage.wanted and survived == shortage.hits:
            shortage.wanted.append(shortage.later.pop(0))
        return one_step(self, step)

    monkeypatch.setattr(Engine, "announce", announced)
    monkeypatch.setattr(Engine, "abandon", abandoned)
    monkeypatch.setattr(GSScaleTrainer, "train_iteration", train_iteration)
    monkeypatch.setattr("gsscale_nerfstudio.engines.resident._RARELY", 0)
    return shortage


def config_of(scene: Any, output: Any, engine: str, modules: bool, steps: int = STEPS) -> Any:
    config = make_config(
        scene,
        output,
        steps=steps,
        engine=engine,
        warmup_length=4,
        refine_every=5,
        sh_degree_interval=4,
        densify_grad_thresh=0.002,
    )
    if modules:
        config.pipeline.model.camera_optimizer.mode = "SO3xR3"
        config.pipeline.model.use_bilateral_grid = True
        config.gradient_accumulation_steps = {"camera_opt": 3}
    return config


def saved(trainer: GSScaleTrainer) -> dict[str, Any]:
    (path,) = trainer.checkpoint_dir.glob("*.ckpt")
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("engine", "modules"), [("host", False), ("host", True), ("resident", False)]
)
def test_a_run_ends_with_the_bits_of_one_that_had_memory(
    scene, tmp_path, monkeypatch, shortage, engine, modules, capsys
):
    """Whatever the place: images, random backgrounds, poses, statistics and rows are the same."""
    seeded(1)
    whole = train(config_of(scene, tmp_path / "whole", engine, modules))

    places = dict(PLACES[engine])
    if modules:
        places.pop("cold rows", None)  # no view is announced: its pose is not known yet
    for name, target in places.items():
        shortage.place(name, target)
    from gsscale_nerfstudio import model

    loss = model.photometric_loss

    def failing_in_backward(*args: Any) -> torch.Tensor:
        return FailingBackward.apply(loss(*args), lambda: shortage.fail("backward"))

    monkeypatch.setattr(model, "photometric_loss", failing_in_backward)
    wanted = [*places, "backward"]
    if modules:
        # When Adam has written its moments and not yet the poses, or grids.
        shortage.place("Adam", "torch.Tensor.addcdiv_")
        shortage.place("Adam at last", "torch.Tensor.addcdiv_", late=True)
        wanted += ["Adam", "Adam at last"]
    leaves: list[weakref.ref[torch.Tensor]] = []
    running: list[Engine] = []

    def note_leaves() -> None:
        current = running[0].current if running else None
        leaves[:] = [weakref.ref(leaf) for leaf in current.leaves.values()] if current else []

    abandon = Engine.abandon

    def checked(self: Engine) -> None:
        abandon(self)
        assert all(leaf() is None for leaf in leaves)

    begin = Engine.begin

    def noted(self: Engine, *args: Any) -> Any:
        running[:] = [self]
        return begin(self, *args)

    monkeypatch.setattr(Engine, "abandon", checked)
    monkeypatch.setattr(Engine, "begin", noted)
    shortage.when_hit = note_leaves
    shortage.later = list(wanted)
    capsys.readouterr()
    seeded(1)
    failing = train(config_of(scene, tmp_path / "failing", engine, modules))
    assert sorted(shortage.hits) == sorted(wanted)
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("kept for later was given back") == len(wanted)
    assert differences(saved(whole), saved(failing)) == []


def test_the_cache_shrinks_and_the_run_goes_on(scene, tmp_path, monkeypatch, shortage, capsys):
    monkeypatch.setattr("gsscale_nerfstudio.engines.resident._RARELY", 100)
    monkeypatch.setattr("gsscale_nerfstudio.engines.sizing._ROOMY", 1)
    shortage.place("loss", "gsscale_nerfstudio.model.photometric_loss")
    shortage.later = ["loss"] * 2
    config = config_of(scene, tmp_path / "short", "resident", False)
    trainer = train(config)
    told = " ".join(capsys.readouterr().out.split())
    assert shortage.hits == ["loss"] * 2 and trainer.step == STEPS - 1
    assert "given back" in told
    # The views of this scene see all of it, so a smaller cache is none.
    assert "Adam runs on the CPU" in told


def test_a_run_that_cannot_go_on_says_what_to_do(scene, tmp_path, monkeypatch, capsys):
    shortage = Shortage(monkeypatch)
    shortage.place("loss", "gsscale_nerfstudio.model.photometric_loss")
    shortage.wanted = ["loss"] * 5
    with pytest.raises(SystemExit):
        train(config_of(scene, tmp_path / "out", "host", False))
    told = " ".join(capsys.readouterr().out.split())
    assert shortage.hits == ["loss"] * 2
    for part in ("64 x 48 pixels", "300 Gaussians", "2.00 GiB", "camera-res-scale-factor"):
        assert part in told


def test_a_step_whose_log_has_no_memory_is_not_done_twice(scene, tmp_path, monkeypatch, capsys):
    shortage = Shortage(monkeypatch)
    shortage.place("norm", "torch.Tensor.norm")
    config = config_of(scene, tmp_path / "out", "host", False)
    config.log_gradients = True
    step_rows = Engine.group_stepped

    def stepped(self: Engine, name: str, lr: float) -> None:
        step_rows(self, name, lr)
        if self.step_count == 3:
            shortage.wanted = ["norm"]

    monkeypatch.setattr(Engine, "group_stepped", stepped)
    with pytest.raises(SystemExit):
        train(config)
    assert "--log-gradients" in capsys.readouterr().out


def test_densification_that_has_no_memory_says_what_to_do(scene, tmp_path, monkeypatch, capsys):
    """Nerfstudio calls it outside of a step."""
    shortage = Shortage(monkeypatch)
    shortage.place("densify", "gsscale_nerfstudio.densify.RowStrategy._densify")
    shortage.wanted = ["densify"]
    with pytest.raises(SystemExit):
        train(config_of(scene, tmp_path / "out", "host", False))
    told = " ".join(capsys.readouterr().out.split())
    assert "GPU memory ran out in densification (CUDA out of memory. Tried" in told
    assert "--load-dir" in told


def test_evaluation_and_renders_are_tried_again(scene, tmp_path, monkeypatch):
    trainer = train(config_of(scene, tmp_path / "out", "host", False, steps=3))
    expected, images = trainer.pipeline.get_eval_image_metrics_and_images(3)
    rendered = trainer.pipeline.model.last_size
    shortage = Shortage(monkeypatch)
    shortage.place("rasterize", "gsscale_nerfstudio.model.rasterize")
    shortage.place("metrics", "pytorch_msssim.SSIM.forward")
    for place in ("rasterize", "metrics"):
        shortage.wanted = [place]
        trainer.pipeline.datamanager.eval_unseen_cameras = [0, 1]
        metrics, again = trainer.pipeline.get_eval_image_metrics_and_images(3)
        assert len(trainer.pipeline.datamanager.eval_unseen_cameras) == 1  # one image was used
    assert shortage.hits == ["rasterize", "metrics"] and rendered == (48, 64)
    assert metrics.keys() == expected.keys() and again["img"].shape == images["img"].shape


def trained(scene: Any, output: Any, engine: str) -> tuple[GSScaleTrainer, Any]:
    """A training between two steps, and a camera to render."""
    trainer = train(config_of(scene, output, engine, False, steps=3))
    trainer.pipeline.eval()
    camera, _ = next(iter(trainer.pipeline.datamanager.fixed_indices_eval_dataloader))
    return trainer, camera


def state_of(engine: Engine) -> Any:
    cache = engine._cache if isinstance(engine, ResidentEngine) else None
    return cache, engine.cached, engine._sizing.most, getattr(engine._sizing, "_most_slots", 0)


@pytest.mark.parametrize("engine", ["host", "resident"])
def test_a_render_without_memory_is_drawn_in_windows_first(scene, tmp_path, monkeypatch, engine):
    """Training keeps its cache, and views in one piece; later renders begin with windows."""
    trainer, camera = trained(scene, tmp_path / "out", engine)
    model = trainer.pipeline.model
    expected, before = model.get_outputs(camera), state_of(model.engine)
    drawn = []
    rasterize = gsscale_nerfstudio.model.rasterize

    def small(means: torch.Tensor, *args: Any, **options: Any) -> Any:
        if options["window"] is None:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        drawn.append(len(means))
        return rasterize(means, *args, **options)

    monkeypatch.setattr(gsscale_nerfstudio.model, "rasterize", small)
    monkeypatch.setattr("gsscale_nerfstudio.engines.sizing._FEWEST", 1)
    model.engine._sizing._quiet_steps = 5000
    for _ in range(2):
        drawn.clear()
        outputs = model.get_outputs(camera)
        assert len(drawn) > 1
        for name in ("rgb", "depth", "accumulation"):
            torch.testing.assert_close(outputs[name], expected[name], rtol=1e-5, atol=1e-5)
    assert state_of(model.engine) == before and not model.engine._sizing.quiet


class InViewer(RenderStateMachine):
    """A thread as the viewer's, which one error ends."""

    def __init__(self, work: Any) -> None:
        threading.Thread.__init__(self)
        self.work, self.result = work, None

    def run(self) -> None:
        self.result = self.work()


@pytest.mark.parametrize("engine", ["host", "resident"])
def test_the_viewer_gets_a_grey_picture_and_others_an_error(
    scene, tmp_path, monkeypatch, engine, capsys
):
    trainer, camera = trained(scene, tmp_path / "out", engine)
    model = trainer.pipeline.model
    expected, before = model.get_outputs(camera), state_of(model.engine)
    capsys.readouterr()
    rasterize = gsscale_nerfstudio.model.rasterize

    def scarce(*args: Any, **options: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gsscale_nerfstudio.model, "rasterize", scarce)
    for _ in range(2):
        viewer = InViewer(lambda: model.get_outputs(camera))
        viewer.start()
        viewer.join()
        assert viewer.result.keys() == expected.keys()
        assert (viewer.result["rgb"] == 0.5).all()
        for name, tensor in expected.items():
            assert viewer.result[name].shape == tensor.shape
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("the viewer shows grey") == 1 and "64 x 48 pixels" in said
    assert state_of(model.engine) == before
    monkeypatch.setattr(gsscale_nerfstudio.model, "rasterize", rasterize)
    assert torch.equal(model.get_outputs(camera)["rgb"], expected["rgb"])
    monkeypatch.setattr(gsscale_nerfstudio.model, "rasterize", scarce)
    with pytest.raises(GSScaleError, match="nothing is left"):
        model.get_outputs(camera)


@pytest.mark.parametrize("engine", ["host", "resident"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_metrics_without_memory_are_computed_on_the_cpu(
    scene, tmp_path, monkeypatch, engine, device, capsys
):
    """However often: they do not cost training its cache, and the run goes on."""
    config = config_of(scene, tmp_path / "out", engine, False, steps=3)
    config.machine.device_type = device
    trainer = train(config)
    trainer.pipeline.eval()
    model = trainer.pipeline.model
    evaluated = next(iter(trainer.pipeline.datamanager.fixed_indices_eval_dataloader))
    outputs, batch = model.get_outputs(evaluated[0]), evaluated[1]
    expected, _ = model.get_image_metrics_and_images(outputs, batch)
    before = model.engine.cached, model.engine._sizing.most
    shortage, tried = Shortage(monkeypatch), []
    shortage.place("SSIM", "pytorch_msssim.SSIM.forward")
    compare = model.image_metrics.compare

    def noted(truth: torch.Tensor, *args: Any) -> Any:
        tried.append(truth.device.type)
        return compare(truth, *args)

    monkeypatch.setattr(model.image_metrics, "compare", noted)
    capsys.readouterr()
    for failures in (2, 1, 2):
        shortage.wanted = ["SSIM"] * failures
        metrics, _ = model.get_image_metrics_and_images(outputs, batch)
        assert metrics == pytest.approx(expected, abs=0 if device == "cpu" else 1e-3)
        assert len(tried) == failures + 1 and tried[-1] == ("cpu" if failures > 1 else device)
        tried.clear()
    assert (model.engine.cached, model.engine._sizing.most) == before
    assert not model.engine._sizing.limited
    assert capsys.readouterr().out.count("computed on the") == 1


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.RAdam])
def test_steps_of_ordinary_optimizers_are_taken_back(kind):
    """At their first step, where there is no state, and later; gradients that accumulate, too."""
    parameter = torch.nn.Parameter(torch.arange(4.0))
    optimizer = kind([parameter], lr=0.1)
    undo = Undo({"poses": optimizer})

    def state() -> Any:
        saved = optimizer.state_dict()["state"].get(0, {})
        gradient = parameter.grad if parameter.grad is None else parameter.grad.clone()
        return [parameter.detach().clone(), gradient, {k: v.clone() for k, v in saved.items()}]

    for tries in (2, 3, 1):
        before = state()
        undo.begin(["poses"])
        for _ in range(tries):
            parameter.square().sum().backward()
            optimizer.step()
            assert len(differences(before, state())) >= 3
            undo.take_back()
            assert differences(before, state()) == []
        undo.end()
        parameter.square().sum().backward()
        optimizer.step()


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["resident", "host"])
def test_a_run_goes_on_under_a_cap_that_is_lowered(tmp_path, monkeypatch, engine, capsys):
    """In the middle of a random step, when less than that step still needs is left."""
    unlucky = random.randrange(5, 35)
    print(f"the cap is lowered in step {unlucky}")
    wide = write_scene(tmp_path / "scene", images=8, width=320, height=240, points=200_000)

    def narrow(transforms: dict[str, Any]) -> None:
        transforms["fl_x"] *= 4
        transforms["fl_y"] *= 4

    edit_json(wide, narrow)
    config = make_config(wide, tmp_path / "out", steps=40, engine=engine, warmup_length=1000)
    config.machine.device_type = "cuda"
    device = torch.device("cuda", 0)
    _, total = torch.cuda.mem_get_info(device)
    from gsscale_nerfstudio import model

    rasterize, drawn = model.rasterize, []

    def lowered(*args: Any, **kwargs: Any) -> Any:
        drawn.append(torch.cuda.memory_allocated(device))
        if len(drawn) == unlucky:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            cap = torch.cuda.memory_allocated(device) + (1 << 20)
            torch.cuda.set_per_process_memory_fraction(cap / total, device)
        return rasterize(*args, **kwargs)

    monkeypatch.setattr(model, "rasterize", lowered)
    try:
        trainer = train(config)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    told = " ".join(capsys.readouterr().out.split())
    assert trainer.step == 39 and len(drawn) > 40
    assert f"GPU memory ran out after step {unlucky - 1}" in told
    assert trainer.pipeline.model.engine.step_count == 40
    if engine == "resident":
        assert "stay on the GPU, not" in told or "Adam runs on the CPU" in told
