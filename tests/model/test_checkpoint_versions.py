"""Training goes on from checkpoints that other versions of torch and numpy have written.

`write_checkpoints.py` wrote those in `checkpoints/`, with the versions in their names.
"""

from __future__ import annotations

import pickle
import pickletools
import zipfile
from pathlib import Path

import pytest
import torch

from gsscale_nerfstudio import checkpoint
from tests.model.write_checkpoints import FOLDER, POINTS, STEPS
from tests.runs import make_config, rows_of, tiny_scene

FILES = [
    f"{method}-{versions}"
    for method in ("gsscale", "splatfacto")
    for versions in ("torch-2.4-numpy-1.26", "torch-2.15-numpy-2.5")
]
NAMES_ALLOWED = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)
"""Up to 2.5 torch can be told what ``weights_only`` allows, but not by another version's name."""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_scene(tmp_path_factory.mktemp("versions") / "scene", points=POINTS)


def globals_in(path: Path) -> set[str]:
    """What a reader has to import or to know, as the file names it."""
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        operations = list(pickletools.genops(archive.read(name)))
    return {argument for operation, argument, _ in operations if operation.name == "GLOBAL"}


@pytest.mark.parametrize("name", FILES)
def test_training_goes_on(scene, tmp_path, name):
    file = FOLDER / f"{name}.ckpt"
    state = checkpoint.load(file)
    config = make_config(scene, tmp_path, steps=2)
    config.load_checkpoint = file
    trainer = config.setup()
    trainer.setup()
    assert trainer._start_step == trainer.pipeline.model.engine.step_count == STEPS
    optimizers = {k: v.state_dict() for k, v in trainer.optimizers.optimizers.items()}
    rows = rows_of(trainer.pipeline.state_dict(), optimizers)
    expected = rows_of(state["pipeline"], state["optimizers"])
    assert len(rows) == POINTS and rows.isfinite().all() and rows.any(dim=0).all()
    if name.startswith("gsscale"):
        assert torch.equal(rows, expected)
        assert trainer._random_state is not None  # the run's random numbers go on, too
    else:
        assert sorted(rows.tolist()) == sorted(expected.tolist())  # now in Morton order
    trainer.train()
    written = torch.load(trainer.checkpoint_dir / "step-000000006.ckpt", weights_only=True)
    assert written["schedulers"]["means"]["last_epoch"] == STEPS + 2


@pytest.mark.parametrize("name", FILES)
def test_what_weights_only_reads(name):
    file = FOLDER / f"{name}.ckpt"
    from_numpy = {found for found in globals_in(file) if found.startswith("numpy")}
    if name.startswith("gsscale"):
        assert not from_numpy
    else:
        core = "numpy._core" if name.endswith("numpy-2.5") else "numpy.core"
        assert from_numpy == {f"{core}.multiarray scalar", "numpy dtype"}
    if NAMES_ALLOWED or not from_numpy:
        assert torch.load(file, weights_only=True)["step"] == STEPS - 1
    else:
        with pytest.raises(pickle.UnpicklingError):
            torch.load(file, weights_only=True)
        assert torch.load(file)["step"] == STEPS - 1  # what torch does unless told otherwise
