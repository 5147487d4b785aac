"""Small random models in the diffusers layout, and the bundles built from them; each is made once, by the first test that asks."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ldmrt
from ldmrt.bundle import Bundle

SIZE = 64  # pixels; 8 x 8 latents
WORDS = (
    "a",
    "the",
    "red",
    "blue",
    "green",
    "circle",
    "square",
    "on",
    "of",
    "white",
    "background",
    "photo",
    "small",
    "big",
    "left",
    "right",
    "highly",
    "detailed",
)
START, END = "<|startoftext|>", "<|endoftext|>"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors are fastest on one thread, and sums are always taken in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like Stable Diffusion 1.5's, with random weights: 64 x 64 pixels, 77 tokens."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_model(folder, version=1, seed=0)
    return folder


@pytest.fixture(scope="session")
def tiny_model_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like Stable Diffusion 2.1's: v-prediction, linear projections, upcast attention, heads by level, padded with `!`."""
    folder = tmp_path_factory.mktemp("models") / "tiny-v"
    write_model(folder, version=2, seed=1)
    return folder


@pytest.fixture(scope="session")
def tiny_model_xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like Stable Diffusion XL base's: two text encoders, pooled embedding, time ids."""
    folder = tmp_path_factory.mktemp("models") / "tiny-xl"
    write_model_xl(folder, seed=2)
    return folder


@pytest.fixture(scope="session")
def tiny_model_inpainting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like Stable Diffusion 1.5's for inpainting: a U-Net of nine channels."""
    folder = tmp_path_factory.mktemp("models") / "tiny-inpainting"
    write_model(folder, version=1, seed=3, inpainting=True)
    return folder


@pytest.fixture(scope="session")
def tiny_model_xl_inpainting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like Stable Diffusion XL's for inpainting."""
    folder = tmp_path_factory.mktemp("models") / "tiny-xl-inpainting"
    write_model_xl(folder, seed=5, inpainting=True)
    return folder


@pytest.fixture(scope="session")
def tiny_model_refiner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like Stable Diffusion XL refiner's: the second text encoder alone, an aesthetic score. Its VAE is `tiny_model_xl`'s."""
    folder = tmp_path_factory.mktemp("models") / "tiny-refiner"
    write_model_xl(folder, seed=2, refiner=True)
    return folder


@pytest.fixture(scope="session")
def tiny_bundle_refiner(tiny_model_refiner: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model_refiner` on the torch engine in float32, for one and two images. Do not write to it."""
    return _built(tiny_model_refiner, tmp_path_factory, "torch")


@pytest.fixture(scope="session")
def tiny_model_ldm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like that of the latent diffusion model of CelebA-HQ: no text, a first stage with a codebook, 16 x 16 latents."""
    folder = tmp_path_factory.mktemp("models") / "tiny-ldm"
    write_ldm(folder, seed=4)
    return folder


@pytest.fixture(scope="session")
def tiny_bundle_inpainting(
    tiny_model_inpainting: Path, tiny_controlnets: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """`tiny_model_inpainting` and the first of `tiny_controlnets` in float32, for one and two images. Do not write to it."""
    out = tmp_path_factory.mktemp("bundles") / "tiny-inpainting"
    options: dict[str, Any] = {"dtype": "float32", "batch_sizes": (1, 2), "controlnets": tiny_controlnets[:1]}
    bundle: Bundle = ldmrt.build_engines(tiny_model_inpainting, out, **options)
    return bundle.path


@pytest.fixture(scope="session")
def tiny_controlnets(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two ControlNets for `tiny_model`, `edges` and `depth`, with random weights."""
    folder = tmp_path_factory.mktemp("controlnets")
    return [write_controlnet(folder / name, tiny_model, seed) for seed, name in enumerate(("edges", "depth"), 10)]


@pytest.fixture(scope="session")
def tiny_controlnet_xl(tiny_model_xl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ControlNet for `tiny_model_xl`, with random weights."""
    return write_controlnet(tmp_path_factory.mktemp("controlnets") / "canny-xl", tiny_model_xl, 12)


@pytest.fixture(scope="session")
def tiny_bundle_controlled(
    tiny_model: Path, tiny_bundle: Path, tiny_controlnets: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A copy of `tiny_bundle` with `tiny_controlnets` added, for one and two images. Do not write to it."""
    out = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("bundles") / "tiny-controlled")
    options: dict[str, Any] = {"dtype": "float32", "batch_sizes": (1, 2)}
    bundle: Bundle = ldmrt.build_engines(tiny_model, out, controlnets=tiny_controlnets, **options)
    return bundle.path


@pytest.fixture(scope="session")
def write_model_ldm() -> Callable[..., None]:
    """`write_model_ldm(folder, seed=0, codebook=True)` writes such a model."""
    return write_ldm


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model` on the torch engine in float32, for one and two images. Do not write to it."""
    return _built(tiny_model, tmp_path_factory, "torch")


@pytest.fixture(scope="session")
def tiny_bundle_v(tiny_model_v: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model_v` on the torch engine in float32, for one and two images. Do not write to it."""
    return _built(tiny_model_v, tmp_path_factory, "torch")


@pytest.fixture(scope="session")
def tiny_bundle_xl(tiny_model_xl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model_xl` on the torch engine in float32, for one and two images. Do not write to it."""
    return _built(tiny_model_xl, tmp_path_factory, "torch")


@pytest.fixture(scope="session")
def tiny_bundle_xl_onnx(tiny_model_xl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model_xl` on ONNX Runtime, for one image. Do not write to it."""
    pytest.importorskip("onnxruntime")
    return _built(tiny_model_xl, tmp_path_factory, "onnxruntime", (1,))


@pytest.fixture(scope="session")
def tiny_bundle_onnx(tiny_model: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `tiny_bundle` with engines for ONNX Runtime added, for one image. Do not write to it."""
    pytest.importorskip("onnxruntime")
    out = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("bundles") / "tiny-both")
    bundle: Bundle = ldmrt.build_engines(tiny_model, out, engine="onnxruntime", dtype="float32")
    return bundle.path


@pytest.fixture(scope="session")
def tiny_bundle_v_onnx(tiny_model_v: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model_v` on ONNX Runtime, for one image. Do not write to it."""
    pytest.importorskip("onnxruntime")
    return _built(tiny_model_v, tmp_path_factory, "onnxruntime", (1,))


def _built(model: Path, factory: pytest.TempPathFactory, engine: str, batch_sizes: tuple[int, ...] = (1, 2)) -> Path:
    out = factory.mktemp("bundles") / f"{model.name}-{engine}"
    bundle: Bundle = ldmrt.build_engines(model, out, engine=engine, dtype="float32", batch_sizes=batch_sizes)
    return bundle.path


# ---------------------------------------------------------------------------------------------------- LoRAs


@pytest.fixture(scope="session")
def write_lora() -> Callable[..., Path]:
    """`write_lora(path, model, seed=0, modules=...)` writes random changes of the projections of those names, in all of a model's
    attentions, as diffusers names them, and returns the path.
    """

    def write(path: Path, model: Path, seed: int = 0, modules: tuple[str, ...] = ("to_q", "to_v", "q_proj")) -> Path:
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for folder in sorted(model.glob("unet")) + sorted(model.glob("text_encoder*")):
            for name, weight in load_file(next(folder.glob("*.safetensors"))).items():
                module = name.removesuffix(".weight")
                if weight.dim() == 2 and module.rpartition(".")[2] in modules:
                    out, inner = weight.shape
                    tensors[f"{folder.name}.{module}.lora_A.weight"] = 0.3 * torch.randn(2, inner, generator=generator)
                    tensors[f"{folder.name}.{module}.lora_B.weight"] = 0.3 * torch.randn(out, 2, generator=generator)
        save_file(tensors, path)
        return path

    return write


@pytest.fixture(scope="session")
def fused_by_diffusers() -> Callable[[Path, Mapping[Path, float]], Any]:
    """`fused_by_diffusers(model, {lora: scale})` gives the pipeline of diffusers with LoRAs fused one after the other, on DDIM."""

    def fuse(model: Path, loras: Mapping[Path, float]) -> Any:
        from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

        xl = (model / "text_encoder_2").is_dir()
        options = {"add_watermarker": False} if xl else {}
        pipe: Any = (StableDiffusionXLPipeline if xl else StableDiffusionPipeline).from_pretrained(model, **options)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        for path, scale in loras.items():
            pipe.load_lora_weights(path)
            pipe.fuse_lora(components=["unet", "text_encoder", *["text_encoder_2"] * xl], lora_scale=scale)
            pipe.unload_lora_weights()
        return pipe

    return fuse


# ---------------------------------------------------------------------------------------------------- the models


def write_model(
    folder: Path,
    *,
    version: int,
    seed: int,
    inpainting: bool = False,
    upscaling: bool = False,
    guidance_embedding: int | None = None,
) -> None:
    """Write a model in the diffusers layout with weights drawn from a seed. `version` is Stable Diffusion's: 1 or 2; with `inpainting`
    its U-Net takes a mask and a masked picture besides, with `upscaling` a picture of the latents' size and one of 400 noise levels, with
    `guidance_embedding` the guidance scale in so many numbers.
    """
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    for name in ("transformers", "diffusers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    second = version == 2
    vocabulary, merges = _vocabulary()
    width, levels, tokens = (48, 3, 77) if second else (32, 2, 77)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(vocabulary),
                hidden_size=width,
                intermediate_size=2 * width,
                projection_dim=width,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=tokens,
                hidden_act="gelu" if second else "quick_gelu",
                bos_token_id=vocabulary[START],
                eos_token_id=vocabulary[END],
                pad_token_id=vocabulary["!" if second else END],
            )
        )
        unet = UNet2DConditionModel(
            sample_size=SIZE // (4 if upscaling else 8),
            in_channels=9 if inpainting else 7 if upscaling else 4,
            num_class_embeds=400 if upscaling else None,
            time_cond_proj_dim=guidance_embedding,
            down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
            block_out_channels=(16, 32, 32)[:levels],
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=width,
            # In Stable Diffusion's configs this is the number of heads; 2.x has one for each level.
            attention_head_dim=[2, 4, 4] if second else 4,
            use_linear_projection=second,
            upcast_attention=second,
        )
        stages = 3 if upscaling else 4
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * stages,
            up_block_types=("UpDecoderBlock2D",) * stages,
            block_out_channels=(8, 16, 16, 16)[:stages],
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=SIZE,
            scaling_factor=0.08333 if upscaling else 0.18215,
        )
        for module in (text_encoder, unet, vae):
            _enliven(module)
    text_encoder.save_pretrained(folder / "text_encoder")
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    _write_tokenizer(folder / "tokenizer", vocabulary, merges, tokens, pad="!" if second else END)
    _write_json(folder / "scheduler" / "scheduler_config.json", _SCHEDULERS[version])
    _write_json(folder / "ldmrt-defaults.json", _DEFAULTS)
    if upscaling:
        DDPMScheduler(beta_schedule="squaredcos_cap_v2").save_pretrained(folder / "low_res_scheduler")
    task = "Inpaint" if inpainting else "Upscale" if upscaling else ""
    _write_json(
        folder / "model_index.json",
        {
            **({"low_res_scheduler": ["diffusers", "DDPMScheduler"], "max_noise_level": 350} if upscaling else {}),
            "_class_name": f"StableDiffusion{task}Pipeline",
            "_diffusers_version": "0.36.0",
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", _SCHEDULERS[version]["_class_name"]],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def write_model_xl(folder: Path, *, seed: int, inpainting: bool = False, refiner: bool = False) -> None:
    """Write a model like Stable Diffusion XL base with weights drawn from a seed; with `inpainting` its U-Net takes a mask and a masked
    picture besides; or one like the refiner.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    for name in ("transformers", "diffusers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    vocabulary, merges = _vocabulary()
    ids = {"bos_token_id": vocabulary[START], "eos_token_id": vocabulary[END], "vocab_size": len(vocabulary)}
    text = {"num_attention_heads": 4, "max_position_embeddings": 77, "intermediate_size": 64, **ids}
    pooled, time_ids, time_width = 24, 5 if refiner else 6, 8
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        modules: dict[str, torch.nn.Module] = {
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(hidden_size=32, num_hidden_layers=3, hidden_act="quick_gelu", **text)
            ),
            "text_encoder_2": CLIPTextModelWithProjection(
                CLIPTextConfig(hidden_size=40, num_hidden_layers=4, hidden_act="gelu", projection_dim=pooled, **text)
            ),
            "unet": UNet2DConditionModel(
                sample_size=SIZE // 8,
                in_channels=9 if inpainting else 4,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                block_out_channels=(16, 32),
                layers_per_block=1,
                norm_num_groups=8,
                cross_attention_dim=40 if refiner else 32 + 40,
                attention_head_dim=(2, 4),
                transformer_layers_per_block=(1, 2),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=time_width,
                projection_class_embeddings_input_dim=pooled + time_ids * time_width,
            ),
            "vae": AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(8, 16, 16, 16),
                layers_per_block=1,
                norm_num_groups=4,
                sample_size=SIZE,
                scaling_factor=0.13025,
            ),
        }
        if refiner:
            del modules["text_encoder"]
        for name, module in modules.items():
            _enliven(module)
            module.save_pretrained(folder / name)  # type: ignore[operator]
    if not refiner:
        _write_tokenizer(folder / "tokenizer", vocabulary, merges, 77, pad=END)
    _write_tokenizer(folder / "tokenizer_2", vocabulary, merges, 77, pad="!")
    schedule = {**_SCHEDULERS[1], "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
    _write_json(folder / "scheduler" / "scheduler_config.json", schedule)
    _write_json(folder / "ldmrt-defaults.json", _DEFAULTS)
    _write_json(
        folder / "model_index.json",
        {
            "_class_name": f"StableDiffusionXL{'Inpaint' * inpainting}{'Img2Img' * refiner}Pipeline",
            "_diffusers_version": "0.36.0",
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "force_zeros_for_empty_prompt": not refiner,
            **({"requires_aesthetics_score": True} if refiner else {}),
            "scheduler": ["diffusers", "EulerDiscreteScheduler"],
            "text_encoder": [None, None] if refiner else ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer": [None, None] if refiner else ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


# What tests compare with is diffusers' DDIM, unless they say otherwise.
_DEFAULTS = {"sampler": "ddim"}


def write_controlnet(folder: Path, model: Path, seed: int) -> Path:
    """Write a ControlNet for a model's U-Net with weights drawn from a seed, and return its folder."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        controlnet = ControlNetModel.from_unet(
            unet, load_weights_from_unet=False, conditioning_embedding_out_channels=(8, 16, 16, 24)
        )
        _enliven(controlnet)
        with torch.no_grad():
            for name, parameter in controlnet.named_parameters():
                if name.endswith("weight") and not parameter.any():  # what training starts from
                    parameter.normal_(std=0.2)
    controlnet.save_pretrained(folder)
    return folder


def write_ldm(
    folder: Path, *, seed: int, codebook: bool = True, upscaling: bool = False, classes: int | None = None
) -> None:
    """Write a model without text with weights drawn from a seed; its first stage has a codebook, or is an AutoencoderKL; it may draw a
    picture larger, or take the number of a class.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel, VQModel

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    stage: dict[str, Any] = {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "latent_channels": 3,
        "norm_num_groups": 4,
        "sample_size": SIZE,
        "scaling_factor": 0.7,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first: Any = VQModel(num_vq_embeddings=64, **stage) if codebook else AutoencoderKL(**stage)
        unet = UNet2DModel(
            sample_size=SIZE // 4,
            in_channels=6 if upscaling else 3,
            out_channels=3,
            num_class_embeds=classes,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            attention_head_dim=8,
        )
        for module in (first, unet):
            _enliven(module)
        if codebook:
            torch.nn.init.normal_(first.quantize.embedding.weight)
    first.save_pretrained(folder / "vqvae")
    unet.save_pretrained(folder / "unet")
    DDIMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False).save_pretrained(
        folder / "scheduler"
    )
    index = {
        "_class_name": "LDMSuperResolutionPipeline" if upscaling else "LDMPipeline",
        "_diffusers_version": "0.36.0",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
        "vqvae": ["diffusers", type(first).__name__],
    }
    _write_json(folder / "model_index.json", index)


_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
_SCHEDULERS: dict[int, dict[str, Any]] = {
    # As in the two models' own files.
    1: {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.6.0",
        **_NOISE,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    },
    2: {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.8.0",
        **_NOISE,
        "clip_sample": False,
        "prediction_type": "v_prediction",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    },
}


@torch.no_grad()
def _enliven(module: torch.nn.Module) -> None:
    """Move norms and biases off 1 and 0, where mistakes would not show, and let the network listen to its text."""
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif "embedding" in name and "time" not in name:
            parameter.mul_(5.0)
        elif ".attn2." in name:
            parameter.mul_(3.0)


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's: the 256 bytes, bare and at a word's end, then pairs (here the beginnings of `WORDS`), then the special tokens."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(byte) for byte in printable] + [chr(256 + rank) for rank in range(256 - len(printable))]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        for end in range(1, len(parts)):
            pair = ("".join(parts[:end]), parts[end])
            if pair not in merges:
                merges.append(pair)
    tokens = (
        letters + [letter + "</w>" for letter in letters] + [first + second for first, second in merges] + [START, END]
    )
    return {token: index for index, token in enumerate(tokens)}, merges


def _write_tokenizer(
    folder: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]], tokens: int, *, pad: str
) -> None:
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    _write_json(folder / "vocab.json", vocabulary)
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": tokens,
            "tokenizer_class": "CLIPTokenizer",
            **special,
        },
    )
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
