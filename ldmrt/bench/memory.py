"""How much memory a process has had."""

from __future__ import annotations

import resource


def peak_resident() -> int:
    """The most bytes that this process has had in memory so far, mapped files included where their pages were touched."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
