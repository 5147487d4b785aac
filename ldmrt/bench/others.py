"""How much of a machine's processors other processes have had."""

from __future__ import annotations

import os
from pathlib import Path

_STAT = Path("/proc/stat")


class Others:
    """Counts from when it is made; the kernel's clock ticks say who was busy."""

    def __init__(self, stat: Path = _STAT) -> None:
        self._stat = stat
        self._start = self._busy()

    def share(self) -> float | None:
        """Seconds of processor time that others had, over those that there were: 0 to 1. None where the kernel does not tell."""
        now = self._busy()
        if now is None or self._start is None:
            return None
        busy, total, own = (b - a for a, b in zip(self._start, now, strict=True))
        return min(1.0, max(0.0, (busy - own) / total)) if total > 0 else 0.0

    def _busy(self) -> tuple[float, float, float] | None:
        """Seconds, of all cores together: busy for anyone, in all, and for this process and its children that have ended."""
        try:
            first = self._stat.read_text().split("\n", 1)[0].split()
        except OSError:
            return None
        # user, nice, system, idle, iowait, irq, softirq, steal; what follows is counted in the first two.
        ticks = [int(value) / os.sysconf("SC_CLK_TCK") for value in first[1:9]]
        own = os.times()
        return sum(ticks) - ticks[3] - ticks[4], sum(ticks), sum(own[:4])
