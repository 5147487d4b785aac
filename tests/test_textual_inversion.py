"""Textual inversion: the same pictures as with diffusers' `load_textual_inversion`, and what a file must hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldmrt.cli import app
from ldmrt.cli.options import parse_embedding
from ldmrt.errors import BadRequest, EngineMismatch
from ldmrt.pipeline import Pipeline
from tests.test_parity import LATENTS, generator, reference_pipeline, relative

QUICK: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 5.0, "seed": 3, "output_type": "latent"}
WORD = "<my-cat>"
PROMPT = f"a photo of {WORD} on the green square, highly detailed"


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3.0 * torch.randn(*shape, generator=generator(seed))


def theirs(pipe: Any, prompt: str, negative: str) -> torch.Tensor:
    made: torch.Tensor = pipe(
        prompt,
        negative_prompt=negative,
        num_inference_steps=3,
        guidance_scale=5.0,
        generator=generator(3),
        output_type="latent",
    ).images
    return made


FORMS: dict[str, dict[str, torch.Tensor]] = {
    "diffusers": {"<my-cat>": vectors(32)},
    "diffusers, several vectors": {"<my-cat>": vectors(4, 32)},
    "AUTOMATIC1111": {"emb_params": vectors(1, 32)},
    "AUTOMATIC1111, several vectors, half": {"emb_params": vectors(3, 32).half()},
}


@pytest.mark.covers("Stable Diffusion 1.x", "textual inversion")
@pytest.mark.parametrize("form", FORMS)
def test_the_same_pictures_as_diffusers(form: str, tiny_model: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "cat.safetensors"
    save_file(FORMS[form], path)
    reference = reference_pipeline(tiny_model)
    reference.load_textual_inversion(str(path), token=WORD)
    pipe = Pipeline.from_bundle(tiny_bundle)
    before = pipe(PROMPT, **QUICK).latents
    assert pipe.load_textual_inversion(path, None if form.startswith("diff") else "<my-cat>") == "<my-cat>"
    assert pipe.textual_inversions == ("<my-cat>",)
    for prompt, negative in ((PROMPT, ""), ("a red circle", "a <my-cat>, small")):
        expected = theirs(reference, prompt, negative)
        assert relative(pipe(prompt, negative, **QUICK).latents, expected) < LATENTS
    assert relative(pipe(PROMPT, **QUICK).latents, before) > 100 * LATENTS
    # Text of every letter is untouched by what has taken the places of some.
    rest = "The quick Brown fox JUMPS over a lazy dog: ABCDEFGHIJKLMNOPQRSTUVWXYZ \u00c0\u00f5"
    with_it = pipe(rest, **QUICK).latents
    pipe.unload_textual_inversion("<my-cat>")
    assert torch.equal(pipe(rest, **QUICK).latents, with_it)
    assert torch.equal(pipe(PROMPT, **QUICK).latents, before)


@pytest.mark.covers("Stable Diffusion 2.x", "textual inversion")
def test_a_text_encoder_of_another_kind(tiny_model_v: Path, tiny_bundle_v: Path, tmp_path: Path) -> None:
    path = tmp_path / "cat.safetensors"
    save_file({WORD: vectors(2, 48)}, path)
    reference = reference_pipeline(tiny_model_v)
    reference.load_textual_inversion(str(path))
    pipe = Pipeline.from_bundle(tiny_bundle_v)
    pipe.load_textual_inversion(path)
    assert relative(pipe(PROMPT, "small", **QUICK).latents, theirs(reference, PROMPT, "small")) < LATENTS


@pytest.mark.covers("Stable Diffusion XL", "textual inversion")
def test_both_text_encoders_of_xl(tiny_model_xl: Path, tiny_bundle_xl: Path, tmp_path: Path) -> None:
    held = {"clip_l": vectors(2, 32), "clip_g": vectors(2, 40, seed=1)}
    path = tmp_path / "<my-cat>.safetensors"
    save_file(held, path)
    reference = reference_pipeline(tiny_model_xl)
    for name, tokenizer, encoder in (
        ("clip_l", "tokenizer", "text_encoder"),
        ("clip_g", "tokenizer_2", "text_encoder_2"),
    ):
        reference.load_textual_inversion(
            held[name],
            token=WORD,
            tokenizer=getattr(reference, tokenizer),
            text_encoder=getattr(reference, encoder),
        )
    pipe = Pipeline.from_bundle(tiny_bundle_xl)
    assert pipe.load_textual_inversion(path) == "<my-cat>"
    expected = theirs(reference, PROMPT, "small <my-cat>")
    assert relative(pipe(PROMPT, "small <my-cat>", **QUICK).latents, expected) < LATENTS


def test_a_refiner_takes_its_part(tiny_bundle_refiner: Path, tmp_path: Path) -> None:
    path = tmp_path / "cat.safetensors"
    save_file({"clip_l": vectors(2, 32), "clip_g": vectors(2, 40)}, path)
    pipe = Pipeline.from_bundle(tiny_bundle_refiner)
    latents = torch.zeros(1, 4, 8, 8)
    before = pipe("a cat", image=latents, strength=0.9, **QUICK).latents
    pipe.load_textual_inversion(path)
    assert relative(pipe("a cat", image=latents, strength=0.9, **QUICK).latents, before) > 100 * LATENTS


def test_words_in_a_prompt(tiny_bundle: Path) -> None:
    tokenizer = Pipeline.from_bundle(tiny_bundle).tokenizer
    assert tokenizer is not None
    plain = {text: tokenizer.encode(text) for text in ("a ", "circle", "scatter", "cats", " on")}
    ids = tokenizer.spare_ids
    x, y, z, big = ids[:4]
    tokenizer.words = {"cat": ids[:2], "<cat>": ids[2:3], "Big Cat": ids[3:4]}
    assert tokenizer.encode("a Cat on") == [*plain["a "], x, y, *plain[" on"]]
    assert tokenizer.encode("circle,cat") == [*tokenizer.encode("circle,"), x, y]
    assert tokenizer.encode("<cat>s<CAT>") == [z, *tokenizer.encode("s"), z]
    assert tokenizer.encode("big cat cat") == [big, x, y]
    assert tokenizer.encode("scatter cats") == [*plain["scatter"], *plain["cats"]]
    cut = tokenizer.windows("cat " * 40, 1)
    assert cut.ids[0, 1:76].tolist() == [x, y] * 37 + [x]
    assert cut.dropped == "cat cat cat "
    first, second = tokenizer.windows("cat " * 40).ids.tolist()
    assert first[1:76] == [*[x, y] * 37, tokenizer.eos_id]
    assert second[1:8] == [*[x, y] * 3, tokenizer.eos_id]
    tokenizer.words = {}
    assert tokenizer.encode("circle") == plain["circle"]


def test_several_at_once(tiny_bundle: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_bundle(tiny_bundle)
    for number, count in enumerate((3, 1)):
        save_file({"emb_params": vectors(count, 32, seed=number)}, tmp_path / f"word{number}.safetensors")
    alone = []
    for number in (0, 1):
        pipe.load_textual_inversion(tmp_path / f"word{number}.safetensors")
        alone.append(pipe(f"a word{number}", **QUICK).latents)
        pipe.unload_textual_inversion(f"word{number}")
    for number in (0, 1):
        pipe.load_textual_inversion(tmp_path / f"word{number}.safetensors")
    for number in (0, 1):
        assert torch.equal(pipe(f"a word{number}", **QUICK).latents, alone[number])
    save_file({"emb_params": vectors(80, 32)}, tmp_path / "long.safetensors")
    with pytest.raises(BadRequest, match="has 80 vectors, and there is room for 74 more of 78: unload others first"):
        pipe.load_textual_inversion(tmp_path / "long.safetensors")
    with pytest.raises(BadRequest, match="an embedding of that name is loaded"):
        pipe.load_textual_inversion(tmp_path / "word0.safetensors", "WORD1")
    with pytest.raises(BadRequest, match="the embeddings loaded are: word0, word1"):
        pipe.unload_textual_inversion("word2")


@pytest.mark.parametrize(
    ("bundle", "held", "message"),
    [
        (
            "tiny_bundle",
            {"emb_params": vectors(2, 48)},
            r"emb_params is \(2, 48\) float32, expected \(32,\) or \(vectors, 32\)",
        ),
        ("tiny_bundle", {"emb_params": vectors(2, 3, 32)}, r"emb_params is \(2, 3, 32\)"),
        ("tiny_bundle", {"emb_params": torch.ones(2, 32, dtype=torch.int64)}, r"\(2, 32\) int64, expected"),
        ("tiny_bundle", {"emb_params": torch.full((1, 32), torch.nan)}, "holds NaN or infinite values"),
        ("tiny_bundle", {}, r"holds nothing, expected one tensor \(vectors, 32\)"),
        (
            "tiny_bundle",
            {"clip_l": vectors(1, 32), "clip_g": vectors(1, 40)},
            r"holds clip_\w \(1, \d\d\), clip_\w \(1, \d\d\), expected one tensor \(vectors, 32\): take the embedding that was made",
        ),
        (
            "tiny_bundle_xl",
            {"emb_params": vectors(2, 32)},
            r"holds emb_params \(2, 32\), expected clip_l \(vectors, 32\) and clip_g \(vectors, 40\)",
        ),
        ("tiny_bundle_xl", {"clip_l": vectors(1, 32), "clip_g": vectors(2, 40)}, "vectors, expected as many of each"),
        (
            "tiny_bundle_xl",
            {"clip_l": vectors(1, 40), "clip_g": vectors(1, 40)},
            r"clip_l is \(1, 40\) float32, expected \(32,\)",
        ),
    ],
)
def test_what_does_not_fit(
    bundle: str, held: dict[str, torch.Tensor], message: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / "cat.safetensors"
    save_file(held, path)
    pipe = Pipeline.from_bundle(request.getfixturevalue(bundle))
    with pytest.raises(BadRequest, match=message) as caught:
        pipe.load_textual_inversion(path)
    assert "\n" not in str(caught.value)
    assert not pipe.textual_inversions


def test_pickles_are_converted_first(tiny_bundle: Path, tmp_path: Path) -> None:
    """AUTOMATIC1111's, with and without torch's own container, and diffusers'."""
    from ldmrt.export.convert import convert

    pipe = Pipeline.from_bundle(tiny_bundle)
    held = vectors(2, 32)
    with pytest.raises(
        BadRequest,
        match=r"is not a \.safetensors file: .* convert it first: ldmrt convert \S+cat.pt \S+cat.safetensors",
    ):
        pipe.load_textual_inversion(tmp_path / "cat.pt")
    container = torch.nn.ParameterDict({"*": torch.nn.Parameter(held)})
    about = {"string_to_token": {"*": 265}, "name": "cat", "step": 7}
    for content, key in (
        ({**about, "string_to_param": {"*": held}}, "emb_params"),
        ({**about, "string_to_param": container}, "emb_params"),
        ({"<cat>": held}, "<cat>"),
    ):
        torch.save(content, tmp_path / "cat.pt")
        convert(tmp_path / "cat.pt", tmp_path / "cat.safetensors")
        found = load_file(tmp_path / "cat.safetensors")
        assert list(found) == [key]
        assert torch.equal(found[key], held)
    assert pipe.load_textual_inversion(tmp_path / "cat.safetensors") == "<cat>"


def test_where_no_embedding_can_be(tiny_bundle_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineMismatch, match="use the torch engine"):
        Pipeline.from_bundle(tiny_bundle_onnx, engine="onnxruntime").load_textual_inversion(
            tmp_path / "cat.safetensors"
        )
    with pytest.raises(BadRequest, match="no such embedding"):
        Pipeline.from_bundle(tiny_bundle_onnx).load_textual_inversion(tmp_path / "cat.safetensors")


def test_generate(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cat.safetensors"
    save_file({"emb_params": vectors(2, 32)}, path)
    assert parse_embedding(str(path)) == (path, None)
    assert parse_embedding(f"{path}:<my:cat>") == (path, "<my:cat>")
    command = ["generate", "a <c>", "--engines", tiny_bundle, "--steps", 2, "--seed", 1, "--device", "cpu"]
    options = ["--embedding", f"{path}:<c>", "--out", tmp_path / "o.png", "--json"]
    with pytest.raises(SystemExit) as ended:
        app([str(word) for word in [*command, *options]], prog_name="ldmrt")
    assert not ended.value.code
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["embeddings"] == ["<c>"]
    pipe = Pipeline.from_bundle(tiny_bundle, "cpu")
    pipe.load_textual_inversion(path, "<c>")
    import hashlib

    expected = pipe("a <c>", num_inference_steps=2, seed=1).images[0]
    assert found["images"][0]["sha256"] == hashlib.sha256(expected.tobytes()).hexdigest()
