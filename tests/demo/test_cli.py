"""The demo's orchestration, with stand-ins for Nerfstudio's commands, and how it fails."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gsscale_nerfstudio.demo import cli
from gsscale_nerfstudio.demo.commands import find_script, run, shell_line
from gsscale_nerfstudio.demo.plan import Plan
from gsscale_nerfstudio.demo.ply import count_points
from gsscale_nerfstudio.errors import GSScaleError

# What each command leaves behind, as far as the demo relies on it.
STAND_INS = {
    "ns-train": """
for step in range(0, int(value("max-num-iterations")), 10):
    print(f"{step} ({step / 6:.02f}%)           12.3 ms", flush=True)
folder = Path(value("output-dir"), value("experiment-name"), sys.argv[1], value("timestamp"))
folder.mkdir(parents=True)
(folder / "config.yml").write_text(value("data"))
""",
    "ns-eval": """
import json
import numpy as np
from PIL import Image
scene = Path(Path(value("load-config")).read_text())
results = {"psnr": 27.123, "ssim": 0.8765}
Path(value("output-path")).write_text(json.dumps({"results": results}))
views = Path(value("render-output-path"))
views.mkdir()
for number, path in enumerate(sorted((scene / "images").iterdir())[::6]):
    truth = np.asarray(Image.open(path))
    Image.fromarray(np.concatenate([truth, truth], 1)).save(views / f"eval_img_{number:04d}.png")
""",
    "ns-export": """
assert Path(value("load-config")).is_file()
header = b"ply\\nformat binary_little_endian 1.0\\nelement vertex 4321\\nend_header\\n"
Path(value("output-dir"), value("output-filename")).write_bytes(header)
""",
    "ns-viewer": "raise SystemExit('not run by the demo')",
}
PRELUDE = """#!{python}
import os, sys
from pathlib import Path
with open(__file__ + ".calls", "a") as calls:
    print(os.environ.get("TORCHDYNAMO_DISABLE"), os.environ.get("CUDA_VISIBLE_DEVICES"), file=calls)
def value(flag):
    return sys.argv[sys.argv.index("--" + flag) + 1]
"""


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """A folder that passes for that of the interpreter, with stand-ins for the commands."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in STAND_INS.items():
        (folder / name).write_text(PRELUDE.format(python=sys.executable) + body)
        (folder / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    return folder


def demo(monkeypatch, *arguments):
    tiny = ["--device", "cpu", "--image-size", "64", "48", "--images", "13", "--points", "300"]
    monkeypatch.setattr(sys, "argv", ["gsscale-demo", *tiny, *arguments])
    cli.entrypoint()


def test_the_demo_runs_the_commands_and_reports(scripts, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "a demo"
    demo(monkeypatch, "--output-dir", str(folder), "--steps", "600")
    output = capsys.readouterr().out
    for name in ("ns-train", "ns-eval", "ns-export"):
        assert (scripts / f"{name}.calls").read_text() == "1 \n"
        assert f"{scripts / name}" in output
    assert not (scripts / "ns-viewer.calls").exists()
    assert output.count(" of 600, ") == 5
    for expected in ("3 held-out views", "27.12 dB", "0.876", "300 -> 4,321", "600 on cpu"):
        assert expected in output
    constant = float(output.split("one-colour images")[1].split()[1])
    assert 8.0 < constant < 16.0
    assert str(folder / "views.png") in output
    assert str(folder / "splat.ply") in output
    assert (folder / "views.png").stat().st_size > 1000
    assert "lpips" not in output.lower()
    assert (folder / "logs" / "train.log").read_text().count("12.3 ms") == 60


def test_the_printed_command_can_be_pasted(scripts, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "a demo"
    demo(monkeypatch, "--output-dir", str(folder), "--steps", "60")
    output = capsys.readouterr().out
    start = output.index("CUDA_VISIBLE_DEVICES=")
    lines = output[start:].splitlines()
    count = next(n for n, line in enumerate(lines) if not line.endswith("\\")) + 1
    pasted = "\n".join(lines[:count]).replace("--timestamp ", "--timestamp again-")
    subprocess.run(pasted, shell=True, check=True, stdout=subprocess.DEVNULL)
    runs = [path.name for path in (folder / "runs" / "village" / "gsscale").iterdir()]
    assert len(runs) == 2
    assert sum(name.startswith("again-") for name in runs) == 1
    assert (scripts / "ns-train.calls").read_text() == "1 \n1 \n"


@pytest.mark.parametrize("failing", ["ns-train", "ns-eval", "ns-export"])
def test_a_failing_command_ends_the_demo_readably(scripts, tmp_path, monkeypatch, capsys, failing):
    body = "for n in range(99): print('line', n)\nprint('[/oops] the cause', file=sys.stderr)\n"
    script = (scripts / failing).read_text().replace(STAND_INS[failing], body + "sys.exit(3)")
    (scripts / failing).write_text(script)
    with pytest.raises(SystemExit) as stop:
        demo(monkeypatch, "--output-dir", str(tmp_path / "demo"), "--steps", "60")
    assert stop.value.code == 1
    output = capsys.readouterr().out
    assert f"{failing} failed with exit status 3" in output
    assert "[/oops] the cause" in output
    assert "line 98" in output and "line 50" not in output
    assert str(scripts / failing) in output
    log = tmp_path / "demo" / "logs" / f"{failing.removeprefix('ns-')}.log"
    assert str(log) in output
    assert "line 0\n" in log.read_text()
    assert "held-out" not in output


def test_a_missing_command_is_named_with_the_remedy(scripts, tmp_path, monkeypatch, capsys):
    (scripts / "ns-train").unlink()
    with pytest.raises(SystemExit) as stop:
        demo(monkeypatch, "--output-dir", str(tmp_path / "demo"))
    assert stop.value.code == 1
    assert "pip install gsscale-nerfstudio" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [(["--images", "6"], "more than 6"), (["--steps", "0"], "must be positive")],
)
def test_settings_that_cannot_work_are_refused(
    scripts, tmp_path, monkeypatch, capsys, arguments, remedy
):
    with pytest.raises(SystemExit) as stop:
        demo(monkeypatch, "--output-dir", str(tmp_path / "demo"), *arguments)
    assert stop.value.code == 1
    assert remedy in capsys.readouterr().out
    assert not (tmp_path / "demo").exists()


def test_a_folder_that_cannot_be_written_is_named(scripts, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        demo(monkeypatch, "--output-dir", str(tmp_path / "file" / "demo"))
    said = " ".join(capsys.readouterr().out.split())
    assert "could not write the scene" in said and "choose another --output-dir" in said


def test_cuda_without_a_gpu_is_refused(scripts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        demo(monkeypatch, "--output-dir", str(tmp_path / "demo"), "--device", "cuda")
    assert "--device cpu" in capsys.readouterr().out


def test_shell_lines_read_back_as_the_same_words():
    command = ["/opt/my env/ns-train", "gsscale", "--data", "it's here", *["--flag", "x"] * 30]
    text = shell_line(command, {"A": "", "B": "1 2"})
    assert shlex.split(text.replace("\\\n", " ")) == ["A=", "B=1 2", *command]
    assert max(len(line) for line in text.splitlines()) <= 110
    assert all(line.endswith(" \\") for line in text.splitlines()[:-1])


def test_scripts_on_the_path_are_called_by_name(scripts, monkeypatch):
    assert find_script("ns-eval") == str(scripts / "ns-eval")
    monkeypatch.setenv("PATH", str(scripts))
    assert find_script("ns-eval") == "ns-eval"


def test_undecodable_output_does_not_stop_a_command(tmp_path):
    lines = []
    code = r"import sys; sys.stdout.buffer.write(b'\xff\n\xe2\x9c\x93\n')"
    seconds = run([sys.executable, "-c", code], {}, tmp_path / "log", lines.append)
    assert [line.strip() for line in lines] == ["\ufffd", "\u2713"]
    assert 0.0 < seconds < 20.0


def test_points_are_counted_from_the_header_only(tmp_path):
    path = tmp_path / "x.ply"
    path.write_bytes(b"ply\nformat ascii 1.0\nend_header\nelement vertex 5\n")
    with pytest.raises(GSScaleError, match=r"x\.ply is not a point cloud"):
        count_points(path)


def test_nerfstudio_knows_every_flag(scripts):
    """Parsed as splatfacto, whose flags gsscale shares: that needs no plugin to be installed."""
    tyro = pytest.importorskip("tyro")
    from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion

    plan = Plan(folder=Path("demo"), name="run", device="cpu", steps=600, seed=3)
    arguments = plan.train()[2:]
    config = tyro.cli(AnnotatedBaseConfigUnion, args=["splatfacto", *arguments])
    model, parser = config.pipeline.model, config.pipeline.datamanager.dataparser
    assert config.get_base_dir().name == "run"
    assert config.machine.device_type == "cpu"
    assert parser.load_3D_points and parser.eval_mode == "interval" and parser.eval_interval == 6
    # Densification takes place, several times.
    rounds = [
        step
        for step in range(model.warmup_length + 1, model.stop_split_at)
        if step % model.refine_every == 0
    ]
    assert len(rounds) >= 4
    # It would be paused for one pass over the images after each reset of the opacities.
    assert model.reset_alpha_every * model.refine_every > 600
    assert rounds[0] >= 34 + model.refine_every


def test_everything_stays_in_the_demos_folder():
    plan = Plan(folder=Path("demo"), name="run", device="cuda", steps=10, seed=0)
    for path in (plan.scene, plan.config, plan.metrics, plan.views, plan.splat):
        assert path.is_relative_to("demo")


def test_only_the_cpu_needs_variables():
    plan = Plan(folder=Path("demo"), name="run", device="cuda", steps=10, seed=0)
    assert plan.environment == {}
