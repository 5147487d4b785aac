"""The folder that a build writes to: locked, and after a failure as it was before."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ldmrt.bundle import Bundle
from ldmrt.errors import BuildError, BundleError
from ldmrt.files import write_atomically
from ldmrt.manifest import FORMAT, MANIFEST, FileRecord, Manifest, write_manifest
from ldmrt.weights import sha256

# Names that a build gives to its files. What bears one, and is not in the manifest, was left by a build that was killed.
_OURS = re.compile(
    r"(graphs/[a-z0-9_]+-[0-9a-z-]*-[0-9a-f]{8}\.(json|safetensors)"
    r"|[a-z0-9_]+-[0-9a-z-]*-[0-9a-f]{8}\.onnx"
    r"|plans/[a-z0-9_]+-[0-9a-z-]*-[0-9a-f]{8}\.plan"
    r"|trials/[a-z0-9_]+-[0-9a-f]{8}\.safetensors"
    r"|kernels-[0-9a-f]{8}/([0-9a-f]{32}-sm[0-9]+\.cubin|kernels\.json)"
    r"|weights/[a-z0-9_]+\.(float32|bfloat16|float16)\.safetensors"
    r"|(graphs/|weights/|plans/|trials/)?\..*\.tmp)"
)


class BundleFolder:
    """A bundle being written.

    New files get names that no present file has, and the manifest comes last: a reader, and whoever comes after a crash, sees the
    old bundle or the new one.

    Attributes:
        path: the folder.
        old: the manifest that was there, or None.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.old: Manifest | None = None
        self._written: list[Path] = []
        self._made: list[Path] = []

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hold the folder while building. If that fails, what was written is removed.

        Raises:
            BuildError: the folder cannot be made or written, or another build holds it.
        """
        created: list[Path] = []
        try:
            for folder in (*reversed(self.path.parents), self.path):
                if not folder.is_dir():
                    folder.mkdir(exist_ok=True)
                    created.append(folder)
        except OSError as error:
            _remove_empty(created)
            raise BuildError(f"cannot make the folder {self.path}: {error.strerror}; choose another --out") from error
        try:
            with self._locked():
                try:
                    self.old = self._previous()
                    yield
                except BaseException:
                    for path in self._written:
                        path.unlink(missing_ok=True)
                    _remove_empty(self._made)
                    if self.path in created and not (self.path / MANIFEST).exists():
                        shutil.rmtree(self.path, ignore_errors=True)
                        _remove_empty(created)
                    raise
        except OSError as error:
            reason = error.strerror or str(error)
            where = f" ({error.filename})" if error.filename else ""
            raise BuildError(
                f"cannot write the bundle {self.path}: {reason}{where}; make room, or choose another --out"
            ) from error

    def _previous(self) -> Manifest | None:
        """The manifest that is there; one that is damaged is replaced, one of a newer ldmrt is not."""
        file = self.path / MANIFEST
        if not file.is_file():
            return None
        try:
            return Bundle.open(self.path).manifest
        except BundleError:
            try:
                data = json.loads(file.read_text(encoding="utf-8"))
            except (ValueError, RecursionError):
                return None
            if isinstance(data, dict) and data.get("format") not in (None, FORMAT):
                raise
            return None

    def write(self, name: str, write: Callable[[Path], str]) -> FileRecord:
        """Make a file of the bundle. `write(path)` puts it in place at once and returns its SHA-256."""
        path = self.path / name
        if not path.parent.is_dir():
            path.parent.mkdir()
            self._made.append(path.parent)
        if not path.exists():
            self._written.append(path)
        return FileRecord(file=name, sha256=write(path))

    def write_bytes(self, name: str, data: bytes) -> FileRecord:
        """Make a file of the bundle from bytes."""
        return self.write(name, lambda path: write_atomically(path, data))

    def holds(self, record: FileRecord) -> bool:
        """Whether a file is there and is what the record says."""
        path = self.path / record.file
        return path.is_file() and sha256(path) == record.sha256

    def need(self, nbytes: int) -> None:
        """Refuse to start what the disk cannot hold.

        Raises:
            BuildError: says what is needed and what is free.
        """
        free = shutil.disk_usage(self.path).free
        if free < nbytes:
            raise BuildError(
                f"{self.path} needs {nbytes / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free; "
                "make room or choose another --out"
            )

    def commit(self, manifest: Manifest) -> None:
        """Put the manifest in place, then remove what only the old one named and what a killed build left."""
        write_manifest(self.path, manifest)
        self._written.clear()
        named = {record.file for record in Bundle(self.path, manifest).records()}
        if self.old is not None:
            for record in Bundle(self.path, self.old).records():
                if record.file not in named:
                    (self.path / record.file).unlink(missing_ok=True)
        kernels = [path for path in self.path.glob("kernels-*") if path.is_dir()]
        folders = (self.path / name for name in ("graphs", "weights", "plans", "trials"))
        for folder in (self.path, *folders, *kernels):
            for path in folder.glob("*"):
                orphan = path.relative_to(self.path).as_posix()
                if orphan not in named and _OURS.fullmatch(orphan):
                    path.unlink(missing_ok=True)
        for folder in kernels:
            _remove_empty([folder])

    @contextmanager
    def _locked(self) -> Iterator[None]:
        path = self.path / ".lock"
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.path.samestat(path.stat(), os.fstat(file.fileno())):  # its last holder has just removed it
                    raise BlockingIOError
            except OSError as error:
                raise BuildError(
                    f"another build is writing to {self.path}; wait for it, or choose another --out"
                ) from error
            try:
                yield
            finally:
                path.unlink(missing_ok=True)


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders that we have made, innermost first, unless someone has put something there."""
    for folder in reversed(folders):
        try:
            folder.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            break
