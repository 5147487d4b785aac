"""Latent diffusion with BERT as its text encoder: the same pictures as diffusers' pipeline, and transformers' token ids."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import ldmrt
from ldmrt.bundle import Bundle
from ldmrt.errors import BuildError, BundleError
from ldmrt.pipeline import Pipeline
from ldmrt.tokenizer import Tokenizer
from tests.conftest import SIZE, WORDS, _enliven, _write_json
from tests.test_parity import LATENTS, PROMPT, PSNR, generator, psnr, relative

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
TEXTS = [
    "",
    PROMPT,
    "A Painting of a SQUIRREL, eating   a burger!",
    "naïve café — Ünïcode, 猫 and 🐈",
    "[CLS] red [SEP] blue [PAD] [MASK] [UNK]",
    "x" * 120,
    ", ".join(["the big red circle"] * 40),
    "tab\tnew\nline\x00 ­soft don't",
]


def write_bert(folder: Path, words: Iterable[str] = WORDS) -> int:
    """Write a tokenizer like BERT's, and return how many tokens it has."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *",.!'-", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    tokens += [word for word in words if word not in tokens]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    # As in bert-base-uncased: the model's own window is shorter.
    _write_json(folder / "tokenizer_config.json", {"do_lower_case": True, "model_max_length": 512})
    return len(tokens)


def write_text_to_image(folder: Path, *, seed: int, codebook: bool = False) -> None:
    """Write a model like the text-to-image model of latent diffusion, with weights drawn from a seed."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, VQModel
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    vocabulary = write_bert(folder / "tokenizer")
    stage: dict[str, Any] = {
        "block_out_channels": (8, 16, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": SIZE,
        "scaling_factor": 0.6,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first: Any = VQModel(num_vq_embeddings=64, **stage) if codebook else AutoencoderKL(**stage)
        bert: Any = LDMBertModel(
            LDMBertConfig(
                vocab_size=vocabulary,
                d_model=32,
                encoder_layers=2,
                encoder_ffn_dim=64,
                encoder_attention_heads=2,
                head_dim=8,
            )
        )
        unet: Any = UNet2DConditionModel(
            sample_size=SIZE // 8,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=32,
            attention_head_dim=4,
        )
        for module in (first, bert, unet):
            _enliven(module)
        for table in (bert.model.embed_tokens, bert.model.embed_positions):
            torch.nn.init.normal_(table.weight)
    first.save_pretrained(folder / "vqvae")
    bert.save_pretrained(folder / "bert")
    unet.save_pretrained(folder / "unet")
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    ).save_pretrained(folder / "scheduler")  # fmt: skip
    index = {
        "_class_name": "LDMTextToImagePipeline",
        "_diffusers_version": "0.36.0",
        "bert": ["latent_diffusion", "LDMBertModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "tokenizer": ["transformers", "BertTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vqvae": ["diffusers", type(first).__name__],
    }
    _write_json(folder / "model_index.json", index)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-text"
    write_text_to_image(folder, seed=9)
    return folder


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    built: Bundle = ldmrt.build_engines(model, tmp_path_factory.mktemp("text") / "b", dtype="float32")
    return built


def reference(model: Path) -> Any:
    """The pipeline of diffusers. Its folder cannot be opened as a whole: diffusers exports no text encoder of this name."""
    from diffusers import AutoencoderKL, DDIMScheduler, LDMTextToImagePipeline, UNet2DConditionModel, VQModel
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel
    from transformers import BertTokenizer

    classes: dict[str, Any] = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}
    first = classes[json.loads((model / "model_index.json").read_text())["vqvae"][1]]
    parts: dict[str, Any] = {
        "vqvae": first.from_pretrained(model / "vqvae"),
        "bert": LDMBertModel.from_pretrained(model / "bert"),
        "tokenizer": BertTokenizer.from_pretrained(model / "tokenizer"),
        "unet": UNet2DConditionModel.from_pretrained(model / "unet"),
        "scheduler": DDIMScheduler.from_pretrained(model / "scheduler"),
    }
    pipe: Any = LDMTextToImagePipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def close(found: Any, pipe: Any, **asked: Any) -> None:
    """float32 on both sides, sums in another order."""
    decode, latents = pipe.vqvae.decode, []

    def spy(sample: torch.Tensor) -> Any:
        latents.append(sample * pipe.vqvae.config.scaling_factor)
        return decode(sample)

    pipe.vqvae.decode = spy
    expected = pipe(**asked, generator=generator(3), output_type="np").images
    pipe.vqvae.decode = decode
    assert relative(found.latents, latents[0]) < LATENTS
    assert min(psnr(a, b) for a, b in zip(found.images, expected, strict=True)) > PSNR


@pytest.mark.covers("latent diffusion, text to image", "new pictures")
@pytest.mark.parametrize("prompt", [PROMPT, TEXTS[6]], ids=["short", "cut"])
@pytest.mark.parametrize("scale", [1.0, 6.0])
@pytest.mark.filterwarnings("ignore:the prompt is longer:UserWarning")
def test_the_same_pictures_as_diffusers(prompt: str, scale: float, bundle: Bundle, model: Path) -> None:
    asked: dict[str, Any] = {"prompt": prompt, "num_inference_steps": 4, "guidance_scale": scale}
    pipe = Pipeline.from_bundle(bundle.path, "cpu")
    close(pipe(**asked, seed=3, long_prompt="cut", output_type="np"), reference(model), **asked)
    assert bundle.manifest.model.kind == "latent-diffusion"
    assert bundle.manifest.model.tokenizers == {"text_encoder": "tokenizer"}


@pytest.mark.slow  # each half of it is tested with other models
def test_a_codebook_and_another_engine(tmp_path: Path) -> None:
    write_text_to_image(tmp_path / "m", seed=10, codebook=True)
    built = ldmrt.build_engines(tmp_path / "m", tmp_path / "b", dtype="float32", engine="onnxruntime")
    asked: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 3, "guidance_scale": 3.0}
    found = Pipeline.from_bundle(built.path, "cpu")(**asked, seed=3, output_type="np")
    close(found, reference(tmp_path / "m"), **asked)


@pytest.mark.parametrize("folder", ["bert", "unet", "vqvae"])
def test_pickles_are_refused(folder: str, model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "m")
    (weights,) = (copy / folder).glob("*.safetensors")
    weights.unlink()
    (copy / folder / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(BuildError, match=r"has only pytorch_model\.bin, a pickle: .*ldmrt convert") as caught:
        ldmrt.build_engines(copy, tmp_path / "b", dtype="float32")
    assert str(weights) in str(caught.value)  # where the converted file goes
    assert not (tmp_path / "b").exists()


# ---------------------------------------------------------------------------------------------------- the tokenizer


@pytest.mark.parametrize("form", ["vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize("lower", [True, False])
def test_ids_are_those_of_transformers(form: str, lower: bool, tmp_path: Path) -> None:
    from transformers import BertTokenizer

    write_bert(tmp_path / "a", (*WORDS, "Red", "naive", "猫", "##ed"))
    _write_json(tmp_path / "a" / "tokenizer_config.json", {"do_lower_case": lower, "model_max_length": 77})
    theirs: Any = BertTokenizer.from_pretrained(tmp_path / "a")
    folder = tmp_path / "a"
    if form == "tokenizer.json":
        folder = tmp_path / "b"
        theirs.save_pretrained(folder)
        (folder / "vocab.txt").unlink(missing_ok=True)
    ours = Tokenizer.from_folder(folder)
    for text in TEXTS:
        expected = theirs(text, padding="max_length", max_length=77, truncation=True).input_ids
        assert ours.windows(text, 1).ids.tolist() == [expected], text
    assert (ours.model_max_length, ours.bos_id, ours.eos_id, ours.pad_id) == (77, 2, 3, 0)


def test_a_long_prompt_is_cut_at_commas(tmp_path: Path) -> None:
    write_bert(tmp_path)
    windows = Tokenizer.from_folder(tmp_path, model_max_length=77).windows(TEXTS[6])
    comma = 5
    assert len(windows.ids) > 1
    assert all(row[row != 0][-2] == comma for row in windows.ids[:-1])


@pytest.mark.parametrize("damage", ["no [SEP]", "bytes", "shape"])
def test_a_damaged_tokenizer(damage: str, tmp_path: Path) -> None:
    write_bert(tmp_path)
    file = tmp_path / "vocab.txt"
    if damage == "no [SEP]":
        file.write_text(file.read_text().replace("[SEP]", "sep"))
    elif damage == "bytes":
        file.write_bytes(b"\xff\xfe\x00")
    else:
        file.unlink()
        _write_json(tmp_path / "tokenizer.json", {"model": {"type": "WordPiece", "vocab": 3}})
    with pytest.raises(BundleError, match=r"the tokenizer in .* cannot be read"):
        Tokenizer.from_folder(tmp_path)


def test_a_bundle_without_its_vocabulary(bundle: Bundle, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle.path, tmp_path / "b")
    (copy / "tokenizer" / "vocab.txt").write_text("[PAD]\n")
    with pytest.raises(BundleError, match="is damaged"):
        Pipeline.from_bundle(copy, "cpu")
