"""Weight files against the safetensors library, and what is refused before anything is mapped."""

from __future__ import annotations

import hashlib
import json
import mmap
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from ldmrt.engines.protocol import TensorSpec
from ldmrt.errors import BundleError
from ldmrt.weights import DTYPES, MAX_HEADER_BYTES, WeightFile, read_header, sha256, write


def tensors() -> dict[str, torch.Tensor]:
    """Every dtype, odd sizes that push their followers off alignment, a scalar, and empty ones."""
    generator = torch.Generator().manual_seed(0)
    made = {"odd": torch.tensor([1, 2, 3], dtype=torch.uint8)}
    for name, dtype in DTYPES.items():
        made[f"of.{name}"] = torch.randint(0, 2, (3, 5), generator=generator).to(dtype)
    made["scalar"] = torch.tensor(2.5)
    made["empty"] = torch.zeros(0, 7)
    made["last.empty"] = torch.zeros(4, 0, dtype=torch.int64)
    made["columns"] = torch.randn(4, 6, generator=generator).T
    return made


def save(path: Path, values: dict[str, torch.Tensor]) -> str:
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in values.items()]
    return write(path, specs, values.__getitem__)


def assert_same(found: Any, expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    digest = save(path, tensors())
    assert digest == sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert_same(WeightFile(path), tensors())
    assert list(WeightFile(path)) == list(tensors())
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_misaligned_tensors_are_there_and_right(tmp_path: Path) -> None:
    save(tmp_path / "w", tensors())
    entries, _ = read_header(tmp_path / "w")
    assert any(entry.offset % entry.dtype.itemsize for entry in entries.values())
    for tensor in WeightFile(tmp_path / "w").values():
        assert tensor.data_ptr() % tensor.element_size() == 0


def test_the_library_reads_ours(tmp_path: Path) -> None:
    save(tmp_path / "w", tensors())
    assert_same(safetensors.torch.load_file(tmp_path / "w"), tensors())


def test_we_read_the_librarys(tmp_path: Path) -> None:
    values = {name: tensor.contiguous() for name, tensor in tensors().items()}
    safetensors.torch.save_file(values, tmp_path / "w", metadata={"format": "pt"})
    file = WeightFile(tmp_path / "w")
    assert_same(file, tensors())
    assert file.metadata == {"format": "pt"}


def test_same_tensors_same_bytes(tmp_path: Path) -> None:
    assert save(tmp_path / "a", tensors()) == save(tmp_path / "b", tensors())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_without_tensors(tmp_path: Path) -> None:
    save(tmp_path / "w", {})
    assert dict(WeightFile(tmp_path / "w")) == {}


def test_tensors_share_the_mapping_and_never_write_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "w"
    save(path, {"a": torch.arange(100.0), "b": torch.arange(7)})
    before = path.read_bytes()
    file = WeightFile(path)
    assert file["a"].data_ptr() == file["a"].data_ptr()
    # One mapping for all: b lies behind a, as in the file.
    assert file["b"].data_ptr() - file["a"].data_ptr() == file.entries["b"].offset - file.entries["a"].offset
    file["a"].fill_(-1.0)
    assert file["a"][0] == -1.0
    assert path.read_bytes() == before
    assert WeightFile(path)["a"][1] == 1.0


def test_released_memory_is_read_again_and_its_neighbours_keep_theirs(tmp_path: Path) -> None:
    path = tmp_path / "w"
    save(path, {"a": torch.arange(100.0), "b": torch.arange(100_000.0), "c": torch.arange(100.0)})
    file = WeightFile(path)
    file.release("b")  # before anything was read
    tensors = {name: file[name] for name in "abc"}
    for tensor in tensors.values():
        tensor.neg_()
    for name in "abc":
        file.release(name)
    page = mmap.PAGESIZE
    # Whole pages of the tensor alone: its ends, and tensors that are smaller, share pages with others.
    inner = tensors["b"][page // 4 : -page // 4]
    assert torch.equal(inner, torch.arange(100_000.0)[page // 4 : -page // 4])
    for name in "ac":
        assert torch.equal(tensors[name], -torch.arange(100.0))


def test_data_starts_on_a_cache_line(tmp_path: Path) -> None:
    for count in range(5):
        save(tmp_path / "w", {f"tensor{'x' * count}": torch.zeros(1)})
        assert next(iter(read_header(tmp_path / "w")[0].values())).offset % 64 == 0


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "w"
    save(path, {"a": torch.ones(2)})
    before = path.read_bytes()

    def fail(name: str) -> torch.Tensor:
        raise RuntimeError("no such weight")

    with pytest.raises(RuntimeError, match="no such weight"):
        write(path, [TensorSpec("a", (2,), torch.float32)], fail)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------------------------------- refusals


def raw(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"not json", b"", "not a valid safetensors"),
        (b"\xff\xfe", b"", "not a valid safetensors"),
        ([], b"", "not an object"),
        (b"[" * 100_000, b"", "not a valid safetensors"),
        ({"a": 1}, b"", "not a valid safetensors"),
        ({"a": {}}, b"", "not a valid safetensors"),
        ({"a": entry(0, 4, dtype="F8_E5M2")}, bytes(4), "has dtype 'F8_E5M2'"),
        ({"a": entry(0, 4, dtype=["F32"])}, bytes(4), "not a valid safetensors"),
        ({"a": entry(0, 4, shape=[-4])}, bytes(4), "has the shape"),
        ({"a": entry(0, 4, shape=[True, 4])}, bytes(4), "has the shape"),
        ({"a": entry(0, 4, shape=[4.0])}, bytes(4), "has the shape"),
        ({"a": entry(0, 4, shape=[1] * 8 + [4])}, bytes(4), "has the shape"),
        ({"a": entry(0, 4, shape="4")}, bytes(4), "has the shape"),
        ({"a": entry(0, 4, shape=[1 << 39, 1 << 39])}, bytes(4), "its shape needs"),
        ({"a": {**entry(0, 4), "data_offsets": [0]}}, bytes(4), "has the offsets"),
        ({"a": {**entry(0, 4), "data_offsets": [-4, 0]}}, bytes(4), "has the offsets"),
        ({"a": {**entry(0, 4), "data_offsets": [4, 0]}}, bytes(4), "its shape needs 4"),
        ({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6), "'b' starts at byte"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4), "'b' starts at byte"),
        ({"a": entry(0, 4), "b": entry(6, 8)}, bytes(8), "'b' starts at byte"),
        ({"a": entry(0, 4)}, bytes(3), "cut short"),
        ({"a": entry(0, 4)}, bytes(5), "cut short or padded"),
        ({f"t{i}": entry(0, 0) for i in range(20_001)}, b"", "20001 tensors"),
    ],
)
def test_a_header_that_does_not_describe_the_file(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    path = raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(BundleError, match=message) as caught:
        WeightFile(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"1234567", (10**6).to_bytes(8, "little") + b"{}"])
def test_a_file_cut_short(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(BundleError, match="cut short"):
        WeightFile(tmp_path / "w")


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "w"
    with path.open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 100)
    with pytest.raises(BundleError, match="the limit is"):
        WeightFile(path)


def test_a_pickle_under_another_name(tmp_path: Path) -> None:
    for number, zipped in enumerate((True, False)):
        path = tmp_path / f"model{number}.safetensors"
        torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(BundleError, match="is a pickle, whatever its name"):
            WeightFile(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot read"):
        WeightFile(tmp_path / "none.safetensors")
    with pytest.raises(BundleError, match="cannot read"):
        WeightFile(tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_found_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever byte is changed in the header: a BundleError, or tensors inside the file."""
    path = tmp_path / "w"
    save(path, {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(3)})
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    position = data.draw(st.integers(0, 8 + length - 1))
    content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        file = WeightFile(path)
    except BundleError:
        return
    for name in file:
        assert file.entries[name].offset + file.entries[name].nbytes <= len(content)
        assert file[name].numel() <= 9
