"""Another VRAM budget in the middle of training: asked for by one thread, applied by another."""

from __future__ import annotations

from queue import SimpleQueue

from gsscale_nerfstudio.engines import Budget, HostEngine
from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.memory_plan import Circumstances, MemoryPlan, rebudget


class BudgetChanges:
    """Takes requests from any thread, and has the training thread carry them out between steps.

    Args:
        engine: that is to keep to the budget.

    Attributes:
        said: what became of the last request; empty if there was none.
        plan: the memory plan by the present budget; None before training.
    """

    def __init__(self, engine: HostEngine) -> None:
        self._engine = engine
        self._wanted: SimpleQueue[float] = SimpleQueue()
        self._given: Circumstances | None = None
        self.plan: MemoryPlan | None = None
        self.said = ""

    def begin(self, plan: MemoryPlan, given: Circumstances) -> None:
        """Training begins, with a plan made for the circumstances."""
        self.plan, self._given = plan, given

    def ask(self, gigabytes: float) -> None:
        """Have the next training step begin with another budget."""
        self.said = f"The next training step will begin with {gigabytes:g} GB."
        self._wanted.put(gigabytes)

    def apply(self, step: int) -> None:
        """Carry out what was asked for; called by the training thread before each step."""
        while not self._wanted.empty():
            gigabytes = self._wanted.get()
            try:
                self._change(gigabytes)
            except GSScaleError as error:
                before = self._engine.budget.gigabytes
                kept = "No budget is set" if before is None else f"It stays at {before:g} GB"
                self.said = f"Refused: {error}. {kept}, and training goes on."
            else:
                self.said = f"The budget is {gigabytes:g} GB since step {step}."

    def _change(self, gigabytes: float) -> None:
        plan = self.plan
        if plan is not None and self._given is not None and plan.gpu is not None:
            plan = rebudget(plan, self._given, gigabytes, len(self._engine.store))
        self._engine.set_budget(Budget(gigabytes))
        self.plan = plan
