"""Which of a bundle's engines are used here: one engine kind, one device, and per component the best precision there is."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import torch

from ldmrt.bundle import Bundle
from ldmrt.capture import Recorder
from ldmrt.components import STEP, in_network, is_step, parts, runs_once
from ldmrt.engines.captured import CapturedEngine
from ldmrt.engines.protocol import Engine
from ldmrt.engines.staged import StagedEngine
from ldmrt.engines.tensorrt import LIBRARIES
from ldmrt.errors import EngineMismatch
from ldmrt.manifest import EngineRecord
from ldmrt.memory_plan import MemoryPlan

# float16 is emulated on a CPU, bfloat16 on one without instructions for it.
_CPU = ("float32", "bfloat16", "float16")
_CPU_WITH_BFLOAT16 = ("bfloat16", "float32", "float16")
_CUDA = ("float16", "bfloat16", "float32")
# Engine kinds, from the one that asks most of a machine to the one that asks least.
_KINDS = (*LIBRARIES, "torch", "onnxruntime")


class EngineLoader:
    """A bundle's engines for one device, each loaded when it is first asked for.

    Attributes:
        bundle: the opened bundle.
        device: where the engines run.
        kind: the engine kind.
        recorder: what captures CUDA graphs, or None where the engine kind cannot be captured.
        plan: what there is room for; None if there is room for everything.

    Args:
        bundle: the opened bundle.
        device: where the engines are to run.
        kind: the engine kind to use; None for `torch`, or the one there is.
        dtype: the precision to use; None for the best one on the device.
        recorder: captures what runs once per request as CUDA graphs; None to launch kernel by kernel. The steps are captured
            by who runs them, `ldmrt.denoise.Denoiser`.
        weight_budget: see `ldmrt.engines.plan.TensorRtEngine`.
        staged: whether engines are to be unloaded again.

    Raises:
        EngineMismatch: the bundle has no engine of this kind.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: torch.device,
        kind: str | None,
        dtype: str | None,
        recorder: Recorder | None = None,
        weight_budget: int | None = None,
        *,
        staged: bool = False,
    ) -> None:
        kinds = kinds_of(bundle)
        self.bundle, self.device, self._dtype, self._weight_budget = bundle, device, dtype, weight_budget
        self.kind = kind or ("torch" if "torch" in kinds or not kinds else min(kinds))
        steps = [r for r in bundle.manifest.engines if is_step(r.component) and r.kind == self.kind]
        self.recorder = recorder if all(record.can_be_captured for record in steps) else None
        self.plan: MemoryPlan | None = None
        self._staged = staged
        self._engines: dict[str, Engine] = {}
        self._weights: dict[str, str] = {}
        self._apart: dict[str, Recorder] = {}
        if self.kind not in kinds:
            raise EngineMismatch(
                f"{bundle.path} has no {self.kind} engine, it has {', '.join(kinds) or 'none'}; "
                f"build one with `ldmrt build-engines MODEL --out {bundle.path} --engine {self.kind}`"
            )

    def records(self, component: str, size: tuple[int, int] | None = None) -> list[EngineRecord]:
        """A component's engines in the kind and the precision that are in use, by row count.

        Raises:
            EngineMismatch: there is none.
        """
        # What runs once per request is on the torch engine, whatever runs the steps.
        kind = "torch" if runs_once(component) else self.kind
        found = self.bundle.find(component, kind=kind, dtype=self._dtype, size=size)
        found = [record for record in found if self.plan is None or self.plan.allows(record)]
        if not found:
            raise EngineMismatch(
                f"{self.bundle.path} has no {component} engine ({kind}{', ' + self._dtype if self._dtype else ''}); "
                "build the bundle again with `ldmrt build-engines`"
            )
        present = {record.dtype for record in found}
        chosen = next(dtype for dtype in _order(self.device) if dtype in present)
        return [record for record in found if record.dtype == chosen]

    def load(self, record: EngineRecord) -> Engine:
        """An engine, loaded once, or once between two calls of `unload`."""
        if record.key not in self._engines:
            once = self._staged and not in_network(record.component)
            self._engines[record.key] = StagedEngine(lambda: self._open(record)) if once else self._open(record)
            self._weights[record.key] = record.weights
        return self._engines[record.key]

    def _open(self, record: EngineRecord) -> Engine:
        engine = self.bundle.load(record, self.device, weight_budget=self._weight_budget)
        if self.recorder is None or record.kind != "torch" or is_step(record.component):
            return engine
        # Capturing takes as long as several runs: too long for what is unloaded after one.
        stays = self.plan is None or record.weights in self.plan.resident
        return CapturedEngine(engine, self._apart.get(record.component, self.recorder)) if stays else engine

    def set_apart(self, component: str) -> None:
        """Let the engines of a component have memory of their own, so that they may run on one stream while others run on another.

        Raises:
            EngineMismatch: engines of this kind share it.
        """
        if self.kind != "torch":
            raise EngineMismatch(
                f"{self.kind} engines share the memory that they compute in, so none runs beside another: use the torch engine"
            )
        if self.recorder is None or component in self._apart:
            return
        self._apart[component] = recorder = Recorder(self.device)
        for record in self.records(component):
            match self._engines.get(record.key):
                case CapturedEngine() as captured:
                    captured.record_with(recorder)

    def unload(self, *, except_for: AbstractSet[str]) -> None:
        """Let engines go, and the weights that they read; who has them must have given them up.

        Args:
            except_for: the weight files that stay.
        """
        gone = {key: weights for key, weights in self._weights.items() if weights not in except_for}
        for key in gone:
            match self._engines[key]:
                case StagedEngine() as staged:
                    staged.unload()
                case _:
                    del self._engines[key], self._weights[key]
        for weights in set(gone.values()):
            self.bundle.unload(weights, self.device)
        if gone and self.device.type == "cuda":
            torch.cuda.empty_cache()

    def generation(self, component: str) -> int:
        """How often the weights of a component have been changed since they were loaded."""
        record = self.records(component)[0]
        return self.bundle.parameters(record.weights, self.device).generation if record.takes_weights else 0

    def load_all(self, size: tuple[int, int]) -> None:
        """Load what makes a picture of a size, so that what cannot be loaded is known at once.

        Raises:
            EngineMismatch: an engine cannot run here, or there is none of that size.
        """
        for component in (*parts(STEP), "decoder"):
            for record in self.records(component, size):
                self.load(record)

    def only(self, component: str) -> Engine:
        """The engine of a component that has one for all sizes and row counts."""
        return self.load(self.records(component)[0])


def kinds_of(bundle: Bundle) -> list[str]:
    """The engine kinds of a bundle, in the order in which one takes the place of another that cannot run."""
    present = {record.kind for record in bundle.manifest.engines if record.component == STEP}
    return [kind for kind in _KINDS if kind in present]


def _order(device: torch.device) -> tuple[str, ...]:
    if device.type == "cuda":
        return _CUDA
    return _CPU_WITH_BFLOAT16 if torch.cpu._is_avx512_bf16_supported() else _CPU
