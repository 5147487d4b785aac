"""What the README shows works, and what it points to is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ldmrt.cli import app
from tests import kinds

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_and_sources_that_are_named_exist(page: Path) -> None:
    named = re.findall(
        r"`((?:tests|ldmrt|kernels|export|benchmarks)/[\w/.-]+\.(?:py|jsonl))(?:::(\w+))?`", page.read_text()
    )
    assert named or page.name != "SECURITY.md"
    for file, function in named:
        assert (ROOT / file).is_file(), file
        assert not function or f"\ndef {function}(" in (ROOT / file).read_text(), f"{file}::{function}"


@pytest.mark.parametrize("page", ["README.md", "docs/embedding.md", "docs/tasks.md"])
def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), {})  # noqa: S102  (our own page)
    assert list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("page", ["README.md", "docs/tasks.md"])
def test_commands_are_spelt_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, page: str) -> None:
    """Each is parsed in full, then refused for the folder that is not there, or run: never a usage error (exit code 2)."""
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^    ldmrt (.*)$", (ROOT / page).read_text(), re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        result = CliRunner().invoke(app, shlex.split(line))
        assert result.exit_code != 2, f"{line}: {result.output}"


def test_the_table_of_kinds_is_what_tests_cover() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert kinds.page(text, ROOT / "tests") == text, "write it anew: python -P tests/kinds.py"


def test_a_mark_that_is_misspelt_is_found(tmp_path: Path) -> None:
    test = tmp_path / "test_a.py"
    test.write_text('@pytest.mark.covers("Stable Diffusion XL", "inpainting")\ndef test_a(): ...\n')
    assert list(kinds.covered(tmp_path)) == [("Stable Diffusion XL", "inpainting")]
    assert kinds.table(tmp_path).count("✓") == 1
    for marks in (
        '"SDXL", "inpainting"',
        '"Stable Diffusion XL"',
        'KIND, "inpainting"',
        '"Stable Diffusion XL", "video"',
    ):
        test.write_text(f"@pytest.mark.covers({marks})\ndef test_a(): ...\n")
        with pytest.raises(ValueError, match=r"test_a\.py:1: pytest\.mark\.covers\(.*names no kind and task"):
            list(kinds.covered(tmp_path))
