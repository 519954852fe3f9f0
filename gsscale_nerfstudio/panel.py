"""The folder "gsscale" in Nerfstudio's viewer."""

from __future__ import annotations

import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

from nerfstudio.viewer.viewer_elements import ViewerElement
from viser import GuiMarkdownHandle, ViserServer

from gsscale_nerfstudio.budget_changes import BudgetChanges
from gsscale_nerfstudio.engines.budget import CONTEXT_BYTES
from gsscale_nerfstudio.memory_plan import MemoryPlan
from gsscale_nerfstudio.monitor import Monitor

if TYPE_CHECKING:
    from gsscale_nerfstudio.model import GSScaleModel

_SECONDS = 0.5
"""Between two looks at the engine's counters."""


class Panel(ViewerElement[None]):
    """What the engine does, the memory plan, and a field for another budget.

    Nerfstudio finds it among the pipeline's attributes and installs it under "Custom Elements".
    A thread of its own keeps it up to date while a browser is connected: steps do nothing for it.

    Args:
        model: whose engine.
        changes: where to ask for another budget.
    """

    def __init__(self, model: GSScaleModel, changes: BudgetChanges) -> None:
        super().__init__("gsscale")
        self._model, self._changes = model, changes
        self._monitor = Monitor(model.engine)
        self._told: dict[str, float] = {}

    def install(self, viser_server: ViserServer) -> None:
        self._server = viser_server
        self._texts: list[tuple[GuiMarkdownHandle, Any]] = []
        with viser_server.gui.add_folder(self.name):
            self._create_gui_handle(viser_server)
        self.refresh()
        threading.Thread(
            target=_keep_fresh, args=(weakref.ref(self),), name="gsscale-panel", daemon=True
        ).start()

    def _create_gui_handle(self, viser_server: ViserServer) -> None:
        gui, engine = viser_server.gui, self._model.engine
        self._add_text(gui.add_markdown(""), self._engine_text)
        if not engine.optimizers:
            return  # nothing is trained: ns-viewer
        if engine.bounded:
            gigabytes = engine.budget.gigabytes
            if gigabytes is None:
                gigabytes = (engine.budget.available(engine.device) + CONTEXT_BYTES) / 1e9
            field = gui.add_number("VRAM budget, GB", round(gigabytes, 2), min=0.0, step=0.05)
            button = gui.add_button("Train with this budget")
            button.on_click(lambda _: self._changes.ask(field.value))
            self._add_text(gui.add_markdown(""), lambda: self._changes.said)
        with gui.add_folder("Memory plan", expand_by_default=False):
            self._add_text(gui.add_markdown(""), lambda: plan_text(self._changes.plan))

    def _add_text(self, handle: GuiMarkdownHandle, text: Any) -> None:
        self._texts.append((handle, text))

    def refresh(self) -> None:
        """Show the present state."""
        for handle, text in self._texts:
            content = text()
            if content != handle.content:
                handle.content = content

    @property
    def watched(self) -> bool:
        """Whether a browser is connected."""
        return bool(self._server.get_clients())

    def _engine_text(self) -> str:
        self._told |= self._monitor.ask()
        return engine_text(self._told, self._model.shown_rows)


def _keep_fresh(panel: weakref.ref[Panel]) -> None:
    while (present := panel()) is not None:
        try:
            if present.watched:
                present.refresh()
        except RuntimeError:
            return  # the server has been stopped
        del present
        time.sleep(_SECONDS)


def engine_text(told: dict[str, float], shown_rows: int | None) -> str:
    """Markdown of what a :class:`.Monitor` has told.

    Args:
        told: some means may be missing.
        shown_rows: Gaussians that the last rendered view may see; None if none was rendered.
    """
    gaussians = [("in host memory", f"{told['rows']:,.0f}")]
    if "cached_rows" in told:
        gaussians.append(("on the GPU", f"{told['cached_rows']:,.0f}"))
        gaussians.append(("room on the GPU", f"{told['cache_capacity']:,.0f}"))
    if shown_rows is not None:
        gaussians.append(("visible, last render", f"{shown_rows:,}"))
    memory = [("host memory", f"{told['host_memory_gb']:.2f} GB")]
    if "gpu_allocated_gb" in told:
        memory.append(("GPU memory", f"{told['gpu_allocated_gb']:.2f} GB"))
        memory.append(("reserved there", f"{told['gpu_reserved_gb']:.2f} GB"))
    if "visible_rows" in told:
        gaussians.append(("visible, training", f"{told['visible_rows']:,.0f}"))
        gaussians.append(("hit rate", f"{told['hit_rate']:.0%}"))
        memory.append(("link, a view", f"{told['link_mb']:,.1f} MB"))
        memory.append(("link rate", f"{told['link_gb_per_s']:.2f} GB/s"))
    if "link_wait_ms" in told:
        memory.append(("wait for link", f"{told['link_wait_ms']:.1f} ms"))
    return f"{_table(['Gaussians', ''], gaussians)}\n\n{_table(['Memory and link', ''], memory)}"


def plan_text(plan: MemoryPlan | None) -> str:
    """Markdown of a memory plan; empty without one."""
    if plan is None:
        return ""
    rows = []
    for side in filter(None, (plan.host, plan.gpu)):
        rows.append((f"**{side.name}**", *map(_gb, (side.now, side.full, side.available))))
        parts = (part for part in side.parts if part.now or part.full)
        rows += [(part.name, _gb(part.now), _gb(part.full), "") for part in parts]
    table = _table(["GB", "now", "full", "of"], rows)
    return "\n\n".join([table, f"Full is with {plan.capacity:,} Gaussians.", *plan.advice])


def _table(heading: list[str], rows: list[Any]) -> str:
    cells = [heading, [":--", *["--:"] * (len(heading) - 1)], *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"
