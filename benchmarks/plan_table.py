"""What the memory plan says of common cards and machines: the tables of docs/big-scenes.md.

python benchmarks/plan_table.py

Nothing is measured: `memory_plan.make_plan` is asked, as it is before a training begins.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # as a script: find the package, and let its modules shadow nothing
    _here = Path(__file__).resolve().parent
    sys.path[:] = [*(p for p in sys.path if Path(p).resolve() != _here), str(_here.parent)]

import torch

from benchmarks.tables import TextTable, markdown
from gsscale_nerfstudio.engines.budget import CONTEXT_BYTES, FREE_SHARE
from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.memory_plan import Circumstances, Gpu, make_plan
from gsscale_nerfstudio.store import RowLayout
from gsscale_nerfstudio.store.host import headroom

CARDS = (8, 12, 16, 24)
"""GPU memory, GiB."""
MACHINES = (16, 32, 64, 128)
"""Host memory, GiB."""
SCENES = (2, 5, 10, 20, 40, 80)
"""Millions of Gaussians."""
SHARES = (0.1, 0.25)
"""Of the Gaussians, that the largest view sees."""

PIXELS = 2000 * 1500
"""Of a training image."""
DESKTOP_BYTES = 1 << 29
"""GPU memory that a desktop takes."""
SYSTEM_BYTES = 4 << 30
"""Host memory that the system and the process take, Gaussians and images apart."""
IMAGE_BYTES = 4 * 10**9
"""Host memory for images: cache-images disk with image-memory-gb 4."""


def circumstances(
    rows: int,
    share: float,
    card: int,
    machine: int | None = None,
    moments: torch.dtype = torch.float32,
) -> Circumstances:
    """Those of a training with ``rows`` Gaussians; without ``machine`` host memory has no end.

    Args:
        rows: in the store.
        share: of them that the largest view sees.
        card: GPU memory, GiB.
        machine: host memory, GiB.
        moments: how Adam's are kept.
    """
    free = FREE_SHARE * ((card << 30) - DESKTOP_BYTES - CONTEXT_BYTES)
    memory, left = 1 << 50, 0
    if machine is not None:
        memory, left = (machine << 30) - SYSTEM_BYTES, headroom(machine << 30)
    return Circumstances(
        layout=RowLayout(3, moments),
        rows=rows,
        wanted=None if machine is not None else rows,
        view_rows=int(share * rows),
        view_pixels=PIXELS,
        memory=memory,
        headroom=left,
        images=IMAGE_BYTES,
        images_bounded=True,
        # In memory they are uint8, three bytes a pixel: the present one and the next.
        gpu=Gpu(free=int(free) + CONTEXT_BYTES, images=2 * 3 * PIXELS),
    )


def where(rows: int, share: float, card: int) -> str:
    """Words for how such a scene trains: what the GPU keeps of it."""
    given = circumstances(rows, share, card)
    try:
        gpu = make_plan(given).gpu
    except GSScaleError:
        return "refused"
    assert gpu is not None
    cached = next(part.now for part in gpu.parts if part.name == "cached rows")
    if cached:
        kept = cached / given.layout.cached_bytes / rows
        return "all" if kept >= 1 else f"{100 * kept:.0f} %"
    return "host" if gpu.now <= gpu.available else "parts"


def most(machine: int, share: float, card: int, moments: torch.dtype = torch.float32) -> int:
    """Rows that a scene of a million can grow to."""
    return make_plan(circumstances(10**6, share, card, machine, moments)).capacity


def of_cards(share: float) -> TextTable:
    """Scenes down, cards across: :func:`where`."""
    columns = ["Gaussians", *(f"{card} GB card" for card in CARDS)]
    rows = [[f"{n} M", *(where(n * 10**6, share, card) for card in CARDS)] for n in SCENES]
    return TextTable(columns, rows)


def of_machines(moments: torch.dtype = torch.float32) -> TextTable:
    """Machines down, with the smallest and the largest card: :func:`most`."""
    cases = [(share, card) for share in SHARES for card in (CARDS[0], CARDS[-1])]
    columns = [
        "host memory",
        *(f"{100 * share:.0f} % seen, {card} GB card" for share, card in cases),
    ]
    rows = [
        [f"{machine} GB", *(f"{most(machine, *case, moments) / 1e6:.0f} M" for case in cases)]
        for machine in MACHINES
    ]
    return TextTable(columns, rows)


def page() -> dict[str, str]:
    """The tables in Markdown, by their titles."""
    tables = {f"{100 * share:.0f} % of the Gaussians in the largest view": of_cards(share)
              for share in SHARES}  # fmt: skip
    tables["The largest scene that fits"] = of_machines()
    tables["The same, with moments of 16 bits"] = of_machines(torch.bfloat16)
    return {title: "\n".join(markdown(table)) for title, table in tables.items()}


if __name__ == "__main__":
    for title, table in page().items():
        print(f"{title}:\n\n{table}\n")
