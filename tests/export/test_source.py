"""Model folders: recognised or refused, and their weights matched with the modules that use them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldmrt.errors import BuildError, BundleError
from ldmrt.export.architectures import downscale, instantiate
from ldmrt.export.source import Checkpoint, Source
from ldmrt.schedule import NoiseSchedule

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps(data))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(path)), path)


def checkpoint(model: Path, folder: str) -> Checkpoint:
    source = Source.open(model)
    return Checkpoint(source, folder, instantiate(source, folder))


def files(model: Path, **options: Any) -> list[Path]:
    return [file.path for file in Source.open(model, **options).weights("unet")]


def test_a_model_is_recognised(tiny_model: Path) -> None:
    source = Source.open(tiny_model)
    assert (source.kind.name, source.name) == ("stable-diffusion", "tiny")
    assert set(source.configs) == {"unet", "vae", "text_encoder", "scheduler"}
    assert downscale(source) == 8
    assert source.defaults == {"sampler": "ddim"}


def test_the_makers_recommendations_are_read(model: Path) -> None:
    (model / "ldmrt-defaults.json").write_text('{"guidance_scale": 5.0}')
    assert Source.open(model).defaults == {"guidance_scale": 5.0}


def test_null_recommends_nothing(model: Path) -> None:
    plain = Source.open(model)
    (model / "ldmrt-defaults.json").write_text('{"guidance_scale": null, "num_inference_steps": null, "sampler": null}')
    found = Source.open(model)
    assert (found.guidance_scale, found.num_inference_steps) == (plain.guidance_scale, plain.num_inference_steps)
    assert found.sampler == "pndm"


@pytest.mark.parametrize("value", ["1" + 400 * "0", "1e999", '"5"', "true", "[5]"])
def test_a_recommendation_is_a_number(model: Path, value: str) -> None:
    (model / "ldmrt-defaults.json").write_text(f'{{"guidance_scale": {value}}}')
    with pytest.raises(BuildError, match=r"guidance_scale is .*, expected a number; copy the model again"):
        Source.open(model)


def test_the_sampler_is_the_makers_or_that_of_the_scheduler(model: Path) -> None:
    recommended = model / "ldmrt-defaults.json"
    recommended.write_text('{"sampler": "DPM++ 2M Karras"}')
    assert Source.open(model).sampler == "dpm++ 2m karras"
    recommended.unlink()
    assert Source.open(model).sampler == "pndm"
    for name in ("magic", 3):
        recommended.write_text(json.dumps({"sampler": name}))
        with pytest.raises(BuildError, match=f"ldmrt-defaults.json: sampler is '{name}', expected one of: ddim"):
            Source.open(model)


@pytest.mark.parametrize("folder", ["unet", "vae", "text_encoder"])
def test_every_weight_is_found(tiny_model: Path, tiny_model_v: Path, folder: str) -> None:
    for path in (tiny_model, tiny_model_v):
        found = checkpoint(path, folder)
        assert set(found.keys) == set(instantiate(Source.open(path), folder).state_dict())
        assert found.dtype() == torch.float32


def test_old_names_in_the_vaes_attention(model: Path, tiny_model: Path) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        renamed = {}
        for name, tensor in tensors.items():
            new = next((name.replace(f".{a}.", f".{b}.") for a, b in old.items() if f".{a}." in name), name)
            renamed[new] = tensor
        assert sum(name not in tensors for name in renamed) == 16  # four layers, weight and bias, encoder and decoder
        return renamed

    rewrite(model / VAE, rename)
    ours, reference = checkpoint(model, "vae"), checkpoint(tiny_model, "vae")
    assert all(torch.equal(ours.load(name), reference.load(name)) for name in reference.keys)


def test_the_text_encoders_prefix_may_be_there_or_not(model: Path, tiny_model: Path) -> None:
    reference = checkpoint(tiny_model, "text_encoder")
    bare = {name.removeprefix("text_model."): tensor for name, tensor in load_file(model / TEXT).items()}
    for prefix in ("", "text_model."):
        save_file({prefix + name: tensor for name, tensor in bare.items()}, model / TEXT)
        ours = checkpoint(model, "text_encoder")
        assert all(torch.equal(ours.load(name), reference.load(name)) for name in reference.keys)


def test_position_ids_of_old_files_are_ignored(model: Path) -> None:
    rewrite(model / TEXT, lambda tensors: {**tensors, "text_model.embeddings.position_ids": torch.arange(77)[None]})
    assert "position_ids" not in " ".join(checkpoint(model, "text_encoder").keys)


def shard(path: Path) -> list[Path]:
    """Split a weight file in two, with an index, as large models are saved."""
    tensors = load_file(path)
    names = sorted(tensors)
    stem = path.name.removesuffix(".safetensors")
    parts = {f"{stem}-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    bare, _, variant = stem.partition(".")
    for name, held in parts.items():
        save_file({key: tensors[key] for key in held}, path.with_name(name))
    index = {"metadata": {}, "weight_map": {key: name for name, held in parts.items() for key in held}}
    path.with_name(".".join(filter(None, (bare, "safetensors", "index", variant, "json")))).write_text(
        json.dumps(index)
    )
    path.unlink()
    return [path.with_name(name) for name in parts]


def test_shards(model: Path, tiny_model: Path) -> None:
    shards = shard(model / UNET)
    assert files(model) == shards
    ours, reference = checkpoint(model, "unet"), checkpoint(tiny_model, "unet")
    assert all(torch.equal(ours.load(name), reference.load(name)) for name in reference.keys)


def test_an_index_that_leads_elsewhere(model: Path) -> None:
    shard(model / UNET)
    edit(model / "unet/diffusion_pytorch_model.safetensors.index.json", weight_map={"a": "../../secret.safetensors"})
    with pytest.raises(BuildError, match="does not name its shards"):
        files(model)


def test_half_precision_variants_are_taken_where_there_is_nothing_else(model: Path) -> None:
    variant = model / "unet/diffusion_pytorch_model.fp16.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(model / UNET).items()}, variant)
    assert files(model) == [model / UNET]
    assert files(model, variant="fp16") == [variant]
    (model / UNET).unlink()
    assert files(model) == [variant]
    assert checkpoint(model, "unet").dtype() == torch.float16
    shards = shard(variant)
    assert files(model) == files(model, variant="fp16") == shards
    # As in diffusers, a component that has no such copy is taken as it is.
    assert [file.path for file in Source.open(model, variant="fp16").weights("vae")] == [model / VAE]
    with pytest.raises(BuildError, match="has no variant 'bf16' of its weights; leave out --variant"):
        Source.open(model, variant="bf16")


def test_a_file_may_mix_precisions_but_not_hold_integers(model: Path, tiny_model: Path) -> None:
    def mix(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.half() if ".attn1." in name else tensor for name, tensor in tensors.items()}

    rewrite(model / UNET, mix)
    found, reference = checkpoint(model, "unet"), checkpoint(tiny_model, "unet")
    assert found.dtype() == torch.float32
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    assert torch.equal(found.load(name), reference.load(name).half())
    rewrite(model / UNET, lambda tensors: {**tensors, "conv_in.bias": tensors["conv_in.bias"].to(torch.int8)})
    with pytest.raises(BuildError, match=r"conv_in\.bias is int8, expected floating point; quantised weights are not"):
        checkpoint(model, "unet")


def test_a_pickle_alone_is_refused(model: Path) -> None:
    (model / UNET).rename(model / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(BuildError, match=r"only diffusion_pytorch_model\.bin, a pickle"):
        files(model)
    (model / "unet/diffusion_pytorch_model.bin").unlink()
    with pytest.raises(BuildError, match=r"has no weights: expected diffusion_pytorch_model\.safetensors"):
        files(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: dict(list(tensors.items())[1:]), "lacks "),
        (lambda tensors: {**tensors, "surprise": torch.ones(1)}, "does not know, surprise"),
        (lambda tensors: {**tensors, "conv_in.weight": torch.ones(16, 4, 1, 1)}, r"conv_in\.weight has the shape"),
    ],
)
def test_weights_of_another_model(model: Path, change: Any, message: str) -> None:
    rewrite(model / UNET, change)
    with pytest.raises(BuildError, match=message):
        checkpoint(model, "unet")


def test_a_config_of_another_version_of_diffusers(model: Path) -> None:
    edit(model / "unet/config.json", surprise=True)
    with pytest.raises(BuildError, match="UNet2DConditionModel does not know surprise: update diffusers"):
        checkpoint(model, "unet")
    edit(model / "unet/config.json", surprise=None, _private=1)
    assert checkpoint(model, "unet").keys


def test_fields_that_make_no_other_network(model: Path) -> None:
    """Where the classes themselves pass over what they do not know, as transformers' do, and diffusers' noise schedules, so do we."""
    reference = checkpoint(model, "text_encoder").keys.keys()
    edit(model / "text_encoder/config.json", surprise=True)
    edit(model / "scheduler/scheduler_config.json", surprise=True)
    assert checkpoint(model, "text_encoder").keys.keys() == reference
    assert NoiseSchedule.from_config(Source.open(model).configs["scheduler"]).beta_schedule == "scaled_linear"


TRAILING = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}


@pytest.mark.parametrize(
    ("name", "schedule", "turbo"),
    [
        ("sd-turbo", {}, True),
        ("sd_xl_turbo_1.0_fp16", {}, True),
        ("DreamTurbo", {}, False),
        ("turbine", {}, False),
        ("mine", TRAILING, True),
        ("mine", TRAILING | {"rescale_betas_zero_snr": True}, False),
        ("mine", TRAILING | {"prediction_type": "v_prediction"}, False),
        ("mine", TRAILING | {"timestep_spacing": "leading"}, False),
        ("mine", TRAILING | {"_class_name": "DDIMScheduler"}, False),
    ],
)
def test_models_of_few_steps(model: Path, name: str, schedule: dict[str, Any], turbo: bool) -> None:
    edit(model / "scheduler/scheduler_config.json", **schedule)
    source = Source.open(model.rename(model.with_name(name)))
    assert (source.num_inference_steps, source.guidance_scale) == ((4, 0.0) if turbo else (50, 7.5))
    (source.path / "ldmrt-defaults.json").write_text('{"guidance_scale": 2.0, "num_inference_steps": 8}')
    found = Source.open(source.path)
    assert (found.num_inference_steps, found.guidance_scale) == (8, 2.0)


def test_latent_consistency_models_take_few_steps(model: Path) -> None:
    edit(model / "model_index.json", _class_name="LatentConsistencyModelPipeline")
    source = Source.open(model)
    assert (source.num_inference_steps, source.guidance_scale) == (4, 8.5)


def test_a_damaged_weight_file(model: Path) -> None:
    (model / UNET).write_bytes((model / UNET).read_bytes()[:-1])
    with pytest.raises(BundleError, match="cut short"):
        checkpoint(model, "unet")


# ---------------------------------------------------------------------------------------------------- refusals


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no such folder"):
        Source.open(tmp_path / "none")
    with pytest.raises(BuildError, match=r"expected a model_index\.json, found nothing"):
        Source.open(tmp_path)
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(BuildError, match=r"found model\.ckpt"):
        Source.open(tmp_path)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "is a FluxPipeline, which ldmrt does not build yet"),
        ("model_index.json", {"unet": ["diffusers", "Other"]}, "its unet is a Other, expected UNet2DConditionModel"),
        ("model_index.json", {"text_encoder": None}, "its text_encoder is a None, expected CLIPTextModel"),
        (
            "model_index.json",
            {"_class_name": "StableDiffusion3Pipeline"},
            r"known kinds: StableDiffusionPipeline",
        ),
        ("unet/config.json", {"in_channels": 9}, "takes 9 channels, expected 4 of"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type = 'text_time'"),
    ],
)
def test_kinds_that_are_not_built(model: Path, file: str, change: dict[str, Any], message: str) -> None:
    edit(model / file, **change)
    with pytest.raises(BuildError, match=message):
        Source.open(model)


@pytest.mark.parametrize("file", ["model_index.json", "vae/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot read"), ("{", "is not JSON"), ("[1]", "holds a list, expected an object")]
)
def test_damaged_configs_are_named(model: Path, file: str, content: str | None, message: str) -> None:
    if content is None:
        (model / file).unlink()
        message = "expected a model_index.json" if file == "model_index.json" else message
    else:
        (model / file).write_text(content)
    with pytest.raises(BuildError, match=message):
        Source.open(model)


@pytest.mark.parametrize("name", ["tiny_model", "tiny_model_xl"])
def test_loras_are_fused_as_by_diffusers(
    name: str,
    tmp_path: Path,
    write_lora: Callable[..., Path],
    fused_by_diffusers: Callable[..., Any],
    request: pytest.FixtureRequest,
) -> None:
    model = request.getfixturevalue(name)
    loras = {
        write_lora(tmp_path / "one.safetensors", model, seed=1): 0.8,
        write_lora(tmp_path / "two.safetensors", model, seed=2, modules=("to_q", "k_proj", "q_proj")): -0.5,
    }
    source, pipe = Source.open(model).with_loras(list(loras.items())), fused_by_diffusers(model, loras)
    for folder in source.folders:
        found = Checkpoint(source, folder, instantiate(source, folder))
        plain = checkpoint(model, folder)
        expected = getattr(pipe, folder).state_dict()
        assert found.fused == (folder != "vae")
        for key in found.keys:
            # Both sum in float32, in another order.
            torch.testing.assert_close(found.load(key), expected[key], rtol=1e-5, atol=1e-6)
        changed = sum(not torch.equal(found.load(key), plain.load(key)) for key in found.keys)
        assert (changed > 0) == (folder != "vae")


def test_loras_that_cannot_be_fused(tiny_model: Path, tiny_model_xl: Path, tmp_path: Path, write_lora: Any) -> None:
    path = write_lora(tmp_path / "lora.safetensors", tiny_model_xl)
    with pytest.raises(
        BuildError, match=r"another architecture: text_encoder_2\.\S+ is of no layer of this model \(and"
    ):
        Source.open(tiny_model).with_loras([(path, 1.0)])
    with pytest.raises(BuildError, match="scale is nan"):
        Source.open(tiny_model_xl).with_loras([(path, float("nan"))])
