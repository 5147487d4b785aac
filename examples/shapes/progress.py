"""What every training phase shares: its time budget, its checkpoints and its loss record."""

from __future__ import annotations

import json
import time
from math import cos, pi
from pathlib import Path
from typing import Self

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

CHECKPOINT_SECONDS = 120.0


class Budget:
    """A phase's wall-clock budget in seconds; time spent before a resume counts."""

    def __init__(self, minutes: float, spent: float = 0.0) -> None:
        self.seconds = minutes * 60
        self._start = time.monotonic() - spent

    @property
    def spent(self) -> float:
        """Seconds spent so far."""
        return time.monotonic() - self._start

    @property
    def fraction(self) -> float:
        """The spent part of the budget, 0 to 1."""
        return min(self.spent / self.seconds, 1.0) if self.seconds > 0 else 1.0

    def rate(self, peak: float, warmup: float, floor: float = 0.004) -> float:
        """The learning rate now: linear warm-up, then a cosine down to ``floor * peak``.

        Args:
            peak: The greatest learning rate.
            warmup: The warm-up's part of the budget.
            floor: The last learning rate over the greatest.
        """
        part = self.fraction
        if part < warmup:
            return peak * part / warmup
        fall = (part - warmup) / (1 - warmup)
        return peak * (floor + (1 - floor) * (1 + cos(pi * fall)) / 2)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate, times each group's own factor if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)


class Checkpoint:
    """A phase's state in one safetensors file, written aside and then renamed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._saved = time.monotonic()

    def due(self) -> bool:
        """Whether the last checkpoint is old enough for another."""
        return time.monotonic() - self._saved > CHECKPOINT_SECONDS

    def save(
        self,
        models: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer | None,
        step: int,
        spent: float,
    ) -> None:
        """Write the models' weights, the optimizer's moments, the step and the seconds spent."""
        tensors: dict[str, Tensor] = {}
        for name, model in models.items():
            for key, value in model.state_dict().items():
                tensors[f"{name}/{key}"] = value.detach().clone()
        if optimizer is not None:
            for index, state in optimizer.state_dict()["state"].items():
                for key, value in state.items():
                    tensors[f"optimizer/{index}/{key}"] = value.detach().clone()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".new")
        save_file(tensors, aside, metadata={"step": str(step), "spent": str(spent)})
        aside.replace(self.path)
        self._saved = time.monotonic()

    def load(self, models: dict[str, nn.Module], optimizer: torch.optim.Optimizer | None = None) -> tuple[int, float]:
        """Restore what was saved, if anything; returns the step and the seconds spent."""
        if not self.path.exists():
            return 0, 0.0
        with safe_open(self.path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        for name, model in models.items():
            prefix = f"{name}/"
            model.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        if optimizer is not None:
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith("optimizer/"):
                    _, index, name = key.split("/")
                    state.setdefault(int(index), {})[name] = value
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        return int(metadata["step"]), float(metadata["spent"])


class Record:
    """A phase's losses, one JSON line a report, shown on a progress bar as they come."""

    def __init__(self, path: Path, label: str, budget: Budget) -> None:
        self.path = path
        self._budget = budget
        self._label = label
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>5.1f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[losses]}"),
            refresh_per_second=1,
        )
        self._task = self._bar.add_task(label, total=1.0, losses="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def add(self, losses: dict[str, Tensor]) -> None:
        """Take in a step's losses."""
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(loss)) + loss.detach().float()
        self._count += 1

    def report(self, step: int, **extra: float) -> None:
        """Write the means since the last report, with further figures."""
        means = {name: total.item() / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        line = {"step": step, "seconds": round(self._budget.spent, 1), **means, **extra}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        shown = "  ".join(f"{name} {value:.4g}" for name, value in {**means, **extra}.items())
        self._bar.update(self._task, completed=self._budget.fraction, losses=f"step {step}  {shown}")


def read_record(path: Path) -> list[dict[str, float]]:
    """A phase's reports in the order of time; a resumed phase's supersede those after its checkpoint."""
    lines: list[dict[str, float]] = []
    for text in path.read_text().splitlines():
        line: dict[str, float] = json.loads(text)
        while lines and lines[-1]["seconds"] >= line["seconds"]:
            lines.pop()
        lines.append(line)
    return lines
