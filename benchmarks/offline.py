"""Let splatfacto start where LPIPS weights can't be downloaded."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

BACKBONE = "alexnet-owt-7be5be79.pth"


def ensure_lpips_backbone(folder: Path) -> bool:
    """Put random AlexNet weights into ``folder`` unless the machine has the real ones.

    Splatfacto builds LPIPS with the model and would download its backbone then. The benchmarks
    never report LPIPS, so any weights do; they are kept out of the user's own cache, where they
    would silently spoil every LPIPS value to come. Returns whether the placeholder is in use.
    """
    if Path(torch.hub.get_dir(), "checkpoints", BACKBONE).is_file():
        return False
    path = folder / "checkpoints" / BACKBONE
    if not path.is_file():
        from torchvision.models import alexnet

        path.parent.mkdir(parents=True, exist_ok=True)
        # Runs that start together share the folder: none may see half a file.
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        os.close(handle)
        with torch.random.fork_rng():  # the placeholder must not move the run's random numbers
            torch.save(alexnet(weights=None).state_dict(), temporary)
        os.replace(temporary, path)
    torch.hub.set_dir(str(folder))
    return True
