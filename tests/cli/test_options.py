"""What options mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldmrt.cli.options import parse_lora


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("style.safetensors", "style.safetensors", 1.0),
        ("a/style.safetensors:0.8", "a/style.safetensors", 0.8),
        ("style.safetensors:-1", "style.safetensors", -1.0),
        ("a:1/style.safetensors", "a:1/style.safetensors", 1.0),
        ("a:1/style.safetensors:.5", "a:1/style.safetensors", 0.5),
    ],
)
def test_how_a_lora_is_named(text: str, path: str, scale: float) -> None:
    assert parse_lora(text) == (Path(path), scale)
