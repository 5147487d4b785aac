"""Models of the original code of latent diffusion: their files and YAML configs, against an implementation of its papers."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import interpolate

import ldmrt
from ldmrt.bundle import Bundle
from ldmrt.errors import BadRequest, BuildError, BundleError
from ldmrt.export import original_config
from ldmrt.export.architectures import decoder, encoder, instantiate, reference, text_encoder, unet
from ldmrt.export.convert import convert
from ldmrt.export.resolve import resolve
from ldmrt.export.source import Checkpoint, Source
from ldmrt.pipeline import Pipeline
from ldmrt.tokenizer import Tokenizer
from ldmrt.weights import sha256
from tests.export.test_single_file import sparse
from tests.original_code import LatentDiffusion
from tests.test_inpainting import half, picture
from tests.test_parity import LATENTS, PROMPT, PSNR, generator, psnr, relative
from tests.test_text_to_image import write_bert

KNOWN = json.loads((Path(original_config.__file__).parent / "known" / "latent-diffusion.json").read_text())
SIZE = (64, 64)


def config(
    condition: Any,
    unet: dict[str, Any],
    *,
    quantized: bool = True,
    attending: Any = (),
    attn_type: str = "vanilla",
    **own: Any,
) -> dict[str, Any]:
    """The parameters of a tiny model, 64 x 64 pixels and 16 x 16 latents."""
    stage = {
        "double_z": not quantized,
        "z_channels": 3,
        "resolution": 64,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": list(attending),
        "attn_type": attn_type,
    }
    common = {"image_size": 16, "in_channels": 3, "out_channels": 3, "model_channels": 32, "num_res_blocks": 1}
    return {
        "linear_start": 0.0015,
        "linear_end": 0.0195,
        "timesteps": 1000,
        "unet_config": {"params": {**common, **unet}},
        "first_stage_config": {
            "target": "ldm.models.autoencoder." + ("VQModelInterface" if quantized else "AutoencoderKL"),
            "params": {"embed_dim": 3, "ddconfig": stage, **({"n_embed": 64} if quantized else {})},
        },
        "cond_stage_config": condition,
        **own,
    }


def by(name: str, **params: Any) -> dict[str, Any]:
    return {"target": f"ldm.modules.encoders.modules.{name}", "params": params}


TEXT = {"use_spatial_transformer": True, "context_dim": 32, "channel_mult": [1, 2], "attention_resolutions": [1, 2]}
PLAIN = {"channel_mult": [1, 2], "attention_resolutions": [2], "num_head_channels": 16}
CASES: dict[str, dict[str, Any]] = {
    "faces": config("__is_unconditional__", PLAIN),
    "churches": config(
        "__is_unconditional__",
        {
            "channel_mult": [1, 2, 2],
            "attention_resolutions": [2],
            "num_heads": 4,
            "use_scale_shift_norm": True,
            "resblock_updown": True,
        },
        quantized=False,
        scale_by_std=True,
    ),
    "classes": config(by("ClassEmbedder", n_classes=11, embed_dim=32), {**TEXT, "num_heads": 1}, attending=[16]),
    "text": config(
        by("BERTEmbedder", n_embed=32, n_layer=2, vocab_size=100),
        {**TEXT, "num_head_channels": 16, "transformer_depth": 2},
        quantized=False,
        scale_factor=0.6,
    ),
    "inpainting": config(
        "__is_first_stage__",
        {
            "in_channels": 7,
            "channel_mult": [1, 2],
            "attention_resolutions": [1],
            "num_heads": 2,
            "resblock_updown": True,
        },
        attn_type="none",
        concat_mode=True,
        cond_stage_key="masked_image",
    ),
    "segmentation": config(
        by("SpatialRescaler", n_stages=2, in_channels=7, out_channels=3),
        {"in_channels": 6, "channel_mult": [1, 2], "attention_resolutions": [8], "num_heads": 2},
        concat_mode=True,
        cond_stage_key="segmentation",
    ),
    "layout": config(
        by("BERTEmbedder", n_embed=32, n_layer=2, vocab_size=50, max_seq_len=14, use_tokenizer=False),
        {**TEXT, "num_head_channels": 16},
        cond_stage_key="coordinates_bbox",
    ),
    "super-resolution": config({"target": "torch.nn.Identity"}, {**PLAIN, "in_channels": 6}, concat_mode=True),
}


def model(folder: Path, case: str) -> tuple[LatentDiffusion, Path, Path]:
    """A model with random weights, its file, and its config."""
    params = deepcopy(CASES[case])
    if case == "text":
        params["cond_stage_config"]["params"]["vocab_size"] = write_bert(folder / "bert")
    with torch.random.fork_rng():
        torch.manual_seed(list(CASES).index(case))
        made = LatentDiffusion(params).eval()
        for name, parameter in made.named_parameters():
            if name.endswith("embedding.weight") or "_emb." in name:
                torch.nn.init.normal_(parameter)
            elif parameter.dim() == 1:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    file, yaml_file = folder / f"{case}.safetensors", folder / f"{case}.yaml"
    save_file({**made.state_dict(), "model_ema.decay": torch.ones(1)}, file)
    yaml_file.write_text(
        yaml.safe_dump({"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}})
    )
    return made, file, yaml_file


def opened(file: Path, yaml_file: Path) -> Source:
    bert = file.parent / "bert"
    return resolve(file, config=yaml_file, tokenizer=bert if bert.is_dir() else None)


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """float32 on both sides, sums in another order."""
    assert relative(found, expected) < LATENTS


@pytest.mark.parametrize("case", CASES)
def test_the_networks_are_those_of_the_papers(case: str, tmp_path: Path) -> None:
    theirs, file, yaml_file = model(tmp_path, case)
    source = opened(file, yaml_file)

    def ours(component: Any, *inputs: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = reference(component, Checkpoint(source, component.folder, component.original))(*inputs)[0]
        return made

    draw = generator(4)
    latents, times = torch.randn(2, 3, 16, 16, generator=draw), torch.tensor([999.0, 41.0])
    beside: list[torch.Tensor] = []
    context = torch.zeros(0)
    with torch.no_grad():
        if case == "super-resolution":
            beside = [torch.rand(2, 3, 16, 16, generator=draw)]
        elif case == "inpainting":
            mask = (torch.rand(2, 1, 16, 16, generator=draw) > 0.5).float()
            beside = [mask, torch.randn(2, 3, 16, 16, generator=draw)]
        elif case == "segmentation":
            beside = [torch.randint(0, 7, (2, 1, 64, 64), generator=draw)]
        elif case == "classes":
            beside = [torch.tensor([3, 10])]
            context = theirs.cond_stage_model(beside[0])
        elif case == "layout":
            beside = [torch.randint(0, 50, (2, 14), generator=draw)]
            context = theirs.cond_stage_model(beside[0])
        elif case == "text":
            ids = torch.randint(0, 60, (2, 77), generator=draw)
            context = theirs.cond_stage_model(ids)
            same(ours(text_encoder(source, "text_encoder"), ids)[0], context)
            beside = [context]
        joined = torch.cat([latents, *beside], dim=1) if case == "super-resolution" else latents
        if case == "segmentation":
            joined = torch.cat([latents, theirs.cond_stage_model(beside[0][:, 0])], dim=1)
        elif case == "inpainting":
            joined = torch.cat([latents, beside[1], 2 * beside[0] - 1], dim=1)
        expected = theirs.model["diffusion_model"](joined, times, context)
        same(ours(unet(source, SIZE), latents, times, *beside), expected)
        image = torch.rand(2, 3, 64, 64, generator=draw) * 2 - 1
        encoded = theirs.first_stage_model.encode(image)
        same(ours(encoder(source, SIZE), image), encoded[:, :3])
        decoded = theirs.picture(latents)
    made = ours(decoder(source, SIZE), latents).detach()
    same((made / 2 + 0.5).clamp(0, 1), decoded.permute(0, 3, 1, 2))


# ---------------------------------------------------------------------------------------------------- pictures


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> tuple[LatentDiffusion, Bundle]:
    folder = tmp_path_factory.mktemp("classes")
    theirs, file, yaml_file = model(folder, "classes")
    built = ldmrt.build_engines(file, folder / "b", config=yaml_file, dtype="float32", batch_sizes=(2,))
    return theirs, built


@pytest.mark.covers("latent diffusion of classes", "new pictures")
@pytest.mark.covers("latent diffusion of classes", "from one file")
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_classes(guidance: float, classes: tuple[LatentDiffusion, Bundle]) -> None:
    theirs, bundle = classes
    pipe = Pipeline.from_bundle(bundle.path, "cpu")
    asked: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": guidance, "output_type": "np"}
    found = pipe(class_labels=[7, 2], seed=5, **asked)
    noise = torch.cat([torch.randn(1, 3, 16, 16, generator=generator(seed)) for seed in (5, 6)])
    with torch.no_grad():
        context, nothing = (theirs.cond_stage_model(torch.tensor(labels)) for labels in ([7, 2], [10, 10]))
    expected = theirs.sample(noise, 4, context=context, nothing=nothing if guidance > 1 else None, guidance=guidance)
    assert relative(found.latents, expected) < LATENTS
    assert min(psnr(a, b) for a, b in zip(found.images, theirs.picture(expected).numpy(), strict=True)) > PSNR
    record = bundle.manifest.model
    assert (record.kind, record.classes, record.null_class, record.tokenizers) == ("latent-diffusion", 11, 10, {})
    # One label stands for all images.
    assert torch.equal(pipe(class_labels=7, seed=5, num_images_per_prompt=2, **asked).latents[0], found.latents[0])
    assert relative(pipe(class_labels=2, seed=5, **asked).latents, found.latents[:1]) > 100 * LATENTS


@pytest.mark.covers("latent diffusion, text to image", "new pictures")
@pytest.mark.covers("latent diffusion, text to image", "from one file")
def test_text(tmp_path: Path) -> None:
    theirs, file, yaml_file = model(tmp_path, "text")
    bert = tmp_path / "bert"
    built = ldmrt.build_engines(file, tmp_path / "b", config=yaml_file, tokenizer=bert, dtype="float32")
    asked: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 4.0, "output_type": "np"}
    found = Pipeline.from_bundle(built.path, "cpu")(PROMPT, seed=2, **asked)
    with torch.no_grad():
        tokenizer = Tokenizer.from_folder(bert, model_max_length=77)
        ids = [torch.from_numpy(tokenizer.windows(text, 1).ids) for text in (PROMPT, "")]
        context, nothing = (theirs.cond_stage_model(one) for one in ids)
    noise = torch.randn(1, 3, 16, 16, generator=generator(2))
    expected = theirs.sample(noise, 5, context=context, nothing=nothing, guidance=4.0)
    assert relative(found.latents, expected) < LATENTS
    assert psnr(found.images, theirs.picture(expected).numpy()) > PSNR
    # The config stands for each component's; it is hashed like the weights.
    digests = {record.file: record.sha256 for record in built.manifest.source}
    assert digests["bert/config.json"] == digests["unet/config.json"] == sha256(yaml_file)


def pixels(image: Image.Image) -> torch.Tensor:
    """(1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None] / 255


@pytest.mark.covers("latent diffusion without text", "inpainting")
@pytest.mark.covers("latent diffusion of semantic maps", "new pictures")
@pytest.mark.covers("latent diffusion of semantic maps", "from one file")
@pytest.mark.covers("latent diffusion of layouts", "new pictures")
@pytest.mark.covers("latent diffusion of layouts", "from one file")
@pytest.mark.parametrize(
    "case",
    # The slow ones are of kinds whose pictures are tested in the diffusers layout.
    [
        "inpainting",
        "segmentation",
        "layout",
        *(pytest.param(case, marks=pytest.mark.slow) for case in ("churches", "super-resolution")),
    ],
)
def test_other_pictures(case: str, tmp_path: Path) -> None:
    theirs, file, yaml_file = model(tmp_path, case)
    built = ldmrt.build_engines(file, tmp_path / "b", config=yaml_file, dtype="float32")
    given: dict[str, Any] = {}
    beside = context = None
    if case == "super-resolution":
        given = {"image": picture(3, (16, 16))}
        beside = pixels(given["image"]) * 2 - 1
    elif case == "inpainting":
        given = {"image": picture(3), "mask_image": half()}
        mask = (pixels(given["mask_image"])[:, :1] > 0.5).float()
        with torch.no_grad():
            # What is to be drawn anew is black before it is encoded.
            seen = theirs.first_stage_model.encode(pixels(given["image"]) * (1 - mask) * 2 - 1)
        beside = torch.cat([seen, interpolate(mask, size=(16, 16)) * 2 - 1], dim=1)
    elif case == "segmentation":
        labels = torch.randint(0, 7, (64, 64), generator=generator(8))
        given = {"segmentation": labels.numpy().astype(np.uint8)}
        with torch.no_grad():
            beside = theirs.cond_stage_model(labels[None])
    elif case == "layout":
        given = {"layout": [{"class": 9, "box": [0.5, 0.25, 0.5, 0.25]}, {"class": 3, "box": [0, 0, 1, 1]}]}
        # 7 * 7 cells; what is not there is the last of 50 tokens, and all of the picture is seen. (0.5, 0.25) is column 3, row 1.5,
        # which is even at 2.
        tokens = [9, 17, 27, 3, 0, 48, *[49] * 6, 0, 48]
        with torch.no_grad():
            context = theirs.cond_stage_model(torch.tensor([tokens]))
    found = Pipeline.from_bundle(built.path, "cpu")(num_inference_steps=4, seed=2, output_type="np", **given)
    expected = theirs.sample(torch.randn(1, 3, 16, 16, generator=generator(2)), 4, context=context, beside=beside)
    assert relative(found.latents, expected) < LATENTS
    assert psnr(found.images, theirs.picture(expected).numpy()) > PSNR


@pytest.mark.covers("latent diffusion without text", "from one file")
def test_a_checkpoint_as_it_was_published(tmp_path: Path) -> None:
    """A pickle is converted first; the scaling factor that training found comes over, and the averages take the weights' place."""
    theirs, _, yaml_file = model(tmp_path, "churches")
    state = theirs.state_dict()
    network = {name: tensor for name, tensor in state.items() if name.startswith("model.")}
    averages = {f"model_ema.{name.removeprefix('model.').replace('.', '')}": t + 1 for name, t in network.items()}
    torch.save({"state_dict": {**state, **averages}, "global_step": 3}, tmp_path / "model.ckpt")
    with pytest.raises(BuildError, match="is a pickle"):
        resolve(tmp_path / "model.ckpt", config=yaml_file)
    assert convert(tmp_path / "model.ckpt", tmp_path / "model.safetensors").averaged == len(network)
    source = resolve(tmp_path / "model.safetensors", config=yaml_file)
    assert source.configs["vae"]["scaling_factor"] == pytest.approx(0.7)
    found = Checkpoint(source, "unet", instantiate(source, "unet"))
    assert torch.equal(found.load("conv_in.bias"), state["model.diffusion_model.input_blocks.0.0.bias"] + 1)


# ---------------------------------------------------------------------------------------------------- known models


@cache
def real(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a known model's file."""
    params = deepcopy(KNOWN[name])
    if "BERT" in str(params):
        params["cond_stage_config"]["params"].setdefault("vocab_size", 30522)
    with torch.device("meta"):
        return {key: tuple(tensor.shape) for key, tensor in LatentDiffusion(params).state_dict().items()}


# Table 12 to 15 of the paper, in millions: of the U-Net, or with BERT of both.
PARAMETERS = {
    "celeba256, ffhq256 and lsun_beds256": 274,
    "lsun_churches256": 295,
    "cin256-v2": 401,
    "txt2img-1p4B": 1454,
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_model_needs_no_config(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bert(tmp_path / "bert")
    path = sparse(tmp_path / "mine.safetensors", real(name))
    if "scale_factor" in real(name):
        monkeypatch.setattr(original_config, "_scale", lambda *_: 1.0)  # the file is a hole, and holds zeros
    reads_text = "BERT" in str(KNOWN[name]) and "coordinates_bbox" not in str(KNOWN[name])
    source = resolve(path, tokenizer=tmp_path / "bert" if reads_text else None)
    assert source.name == "mine"
    for folder in source.folders:
        module = instantiate(source, folder)
        assert set(Checkpoint(source, folder, module).keys) == set(module.state_dict())
    if name in PARAMETERS:
        counted = [instantiate(source, folder) for folder in source.folders if folder != "vae"]
        millions = sum(p.numel() for module in counted for p in module.parameters()) / 1e6
        assert round(millions) == PARAMETERS[name]


def test_bert_needs_its_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"reads text with BERT, whose vocabulary .*--tokenizer DIR"):
        resolve(sparse(tmp_path / "mine.safetensors", real("text2img256")))
    with pytest.raises(BundleError, match="there is no tokenizer in"):
        resolve(tmp_path / "mine.safetensors", tokenizer=tmp_path / "bert")
    write_bert(tmp_path / "bert")
    faces = sparse(tmp_path / "faces.safetensors", real(next(iter(KNOWN))))
    with pytest.raises(BuildError, match="takes no --tokenizer: it reads no text"):
        resolve(faces, tokenizer=tmp_path / "bert")


# ---------------------------------------------------------------------------------------------------- refusals


def changed(case: str, *path: str, value: Any) -> dict[str, Any]:
    params = deepcopy(CASES[case])
    inner = params
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return params


UNET, STAGE = ("unet_config", "params"), ("first_stage_config", "params")
BAD: dict[str, tuple[Any, str]] = {
    "not YAML": ("{", "is not YAML"),
    "a list": ("[1]", "has no model.params"),
    "other tokens": (
        changed("text", "cond_stage_config", value=by("BERTEmbedder", n_embed=32, n_layer=2, use_tokenizer=False)),
        "cond_stage_config has 'BERTEmbedder', which is not built yet; known are .*cin256-v2",
    ),
    "a layout of 15 tokens": (
        changed("layout", "cond_stage_config", "params", "max_seq_len", value=15),
        "cond_stage_config has '15 of 50 tokens, and an object has three, the picture two', which is not",
    ),
    "segmentation": (
        changed("faces", "cond_stage_config", value=by("SpatialRescaler")),
        "'SpatialRescaler', which is not",
    ),
    "a map of another size": (
        changed("segmentation", "cond_stage_config", "params", "n_stages", value=3),
        r"a SpatialRescaler of \{.*'n_stages': 3",
    ),
    "another first stage": (
        changed("faces", "first_stage_config", "target", value="a.Other"),
        "has 'Other', which is not",
    ),
    "three dimensions": (changed("faces", *UNET, "dims", value=3), "has 'dims = 3', which is not"),
    "text without attention": (
        changed("text", *UNET, "use_spatial_transformer", value=False),
        "without cross-attention",
    ),
    "channels": (changed("faces", *UNET, "in_channels", value=5), "a U-Net of 5 channels over 3 latent ones"),
    "no number": (
        changed("faces", *UNET, "model_channels", value="many"),
        "model_channels is 'many', expected a whole",
    ),
    "no list": (changed("faces", *UNET, "channel_mult", value=4), "channel_mult is '4', expected a list"),
    "infinite": (changed("faces", "linear_end", value=float("inf")), "linear_end is 'inf', expected a number"),
    "nothing": (changed("faces", *STAGE, value=None), r"first_stage_config.params is 'None', expected a mapping"),
    "a cosine": (changed("faces", "beta_schedule", value="cosine"), "has 'cosine, eps', which is not"),
    "latents": (changed("faces", *STAGE, "embed_dim", value=4), "embed_dim = 4 beside z_channels = 3"),
    "no such scale": (
        changed("faces", "scale_factor", value=-1.0),
        "its scale_factor is -1, expected a number above 0",
    ),
    "no scale": (changed("faces", "scale_by_std", value=True), "has no scale_factor"),
}


@pytest.mark.parametrize("case", BAD)
def test_configs_that_are_not_built(case: str, tmp_path: Path) -> None:
    text, message = BAD[case]
    path = tmp_path / "model.yaml"
    path.write_text(text if isinstance(text, str) else yaml.safe_dump({"model": {"params": text}}))
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(BuildError, match=message) as caught:
        resolve(tmp_path / "model.safetensors", config=path)
    assert "\n" not in str(caught.value)


def test_a_payload_is_not_run(tmp_path: Path) -> None:
    """Tags with which YAML asks for Python's own objects are refused by the reader of plain data."""
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    for call in ("object/apply:os.mkdir", "object/new:os.mkdir"):
        (tmp_path / "model.yaml").write_text(f"model: !!python/{call} ['{tmp_path / 'made'}']")
        with pytest.raises(BuildError, match=r"is not YAML \(could not determine a constructor"):
            resolve(tmp_path / "model.safetensors", config=tmp_path / "model.yaml")
    assert not (tmp_path / "made").exists()


def test_configs_that_are_not_there(tmp_path: Path, tiny_model: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1)}, file)
    with pytest.raises(BuildError, match=r"cannot read .*none\.yaml"):
        resolve(file, config=tmp_path / "none.yaml")
    (tmp_path / "large.yaml").write_text("# " + "x" * (1 << 20))
    with pytest.raises(BuildError, match="expected the YAML file of a model"):
        resolve(file, config=tmp_path / "large.yaml")
    options: list[dict[str, Any]] = [{"config": tmp_path}, {"tokenizer": tmp_path}]
    for option in options:
        with pytest.raises(BuildError, match=f"is no file, and --{next(iter(option))} is for a file alone"):
            resolve(tiny_model, **option)
        with pytest.raises(BuildError, match="has a base model, which says that"):
            resolve(file, base=tiny_model, **option)


def test_classes_without_one_for_none(tmp_path: Path) -> None:
    """A table of as many rows as the original code has classes: there is nothing to be guided by."""
    _, file, yaml_file = model(tmp_path, "classes")
    params = changed("classes", "cond_stage_config", value=by("ClassEmbedder", embed_dim=32))
    yaml_file.write_text(yaml.safe_dump({"model": {"params": params}}))
    source = original_config.source(original_config.read(yaml_file), yaml_file, file)  # type: ignore[arg-type]
    assert (source.labels, source.null_class) == (1000, None)
    assert source.kind.guidance_scale == 3.0


def test_what_must_be_given(classes: tuple[LatentDiffusion, Bundle]) -> None:
    pipe = Pipeline.from_bundle(classes[1].path, "cpu")
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "class_labels is missing: classes draws one of 11 classes; give a number, 0 to 10"),
        ({"class_labels": 11}, "class_labels has 11, expected a whole number, 0 to 10"),
    ]
    for given, message in cases:
        with pytest.raises(BadRequest, match=message):
            pipe(num_inference_steps=1, **given)
