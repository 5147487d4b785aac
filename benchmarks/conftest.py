"""The scripts of this folder import each other by name, and share the machine's own rates."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent
if str(FOLDER) not in sys.path:
    sys.path.append(str(FOLDER))

from ldmrt.bench.measure import copy_rate, gemm_rate  # noqa: E402


class Machine:
    """What this machine does at best, measured once."""

    @cache  # noqa: B019 - there is one, which lives as long as the session
    def gemm(self, dtype: torch.dtype) -> float:
        """FLOP/s of a large matrix product."""
        return gemm_rate(torch.device("cpu"), dtype)

    @cache  # noqa: B019
    def copy(self) -> float:
        """Bytes a second of a large copy."""
        return copy_rate(torch.device("cpu"))


@pytest.fixture(scope="session")
def machine() -> Machine:
    """See `Machine`."""
    return Machine()
