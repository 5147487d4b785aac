"""LoRA files of every format against diffusers' fused weights, and files that cannot be used."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldmrt import original
from ldmrt.errors import BadRequest
from ldmrt.lora import Lora, fused

ARCHITECTURES = Path(__file__).parents[1] / "export" / "known"
CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]
Fuse = Callable[..., Any]

# Both add products of rank 4 in float32, in another order.
TOLERANCE = 1e-6
ATTENTION = r"to_[qkv]$|to_out\.0$"
TEXT = r"self_attn\.\w+$|mlp\.fc\d$"


def components(model: Path) -> dict[str, Tensors]:
    """The weights that a LoRA may change, by component."""
    folders = [path for path in sorted(model.iterdir()) if path.name.startswith(("unet", "text_encoder"))]
    return {folder.name: load_file(next(folder.glob("*.safetensors"))) for folder in folders}


def shapes(weights: Mapping[str, Tensors]) -> dict[str, dict[str, tuple[int, ...]]]:
    return {part: {name: tuple(value.shape) for name, value in held.items()} for part, held in weights.items()}


def modules(weights: Tensors, pattern: str) -> dict[str, torch.Size]:
    """The modules with a weight of two dimensions or more whose path a pattern is found in."""
    found = {name.removesuffix(".weight"): value.shape for name, value in weights.items() if value.dim() > 1}
    return {module: shape for module, shape in found.items() if re.search(pattern, module)}


def factors(shape: Iterable[int], rank: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random down and up for a weight; for a convolution the second is one of single pixels."""
    out, inner, *kernel = shape
    down = 0.3 * torch.randn(rank, inner, *kernel, generator=generator)
    return down, 0.3 * torch.randn(out, rank, *(1 for _ in kernel), generator=generator)


def written(
    path: Path,
    weights: Mapping[str, Tensors],
    names: Callable[[str, str], tuple[str, str]],
    patterns: Mapping[str, str],
    alpha: Callable[[str], float] | None = None,
) -> Path:
    """A file of random changes. `names(component, module)` gives the keys of down and up, `alpha(module)` kohya's alpha."""
    generator = torch.Generator().manual_seed(7)
    tensors: Tensors = {}
    for component, pattern in patterns.items():
        for module, shape in modules(weights[component], pattern).items():
            keys = names(component, module)
            tensors |= dict(zip(keys, factors(shape, 4, generator), strict=True))
            if alpha is not None:
                tensors[keys[0].partition(".")[0] + ".alpha"] = torch.tensor(alpha(module))
    save_file(tensors, path)
    return path


def kohya(component: str, module: str, *, te: str = "te", original: Callable[[str], str] = str) -> tuple[str, str]:
    if component == "unet":
        name = f"lora_unet_{original(module)}"
    else:
        name = f"lora_{te if component == 'text_encoder' else 'te2'}_text_model_{module.removeprefix('text_model.')}"
    name = name.replace(".", "_")
    return f"{name}.lora_down.weight", f"{name}.lora_up.weight"


def kohya_xl(weights: Mapping[str, Tensors]) -> Callable[[str, str], tuple[str, str]]:
    names = original.unet(weights["unet"])
    return lambda component, module: kohya(
        component, module, te="te1", original=lambda module: names[f"{module}.weight"].removesuffix(".weight")
    )


def older(component: str, module: str) -> tuple[str, str]:
    """As diffusers wrote attention processors before peft."""
    if component == "unet":
        path, _, projection = module.removesuffix(".0").rpartition(".")
        stem = f"unet.{path}.processor.{projection}_lora"
    elif ".mlp." in module:
        stem = f"{component}.text_model.{module.removeprefix('text_model.')}.lora_linear_layer"
    else:
        path, _, projection = module.rpartition(".")
        stem = f"{component}.text_model.{path.removeprefix('text_model.')}.to_{projection.removesuffix('_proj')}_lora"
    return f"{stem}.down.weight", f"{stem}.up.weight"


def peft_style(component: str, module: str) -> tuple[str, str]:
    return f"{component}.{module}.lora_A.weight", f"{component}.{module}.lora_B.weight"


def ours(model: Path, loras: Mapping[Path, float]) -> dict[str, Tensors]:
    weights = components(model)
    read = [(Lora.read(path, shapes(weights)), scale) for path, scale in loras.items()]

    def value(component: str, name: str, weight: torch.Tensor) -> torch.Tensor:
        held = [(lora.layers.get(component, {}).get(name), scale) for lora, scale in read]
        return fused(weight, [(layer.on(CPU), scale) for layer, scale in held if layer is not None])

    return {part: {name: value(part, name, held[name]) for name in held} for part, held in weights.items()}


def same(pipe: Any, model: Path, loras: Mapping[Path, float], *, changed: int) -> None:
    """Every weight is that of the pipeline of diffusers; `changed` of them are not what they were."""
    found, before = ours(model, loras), components(model)
    different = 0
    for component in before:
        for name, weight in getattr(pipe, component).state_dict().items():
            key = name if name in found[component] else f"text_model.{name}"
            error = (found[component][key] - weight).norm() / weight.norm()
            assert error < TOLERANCE, (component, name, float(error))
            if not torch.equal(weight, before[component][key]):
                different += 1
                # The change is not small: were it missing, it would be seen.
                assert (weight - before[component][key]).norm() / weight.norm() > 1000 * TOLERANCE
    assert different == changed


# ---------------------------------------------------------------------------------------------------- formats


BOTH = {"unet": ATTENTION, "text_encoder": TEXT}
ALL = {**BOTH, "text_encoder_2": TEXT}
EVERY_LAYER = {"unet": r"to_|ff\.|proj_|conv|time_emb"}


def count(model: Path, patterns: Mapping[str, str]) -> int:
    weights = components(model)
    return sum(len(modules(weights[component], pattern)) for component, pattern in patterns.items())


@pytest.mark.parametrize("names", [kohya, older, peft_style])
def test_formats_for_sd(
    tiny_model: Path, tmp_path: Path, names: Callable[[str, str], tuple[str, str]], fused_by_diffusers: Fuse
) -> None:
    path = written(tmp_path / "lora.safetensors", components(tiny_model), names, BOTH)
    same(fused_by_diffusers(tiny_model, {path: 0.8}), tiny_model, {path: 0.8}, changed=count(tiny_model, BOTH))


@pytest.mark.parametrize("names", [older, peft_style])
def test_formats_for_sdxl(
    tiny_model_xl: Path, tmp_path: Path, names: Callable[[str, str], tuple[str, str]], fused_by_diffusers: Fuse
) -> None:
    path = written(tmp_path / "lora.safetensors", components(tiny_model_xl), names, ALL)
    same(fused_by_diffusers(tiny_model_xl, {path: 0.8}), tiny_model_xl, {path: 0.8}, changed=count(tiny_model_xl, ALL))


def test_kohya_for_sdxl_in_the_original_layout(tiny_model_xl: Path, tmp_path: Path, fused_by_diffusers: Fuse) -> None:
    weights = components(tiny_model_xl)
    path = written(tmp_path / "lora.safetensors", weights, kohya_xl(weights), ALL, lambda module: 2.0)
    assert any(
        key.startswith("lora_unet_output_blocks_0_1_transformer_blocks_0_attn1_to_q.") for key in load_file(path)
    )
    same(fused_by_diffusers(tiny_model_xl, {path: 1.0}), tiny_model_xl, {path: 1.0}, changed=count(tiny_model_xl, ALL))


@pytest.mark.covers("Stable Diffusion 2.x", "LoRA")
@pytest.mark.parametrize("model", ["tiny_model", "tiny_model_v"])
def test_kohya_with_convolutions_and_an_alpha_for_each(
    model: str, tmp_path: Path, request: pytest.FixtureRequest, fused_by_diffusers: Fuse
) -> None:
    folder = request.getfixturevalue(model)

    def alpha(module: str) -> float:
        # diffusers 0.42 gives every attention the alpha that most layers have, with a warning where it is not theirs.
        return 2.0 if "attn" in module else (1.0, 2.0, 4.0)[len(module) % 3]

    path = written(tmp_path / "lora.safetensors", components(folder), kohya, EVERY_LAYER, alpha)
    same(fused_by_diffusers(folder, {path: 0.5}), folder, {path: 0.5}, changed=count(folder, EVERY_LAYER))


def test_two_add_up(tiny_model: Path, tmp_path: Path, fused_by_diffusers: Fuse) -> None:
    weights = components(tiny_model)
    one = written(tmp_path / "one.safetensors", weights, kohya, {"unet": ATTENTION}, lambda module: 1.0)
    two = written(tmp_path / "two.safetensors", weights, peft_style, {"unet": "attn2"})
    same(
        fused_by_diffusers(tiny_model, {one: 0.75, two: -1.5}),
        tiny_model,
        {one: 0.75, two: -1.5},
        changed=count(tiny_model, {"unet": ATTENTION}),
    )


@pytest.mark.parametrize("rslora", [False, True])
def test_what_diffusers_saves_with_its_metadata(
    tiny_model: Path, tmp_path: Path, rslora: bool, fused_by_diffusers: Fuse
) -> None:
    """Made by peft, saved by diffusers: alpha is in the header alone."""
    from peft import LoraConfig, inject_adapter_in_model

    pipe = fused_by_diffusers(tiny_model, {})
    options: dict[str, Any] = {"use_rslora": rslora, "lora_alpha": 6, "init_lora_weights": False}
    configs: dict[str, Any] = {
        "unet": LoraConfig(r=3, target_modules=["to_q", "to_out.0"], alpha_pattern={"attn2.to_q": 5}, **options),
        "text_encoder": LoraConfig(r=2, target_modules=["q_proj", "fc1"], **options),
    }
    torch.manual_seed(0)
    layers = {}
    for component, config in configs.items():
        state = inject_adapter_in_model(config, getattr(pipe, component)).state_dict()
        layers[component] = {key.replace(".default", ""): value for key, value in state.items() if "lora_" in key}
    pipe.save_lora_weights(
        tmp_path,
        unet_lora_layers=layers["unet"],
        text_encoder_lora_layers=layers["text_encoder"],
        unet_lora_adapter_metadata=configs["unet"].to_dict(),
        text_encoder_lora_adapter_metadata=configs["text_encoder"].to_dict(),
        weight_name="lora.safetensors",
    )
    expected = {"unet": r"to_q$|to_out\.0$", "text_encoder": "q_proj|fc1"}
    same(
        fused_by_diffusers(tiny_model, {tmp_path / "lora.safetensors": 0.8}),
        tiny_model,
        {tmp_path / "lora.safetensors": 0.8},
        changed=count(tiny_model, expected),
    )


def test_a_unet_alone_without_a_prefix(tiny_model: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    torch.manual_seed(0)
    trained = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["to_v"], init_lora_weights=False)
    trained.add_adapter(config, "mine")
    trained.save_lora_adapter(tmp_path, adapter_name="mine", weight_name="lora.safetensors")
    loaded = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    loaded.load_lora_adapter(tmp_path, weight_name="lora.safetensors", prefix=None)
    loaded.fuse_lora(lora_scale=0.7)
    loaded.unload_lora()
    found = ours(tiny_model, {tmp_path / "lora.safetensors": 0.7})["unet"]
    for name, weight in loaded.state_dict().items():
        torch.testing.assert_close(found[name], weight, rtol=TOLERANCE, atol=TOLERANCE)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_v.weight"
    assert not torch.equal(found[name], components(tiny_model)["unet"][name])


def test_a_convolution_between_the_two(tmp_path: Path) -> None:
    """LoCon with `lora_mid`, which diffusers does not read: three convolutions one after the other are what it means."""
    generator = torch.Generator().manual_seed(0)
    down, mid, up = (torch.randn(*shape, generator=generator) for shape in ((3, 5, 1, 1), (3, 3, 3, 3), (7, 3, 1, 1)))
    name = "lora_unet_conv_in"
    parts = {f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": mid, f"{name}.lora_up.weight": up}
    save_file({**parts, f"{name}.alpha": torch.tensor(1.5)}, tmp_path / "lora.safetensors")
    lora = Lora.read(tmp_path / "lora.safetensors", {"unet": {"conv_in.weight": (7, 5, 3, 3)}})
    weight, x = torch.randn(7, 5, 3, 3, generator=generator), torch.randn(2, 5, 6, 6, generator=generator)
    found = fused(weight, [(lora.layers["unet"]["conv_in.weight"].on(CPU), 2.0)])
    conv = torch.nn.functional.conv2d
    expected = conv(x, weight) + 2.0 * (1.5 / 3) * conv(conv(conv(x, down), mid), up)
    torch.testing.assert_close(conv(x, found), expected, rtol=1e-5, atol=1e-4)


def test_half_precision_is_summed_in_single(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    down, up = (part.half() for part in factors((6, 5), 4, generator))
    save_file({"unet.a.lora_A.weight": down, "unet.a.lora_B.weight": up}, tmp_path / "lora.safetensors")
    layer = Lora.read(tmp_path / "lora.safetensors", {"unet": {"a.weight": (6, 5)}}).layers["unet"]["a.weight"]
    weight = torch.randn(6, 5, generator=generator).bfloat16()
    exact = weight.double() + 0.3 * up.double() @ down.double()
    for one in (weight, weight.float(), weight.t().contiguous().t()):
        before = one.clone()
        found = fused(one, [(layer.on(CPU), 0.3)])
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)
        assert torch.equal(one, before)


def test_every_layer_of_the_real_sdxl_has_its_original_name() -> None:
    """The conversion of diffusers leads back from each name of kohya's to the module."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    config = json.loads((ARCHITECTURES / "sdxl.json").read_text())["unet"]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    held = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    layers = [name.removesuffix(".weight") for name, shape in held.items() if len(shape) > 1]
    names = original.unet(held)
    keys = {
        module: kohya("unet", module, original=lambda module: names[f"{module}.weight"].removesuffix(".weight"))
        for module in layers
    }
    assert keys["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"][0].startswith(
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q."
    )
    assert keys["up_blocks.0.upsamplers.0.conv"][0] == "lora_unet_output_blocks_2_2_conv.lora_down.weight"
    for module, pair in keys.items():
        state, _ = StableDiffusionXLPipeline.lora_state_dict(
            {key: torch.zeros(1) for key in pair}, unet_config=unet.config
        )
        name = next(iter(state)).removeprefix("unet.").replace(".processor", "").replace("to_out_lora", "to_out.0")
        assert re.sub(r"[._]lora\.(down|up)\.weight$|\.(down|up)\.weight$", "", name) == module


# ---------------------------------------------------------------------------------------------------- files that cannot be used

FITTING = {
    "unet": {"conv_in.weight": (7, 5, 3, 3), "a.b.weight": (6, 5), "down_blocks.0.resnets.0.conv1.weight": (6, 5, 3, 3)}
}


def pair(stem: str = "unet.a.b", out: int = 6, rank: int = 2, inner: int = 5) -> Tensors:
    return {f"{stem}.lora_A.weight": torch.ones(rank, inner), f"{stem}.lora_B.weight": torch.ones(out, rank)}


REFUSED: dict[str, tuple[Tensors, str]] = {
    "another shape": (
        pair(out=12, inner=10),
        r"another architecture: unet\.a\.b\.lora_A\.weight is for a weight of \(12, 10\), expected \(6, 5\); use one",
    ),
    "other layers": (
        {**pair(), **pair("unet.c"), **pair("text_encoder_2.d")},
        r"another architecture: \S+ is of no layer of this model \(and 3 more of its 6 keys do not fit\)",
    ),
    "another kernel": (pair("unet.conv_in", 7), r"is for a weight of \(7, 5\), expected \(7, 5, 3, 3\)"),
    "no up": ({"unet.a.b.lora_A.weight": torch.ones(2, 5)}, "without its up matrix"),
    "no down": ({"lora_unet_a_b.alpha": torch.ones(())}, "without its down matrix"),
    "ranks that differ": (
        {**pair(), "unet.a.b.lora_B.weight": torch.ones(6, 3)},
        r"is \(2, 5\) and unet\.a\.b\.lora_B\.weight is \(6, 3\), expected \(rank, in, ...\) and \(out, rank\)",
    ),
    "whole numbers": ({**pair(), "unet.a.b.lora_B.weight": torch.ones(6, 2, dtype=torch.int32)}, "expected"),
    "no dimensions": ({**pair(), "unet.a.b.lora_A.weight": torch.ones(())}, "expected"),
    "the same layer twice": ({**pair(), **pair("a.b")}, "changes a.b.weight twice"),
    "DoRA": ({**pair(), "unet.a.b.lora_magnitude_vector": torch.ones(6)}, "which is DoRA; only LoRA and LoCon"),
    "DoRA of kohya": ({"lora_unet_a_b.dora_scale": torch.ones(6)}, "which is DoRA"),
    "LoHa": ({"lora_unet_a_b.hada_w1_a": torch.ones(6, 2)}, "which is LoHa"),
    "LoKr": ({"lora_unet_a_b.lokr_w1": torch.ones(6, 2)}, "which is LoKr"),
    "a model": ({"conv_in.weight": torch.ones(1)}, "which is no part of a LoRA"),
    "nothing": ({}, "is empty"),
    "an alpha that is no number": ({**pair(), "unet.a.b.alpha": torch.tensor(math.nan)}, "is nan, expected a number"),
    "several alphas": ({**pair(), "unet.a.b.alpha": torch.ones(2)}, "expected a number"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_do_not_fit(tmp_path: Path, name: str) -> None:
    tensors, message = REFUSED[name]
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(BadRequest, match=message) as caught:
        Lora.read(tmp_path / "lora.safetensors", FITTING)
    assert "\n" not in str(caught.value)


ALPHAS = ('"many"', "Infinity", "true", "null", "1" + "0" * 400)


@pytest.mark.parametrize("metadata", ["[]", "{", *(f'{{"unet.lora_alpha": {alpha}}}' for alpha in ALPHAS)])
def test_metadata_that_is_damaged(tmp_path: Path, metadata: str) -> None:
    save_file(pair(), tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": metadata})
    with pytest.raises(BadRequest, match="copy it again"):
        Lora.read(tmp_path / "lora.safetensors", FITTING)


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt"])
def test_pickles_are_not_read(tmp_path: Path, suffix: str) -> None:
    torch.save(pair(), tmp_path / f"lora{suffix}")
    with pytest.raises(BadRequest, match="pickles, which can run any code"):
        Lora.read(tmp_path / f"lora{suffix}", FITTING)
    (tmp_path / f"lora{suffix}").rename(tmp_path / "lora.safetensors")
    with pytest.raises(BadRequest, match="is a pickle, whatever its name"):
        Lora.read(tmp_path / "lora.safetensors", FITTING)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="no such LoRA"):
        Lora.read(tmp_path / "lora.safetensors", FITTING)
