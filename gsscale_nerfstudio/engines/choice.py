"""Which engine trains."""

from __future__ import annotations

import os

import torch

from gsscale_nerfstudio.engines.budget import Budget
from gsscale_nerfstudio.engines.host import HostEngine
from gsscale_nerfstudio.engines.resident import ResidentEngine
from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.store import HostStore


def make_engine(name: str, store: HostStore, vram_budget_gb: float | None) -> HostEngine:
    """The engine of that name, on the CPU until it is moved.

    Args:
        name: "host", "resident" or "auto".
        store: the rows.
        vram_budget_gb: see :class:`Budget`.

    Raises:
        GSScaleError: the budget is no amount of memory.
    """
    if vram_budget_gb is not None and not vram_budget_gb > 0:
        raise GSScaleError(
            "--pipeline.model.vram-budget-gb is GPU memory, in 10^9 bytes: more than 0, not "
            f"{vram_budget_gb:g}"
        )
    if torch.cuda.is_available() and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # Every view has its own number of rows. Without this the allocator keeps blocks of all the
        # sizes that it has seen, and takes a third more memory than is ever in use.
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    cpu = torch.device("cpu")
    if name == "host":
        return HostEngine(store, cpu, Budget(vram_budget_gb))
    return ResidentEngine(store, cpu, Budget(vram_budget_gb), auto=name == "auto")
