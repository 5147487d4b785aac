"""The scripts of benchmarks/ import each other by name: put their folder on the path."""

from __future__ import annotations

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"

if str(FOLDER) not in sys.path:
    sys.path.append(str(FOLDER))
