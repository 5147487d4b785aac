"""Models that are one file in the original layout: found whole, with a base, with another VAE; drawn as diffusers draws them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

import ldmrt
from ldmrt import original
from ldmrt.errors import BuildError, BundleError
from ldmrt.export.architectures import instantiate
from ldmrt.export.resolve import resolve
from ldmrt.export.single_file import recognise
from ldmrt.export.source import Checkpoint, Source
from ldmrt.original import Piece
from ldmrt.weights import WeightFile

Write = Callable[..., Path]
MODELS = ["tiny_model", "tiny_model_v", "tiny_model_xl", "tiny_model_inpainting", "tiny_model_xl_inpainting"]
MODELS += ["tiny_model_refiner"]
UNET = "model.diffusion_model."


def rewrite(path: Path, **changes: Any) -> Path:
    """Change tensors by name, with `None` to remove one; underscores in a keyword stand for themselves."""
    tensors = load_file(path)
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, path)
    return path


def same(source: Source, model: Path, folders: tuple[str, ...] | None = None) -> None:
    """Every weight is the folder's, to the bit."""
    expected = Source.open(model)
    for folder in folders or expected.folders:
        ours = Checkpoint(source, folder, instantiate(source, folder))
        reference = Checkpoint(expected, folder, instantiate(expected, folder))
        assert set(ours.keys) == set(reference.keys)
        assert all(torch.equal(ours.load(name), reference.load(name)) for name in reference.keys)


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_is_found(
    name: str, tmp_path: Path, request: pytest.FixtureRequest, write_single_file: Write
) -> None:
    model = request.getfixturevalue(name)
    source = resolve(write_single_file(tmp_path / "mine.safetensors", model), base=model)
    assert source.name == "mine"
    same(source, model)


@pytest.mark.covers("Stable Diffusion 2.x", "from one file")
@pytest.mark.covers("Stable Diffusion XL", "from one file")
@pytest.mark.parametrize("name", MODELS[1:3])
@pytest.mark.slow
def test_a_picture_is_diffusers_picture(
    name: str, tmp_path: Path, request: pytest.FixtureRequest, write_single_file: Write
) -> None:
    """float32 on both sides, sums in another order: latents within 1e-3, pictures within 45 dB."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    model = request.getfixturevalue(name)
    file = write_single_file(tmp_path / "mine.safetensors", model)
    bundle = ldmrt.build_engines(file, tmp_path / "bundle", base=model, dtype="float32", batch_sizes=[1])
    xl = name == "tiny_model_xl"
    options: dict[str, Any] = {"add_watermarker": False} if xl else {}
    pipe: Any = (StableDiffusionXLPipeline if xl else StableDiffusionPipeline).from_single_file(
        file, config=str(model), local_files_only=True, torch_dtype=torch.float32, **options
    )
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    asked: dict[str, Any] = {
        "prompt": "a red circle",
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "width": 64,
        "height": 64,
    }
    ours = ldmrt.Pipeline.from_bundle(bundle.path, "cpu")(**asked, seed=3)
    theirs = [
        pipe(**asked, generator=torch.Generator().manual_seed(3), output_type=kind).images for kind in ("latent", "np")
    ]
    assert (ours.latents - theirs[0]).norm() / theirs[0].norm() < 1e-3
    picture = torch.from_numpy(theirs[1])
    found = torch.tensor([list(ours.images[0].tobytes())]).reshape(picture.shape) / 255
    assert -10 * (found - picture).square().mean().log10() > 45
    model_record, files = bundle.manifest.model, {record.file for record in bundle.manifest.source}
    assert (model_record.kind, model_record.name) == (f"stable-diffusion{'-xl' * xl}", "mine")
    assert {"unet/mine.safetensors", "vae/mine.safetensors", "unet/config.json", "tokenizer/vocab.json"} <= files
    with pytest.raises(BuildError, match="holds a bundle of another model"):
        ldmrt.build_engines(model, bundle.path, dtype="float32")


@pytest.mark.slow
@pytest.mark.covers("Stable Diffusion 1.x", "from one file")
@pytest.mark.parametrize(("name", "base"), [(MODELS[3], MODELS[0]), (MODELS[4], MODELS[2])])
def test_an_inpainting_file_on_the_base_of_another_kind(
    name: str, base: str, tmp_path: Path, request: pytest.FixtureRequest, write_single_file: Write
) -> None:
    """The file's U-Net says what it is for, and diffusers draws the same picture of it."""
    from diffusers import StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline

    model, other = request.getfixturevalue(name), request.getfixturevalue(base)
    file = write_single_file(tmp_path / "mine.safetensors", model)
    assert resolve(file, base=other).kind == Source.open(model).kind
    assert resolve(write_single_file(tmp_path / "plain.safetensors", other), base=model).kind == Source.open(other).kind
    bundle = ldmrt.build_engines(file, tmp_path / "bundle", base=other, dtype="float32")
    assert bundle.manifest.model.inpainting
    xl = "xl" in name
    options: dict[str, Any] = {"add_watermarker": False} if xl else {}
    pipe: Any = (StableDiffusionXLInpaintPipeline if xl else StableDiffusionInpaintPipeline).from_single_file(
        file, config=str(model), local_files_only=True, torch_dtype=torch.float32, **options
    )
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pixels = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    asked: dict[str, Any] = {
        "prompt": "a red circle",
        "image": Image.fromarray(pixels),
        "mask_image": Image.fromarray(np.tri(64, dtype=np.uint8) * 255),
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "width": 64,
        "height": 64,
        "output_type": "latent",
    }
    ours = ldmrt.Pipeline.from_bundle(bundle.path, "cpu")(**asked, seed=3).latents
    expected = pipe(**asked, strength=1.0, generator=torch.Generator().manual_seed(3)).images
    assert (ours - expected).norm() / expected.norm() < 1e-3


def test_what_the_file_has_beside_the_weights(tiny_model_v: Path, tmp_path: Path, write_single_file: Write) -> None:
    """Buffers of the original code, averages, the layer and the projection that Stable Diffusion 2 does not use."""
    path = write_single_file(tmp_path / "mine.safetensors", tiny_model_v)
    extra = ["alphas_cumprod", "model_ema.decay", "first_stage_model.loss.logvar", "cond_stage_model.model.logit_scale"]
    extra += ["cond_stage_model.model.transformer.resblocks.3.ln_1.weight", "cond_stage_model.model.text_projection"]
    same(resolve(rewrite(path, **{name: torch.ones(1) for name in extra}), base=tiny_model_v), tiny_model_v)


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_unet_alone_takes_the_rest_from_a_base(
    prefixed: bool, tiny_model: Path, tmp_path: Path, write_single_file: Write
) -> None:
    path = write_single_file(tmp_path / "style.safetensors", tiny_model, ("unet",), prefixed)
    name = f"{UNET if prefixed else ''}input_blocks.0.0.bias"
    changed = load_file(path)[name] + 1
    source = resolve(rewrite(path, **{name: changed}), base=tiny_model)
    found = Checkpoint(source, "unet", instantiate(source, "unet"))
    assert torch.equal(found.load("conv_in.bias"), changed)
    same(source, tiny_model, ("vae", "text_encoder"))


def test_a_unet_alone_in_the_diffusers_layout(tiny_model: Path) -> None:
    source = resolve(tiny_model / "unet" / "diffusion_pytorch_model.safetensors", base=tiny_model)
    same(source, tiny_model)
    assert source.name == "diffusion_pytorch_model"


@pytest.mark.parametrize("form", ["original", "bare", "diffusers", "folder", "model"])
def test_another_vae(form: str, tiny_model: Path, tiny_model_v: Path, tmp_path: Path, write_single_file: Write) -> None:
    forms: dict[str, Callable[[], Path]] = {
        "original": lambda: write_single_file(tmp_path / "vae.safetensors", tiny_model_v, ("vae",)),
        "bare": lambda: write_single_file(tmp_path / "vae.safetensors", tiny_model_v, ("vae",), False),
        "diffusers": lambda: tiny_model_v / "vae" / "diffusion_pytorch_model.safetensors",
        "folder": lambda: tiny_model_v / "vae",
        "model": lambda: tiny_model_v,
    }
    source = resolve(tiny_model, vae=forms[form]())
    same(source, tiny_model_v, ("vae",))
    same(source, tiny_model, ("unet", "text_encoder"))
    assert source.name == "tiny"


def test_the_vae_of_a_folder_brings_its_config(tiny_model: Path, tiny_model_xl: Path) -> None:
    source = resolve(tiny_model, vae=tiny_model_xl / "vae")
    assert source.configs["vae"]["scaling_factor"] == 0.13025
    assert source.config_file("vae") == tiny_model_xl / "vae" / "config.json"


def test_loras_are_fused(tiny_model: Path, tmp_path: Path, write_single_file: Write, write_lora: Write) -> None:
    lora = write_lora(tmp_path / "lora.safetensors", tiny_model)
    file = write_single_file(tmp_path / "mine.safetensors", tiny_model)
    ours, reference = (s.with_loras([(lora, 0.7)]) for s in (resolve(file, base=tiny_model), Source.open(tiny_model)))
    for folder in ours.folders:
        found = Checkpoint(ours, folder, instantiate(ours, folder))
        expected = Checkpoint(reference, folder, instantiate(reference, folder))
        assert found.fused == expected.fused
        assert all(torch.equal(found.load(name), expected.load(name)) for name in expected.keys)


# ---------------------------------------------------------------------------------------------------- known models


def sparse(path: Path, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file of real size that takes no room: a header, and a hole."""
    header: dict[str, Any] = {"__metadata__": metadata or {}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


@cache
def real(name: str, *, inpainting: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a known model's file."""
    source = Source.known(name, inpainting=inpainting)
    shapes: dict[str, tuple[int, ...]] = {}
    for folder, names, prefix in (("unet", original.unet, UNET), ("vae", original.vae, "first_stage_model.")):
        held = {key: tuple(tensor.shape) for key, tensor in instantiate(source, folder).state_dict().items()}
        shapes |= {prefix + names(held)[key]: shape for key, shape in held.items()}
    encoders = {
        "sd15": {"text_encoder": "cond_stage_model.transformer."},
        "sd21": {"text_encoder": "cond_stage_model.model."},
        "sdxl": {
            "text_encoder": "conditioner.embedders.0.transformer.",
            "text_encoder_2": "conditioner.embedders.1.model.",
        },
        "sdxl-refiner": {"text_encoder_2": "conditioner.embedders.0.model."},
    }
    for folder, prefix in encoders[name].items():
        for key, tensor in instantiate(source, folder).state_dict().items():
            piece, shape = Piece(f"text_model.{key.removeprefix('text_model.')}"), tuple(tensor.shape)
            if prefix.endswith(".model."):
                piece = original.open_clip(key)
            shapes[prefix + piece.name] = shape if piece.third is None else (3 * shape[0], *shape[1:])
    return shapes


@pytest.mark.parametrize(
    ("name", "inpainting", "prediction"),
    [
        ("sd15", False, "epsilon"),
        ("sd21", False, "v_prediction"),
        ("sdxl", False, "epsilon"),
        ("sd15", True, "epsilon"),
        ("sd21", True, "epsilon"),
        ("sdxl-refiner", False, "epsilon"),
    ],
)
@pytest.mark.slow
def test_a_known_model_needs_no_config(name: str, inpainting: bool, prediction: str, tmp_path: Path) -> None:
    source = resolve(sparse(tmp_path / "mine.safetensors", real(name, inpainting=inpainting)))
    assert source.kind.inpainting == inpainting
    assert source.configs["unet"]["sample_size"] == {"sd15": 64, "sd21": 64 if inpainting else 96}.get(name, 128)
    assert source.configs["scheduler"].get("prediction_type", "epsilon") == prediction
    assert source.name == "mine"
    for folder in source.folders:
        module = instantiate(source, folder)
        assert set(Checkpoint(source, folder, module).keys) == set(module.state_dict())
    for encoder in source.kind.tokenizers:
        tokenizer = source.tokenizer_folder(encoder)
        padding = json.loads((tokenizer / "tokenizer_config.json").read_text())["pad_token"]
        assert padding == ("!" if encoder == "text_encoder_2" or name == "sd21" else "<|endoftext|>")
        assert len(json.loads((tokenizer / "vocab.json").read_text())) == source.configs[encoder]["vocab_size"]


def test_a_base_may_be_a_file_too(tmp_path: Path) -> None:
    shapes = real("sd15")
    base = sparse(tmp_path / "base.safetensors", shapes)
    unet = sparse(tmp_path / "unet.safetensors", {name: shapes[name] for name in shapes if name.startswith(UNET)})
    source = resolve(unet, base=base)
    assert {folder: source.weights(folder)[0].path.name for folder in source.folders} == {
        "unet": "unet.safetensors",
        "vae": "base.safetensors",
        "text_encoder": "base.safetensors",
    }


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"metadata": {"modelspec.prediction_type": "v"}}, {"prediction_type": "v_prediction"}),
        (
            {"shapes": {"v_pred": (0,), "ztsnr": (0,)}},
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        ),
    ],
)
def test_a_file_may_state_its_schedule(change: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    path = sparse(tmp_path / "mine.safetensors", {**real("sd15"), **change.get("shapes", {})}, change.get("metadata"))
    scheduler = resolve(path).configs["scheduler"]
    assert {key: scheduler[key] for key in expected} == expected


def test_the_file_of_a_turbo_model_begins_at_the_last_timestep(tmp_path: Path) -> None:
    turbo, plain = (
        resolve(sparse(tmp_path / f"sd_{name}_1.0.safetensors", real("sd15"))) for name in ("turbo", "plain")
    )
    assert turbo.configs["scheduler"]["timestep_spacing"] == "trailing"
    assert "timestep_spacing" not in plain.configs["scheduler"]
    assert (turbo.num_inference_steps, turbo.guidance_scale) == (4, 0.0)


def test_the_tokenizers_that_come_with_it_are_clips() -> None:
    """As transformers reads the same files; ids as in its documentation's examples of CLIP."""
    from transformers import CLIPTokenizer

    from ldmrt.tokenizer import Tokenizer

    for name in ("clip", "open_clip"):
        folder = Source.known("sd15").tokenizer_folder("text_encoder").with_name(name)
        theirs = CLIPTokenizer.from_pretrained(str(folder))
        prompt = "a photograph of an astronaut riding a horse, 35mm"
        expected = theirs(prompt, padding="max_length", max_length=77).input_ids
        assert Tokenizer.from_folder(folder).windows(prompt, 1).ids.tolist() == [expected]
        assert expected[:4] == [49406, 320, 8853, 539]


@pytest.mark.parametrize(
    ("width", "channels", "expected"),
    [(1280, 4, ("sdxl-refiner", False)), (2048, 4, ("sdxl", False)), (2048, 9, ("sdxl", True))],
)
def test_models_of_xl_are_recognised(width: int, channels: int, expected: tuple[str, bool], tmp_path: Path) -> None:
    shapes = {
        f"{UNET}input_blocks.0.0.weight": (384, channels, 3, 3),
        f"{UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (768, width),
        f"{UNET}label_emb.0.0.weight": (1536, 2560),
    }
    file = WeightFile(sparse(tmp_path / "xl.safetensors", shapes))
    assert recognise(file) == expected
    source = Source.known(expected[0], inpainting=expected[1])
    assert (source.kind.inpainting, source.configs["unet"]["in_channels"]) == (expected[1], channels)


# ---------------------------------------------------------------------------------------------------- refusals


def bad(tmp_path: Path, model: Path, write: Write, case: str) -> tuple[Path, str]:
    """A file that cannot be built, and what is said of it."""
    path = tmp_path / "mine.safetensors"
    if case == "cut short":
        write(path, model)
        path.write_bytes(path.read_bytes()[:-5])
        return path, "cut short"
    if case == "a pickle":
        torch.save({"state_dict": {}}, tmp_path / "mine.ckpt")
        return (
            tmp_path / "mine.ckpt",
            r"is a pickle.*convert it first: ldmrt convert \S+mine\.ckpt \S+mine\.safetensors",
        )
    if case == "a pickle in disguise":
        torch.save({"state_dict": {}}, path)
        return path, "is a pickle, whatever its name.*ldmrt convert"
    if case == "no model":
        save_file({"a": torch.ones(1)}, path)
        return path, "no model in the original layout: it has a, expected model"
    if case == "a key is missing":
        return rewrite(
            write(path, model), **{f"{UNET}time_embed.0.bias": None}
        ), r"lacks model\.diffusion_model\.time_embed\.0\.bias"
    if case == "a key too many":
        extra = {f"{UNET}middle_block.9.weight": torch.ones(1)}
        return rewrite(write(path, model), **extra), r"does not know, model\.diffusion_model\.middle_block\.9\.weight"
    assert case == "a wrong shape"
    return rewrite(write(path, model), **{f"{UNET}out.2.bias": torch.ones(7)}), r"conv_out\.bias has the shape \(7,\)"


@pytest.mark.parametrize(
    "case",
    [
        "cut short",
        "a pickle",
        "a pickle in disguise",
        "no model",
        "a key is missing",
        "a key too many",
        "a wrong shape",
    ],
)
def test_bad_files(case: str, tiny_model: Path, tmp_path: Path, write_single_file: Write) -> None:
    path, message = bad(tmp_path, tiny_model, write_single_file, case)
    with pytest.raises((BuildError, BundleError), match=message) as caught:
        ldmrt.build_engines(path, tmp_path / "bundle", base=tiny_model, dtype="float32")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bundle").exists()


def test_without_a_base(tiny_model: Path, tmp_path: Path, write_single_file: Write) -> None:
    shapes = {name: shape for name, shape in real("sd15").items() if name.startswith(UNET)}
    with pytest.raises(
        BuildError, match=r"has no text_encoder and no vae; give the model that has the rest: --base DIR"
    ):
        resolve(sparse(tmp_path / "unet.safetensors", shapes))
    with pytest.raises(
        BuildError, match=r"takes 4 channels and text of width 32, which is none of Stable Diffusion 1\.x"
    ):
        resolve(write_single_file(tmp_path / "tiny.safetensors", tiny_model))


def test_options_that_do_not_go_together(tiny_model: Path, tmp_path: Path, write_single_file: Write) -> None:
    with pytest.raises(BuildError, match="is a whole model, and takes no --base"):
        resolve(tiny_model, base=tiny_model)
    with pytest.raises(BuildError, match="is no id on the Hub, and has no revision 'main'"):
        resolve(tiny_model, revision="main")
    with pytest.raises(BuildError, match=r"variant is '\.\./x', expected a name"):
        resolve(tiny_model, variant="../x")
    with pytest.raises(BuildError, match="no such VAE: none"):
        resolve(tiny_model, vae="none")
    text = write_single_file(tmp_path / "text.safetensors", tiny_model, ("text_encoder",))
    with pytest.raises(BuildError, match=r"text\.safetensors holds no VAE"):
        resolve(tiny_model, vae=text)


def test_a_vae_of_another_kind(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "vae"
    folder.mkdir()
    config = json.loads((tiny_model / "vae" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "latent_channels": 16}))
    save_file({"a": torch.ones(1)}, folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(BuildError, match="takes 4 channels, expected 16 of"):
        resolve(tiny_model, vae=folder)
