"""Nerfstudio's own commands on a gsscale run, as subprocesses, on the CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from plyfile import PlyData

from tests.runs import tiny_scene

pytestmark = pytest.mark.slow

STEPS = 150


def command(name: str, *args: object) -> str:
    """Run a console script of this environment; its whole output, or a failed test with it."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name(name)), *map(str, args)],
        capture_output=True,
        text=True,
        # CPU: compiling splatfacto's helpers would take longer than the run.
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",  # set for tests of kernels; users run without them on a CPU
            "CUDA_VISIBLE_DEVICES": "",
            "TORCHDYNAMO_DISABLE": "1",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        },
        timeout=600,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{name} {args}\n{output[-4000:]}"
    return output


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Configuration file and output of a short training with densification and opacity reset."""
    folder = tmp_path_factory.mktemp("e2e")
    scene = tiny_scene(folder / "scene", images=12, points=1500)
    output = command(
        "ns-train", "gsscale", "--data", scene, "--output-dir", folder / "out",
        "--experiment-name", "e2e", "--timestamp", "run", "--vis", "tensorboard",
        "--max-num-iterations", STEPS, "--steps-per-eval-image", 50,
        "--steps-per-eval-all-images", 60,
        "--pipeline.model.num-downscales", 1, "--pipeline.model.resolution-schedule", 20,
        "--pipeline.model.warmup-length", 20, "--pipeline.model.refine-every", 10,
        "--pipeline.model.reset-alpha-every", 4, "--pipeline.model.sh-degree-interval", 50,
        "--pipeline.model.stop-split-at", 75,
        "--pipeline.model.cull-alpha-thresh", 0.005, "--pipeline.model.densify-grad-thresh", 0.004,
        "nerfstudio-data", "--eval-mode", "interval", "--eval-interval", 4,
    )  # fmt: skip
    return folder / "out" / "e2e" / "gsscale" / "run" / "config.yml", output


def checkpoint_of(config: Path) -> dict:
    return torch.load(next((config.parent / "nerfstudio_models").glob("*.ckpt")))


def test_training_densifies(run):
    config, output = run
    grown = [
        tuple(map(int, m)) for m in re.findall(r"(\d+) GSs duplicated, (\d+) GSs split", output)
    ]
    pruned = [int(m) for m in re.findall(r"(\d+) GSs pruned", output)]
    assert sum(map(sum, grown)) > 50 and sum(pruned) > 0
    last = int(re.findall(r"Now having (\d+) GSs", output)[-1])
    state = checkpoint_of(config)["pipeline"]
    assert len(state["_model.gauss_params.means"]) == last != 1500


def test_checkpoint_has_splatfactos_keys_and_shapes(run):
    state = checkpoint_of(run[0])
    rows = {k.rsplit(".", 1)[1]: v for k, v in state["pipeline"].items() if "gauss_params" in k}
    n = len(rows["means"])
    assert {k: tuple(v.shape[1:]) for k, v in rows.items()} == {
        "means": (3,), "scales": (3,), "quats": (4,), "features_dc": (3,),
        "features_rest": (15, 3), "opacities": (1,),
    }  # fmt: skip
    assert not any("lpips" in key for key in state["pipeline"])
    adam = state["optimizers"]["features_rest"]
    assert adam["state"][0]["exp_avg"].shape == (n, 15, 3)
    assert adam["state"][0]["step"] == STEPS
    # Nothing of the store's unused rows or columns is in the file.
    floats = sum(v.numel() for v in rows.values())
    size = next((run[0].parent / "nerfstudio_models").glob("*.ckpt")).stat().st_size
    assert size < 3 * 4 * floats + 200_000


def test_eval_beats_the_mean_colour(run, tmp_path):
    command("ns-eval", "--load-config", run[0], "--output-path", tmp_path / "eval.json",
            "--render-output-path", tmp_path / "renders")  # fmt: skip
    results = json.loads((tmp_path / "eval.json").read_text())["results"]
    pairs = [np.asarray(Image.open(p)) / 255 for p in (tmp_path / "renders").glob("*.png")]
    assert len(pairs) == 3
    truths = [pair[:, : pair.shape[1] // 2] for pair in pairs]
    flat = np.mean([10 * np.log10(1 / np.mean((t - t.mean((0, 1))) ** 2)) for t in truths])
    assert results["psnr"] > flat + 2
    assert 0.3 < results["ssim"] <= 1


@pytest.fixture
def frames_of(run, tmp_path, monkeypatch):
    """Renders with ``ns-render``; frames [H, W, 3] in 0..1, by the names of their files."""
    ffmpeg = tmp_path / "bin" / "ffmpeg"
    ffmpeg.parent.mkdir()
    ffmpeg.touch(mode=0o755)  # which ns-render insists on for images, too
    monkeypatch.setenv("PATH", str(ffmpeg.parent), prepend=os.pathsep)

    def render(kind: str, *args: object) -> dict[str, np.ndarray]:
        output = tmp_path / kind
        command("ns-render", kind, "--load-config", run[0], "--output-path", output,
                "--image-format", "png", *args)  # fmt: skip
        files = sorted(output.rglob("*.png"))
        return {str(f.relative_to(output)): np.asarray(Image.open(f)) / 255 for f in files}

    return render


def shows_a_scene(frame: np.ndarray) -> bool:
    """Whether there is as much to see as in the demo's images, and not one colour."""
    return bool(frame.std(axis=(0, 1)).min() > 0.05)


@pytest.mark.parametrize(
    "kind, args, size",
    [
        ("interpolate", ("--interpolation-steps", 3, "--downscale-factor", 2), (24, 32)),
        ("spiral", ("--seconds", 1, "--frame-rate", 6), (48, 64)),
    ],
)
def test_render_a_path(frames_of, kind, args, size):
    frames = frames_of(kind, "--output-format", "images", *args)
    assert list(frames) == [f"{i:05d}.png" for i in range(6)]
    assert {frame.shape for frame in frames.values()} == {(*size, 3)}
    assert all(shows_a_scene(frame) for frame in frames.values())
    assert len({frame.tobytes() for frame in frames.values()}) == 5  # one comes twice


def test_render_a_camera_path_with_a_crop_and_its_background(run, frames_of, tmp_path):
    """The path as Nerfstudio's viewer saves it."""
    background = {"r": 255, "g": 0, "b": 102}
    # Axes right, up, back; from above the ground, towards the middle.
    poses = [
        [[0, -0.6, 0.8, 1.2], [1, 0, 0, x], [0, 0.8, 0.6, -0.1], [0, 0, 0, 1]] for x in (0, 0.2)
    ]
    path = {
        "render_height": 40, "render_width": 56, "seconds": 1, "camera_type": "perspective",
        "camera_path": [{"camera_to_world": np.ravel(p).tolist(), "fov": 60} for p in poses],
        "crop": {"crop_bg_color": background, "crop_center": [0, 0, -1], "crop_scale": [0.7] * 3,
                 "crop_rot": [0.0, 0.0, 0.3]},
    }  # fmt: skip
    found = []
    for crop in (path["crop"], None):
        file = tmp_path / "path.json"
        file.write_text(json.dumps({**path, "crop": crop}))
        frames = frames_of("camera-path", "--camera-path-filename", file,
                           "--output-format", "images")  # fmt: skip
        assert list(frames) == ["00000.png", "00001.png"]
        found.append(np.stack(list(frames.values())))
    cropped, whole = found
    color = np.divide(list(background.values()), 255)
    assert cropped.shape == whole.shape == (2, 40, 56, 3)
    assert all(map(shows_a_scene, [*cropped, *whole]))
    is_background = [(frames == color).all(-1) for frames in (cropped, whole)]
    assert 0.1 < is_background[0].mean() < 0.9
    assert not is_background[1].any()


def test_render_the_held_out_images(frames_of):
    frames = frames_of("dataset", "--split", "test", "--rendered-output-names", "rgb", "gt-rgb")
    of = {
        kind: [f for name, f in frames.items() if f"/{kind}/" in name] for kind in ("rgb", "gt-rgb")
    }
    assert len(of["rgb"]) == len(of["gt-rgb"]) == 3
    assert {frame.shape for frame in frames.values()} == {(48, 64, 3)}
    for frame, truth in zip(of["rgb"], of["gt-rgb"], strict=True):
        assert np.square(frame - truth).mean() < 0.6 * np.square(truth - truth.mean((0, 1))).mean()


@pytest.mark.parametrize("mode", ["sh_coeffs", "rgb"])
def test_export_writes_the_trained_gaussians(run, tmp_path, mode):
    command("ns-export", "gaussian-splat", "--load-config", run[0], "--output-dir", tmp_path,
            "--ply-color-mode", mode)  # fmt: skip
    ours = tmp_path / "ours.ply"
    color = {"sh_coeffs": "sh", "rgb": "rgb"}[mode]
    command("gsscale-export", "--load-config", run[0], "--output", ours, "--color", color)
    assert ours.read_bytes() == (tmp_path / "splat.ply").read_bytes()
    vertices = PlyData.read(str(tmp_path / "splat.ply"))["vertex"]
    state = checkpoint_of(run[0])["pipeline"]
    kept = (state["_model.gauss_params.opacities"] >= -5.5373).flatten()
    means = state["_model.gauss_params.means"][kept].numpy()
    xyz = np.stack([vertices[axis] for axis in "xyz"], axis=1)
    assert np.array_equal(xyz, means)
    if mode == "sh_coeffs":
        rest = state["_model.gauss_params.features_rest"][kept].transpose(1, 2).flatten(1).numpy()
        assert np.array_equal(np.stack([vertices[f"f_rest_{i}"] for i in range(45)], 1), rest)


def test_resume_continues_at_the_next_step(run, tmp_path):
    output = command(
        "ns-train", "gsscale", "--data", run[0].parents[4] / "scene", "--output-dir", tmp_path,
        "--vis", "tensorboard", "--max-num-iterations", 5, "--load-dir",
        run[0].parent / "nerfstudio_models", "--pipeline.model.num-downscales", 0,
        "nerfstudio-data", "--eval-mode", "interval", "--eval-interval", 4,
    )  # fmt: skip
    assert f"step-{STEPS - 1:09d}.ckpt" in output.replace("\n", "")
    saved = list(tmp_path.rglob("*.ckpt"))
    assert [path.name for path in saved] == [f"step-{STEPS + 4:09d}.ckpt"]


def test_big_and_help(run):
    text = command("ns-train", "gsscale-big", "--help")
    assert "--pipeline.model.max-gaussians" in text
    assert re.search(r"--pipeline.model.cull-alpha-thresh.*?default: 0.005", text, re.S)
    listing = command("ns-train", "--help")
    assert "gsscale-big" in listing and "host memory" in " ".join(listing.split())
