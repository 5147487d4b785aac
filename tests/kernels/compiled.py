"""What the tests of compiled kernels share: compiling in whatever process this is, and the tools that come with Triton."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from ldmrt.kernels import aot
from ldmrt.kernels.aot import Cubin
from ldmrt.kernels.variant import Variant

# Of a block, in bytes, as the CUDA programming guide's table of compute capabilities has it: what may be asked for.
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

_INTERPRET = "TRITON_INTERPRET"
_compiled: dict[tuple[Variant, int], Cubin] = {}


def compile_all(variants: Sequence[Variant], arch: int) -> list[Cubin]:
    """`aot.compile_all`, each once in a session."""
    missing = [variant for variant in variants if (variant, arch) not in _compiled]
    _compiled.update({(cubin.variant, arch): cubin for cubin in compile_afresh(missing, arch)})
    return [_compiled[variant, arch] for variant in variants]


def compile_afresh(variants: Sequence[Variant], arch: int) -> list[Cubin]:
    """`aot.compile_all`. Where this process has Triton interpret, another compiles."""
    if os.environ.get(_INTERPRET) != "1":
        return aot.compile_all(variants, [arch])
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(_INTERPRET)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(aot.compile_all, variants, [arch]).result()


def tool(name: str, *arguments: str | Path) -> str:
    """What `ptxas` or `nvdisasm` of the triton package prints."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        pytest.skip("needs triton")
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        pytest.skip(f"this triton comes without {name}")
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
