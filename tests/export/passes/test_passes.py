"""The passes together: small networks of every kind, fused, cut in three and laid out, against diffusers' own modules.

The oracle is the original module in float64; the graphs run with plain torch in the place of the fused operators. The two differ in the
order of sums alone, and float64 keeps 15 digits: 1e-10 leaves five of them for what a deep network makes of the last one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings, strategies as st

from ldmrt.engines.protocol import TensorSpec
from ldmrt.export.capture import capture
from ldmrt.export.component import Decoder, Encoder, PenultimateTextEncoder, TextEncoder, UNet
from ldmrt.export.passes.clean import clean
from ldmrt.export.passes.fuse import Fused, fuse
from ldmrt.export.passes.hoist import Kind, hoist
from ldmrt.export.passes.layout import layout
from ldmrt.graph import Graph, Node, from_json, to_json
from ldmrt.verify import relative_error

F64 = torch.float64
TOLERANCE = 1e-10
KINDS: dict[str, Kind] = {"latents": "step", "timesteps": "schedule", "text": "request"}
# An example takes seconds, nearly all of them in torch.export, and shrinking takes hundreds of examples.
SETTINGS = settings(max_examples=15, deadline=None, derandomize=True, phases=(Phase.generate,))
# Operators that read and make pictures.
PICTURES = (
    "aten.conv2d.default",
    "ldmrt.conv2d.default",
    "ldmrt.add_group_norm_silu.default",
    "ldmrt.add_upsample.default",
)
Interpret = Callable[..., dict[str, torch.Tensor]]
Make = Callable[[], torch.nn.Module]


def built(make: Make, device: str) -> torch.nn.Module:
    """A module with weights from a seed, moved off the ones and zeros where mistakes would not show."""
    with torch.random.fork_rng(), torch.device(device), torch.no_grad():
        torch.manual_seed(0)
        module = make().eval().to(F64)
        if device != "meta":
            for parameter in module.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def fused(make: Make, inputs: Sequence[TensorSpec], outputs: Sequence[str]) -> Fused:
    return fuse(clean(capture("part", built(make, "meta"), inputs, outputs)))


def check_counts(result: Fused) -> None:
    """All that was found is fused, but for convolutions of single pixels that have no multiple of 8 channels on both sides."""
    shapes = [spec.shape for spec in result.graph.weights.values()]
    pixels = [shape[:2] for shape in shapes if len(shape) == 4 and shape[2:] == (1, 1)]
    eights = [pair for pair in pixels if all(size % 8 == 0 for size in pair if isinstance(size, int))]
    assert result.found == {**result.fused, "pointwise": len(pixels)}
    assert result.fused["pointwise"] == len(eights)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Order:
    """Sees every call of a laid out graph: all pictures channels last, and nothing copied but what comes in."""

    def __init__(self, graph: Graph) -> None:
        self.weights = graph.weights
        self.inputs: list[str] = []

    def __call__(self, node: Node, arguments: list[Any], value: Any) -> None:
        if node.op in PICTURES:
            values = value if isinstance(value, tuple) else (value,)
            for tensor in (*arguments, *values):
                if isinstance(tensor, torch.Tensor) and tensor.dim() == 4:
                    assert tensor.is_contiguous(memory_format=torch.channels_last), node
        moves = node.op in ("aten.reshape.default", "aten.contiguous.default")
        if moves and node.args[0].name not in self.weights and value.data_ptr() != arguments[0].data_ptr():
            self.inputs.append(node.name)


def run(interpret: Interpret, graph: Graph, given: dict[str, torch.Tensor], module: torch.nn.Module) -> Any:
    """What a laid out graph makes, by way of its JSON."""
    laid = layout(graph)
    graph = from_json(to_json(laid), laid.constants)
    order = Order(graph)
    found = interpret(graph, given, dict(module.named_parameters()), order)
    assert len(order.inputs) <= 1, order.inputs
    return found


# ---------------------------------------------------------------------------------------------------- the U-Net

# What a level of the network holds besides its residual blocks.
DOWN = {"cross": "CrossAttnDownBlock2D", "self": "AttnDownBlock2D", "none": "DownBlock2D"}
UP = {"cross": "CrossAttnUpBlock2D", "self": "AttnUpBlock2D", "none": "UpBlock2D"}


@st.composite
def unets(draw: st.DrawFn) -> dict[str, Any]:
    """Configurations of U-Nets: odd widths, depths, heads and groups, and all ways to attend to the text or not to."""
    levels = draw(st.integers(1, 2))
    groups, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    # A single channel is in both orders at once, and torch takes the other one.
    width = math.lcm(groups, heads) * draw(st.sampled_from([1, 8]))
    kinds = draw(st.lists(st.sampled_from(sorted(DOWN)), min_size=levels, max_size=levels))
    return {
        "sample_size": 8,
        "block_out_channels": [width * draw(st.integers(1 + (width == 1), 3)) for _ in range(levels)],
        "norm_num_groups": groups,
        "attention_head_dim": heads,
        "down_block_types": [DOWN[kind] for kind in kinds],
        "up_block_types": [UP[kind] for kind in reversed(kinds)],
        "layers_per_block": draw(st.integers(1, 2)),
        "transformer_layers_per_block": draw(st.integers(1, 2)),
        "cross_attention_dim": draw(st.integers(1, 7)),
        "use_linear_projection": draw(st.booleans()),
        "upcast_attention": draw(st.booleans()),
        "only_cross_attention": draw(st.booleans()),
        "resnet_time_scale_shift": draw(st.sampled_from(["default", "scale_shift"])),
    }


CHOSEN: dict[str, dict[str, Any]] = {
    "SD 1, its channels multiples of 8": {
        "block_out_channels": [8, 16],
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "down_block_types": [DOWN["cross"], DOWN["none"]],
        "up_block_types": [UP["none"], UP["cross"]],
        "cross_attention_dim": 5,
    },
    "SD 2": {
        "block_out_channels": [6, 12],
        "norm_num_groups": 3,
        "attention_head_dim": [1, 2],
        "down_block_types": [DOWN["cross"], DOWN["none"]],
        "up_block_types": [UP["none"], UP["cross"]],
        "cross_attention_dim": 5,
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "two layers of attention to text alone, and of time as scale and shift": {
        "block_out_channels": [10],
        "norm_num_groups": 5,
        "attention_head_dim": 2,
        "down_block_types": [DOWN["cross"]],
        "up_block_types": [UP["cross"]],
        "cross_attention_dim": 3,
        "transformer_layers_per_block": 2,
        "only_cross_attention": True,
        "resnet_time_scale_shift": "scale_shift",
    },
    "attention between pixels, and to the text in the middle": {
        "block_out_channels": [9],
        "norm_num_groups": 3,
        "attention_head_dim": 3,
        "down_block_types": [DOWN["self"]],
        "up_block_types": [UP["self"]],
        "cross_attention_dim": 1,
    },
}


@pytest.mark.parametrize("name", CHOSEN)
def test_chosen_unets(interpret: Interpret, name: str) -> None:
    check_unet(interpret, {"sample_size": 8, "layers_per_block": 1, **CHOSEN[name]}, 2, 5, (4, 6))


@pytest.mark.slow
@SETTINGS
@given(unets(), st.integers(1, 3), st.integers(1, 5), st.sampled_from([(8, 8), (2, 6)]))
def test_unets(interpret: Interpret, config: dict[str, Any], rows: int, tokens: int, size: tuple[int, int]) -> None:
    check_unet(interpret, config, rows, tokens, size)


def check_unet(interpret: Interpret, config: dict[str, Any], rows: int, tokens: int, size: tuple[int, int]) -> None:
    """One configuration against diffusers."""
    from diffusers import UNet2DConditionModel

    def make() -> torch.nn.Module:
        return UNet(UNet2DConditionModel(**config))

    text = config["cross_attention_dim"]
    specs = (
        TensorSpec("latents", ("rows", 4, *size), F64),
        TensorSpec("timesteps", ("rows",), torch.float32),
        TensorSpec("text", ("rows", "tokens", text), F64),
    )
    result = fused(make, specs, ("model_output",))
    check_counts(result)
    assert all(result.fused[name] for name in ("group_norm", "add_group_norm", "bias", "convolution"))
    assert result.fused["linear_geglu"] == result.fused["geglu"]
    assert result.fused["upsample"] == len(config["block_out_channels"]) - 1
    parts, module = hoist(result.graph, KINDS), built(make, "cpu")
    given: dict[str, torch.Tensor] = {
        "latents": drawn(1, rows, 4, *size),
        "timesteps": torch.arange(rows, dtype=torch.float32) * 300 + 7,
        "text": drawn(2, rows, tokens, text),
    }
    with torch.inference_mode():
        expected = module(*given.values())[0]
    for part in (parts.context, parts.schedule, parts.step):
        given |= run(interpret, part, given, module) if part.outputs else {}
    assert relative_error(given["model_output"], expected) < TOLERANCE
    assert len(parts.context.outputs) <= 1
    if config.get("resnet_time_scale_shift") != "scale_shift":
        assert list(parts.schedule.outputs) == ["time_emb_proj"]


# ---------------------------------------------------------------------------------------------------- the VAE


@st.composite
def vaes(draw: st.DrawFn) -> dict[str, Any]:
    """Configurations of VAEs."""
    levels, groups, width = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 8]))
    return {
        "block_out_channels": [groups * width * draw(st.integers(2, 3)) for _ in range(levels)],
        "norm_num_groups": groups,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": draw(st.integers(1, 2)),
        "latent_channels": draw(st.integers(2, 4)),
        "mid_block_add_attention": draw(st.booleans()),
        "use_quant_conv": draw(st.booleans()),
        "use_post_quant_conv": draw(st.booleans()),
    }


@pytest.mark.parametrize(("attention", "groups"), [(False, 3), (True, 3), (True, 8)])
def test_chosen_vaes(interpret: Interpret, attention: bool, groups: int) -> None:
    config = {
        "block_out_channels": [2 * groups, 3 * groups],
        "norm_num_groups": groups,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "latent_channels": 4,
        "mid_block_add_attention": attention,
    }
    check_vae(interpret, config, 2, (4, 6))


@pytest.mark.slow
@SETTINGS
@given(vaes(), st.integers(1, 3), st.sampled_from([(4, 8), (12, 4)]))
def test_vaes(interpret: Interpret, config: dict[str, Any], rows: int, size: tuple[int, int]) -> None:
    check_vae(interpret, config, rows, size)


def check_vae(interpret: Interpret, config: dict[str, Any], rows: int, size: tuple[int, int]) -> None:
    """One configuration, its decoder and its encoder, against diffusers."""
    from diffusers import AutoencoderKL

    def decoder() -> torch.nn.Module:
        return Decoder(AutoencoderKL(**config), 0.5, 0.1)

    def encoder() -> torch.nn.Module:
        return Encoder(AutoencoderKL(**config))

    latents = TensorSpec("latents", ("rows", config["latent_channels"], *size), F64)
    image = TensorSpec("image", ("rows", 3, *size), F64)
    for make, spec, outputs in ((decoder, latents, ("image",)), (encoder, image, ("mean", "logvar"))):
        result = fused(make, (spec,), outputs)
        check_counts(result)
        assert result.fused["attention"] == config["mid_block_add_attention"]
        module, value = built(make, "cpu"), drawn(3, rows, *map(int, spec.shape[1:]))
        found = run(interpret, result.graph, {spec.name: value}, module)
        with torch.inference_mode():
            for name, expected in zip(outputs, module(value), strict=True):
                assert relative_error(found[name], expected) < TOLERANCE


# ---------------------------------------------------------------------------------------------------- text encoders


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("penultimate", [False, True])
def test_text_encoders(interpret: Interpret, act: str, penultimate: bool) -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=15,
        intermediate_size=11,
        num_hidden_layers=3,
        num_attention_heads=3,
        max_position_embeddings=9,
        projection_dim=6,
        bos_token_id=48,
        eos_token_id=49,
        hidden_act=act,
    )

    def make() -> torch.nn.Module:
        module = CLIPTextModelWithProjection(config)
        return PenultimateTextEncoder(module, pooled=True) if penultimate else TextEncoder(module.text_model)

    outputs = ("hidden_states", "text_embeds") if penultimate else ("hidden_states",)
    result = fused(make, (TensorSpec("input_ids", ("rows", 9), torch.int64),), outputs)
    # Three layers of two sums, each with the bias of the layer before it. That of token and position embeddings is one of different
    # shapes, and stays.
    expected = {"attention": 3, "linear": 9, "add_layer_norm": 6, "bias": 6}
    assert {name: count for name, count in result.fused.items() if count} == expected
    assert {name: count for name, count in result.found.items() if count} == {**expected, "add_layer_norm": 7}
    module = built(make, "cpu")
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    positions = {name: tensor for name, tensor in module.named_buffers() if name.endswith("position_ids")}
    weights = dict(module.named_parameters()) | positions
    found = interpret(result.graph, {"input_ids": ids}, weights)
    with torch.inference_mode():
        for name, expected in zip(outputs, module(ids), strict=True):
            assert relative_error(found[name], expected) < TOLERANCE
