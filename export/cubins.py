"""Which kernels a bundle's engines launch on a GPU, found without one: the engines run on the meta device and launches are recorded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ldmrt.components import CONTROLLED_STEP, STEP
from ldmrt.engines.protocol import TensorSpec
from ldmrt.errors import BuildError
from ldmrt.graph import Graph
from ldmrt.kernels import aot, launch
from ldmrt.kernels.variant import Variant
from ldmrt.rehearsal import rehearse
from ldmrt.slots import Adjustments, Slots

# What Triton compiles for: Ampere and later. Its tensor-core code for Turing (7.5) spills.
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

_META = torch.device("meta")
# The sizes of free dimensions that kernels are compiled for: prompts in one to four windows of CLIP's length.
_ROWS = range(1, 9)
_TOKENS = 77


def architecture(target: str) -> int:
    """89 for `sm_89`.

    Raises:
        BuildError: it is not a target that kernels are compiled for.
    """
    if target not in TARGETS:
        raise BuildError(f"target {target!r} is not known; choose among {', '.join(TARGETS)}")
    return int(target.removeprefix("sm_"))


def compile_kernels(
    graphs: Iterable[Graph],
    targets: Sequence[str],
    there: Sequence[aot.Cubin] = (),
    latents: Sequence[TensorSpec] = (),
) -> list[aot.Cubin]:
    """The kernels of the torch engines of some graphs, and of samplers, compiled.

    Args:
        graphs: the engines' graphs.
        targets: such as `sm_89`.
        there: cubins that need not be compiled again.
        latents: of steps that run on other engines; the sampler's part of them is ours.

    Raises:
        BuildError: Triton is not installed, or cannot compile a kernel for a target.
    """
    graphs = list(graphs)
    have = {(cubin.key, cubin.arch): cubin for cubin in there}
    wanted = []
    for target in targets:
        arch = architecture(target)
        for variant in variants(graphs, arch, latents):
            cubin = have.get((variant.key(), arch))
            try:
                wanted.append(cubin or aot.compile_variant(variant, arch))
            except (RuntimeError, ValueError) as error:
                raise BuildError(f"kernel {variant.kernel} cannot be compiled for {target}: {error}") from error
    return wanted


def variants(graphs: Iterable[Graph], arch: int, latents: Sequence[TensorSpec] = ()) -> list[Variant]:
    """The kernels that the torch engines of some graphs launch on an architecture, and samplers with some latents, each once."""
    with launch.recording(arch) as found, torch.inference_mode():
        for graph in graphs:
            free = {size for spec in graph.inputs for size in spec.shape if isinstance(size, str)}
            for rows in _ROWS if "rows" in free else (1,):
                rehearse(graph, {"rows": rows, "tokens": _TOKENS})
            if graph.name in (STEP, CONTROLLED_STEP):
                _update(next(spec for spec in graph.inputs if spec.name == "latents"))
        for spec in latents:
            _update(spec)
    return list(found)


def _update(latents: TensorSpec) -> None:
    """The sampler's part of a step."""
    rows, channels, height, width = (int(size) for size in latents.shape)
    slots = Slots(rows, rows, (channels, height, width), entries=2 * rows, device=_META, model_dtype=latents.dtype)
    slots.update(torch.empty_like(slots.model_input), Adjustments())
