"""Kernels compiled ahead of time: from a variant to a cubin, with Triton but without a GPU; and cubins in a folder.

Where the cubins lie, neither Triton nor a C compiler is needed to run them (kernels/launch.py). A folder holds one file per
cubin, named by the variant's key and the architecture, and `kernels.json`, which says what they are and is written last.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldmrt.kernels import elf
from ldmrt.kernels.variant import TYPES, Constant, Variant, function, source_hash

FORMAT = 1
INDEX = "kernels.json"

_LARGEST = 64 * 2**20  # bytes of a file that is read: thousands of times what a kernel has
_POINTER = 8
_SIZES = {"i32": 4, "i64": 8, "fp32": 4}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_HASH = re.compile(r"[0-9a-f]{64}", re.ASCII)

# Triton's switches are process-wide.
_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Cubin:
    """A variant compiled for an architecture.

    Attributes:
        variant: what was compiled.
        arch: the architecture, such as 89; `runs_on` says which devices it serves.
        triton: the version of Triton that compiled it.
        source: the hash of the kernel's source (`variant.source_hash`).
        symbol: the kernel's name in the code.
        threads: of a block.
        shared: bytes of dynamic shared memory of a block.
        parameters: the size of each parameter in bytes: those of the variant, then pointers that Triton adds, to be null.
        registers: of a thread.
        stack: bytes of a thread's stack, where spilled registers lie.
        code: the file.
    """

    variant: Variant
    arch: int
    triton: str
    source: str
    symbol: str
    threads: int
    shared: int
    parameters: tuple[int, ...]
    registers: int
    stack: int
    code: bytes

    def __post_init__(self) -> None:
        """The launcher writes the parameters into memory of the size that the kernel declares."""
        expected = [_POINTER if kind[0] == "*" else _SIZES[kind] for kind in self.variant.types]
        own, hidden = self.parameters[: len(expected)], self.parameters[len(expected) :]
        if list(own) != expected or any(size != _POINTER for size in hidden):
            raise ValueError(
                f"{self.variant.kernel} has parameters of {list(self.parameters)} bytes, expected {expected} and pointers"
            )

    @property
    def key(self) -> str:
        return self.variant.key(self.source)

    @property
    def file_name(self) -> str:
        return f"{self.key}-sm{self.arch}.cubin"

    @property
    def hidden(self) -> int:
        """How many pointers Triton added."""
        return len(self.parameters) - len(self.variant.types)


def runs_on(compiled: int, arch: int) -> bool:
    """Whether a device of an architecture runs what was compiled for another.

    Code for 8.x runs on later 8.x. From 9.0 on Triton compiles for sm_90a, sm_100a and so on, which use instructions of that
    one architecture and run on no other.
    """
    return arch == compiled or (compiled < 90 and compiled // 10 == arch // 10 and compiled < arch)


@dataclass(frozen=True, slots=True)
class Ptx:
    """A variant as assembly for an architecture, for a library that launches kernels by itself.

    Attributes:
        symbol: the kernel's name in the text.
        threads: of a block.
        shared: bytes of dynamic shared memory of a block.
        text: the assembly. The kernel has the variant's parameters and no others.
    """

    symbol: str
    threads: int
    shared: int
    text: str


def compile_variant(variant: Variant, arch: int) -> Cubin:
    """Compile with Triton, which keeps a cache of its own on disk.

    Raises:
        ValueError: the kernel needs memory that only Triton's own launcher provides.
        RuntimeError: Triton is not installed, or it has been told to interpret.
    """
    compiled = _compile(variant, arch)
    code = compiled.asm["cubin"]
    usage = elf.usage(code)
    return Cubin(
        variant=variant,
        arch=arch,
        triton=importlib.metadata.version("triton"),
        source=source_hash(variant.kernel),
        symbol=usage.symbol,
        threads=usage.threads,
        shared=compiled.metadata.shared,
        parameters=usage.parameters,
        registers=usage.registers,
        stack=usage.stack,
        code=code,
    )


def compile_to_ptx(variant: Variant, arch: int) -> Ptx:
    """`compile_variant`, to assembly.

    Raises:
        ValueError: the kernel needs memory that only Triton's own launcher provides.
        RuntimeError: Triton is not installed, or it has been told to interpret.
    """
    compiled = _compile(variant, arch)
    symbol = compiled.metadata.name
    text = _without_hidden(compiled.asm["ptx"], symbol, len(variant.types))
    threads = re.search(r"^\.reqntid (\d+)", text, re.MULTILINE)
    if threads is None:
        raise ValueError(f"{variant.kernel} for sm_{arch} does not say how many threads a block has")
    return Ptx(symbol, int(threads[1]), compiled.metadata.shared, text)


def _compile(variant: Variant, arch: int) -> Any:
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("Triton is not installed, and compiling kernels needs it: pip install 'ldmrt[triton]'")
    import triton

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, and then Triton compiles nothing; unset it")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = function(variant.kernel)
    constants = dict(variant.constants)
    arguments = [name for name in kernel.arg_names if name not in constants]
    if len(arguments) != len(variant.types) or not constants.keys() <= set(kernel.arg_names):
        raise ValueError(
            f"{variant.kernel} takes {kernel.arg_names}; {len(variant.types)} arguments and the constants "
            f"{sorted(constants)} were given"
        )
    source = ASTSource(
        kernel,
        {**dict(zip(arguments, variant.types, strict=True)), **dict.fromkeys(constants, "constexpr")},
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {
            (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
            for name, aligned in zip(arguments, variant.aligned, strict=True)
            if aligned
        },
    )
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "enable_fp_fusion": variant.fp_fusion,
    }
    with _lock, _without_line_info():
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    scratch = compiled.metadata.global_scratch_size + compiled.metadata.profile_scratch_size
    if scratch > 0:
        raise ValueError(
            f"{variant.kernel} for sm_{arch} needs {scratch} bytes of scratch memory, which a launch has not"
        )
    return compiled


def _without_hidden(text: str, symbol: str, count: int) -> str:
    """Assembly without the parameters that Triton adds behind a kernel's own for its scratch memory, of which there is none."""
    start = text.index("(", text.index(f".entry {symbol}(")) + 1
    end = text.index(")", start)
    parameters = text[start:end].split(",")
    hidden = [parameter.split()[-1] for parameter in parameters[count:]]
    if any(re.search(rf"\b{name}\b", text[end:]) for name in hidden):
        raise ValueError(f"{symbol} reads memory that only Triton's launcher provides")
    return text[:start] + ",".join(parameters[:count]).rstrip() + "\n" + text[end:]


@contextmanager
def _without_line_info() -> Iterator[None]:
    """Line information holds this machine's paths, and with it the same kernel compiles to other bytes elsewhere."""
    from triton import knobs

    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True
        yield


def compile_all(
    variants: Sequence[Variant], arches: Sequence[int], on_progress: Callable[[int, int], None] | None = None
) -> list[Cubin]:
    """Compile each variant for each architecture.

    Args:
        variants: each once.
        arches: such as 86, 89.
        on_progress: called with how many of how many are done, after each.
    """
    cubins = []
    for arch in arches:
        for variant in variants:
            cubins.append(compile_variant(variant, arch))
            if on_progress is not None:
                on_progress(len(cubins), len(variants) * len(arches))
    return cubins


def write(folder: Path, cubins: Sequence[Cubin]) -> list[Path]:
    """Write cubins and the index into a folder, which is made. The same cubins give the same bytes.

    Returns:
        The files, the index last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ordered = sorted({cubin.file_name: cubin for cubin in cubins}.items())
    entries = ",\n".join(json.dumps(_entry(cubin)) for _, cubin in ordered)
    contents = {name: cubin.code for name, cubin in ordered}
    contents[INDEX] = f'{{"format": {FORMAT}, "kernels": [\n{entries}\n]}}\n'.encode()
    for name, content in contents.items():
        _replace(folder / name, content)
    return [folder / name for name in contents]


def read(folder: Path) -> list[Cubin]:
    """Read what `write` wrote, checked.

    Raises:
        ValueError: something is missing, damaged, or not as `write` writes it.
        OSError: a file cannot be read.
    """
    path = folder / INDEX
    try:
        index = json.loads(_content(path))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        found = index.get("format") if isinstance(index, dict) else type(index).__name__
        raise ValueError(
            f"{path} has format {str(found)[:40]}, expected {FORMAT}; compile the kernels with this version"
        )
    if index.keys() != {"format", "kernels"} or not isinstance(index["kernels"], list):
        raise ValueError(f"{path} has the fields {sorted(map(str, index))[:8]}, expected format and kernels")
    cubins: dict[str, Cubin] = {}
    for number, entry in enumerate(index["kernels"]):
        try:
            cubin = _cubin(folder, entry)
        except ValueError as error:
            raise ValueError(f"{path}: kernel {number}: {error}; compile the kernels again") from None
        if cubin.file_name in cubins:
            raise ValueError(f"{path}: kernel {number}: {cubin.file_name} is named twice; compile the kernels again")
        cubins[cubin.file_name] = cubin
    return list(cubins.values())


# The fields of an entry and of its variant, with their types.
_ENTRY: dict[str, type] = {
    "variant": dict,
    "arch": int,
    "triton": str,
    "source": str,
    "symbol": str,
    "threads": int,
    "shared": int,
    "parameters": list,
    "registers": int,
    "stack": int,
    "file": str,
    "size": int,
    "sha256": str,
}
_VARIANT: dict[str, type] = {
    "kernel": str,
    "types": list,
    "aligned": list,
    "constants": list,
    "num_warps": int,
    "num_stages": int,
    "fp_fusion": bool,
}


def _entry(cubin: Cubin) -> dict[str, Any]:
    code = {"file": cubin.file_name, "size": len(cubin.code), "sha256": hashlib.sha256(cubin.code).hexdigest()}
    return {
        name: asdict(cubin.variant) if name == "variant" else code.get(name) or getattr(cubin, name) for name in _ENTRY
    }


def _cubin(folder: Path, entry: object) -> Cubin:
    fields = _checked(entry, _ENTRY, "")
    variant = _variant(_checked(fields["variant"], _VARIANT, "variant."))
    for name in ("arch", "threads", "shared", "registers", "stack", "size"):
        if not 0 <= fields[name] < 2**31:
            raise ValueError(f"{name} is {fields[name]}, expected 0 to 2^31 - 1")
    for name, pattern in (("symbol", _NAME), ("source", _HASH), ("sha256", _HASH)):
        if pattern.fullmatch(fields[name]) is None:
            raise ValueError(f"{name} is {fields[name][:80]!r}, expected what matches {pattern.pattern}")
    name, size, sha256 = fields.pop("file"), fields.pop("size"), fields.pop("sha256")
    expected = f"{variant.key(fields['source'])}-sm{fields['arch']}.cubin"
    if name != expected:
        raise ValueError(f"file is {name[:80]!r}, expected {expected!r}")
    code = _content(folder / name)
    if len(code) != size:
        raise ValueError(f"{name} has {len(code)} bytes, expected {size}")
    if hashlib.sha256(code).hexdigest() != sha256:
        raise ValueError(f"{name} has another SHA-256 than expected")
    parameters = tuple(_all(fields.pop("parameters"), int, "parameters"))
    return Cubin(**{**fields, "variant": variant, "parameters": parameters, "code": code})


def _variant(fields: dict[str, Any]) -> Variant:
    constants = []
    for pair in fields["constants"]:
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str):
            raise ValueError(f"variant.constants holds {str(pair)[:80]}, expected [name, value]")
        if not isinstance(pair[1], Constant):
            raise ValueError(
                f"variant.constants: {pair[0][:80]} is {str(pair[1])[:80]}, expected a number, bool or string"
            )
        constants.append((pair[0], pair[1]))
    types = _all(fields["types"], str, "variant.types")
    unknown = [kind for kind in types if kind not in _SIZES and kind not in TYPES.values()]
    if unknown:
        raise ValueError(f"variant.types holds {unknown[0][:80]!r}, which no kernel here takes")
    aligned = _all(fields["aligned"], bool, "variant.aligned")
    return Variant(**{**fields, "types": tuple(types), "aligned": tuple(aligned), "constants": tuple(constants)})


def _checked(value: object, expected: dict[str, type], prefix: str) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != expected.keys():
        found = sorted(map(str, value))[:20] if isinstance(value, dict) else str(value)[:80]
        raise ValueError(f"{prefix or 'entry'} has {found}, expected the fields {sorted(expected)}")
    for name, kind in expected.items():
        # A bool is an int to isinstance.
        if type(value[name]) is not kind:
            raise ValueError(f"{prefix}{name} is {str(value[name])[:80]!r}, expected {kind.__name__}")
    return dict(value)


def _all(values: list[Any], kind: type, name: str) -> list[Any]:
    for value in values:
        if type(value) is not kind:
            raise ValueError(f"{name} holds {str(value)[:80]!r}, expected {kind.__name__} only")
    return values


def _content(path: Path) -> bytes:
    """A regular file's bytes; a link could lead out of the folder."""
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path} is missing, or not a regular file")
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, expected {_LARGEST} at most")
    return path.read_bytes()


def _replace(path: Path, content: bytes) -> None:
    """Write a file under another name, and put it in place at once."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
