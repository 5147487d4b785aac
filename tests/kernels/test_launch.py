"""Which way a launch takes, with a driver that stands in for a GPU's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, strategies

from ldmrt.kernels import aot, cuda_driver, launch
from ldmrt.kernels.sampler import advance, advance_reference
from ldmrt.kernels.variant import Variant, source_hash

CUDA = torch.device("cuda", 0)
ROWS = [torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)]


def make_cubin(arch: int, source: str | None = None, **change: Any) -> aot.Cubin:
    """As if compiled for sampler.advance on `ROWS`."""
    variant = replace(Variant.of("sampler.advance", [*ROWS, 8], {"BLOCK": 128}, 1, 1), **change)
    return aot.Cubin(
        variant=variant,
        arch=arch,
        triton="3.7.1",
        source=source or source_hash(variant.kernel),
        symbol="advance",
        threads=32,
        shared=0,
        parameters=(8, 8, 4, 8, 8),
        registers=20,
        stack=0,
        code=f"code for {arch}".encode(),
    )


class Gpu:
    """A device of an architecture: what was loaded into it and launched on it."""

    def __init__(self) -> None:
        self.loaded: list[tuple[bytes, str, int]] = []
        self.dependent: list[bool] = []
        self.launches: list[tuple[tuple[int, int, int], list[int | float], int]] = []

    def ensure_context(self, device: int) -> None:
        assert device == 0

    def kernel(
        self,
        driver: Any,
        code: bytes,
        symbol: str,
        types: Any,
        hidden: int,
        threads: int,
        shared: int,
        *,
        dependent: bool,
    ) -> SimpleNamespace:
        self.loaded.append((code, symbol, hidden))
        self.dependent.append(dependent)
        return SimpleNamespace(launch=lambda *arguments: self.launches.append(arguments))


Make = Callable[..., Gpu]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Make:
    """Puts a device of an architecture, with an environment, in the place of this machine's."""

    def make(arch: int, **environ: str) -> Gpu:
        device = Gpu()
        monkeypatch.setattr(launch, "_store", launch._Store())
        monkeypatch.setattr(launch, "_choice", lambda: launch.choose(environ))
        monkeypatch.setattr(launch, "_capability", lambda index: arch)
        monkeypatch.setattr(cuda_driver, "driver", lambda: device)
        monkeypatch.setattr(cuda_driver, "Kernel", device.kernel)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
        monkeypatch.setattr(
            aot, "compile_variant", lambda variant, arch: replace(make_cubin(arch), code=b"compiled here")
        )
        return device

    return make


def launch_advance() -> None:
    launch._launch(CUDA, "sampler.advance", (1,), [*ROWS, 8], {"BLOCK": 128}, 1, 1, fp_fusion=True)


def add(*cubins: aot.Cubin) -> None:
    launch._store.add(cubins)


def test_a_cubin_is_loaded_once_and_launched_on_the_current_stream(gpu: Make) -> None:
    device = gpu(89)
    add(make_cubin(89))
    for _ in range(3):
        launch_advance()
    assert device.loaded == [(b"code for 89", "advance", 2)]
    assert device.launches == [((1, 1, 1), [ROWS[0].data_ptr(), ROWS[1].data_ptr(), 8], 77)] * 3


@pytest.mark.parametrize(("arch", "dependent"), [(89, False), (90, True), (120, True)])
def test_from_hopper_on_a_kernel_may_come_before_the_last_has_ended(
    gpu: Make, arch: int, dependent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = gpu(arch, LDMRT_KERNELS="triton")
    asked = []

    def compile_variant(variant: Variant, arch: int) -> aot.Cubin:
        asked.append(dict(variant.constants)["DEPENDENT"])
        return make_cubin(arch)

    monkeypatch.setattr(aot, "compile_variant", compile_variant)
    rows = [torch.empty(8, dtype=torch.int64, device="meta") for _ in range(2)]
    with launch.recording(arch) as variants:
        launch.run("sampler.advance", (1,), [*rows, 8], {"BLOCK": 128}, num_warps=1)
    assert [dict(variant.constants)["DEPENDENT"] for variant in variants] == [dependent]
    constants = {"BLOCK": 128, "DEPENDENT": launch.dependent(arch)}
    launch._launch(CUDA, "sampler.advance", (1,), [*ROWS, 8], constants, 1, 1, fp_fusion=True)
    assert (asked, device.dependent) == ([dependent], [dependent])
    monkeypatch.setenv("LDMRT_PDL", "0")
    launch._launch(CUDA, "sampler.advance", (1,), [*ROWS, 8], constants, 1, 2, fp_fusion=True)
    assert device.dependent[1:] == [False]


@pytest.mark.parametrize(
    ("arch", "compiled", "taken"),
    [
        (89, (80, 86, 89, 90), b"code for 89"),
        (89, (80, 86, 90), b"code for 86"),
        (86, (80, 89), b"code for 80"),
        (80, (86, 89), None),
        (90, (80, 89), None),
        (103, (100,), None),  # sm_100a is for that one architecture
        (121, (120,), None),
        (100, (90,), None),
    ],
)
def test_architectures(gpu: Make, arch: int, compiled: tuple[int, ...], taken: bytes | None) -> None:
    device = gpu(arch, LDMRT_KERNELS="cubin")
    add(*(make_cubin(other) for other in compiled))
    assert launch.ready(CUDA) == (taken is not None)
    if taken is None:
        with pytest.raises(RuntimeError, match=rf"no kernel is compiled for sampler\.advance .* on sm_{arch}"):
            launch_advance()
    else:
        launch_advance()
    assert [code for code, _, _ in device.loaded] == [taken] * (taken is not None)


@pytest.mark.parametrize(
    ("choice", "registered", "taken"),
    [
        ("auto", True, b"code for 90"),
        ("auto", False, b"compiled here"),
        ("cubin", True, b"code for 90"),
        ("triton", True, b"compiled here"),
    ],
)
def test_the_variable_chooses(gpu: Make, choice: str, registered: bool, taken: bytes) -> None:
    pytest.importorskip("triton")
    device = gpu(90, LDMRT_KERNELS=choice)
    add(*[make_cubin(90)] * registered)
    assert launch.ready(CUDA)
    launch_advance()
    assert device.loaded[0][0] == taken


@pytest.mark.parametrize(
    "environ", [{"LDMRT_KERNELS": "reference"}, {"LDMRT_KERNELS": " Reference "}, {"LDMRT_KERNELS": "fast"}]
)
def test_the_reference_is_chosen_for_a_stated_reason(gpu: Make, environ: dict[str, str]) -> None:
    gpu(90, **environ)
    add(make_cubin(90))
    assert not launch.ready(CUDA)
    assert environ["LDMRT_KERNELS"] in launch.describe(CUDA)


def test_without_triton(gpu: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    gpu(89)
    assert not launch.ready(CUDA)
    assert "no kernel compiled for sm_89 is registered" in launch.describe(CUDA)
    add(make_cubin(86))
    assert launch.ready(CUDA)
    assert launch.describe(CUDA) == "1 compiled kernels for sm_89"
    gpu(89, LDMRT_KERNELS="triton")
    assert not launch.ready(CUDA)
    assert "LDMRT_KERNELS=triton, and Triton is not installed" in launch.describe(CUDA)


@pytest.mark.parametrize("change", [{"num_warps": 2}, {"fp_fusion": False}, {"constants": (("BLOCK", 64),)}])
def test_a_cubin_of_another_variant_or_source_is_not_taken(gpu: Make, change: dict[str, Any]) -> None:
    gpu(90, LDMRT_KERNELS="cubin")
    add(make_cubin(90, **change), make_cubin(90, source="0" * 64))
    with pytest.raises(RuntimeError, match="set LDMRT_KERNELS=reference"):
        launch_advance()


def test_register_takes_a_folder_whole_or_not_at_all(gpu: Make, tmp_path: Path) -> None:
    gpu(89, LDMRT_KERNELS="cubin")
    aot.write(tmp_path, [make_cubin(86), make_cubin(90), make_cubin(90, num_warps=4)])
    (tmp_path / make_cubin(90).file_name).write_bytes(b"other")
    with pytest.raises(ValueError, match="expected 11"):
        launch.register(tmp_path)
    assert not launch.ready(CUDA)
    aot.write(tmp_path, [make_cubin(86), make_cubin(90), make_cubin(90, num_warps=4)])
    assert launch.register(tmp_path) == 2
    assert launch.describe(CUDA) == "1 compiled kernels for sm_89"
    launch_advance()


def test_another_device_is_made_current_for_the_launch(gpu: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(90)
    before: list[torch.device] = []

    class Guard:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            before.append(self.device)

        def __exit__(self, *error: object) -> None:
            before.clear()

    launched: list[list[torch.device]] = []
    monkeypatch.setattr(launch, "_launch", lambda *_args, **_kwargs: launched.append(list(before)))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    for index in (0, 1):
        launch._on_gpu(torch.device("cuda", index), "sampler.advance", (1,), [*ROWS, 8], {}, 1, 1, fp_fusion=True)
    assert launched == [[], [torch.device("cuda", 1)]]


def test_an_empty_grid_launches_nothing(gpu: Make) -> None:
    device = gpu(90)
    launch._on_gpu(CUDA, "sampler.advance", (0,), [*ROWS, 8], {"BLOCK": 128}, 1, 1, fp_fusion=True)
    assert not device.launches


ARGUMENTS = strategies.one_of(
    strategies.integers(-(2**40), 2**40),
    strategies.sampled_from([0, 16, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1]),
    strategies.floats(width=32),
    strategies.builds(
        lambda dtype, first: torch.zeros(32, dtype=dtype)[first:],
        strategies.sampled_from([torch.float16, torch.float32, torch.int64]),
        strategies.integers(0, 9),
    ),
)


@given(strategies.lists(ARGUMENTS, min_size=1, max_size=2), strategies.lists(ARGUMENTS, min_size=1, max_size=2))
def test_the_quick_key_tells_apart_exactly_what_variants_do(first: list[Any], second: list[Any]) -> None:
    same = Variant.of("file.kernel", first, {}, 4, 2) == Variant.of("file.kernel", second, {}, 4, 2)
    assert (launch._values_and_kinds(first)[1] == launch._values_and_kinds(second)[1]) == same


def test_recording_collects_each_variant_once_and_launches_nothing() -> None:
    row = torch.empty(4, dtype=torch.int64, device="meta")
    assert not launch.ready(row.device)
    with launch.recording(86) as variants:
        assert launch.ready(row.device)
        assert launch.architecture(row.device) == 86
        with launch.recording(100) as inner:
            assert launch.architecture(row.device) == 100
        for _ in range(2):
            advance(row, row)
    assert [variant.kernel for variant in variants] == ["sampler.advance"]
    assert not inner
    assert not launch.ready(row.device)


def test_tracing_keeps_each_launch_with_its_arguments() -> None:
    row, last = (torch.empty(4, dtype=torch.int64, device="meta") for _ in range(2))
    with launch.tracing(86) as outer:
        advance(row, last)
        with launch.tracing(100) as inner:
            advance(last, row)
        with launch.recording(90):
            advance(row, last)
    assert [[tensor is row for tensor in each.arguments[:2]] for each in outer] == [[True, False]] * 2
    assert [[tensor is row for tensor in each.arguments[:2]] for each in inner] == [[False, True]]
    assert (outer[0].grid, outer[0].arguments[2:]) == ((1,), (4,))
    assert not dict(outer[0].variant.constants)["DEPENDENT"]
    assert dict(inner[0].variant.constants)["DEPENDENT"]
    with launch.recording(86):
        advance(row, last)
    assert len(outer) == 2
    assert not launch.ready(row.device)


def test_a_cpu_is_never_ready() -> None:
    assert not launch.ready(torch.device("cpu"))
    assert "cpu" in launch.describe(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("slots", [1, 16, 300])
def test_a_compiled_kernel_runs_on_this_machines_gpu(
    tmp_path: Path, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled, written, read, registered, loaded and launched, on a stream of its own and then from a CUDA graph."""
    row, last = torch.arange(slots, device="cuda"), torch.full((slots,), slots // 2, device="cuda")
    expected = row.clone()
    for _ in range(3):
        advance_reference(expected, last)
    with launch.recording(launch.architecture(row.device)) as variants:
        advance(row.to("meta"), last.to("meta"))
    aot.write(tmp_path, aot.compile_all(list(variants), [launch.architecture(row.device)]))
    monkeypatch.setattr(launch, "_store", launch._Store())
    monkeypatch.setattr(launch, "_choice", lambda: launch.choose({"LDMRT_KERNELS": "cubin"}))
    launch.register(tmp_path)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        advance(row, last)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        advance(row, last)
    graph.replay()
    graph.replay()
    assert row.tolist() == expected.tolist()
