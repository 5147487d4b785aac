"""What the doctor says, against pyproject.toml and against what is known here."""

from __future__ import annotations

import importlib.metadata
import json
import re
import tomllib
from pathlib import Path

import pytest
import torch

from ldmrt import doctor
from ldmrt.manifest import EngineRecord

CPUINFO = "processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu avx2 avx512f avx512_bf16x\n\nprocessor\t: 1\n"


def test_extras_are_those_of_pyproject() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {
        name: tuple(re.split(r"[<>=!~\[; ]", package)[0] for package in packages if not package.startswith("ldmrt["))
        for name, packages in project["optional-dependencies"].items()
        if name != "all-cpu"  # names the others
    }
    assert declared == doctor.EXTRAS


def test_every_engine_kind_is_judged() -> None:
    pattern = EngineRecord.model_json_schema()["properties"]["kind"]["pattern"]
    assert pattern == f"^({'|'.join(doctor.engine_kinds())})$"


def test_the_document() -> None:
    found = doctor.examine()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["torch"]["version"] == torch.__version__
    assert found["torch"]["threads"] == torch.get_num_threads()
    assert found["engines"]["torch"] is None
    assert (found["cuda"]["missing"] is None) == torch.cuda.is_available()
    assert len(found["cuda"]["gpus"]) == torch.cuda.device_count()
    assert 0 < found["memory"]["available"] <= found["memory"]["total"]
    assert 0 < found["disk"]["free"] <= found["disk"]["total"]
    assert found["cpu"]["cores"] >= 1


def test_features_are_whole_words() -> None:
    assert doctor.cpu_features(CPUINFO) == {"avx2": True, "avx512f": True, "avx512_bf16": False, "amx_bf16": False}
    assert not any(doctor.cpu_features("").values())


def test_the_bfloat16_flag_agrees_with_torch() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        pytest.skip("no /proc/cpuinfo")
    assert doctor.cpu_features(cpuinfo.read_text())["avx512_bf16"] == torch.cpu._is_avx512_bf16_supported()


def test_a_missing_package_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "onnx":
            raise importlib.metadata.PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = doctor.packages("export")
    assert found["missing"] == ["onnx"]
    assert "diffusers" in found["present"]
    assert found["install"] == "pip install 'ldmrt[export]'"


def test_an_absent_engine_library_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'ldmrt[onnxruntime]'" in str(doctor.engine_kinds()["onnxruntime"])


def test_no_torch_is_reported_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_torch", lambda: {"version": None, "threads": 0, "missing": "torch is not there"})
    found = doctor.examine()
    assert found["engines"]["torch"] == "torch is not there"
    assert found["native"]["missing"] == found["cuda"]["missing"] == "torch is missing"
