"""All fusing passes on the real architectures: nothing that matches is left, and as many as the architecture has."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.export.capture import capture
from ldmrt.export.component import Decoder, Encoder, PenultimateTextEncoder, TextEncoder, UNet, UNetTextTime
from ldmrt.export.passes.clean import clean
from ldmrt.export.passes.fuse import fuse
from ldmrt.export.passes.hoist import Kind, hoist
from ldmrt.export.passes.layout import layout
from ldmrt.export.passes.pattern import Index
from ldmrt.graph import Graph, Node

ARCHITECTURES = Path(__file__).parents[3] / "benchmarks" / "architectures"
F16, F32 = torch.float16, torch.float32
KINDS: dict[str, Kind] = {
    "latents": "step",
    "timesteps": "schedule",
    "encoder_hidden_states": "request",
    "text_embeds": "request",
    "time_ids": "request",
}
# Residual blocks, transformers and the layers in them all, and how many of a transformer's projections are linear layers.
UNETS = {"sd15": (22, 16, 16, 0), "sd21": (22, 16, 16, 2), "sdxl": (17, 11, 70, 2)}
SLOW = [pytest.param(name, marks=pytest.mark.slow if name == "sdxl" else ()) for name in UNETS]


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
    wrapper = UNet(module)
    if name == "sdxl":
        wrapper = UNetTextTime(module)
        specs += [TensorSpec("text_embeds", ("rows", 1280), F16), TensorSpec("time_ids", ("rows", 6), F32)]
    return clean(capture("unet", wrapper, specs, ("model_output",)))


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


def assert_nothing_left(graph: Graph) -> None:
    index, found = Index(graph), ops(graph)
    for name in ("group_norm", "scaled_dot_product_attention", "softmax"):
        assert found[name] == 0
    for node in graph.nodes:
        if node.op == "aten.silu.default":
            assert len(node.shape) == 2  # the time embedding's
        if node.op == "aten.layer_norm.default":
            total = index.maker(node.args[0], "aten.add.Tensor")
            # CLIP's first: rows of token embeddings, and one row of positions.
            assert total is None or index.shape(total.args[1]) == (1, *node.shape[1:])
        if node.op == "aten.mul.Tensor":
            assert not any(index.maker(value, "aten.gelu.default") for value in node.args)
    assert around(graph) <= {"aten.slice.Tensor", "aten.linear.default"}


@pytest.mark.parametrize("name", SLOW)
def test_unets(name: str) -> None:
    blocks, transformers, layers, projections = UNETS[name]
    before = unet(name)
    result = fuse(before)
    assert result.found == result.fused
    assert result.fused == {
        "group_norm": 2 * blocks + transformers + 1,  # two a residual block, one before each transformer, the last one
        "geglu": layers,
        "attention": 2 * layers,
        # Three norms a layer, each behind a sum but the very first of a transformer.
        "add_layer_norm": 3 * layers - transformers,
        # The time's projection of each block; of each layer q, k and v to itself, k and v to the text.
        "linear": blocks + 5 * layers,
    }
    after = ops(result.graph)
    assert_nothing_left(result.graph)
    assert after["group_norm_silu"] == ops(before)["group_norm"]
    assert after["attention"] == ops(before)["scaled_dot_product_attention"]
    assert after["layer_norm"] == transformers
    assert not after["chunk"]
    assert not after["gelu"]
    assert not after["transpose"]
    # With SiLU wherever there was one: in every residual block and at the end. The time embedding keeps its own.
    silus = [node.args[5] for node in result.graph.nodes if node.op == "ldmrt.group_norm_silu.default"]
    assert sum(silus) == 2 * blocks + 1
    shifted = [node for node in result.graph.nodes if node.op.startswith("ldmrt.group_norm") and len(node.args) == 7]
    assert len(shifted) == blocks

    parts = hoist(result.graph, KINDS)
    assert ops(parts.context) == {"cat": 1, "linear": 1}
    assert list(parts.context.outputs) == ["attn2.to_k+to_v"]
    assert list(parts.schedule.outputs) == ["time_emb_proj"]
    channels = [node.shape[1] for node in shifted if isinstance(node.shape[1], int)]
    assert parts.schedule.output_specs()["time_emb_proj"].shape == ("rows", sum(channels))
    # A layer's products: q, k and v to itself at once, q to the text, two ways out, two of the feed-forward.
    assert ops(parts.step)["linear"] == 6 * layers + projections * transformers
    assert not {"encoder_hidden_states", "timesteps", "text_embeds", "time_ids"} & {x.name for x in parts.step.inputs}

    laid = layout(parts.step)
    moved = [node.args[0].name for node in laid.nodes if node.op == "aten.contiguous.default"]
    pictures = [value for value in moved if value not in laid.weights]
    assert pictures[0] == "latents"
    # The others are those of diffusers, behind each transformer, now asking for the order that there is.
    assert len(pictures) == 1 + transformers
    assert {laid.weights[value].shape[2:] for value in moved if value in laid.weights} == {(3, 3)}


@pytest.mark.parametrize(("half", "norms"), [(Decoder, 30), (Encoder, 22)])
def test_the_vae(half: type[Decoder | Encoder], norms: int) -> None:
    """14 residual blocks in the decoder, 10 in the encoder, one attention in the middle, a norm at the end."""
    result = fuse(vae(half))
    assert result.found == result.fused
    assert result.fused == {"group_norm": norms, "geglu": 0, "add_layer_norm": 0, "attention": 1, "linear": 3}
    assert not ops(result.graph)["silu"]
    laid = layout(result.graph)
    # From pixels to tokens and back; what undid each other in between is gone.
    assert ops(laid)["transpose"] == 2
    attention = next(node for node in result.graph.nodes if node.op == "ldmrt.attention.default")
    assert attention.args[3] == 1
    assert attention.shape == (result.graph.nodes[0].shape[0], 4096, 512)
    maker = Index(result.graph).maker
    assert {maker(value).op for value in attention.args[:3]} == {"aten.slice.Tensor"}  # type: ignore[union-attr]


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
    assert result.fused == {
        "group_norm": 0,
        "geglu": 0,
        "attention": layers,
        "add_layer_norm": 2 * layers,
        "linear": 3 * layers,
    }
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
