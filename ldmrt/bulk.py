"""Many prompts from a file to a folder of pictures, which can be stopped at any time and goes on where it was.

The folder has a line for each picture in `metadata.jsonl`, written when the picture is there; `file_name` is what tools for folders of pictures
look for.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldmrt.errors import BadRequest
from ldmrt.files import replacing

METADATA = "metadata.jsonl"

_FIELDS = {"prompt", "negative_prompt", "seed"}
_SEED_LIMIT = 2**63
_DRAWN_SEED_LIMIT = 2**32


@dataclass(frozen=True)
class Order:
    """A picture to be made.

    Attributes:
        file_name: its name in the folder, made of the line in the file of prompts, from 1, and its number of that line's, from 0.
        prompt: what it shows.
        negative_prompt: what it does not show.
        seed: of its noise.
        seed_was_drawn: nobody said which seed.
    """

    file_name: str
    prompt: str
    negative_prompt: str
    seed: int
    seed_was_drawn: bool


def read_orders(path: Path, *, negative_prompt: str, seed: int | None, per_prompt: int) -> list[Order]:
    """The pictures that a file of prompts asks for.

    Args:
        path: each line a JSON object with `prompt`, and perhaps `negative_prompt` and `seed`; empty lines are passed over.
        negative_prompt: of lines that say none.
        seed: of the first picture of all, the others count on from it; picture i of a line that has a seed has that plus i. Without either it
            is drawn for each line.
        per_prompt: pictures of each line.

    Raises:
        BadRequest: the file cannot be read, or a line is no such object; the line is named.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise BadRequest(
            f"prompts: {path} cannot be read ({reason}); give a file of JSON lines", param="prompts"
        ) from error
    orders: list[Order] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        found = _line(line, f"{path}, line {number}")
        first = found.get("seed")
        if first is None and seed is not None:
            first = seed + len(orders)
        drawn = first is None
        first = secrets.randbelow(_DRAWN_SEED_LIMIT) if first is None else first
        if not 0 <= first <= _SEED_LIMIT - per_prompt:
            raise BadRequest(
                f"{path}, line {number}: seed is {first}, expected 0 to {_SEED_LIMIT - per_prompt}", param="prompts"
            )
        negative = found.get("negative_prompt", negative_prompt)
        orders += [
            Order(f"{number:06d}-{each}.png", found["prompt"], negative, first + each, drawn)
            for each in range(per_prompt)
        ]
    if not orders:
        raise BadRequest(
            f'prompts: {path} is empty, expected lines such as {{"prompt": "a red circle"}}', param="prompts"
        )
    return orders


def _line(line: str, where: str) -> dict[str, Any]:
    expected = 'expected an object such as {"prompt": "a red circle", "negative_prompt": "blurry", "seed": 1}'
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{where} is not JSON; {expected}", param="prompts") from error
    fits = (
        isinstance(found, dict)
        and found.keys() <= _FIELDS
        and isinstance(found.get("prompt"), str)
        and isinstance(found.get("negative_prompt", ""), str)
        and type(found.get("seed", 0)) is int
    )
    if not fits:
        raise BadRequest(f"{where} is {line.strip()[:60]}, {expected}", param="prompts")
    return found  # type: ignore[no-any-return]


class Album:
    """The folder of pictures, and its `metadata.jsonl`.

    Attributes:
        folder: the folder; it is made.

    Args:
        folder: see there.
        settings: what all pictures have in common, in terms of JSON.

    Raises:
        BadRequest: it cannot be made or read, or `metadata.jsonl` there is not of this program.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self._settings = folder, dict(settings)
        self._path = folder / METADATA
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text = self._path.read_bytes() if self._path.exists() else b""
        except OSError as error:
            raise BadRequest(f"{error.filename}: {error.strerror}; choose another --out", param="out") from error
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:  # the last line was being written when the process was killed
            with replacing(self._path) as file:
                file.write(whole)
        try:
            self._records = {record["file_name"]: record for record in map(json.loads, whole.splitlines())}
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise BadRequest(
                f"{self._path} is not what ldmrt wrote; choose another --out, or remove it", param="out"
            ) from error

    def missing(self, orders: list[Order]) -> list[Order]:
        """The pictures that are still to be made.

        Raises:
            BadRequest: one that is there was made of another prompt or with other settings.
        """
        left = []
        for order in orders:
            record = self._records.get(order.file_name)
            if record is None or not (self.folder / order.file_name).is_file():
                left.append(order)
                continue
            wanted = self._record(order, str(record.get("sha256")))
            if order.seed_was_drawn:
                wanted["seed"] = record.get("seed")
            other = next((key for key in {**wanted, **record} if wanted.get(key) != record.get(key)), None)
            if other is not None:
                raise BadRequest(
                    f"{self.folder / order.file_name} was made with {other} {str(record.get(other))[:60]!r}, "
                    f"now it is {str(wanted.get(other))[:60]!r}; choose another --out",
                    param="out",
                )
        return left

    def add(self, order: Order, sha256: str) -> None:
        """Write down that a picture is there.

        Args:
            order: the picture.
            sha256: of its pixels.
        """
        record = self._records[order.file_name] = self._record(order, sha256)
        line = json.dumps(record, ensure_ascii=False) + "\n"
        with self._path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def _record(self, order: Order, sha256: str) -> dict[str, Any]:
        return {
            "file_name": order.file_name,
            "prompt": order.prompt,
            "negative_prompt": order.negative_prompt,
            "seed": order.seed,
            **self._settings,
            "sha256": sha256,
        }
