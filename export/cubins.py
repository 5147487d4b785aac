"""Which kernels a bundle's engines launch on a GPU, found without one: the engines run on the meta device and launches are recorded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldmrt.engines.protocol import TensorSpec
from ldmrt.engines.torch import TorchEngine
from ldmrt.errors import BuildError
from ldmrt.graph import Graph
from ldmrt.kernels import aot, launch
from ldmrt.kernels.sampler import advance, sampler_step
from ldmrt.kernels.variant import Variant
from ldmrt.parameters import Parameters
from ldmrt.slots import Slots

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
    graphs: Iterable[Graph], targets: Sequence[str], there: Sequence[aot.Cubin] = ()
) -> list[aot.Cubin]:
    """The kernels of the torch engines of some graphs, compiled.

    Args:
        graphs: the engines' graphs.
        targets: such as `sm_89`.
        there: cubins that need not be compiled again.

    Raises:
        BuildError: Triton is not installed, or cannot compile a kernel for a target.
    """
    graphs = list(graphs)
    have = {(cubin.key, cubin.arch): cubin for cubin in there}
    wanted = []
    for target in targets:
        arch = architecture(target)
        for variant in variants(graphs, arch):
            cubin = have.get((variant.key(), arch))
            try:
                wanted.append(cubin or aot.compile_variant(variant, arch))
            except (RuntimeError, ValueError) as error:
                raise BuildError(f"kernel {variant.kernel} cannot be compiled for {target}: {error}") from error
    return wanted


def variants(graphs: Iterable[Graph], arch: int) -> list[Variant]:
    """The kernels that the torch engines of some graphs launch on an architecture, each once."""
    with launch.recording(arch) as found, torch.inference_mode(), _Convolutions():  # type: ignore[no-untyped-call]
        for graph in graphs:
            _run(graph)
            if graph.name == "step":
                _update(next(spec for spec in graph.inputs if spec.name == "latents"))
    return list(found)


def _run(graph: Graph) -> None:
    """Run a graph on tensors without contents, at each of the sizes that its free dimensions may have."""
    parameters = Parameters(lambda spec: _empty(spec, {}), _META)
    engine = TorchEngine(graph, parameters, _META)
    free = {size for spec in graph.inputs for size in spec.shape if isinstance(size, str)}
    for rows in _ROWS if "rows" in free else (1,):
        sizes = {"rows": rows, "tokens": _TOKENS}
        engine.run({spec.name: _empty(spec, sizes) for spec in graph.inputs})


def _update(latents: TensorSpec) -> None:
    """The sampler's part of a step, with and without noise."""
    rows, channels, height, width = (int(size) for size in latents.shape)
    for with_noise in (False, True):
        slots = Slots(
            rows,
            rows,
            (channels, height, width),
            entries=2 * rows,
            device=_META,
            model_dtype=latents.dtype,
            with_noise=with_noise,
        )
        sampler_step(
            slots.x,
            slots.saved,
            slots.history,
            torch.empty_like(slots.model_input),
            slots.table,
            slots.row,
            slots.noise,
            slots.guidance_scale,
            slots.cond_row,
            slots.uncond_row,
            slots.model_input,
        )
        advance(slots.row, slots.last_row)


class _Convolutions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Convolutions give channels-last pictures for channels-last pictures, as cuDNN's do; torch's own on meta do not."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.convolution.default, torch.ops.aten.conv2d.default):
            picture = args[0]
            if picture.dim() == 4 and picture.is_contiguous(memory_format=torch.channels_last):
                return torch.empty_like(result, memory_format=torch.channels_last)
        return result


def _empty(spec: TensorSpec, sizes: dict[str, int]) -> torch.Tensor:
    shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
    return torch.empty(shape, dtype=spec.dtype, device=_META)
