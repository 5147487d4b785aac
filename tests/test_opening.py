"""Which bundle, device and engine kind a pipeline is opened with."""

from __future__ import annotations

import pytest
import torch

from ldmrt.bundle import Bundle
from ldmrt.errors import BadRequest, EngineMismatch
from ldmrt.manifest import MANIFEST
from ldmrt.opening import builtin_bundle, device_of, first_that_loads


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle of three engine kinds."""
    monkeypatch.setattr("ldmrt.opening.kinds_of", lambda bundle: ["tensorrt", "torch", "onnxruntime"])
    return Bundle.open(builtin_bundle())


class Loads:
    """Opens on some kinds, and writes down those that it was asked for."""

    def __init__(self, *kinds: str) -> None:
        self.kinds = kinds
        self.asked: list[str | None] = []

    def __call__(self, kind: str | None) -> str:
        self.asked.append(kind)
        if kind not in self.kinds:
            raise EngineMismatch(f"no {kind} here")
        return f"on {kind}"


def test_the_builtin_bundle_is_there() -> None:
    assert (builtin_bundle() / MANIFEST).is_file()


def test_devices() -> None:
    assert device_of("cpu") == device_of(torch.device("cpu")) == torch.device("cpu")
    assert device_of(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("cuda:99", "tpu"):
        with pytest.raises(BadRequest) as caught:
            device_of(name)
        assert caught.value.param == "device"


def test_the_first_that_can_run_does(three: Bundle) -> None:
    loads = Loads("tensorrt", "torch")
    assert first_that_loads(loads, three, None) == "on tensorrt"
    assert loads.asked == ["tensorrt"]


def test_another_takes_its_place_and_it_is_said(three: Bundle) -> None:
    loads = Loads("onnxruntime")
    with pytest.warns(UserWarning, match="runs instead of") as said:
        assert first_that_loads(loads, three, None) == "on onnxruntime"
    assert loads.asked == ["tensorrt", "torch", "onnxruntime"]
    assert [str(one.message) for one in said] == [
        "torch runs instead of tensorrt, which cannot: no tensorrt here",
        "onnxruntime runs instead of torch, which cannot: no torch here",
    ]


def test_only_those_behind_the_one_that_was_asked_for(three: Bundle) -> None:
    loads = Loads("tensorrt")
    with pytest.warns(UserWarning, match="runs instead of"), pytest.raises(EngineMismatch, match="no onnxruntime here"):
        first_that_loads(loads, three, "torch")
    assert loads.asked == ["torch", "onnxruntime"]


def test_one_that_the_bundle_has_not(three: Bundle) -> None:
    loads = Loads("torch")
    with pytest.warns(UserWarning, match="torch runs instead of|tensorrt runs instead of"):
        assert first_that_loads(loads, three, "tensorrt-rtx") == "on torch"
    assert loads.asked[0] == "tensorrt-rtx"
