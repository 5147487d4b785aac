"""Where the pictures of `ldmrt generate` go."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ldmrt.errors import BadRequest


@dataclass(frozen=True)
class Destination:
    """Where pictures go.

    Attributes:
        folder: the folder.
        name: the file in it, or None for names made of the seed.
        several: whether there is more than one picture; their number then becomes part of `name`.
    """

    folder: Path
    name: str | None
    several: bool

    @classmethod
    def of(cls, out: str | None, *, several: bool) -> Destination:
        """Read `--out`: nothing, a file, or a folder (one that exists, or ends in a slash)."""
        path = Path(out or ".")
        if out is None or out.endswith(("/", os.sep)) or path.is_dir():
            return cls(path, None, several)
        return cls(path.parent, path.name, several)

    def check(self) -> None:
        """Find out before anything is loaded that nothing could be written.

        Raises:
            BadRequest: see `ldmrt.image.check_writable`.
        """
        from ldmrt.image import check_writable

        if self.name is not None:
            check_writable(self.path(0, 0))
            return
        folder = self.folder.absolute()
        while (
            not folder.exists() and folder != folder.parent
        ):  # what is missing is made when the first picture is there
            folder = folder.parent
        check_writable(folder / "ldmrt-0.png")

    def path(self, number: int, seed: int) -> Path:
        """The file of a picture; a name that we choose is never one that is taken."""
        if self.name is not None:
            chosen = Path(self.name)
            return self.folder / (f"{chosen.stem}-{number}{chosen.suffix}" if self.several else self.name)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadRequest(f"cannot make the folder {self.folder}: {error.strerror}; choose another --out") from error
        path = self.folder / f"ldmrt-{seed}.png"
        again = 1
        while path.exists():
            path = self.folder / f"ldmrt-{seed}-{again}.png"
            again += 1
        return path
