"""What a cubin says about its kernel, against what the assembler that made it printed."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies

from ldmrt.kernels import elf
from tests.kernels.compiled import tool

# Sums of many loaded numbers, all of them needed twice: with few registers they are spilled.
_COUNT = 48
PTX = f"""
.version 8.4
.target sm_{{arch}}
.address_size 64
.visible .entry sum(.param .u64 from, .param .u32 count, .param .f32 scale, .param .u64 to, .param .u64 null)
.reqntid 96
.maxnreg {{registers}}
{{{{
  .reg .f32 %f<{2 * _COUNT + 2}>;
  .reg .u64 %a, %b;
  ld.param.u64 %a, [from];
  ld.param.u64 %b, [to];
  ld.param.f32 %f{2 * _COUNT}, [scale];
{"".join(f"  ld.volatile.global.f32 %f{k}, [%a+{4 * k}];" + chr(10) for k in range(_COUNT))}
  bar.sync 0;
{"".join(f"  st.volatile.global.f32 [%b+{4 * k}], %f{k};" + chr(10) for k in range(_COUNT))}
  bar.sync 0;
{"".join(f"  fma.rn.f32 %f{2 * _COUNT}, %f{k}, %f{k}, %f{2 * _COUNT};" + chr(10) for k in range(_COUNT))}
  st.global.f32 [%b], %f{2 * _COUNT};
  ret;
}}}}
"""


@pytest.mark.parametrize(
    ("arch", "assembler"), [("80", "ptxas"), ("89", "ptxas"), ("90a", "ptxas"), ("120a", "ptxas-blackwell")]
)
@pytest.mark.parametrize("registers", [255, 32, 24])
def test_registers_stack_and_parameters(tmp_path: Path, arch: str, assembler: str, registers: int) -> None:
    source, cubin = tmp_path / "sum.ptx", tmp_path / "sum.cubin"
    text = PTX.format(arch=arch, registers=registers)
    if arch == "120a":
        text = text.replace(".version 8.4", ".version 8.7")
    source.write_text(text)
    printed = tool(assembler, "-v", f"--gpu-name=sm_{arch}", source, "-o", cubin)
    used = re.search(r"Used (\d+) registers", printed)
    stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", printed)
    assert used is not None
    assert stack is not None
    found = elf.usage(cubin.read_bytes())
    assert found == elf.Usage("sum", int(used[1]), int(stack[1]), 96, (8, 4, 4, 8, 8))
    assert (found.stack > 0) == (int(stack[2]) > 0) == (registers < 255)


@pytest.mark.parametrize(
    "content", [b"", b"\x7fELF", b"\x7fELF\x02" + bytes(200), b"\x7fELF\x02" + b"\xff" * 200, b"{}" * 100]
)
def test_what_is_no_cubin_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="cubin"):
        elf.usage(content)


@pytest.fixture(scope="module")
def cubin(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("elf")
    (folder / "sum.ptx").write_text(PTX.format(arch="80", registers=255))
    tool("ptxas", "--gpu-name=sm_80", folder / "sum.ptx", "-o", folder / "sum.cubin")
    return (folder / "sum.cubin").read_bytes()


@settings(max_examples=300, deadline=None)
@given(data=strategies.data())
def test_a_damaged_cubin_gives_one_error_or_a_result(cubin: bytes, data: strategies.DataObject) -> None:
    damaged = bytearray(cubin[: data.draw(strategies.integers(0, len(cubin)))])
    for at in data.draw(strategies.lists(strategies.integers(0, max(0, len(damaged) - 1)), max_size=8)):
        if damaged:
            damaged[at] = data.draw(strategies.integers(0, 255))
    # Any other exception fails the test.
    with contextlib.suppress(ValueError):
        assert isinstance(elf.usage(bytes(damaged)), elf.Usage)
