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
from ldmrt.export.passes.clean import clean
from ldmrt.export.passes.fuse import fuse
from ldmrt.export.passes.layout import layout
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


def test_what_is_put_together_before_a_norm() -> None:
    """Every operand once, the skip connection's too; both results with the nodes that take them."""
    x, skip = TensorSpec("x", (2, 8, 5, 3), F32), TensorSpec("skip", (2, 4, 5, 3), F32)
    weights = {name: TensorSpec(name, (size,), F32) for name, size in (("g", 12), ("b", 12), ("own", 8))}
    args = (Ref("x"), Ref("x"), Ref("skip"), Ref("g"), Ref("b"), 4, 1e-5, True, Ref("own"))
    nodes = (
        Node("both", "ldmrt.add_group_norm_silu.default", args, {}, (), F32),
        Node("total", "python.getitem", (Ref("both"), 0), {}, (2, 12, 5, 3), F32),
        Node("norm", "python.getitem", (Ref("both"), 1), {}, (2, 12, 5, 3), F32),
    )
    found = costs(Graph("part", (x, skip), weights, {}, nodes, {"total": "total", "norm": "norm"}))
    assert [cost.nbytes for cost in found] == [4 * (2 * 15 * (8 + 4) + 12 + 12 + 8), 4 * 2 * 15 * 12, 4 * 2 * 15 * 12]
    assert by_class(found).keys() == {"normalization", "other"}
    # A total that nothing reads is not counted.
    alone = costs(Graph("part", (x, skip), weights, {}, (nodes[0], nodes[2]), {"norm": "norm"}))
    assert [cost.nbytes for cost in alone] == [found[0].nbytes, found[2].nbytes]


def test_upsampling() -> None:
    x, y, bias = (
        TensorSpec(name, shape, F32) for name, shape in (("x", (2, 8, 5, 3)), ("y", (2, 8, 5, 3)), ("b", (8,)))
    )
    op = "ldmrt.add_upsample.default"
    shape = (2, 8, 10, 6)
    assert one(op, (Ref("x"), Ref("y"), Ref("b"), 2), shape, x, y, bias) == Cost(op, 0, 4 * (2 * 240 + 8 + 4 * 240))
    assert one(op, (Ref("x"), None, None, 2), shape, x) == Cost(op, 0, 4 * (240 + 4 * 240))


def test_biases_left_to_the_next_operator() -> None:
    x, bias = TensorSpec("x", (6, 10), F32), TensorSpec("b", (10,), F32)
    assert one("ldmrt.geglu.default", (Ref("x"), Ref("b")), (6, 5), x, bias).nbytes == 4 * (60 + 10 + 30)
    x, shift = TensorSpec("x", (2, 8, 5, 3), F32), TensorSpec("t", (2, 8), F32)
    args = (Ref("x"), None, None, 4, 1e-5, True, Ref("t"), Ref("own"))
    norm = one("ldmrt.group_norm_silu.default", args, (2, 8, 5, 3), x, shift, TensorSpec("own", (8,), F32))
    assert norm.nbytes == 4 * (240 + 16 + 8 + 240)


def test_a_product_and_its_gate() -> None:
    """Both halves are multiplied; what is gated need never be in memory."""
    x, w, bias = (TensorSpec(name, shape, F32) for name, shape in (("x", (5, 7)), ("w", (22, 7)), ("b", (22,))))
    op = "ldmrt.linear_geglu.default"
    found = one(op, (Ref("x"), Ref("w"), Ref("b")), (5, 11), x, w, bias)
    assert found == Cost(op, 2 * 5 * 7 * 22, 4 * (35 + 154 + 22 + 55))
    assert by_class([found]).keys() == {"gemm"}
    x, w = TensorSpec("x", (2, 3, 8, 8), F32), TensorSpec("w", (4, 3, 3, 3), F32)
    convolution = one("ldmrt.conv2d.default", (Ref("x"), Ref("w"), 2, 1), (2, 4, 4, 4), x, w)
    assert convolution.flops == 2 * 2 * 4 * 16 * 27
    assert by_class([convolution]).keys() == {"convolution"}


@pytest.mark.parametrize("op", ["aten.transpose.int", "aten.reshape.default", "aten.contiguous.default"])
def test_what_moves_nothing_is_free(op: str) -> None:
    """Or need not: a reshape and a copy for the sake of an order may find their elements as they want them."""
    assert one(op, (Ref("x"), 0, 1), (7, 5), TensorSpec("x", (5, 7), F32)) == Cost(op, 0, 0)


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
    captured, sizes = capture("unet", UNet(unet), inputs, ["model_output"]), {"rows": 2, "tokens": 77}
    graph = specialize(captured, sizes)
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.no_grad():
        unet(torch.empty(2, 4, 16, 16), torch.empty(2), torch.empty(2, 77, 24))
    assert sum(cost.flops for cost in costs(graph)) == counter.get_total_flops()
    classes = by_class(costs(graph))
    assert {"attention", "convolution", "gemm", "normalization", "other"} == set(classes)
    assert classes["normalization"].flops == 0 < classes["normalization"].nbytes
    # Fused, laid out, with convolutions that have become matrix products: the same operations, and fewer bytes.
    fused = costs(specialize(layout(fuse(clean(captured)).graph), sizes))
    assert sum(cost.flops for cost in fused) == counter.get_total_flops()
    assert sum(cost.nbytes for cost in fused) < 0.7 * sum(cost.nbytes for cost in costs(graph))
    assert by_class(fused)["gemm"].flops > classes["gemm"].flops
