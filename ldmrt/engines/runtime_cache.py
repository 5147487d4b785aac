"""What TensorRT for RTX compiled for this machine's GPU, kept from one process to the next.

There is one file for each plan, in a folder of its GPU and library version, below the user's cache: never in a bundle, which may travel. The
library itself refuses a file of another driver, GPU or version; then it compiles anew, and the file is written over.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldmrt.config import cache_folder
from ldmrt.files import replacing

_log = logging.getLogger("ldmrt.tensorrt")


def folder(environ: Mapping[str, str]) -> Path | None:
    """Where the files lie; None where there is no cache, and no home for one."""
    try:
        return cache_folder(environ) / "tensorrt"
    except RuntimeError:
        return None


def cache_file(place: Path, gpu: str, version: str, plan: Path) -> Path:
    """The file in a folder, of a plan on a GPU of this name, with this version of the library."""
    machine = re.sub("[^a-z0-9.]+", "-", f"{gpu} {version}".lower()).strip("-")
    return place / machine / f"{plan.stem}.cache"


class RuntimeCache:
    """The library's cache for one plan, and its file. What goes wrong with the file costs time, and is logged, never raised.

    Attributes:
        native: the library's `IRuntimeCache`, filled from the file if that fits. It must outlive the context that uses it.

    Args:
        native: an empty one.
        file: where it is kept.
    """

    def __init__(self, native: Any, file: Path) -> None:
        self.native, self._file = native, file
        self._kept = b""
        try:
            self._kept = file.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            _log.warning("%s cannot be read (%s): kernels are compiled anew", file, error)
            return
        if not native.deserialize(self._kept):
            _log.warning("%s is damaged, or of another driver: kernels are compiled anew", file)
            self._kept = b""

    def save(self) -> None:
        """Write the file, whole or not at all, if there is anything new in the cache."""
        serialized = self.native.serialize()  # None if the library fails, which it has logged then
        data = self._kept if serialized is None else bytes(memoryview(serialized))
        if data == self._kept:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._file) as out:
                out.write(data)
        except OSError as error:
            _log.warning("%s cannot be written (%s): kernels are compiled anew next time", self._file, error)
