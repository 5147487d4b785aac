"""What the suite has found so far: one JSON file, replaced as a whole after every part, so that a killed run leaves all but its last."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FILE = "suite.json"

Figures = dict[str, Any]


class DeviceLost(BaseException):
    """The GPU's context is unusable after an error: only a new process can go on. No stage may catch it by accident."""


class Results:
    """The results file.

    Attributes:
        data: its content: the facts of the run, and `units` by name, each with a status, seconds and parts.

    Args:
        folder: where the file lies.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / FILE
        self.data: Figures = {"units": {}, "running": None}
        if self.path.is_file():
            self.data = json.loads(self.path.read_text(encoding="utf-8"))

    def save(self) -> None:
        """Write aside, then rename."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{FILE}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)

    def begin(self, unit: str) -> None:
        """A unit starts."""
        self.data["units"][unit] = {"status": "running", "seconds": 0.0, "parts": {}}
        self.data["running"] = {"unit": unit, "since": time.time()}
        self.save()

    def end(self, unit: str, status: str, reason: str | None = None) -> None:
        """A unit has ended, with a word on how and, where it is not `done`, why."""
        entry = self.data["units"].setdefault(unit, {"seconds": 0.0, "parts": {}})
        running = self.data["running"]
        if running is not None:
            entry["seconds"] = round(time.time() - running["since"], 1)
        entry["status"] = status
        if reason is not None:
            entry["reason"] = reason
        self.data["running"] = None
        self.save()

    @contextmanager
    def part(self, unit: str, name: str) -> Iterator[Figures]:
        """A part of a unit: what is put into the figures is kept, and so is the traceback if it fails. Others go on.

        Raises:
            DeviceLost: the failure has made the GPU unusable for this process.
        """
        figures: Figures = {}
        self.data["units"][unit]["parts"][name] = figures
        try:
            yield figures
        except Exception as error:  # whatever a part raises, the others are to run
            figures["error"] = "".join(traceback.format_exception(error))[-6000:]
            if _lost():
                raise DeviceLost(f"{unit}, {name}: {type(error).__name__}: {str(error)[:200]}") from error
        finally:
            self.save()

    def failed_parts(self, unit: str) -> list[str]:
        """The parts of a unit that raised, or whose figures say that they are wrong."""
        parts = self.data["units"].get(unit, {}).get("parts", {})
        return [name for name, figures in parts.items() if "error" in figures or figures.get("right") is False]


def _lost() -> bool:
    """Whether the GPU no longer answers, as after an illegal memory access."""
    import torch

    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").add_(1).item()
    except RuntimeError:
        return True
    return False
