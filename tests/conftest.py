"""Shared fixtures; keeps GPU tests away from machines without one."""

from __future__ import annotations

import os
import signal
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gsscale_nerfstudio.loss import FUSED

collect_ignore = []
if not FUSED:
    collect_ignore += ["loss/test_photometric_loss.py"]
if not torch.cuda.is_available():
    if FUSED:
        # Triton then runs kernels in numpy, on CPU tensors: slow, and the arithmetic is the same.
        # Read when the modules with kernels are imported.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    else:  # as early a Triton cannot do that with ours
        collect_ignore += [
            "engines/test_kernel_bounds.py",
            "engines/test_out_of_memory.py",
            "engines/test_resident.py",
            "rasterize/test_gradients.py",
            "rasterize/test_tile_lists.py",
        ]

# Last, so that `benchmarks` and `tests` can be imported and the installed package is what is
# tested, not the source tree, which has no compiled module.
sys.path.append(str(Path(__file__).parents[1]))

if not torch.cuda.is_available():
    # gsplat's first CUDA call would start a compilation of many minutes on a machine that has nvcc
    # but no GPU, and fail after it. Here such a call fails at once.
    stub = types.ModuleType("gsplat.cuda._backend")
    stub._C = None  # type: ignore[attr-defined]
    sys.modules["gsplat.cuda._backend"] = stub


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell lets what it runs in the background not hear Ctrl-C, which tests press: they, and what
    # they start, would wait for ever.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# torch's threads and our kernels' are two pools; on two cores they would wait for each other.
torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


@pytest.fixture
def four_threads() -> Iterator[None]:
    """Loops over ids are cut into several parts, however many cores there are.

    torch brings an OpenMP library that our kernels then use too, so that its setting is theirs.
    """
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
