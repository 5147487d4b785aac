"""Which engines are in memory at each stage of a request, when there is a budget for it."""

from __future__ import annotations

import logging

from ldmrt.denoisers import Denoisers
from ldmrt.errors import EngineMismatch
from ldmrt.loader import EngineLoader
from ldmrt.memory_plan import MemoryPlan, Stage, plan
from ldmrt.needs import Needs, Workload

# What a process takes on a GPU besides tensors: the CUDA context, what libraries load and work with, and what lies idle between the
# allocator's blocks. An estimate, not yet measured on a GPU.
_CUDA_RESERVE = 768 << 20

_log = logging.getLogger(__name__)


class Residency:
    """Loads and unloads engines so that a budget is kept; without one everything stays, and nothing is done here.

    Attributes:
        budget: bytes, or None.

    Args:
        loader: gives the engines; the plan in force is told to it.
        denoisers: made of engines, and given up with them.
        budget: see there.
        least_rows: rows of a step that one image takes.

    Raises:
        EngineMismatch: the engine kind is not `torch`, whose graphs alone tell what they need.
    """

    def __init__(self, loader: EngineLoader, denoisers: Denoisers, budget: int | None, least_rows: int) -> None:
        if budget is not None and loader.kind != "torch":
            raise EngineMismatch(
                f"a memory budget is for torch engines, and {loader.kind} ones were chosen; leave memory_budget out, "
                "or use the torch engine"
            )
        self.budget = budget
        self._loader, self._denoisers, self._least_rows = loader, denoisers, least_rows
        self._plans: dict[Workload, MemoryPlan] = {}
        self._workload: Workload | None = None

    def begin(self, workload: Workload) -> MemoryPlan | None:
        """Put the plan for a request in force, and return it; None without a budget.

        Raises:
            BadRequest: the budget does not hold it.
            EngineMismatch: the bundle lacks an engine for it.
        """
        if self.budget is None or workload == self._workload:
            return self._loader.plan
        self._loader.plan, self._workload = None, None
        if workload not in self._plans:
            needs = Needs(self._loader, self._denoisers)
            self._plans[workload] = plan(
                self.budget,
                needs.stages(workload),
                reserve=_CUDA_RESERVE if self._loader.device.type == "cuda" else 0,
                least_rows=self._least_rows,
                size=workload.size,
                tiles=needs.tiles(workload.size),
            )
        made = self._plans[workload]
        self._loader.plan, self._workload = made, workload
        self._denoisers.clear()
        self._loader.unload(except_for={*made.resident, *made.staged})
        _log.info("memory for %dx%d: %s", *workload.size, made)
        return made

    def enter(self, stage: Stage) -> None:
        """Make room for a stage: unload what neither belongs to it nor stays."""
        made = self._loader.plan
        if made is not None:
            needed = {*made.files.get(stage, ()), *made.resident}
            if not needed.issuperset(made.files["denoise"]):
                self._denoisers.clear()
            self._loader.unload(except_for=needed)
