"""The README's table of what works for which kind of model, from what tests say that they compare with diffusers, or with a
small implementation of the papers where diffusers has none.

A test says so by a mark, `pytest.mark.covers("Stable Diffusion XL", "inpainting")`, one for each. The files are parsed, not run.

    python -P tests/kinds.py     writes the table anew
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

KINDS = (
    "Stable Diffusion 1.x",
    "Stable Diffusion 2.x",
    "Stable Diffusion XL",
    "Stable Diffusion XL refiner",
    "Stable Diffusion x4 upscaler",
    "latent consistency models",
    "latent diffusion without text",
    "latent diffusion of classes",
    "latent diffusion of semantic maps",
    "latent diffusion of layouts",
    "latent diffusion, text to image",
    "latent diffusion for super-resolution",
)
TASKS = (
    "new pictures",
    "image to image",
    "inpainting",
    "enlarging",
    "ControlNet",
    "LoRA",
    "textual inversion",
    "from one file",
)
README = Path(__file__).parents[1] / "README.md"
_BEGIN, _END = "<!-- kinds: written by tests/kinds.py -->\n", "<!-- end of kinds -->\n"


def covered(tests: Path) -> Iterator[tuple[str, str]]:
    """Every (kind, task) that a test under a folder is marked with.

    Raises:
        ValueError: a mark names another kind or task than those above, or something else than two words.
    """
    for path in sorted(tests.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.covers":
                words = [one.value if isinstance(one, ast.Constant) else None for one in node.args]
                if len(words) != 2 or words[0] not in KINDS or words[1] not in TASKS:
                    raise ValueError(
                        f"{path}:{node.lineno}: {ast.unparse(node)} names no kind and task of tests/kinds.py"
                    )
                yield str(words[0]), str(words[1])


def table(tests: Path) -> str:
    """The table, in Markdown."""
    found = set(covered(tests))
    rows = [["", *TASKS], ["---", *[":-:"] * len(TASKS)]]
    rows += [[kind, *("✓" if (kind, task) in found else "" for task in TASKS)] for kind in KINDS]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def page(text: str, tests: Path) -> str:
    """The README's text with the table as it should be."""
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n{table(tests)}\n{_END}{after}"


if __name__ == "__main__":
    README.write_text(page(README.read_text(encoding="utf-8"), Path(__file__).parent), encoding="utf-8")
