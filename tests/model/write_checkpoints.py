"""Write small checkpoints that other versions are to go on from; run as a script.

    .nox/compatibility-oldest/bin/python tests/model/write_checkpoints.py

One of gsscale and one of splatfacto, into `checkpoints/`, with this torch and numpy in their names.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import gsscale_nerfstudio  # noqa: F401, the installed one, not the source tree's

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))  # first: others install a `tests`, too

from tests import conftest  # noqa: F401, puts a stub in place of gsplat's kernels
from tests.model.splatfacto import on_the_cpu, splatfacto_config
from tests.runs import make_config, seeded, tiny_scene, train

FOLDER = Path(__file__).parent / "checkpoints"
POINTS = 5
STEPS = 5


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    torch_version, numpy_version = (
        ".".join(module.__version__.split(".")[:2]) for module in (torch, np)
    )
    seeded(0)
    with tempfile.TemporaryDirectory() as folder, on_the_cpu():
        work = Path(folder)
        scene = tiny_scene(work / "scene", points=POINTS)
        configs = {
            "gsscale": make_config(scene, work / "gsscale", STEPS),
            "splatfacto": splatfacto_config(scene, work / "splatfacto", STEPS),
        }
        for method, config in configs.items():
            config.pipeline.model.sh_degree_interval = 1  # so that no column stays at zero
            (written,) = train(config).checkpoint_dir.glob("*.ckpt")
            name = f"{method}-torch-{torch_version}-numpy-{numpy_version}.ckpt"
            shutil.copyfile(written, FOLDER / name)
            print(name, written.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
