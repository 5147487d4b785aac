"""The cache of measured choices: what is kept is found again, what does not hold here is not used, and nothing of it is fatal."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from ldmrt import choices, pipeline
from ldmrt.choices import OPERATORS, Entry, Machine
from ldmrt.kernels import cuda_driver, geglu, launch, ops, tuning
from ldmrt.kernels.configurations import ATTENTION, Problem
from ldmrt.pipeline import Pipeline

F16 = torch.float16
MACHINE = Machine(
    gpu="NVIDIA GeForce RTX 4090",
    capability=89,
    driver="570.86.15",
    torch="2.13.0",
    triton="3.7.1",
    kernels={"attention": "a" * 64, "geglu": "b" * 64},
)
PROBLEM = Problem(40, 8, 4096, 4096, F16)
GEGLU = geglu.Problem(8192, 1280, F16)


@pytest.fixture(autouse=True)
def _nothing_chosen() -> Iterator[None]:
    tuning.clear()
    yield
    tuning.clear()


def attention_entry(number: int = 1, **changes: Any) -> Entry:
    choice = ATTENTION.candidates(89, PROBLEM)[number]
    return choices.entry("attention", PROBLEM, choice, 1.25e-4, 1e-4).model_copy(update=changes)


def geglu_entry(number: int = 1) -> Entry:
    return choices.entry("geglu", GEGLU, geglu.OPERATOR.candidates(89, GEGLU)[number], None, 2e-5)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A file with a choice for attention and one for geglu."""
    return choices.keep(tmp_path / "kernels", MACHINE, [attention_entry(), geglu_entry()])


def warned(kept: Path, caplog: pytest.LogCaptureFixture, machine: Machine = MACHINE) -> str:
    """The one line of `load`, which takes nothing then."""
    caplog.clear()
    assert choices.load(kept.parent, machine) == 0
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    message = record.getMessage()
    assert "\n" not in message
    assert message.startswith(f"{kept} is not used, ")
    assert "run `ldmrt tune` again" in message
    assert ATTENTION.choose(89, PROBLEM) == ATTENTION.candidates(89, PROBLEM)[0]
    assert geglu.OPERATOR.choose(89, GEGLU) == geglu.OPERATOR.candidates(89, GEGLU)[0]
    return message


def test_every_operator_with_a_choice_is_kept() -> None:
    # A linear layer has none: on a GPU it is the library's.
    assert {f"ldmrt.{name}.default" for name in OPERATORS} | {"ldmrt.linear.default"} == set(ops.OPERATORS)


def test_what_is_kept_counts_again(kept: Path) -> None:
    assert kept.name == "nvidia-geforce-rtx-4090.json"
    assert choices.read(kept, MACHINE) == [attention_entry(), geglu_entry()]
    assert choices.load(kept.parent, MACHINE) == 2
    assert ATTENTION.choose(89, PROBLEM) == ATTENTION.candidates(89, PROBLEM)[1]
    assert geglu.OPERATOR.choose(89, GEGLU) == geglu.OPERATOR.candidates(89, GEGLU)[1]
    # Of another architecture nothing was measured.
    assert geglu.OPERATOR.choose(90, GEGLU) == geglu.OPERATOR.candidates(90, GEGLU)[0]


def test_a_choice_reaches_the_launch(kept: Path) -> None:
    x = torch.empty(2, 4096, 2560, dtype=F16, device="meta")
    with launch.recording(89) as before:
        geglu.geglu(x)
    choices.load(kept.parent, MACHINE)
    with launch.recording(89) as after:
        geglu.geglu(x)
    (was,), (now,) = before, after
    expected = geglu.OPERATOR.candidates(89, GEGLU)[1]
    assert dict(now.constants)["ROWS"] == expected.rows != dict(was.constants)["ROWS"]


@pytest.mark.parametrize("name", OPERATORS)
def test_every_candidate_can_be_kept(name: str, tmp_path: Path) -> None:
    problems: dict[str, Any] = {
        "attention": PROBLEM,
        "geglu": GEGLU,
        "group_norm_silu": OPERATORS["group_norm_silu"].problem(2, 320, 32, 4096, torch.bfloat16, True),
        "add_layer_norm": OPERATORS["add_layer_norm"].problem(8192, 320, torch.float32),
        "add_group_norm_silu": OPERATORS["add_group_norm_silu"].problem(2, 960, 32, 4096, 640, False, F16, True),
        "add_upsample": OPERATORS["add_upsample"].problem(8192, 640, 2, F16),
        "conv2d": OPERATORS["conv2d"].problem(2, 1280, 1280, 8, 8, 3, 1, F16),
        "linear_geglu": OPERATORS["linear_geglu"].problem(8192, 320, 1280, F16),
    }
    problem, operator = problems[name], OPERATORS[name]
    for choice in operator.candidates(89, problem):
        choices.keep(tmp_path, MACHINE, [choices.entry(name, problem, choice, 1e-5, 1e-5)])
        tuning.clear()
        assert choices.load(tmp_path, MACHINE) == 1
        assert operator.choose(89, problem) == choice


def test_no_file_is_no_matter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert choices.load(tmp_path / "nowhere", MACHINE) == 0
    assert caplog.records == []


def test_another_bundle_s_choices_are_added(kept: Path) -> None:
    other = choices.entry("geglu", geglu.Problem(64, 256, F16), geglu.OPERATOR.candidates(89, GEGLU)[0], 1e-5, 1e-5)
    later = attention_entry(2)
    choices.keep(kept.parent, MACHINE, [later, other])
    found = choices.read(kept, MACHINE)
    assert sorted(found, key=repr) == sorted([later, geglu_entry(), other], key=repr)
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"capability": 90}, "measured with capability 89, and this is 90"),
    ({"driver": "580.1"}, "measured with driver 570.86.15, and this is 580.1"),
    ({"torch": "2.14.0"}, "measured with torch 2.13.0, and this is 2.14.0"),
    ({"triton": None}, "measured with triton 3.7.1, and this is None"),
    ({"kernels": {**MACHINE.kernels, "geglu": "c" * 64}}, "measured with other sources"),
    ({"gpu": "NVIDIA GeForce RTX-4090"}, "measured with gpu NVIDIA GeForce RTX 4090, and this is"),
]


@pytest.mark.parametrize(("changes", "words"), CHANGES, ids=[next(iter(changes)) for changes, _ in CHANGES])
def test_what_was_measured_on_something_else_is_not_used_and_replaced(
    kept: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], words: str
) -> None:
    other = MACHINE.model_copy(update=changes)
    assert words in warned(kept, caplog, other)
    choices.keep(kept.parent, other, [geglu_entry()])
    assert choices.read(kept, other) == [geglu_entry()]


def _without(field: str) -> Callable[[dict[str, Any]], object]:
    return lambda data: data.pop(field)


def _in_entry(field: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda data: data["entries"][0].update({field: value})


def _in_problem(**values: object) -> Callable[[dict[str, Any]], object]:
    return lambda data: data["entries"][0]["problem"].update(values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(_without("machine"), "damaged (machine: ", id="no machine"),
        pytest.param(lambda data: data.update(format=2), "format 2, expected 1", id="format"),
        pytest.param(lambda data: data.update(more=1), "damaged (more: ", id="field too many"),
        pytest.param(_in_entry("us", "fast"), "damaged (entries.0.us: ", id="time"),
        pytest.param(_in_entry("us", -1.0), "damaged (entries.0.us: ", id="negative time"),
        pytest.param(_in_entry("operator", "conv"), "no operator 'conv'", id="operator"),
        pytest.param(_in_entry("choice", {"body": "triton"}), "attention has no choice", id="choice"),
        pytest.param(_in_problem(heads=0), "heads is '0'", id="no heads"),
        pytest.param(_in_problem(heads=True), "heads is 'True'", id="truth value for a number"),
        pytest.param(_in_problem(heads="8"), "heads is '8'", id="text for a number"),
        pytest.param(_in_problem(heads=2**40), "heads is", id="huge number"),
        pytest.param(_in_problem(dtype="float8"), "dtype is 'float8'", id="dtype"),
        pytest.param(_in_problem(head_size=513), "head size 513", id="no such problem"),
        pytest.param(_in_problem(more=1), "has the fields", id="problem of other fields"),
    ],
)
def test_a_file_that_says_something_else(
    kept: Path, caplog: pytest.LogCaptureFixture, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    data = json.loads(kept.read_text())
    change(data)
    kept.write_text(json.dumps(data))
    assert words in warned(kept, caplog)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00", b"[]", b"null", b"{}", b"[" * 100000, b'{"format": NaN}'], ids=repr
)
def test_a_file_that_is_no_such_file(kept: Path, caplog: pytest.LogCaptureFixture, content: bytes) -> None:
    kept.write_bytes(content)
    assert "damaged" in warned(kept, caplog)
    choices.keep(kept.parent, MACHINE, [geglu_entry()])
    assert choices.load(kept.parent, MACHINE) == 1


def test_a_file_that_is_cut_off_anywhere(kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = kept.read_bytes()
    for length in range(0, len(content) - 2, 97):
        kept.write_bytes(content[:length])
        warned(kept, caplog)


def test_a_file_that_is_too_large(
    kept: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "_LARGEST", 100)
    assert "expected at most 100" in warned(kept, caplog)


def test_a_folder_in_its_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = choices.file(tmp_path, MACHINE)
    path.mkdir()
    assert "not a regular file" in warned(path, caplog)


def test_what_cannot_be_written_leaves_what_was_there(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = kept.read_bytes()

    def fail(_descriptor: int) -> NoReturn:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        choices.keep(kept.parent, MACHINE, [attention_entry(2)])
    assert kept.read_bytes() == content
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"LDMRT_CACHE": "/cache"}, "/cache/kernels"),
        ({"XDG_CACHE_HOME": "/xdg", "LDMRT_THREADS": "many"}, "/xdg/ldmrt/kernels"),
        ({"HOME": "/home/a"}, "/home/a/.cache/ldmrt/kernels"),
    ],
)
def test_where_the_files_lie(environ: dict[str, str], expected: str) -> None:
    assert choices.folder(environ) == Path(expected)


# ---------------------------------------------------------------------------------------------------- a GPU's


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> torch.device:
    """A GPU as far as names and versions go."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: MACHINE.gpu)
    monkeypatch.setattr(launch, "architecture", lambda device: 89)
    monkeypatch.setenv("LDMRT_CACHE", str(tmp_path))
    monkeypatch.delenv(launch.VARIABLE, raising=False)
    return torch.device("cuda", 0)


def test_a_machine_is_known_by_what_decides_on_speed(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    found = choices.machine_with(gpu)
    assert (found.gpu, found.capability, found.torch) == (MACHINE.gpu, 89, torch.__version__)
    assert set(found.kernels) == set(OPERATORS)
    # Two operators are the same kernels.
    assert found.kernels["add_group_norm_silu"] == found.kernels["group_norm_silu"]
    assert len(set(found.kernels.values())) == len(OPERATORS) - 1
    monkeypatch.setenv(launch.VARIABLE, "cubin")
    assert choices.machine_with(gpu).triton is None


def test_a_driver_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> NoReturn:
        raise cuda_driver.CudaError("libcuda.so.1 cannot be loaded")

    monkeypatch.setattr(cuda_driver, "driver", fail)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "")
    assert choices._driver_version() == "unknown"
    text = (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 03:39:45 UTC 2025\nGCC version: 13.2.0"
    )
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
    assert choices._driver_version() == "570.86.15"


def test_a_pipeline_on_a_gpu_takes_the_choices(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    choices.keep(choices.folder(os.environ), choices.machine_with(gpu), [geglu_entry()])
    monkeypatch.setattr(pipeline, "device_of", torch.device)

    def stop(*_: object, **__: object) -> NoReturn:
        raise InterruptedError

    monkeypatch.setattr(pipeline, "EngineLoader", stop)
    for device, number in (("cpu", 0), ("cuda:0", 1)):
        with pytest.raises(InterruptedError):
            Pipeline.from_bundle(device=device)
        assert geglu.OPERATOR.choose(89, GEGLU) == geglu.OPERATOR.candidates(89, GEGLU)[number]


def test_where_kernels_are_switched_off_nothing_is_read(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = choices.keep(choices.folder(os.environ), choices.machine_with(gpu), [geglu_entry()])
    path.write_text("damaged")
    monkeypatch.setenv(launch.VARIABLE, "reference")
    choices.apply(gpu)
    assert caplog.records == []


def test_without_a_home_there_is_no_cache(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> NoReturn:
        raise RuntimeError("Could not determine home directory.")

    for name in ("LDMRT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", fail)
    choices.apply(gpu)
    assert geglu.OPERATOR.choose(89, GEGLU) == geglu.OPERATOR.candidates(89, GEGLU)[0]
