"""run_one.py: the config that it builds, the meter, and a whole run of a method made for this."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import images, machine, memory_cap, meter, offline, perceptual, run_one
from benchmarks import progress as progress_file
from benchmarks.errors import BenchmarkError
from benchmarks.host_memory import peak_host_bytes
from benchmarks.kept import KeptViews
from benchmarks.meter import TrainingMeter, timed_steps

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def ns_config():
    from benchmarks import ns_config

    return ns_config


def arguments(ns_config, scene: Path, overrides: list[str], engine: str | None = None) -> list[str]:
    return ns_config.train_arguments(
        method="splatfacto",
        scene=scene,
        steps=123,
        seed=7,
        engine=engine,
        overrides=overrides,
        dataparser_overrides=["eval-interval=4"],
        output_dir=scene / "out",
    )


def test_splatfacto_config(ns_config, colmap_scene):
    from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
    from nerfstudio.models.splatfacto import SplatfactoModelConfig

    overrides = [
        "pipeline.model.cull-alpha-thresh=0.005",
        "pipeline.model.grid-shape=1 2 3",
        "optimizers.means.optimizer.lr=0.5",
    ]
    config = ns_config.parse(arguments(ns_config, colmap_scene, overrides))
    model = config.pipeline.model
    assert type(model) is SplatfactoModelConfig
    assert (model.cull_alpha_thresh, model.grid_shape) == (0.005, (1, 2, 3))
    assert model.densify_grad_thresh == SplatfactoModelConfig().densify_grad_thresh
    assert config.optimizers["means"]["optimizer"].lr == 0.5
    assert (config.max_num_iterations, config.machine.seed) == (123, 7)
    assert config.pipeline.datamanager.data == colmap_scene
    parser = config.pipeline.datamanager.dataparser
    assert isinstance(parser, ColmapDataParserConfig)
    assert (parser.colmap_path, parser.downscale_factor) == (Path("sparse/0"), 1)
    assert parser.eval_interval == 4
    assert not config.is_viewer_enabled() and not config.is_wandb_enabled()
    assert str(config.get_base_dir()).startswith(str(colmap_scene / "out"))
    # Nothing may interrupt the timed steps.
    from nerfstudio.utils.misc import step_check

    for period in (
        config.steps_per_save,
        config.steps_per_eval_batch,
        config.steps_per_eval_image,
        config.steps_per_eval_all_images,
    ):
        assert not any(step_check(step, period) for step in range(123))


def test_a_setting_wins_over_ours(ns_config, colmap_scene):
    words = arguments(ns_config, colmap_scene, ["machine.device-type=cpu", "machine.seed=9"])
    config = ns_config.parse(words)
    assert (config.machine.device_type, config.machine.seed) == ("cpu", 9)


def test_unknown_names_are_refused(ns_config, colmap_scene, capsys):
    with pytest.raises(ns_config.ConfigError, match="refuses"):
        ns_config.parse(arguments(ns_config, colmap_scene, ["pipeline.model.nope=1"]))
    assert "nope" in capsys.readouterr().err, "the reason must stand in the log"
    with pytest.raises(ns_config.ConfigError, match="no method"):
        ns_config.engine_arguments("nope", "auto")
    with pytest.raises(ns_config.ConfigError, match="engine 'resident'"):
        ns_config.engine_arguments("splatfacto", "resident")
    assert ns_config.engine_arguments("splatfacto", "auto") == []
    assert ns_config.engine_arguments("splatfacto", None) == []


def test_a_failure_is_a_result(ns_config, tmp_path, capsys):
    result = tmp_path / "result.json"
    (tmp_path / "empty").mkdir()
    args = run_one.RunArgs("splatfacto", tmp_path / "empty", 10, result=result)
    assert run_one.main(args) == 1
    assert json.loads(result.read_text())["error"].startswith("SceneError: ")
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1]) == json.loads(result.read_text())
    assert "Traceback" in captured.err


@pytest.mark.parametrize(("steps", "expected"), [(1, 1), (2, 1), (100, 50), (2000, 1000)])
def test_timed_steps(steps, expected):
    assert timed_steps(steps) == expected
    assert timed_steps(30_000) == 1000


def test_meter_times_the_last_steps_only(monkeypatch):
    now, seen = 100.0, []
    monkeypatch.setattr(meter, "time", SimpleNamespace(perf_counter=lambda: now))
    training = TrainingMeter(10, cuda=False, on_step=seen.append)
    callback = training.callback()
    training.start()
    for step in range(10):
        now += 0.04 if step < 5 else 0.01
        callback.run_callback(step)
        if step == 2:
            with training.paused(lambda: None):
                now += 3
    assert seen == list(range(1, 11))
    result = training.result
    assert result is not None and result["timed_steps"] == 5
    assert result["it_per_s_last_1000"] == pytest.approx(100)
    assert result["wall_s"] == pytest.approx(0.25)
    assert result["peak_gpu_allocated_bytes"] is None
    assert result["peak_host_bytes"] > 1e8


def test_meter_takes_turns():
    calls = []
    turns: Any = SimpleNamespace(
        alone=lambda: calls.append("alone"),
        together=lambda: calls.append("together"),
        step_ended=lambda: calls.append("step"),
    )
    training = TrainingMeter(6, cuda=False, on_step=lambda done: None, turns=turns)
    callback = training.callback()
    training.start()
    for step in range(6):
        callback.run_callback(step)
    assert calls == ["step", "step", "alone", "step", "step", "together"]
    assert training.result is not None and training.result["wall_s"] is None


def test_meter_leaves_out_the_memory_of_pauses(monkeypatch):
    used = {"allocated": 0, "reserved": 0}

    def take(allocated: int, reserved: int) -> None:
        used["allocated"] = max(used["allocated"], allocated)
        used["reserved"] = max(used["reserved"], reserved)

    fake = SimpleNamespace(
        init=lambda: None,
        synchronize=lambda: None,
        reset_peak_memory_stats=lambda: used.update(allocated=0, reserved=0),
        max_memory_allocated=lambda: used["allocated"],
        max_memory_reserved=lambda: used["reserved"],
    )
    monkeypatch.setattr(meter, "torch", SimpleNamespace(cuda=fake))
    training = TrainingMeter(10, cuda=True, on_step=lambda done: None)
    take(50, 90)
    given_back = []
    with pytest.raises(RuntimeError), training.paused(lambda: given_back.append(True)):
        take(1000, 2000)
        raise RuntimeError("out of memory")
    assert given_back == [True]
    take(70, 80)
    peaks = training.peaks()
    assert peaks["peak_gpu_allocated_bytes"] == 70 and peaks["peak_gpu_reserved_bytes"] == 90


def test_the_cap_is_lifted_in_a_pause_and_put_back(monkeypatch):
    done = []
    cuda = SimpleNamespace(set_per_process_memory_fraction=done.append)
    monkeypatch.setattr(memory_cap, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(meter.TrainingMeter, "_now", lambda self: 0.0)
    training = TrainingMeter(10, cuda=False, on_step=lambda done: None, cap=0.25)
    training.cuda = True
    fake = SimpleNamespace(
        reset_peak_memory_stats=lambda: done.append("peaks"),
        max_memory_allocated=lambda: 0,
        max_memory_reserved=lambda: 0,
    )
    monkeypatch.setattr(meter, "torch", SimpleNamespace(cuda=fake))
    with pytest.raises(RuntimeError), training.paused(lambda: done.append("given back")):
        done.append("evaluated")
        raise RuntimeError("out of memory")
    assert done == [1.0, "evaluated", "given back", "peaks", 0.25]
    done.clear()
    with TrainingMeter(10, cuda=False, on_step=lambda done: None).paused():
        pass
    assert not done, "there was no cap"


def test_views_are_kept_of_the_evaluation_that_counts(tmp_path):
    kept = KeptViews(tmp_path / "views")
    kept.settle(True)
    assert len(kept) == 0

    def evaluate(value: float, counts: bool) -> list[tuple[int, float, float]]:
        for index in (0, 12):
            kept.add(index, torch.full((4, 6, 3), 0.5), torch.full((4, 6, 3), value + index))
        kept.settle(counts)
        return [(index, truth[0, 0, 0], render[3, 5, 2]) for index, truth, render in kept]

    assert evaluate(1, True) == [(0, 0.5, 1), (12, 0.5, 13)]
    assert evaluate(2, False) == [(0, 0.5, 1), (12, 0.5, 13)]
    assert evaluate(3, True) == [(0, 0.5, 3), (12, 0.5, 15)]


def test_details_are_pixels_of_the_image(tmp_path):
    kept = KeptViews(tmp_path / "views")
    ramp = torch.arange(40 * 50).reshape(40, 50, 1).expand(40, 50, 3) % 256 / 255
    for index in range(4):
        kept.add(index, ramp, 1 - ramp)
    kept.settle(True)
    images.save_views(kept, tmp_path / "out", "x", 2, crop=(10, 20, 30, 5))
    names = [
        f"x-view{i:03d}{what}" for i in (0, 2) for what in ("-detail.png", "-render.jpg", ".jpg")
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    pixels = np.asarray(Image.open(tmp_path / "out" / names[0]))
    expected = (ramp * 255).round().numpy().astype(np.uint8)[20:25, 10:40]
    assert (pixels == np.hstack([expected, 255 - expected])).all()


@pytest.mark.parametrize("crop", [(-1, 0, 5, 5), (0, 0, 0, 5), (46, 0, 5, 5), (0, 36, 5, 5)])
def test_a_detail_outside_of_the_image_is_refused(crop):
    images.check_crop((45, 35, 5, 5), 50, 40)
    with pytest.raises(BenchmarkError, match="50 x 40 pixels, not"):
        images.check_crop(crop, 50, 40)


def test_host_peak_is_the_process_own():
    """A child must not start with its parent's peak, as ``ru_maxrss`` does."""
    ballast = np.ones(400_000_000, dtype=np.uint8)
    assert peak_host_bytes() > ballast.nbytes
    code = "from benchmarks.host_memory import peak_host_bytes as peak; print(peak())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=machine.ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < ballast.nbytes


def test_progress(tmp_path):
    path = tmp_path / "progress.json"
    assert progress_file.read(path) == ("starting", 0)
    progress = progress_file.ProgressFile(path, 100)
    progress.step(1)
    progress.step(2)  # less than half a second later
    assert progress_file.read(path) == ("training", 1)
    progress.phase("evaluating", 100)
    assert progress_file.read(path) == ("evaluating", 100)
    progress_file.ProgressFile(None, 100).step(1)


def test_jpegs_are_small_and_views_spread():
    noise = np.random.default_rng(0).integers(0, 256, (600, 1600, 3), dtype=np.uint8)
    encoded = images.to_jpeg(noise, 1200)
    assert len(encoded) <= images.MAX_BYTES
    smooth = np.broadcast_to(np.linspace(0, 255, 1600, dtype=np.uint8)[:, None], (600, 1600, 3))
    picture = Image.open(io.BytesIO(images.to_jpeg(np.ascontiguousarray(smooth), 1200)))
    assert picture.size == (1200, 450)
    assert images.spread(22, 3) == [0, 7, 14]
    assert images.spread(2, 3) == [0, 1]
    assert images.spread(5, 0) == []


def test_placeholder_stays_out_of_the_users_cache(tmp_path, monkeypatch):
    import torchvision

    made = []

    def small_network(weights):
        made.append(torch.rand(1))  # building a network draws random numbers
        return torch.nn.Linear(1, 1)

    monkeypatch.setattr(torchvision.models, "alexnet", small_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    assert offline.ensure_lpips_backbone(tmp_path / "scratch")
    assert torch.equal(torch.rand(1), expected), "the run's random numbers were moved"
    assert torch.hub.get_dir() == str(tmp_path / "scratch")
    assert not (tmp_path / "cache").exists()
    names = [path.name for path in (tmp_path / "scratch" / "checkpoints").iterdir()]
    assert names == [offline.BACKBONE] and len(made) == 1
    # The real weights are left alone and used.
    torch.hub._hub_dir = None
    real = tmp_path / "cache" / "hub" / "checkpoints" / offline.BACKBONE
    real.parent.mkdir(parents=True)
    real.write_bytes(b"real")
    assert not offline.ensure_lpips_backbone(tmp_path / "other")
    assert real.read_bytes() == b"real" and not (tmp_path / "other").exists()


def write_scene(folder: Path, count: int = 4, scale: int = 1) -> Path:
    """A transforms.json scene of grey images, 40 x 30 pixels times ``scale``."""
    frames = []
    (folder / "images").mkdir(parents=True)
    for index in range(count):
        pose = np.eye(4)
        pose[:3, 3] = [index, 0, 4]
        name = f"images/{index}.png"
        Image.new("RGB", (40 * scale, 30 * scale), (100, 150, 200)).save(folder / name)
        frames.append({"file_path": name, "transform_matrix": pose.tolist()})
    pixels = {"w": 40, "h": 30, "fl_x": 40.0, "fl_y": 40.0, "cx": 20.0, "cy": 15.0}
    intrinsics = {name: value * scale for name, value in pixels.items()}
    (folder / "transforms.json").write_text(json.dumps({**intrinsics, "frames": frames}))
    return folder


def compare(tmp_path: Path, scene: Path, *words: str, **variables: str) -> dict[str, Any]:
    """What the command writes, with its logs in ``tmp_path / "logs"``."""
    output = tmp_path / "grey.json"
    done = subprocess.run(
        [
            *[sys.executable, str(machine.ROOT / "benchmarks" / "compare.py")],
            *["--scene", str(scene), "--output", str(output)],
            *["--logs", str(tmp_path / "logs"), "--commit", "abc", *words],
        ],
        cwd=tmp_path,
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",  # set for tests of kernels; users run without them on a CPU
            "TORCH_HOME": str(tmp_path / "cache"),
            **variables,
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = output.read_text()
    assert "lpips" not in text.lower()
    assert str(tmp_path) not in text, "a path of this machine"
    return json.loads(text)


def compare_flat(tmp_path: Path, setting: str, *words: str, scale: int = 1) -> dict[str, Any]:
    """What compare.py makes of 60 steps of :mod:`flat_method` with one of its settings."""
    # The placeholder's 233 MB are not what these test.
    weights = tmp_path / "cache" / "hub" / "checkpoints" / offline.BACKBONE
    weights.parent.mkdir(parents=True)
    weights.touch()
    return compare(
        tmp_path,
        write_scene(tmp_path / "grey", scale=scale),
        *["--steps", "60", "--methods", "flat", *words],
        *["--overrides", "machine.device-type=cpu", f"flat:pipeline.model.{setting}"],
        *["--dataparser-overrides", "eval-mode=interval", "eval-interval=2"],
        PYTHONPATH=str(HERE),
        NERFSTUDIO_METHOD_CONFIGS="flat=flat_method:flat",
    )


@pytest.mark.slow
def test_compare_with_a_real_run(tmp_path):
    """compare.py as a command: a training through Nerfstudio, images, the file."""
    views = ["--save-images", str(tmp_path / "views"), "--images", "1"]
    data = compare_flat(tmp_path, "start=0.5", *views)
    (run,) = data["runs"]
    assert 25 < run["psnr"] < 100 and run["ssim"] == 0.5 and run["gaussians"] == 7
    assert run["held_out_images"] == len(run["psnr_of_views"]) == 2
    assert sum(run["psnr_of_views"]) / 2 == pytest.approx(run["psnr"], abs=1e-3)
    assert 25 < run["training_psnr"] < 100 and run["training_ssim"] == 0.5
    assert run["it_per_s_last_1000"] > 0 and run["timed_steps"] == 30 and run["wall_s"] > 0
    assert run["peak_host_bytes"] > 1e8 and run["peak_gpu_allocated_bytes"] is None
    assert run["overrides"] == ["machine.device-type=cpu", "pipeline.model.start=0.5"]
    assert data["machine"]["cores"] >= 1 and data["machine"]["torch"]
    assert sorted(path.name for path in (tmp_path / "views").iterdir()) == [
        "grey-flat-seed42-view000-render.jpg",
        "grey-flat-seed42-view000.jpg",
    ]
    assert Image.open(tmp_path / "views" / "grey-flat-seed42-view000.jpg").size == (80, 30)
    (log,) = (tmp_path / "logs").iterdir()
    assert log.name == "flat-seed42.log"
    assert "checkpoint is written" not in log.read_text()


@pytest.mark.slow
def test_a_run_that_is_evaluated_on_its_way_may_run_out_of_memory(tmp_path):
    """Its best evaluation counts; the images' differences are those of one colour to another."""
    pytest.importorskip("flip_evaluator")
    on_its_way = ["--evaluate-every", "8", "--perceptual"]
    pictures = ["--save-images", str(tmp_path / "views"), "--images", "1"]
    detail = ["--crop", "200", "20", "30", "50"]
    data = compare_flat(tmp_path, "memory-ends-at=25", *on_its_way, *pictures, *detail, scale=6)
    (run,) = data["runs"]
    assert run["ended"] == "out of GPU memory in step 26, with 7 Gaussians"
    early, best, late = run["course"]
    assert [one["at_step"] for one in run["course"]] == [8, 16, 24]
    # Adam overshoots.
    assert best["psnr"] > late["psnr"] > early["psnr"]
    assert {name: run[name] for name in best} == best
    assert 0 < best["flip"] < early["flip"] < 1 and 0 < best["ms_ssim"] <= 1
    assert not {"flip", "ms_ssim"} & {*late}, "measured where it does not count"
    png = Image.open(tmp_path / "views" / "grey-flat-seed42-view000-detail.png")
    truth, render = np.hsplit(np.asarray(png).astype(float), 2)
    assert truth.shape == (50, 30, 3) and (truth == (100, 150, 200)).all()
    psnr = -10 * np.log10(((truth - render) ** 2).mean() / 255**2)
    assert psnr == pytest.approx(best["psnr"], abs=0.1), "not the view of the best evaluation"
    assert run["it_per_s_last_1000"] is None and "error" not in run
    assert run["peak_host_bytes"] > 1e8
    assert "--evaluate-every 8 --perceptual" in data["command"]


def test_perceptual_measures():
    pytest.importorskip("flip_evaluator")
    ramp = torch.linspace(0.2, 0.8, 200)[:, None, None].expand(200, 180, 3)
    noise = 0.1 * torch.randn(200, 180, 3, generator=torch.Generator().manual_seed(0))
    same, little, more = (perceptual.measures(ramp, ramp + k * noise) for k in (0, 0.5, 1))
    assert same == {"ms_ssim": pytest.approx(1, abs=1e-6), "flip": pytest.approx(0, abs=1e-6)}
    assert 1 > little["ms_ssim"] > more["ms_ssim"] and 0 < little["flip"] < more["flip"]
    perceptual.check(180)
    with pytest.raises(BenchmarkError, match=r"161 pixels.*not 160; leave it out"):
        perceptual.check(160)


def test_without_flip_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "flip_evaluator", None)
    with pytest.raises(BenchmarkError, match="pip install flip-evaluator"):
        perceptual.check(500)


@pytest.mark.slow
def test_splatfacto_runs_beside_gsscale_without_a_gpu(tmp_path):
    """Stock splatfacto, densification included, with the reference rasterizer in gsplat's place."""
    scene = write_scene(tmp_path / "grey", count=6, scale=3)  # LPIPS wants 64 pixels a side
    settings = ["machine.device-type=cpu", "pipeline.model.num-random=200"]
    settings += ["pipeline.model.random-scale=3", "pipeline.model.num-downscales=0"]
    settings += ["pipeline.model.warmup-length=5", "pipeline.model.refine-every=10"]
    settings += ["pipeline.model.reset-alpha-every=4", "pipeline.model.cull-alpha-thresh=0.02"]
    data = compare(
        tmp_path,
        scene,
        *["--steps", "40", "--methods", "splatfacto", "gsscale"],
        *["--overrides", *settings],
        *["--dataparser-overrides", "eval-mode=interval", "eval-interval=3"],
        TORCHDYNAMO_DISABLE="1",
        OMP_NUM_THREADS="1",
    )
    stock, ours = data["runs"]
    assert (stock["method"], ours["method"]) == ("splatfacto", "gsscale")
    assert stock["psnr"] == pytest.approx(ours["psnr"], abs=2) and stock["psnr"] > 10
    for log in (tmp_path / "logs").glob("*.log"):
        assert "GSs duplicated" in log.read_text(), "densification did not run"
