"""The file of a runtime cache: read, refused, written anew, never in the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from ldmrt.engines.runtime_cache import RuntimeCache, cache_file, folder
from tests.engines.fake_tensorrt import Cuda, IRuntimeCache


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return cache_file(tmp_path, "NVIDIA GeForce RTX 4090", "1.7.1.116", Path("plans/step-r2-abc.plan"))


def filled(file: Path) -> RuntimeCache:
    cache = RuntimeCache(IRuntimeCache(), file)
    cache.native.kernels.append("softmax")
    cache.save()
    return cache


def kernels(file: Path) -> list[str]:
    found: list[str] = RuntimeCache(IRuntimeCache(), file).native.kernels
    return found


@pytest.fixture
def other_driver() -> Iterator[None]:
    before = Cuda.driver
    Cuda.driver = 610
    yield
    Cuda.driver = before


def test_the_folder_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder({"LDMRT_CACHE": "/own", "LDMRT_THREADS": "many"}) == Path("/own/tensorrt")

    def fail() -> NoReturn:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fail)
    assert folder({}) is None


def test_each_gpu_version_and_plan_has_a_file_of_its_own(file: Path, tmp_path: Path) -> None:
    assert file == tmp_path / "nvidia-geforce-rtx-4090-1.7.1.116" / "step-r2-abc.cache"


def test_what_was_kept_is_there_in_the_next_process(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert kernels(file) == []
    filled(file)
    assert kernels(file) == ["softmax"]
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert not caplog.records


def test_what_has_not_changed_is_not_written(file: Path) -> None:
    filled(file)
    before = file.stat().st_ino
    RuntimeCache(IRuntimeCache(), file).save()
    assert file.stat().st_ino == before


@pytest.mark.parametrize("damage", [b"", b"\x00garbage", b'{"gpu": '])
def test_a_damaged_file_is_logged_and_written_over(file: Path, damage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    filled(file)
    file.write_bytes(damage)
    filled(file)
    assert "is damaged, or of another driver" in caplog.text
    assert kernels(file) == ["softmax"]


@pytest.mark.usefixtures("other_driver")
def test_a_file_of_another_driver_is_written_over(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(file)
    Cuda.driver += 1
    filled(file)
    assert "another driver" in caplog.text
    assert kernels(file) == ["softmax"]


def test_what_the_library_cannot_serialize_leaves_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(file)
    cache = RuntimeCache(IRuntimeCache(), file)
    with monkeypatch.context() as patched:
        patched.setattr(IRuntimeCache, "serialize", lambda self: None)
        cache.save()
    assert kernels(file) == ["softmax"]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "taken").write_text("a file", encoding="utf-8")
    filled(tmp_path / "taken" / "step.cache")
    assert "cannot be read" in caplog.text
    assert "cannot be written" in caplog.text
