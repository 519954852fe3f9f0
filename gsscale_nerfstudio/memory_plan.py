"""What training will keep where, and whether that can work: told before the first step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nerfstudio.utils.rich_utils import CONSOLE
from rich.table import Table

from gsscale_nerfstudio.cull import View
from gsscale_nerfstudio.engines.budget import CONTEXT_BYTES, IN_TENSORS, Budget
from gsscale_nerfstudio.engines.host import HostEngine
from gsscale_nerfstudio.engines.resident import ResidentEngine
from gsscale_nerfstudio.engines.sizing import (
    LEAST_VIEW_ROW_BYTES,
    unfused_bytes,
    view_bytes,
    with_margin,
)
from gsscale_nerfstudio.errors import GSScaleError, warn
from gsscale_nerfstudio.store import RowLayout
from gsscale_nerfstudio.store.host import (
    UNBOUNDED_ROWS,
    headroom,
    locked_ahead,
    remedy_for_rows,
)
from gsscale_nerfstudio.store.memory import available_memory, with_spare

if TYPE_CHECKING:
    from gsscale_nerfstudio.datamanager import GSScaleDatamanager
    from gsscale_nerfstudio.model import GSScaleModel
    from gsscale_nerfstudio.model_config import GSScaleModelConfig

_VIEWS = 256
"""Views that are culled to find the largest: the one of all is not much larger."""


@dataclass(frozen=True)
class Gpu:
    """Of the GPU, in bytes.

    Attributes:
        free: what training could take of the card, CUDA's own included.
        budget: what the user lets tensors and CUDA take; None for all that is free.
        images: what images will take.
        caches: whether the resident engine trains, as long as it can.
    """

    free: int
    budget: int | None = None
    images: int = 0
    caches: bool = True

    @property
    def available(self) -> int:
        return self.free if self.budget is None else min(self.free, self.budget)


@dataclass(frozen=True)
class Circumstances:
    """What a plan is made for; sizes are in bytes.

    Attributes:
        layout: of the rows.
        rows: in the store now.
        wanted: capacity that the user asks for; None for as many rows as fit.
        view_rows, view_pixels: of the largest training view.
        memory: host memory that the parts of the plan can take, or have taken already.
        headroom: host memory that is left to others.
        images: host memory that images will take.
        images_bounded: whether a flag says how much that may be.
        gpu: None where there is none.
    """

    layout: RowLayout
    rows: int
    wanted: int | None
    view_rows: int
    view_pixels: int
    memory: int
    headroom: int
    images: int
    images_bounded: bool = False
    gpu: Gpu | None = None
    resumed: bool = False

    def view_at(self, rows: int) -> int:
        """Rows of the largest view when there are ``rows``, if it sees the same share of them."""
        return -(-self.view_rows * rows // max(1, self.rows))


@dataclass(frozen=True)
class Part:
    """Bytes that something takes with the rows of now, and at capacity."""

    name: str
    now: int
    full: int


@dataclass(frozen=True)
class Side:
    """Host or GPU: its parts, and the bytes that they may take together."""

    name: str
    parts: tuple[Part, ...]
    available: int

    @property
    def now(self) -> int:
        return sum(part.now for part in self.parts)

    @property
    def full(self) -> int:
        return sum(part.full for part in self.parts)


@dataclass(frozen=True)
class MemoryPlan:
    """What :func:`make_plan` gives.

    Attributes:
        capacity: rows up to which the scene can grow.
        beside_row: bytes of staging and lists that come with each row.
        host, gpu: what lives there; no GPU, no plan for it.
        advice: a sentence for each thing that is tight.
    """

    capacity: int
    beside_row: float
    host: Side
    gpu: Side | None
    advice: tuple[str, ...]


def make_plan(given: Circumstances) -> MemoryPlan:
    """Compute what lives where, now and when the scene has grown to its capacity.

    The host's parts never exceed its memory. Those of the GPU may, at capacity, since that is as
    many rows as the host holds; advice says from when on.

    Raises:
        GSScaleError: it cannot work; names the flag that would make it work.
    """
    try:
        engine, capacity = _grown(given)
    except _TooManyError as error:
        raise _too_many(given, error.parts) from None
    now, full = (_host_parts(given, engine, rows) for rows in (given.rows, capacity))
    left = min(given.headroom, given.memory - sum(now.values()))
    now["left to others"] = full["left to others"] = left
    host = Side("host memory", _parts(now, full), given.memory)
    advice = []
    if given.wanted is None and capacity < given.rows + given.rows // 2:
        advice.append(
            f"host memory is tight: densification can add {capacity - given.rows:,} Gaussians to "
            f"the {given.rows:,} of now; free some, or keep fewer images there "
            "(--pipeline.datamanager.image-memory-gb)"
        )
    beside = engine.staging_bytes(given.layout, given.rows, given.view_rows) / max(1, given.rows)
    plan = MemoryPlan(capacity, beside, host, None, tuple(advice))
    return plan if given.gpu is None else _with_gpu(plan, given, given.gpu)


def _with_gpu(plan: MemoryPlan, given: Circumstances, gpu: Gpu) -> MemoryPlan:
    """The plan, with its GPU's side and what is to be said about it.

    Raises:
        GSScaleError: the GPU's memory does not hold what the largest view takes.
    """
    _refuse_small_gpu(given, gpu)
    now, full = (_gpu_parts(given, gpu, rows) for rows in (given.rows, plan.capacity))
    side = Side("GPU memory", _parts(now, full), gpu.available)
    advice = plan.advice + tuple(_gpu_advice(given, gpu, plan.capacity))
    return replace(plan, gpu=side, advice=advice)


def rebudget(plan: MemoryPlan, given: Circumstances, gigabytes: float, rows: int) -> MemoryPlan:
    """The plan with another budget and as many rows as there are now; the host's side stays.

    Args:
        plan: made for ``given``, which has a GPU.
        given: circumstances at the start.
        gigabytes: see :class:`.Budget`.
        rows: in the store.

    Raises:
        GSScaleError: the budget does not hold what the largest view takes.
    """
    assert given.gpu is not None
    gpu = replace(given.gpu, budget=_budget_bytes(gigabytes))
    later = replace(given, rows=rows, view_rows=given.view_at(rows), gpu=gpu)
    return _with_gpu(replace(plan, advice=()), later, gpu)


# -- host ------------------------------------------------------------------------------------------


def _host_parts(given: Circumstances, engine: type[HostEngine], rows: int) -> dict[str, int]:
    layout = given.layout
    store = rows * layout.stored_bytes
    if given.gpu is not None:
        store += locked_ahead(layout, rows)
    return {
        "host store": store,
        "staging": engine.staging_bytes(layout, rows, given.view_at(rows)),
        "images": given.images,
        "copy while a checkpoint is written": rows * layout.snapshot_bytes,
    }


class _TooManyError(GSScaleError):
    """Host memory does not hold the present rows; ``parts`` is what they take."""

    def __init__(self, parts: dict[str, int]) -> None:
        super().__init__()
        self.parts = parts


def _grown(given: Circumstances) -> tuple[type[HostEngine], int]:
    """The engine of a scene that has grown to its capacity, and that capacity in rows.

    Raises:
        GSScaleError: see :func:`_capacity`.
    """
    capacity = _capacity(given, ResidentEngine if _caches(given) else HostEngine)
    if _caches(given, capacity):
        return ResidentEngine, capacity
    # The resident engine becomes the host engine where its cache cannot hold a view.
    return HostEngine, _capacity(given, HostEngine)


def _capacity(given: Circumstances, engine: type[HostEngine]) -> int:
    """Rows that the scene can grow to: those wanted, or as many as host memory holds.

    Raises:
        _TooManyError: host memory does not hold the present ones.
        GSScaleError: it does not hold those wanted.
    """

    def needed(rows: int) -> int:
        return sum(_host_parts(given, engine, rows).values())

    if needed(given.rows) > given.memory:
        raise _TooManyError(_host_parts(given, engine, given.rows))
    most = given.memory - given.headroom
    fits = _last(lambda rows: needed(rows) <= most, given.rows, UNBOUNDED_ROWS)
    if given.wanted is None:
        return fits
    if given.wanted > fits:
        parts = _host_parts(given, engine, given.wanted)
        smaller = ", keep moments in 16 bits (--pipeline.model.moment-dtype bfloat16)"
        raise GSScaleError(
            f"{given.wanted:,} Gaussians take {_listed(parts)} of host memory, and "
            f"{_gb(given.memory)} are available (in a container, within its limit); lower "
            f"--pipeline.model.max-gaussians to at most {fits:,}"
            f"{'' if given.layout.narrow else smaller}, or free host memory"
        )
    return given.wanted


def _too_many(given: Circumstances, parts: dict[str, int]) -> GSScaleError:
    flags, least, tried = _smaller_rows(given)
    rest = given.memory - (sum(parts.values()) - given.images)
    if rest > 0:
        remedy = f"lower --pipeline.datamanager.image-memory-gb to {rest / 2e9:.2g}"
        if not given.images_bounded:
            remedy = (
                "let images be read from the disk with --pipeline.datamanager.cache-images disk "
                f"--pipeline.datamanager.image-memory-gb {rest / 2e9:.2g}"
            )
        if flags:
            remedy += f", or train with {flags}"
    else:
        remedy = remedy_for_rows(flags, least, tried)
    return GSScaleError(
        f"training the present {given.rows:,} Gaussians takes {_listed(parts)} of host memory, and "
        f"{_gb(given.memory)} are available (in a container, within its limit); {remedy}"
    )


def _smaller_rows(given: Circumstances) -> tuple[str, int, str]:
    """Flags with which the rows fit, or else the bytes that they take with the last flags tried."""
    least, flags = 0, ""
    for layout, flags in given.layout.smaller(with_bands=given.resumed):
        smaller = replace(given, layout=layout)
        try:
            _grown(smaller)
            return flags, 0, ""
        except _TooManyError as error:
            least = sum(error.parts.values())
        except GSScaleError:  # the present ones fit, and those wanted do not
            pass
        with suppress(GSScaleError):
            _, most = _grown(replace(smaller, wanted=None))
            return f"{flags} --pipeline.model.max-gaussians {most}", 0, ""
    return "", least, flags


# -- GPU -------------------------------------------------------------------------------------------


def _caches(given: Circumstances, rows: int | None = None) -> bool:
    """Whether the resident engine trains: its cache must hold all rows of a view."""
    gpu, rows = given.gpu, given.rows if rows is None else rows
    return gpu is not None and gpu.caches and _slots(given, gpu, rows) >= given.view_at(rows)


def _slots(given: Circumstances, gpu: Gpu, rows: int) -> int:
    """How many rows a cache may have beside the training of the largest of ``rows``' views."""
    view = view_bytes(with_margin(given.view_at(rows)), given.view_pixels)
    return max(0, gpu.available - CONTEXT_BYTES - gpu.images - view) // given.layout.cached_bytes


def _gpu_parts(given: Circumstances, gpu: Gpu, rows: int) -> dict[str, int]:
    seen = given.view_at(rows)
    view = view_bytes(with_margin(seen), given.view_pixels)
    cached = 0
    if _caches(given, rows):
        cached = min(_slots(given, gpu, rows), with_margin(rows)) * given.layout.cached_bytes
    else:
        view += _upload_bytes(given.layout, seen)
    return {
        "CUDA": CONTEXT_BYTES,
        "images": gpu.images,
        "working set of a view": view,
        "cached rows": cached,
    }


def _upload_bytes(layout: RowLayout, view_rows: int) -> int:
    """The host engine's buffer for rows that come from the host, if none is there already."""
    return with_spare(view_rows) * layout.width * 4


_MOST_PARTS = 64
"""That a view is reasonably drawn in."""


def _refuse_small_gpu(given: Circumstances, gpu: Gpu) -> None:
    # Of a view that is drawn in parts.
    view = view_bytes(given.view_rows // _MOST_PARTS, given.view_pixels, LEAST_VIEW_ROW_BYTES)
    least = CONTEXT_BYTES + gpu.images + view
    if least <= gpu.available:
        return
    if least <= gpu.free:
        enough = least / IN_TENSORS / 1e9 + 0.05
        remedy = f"raise --pipeline.model.vram-budget-gb to at least {enough:.1f}"
    elif least - gpu.images <= gpu.available:
        remedy = "keep images in host memory (--pipeline.datamanager.cache-images cpu)"
    else:
        remedy = (
            "free GPU memory, or train with smaller images "
            "(--pipeline.datamanager.camera-res-scale-factor 0.5)"
        )
    fused = least - unfused_bytes(given.view_pixels)
    if fused <= gpu.available:
        remedy += (
            f", or install PyTorch 2.8 or newer (Triton 3.4): with its fused loss {_gb(fused)} are "
            "enough"
        )
    raise GSScaleError(
        f"{_gb(gpu.available)} of GPU memory do not hold what the largest training view takes: at "
        f"least {_gb(least)}, of which CUDA {_gb(CONTEXT_BYTES)}, images {_gb(gpu.images)}, and "
        f"{_gb(view)} for {given.view_pixels / 1e6:.1f} million pixels, drawn in parts, and a "
        f"{_MOST_PARTS}th of {given.view_rows:,} Gaussians; {remedy}"
    )


def _gpu_advice(given: Circumstances, gpu: Gpu, capacity: int) -> list[str]:
    advice = []
    if gpu.budget is not None and gpu.budget > gpu.free:
        advice.append(
            f"--pipeline.model.vram-budget-gb allows {_gb(gpu.budget)}, but the card has "
            f"{_gb(gpu.free)} to give at present: training keeps to that"
        )

    def fits(rows: int) -> bool:
        return sum(_gpu_parts(given, gpu, rows).values()) <= gpu.available

    more = "a larger --pipeline.model.vram-budget-gb helps"
    if gpu.available >= gpu.free:
        more = "smaller images or --pipeline.model.max-gaussians help"
    if not fits(capacity):
        advice.append(
            f"{_from(given, fits)} the largest view does not fit into the GPU's memory and is "
            f"drawn in parts, which takes a second forward pass; {more}"
        )
    elif gpu.caches and not _caches(given, capacity):
        since = _from(given, lambda rows: _caches(given, rows))
        advice.append(
            f"{since} the GPU holds no view's optimizer state, and Adam runs on the CPU, which is "
            f"slower; {more}"
        )
    return advice


def _from(given: Circumstances, works: Callable[[int], bool]) -> str:
    """Words for the number of rows from which on something, true for few, does not work."""
    if not works(given.rows):
        return "already now"
    return f"from some {_last(works, given.rows, UNBOUNDED_ROWS):,} Gaussians on"


# -- numbers and words -----------------------------------------------------------------------------


def measure(model: GSScaleModel, data: GSScaleDatamanager) -> Circumstances:
    """The circumstances of a training that is about to begin.

    Raises:
        GSScaleError: a camera or an image that cannot be used.
    """
    engine, config, device = model.engine, model.config, model.engine.device
    store, placement = engine.store, data.image_placement
    # Before images are read they have the lens's distortion, which matters little here.
    cameras = data.train_dataset.cameras
    every = range(0, len(cameras), -(-len(cameras) // _VIEWS))
    views = [View.from_camera(cameras[index : index + 1]) for index in every]
    gpu = None
    if device.type == "cuda":
        budget = config.vram_budget_gb
        gpu = Gpu(
            free=int(Budget().available(device)) + CONTEXT_BYTES,
            budget=None if budget is None else _budget_bytes(budget),
            images=placement.on_gpu,
            caches=isinstance(engine, ResidentEngine),
        )
    images = sum(placement.in_host)
    in_memory = images - data.image_bytes_to_come()
    return Circumstances(
        layout=store.layout,
        rows=len(store),
        wanted=_wanted(config, len(store)),
        view_rows=max(engine.visible_rows(view) for view in views),
        view_pixels=int((cameras.width * cameras.height).max()),
        memory=available_memory() + store.taken_bytes + in_memory,
        headroom=headroom(),
        images=images,
        images_bounded=placement.where == "disk",
        gpu=gpu,
        resumed=engine.step_count > 0,
    )


def _budget_bytes(gigabytes: float) -> int:
    return int(IN_TENSORS * gigabytes * 1e9)


def _wanted(config: GSScaleModelConfig, rows: int) -> int | None:
    """Rows up to which flags let the scene grow; None if they say nothing."""
    if config.strategy != "mcmc":
        return config.max_gaussians
    most = min(config.max_gs_num, config.max_gaussians or config.max_gs_num)
    return max(rows, most)


def show(plan: MemoryPlan, rows: int) -> None:
    """Print a plan as one table, in 10^9 bytes, and its advice; ``rows`` are those of now."""
    table = Table(title="gsscale: memory plan, in GB", title_justify="left")
    table.add_column("")
    for heading in (
        f"now, {rows:,} Gaussians", f"at most, {plan.capacity:,}", "available",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for side in filter(None, (plan.host, plan.gpu)):
        total = (f"{size / 1e9:.2f}" for size in (side.now, side.full, side.available))
        table.add_row(side.name, *total, style="bold")
        for part in side.parts:
            if part.now or part.full:
                sizes = (f"{size / 1e9:.2f}" for size in (part.now, part.full))
                table.add_row(f"  {part.name}", *sizes, "")
    CONSOLE.print(table)
    for line in plan.advice:
        warn(f"{line}.")


def _parts(now: dict[str, int], full: dict[str, int]) -> tuple[Part, ...]:
    return tuple(Part(name, now[name], full[name]) for name in now)


def _listed(parts: dict[str, int]) -> str:
    sizes = ", ".join(f"{name} {_gb(size)}" for name, size in parts.items() if size)
    return f"{_gb(sum(parts.values()))} ({sizes})"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _last(works: Callable[[int], bool], first: int, end: int) -> int:
    """The last number from ``first`` to ``end`` that works: the smaller ones do, and ``first``."""
    works_not = end + 1
    while works_not - first > 1:
        middle = (first + works_not) // 2
        if works(middle):
            first = middle
        else:
            works_not = middle
    return first
