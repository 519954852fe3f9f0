"""As a script: works on many rows, and prints the bytes of memory for each that this took beside.

Each work has a process of its own, in which nothing was taken before. Rows are narrow, and few are
held at a time: what is left is what grows with all rows.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from gsscale_nerfstudio import _C
from gsscale_nerfstudio.densify import RowMCMCStrategy, RowStrategy, mcmc, strategy
from gsscale_nerfstudio.engines import HostEngine
from gsscale_nerfstudio.store import HostStore, RowLayout, chunks

LAYOUT = RowLayout(0)
ROWS = 1_500_000
STEP = 3500


def anonymous_bytes() -> int:
    """What is in use at present, of memory that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def most_beside(work: Callable[[], object]) -> int:
    """Bytes that were in use at a time while ``work`` ran, beyond those in use before."""
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    assert peak > 0
    return peak - before


def engine_of(n: int) -> HostEngine:
    """Rows in disorder, with moments and statistics; memory for half as many again is taken."""
    store = HostStore(LAYOUT, max_rows=n + n // 2)
    store.resize(store.capacity)
    for array in (store.params, store.exp_avg, store.exp_avg_sq, store.spheres):
        array.fill_(1e-3)
    store.resize(n)
    store.column("means").uniform_(-1, 1)
    store.column("scales").fill_(-5.0)
    store.column("opacities").fill_(1.0)
    store.bookkeeping("stamp").zero_()
    store.bookkeeping("count").fill_(1.0)
    store.bookkeeping("grad2d").uniform_()
    return HostEngine(store, torch.device("cpu"))


def refine(engine: HostEngine, grow: float = 0.0, prune: float = 0.0) -> None:
    """Duplicate and split half of ``grow`` each; prune; all are shares of the rows.

    There is room for half as many again.
    """
    n = len(engine.store)
    engine.store.column("scales")[::2] = -1.0
    engine.store.column("opacities")[torch.rand(n) < prune] = -9.0
    RowStrategy(
        grow_grad2d=1 - grow, grow_scale3d=0.1, prune_scale3d=9.0, reset_every=3000, verbose=False
    ).refine(engine, STEP)
    after = n * (1 - prune) * (1 + min(grow, 0.5))
    assert abs(len(engine.store) - after) < 0.01 * n


def relocate(engine: HostEngine) -> None:
    """A quarter of the rows goes to where others are, and a twentieth is added."""
    n = len(engine.store)
    engine.store.column("opacities")[torch.rand(n) < 0.25] = -9.0
    RowMCMCStrategy(cap_max=2 * n, noise_lr=0.0, refine_start_iter=0, verbose=False).refine(
        engine, STEP
    )
    assert len(engine.store) == int(1.05 * n)


def export(engine: HostEngine) -> None:
    from gsscale_nerfstudio.export import gaussians, ply  # the others can do without Nerfstudio
    from gsscale_nerfstudio.store.gauss_params import GaussParams

    gaussians._PIECE = 1 << 12
    params = GaussParams(engine.store, engine.settle, lambda: None, {})
    model = SimpleNamespace(
        gauss_params=params, num_points=len(engine.store), config=SimpleNamespace(sh_degree=0)
    )
    written = gaussians.Gaussians(model)
    assert written.count == len(engine.store)
    with open("/dev/null", "wb") as file:
        for _ in ply.write_ply(file, written, "sh"):
            pass


WORK = {
    "summary": lambda engine: engine.summarize(),
    "growing": lambda engine: refine(engine, grow=0.4),
    "crowded": lambda engine: refine(engine, grow=0.9),
    "pruning": lambda engine: refine(engine, prune=0.3),
    "relocating": relocate,
    "reset": lambda engine: engine.limit_opacities(-1.0),
    "sorting": lambda engine: engine.sort(),
    "export": export,
}


def bytes_per_row(what: str) -> float:
    # Every thread has some rows in hand.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    torch.set_num_threads(2)
    _C.set_threads(2)
    chunks._CHUNK = 1 << 14
    strategy.EDIT_ROWS = mcmc.EDIT_ROWS = 1 << 12
    torch.manual_seed(0)
    WORK[what](engine_of(20_000))  # threads have their stacks, modules are loaded
    engine = engine_of(ROWS)
    return most_beside(lambda: WORK[what](engine)) / ROWS


if __name__ == "__main__":
    print(bytes_per_row(sys.argv[1]))
