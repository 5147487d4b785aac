"""All fusing passes on the real architectures: nothing that matches is left, and as many as the architecture has."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.export.capture import capture
from ldmrt.export.component import Decoder, Encoder, PenultimateTextEncoder, TextEncoder, UNet
from ldmrt.export.passes.clean import clean
from ldmrt.export.passes.fuse import fuse
from ldmrt.export.passes.hoist import Kind, hoist
from ldmrt.export.passes.layout import layout
from ldmrt.export.passes.pattern import Index
from ldmrt.graph import Graph, Node

ARCHITECTURES = Path(__file__).parents[3] / "export" / "known"
F16, F32 = torch.float16, torch.float32
KINDS: dict[str, Kind] = {
    "latents": "step",
    "timesteps": "schedule",
    "encoder_hidden_states": "request",
    "text_embeds": "request",
    "time_ids": "request",
}


class Parts(NamedTuple):
    """What a U-Net consists of.

    Attributes:
        blocks: residual blocks.
        shortcuts: those of them that have a shortcut of single pixels: on the way down where it gets wider, on the way up all.
        transformers: transformers.
        layers: the layers in them all.
        levels: sizes of picture.
        pixels: how many of a transformer's two projections are convolutions of single pixels; the others are linear layers.
    """

    blocks: int
    shortcuts: int
    transformers: int
    layers: int
    levels: int
    pixels: int


UNETS = {
    "sd15": Parts(22, 2 + 12, 16, 16, 4, 2),
    "sd21": Parts(22, 2 + 12, 16, 16, 4, 0),
    "sdxl": Parts(17, 2 + 9, 11, 70, 3, 0),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow if name in ("sd21", "sdxl") else ()) for name in UNETS]


def config(name: str, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ARCHITECTURES / f"{name}.json").read_text())[folder]
    return found


@cache
def unet(name: str) -> Graph:
    from diffusers import UNet2DConditionModel

    values = config(name, "unet")
    with torch.device("meta"):
        module = UNet2DConditionModel.from_config(values).eval().to(F16)
    specs = [
        TensorSpec("latents", ("rows", 4, 64, 64), F16),
        TensorSpec("timesteps", ("rows",), F32),
        TensorSpec("encoder_hidden_states", ("rows", "tokens", values["cross_attention_dim"]), F16),
    ]
    if name == "sdxl":
        specs += [TensorSpec("text_embeds", ("rows", 1280), F16), TensorSpec("time_ids", ("rows", 6), F32)]
    return clean(capture("unet", UNet(module, [spec.name for spec in specs]), specs, ("model_output",)))


def vae(half: type[Decoder | Encoder]) -> Graph:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        module = AutoencoderKL.from_config(config("sd15", "vae")).eval().to(F16)
    if half is Decoder:
        spec = TensorSpec("latents", ("rows", 4, 64, 64), F16)
        return clean(capture("decoder", Decoder(module, 0.18215, 0.0), (spec,), ("image",)))
    spec = TensorSpec("image", ("rows", 3, 512, 512), F16)
    return clean(capture("encoder", Encoder(module), (spec,), ("latent_mean", "latent_logvar")))


def ops(graph: Graph) -> Counter[str]:
    return Counter(node.op.removeprefix("aten.").removeprefix("ldmrt.").partition(".")[0] for node in graph.nodes)


def around(graph: Graph) -> set[str]:
    """The operators that make what attention reads and that read what it makes."""
    index = Index(graph)
    found: list[Node | None] = []
    for node in graph.nodes:
        if node.op == "ldmrt.attention.default":
            found += [index.maker(value) for value in node.args[:3]] + [*index.readers(node)]
    return {node.op for node in found if node is not None}


# The operators that add a bias, and how many of their first arguments they add up with it.
ADD = {
    "ldmrt.group_norm_silu.default": 1,
    "ldmrt.add_group_norm_silu.default": 2,
    "ldmrt.add_layer_norm.default": 2,
    "ldmrt.add_upsample.default": 2,
}


def assert_nothing_left(graph: Graph) -> None:
    index, found = Index(graph), ops(graph)
    for name in ("group_norm", "scaled_dot_product_attention", "softmax", "upsample_nearest2d", "geglu"):
        assert found[name] == 0
    for node in graph.nodes:
        if node.op == "aten.silu.default":
            assert len(node.shape) == 2  # the time embedding's
        if node.op == "aten.layer_norm.default":
            total = index.maker(node.args[0], "aten.add.Tensor", "aten.linear.default")
            # CLIP's first: rows of token embeddings, and one row of positions.
            assert total is None or index.shape(total.args[1]) == (1, *node.shape[1:])
        if node.op == "aten.mul.Tensor":
            assert not any(index.maker(value, "aten.gelu.default") for value in node.args)
        if node.op == "ldmrt.group_norm_silu.default":
            assert index.maker(node.args[0], "aten.add.Tensor", "aten.cat.default") is None
        if node.op == "aten.add.Tensor":
            assert len(node.shape) != 4  # sums of pictures are all taken in
        if node.op in ADD:
            for layer in made_by_layers(index, node):
                assert len(layer.args) < 3 or layer.args[2] is None, layer
        if node.op.endswith(".conv2d.default"):
            size = index.shape(node.args[1]) or ()
            assert size[2:] == (3, 3) or any(isinstance(width, int) and width % 8 for width in size[:2])
            # Those of the library's own operator are read by none of ours.
            assert node.op.startswith("ldmrt.") or node.args[2] is not None
    assert around(graph) <= {"aten.slice.Tensor", "aten.linear.default"}


def made_by_layers(index: Index, node: Node) -> list[Node]:
    """The layers whose results an operator adds up, from a linear layer by way of a picture."""
    found = []
    for value in node.args[: ADD[node.op]]:
        layer = index.maker(value)
        while layer is not None and layer.op in (
            "aten.permute.default",
            "aten.reshape.default",
            "aten.contiguous.default",
        ):
            layer = index.maker(layer.args[0])
        if layer is not None and layer.op in ("aten.conv2d.default", "aten.linear.default"):
            found.append(layer)
    return found


@pytest.mark.parametrize("name", SLOW)
def test_unets(name: str) -> None:
    blocks, shortcuts, transformers, layers, levels, pixels = UNETS[name]
    before = unet(name)
    result = fuse(before)
    assert result.found == result.fused
    assert result.fused == {
        "pointwise": pixels * transformers + shortcuts,
        "group_norm": 2 * blocks + transformers + 1,  # two a residual block, one before each transformer, the last one
        # The first of each block, those before transformers and the last one read a sum, on the way up with a skip connection behind
        # it; but behind the very first convolution and those that make the picture smaller.
        "add_group_norm": blocks + transformers + 1 - levels,
        "geglu": layers,
        "attention": 2 * layers,
        # Three norms a layer, each behind a sum but the very first of a transformer.
        "add_layer_norm": 3 * layers - transformers,
        "upsample": levels - 1,
        # Of the first convolution and those between levels, down and up; of each block's two and its shortcut; of a transformer's two
        # projections; of each layer's two ways out of attention and its gate; and of its last product, if another layer follows.
        "bias": 2 * levels - 1 + 2 * blocks + shortcuts + 2 * transformers + 3 * layers + (layers - transformers),
        "linear_geglu": layers,
        # Those of more than one pixel that have lost their bias: all but the last.
        "convolution": 2 * levels - 1 + 2 * blocks,
        # The time's projection of each block; of each layer q, k and v to itself, k and v to the text.
        "linear": blocks + 5 * layers,
    }
    after = ops(result.graph)
    assert_nothing_left(result.graph)
    assert after["group_norm_silu"] + after["add_group_norm_silu"] == ops(before)["group_norm"]
    assert after["attention"] == ops(before)["scaled_dot_product_attention"]
    assert after["add_layer_norm"] == ops(before)["layer_norm"] == 3 * layers
    for gone in ("layer_norm", "chunk", "gelu", "transpose"):
        assert not after[gone]
    # What is joined before a norm: as many as there are blocks on the way up, which all have a shortcut.
    joints = [
        node for node in result.graph.nodes if node.op.startswith("ldmrt.add_group_norm") and node.args[2] is not None
    ]
    assert len(joints) == shortcuts - 2
    assert not any(node.op == "aten.cat.default" and len(node.shape) == 4 for node in result.graph.nodes)
    # With SiLU wherever there was one: in every residual block and at the end. The time embedding keeps its own.
    place = {"ldmrt.group_norm_silu.default": 5, "ldmrt.add_group_norm_silu.default": 7}
    silus = [node.args[place[node.op]] for node in result.graph.nodes if node.op in place]
    assert sum(silus) == 2 * blocks + 1
    shifted = [
        node for node in result.graph.nodes if node.op.startswith("ldmrt.group_norm") and node.args[6] is not None
    ]
    assert len(shifted) == blocks

    parts = hoist(result.graph, KINDS)
    assert ops(parts.context) == {"cat": 1, "linear": 1}
    assert list(parts.context.outputs) == ["attn2.to_k+to_v"]
    assert list(parts.schedule.outputs) == ["time_emb_proj"]
    channels = [node.shape[1] for node in shifted if isinstance(node.shape[1], int)]
    assert parts.schedule.output_specs()["time_emb_proj"].shape == ("rows", sum(channels))
    # All that a step computes.
    free = ("python", "permute", "reshape", "slice", "contiguous")
    assert {op: count for op, count in ops(parts.step).items() if op not in free} == {
        # A layer's products: q, k and v to itself at once, q to the text, two ways out, the second of the feed-forward (the first is
        # in its gate); a transformer's projections; and the shortcuts.
        "linear": 5 * layers + 2 * transformers + shortcuts,
        "linear_geglu": layers,
        "attention": 2 * layers,
        "add_layer_norm": 3 * layers,
        "group_norm_silu": blocks,
        "add_group_norm_silu": blocks + transformers + 1,
        "conv2d": 2 * blocks + 2 * levels,
        # Before a picture grows; and before it gets smaller, which no norm reads.
        "add_upsample": 2 * (levels - 1),
        # The last sum of a transformer; and, of weights alone, the biases of a block and its shortcut.
        "add": transformers + shortcuts,
        # Of weights alone: q, k and v.
        "cat": layers,
    }
    assert not {"encoder_hidden_states", "timesteps", "text_embeds", "time_ids"} & {x.name for x in parts.step.inputs}

    laid = layout(parts.step)
    moved = [node.args[0].name for node in laid.nodes if node.op == "aten.contiguous.default"]
    pictures = [value for value in moved if value not in laid.weights]
    assert pictures[0] == "latents"
    # The others find the order that they ask for: pictures that transformers and shortcuts have made of pixels.
    assert len(pictures) == 1 + transformers + shortcuts
    assert {laid.weights[value].shape[2:] for value in moved if value in laid.weights} == {(3, 3)}


# Residual blocks; norms, one of them before the attention in the middle and one at the end; upsamplings.
@pytest.mark.parametrize(("half", "blocks", "ups"), [(Decoder, 14, 3), (Encoder, 10, 0)])
def test_the_vae(half: type[Decoder | Encoder], blocks: int, ups: int) -> None:
    """Four levels, two shortcuts, one attention in the middle; on both sides the first convolution and three between levels."""
    result = fuse(vae(half))
    fused = {
        # Two shortcuts, and the one between encoder and latents. That between latents and decoder has four channels, and stays.
        "pointwise": 2 if half is Decoder else 3,
        "group_norm": 2 * blocks + 2,
        # The first of each block and the last one, but behind the first convolution and those between levels; that of the attention
        # reads a view of a sum.
        "add_group_norm": blocks + 1 - 4,
        "attention": 1,
        "upsample": ups,
        "bias": 1 + 3 + 2 * blocks + 2,
        "convolution": 1 + 3 + 2 * blocks,
        "linear": 3,
    }
    assert {name: count for name, count in result.fused.items() if count or name in fused} == fused
    assert result.found == {**result.fused, "pointwise": 3}
    assert_nothing_left(result.graph)
    assert not ops(result.graph)["silu"]
    laid = layout(result.graph)
    # From pixels to tokens and back; what undid each other in between is gone.
    assert ops(laid)["transpose"] == 2
    attention = next(node for node in result.graph.nodes if node.op == "ldmrt.attention.default")
    assert attention.args[3] == 1
    assert attention.shape == (result.graph.nodes[0].shape[0], 4096, 512)
    maker = Index(result.graph).maker
    assert {maker(value).op for value in attention.args[:3]} == {"aten.slice.Tensor"}  # type: ignore[union-attr]
    moved = [node.args[0].name for node in laid.nodes if node.op == "aten.contiguous.default"]
    # What comes in; and pictures that are in order: of the attention and the two shortcuts.
    assert len([value for value in moved if value not in laid.weights]) == 4


@pytest.mark.parametrize(
    ("name", "folder", "layers"),
    [("sd15", "text_encoder", 12), ("sd21", "text_encoder", 23), ("sdxl", "text_encoder_2", 32)],
)
def test_text_encoders(name: str, folder: str, layers: int) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    values, pooled = config(name, folder), folder == "text_encoder_2"
    with torch.device("meta"):
        kind = CLIPTextModelWithProjection if pooled else CLIPTextModel
        module = kind(CLIPTextConfig(**values)).eval().to(F16)
    wrapper = PenultimateTextEncoder(module, pooled=True) if pooled else TextEncoder(module)
    outputs = ("hidden_states", "text_embeds") if pooled else ("hidden_states",)
    graph = clean(capture(folder, wrapper, (TensorSpec("input_ids", ("rows", 77), torch.int64),), outputs))
    result = fuse(graph)
    # Two sums a layer, each with the bias of the layer before it.
    fused = {"attention": layers, "add_layer_norm": 2 * layers, "bias": 2 * layers, "linear": 3 * layers}
    assert {name: count for name, count in result.fused.items() if count} == fused
    # One more: the sum of token and position embeddings, of different shapes.
    assert result.found == {**result.fused, "add_layer_norm": 2 * layers + 1}
    assert_nothing_left(result.graph)
    attentions = [node for node in result.graph.nodes if node.op == "ldmrt.attention.default"]
    assert {node.args[3:] for node in attentions} == {(values["num_attention_heads"], 64**-0.5, True)}
    # The mask is gone: what it said is said by `causal`.
    assert all(tensor.dtype != torch.bool for tensor in result.graph.constants.values())
    # CLIP's quick GELU is no gate; it stays as it is.
    assert ops(result.graph)["sigmoid"] == (layers if values["hidden_act"] == "quick_gelu" else 0)


def test_the_graph_stays_a_graph() -> None:
    """Every value is made before it is read, under one name."""
    result = fuse(vae(Decoder)).graph
    known = {spec.name for spec in result.inputs} | set(result.weights) | set(result.constants)
    for node in layout(result).nodes:
        assert set(node.refs()) <= known
        assert node.name not in known
        known.add(node.name)
    assert result.outputs["image"] in known
