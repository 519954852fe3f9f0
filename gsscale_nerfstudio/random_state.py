"""The states of the random generators that training draws from."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch


def random_state(device: torch.device | str) -> dict[str, Any]:
    """States of Python's, numpy's and torch's generators, in plain values and tensors.

    Args:
        device: where training runs; a GPU has a generator of its own.
    """
    # The old generator: Nerfstudio and fpsample draw from it.
    kind, keys, *rest = cast(tuple, np.random.get_state())  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        **torch_random_state(device),
    }


def torch_random_state(device: torch.device | str) -> dict[str, Any]:
    """Those of torch's generators, which are all that a step draws from once it has its image."""
    state = {"torch": torch.get_rng_state()}
    if torch.device(device).type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: Mapping[str, Any], device: torch.device | str) -> None:
    """Let generators go on from :func:`random_state`, or torch's from their own state.

    Args:
        state: a GPU's is left out on a CPU, and a GPU's stays as it is if there is none.
        device: where training runs.
    """
    if "python" in state:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.device(device).type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
