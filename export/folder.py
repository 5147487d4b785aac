"""The folder that a build writes to: locked, and after a failure as it was before."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ldmrt.bundle import MANIFEST, Bundle, FileRecord, Manifest, write_atomically, write_manifest
from ldmrt.errors import BuildError
from ldmrt.weights import sha256


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

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hold the folder while building. If that fails, what was written is removed.

        Raises:
            BuildError: the folder cannot be made or written, or another build holds it.
        """
        created = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BuildError(f"cannot make the folder {self.path}: {error.strerror}; choose another --out") from error
        try:
            with self._locked():
                self.old = Bundle.open(self.path).manifest if (self.path / MANIFEST).is_file() else None
                yield
        except BaseException as error:
            for path in self._written:
                path.unlink(missing_ok=True)
            if created:
                shutil.rmtree(self.path, ignore_errors=True)
            if isinstance(error, OSError):
                reason = error.strerror or str(error)
                raise BuildError(
                    f"cannot write the bundle {self.path}: {reason}; free some space or choose another --out"
                ) from error
            raise

    def write(self, name: str, write: Callable[[Path], str]) -> FileRecord:
        """Make a file of the bundle. `write(path)` puts it in place at once and returns its SHA-256."""
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
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
        for folder in (self.path, self.path / "graphs", self.path / "weights"):
            for path in folder.glob(".*.tmp"):
                path.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        path = self.path / ".lock"
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise BuildError(
                    f"another build is writing to {self.path}; wait for it, or choose another --out"
                ) from error
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
