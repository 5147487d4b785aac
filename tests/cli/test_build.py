"""`ldmrt build-engines`: what it prints and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ldmrt
from ldmrt.bundle import Bundle
from ldmrt.cli.build import next_words
from ldmrt.manifest import UpscalingRecord

from .conftest import Run, refused


def test_build(run: Run, tiny_model: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    out = shutil.copytree(tiny_bundle, tmp_path / "my bundle")
    ended = run("build-engines", tiny_model, "--out", out, "--dtype", "float32")
    assert ended.code == 0
    assert ended.err == ""
    for component in ("text_encoder", "context", "schedule", "step", "decoder", "encoder"):
        assert component in ended.out
    assert ended.out.endswith(f"ldmrt generate \"a prompt\" --engines '{out}'\n")


def test_build_json(run: Run, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def build(*args: object, on_progress: Callable[[str, int, int], None], **options: object) -> Bundle:
        on_progress("unet: compiling", 1, 9)
        given.update(options, args=args)
        return Bundle.open(tiny_bundle)

    monkeypatch.setattr(ldmrt, "build_engines", build, raising=False)
    sizes, target = ["--size", "512x768", "--size", "64X64"], ["--target", "sm_89"]
    loras = ["--lora", "a.safetensors", "--lora", "b.safetensors:0.5"]
    ended = run(
        "build-engines",
        "m",
        "--out",
        "o",
        *sizes,
        "--batch",
        2,
        "--batch",
        3,
        "--dtype",
        "bfloat16",
        *target,
        *loras,
        "--controlnet",
        "edges",
        "--optimization-level",
        4,
        "--workspace",
        2,
        "--base",
        "b",
        "--vae",
        "owner/v",
        "--variant",
        "fp16",
        "--revision",
        "r",
        "--config",
        "m.yaml",
        "--tokenizer",
        "t",
        "--decoder-tile",
        256,
        "--plugins",
        "--json",
    )
    assert given == {
        "args": (Path("m"), Path("o")),
        "engine": "auto",
        "sizes": [(512, 768), (64, 64)],
        "batch_sizes": [2, 3],
        "dtype": "bfloat16",
        "optimization_level": 4,
        "workspace": 2 << 20,
        "refit": False,
        "weight_streaming": False,
        "plugins": True,
        "targets": ["sm_89"],
        "loras": [(Path("a.safetensors"), 1.0), (Path("b.safetensors"), 0.5)],
        "base": Path("b"),
        "vae": Path("owner/v"),
        "variant": "fp16",
        "revision": "r",
        "controlnets": [Path("edges")],
        "config": Path("m.yaml"),
        "tokenizer": Path("t"),
        "decoder_tile": 256,
    }
    assert ended.err == ""
    document = json.loads(ended.out)
    assert Path(document["bundle"]) == tiny_bundle.resolve()
    assert {engine["key"] for engine in document["engines"]} == {
        engine.key for engine in Bundle.open(tiny_bundle).manifest.engines
    }
    run("build-engines", "m", "--out", "o")
    assert (given["sizes"], given["batch_sizes"], given["loras"]) == (None, (1,), ())


def test_build_refuses(run: Run, tmp_path: Path) -> None:
    refused(run("build-engines", tmp_path, "--out", tmp_path / "out"), "not a model folder", "model_index.json")


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, '"a prompt" '),
        ({"inpainting": True}, '"a prompt" --image FILE --mask FILE '),
        ({"tokenizers": {}}, ""),
        ({"tokenizers": {}, "upscaling": UpscalingRecord()}, "--image FILE "),
    ],
)
def test_the_next_command_is_one_that_works(tiny_bundle: Path, changes: dict[str, Any], wanted: str) -> None:
    model = Bundle.open(tiny_bundle).manifest.model
    assert next_words(model.model_copy(update=changes)) == wanted
