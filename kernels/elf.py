"""What a cubin, an ELF file for a GPU, says about its one kernel: registers, stack and parameters.

NVIDIA documents the format only by `cuobjdump -elf`; the numbers below are those that it names.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

# Attributes in the sections .nv.info (of the file) and .nv.info.NAME (of a kernel).
_REQNTID = 0x10
_FRAME_SIZE = 0x11
_MIN_STACK_SIZE = 0x12
_KPARAM_INFO = 0x17
_REGCOUNT = 0x2F
_SIZED = 4  # the format of an attribute that has a size and as many bytes; the others have two bytes

_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")


@dataclass(frozen=True, slots=True)
class Usage:
    """What a kernel needs.

    Attributes:
        symbol: its name.
        registers: of a thread.
        stack: bytes of a thread's stack in local memory, where spilled registers lie; a few may be reserved and never used.
        threads: of a block, as compiled.
        parameters: the size of each parameter in bytes.
    """

    symbol: str
    registers: int
    stack: int
    threads: int
    parameters: tuple[int, ...]


def usage(cubin: bytes) -> Usage:
    """Read a cubin with one kernel.

    Raises:
        ValueError: it is not a cubin, or does not hold exactly one kernel.
    """
    try:
        return _usage(cubin)
    except (struct.error, UnicodeDecodeError, LookupError, OverflowError) as error:
        raise ValueError(f"not a cubin, or a damaged one: {error!r}") from None


def _usage(cubin: bytes) -> Usage:
    sections = _sections(cubin)
    kernels = [name.removeprefix(".text.") for name in sections if name.startswith(".text.")]
    if len(kernels) != 1:
        raise ValueError(f"a cubin with {len(kernels)} kernels, expected 1")
    symbol = kernels[0]
    index = _symbols(sections[".symtab"], sections[".strtab"]).index(symbol)
    of_file = {_REGCOUNT: 0, _FRAME_SIZE: 0, _MIN_STACK_SIZE: 0}
    for attribute, value in _attributes(sections[".nv.info"]):
        if attribute in of_file:
            of, number = struct.unpack("<II", value)
            if of == index:
                of_file[attribute] = number
    threads, sizes = 0, {}
    for attribute, value in _attributes(sections[f".nv.info.{symbol}"]):
        if attribute == _REQNTID:
            x, y, z = struct.unpack("<III", value)
            threads = x * y * z
        elif attribute == _KPARAM_INFO:
            _, ordinal, _, bits = struct.unpack("<IHHI", value)
            sizes[ordinal] = bits >> 18
    return Usage(
        symbol=symbol,
        registers=of_file[_REGCOUNT],
        stack=max(of_file[_FRAME_SIZE], of_file[_MIN_STACK_SIZE]),
        threads=threads,
        parameters=tuple(sizes[ordinal] for ordinal in sorted(sizes)),
    )


def _sections(cubin: bytes) -> dict[str, bytes]:
    magic, bits = cubin[:4], cubin[4:5]
    if magic != b"\x7fELF" or bits != b"\x02":
        raise ValueError("not a cubin: it does not begin as a 64-bit ELF file does")
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [_SECTION.unpack_from(cubin, table + number * size) for number in range(count)]
    contents = [cubin[header[4] : header[4] + header[5]] for header in headers]
    names = contents[names_at]
    return {_text(names, header[0]): content for header, content in zip(headers, contents, strict=True)}


def _symbols(table: bytes, names: bytes) -> list[str]:
    return [_text(names, entry[0]) for entry in _SYMBOL.iter_unpack(table)]


def _attributes(content: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(content):
        form, attribute, size = struct.unpack_from("<BBH", content, at)
        at += 4
        if form == _SIZED:
            yield attribute, content[at : at + size]
            at += size


def _text(names: bytes, at: int) -> str:
    return names[at : names.index(b"\0", at)].decode()
