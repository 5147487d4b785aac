"""Kernels compiled without a GPU, and the folder that they are kept in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ldmrt.kernels import aot
from ldmrt.kernels.aot import Cubin, runs_on
from ldmrt.kernels.variant import Variant, source_hash
from tests.kernels.compiled import compile_afresh, compile_all, needs_triton, tool
from tests.kernels.problems import sampler_variants


@pytest.fixture(scope="module")
def cubins() -> list[Cubin]:
    """Two kernels for the oldest and the newest architecture."""
    return [cubin for arch in (80, 120) for cubin in compile_all(sampler_variants(arch)[1:], arch)]


def fake(arch: int = 90, **change: Any) -> Cubin:
    """A cubin that only looks like one, for tests of the folder alone."""
    variant = Variant("sampler.advance", ("*i64", "*i64", "i32"), (True, True, False), (("BLOCK", 128),), 1, 1)
    return Cubin(
        variant=replace(variant, **change),
        arch=arch,
        triton="3.7.1",
        source=source_hash("sampler.advance"),
        symbol="advance",
        threads=32,
        shared=0,
        parameters=(8, 8, 4, 8, 8),
        registers=20,
        stack=0,
        code=b"\x7fELF and so on",
    )


@needs_triton
def test_what_a_cubin_says_is_what_was_asked_for(cubins: list[Cubin]) -> None:
    step, advance_80, *_ = cubins
    assert [(cubin.symbol, cubin.arch) for cubin in cubins] == [
        ("step", 80),
        ("advance", 80),
        ("step", 120),
        ("advance", 120),
    ]
    assert step.parameters == (8,) * 11 + (4, 4) + (8, 8)
    assert (step.threads, step.hidden) == (64, 2)
    assert (advance_80.parameters, advance_80.threads, advance_80.hidden) == ((8, 8, 4, 8, 8), 32, 2)
    assert all(cubin.code.startswith(b"\x7fELF") and 16 <= cubin.registers <= 255 for cubin in cubins)
    assert all(cubin.key == cubin.variant.key() for cubin in cubins)


@needs_triton
def test_a_cubin_names_no_path_of_the_machine_that_made_it(cubins: list[Cubin]) -> None:
    for cubin in cubins:
        assert b".py" not in cubin.code
        assert b"/tmp" not in cubin.code
        assert b"/home" not in cubin.code


@needs_triton
def test_compiling_twice_gives_the_same_bytes(
    cubins: list[Cubin], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert compile_afresh([cubins[1].variant], 80) == [cubins[1]]
    assert any(tmp_path.iterdir())  # it was compiled, not found in the cache


@needs_triton
def test_fused_operations_only_where_allowed(cubins: list[Cubin], tmp_path: Path) -> None:
    (fused,) = compile_all([replace(cubins[0].variant, fp_fusion=True)], 80)
    counts = []
    for cubin in (cubins[0], fused):
        path = tmp_path / f"{cubin.key}.cubin"
        path.write_bytes(cubin.code)
        counts.append(tool("nvdisasm", "-c", path).count("FFMA"))
    assert counts[0] == 0 < counts[1]


def test_progress_counts_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "compile_variant", lambda variant, arch: replace(fake(arch), variant=variant))
    seen: list[tuple[int, int]] = []
    variants = [fake().variant, fake(num_warps=4).variant]
    found = aot.compile_all(variants, [80, 120], on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [(cubin.variant, cubin.arch) for cubin in found] == [
        (variant, arch) for arch in (80, 120) for variant in variants
    ]


@needs_triton
@pytest.mark.parametrize("change", [{"constants": ()}, {"constants": (("BLOCKS", 128),)}, {"types": ("*i64", "*i64")}])
def test_arguments_that_the_kernel_does_not_take_are_refused(change: dict[str, Any]) -> None:
    variant = replace(sampler_variants(90)[-1], **change)
    with pytest.raises(
        ValueError, match=r"sampler\.advance takes \['row_pointer', 'last_pointer', 'slots', 'BLOCK', 'DEPENDENT'\]"
    ):
        compile_afresh([variant], 90)


@needs_triton
def test_assembly_has_no_parameters_but_the_variants() -> None:
    """Three of `advance`, with its number; two with the number compiled in."""
    variant = sampler_variants(80)[-1]
    numbered = replace(
        variant, types=variant.types[:2], aligned=variant.aligned[:2], constants=(*variant.constants, ("slots", 4))
    )
    for each, count in ((variant, 3), (numbered, 2)):
        made = aot.compile_to_ptx(each, 80)
        assert made.symbol == "advance"
        assert made.threads == 32 * variant.num_warps
        assert made.text.count(".param .") == count
        assert ".target sm_80\n" in made.text


def test_a_hidden_parameter_that_is_read_is_refused() -> None:
    text = (
        ".visible .entry f(\n\t.param .u64 f_param_0,\n\t.param .u64 f_param_1\n)\n{ ld.param.b64 %rd1, [f_param_1]; }"
    )
    assert aot._without_hidden(text, "f", 2) == text
    with pytest.raises(ValueError, match="f reads memory that only Triton's launcher provides"):
        aot._without_hidden(text, "f", 1)


def test_without_triton_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"Triton is not installed, .* pip install 'ldmrt\[triton\]'"):
        aot.compile_variant(fake().variant, 90)


@pytest.mark.interpreted
def test_the_interpreter_compiles_nothing() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        aot.compile_variant(fake().variant, 90)


@pytest.mark.parametrize(
    ("compiled", "serves"),
    [(80, {80, 86, 87, 89}), (86, {86, 87, 89}), (89, {89}), (90, {90}), (100, {100}), (120, {120})],
)
def test_where_a_cubin_runs(compiled: int, serves: set[int]) -> None:
    devices = [75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121]
    assert {device for device in devices if runs_on(compiled, device)} == serves


@pytest.mark.parametrize("parameters", [(8, 8), (8, 8, 8, 8), (8, 8, 4, 8, 4), (4, 8, 4)])
def test_parameters_that_a_launch_would_write_otherwise_are_refused(parameters: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \[8, 8, 4\] and pointers"):
        replace(fake(), parameters=parameters)


@needs_triton
def test_a_folder_gives_back_what_was_written(cubins: list[Cubin], tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "kernels"
    written = aot.write(folder, cubins)
    assert sorted(folder.iterdir()) == sorted(written)
    assert written[-1] == folder / aot.INDEX
    assert {cubin.file_name: cubin for cubin in aot.read(folder)} == {cubin.file_name: cubin for cubin in cubins}


def test_the_same_cubins_give_the_same_bytes(tmp_path: Path) -> None:
    cubins = [fake(80), fake(90), fake(90, num_warps=4)]
    first, second = aot.write(tmp_path / "a", cubins), aot.write(tmp_path / "b", [*reversed(cubins), cubins[0]])
    assert [(path.name, path.read_bytes()) for path in first] == [(path.name, path.read_bytes()) for path in second]


def test_constants_keep_their_types(tmp_path: Path) -> None:
    constants = (("A", True), ("B", 1), ("C", 1.0), ("D", "causal"), ("E", False))
    aot.write(tmp_path, [fake(constants=constants)])
    (found,) = aot.read(tmp_path)
    assert repr(found.variant.constants) == repr(constants)


def test_a_write_that_fails_leaves_the_old_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aot.write(tmp_path, [fake()])
    before = (tmp_path / aot.INDEX).read_bytes()

    def full(_file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        aot.write(tmp_path, [fake(80)])
    assert (tmp_path / aot.INDEX).read_bytes() == before
    assert not list(tmp_path.glob(".*"))
    assert aot.read(tmp_path) == [fake()]


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry.pop("arch"), r"entry has .* expected the fields \['arch'"),
        (lambda entry: entry.update(more=1), r"entry has .* expected the fields"),
        (lambda entry: entry.update(arch="90"), "arch is '90', expected int"),
        (lambda entry: entry.update(arch=True), "arch is 'True', expected int"),
        (lambda entry: entry.update(arch=-90), "arch is -90, expected 0 to"),
        (lambda entry: entry.update(shared=2**40), "shared is 1099511627776, expected 0 to"),
        (lambda entry: entry.update(symbol="a b"), "symbol is 'a b', expected what matches"),
        (lambda entry: entry.update(source="0"), "source is '0', expected what matches"),
        (lambda entry: entry.update(file="../other.cubin"), r"file is '../other\.cubin', expected '"),
        (lambda entry: entry.update(file="/etc/passwd"), "file is '/etc/passwd', expected '"),
        (lambda entry: entry.update(sha256="0" * 64), "has another SHA-256"),
        (lambda entry: entry.update(size=3), "has 14 bytes, expected 3"),
        (lambda entry: entry.update(parameters=[8, 8]), r"has parameters of \[8, 8\] bytes"),
        (lambda entry: entry.update(parameters=[8, 8, "4"]), "parameters holds '4', expected int only"),
        (lambda entry: entry["variant"].update(num_warps=4), r"file is '.*', expected '"),
        (lambda entry: entry["variant"].update(kernel=3), "variant.kernel is '3', expected str"),
        (lambda entry: entry["variant"].update(types=["*i64", "*fp4", "i32"]), r"variant.types holds '\*fp4'"),
        (lambda entry: entry["variant"].update(aligned=[1, 1, 0]), "variant.aligned holds '1', expected bool only"),
        (lambda entry: entry["variant"].update(constants=[["BLOCK"]]), "variant.constants holds .*, expected"),
        (lambda entry: entry["variant"].update(constants=[["BLOCK", [1]]]), "BLOCK is .*, expected a number, bool"),
        (lambda entry: entry.update(variant=[]), r"variant is '\[\]', expected dict"),
    ],
)
def test_an_entry_that_is_not_as_written_is_refused(tmp_path: Path, change: Change, message: str) -> None:
    aot.write(tmp_path, [fake(80), fake(90)])
    path = tmp_path / aot.INDEX
    index = json.loads(path.read_text())
    change(index["kernels"][1])
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message) as caught:
        aot.read(tmp_path)
    assert "kernel 1: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "has format list, expected 1"),
        ('{"format": 2, "kernels": []}', "has format 2, expected 1; compile the kernels with this version"),
        ('{"format": 1}', r"has the fields \['format'\], expected format and kernels"),
        ('{"format": 1, "kernels": {}}', "expected format and kernels"),
        ('{"format": 1, "kernels": [3]}', "kernel 0: entry has 3, expected the fields"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / aot.INDEX).write_text(text)
    with pytest.raises(ValueError, match=message):
        aot.read(tmp_path)


def test_files_that_are_missing_linked_or_named_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"kernels\.json is missing, or not a regular file"):
        aot.read(tmp_path)
    aot.write(tmp_path, [fake()])
    path, elsewhere = tmp_path / fake().file_name, tmp_path / "elsewhere"
    path.rename(elsewhere)
    with pytest.raises(ValueError, match=r"\.cubin is missing"):
        aot.read(tmp_path)
    path.symlink_to(elsewhere)
    with pytest.raises(ValueError, match="not a regular file"):
        aot.read(tmp_path)
    path.unlink()
    elsewhere.rename(path)
    index = json.loads((tmp_path / aot.INDEX).read_text())
    (tmp_path / aot.INDEX).write_text(json.dumps({**index, "kernels": index["kernels"] * 2}))
    with pytest.raises(ValueError, match="is named twice"):
        aot.read(tmp_path)
