"""`ldmrt generate`: what it prints where, and what it writes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ldmrt
from ldmrt.image import parse_parameters, read_parameters
from ldmrt.samplers.registry import SAMPLERS

from .conftest import Ended, Run, content, refused


def test_a_picture_is_what_the_pipeline_makes(generate: Run, tiny_bundle: Path) -> None:
    ended = generate(
        "--seed", 7, "--guidance-scale", 3, "--negative-prompt", "a square", "--eta", 0.5, "--clip-skip", 1
    )
    assert ended.code == 0
    assert ended.err == ""
    assert "ldmrt-7.png  64x64  seed 7" in ended.out
    assert all(stage in ended.out for stage in ("load", "encode", "denoise", "decode", "save"))
    pipe = ldmrt.Pipeline.from_bundle(tiny_bundle, "cpu")
    result = pipe("a red circle", "a square", 2, 3.0, seed=7, eta=0.5, clip_skip=1)
    assert np.array_equal(content(Path("ldmrt-7.png")), np.asarray(result.images[0]))


def test_a_picture_says_how_it_was_made(generate: Run) -> None:
    generate("--seed", 7, "--negative-prompt", "a square", "--guidance-scale", 2.5, "--eta", 0.5, "--clip-skip", 1)
    found = parse_parameters(read_parameters("ldmrt-7.png") or "")
    assert found.prompt == "a red circle"
    assert found.negative_prompt == "a square"
    expected = {"Steps": "2", "Seed": "7", "CFG scale": "2.5", "Size": "64x64", "Eta": "0.5", "Clip skip": "2"}
    assert expected.items() <= found.settings.items()


def test_samplers_have_the_names_that_others_know(generate: Run, run: Run, tiny_bundle: Path) -> None:
    ended = generate("--seed", 7, "--sampler", "DPM++ 2m_SDE Karras", "--guidance-rescale", 0.5, "--json")
    assert json.loads(ended.out)["settings"]["sampler"] == "dpm++ 2m sde karras"
    found = parse_parameters(read_parameters("ldmrt-7.png") or "").settings
    assert (found["Sampler"], found["Guidance rescale"]) == ("DPM++ 2M SDE Karras", "0.5")
    pipe = ldmrt.Pipeline.from_bundle(tiny_bundle, "cpu")
    result = pipe("a red circle", "", 2, seed=7, sampler="dpmpp_2m_sde_karras", guidance_rescale=0.5)
    assert np.array_equal(content(Path("ldmrt-7.png")), np.asarray(result.images[0]))
    shown = " ".join(run("generate", "--help").out.split())
    assert all(name in shown for name in SAMPLERS)


def test_names_that_we_choose_are_never_taken(generate: Run) -> None:
    Path("ldmrt-7.png").write_text("mine")
    assert "ldmrt-7-1.png" in generate("--seed", 7).out
    assert "ldmrt-7-2.png" in generate("--seed", 7).out
    assert Path("ldmrt-7.png").read_text() == "mine"


def test_a_file_is_overwritten(generate: Run) -> None:
    Path("a.png").write_text("old")
    generate("--seed", 1, "--out", "a.png")
    assert content(Path("a.png")).shape == (64, 64, 3)
    assert [path.name for path in Path().iterdir()] == ["a.png"]


@pytest.mark.parametrize("name", ["a.jpg", "a.WEBP", "b.jpeg"])
def test_the_suffix_chooses_the_format(generate: Run, name: str) -> None:
    assert generate("--seed", 1, "--out", name).code == 0
    assert parse_parameters(read_parameters(name) or "").settings["Seed"] == "1"


def test_several_pictures(generate: Run) -> None:
    # The bundle draws two at a time: two batches, the second of one.
    generate("--seed", 7, "--num-images", 3, "--out", "a.png")
    assert sorted(path.name for path in Path().iterdir()) == ["a-0.png", "a-1.png", "a-2.png"]
    generate("--seed", 8, "--out", "one.png")
    assert np.allclose(content(Path("a-1.png")).astype(int), content(Path("one.png")), atol=1)
    assert parse_parameters(read_parameters("a-2.png") or "").settings["Seed"] == "9"


@pytest.mark.parametrize("folder", ["there", "not/yet/"])
def test_a_folder(generate: Run, folder: str) -> None:
    Path("there").mkdir()
    generate("--seed", 7, "--num-images", 2, "--out", folder)
    assert sorted(path.name for path in Path(folder).iterdir()) == ["ldmrt-7.png", "ldmrt-8.png"]


def test_generate_json(generate: Run, tiny_bundle: Path) -> None:
    ended = generate("--num-images", 2, "--json")
    assert ended.err == ""
    document = json.loads(ended.out)
    first, second = document["images"]
    assert second["seed"] == first["seed"] + 1 == document["settings"]["seed"] + 1
    for image in (first, second):
        pixels = content(Path(image["path"]))
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == image["sha256"]
        assert pixels.shape == (image["height"], image["width"], 3)
    assert set(document["timings"]) >= {"load", "tokenize", "encode", "prepare", "denoise", "decode", "save", "total"}
    assert document["timings"]["total"] >= document["timings"]["load"] > 0
    settings = {
        key: document["settings"][key] for key in ("engine", "dtype", "device", "num_inference_steps", "bundle")
    }
    assert settings == {
        "engine": "torch",
        "dtype": "float32",
        "device": "cpu",
        "num_inference_steps": 2,
        "bundle": str(tiny_bundle.resolve()),
    }


def test_variations_go_on_over_batches(generate: Run) -> None:
    """Three pictures, two at a time."""
    ended = generate(
        "--seed", 7, "--variation-seed", 70, "--variation-strength", 0.2, "--num-images", 3, "--out", "v.png", "--json"
    )
    document = json.loads(ended.out)
    assert [image["seed"] for image in document["images"]] == [7, 7, 7]
    assert len({image["sha256"] for image in document["images"]}) == 3
    assert (document["settings"]["variation_seed"], document["settings"]["variation_strength"]) == (70, 0.2)
    settings = [parse_parameters(read_parameters(f"v-{number}.png") or "").settings for number in range(3)]
    assert [one["Variation seed"] for one in settings] == ["70", "71", "72"]
    assert {one["Variation seed strength"] for one in settings} == {"0.2"}


def test_prompts_of_a_file(run: Run, generate: Run, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five pictures, two at a time, stopped after three: the rest is made later, each as it would be alone."""
    Path("prompts.jsonl").write_text(
        '{"prompt": "a red circle", "seed": 7}\n\n{"prompt": "a blue square"}\n'
        '{"prompt": "the big circle", "negative_prompt": "blue", "seed": 3}\n{"prompt": "a photo"}\n{"prompt": "on"}\n'
    )

    def bulk(*args: object) -> Ended:
        common = ("--engines", tiny_bundle, "--steps", 2, "--device", "cpu", "--seed", 40)
        return run("generate", "--prompts", "prompts.jsonl", "--out", "all", *common, *args)

    with monkeypatch.context() as patch:
        saved: list[Path] = []

        def stop(image: Any, path: Path, **options: Any) -> None:
            if len(saved) == 3:
                raise KeyboardInterrupt
            saved.append(path)
            save(image, path, **options)

        save = ldmrt.image.save
        patch.setattr(ldmrt.image, "save", stop)
        assert bulk().code == 130
    with Path("all/metadata.jsonl").open("a") as file:
        file.write('{"file_name": "0000')  # and killed while it wrote
    names = ["000001-0.png", "000003-0.png", "000004-0.png", "000005-0.png", "000006-0.png"]
    document = json.loads(bulk("--json").out)
    assert [Path(image["path"]).name for image in document["images"]] == names[3:]
    assert bulk().out.startswith("0 pictures made, 5 were there: all\n")
    records = [json.loads(line) for line in Path("all/metadata.jsonl").read_text().splitlines()]
    assert (
        [record["file_name"] for record in records] == names == sorted(path.name for path in Path("all").glob("*.png"))
    )
    # A line that says no seed counts on from --seed.
    assert [record["seed"] for record in records] == [7, 41, 3, 43, 44]
    assert [record["negative_prompt"] for record in records] == ["", "", "blue", "", ""]
    for record in records:
        pixels = content(Path("all") / record["file_name"])
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == record["sha256"]
        text = ("--negative-prompt", record["negative_prompt"], "--seed", record["seed"], "--out", "one.png")
        assert run("generate", record["prompt"], "--engines", tiny_bundle, "--steps", 2, *text).code == 0
        assert np.allclose(pixels.astype(int), content(Path("one.png")), atol=1)
        parameters = [read_parameters(path) for path in (Path("all") / record["file_name"], Path("one.png"))]
        assert parameters[0] == parameters[1]
    Path("all/000004-0.png").unlink()
    assert bulk().out.startswith("1 pictures made, 4 were there")
    refused(
        bulk("--guidance-scale", 3), "000001-0.png was made with guidance_scale '7.5', now it is '3.0'; choose another"
    )
    refused(generate("--prompts", "prompts.jsonl", "--out", "all"), "given twice")
    refused(run("generate", "--prompts", "prompts.jsonl", "--engines", tiny_bundle), "give --out DIR")
    refused(bulk("--variation-strength", 0.5), "variations are of one picture")


def test_generate_within_a_memory_budget(generate: Run) -> None:
    plain, tight = (
        json.loads(generate("--seed", 3, "--json", *more).out) for more in ([], ["--memory-budget", "1 GB"])
    )
    assert tight["images"][0]["sha256"] == plain["images"][0]["sha256"]
    assert "memory_plan" not in plain
    assert tight["memory_plan"]["budget"] == 10**9 > tight["memory_plan"]["needed"] > 0
    assert tight["memory_plan"]["staged"] == []


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--memory-budget", "much"], ["--memory-budget is 'much', expected", "6GB"]),
        (["--memory-budget", "1KB"], ["--memory-budget is 0.0 MB, and the stage", "raise it"]),
        (["--steps", "0"], ["--steps is 0, expected"]),
        (["--steps", "100000"], ["--steps is 100000, expected"]),
        (["--guidance-scale", "-1"], ["--guidance-scale is -1", "expected"]),
        (["--guidance-scale", "nan"], ["--guidance-scale is nan", "expected"]),
        (["--guidance-scale", "inf"], ["--guidance-scale is inf", "expected"]),
        (["--seed", "-1"], ["--seed is -1, expected"]),
        (["--seed", str(2**64)], ["--seed is", "expected"]),
        (["--num-images", "0"], ["--num-images is 0, expected"]),
        (["--num-images", "100000"], ["at most", "fewer"]),
        (["--eta", "2"], ["--eta is 2", "expected"]),
        (["--clip-skip", "99"], ["--clip-skip is 99, expected"]),
        (["--sampler", "magic"], ["--sampler is 'magic', expected", "dpm++ 2m", "karras"]),
        (["--guidance-rescale", "2"], ["--guidance-rescale is 2", "expected"]),
        (["--size", "100x64"], ["width is 100", "multiple of 8"]),
        (["--size", "128x64"], ["no engine for 128x64", "64x64", "build-engines"]),
        (["--engine", "onnxruntime"], ["no onnxruntime engine", "build-engines"]),
        (["--dtype", "float16"], ["float16", "build"]),
        (["--device", "cuda:99"], ["cuda:99", "use cpu"]),
        (["--out", "a.gif"], ["a.gif", ".png"]),
        (["--out", "no/where/a.png"], ["does not exist", "create it"]),
        (["--out", "file/a.png"], ["is a file"]),
        (["--out", "file/folder/"], ["is a file"]),
        (["--out", "noformat"], ["noformat", "expected"]),
        (["--engines", "nowhere"], ["no such folder", "build-engines"]),
    ],
)
def test_generate_refuses(generate: Run, args: list[str], words: list[str]) -> None:
    Path("file").write_text("keep me")
    refused(generate(*args), *words)
    assert [path.name for path in Path().iterdir()] == ["file"]
    assert Path("file").read_text() == "keep me"


def test_the_output_is_checked_before_anything_is_loaded(generate: Run) -> None:
    refused(generate("--engines", "nowhere", "--out", "no/where/a.png"), "does not exist")


def test_a_prompt_that_is_cut_is_warned_of(generate: Run) -> None:
    ended = generate("--negative-prompt", "red circle " * 99, "--long-prompt", "cut", "--seed", 1)
    assert ended.code == 0
    assert ended.err.startswith("ldmrt: warning: the negative prompt is longer")
    assert ended.err.count("\n") == 1


def test_the_environment(generate: Run, run: Run, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setenv("LDMRT_THREADS", "3")
    monkeypatch.setenv("LDMRT_DEVICE", "cuda:99")
    assert generate("--seed", 1).code == 0  # with --device cpu
    assert threads == [3]
    refused(run("generate", "a", "--engines", tiny_bundle), "cuda:99")
    monkeypatch.setenv("LDMRT_DEVICE", "gpu")
    refused(generate(), "LDMRT_DEVICE is 'gpu', expected")


def test_a_prompt_is_for_models_that_read_one(
    run: Run, tiny_bundle: Path, tiny_model_ldm: Path, tmp_path: Path
) -> None:
    code, _, error = run("generate", "--engines", tiny_bundle, "--device", "cpu")
    assert code == 2
    wanted = 'it is missing, and tiny draws what a text says; give one, "" for none, or --prompts FILE'
    assert wanted in " ".join(error.replace("│", " ").split())
    ldmrt.build_engines(tiny_model_ldm, tmp_path / "b", dtype="float32")
    out = tmp_path / "o.png"
    assert run("generate", "--engines", tmp_path / "b", "--steps", 1, "--out", out, "--device", "cpu").code == 0
    assert out.is_file()
    refused(run("generate", "a face", "--engines", tmp_path / "b", "--device", "cpu"), "leave the prompt empty")


def test_generate_with_controlnets(run: Run, tiny_bundle: Path, tiny_bundle_controlled: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("a.png", "b.jpg")):
        Image.fromarray(np.full((40, 70, 3), 80 * number + 40, dtype=np.uint8)).save(tmp_path / name)
    images = [part for name in ("a.png", "b.jpg") for part in ("--control-image", tmp_path / name)]
    common = [
        "generate",
        "a circle",
        "--steps",
        2,
        "--device",
        "cpu",
        "--seed",
        1,
        "--out",
        tmp_path / "o.png",
        "--json",
    ]
    found = []
    for args in ([], images, [*images, "--control-scale", 0.5], [*images, "--control-end", 0.5, "--control-end", 1]):
        ended = run(*common, "--engines", tiny_bundle_controlled, *args)
        assert ended.code == 0, ended.err
        found.append(json.loads(ended.out))
    assert len({document["images"][0]["sha256"] for document in found}) == 4
    assert [document["settings"]["controlnets"] for document in found] == [[], *[["edges", "depth"]] * 3]
    assert found[2]["settings"]["controlnet_scale"] == 0.5
    assert found[3]["settings"]["control_end"] == [0.5, 1.0]
    settings = parse_parameters(read_parameters(tmp_path / "o.png") or "").settings
    assert settings["ControlNets"] == "edges, depth"
    refused(run(*common, "--engines", tiny_bundle, *images), "this bundle has no ControlNet")
    refused(run(*common, "--engines", tiny_bundle_controlled, "--control-scale", 1), "give --control-image")
    refused(
        run(*common, "--engines", tiny_bundle, "--control-image", tmp_path / "none.png"),
        "none.png cannot be read as a picture",
    )
    assert "ControlNets: edges, depth" in run("inspect", tiny_bundle_controlled).out


def test_generate_with_loras(generate: Run, tiny_model: Path, tmp_path: Path, write_lora: Callable[..., Path]) -> None:
    one = write_lora(tmp_path / "one.safetensors", tiny_model, seed=1)
    two = write_lora(tmp_path / "two.safetensors", tiny_model, seed=2)
    found = {}
    cases: dict[str, list[object]] = {"without": [], "one": [one], "both": [one, f"{two}:0.5"]}
    for name, args in cases.items():
        ended = generate(
            "--seed", 1, "--out", f"{name}.png", "--json", *(part for arg in args for part in ("--lora", arg))
        )
        assert ended.code == 0, ended.err
        found[name] = json.loads(ended.out)
    assert found["without"]["settings"]["loras"] == {}
    assert found["both"]["settings"]["loras"] == {"one": 1.0, "two": 0.5}
    assert len({document["images"][0]["sha256"] for document in found.values()}) == 3
    settings = parse_parameters(read_parameters(tmp_path / "both.png") or "").settings
    assert settings["LoRAs"] == "one: 1, two: 0.5"
    refused(generate("--lora", "none.safetensors"), "no such LoRA: none.safetensors")
