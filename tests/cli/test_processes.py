"""Commands that are stopped, killed, or find no room: what they leave."""

from __future__ import annotations

import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import ldmrt
from ldmrt.bundle import Bundle
from ldmrt.cli.inspect import damage
from ldmrt.errors import BuildError
from ldmrt.export.folder import BundleFolder
from ldmrt.manifest import MANIFEST

from .conftest import Run, Start, content, files, refused, wait, wait_for


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_stopped_between_pictures(start: Start, tiny_bundle: Path, tmp_path: Path, end: signal.Signals) -> None:
    out = tmp_path / "out"
    process = start("generate", "a", "--engines", tiny_bundle, "--num-images", 900, "--out", f"{out}/")
    wait_for(lambda: len(list(out.glob("*.png"))) >= 3, process)
    process.send_signal(end)
    ended = wait(process)
    assert ended == ((130, "", "interrupted\n") if end is signal.SIGINT else (-end, "", ""))
    pictures = list(out.glob("*.png"))
    assert 3 <= len(pictures) < 900
    for picture in pictures:
        assert content(picture).shape == (64, 64, 3)
    if end is signal.SIGINT:
        assert set(out.iterdir()) == set(pictures)


def test_a_new_build_interrupted(start: Start, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    process = start("build-engines", tiny_model, "--out", out, "--dtype", "float32")
    wait_for(lambda: any(out.glob("graphs/*.json")), process)
    process.send_signal(signal.SIGINT)
    assert wait(process) == (130, "", "interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_a_build_killed_leaves_the_bundle_as_it_was(
    start: Start, tiny_model: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    before = files(bundle)
    process = start("build-engines", tiny_model, "--out", bundle, "--dtype", "float32", "--batch", 3)
    wait_for(lambda: any(bundle.glob("graphs/*-r3-*.json")), process)
    process.kill()
    process.communicate()
    assert files(bundle).items() >= before.items()
    assert damage(Bundle.open(bundle)) == []
    # The next build finds what the dead one left, and ends with nothing that the manifest does not name.
    built = ldmrt.build_engines(tiny_model, bundle, dtype="float32", batch_sizes=(2,))
    assert set(files(bundle)) == {record.file for record in built.records()} | {MANIFEST}


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 3000 bytes; the system says so as it does when the disk is full.

    Not a fixture: pytest writes to its own log between a test and the end of its fixtures.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_disk_is_full_for_a_picture(generate: Run) -> None:
    with full_disk():
        ended = generate("--out", "a.png", "--json")
    refused(ended, "a.png", "File too large", "make room")
    assert list(Path().iterdir()) == []


def test_the_disk_is_full_for_a_bundle(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    with full_disk():
        ended = run("build-engines", tiny_model, "--out", tmp_path / "out")
    refused(ended, "File too large", "make room")
    assert list(tmp_path.iterdir()) == []


def test_stdout_is_full(start: Start, tiny_bundle: Path) -> None:
    with Path("/dev/full").open("w") as full:
        refused(wait(start("inspect", tiny_bundle, "--json", stdout=full)), "No space left", "make room")


def test_stdout_is_closed(start: Start, tiny_bundle: Path) -> None:
    process = start("inspect", tiny_bundle, "--json")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 1


def test_two_builds_at_once(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def first_build() -> None:
        folder = BundleFolder(out)
        with folder.open():
            folder.write_bytes("graphs/a.json", b"{}")
            with pytest.raises(BuildError, match=r"another build is writing to .*; wait for it"):
                ldmrt.build_engines(tiny_model, out)
            assert (out / "graphs" / "a.json").is_file()
            raise RuntimeError("the first fails")

    with pytest.raises(RuntimeError, match="the first fails"):
        first_build()
    assert not out.exists()
