"""Weight files: safetensors, checked before use, mapped and not read.

The header is checked here, not only in the safetensors library: a limit on its size and on the number of tensors, every range
inside the file, no overlaps and no gaps, and a clear word when the file is a pickle under another name.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.errors import BundleError
from ldmrt.files import replacing

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 20_000

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: dtype, shape, and its first byte and length in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class WeightFile(Mapping[str, torch.Tensor]):
    """A safetensors file as a mapping of names to tensors that share the mapped file's memory.

    The mapping is private: writing into a tensor never changes the file.

    Attributes:
        path: the file.
        entries: where each tensor lies.
        metadata: what the header says beside the tensors.

    Raises:
        BundleError: the file is missing, is not safetensors, or its header does not describe it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries, self.metadata = read_header(path)
        self._mapped: mmap.mmap | None = None
        self._memory: torch.Tensor | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = self.entries[name]
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        data = self._map()[entry.offset : entry.offset + entry.nbytes]
        if entry.offset % entry.dtype.itemsize:
            data = data.clone()
        return data.view(entry.dtype).view(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def release(self, name: str) -> None:
        """Give back the memory that reading a tensor took. It is read from the file again when it is used again; what was written into
        it is lost.
        """
        entry = self.entries[name]
        first = -(-entry.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (entry.offset + entry.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if self._mapped is not None and last > first:
            self._mapped.madvise(mmap.MADV_DONTNEED, first, last - first)

    def unmap(self) -> None:
        """Leave the file; tensors that are still in use keep what they have. Read again, a tensor is what the file says."""
        self._mapped = self._memory = None

    def _map(self) -> torch.Tensor:
        if self._memory is None:
            with self.path.open("rb") as file:
                self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._memory = torch.frombuffer(self._mapped, dtype=torch.uint8)
        return self._memory


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Read and check the header of a safetensors file: tensor name -> `Entry`, and its metadata.

    Raises:
        BundleError: see `WeightFile`.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            _refuse_pickle(path, start, file.read(1))
            file.seek(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > size - 8:
                raise BundleError(
                    f"{path} is cut short: it has {size} bytes, its header alone claims {length + 8}; copy it again"
                )
            if length > MAX_HEADER_BYTES:
                raise BundleError(
                    f"{path} has a header of {length} bytes, the limit is {MAX_HEADER_BYTES}; it is not a model's weights"
                )
            header = file.read(length)
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror or error}; copy or build it again") from error
    try:
        table = json.loads(header)
        if not isinstance(table, dict):
            raise ValueError("not an object")
        metadata = table.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is not text")
        if len(table) > MAX_TENSORS:
            raise ValueError(f"{len(table)} tensors, the limit is {MAX_TENSORS}")
        entries = {name: _entry(name, value, 8 + length) for name, value in table.items()}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BundleError(
            f"{path} is not a valid safetensors file ({str(error)[:160]}); copy or convert it again"
        ) from error
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            raise BundleError(
                f"{path} is damaged: tensor {name!r} starts at byte {entry.offset}, expected {end}; copy it again"
            )
        end += entry.nbytes
    if end != size:
        raise BundleError(
            f"{path} is cut short or padded: it has {size} bytes, its header describes {end}; copy it again"
        )
    return entries, metadata


def write(path: Path, specs: Iterable[TensorSpec], load: Callable[[str], torch.Tensor]) -> str:
    """Write a safetensors file to a temporary name, then rename it to `path`.

    Args:
        path: where the file is to be.
        specs: name, shape and dtype of every tensor, in the order of the file.
        load: gives a tensor by name when its turn comes, so that a model never stands in memory twice.

    Returns:
        The file's SHA-256, in hexadecimal.
    """
    header: dict[str, object] = {}
    offset = 0
    for spec in specs:
        shape = [int(size) for size in spec.shape]
        nbytes = math.prod(shape) * spec.dtype.itemsize
        header[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)  # the data starts on a cache line
    digest = hashlib.sha256()
    with replacing(path) as file:
        for chunk in (len(text).to_bytes(8, "little"), text):
            file.write(chunk)
            digest.update(chunk)
        for name in header:
            data = load(name).detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            file.write(data)
            digest.update(data)
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _entry(name: str, value: Mapping[str, object], base: int) -> Entry:
    shape, offsets = value["shape"], value["data_offsets"]
    if value["dtype"] not in DTYPES:
        raise ValueError(f"tensor {name[:80]!r} has dtype {str(value['dtype'])[:20]!r}, known are {', '.join(DTYPES)}")
    dtype = DTYPES[str(value["dtype"])]
    if (
        not isinstance(shape, list)
        or not all(type(size) is int and 0 <= size < 1 << 40 for size in shape)
        or len(shape) > 8
    ):
        raise ValueError(f"tensor {name[:80]!r} has the shape {str(shape)[:60]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(o) is int and o >= 0 for o in offsets):
        raise ValueError(f"tensor {name[:80]!r} has the offsets {str(offsets)[:60]}")
    nbytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise ValueError(f"tensor {name[:80]!r} has {offsets[1] - offsets[0]} bytes, its shape needs {nbytes}")
    return Entry(dtype, tuple(shape), base + offsets[0], nbytes)


def _refuse_pickle(path: Path, start: bytes, header: bytes) -> None:
    # A length may begin with the same bytes as a zip or a pickle; what follows a length is a brace.
    if header != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
        raise BundleError(
            f"{path} is a pickle, whatever its name: loading one can run any code, so ldmrt never does; "
            "ask its author for safetensors, or convert it: ldmrt convert"
        )
