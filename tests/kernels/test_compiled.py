"""What the compiler makes of the kernels at the sizes of real models, for every architecture: without a GPU this is what shows
whether a configuration is sane. Registers must not spill, shared memory must fit, and kernels that only move memory must move 16 bytes
at a time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from ldmrt.kernels.aot import Cubin
from ldmrt.kernels.variant import Variant
from tests.kernels.compiled import SHARED_LIMIT, compile_all, needs_triton, tool
from tests.kernels.problems import NETWORKS, sampler_variants, variants

ARCHES = sorted(SHARED_LIMIT)
# What these do is move memory.
STREAMING = {
    "geglu.forward",
    "group_norm.fused",
    "group_norm.moments",
    "group_norm.normalize",
    "layer_norm.forward",
    "sampler.step",
    "upsample.forward",
}


def assert_sane(cubins: Sequence[Cubin], tmp_path: Path) -> None:
    problems = []
    for cubin in cubins:
        path = tmp_path / cubin.file_name
        path.write_bytes(cubin.code)
        instructions = tool("nvdisasm", "-c", path)
        found = []
        # The assembler reserves a few bytes of stack for some kernels that never touch it.
        if cubin.stack > 0 and re.search(r"\b(LDL|STL)\b", instructions):
            found.append(f"{cubin.stack} bytes of stack in use")
        if cubin.shared > SHARED_LIMIT[cubin.arch]:
            found.append(f"{cubin.shared} bytes of shared memory, {SHARED_LIMIT[cubin.arch]} at most")
        if _streams(cubin.variant) and not re.search(r"\bLDG\.E(\.\w+)*\.128\b", instructions):
            found.append("no load of 16 bytes")
        problems += [f"sm_{cubin.arch} {cubin.variant}: {problem}" for problem in found]
    assert not problems, "\n".join(problems)


def _streams(variant: Variant) -> bool:
    """Whether a kernel moves memory in runs of whole vectors; some groups of channels are 20 bytes, which no vector divides."""
    constants = dict(variant.constants)
    if variant.kernel not in STREAMING or not constants.get("CHANNELS_LAST", False):
        return variant.kernel in STREAMING
    itemsize = 4 if variant.types[0] == "*fp32" else 2
    return int(constants["GROUPS"]) * int(constants["SIZE"]) * itemsize % 16 == 0


def first_of_each_kernel(every: Sequence[Variant]) -> list[Variant]:
    return list({variant.kernel: variant for variant in reversed(every)}.values())


@needs_triton
@pytest.mark.parametrize("arch", [86, 90])
def test_one_of_each_kernel(arch: int, tmp_path: Path) -> None:
    chosen = first_of_each_kernel([*variants("sd15", arch), *sampler_variants(arch)])
    assert {variant.kernel for variant in chosen} == STREAMING | {"attention.forward", "sampler.advance"}
    assert_sane(compile_all(chosen, arch), tmp_path)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.parametrize("arch", ARCHES)
def test_real_sizes(arch: int, name: str, tmp_path: Path) -> None:
    assert_sane(compile_all(variants(name, arch), arch), tmp_path)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("arch", ARCHES)
def test_other_dtypes(arch: int, dtype: torch.dtype, tmp_path: Path) -> None:
    chosen = first_of_each_kernel([*variants("sd15", arch, dtype), *sampler_variants(arch, dtype)])
    assert_sane(compile_all(chosen, arch), tmp_path)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("rows", [1, 16])
def test_other_batches(arch: int, rows: int, tmp_path: Path) -> None:
    chosen = [variant for variant in variants("sd15", arch, rows=rows) if variant not in variants("sd15", arch)]
    assert_sane(compile_all(chosen, arch), tmp_path)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("arch", [86, 90, 120])
def test_contiguous_images(arch: int, tmp_path: Path) -> None:
    chosen = variants("sd15", arch, layout=torch.contiguous_format)
    assert_sane(
        compile_all([variant for variant in chosen if variant.kernel.startswith("group_norm.")], arch), tmp_path
    )
