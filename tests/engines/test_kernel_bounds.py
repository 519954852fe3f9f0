"""No kernel reads or writes beside the memory of its arguments, masked lanes aside.

On a GPU such an access is silent more often than not: memory beside a tensor is another tensor's.
Triton's interpreter asks us before each load and store here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from gsscale_nerfstudio.densify import RowMCMCStrategy, RowStrategy
from gsscale_nerfstudio.engines import Engine
from gsscale_nerfstudio.loss.fused import fused_photometric_loss
from gsscale_nerfstudio.rasterize.gradients import pixel_gradients
from gsscale_nerfstudio.rasterize.tile_lists import tile_lists
from gsscale_nerfstudio.store import RowLayout
from tests.engines.driving import drive, make_engine, random_rows, ring_of_views
from tests.engines.test_resident import ROWS, largest_view
from tests.rasterize.test_tile_lists import splats

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled where there is a GPU"
)


@pytest.fixture
def accesses(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Elements touched so far, by kernel; an access elsewhere fails the test."""
    allowed: list[tuple[int, int]] = []
    touched: dict[str, int] = {}
    kernel = ""

    def check(pointers: Any, mask: Any, size: int) -> None:
        addresses = np.asarray(pointers)
        addresses = addresses[np.broadcast_to(np.asarray(mask, bool), addresses.shape)]
        addresses = addresses.astype(np.uint64)
        inside = np.zeros(addresses.shape, dtype=bool)
        for first, end in allowed:
            inside |= (addresses >= first) & (addresses + size <= end)
        assert inside.all(), f"{kernel} touches {(~inside).sum()} elements beside its arguments"
        touched[kernel] = touched.get(kernel, 0) + addresses.size

    def patch(owner: Any, name: str, wrap: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: wrap(original, *args))

    def launch(original: Any, grid: Any, args: Any, kwargs: Any) -> Any:
        nonlocal kernel
        kernel = grid.fn.__name__
        args, kwargs = original(grid, args, kwargs)
        storages = [
            value.untyped_storage()
            for value in [*args, *kwargs.values()]
            if isinstance(value, torch.Tensor) and value.numel()
        ]
        allowed[:] = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages]
        return args, kwargs

    def load(original: Any, builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        loaded = interpreter._get_np_dtype(pointers.get_element_ty())
        check(pointers.data, mask.data, np.dtype(loaded).itemsize)
        return original(builder, pointers, mask, *rest)

    def store(original: Any, builder: Any, pointers: Any, value: Any, mask: Any, *r: Any) -> Any:
        check(pointers.data, mask.data, value.data.dtype.itemsize)
        return original(builder, pointers, value, mask, *r)

    def add(original: Any, builder: Any, op: Any, pointers: Any, value: Any, *rest: Any) -> Any:
        check(pointers.data, rest[0].data, value.data.dtype.itemsize)
        return original(builder, op, pointers, value, *rest)

    patch(interpreter.GridExecutor, "_init_args_hst", launch)
    patch(interpreter.InterpreterBuilder, "create_atomic_rmw", add)
    patch(interpreter.InterpreterBuilder, "create_masked_load", load)
    patch(interpreter.InterpreterBuilder, "create_masked_store", store)
    return touched


def train_and_refine(engine: Engine, strategy: RowStrategy | RowMCMCStrategy) -> None:
    """Some steps, with a render before each of them, and two refinements."""
    views = ring_of_views()
    drive(
        engine,
        22,
        before_step=lambda step: engine.fetch(views[step % len(views)]) and None,
        after_step=lambda step: strategy.refine(engine, step),
    )
    engine.settle()


@pytest.mark.parametrize(
    ("room", "moments"), [(1.5, torch.float32), (1.5, torch.bfloat16), (None, torch.float32)]
)
def test_engines(accesses: dict[str, int], room: float | None, moments: torch.dtype) -> None:
    """Rows come, go, are stepped, edited, reset and rendered, by either engine."""
    layout = RowLayout(1, moments)
    slots = None if room is None else int(room * largest_view(layout))
    engine = make_engine(random_rows(ROWS, layout), layout, "cpu", slots)
    strategy = RowStrategy(
        grow_grad2d=0.95,
        grow_scale3d=0.07,
        refine_start_iter=5,
        refine_every=10,
        reset_every=15,
        pause_refine_after_reset=2,
        prune_opa=0.4,
        verbose=False,
    )
    train_and_refine(engine, strategy)
    expected = {"exchange_rows", "gather_leaves", "settle_and_step_rows", "_summarize", "_limit"}
    assert set(accesses) >= (expected if slots else {"unpack_rows", "pack_gradients"})
    assert min(accesses.values()) > 1000


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_noise(accesses: dict[str, int], moments: torch.dtype) -> None:
    """The resident engine with noise, and a strategy that relocates rows and adds some."""
    layout = RowLayout(1, moments)
    engine = make_engine(random_rows(ROWS, layout), layout, "cpu", int(1.5 * largest_view(layout)))
    strategy = RowMCMCStrategy(
        refine_start_iter=5,
        refine_every=10,
        noise_lr=100.0,
        min_opacity=0.45,
        opacity_reg=1e-6,
        scale_reg=1e-6,
    )
    engine.noise, engine.pull = strategy.noise, strategy.pull
    train_and_refine(engine, strategy)
    assert len(engine.store) == int(1.05 * int(1.05 * ROWS))
    assert set(accesses) >= {"exchange_rows", "gather_leaves", "settle_and_step_rows"}
    assert min(accesses[name] for name in ("_draw", "_step")) > 1000


@pytest.mark.parametrize("size", [(11, 11), (37, 53), (129, 200)])
def test_the_loss(accesses: dict[str, int], size: tuple[int, int]) -> None:
    render = torch.rand(*size, 3, requires_grad=True)
    fused_photometric_loss(render, torch.rand(*size, 3), 0.2).backward()
    assert len(accesses) == 2


@pytest.mark.parametrize(("n", "width", "height"), [(1, 16, 16), (300, 100, 70), (1025, 640, 479)])
def test_tile_lists(accesses: dict[str, int], n: int, width: int, height: int) -> None:
    tile_lists(*splats(n, width, height, size=5.0, seed=1), width, height)
    assert len(accesses) == 4


@pytest.mark.parametrize("absgrad", [False, True])
def test_pixel_gradients(accesses: dict[str, int], absgrad: bool) -> None:
    width, height = 50, 37
    given = splats(70, width, height, size=5.0, seed=1)
    lists = tile_lists(*given, width, height)
    drawn = (given.means2d, given.conics, torch.rand(70, 3), given.opacities)
    pixels = [torch.rand(1, height, width, channels) for channels in (3, 1, 3, 1)]
    pixel_gradients(*(t[None] for t in drawn), *lists, *pixels, absgrad=absgrad)
    assert accesses["_gradients"] > 1000
