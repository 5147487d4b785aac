"""Operation counts, against torch's own counter and against counts by hand."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from ldmrt.bench.flops import Cost, by_class, costs
from ldmrt.engines.protocol import TensorSpec
from ldmrt.errors import BadRequest
from ldmrt.export.capture import capture
from ldmrt.export.component import UNet
from ldmrt.graph import Graph, Node, Ref, specialize

F32 = torch.float32


def one(op: str, args: tuple[object, ...], shape: tuple[int, ...], *inputs: TensorSpec) -> Cost:
    node = Node("out", op, args, {}, shape, F32)
    return costs(Graph("one", inputs, {}, {}, (node,), {"out": "out"}))[0]


def test_products_by_hand() -> None:
    x, w = TensorSpec("x", (5, 7), F32), TensorSpec("w", (11, 7), F32)
    assert one("aten.linear.default", (Ref("x"), Ref("w")), (5, 11), x, w) == Cost(
        "aten.linear.default", 2 * 5 * 7 * 11, 4 * (35 + 77 + 55)
    )
    x, w = TensorSpec("x", (2, 3, 8, 8), F32), TensorSpec("w", (4, 3, 3, 3), F32)
    assert one("aten.conv2d.default", (Ref("x"), Ref("w")), (2, 4, 8, 8), x, w).flops == 2 * 2 * 4 * 64 * 27
    q, k = TensorSpec("q", (2, 8, 100, 40), F32), TensorSpec("k", (2, 8, 77, 40), F32)
    attention = one("aten.scaled_dot_product_attention.default", (Ref("q"), Ref("k"), Ref("k")), (2, 8, 100, 40), q, k)
    assert attention.flops == 4 * 2 * 8 * 100 * 77 * 40
    assert attention.nbytes == 4 * 2 * 8 * 40 * (100 + 77 + 100)  # keys and values are the same tensor here


def test_fused_operators() -> None:
    """The products of a fused attention; both results of the residual sum and its norm; nothing for packed weights."""
    q, k = TensorSpec("q", (2, 100, 320), F32), TensorSpec("k", (2, 77, 320), F32)
    attention = one("ldmrt.attention.default", (Ref("q"), Ref("k"), Ref("k"), 8, 0.1), (2, 100, 320), q, k)
    assert attention.flops == 4 * 2 * 8 * 100 * 77 * 40
    x, w = TensorSpec("x", (6, 10), F32), TensorSpec("w", (10,), F32)
    nodes = (
        Node("both", "ldmrt.add_layer_norm.default", (Ref("x"), Ref("x"), Ref("w"), Ref("w"), 1e-5), {}, (), F32),
        Node("total", "python.getitem", (Ref("both"), 0), {}, (6, 10), F32),
        Node("norm", "python.getitem", (Ref("both"), 1), {}, (6, 10), F32),
        Node("packed", "aten.cat.default", ((Ref("w"), Ref("w")),), {}, (20,), F32),
        Node("halves", "aten.chunk.default", (Ref("norm"), 2, 1), {}, (), F32),
        Node("half", "python.getitem", (Ref("halves"), 0), {}, (6, 5), F32),
    )
    found = costs(Graph("part", (x,), {"w": w}, {}, nodes, {"half": "half", "total": "total", "packed": "packed"}))
    assert [cost.nbytes for cost in found] == [4 * (60 + 10), 4 * 60, 4 * 60, 0, 0, 0]


def test_views_are_free() -> None:
    x = TensorSpec("x", (5, 7), F32)
    assert one("aten.transpose.int", (Ref("x"), 0, 1), (7, 5), x) == Cost("aten.transpose.int", 0, 0)


def test_free_dimensions_are_refused() -> None:
    with pytest.raises(BadRequest, match="free shape"):
        one("aten.silu.default", (Ref("x"),), (1,), TensorSpec("x", ("rows",), F32))


def test_a_unet_agrees_with_torchs_counter() -> None:
    """Exactly: both count the same products, on the meta device."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=24,
            attention_head_dim=4,
            norm_num_groups=8,
        ).eval()
    inputs = [
        TensorSpec("latents", ("rows", 4, 16, 16), F32),
        TensorSpec("timesteps", ("rows",), F32),
        TensorSpec("encoder_hidden_states", ("rows", "tokens", 24), F32),
    ]
    graph = specialize(capture("unet", UNet(unet), inputs, ["model_output"]), {"rows": 2, "tokens": 77})
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.no_grad():
        unet(torch.empty(2, 4, 16, 16), torch.empty(2), torch.empty(2, 77, 24))
    assert sum(cost.flops for cost in costs(graph)) == counter.get_total_flops()
    classes = by_class(costs(graph))
    assert {"attention", "convolution", "gemm", "normalization", "other"} == set(classes)
    assert classes["normalization"].flops == 0 < classes["normalization"].nbytes
