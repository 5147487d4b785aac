"""Damage: bytes, JSON and safetensors that are almost what they should be. All of it is drawn from a `random.Random`, and so made again by its seed."""

from __future__ import annotations

import json
import random
from typing import Any

_NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 7, 16, 64, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, -(2**31), -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308, 5e-324,
    float("nan"), float("inf"), -float("inf"), True, False,
)  # fmt: skip
_TEXTS: tuple[Any, ...] = (
    "", " ", "a", "1", "nan", "..", "../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "\n", "\x1b[2J", "x" * 5000, "é", "💥", "__class__", "{}", "http://127.0.0.1:9/",
)  # fmt: skip
_OTHERS: tuple[Any, ...] = (
    None, [], [[]], {}, [None], [0] * 100, {"": {}}, {"ref": "x"}, {"dim": "rows", "factor": 2**40}, {"dtype": "quint8"}, {"float": "nan"}, [2**40], [-1, -1], ["a", "b"],
)  # fmt: skip
VALUES = (*_NUMBERS, *_TEXTS, *_OTHERS)


def damaged(draw: random.Random, data: bytes, *, first: int | None = None) -> bytes:
    """Bytes of which some are other ones, missing, there twice, or from elsewhere.

    Args:
        draw: chooses.
        data: the bytes.
        first: half of the damage is among so many first ones.
    """
    content = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        at, length = draw.randrange(len(content) + 1), draw.choice((1, 1, 2, 8, 64))
        if first is not None and draw.random() < 0.5:
            at = min(at, draw.randrange(first))
        way = draw.randrange(6)
        if way == 0 and at < len(content):
            content[at] ^= 1 << draw.randrange(8)
        elif way == 1:
            content[at:at] = draw.choice(
                (b"\r\n", b"\n", b"\0", b"\r", b" ", b":", b"\xff", b'"', b"[" * 3000, bytes(length))
            )
        elif way == 2:
            del content[at : at + length]
        elif way == 3:
            content[at:at] = content[at : at + length]
        elif way == 4 and draw.random() < 0.3:
            del content[at:]
        else:
            content[at : at + length] = draw.randbytes(length)
    return bytes(content)


def changed(draw: random.Random, value: Any, times: int | None = None) -> Any:
    """A copy of what JSON holds, with some of it another value, missing, renamed, there twice, or elsewhere."""
    made = _copy(value)
    for _ in range(times or draw.choice((1, 1, 1, 2, 3))):
        places = _places(made)
        if not places:
            return _copy(draw.choice(VALUES))
        holder, key = draw.choice(places)
        way = draw.randrange(8)
        if way <= 3:
            alike = (
                _NUMBERS
                if isinstance(holder[key], int | float)
                else _TEXTS
                if isinstance(holder[key], str)
                else _OTHERS
            )
            holder[key] = _copy(draw.choice(alike if draw.random() < 0.7 else VALUES))
        elif way == 4:
            other, its = draw.choice(places)
            holder[key] = _copy(other[its])
        elif way == 5:
            del holder[key]
        elif isinstance(holder, dict):
            name = draw.choice(("surprise", "", "../x", "a\0", "\ud800", *holder))
            holder[name] = holder.pop(key) if way == 6 else _copy(holder[key])
        elif way == 6:
            draw.shuffle(holder)
        else:
            holder.insert(key, _copy(holder[key]))
    return made


def _copy(value: Any) -> Any:
    """So that nothing is there twice, and is put into itself later."""
    return json.loads(json.dumps(value))


def text(draw: random.Random, value: Any) -> bytes:
    """JSON as a file, now and then in another encoding, and what is no JSON."""
    found = json.dumps(value)
    return found.encode(draw.choice(("utf-8",) * 20 + ("utf-16", "utf-8-sig", "utf-32")))


def tensors(draw: random.Random, data: bytes) -> bytes:
    """A safetensors file whose header, length or data says something else."""
    length = int.from_bytes(data[:8], "little")
    header, content = data[8 : 8 + length], data[8 + length :]
    way = draw.randrange(6)
    if way <= 2:
        header = json.dumps(changed(draw, json.loads(header))).encode()
    elif way == 3:
        header = damaged(draw, header)
    elif way == 4:
        content = draw.choice(
            (
                content[: draw.randrange(len(content) + 1)],
                content + bytes(draw.randrange(64)),
                damaged(draw, content),
                b"",
            )
        )
    else:
        length = draw.choice(
            (0, 1, length - 1, length + 1, 2**20, 2**24 + 1, 2**31, 2**63, 2**64 - 1, draw.randrange(2**16))
        )
        return length.to_bytes(8, "little") + header + content
    return len(header).to_bytes(8, "little") + header + content


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in what JSON holds: what holds it, and its key there."""
    found: list[tuple[Any, Any]] = []
    pending = [value]
    while pending:
        holder = pending.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        for key in keys:
            found.append((holder, key))
            pending.append(holder[key])
    return found
