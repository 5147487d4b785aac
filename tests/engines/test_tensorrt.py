"""The two TensorRT libraries: how they are found, what they log, which plans run here; and that the tests' fake is like the real one."""

from __future__ import annotations

import importlib
import inspect
import logging
from enum import Enum

import pytest

from ldmrt.engines.tensorrt import LIBRARIES, Library, check, log, runtime
from ldmrt.errors import EngineMismatch
from tests.engines import fake_tensorrt
from tests.engines.tensorrt_gpu import FAKE, RTX, TENSORRT

LABEL = "step (tensorrt-rtx, float16, 512x512, 2 rows)"
BUILT = {"tensorrt-rtx": fake_tensorrt.__version__, "onnx": "1.21"}


def library(*modules: str, least: tuple[int, int] = (1, 4)) -> Library:
    return Library("tensorrt-rtx", modules, "tensorrt-rtx", least, None, compiles_at_run_time=True)


def test_the_first_module_that_is_there_is_loaded() -> None:
    assert library("no_such_module", *FAKE).load() is fake_tensorrt


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (library("no_such_module"), "needs no_such_module, which is not installed: pip install 'ldmrt.tensorrt-rtx.'"),
        (library(*FAKE, least=(1, 8)), r"needs .*fake_tensorrt 1\.8 or later, 1\.7\.1\.116 is installed"),
    ],
)
def test_a_library_that_cannot_be_used(missing: Library, message: str) -> None:
    for use in (Library.load, log, runtime):
        with pytest.raises(EngineMismatch, match=message):
            use(missing)


def test_one_runtime_and_one_logger_in_a_process() -> None:
    before = fake_tensorrt.Runtime.count
    alone = library(*FAKE, least=(1, 0))  # not used by other tests
    assert runtime(alone) is runtime(alone)
    assert log(alone) is log(library(*FAKE, least=(1, 0)))
    assert runtime(alone)._logger is log(alone)
    assert fake_tensorrt.Runtime.count == before + 1


def test_the_library_logs_through_logging(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(1, "ldmrt.tensorrt")
    severities = fake_tensorrt.ILogger.Severity
    log(RTX).first_error()
    for severity in severities:
        log(RTX).log(severity, f"100 %\n{severity.name}")
    assert [(r.name, r.levelno, r.getMessage()) for r in caplog.records] == [
        ("ldmrt.tensorrt", level, f"100 %\n{severity.name}")
        for severity, level in zip(
            severities, (logging.ERROR, logging.ERROR, logging.WARNING, logging.DEBUG, logging.DEBUG - 5), strict=True
        )
    ]
    assert log(RTX).first_error() == "100 % INTERNAL_ERROR"
    assert log(RTX).first_error() == ""


def test_a_plan_for_this_gpu_and_this_version() -> None:
    check(LABEL, RTX, ("sm_86", "sm_89"), BUILT, "sm_89")


@pytest.mark.parametrize(
    ("which", "versions", "architecture", "message"),
    [
        (RTX, BUILT, None, "was built for GPUs (sm_86), the device is a CPU: use --engine torch"),
        (RTX, BUILT, "sm_89", "built for sm_86, the GPU here is sm_89: build it again"),
        (RTX, BUILT, "sm_89", "with `ldmrt build-engines MODEL --out DIR --engine tensorrt-rtx --target sm_89`"),
        (TENSORRT, BUILT, "sm_90", "with `ldmrt build-engines MODEL --out DIR --engine tensorrt --target sm_90`"),
        (RTX, BUILT, "sm_90", "built for sm_86, the GPU here is sm_90: use --engine torch"),
        (RTX, {"tensorrt-rtx": "1.6.0.1"}, "sm_86", "built with tensorrt-rtx 1.6.0.1, 1.7.1.116 is installed"),
        (RTX, {}, "sm_86", "built with tensorrt-rtx unknown, 1.7.1.116 is installed"),
    ],
)
def test_a_plan_that_cannot_run_here(
    which: Library, versions: dict[str, str], architecture: str | None, message: str
) -> None:
    with pytest.raises(EngineMismatch) as caught:
        check(LABEL, which, ("sm_86",), versions, architecture)
    assert str(caught.value).startswith(LABEL)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.rtx
def test_the_fake_has_no_name_that_the_library_lacks() -> None:
    real = importlib.import_module("tensorrt_rtx_bindings")
    ours = {
        name: kind
        for name, kind in vars(fake_tensorrt).items()
        if inspect.isclass(kind) and kind.__module__ == fake_tensorrt.__name__ and kind is not fake_tensorrt.Cuda
    }
    assert len(ours) > 10
    for name, kind in ours.items():
        own = set(kind.__members__) if issubclass(kind, Enum) else {item for item in vars(kind) if item[0] != "_"}
        lacking = {item for item in own if not hasattr(getattr(real, name), item)}
        assert lacking <= ({"count"} if name == "Runtime" else set()), name
    for name, flag in fake_tensorrt.EngineInvalidityDiagnostics.__members__.items():
        assert int(real.EngineInvalidityDiagnostics.__members__[name]) == flag
    assert [severity.name for severity in fake_tensorrt.ILogger.Severity] == list(real.ILogger.Severity.__members__)


@pytest.mark.rtx
def test_the_library_takes_our_logger() -> None:
    rtx = LIBRARIES["tensorrt-rtx"]
    assert runtime(rtx).logger is log(rtx)
