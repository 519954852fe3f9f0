"""Versions that gsscale is to run with, each set in an environment of its own.

    nox --list
    nox -s "compatibility(oldest)"
    nox -s "compatibility(newest)" -- tests/model   # other tests than the quick; `none`: none
    nox -s wheels

An environment of a set takes gigabytes, and nothing of it is shared with another. No GPU is used.
"""

from __future__ import annotations

from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv"
nox.options.sessions = []  # gigabytes each: only what is asked for

# The lower bounds of pyproject.toml that are not below what Nerfstudio asks for.
LOWEST = ["scipy==1.11.4", "pillow==10.1.0", "rich==13.0.1", "tyro==0.9.1", "psutil==5.9.0"]

# Not of interest here: what installs without a system library, a compiler or long searches.
OTHERS = ["nerfstudio==1.1.5", "open3d==0.19.0", "wandb==0.25.0", "fpsample==0.3.3"]

SETS = [
    nox.param(
        "3.10",
        ["torch==2.4.0", "torchvision==0.19.0", "numpy==1.26.4", "gsplat==1.4.0", *LOWEST, *OTHERS],
        id="oldest",
    ),
    nox.param(
        "3.11",
        ["torch==2.6.0", "torchvision==0.21.0", "numpy==2.2.6", "gsplat==1.5.3", *OTHERS],
        id="torch-2.6",
    ),
    nox.param(
        "3.12",
        ["torch==2.8.0", "torchvision==0.23.0", "numpy==1.26.4", "gsplat==1.4.0", *OTHERS],
        id="torch-2.8",
    ),
    nox.param(
        "3.12",
        ["torch==2.15.0", "numpy>=2.5", "gsplat==1.5.3", *OTHERS],
        id="newest",
    ),
    # No wheel of fpsample: it is compiled, which takes a Rust compiler. Nor of Open3D 0.19.
    nox.param(
        "3.13",
        ["torch==2.15.0", "numpy>=2.5", "gsplat==1.5.3", "nerfstudio==1.1.5", "wandb==0.25.0"],
        id="python-3.13",
    ),
]

QUICK = [f"tests/{name}" for name in ("store", "cull", "optim", "export", "data")]
QUICK += ["tests/engines/test_equals_dense.py", "tests/engines/test_kernels_compile.py"]
QUICK += ["tests/densify", "tests/images/test_dataset.py"]
QUICK += ["tests/model/test_features.py", "tests/model/test_streamed.py"]
QUICK += ["tests/model/test_checkpoint.py", "tests/model/test_splatfacto_exchange.py"]
QUICK += ["tests/model/test_checkpoint_versions.py"]

DEMO = ["--device", "cpu", "--steps", "20", "--images", "8", "--points", "300"]
DEMO += ["--image-size", "64", "48"]

WHEELS = {
    f"cp{python}-manylinux_{machine}"
    for python in ("310", "311", "312")
    for machine in ("x86_64", "aarch64")
}


@nox.session
@nox.parametrize("python,versions", SETS)
def compatibility(session: nox.Session, versions: list[str]) -> None:
    """A wheel, made from the sdist, trains, evaluates and exports; its kernels compile.

    And the quick tests pass.
    """
    folder = Path(session.create_tmp())
    # Whoever asks for another numpy is taken in an older version. The rest is not chosen so:
    # Nerfstudio demands gsplat 1.4.0.
    numpy = [version for version in versions if version.startswith("numpy")]
    (folder / "constraints.txt").write_text("\n".join(numpy))
    (folder / "overrides.txt").write_text("\n".join(v for v in versions if v not in numpy))
    session.run_install("uv", "build", "--quiet", "--python", "python", "--out-dir", folder, ".")
    wheel = max(folder.glob("*.whl"), key=lambda file: file.stat().st_mtime)
    chosen = ("--constraints", folder / "constraints.txt", "--overrides", folder / "overrides.txt")
    session.install(*map(str, chosen), f"{wheel}[test]")
    environment = {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    session.run("ns-train", "gsscale", "--help", silent=True, env=environment)
    # Triton looks up every name in a kernel when it is compiled: without a GPU, nothing else would
    # tell that one is missing in this version.
    session.run("python", "tests/compile_kernels.py", "80", silent=True, env=environment)
    session.run("gsscale-demo", *DEMO, "--output-dir", str(folder / "demo"), env=environment)
    if session.posargs != ["none"]:
        session.run("pytest", "-q", *(session.posargs or QUICK), env=environment)


@nox.session(python="3.12")
def wheels(session: nox.Session) -> None:
    """cibuildwheel lists the wheels that it would make; making them takes Docker."""
    session.install("cibuildwheel>=3")
    asked = ("cibuildwheel", "--print-build-identifiers", "--platform", "linux")
    listed = str(session.run(*asked, silent=True)).split()
    if set(listed) != WHEELS:
        session.error(f"cibuildwheel would make {listed}, not {sorted(WHEELS)}")
