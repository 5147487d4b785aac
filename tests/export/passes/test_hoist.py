"""Hoisting: the three parts together are the whole, and each holds what belongs to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.engines.torch import TorchEngine
from ldmrt.errors import BuildError
from ldmrt.export.capture import capture
from ldmrt.export.component import UNet
from ldmrt.export.passes.clean import clean
from ldmrt.export.passes.hoist import Hoisted, Kind, classify, hoist
from ldmrt.graph import Dim, Graph, Node, Ref, from_json, to_json
from ldmrt.operators import VIEWS

F32 = torch.float32
ROWS = Dim("rows")
CPU = torch.device("cpu")
KINDS: dict[str, Kind] = {"latents": "step", "timesteps": "schedule", "text": "request"}


def node(name: str, op: str, *args: Any, shape: tuple[Any, ...] = (ROWS, 4), **kwargs: Any) -> Node:
    return Node(name, f"aten.{op}", args, kwargs, shape, F32)


WEIGHTS = {name: TensorSpec(name, (4, 4), F32) for name in ("k.weight", "t.weight", "o.weight")}


def graph(*nodes: Node, outputs: dict[str, str] | None = None) -> Graph:
    return Graph(
        name="unet",
        inputs=tuple(TensorSpec(name, ("rows", 4), F32) for name in KINDS),
        weights=WEIGHTS,
        constants={"table": torch.arange(4.0)},
        nodes=nodes,
        outputs=outputs or {"out": nodes[-1].name},
    )


def ten() -> Graph:
    """A network of ten nodes, with at least one of every class."""
    return graph(
        node("k", "linear.default", Ref("text"), Ref("k.weight")),
        node("k heads", "view.default", Ref("k"), (ROWS, 2, 2), shape=(ROWS, 2, 2)),
        node("k turned", "transpose.int", Ref("k heads"), 1, 2, shape=(ROWS, 2, 2)),
        node("t", "linear.default", Ref("timesteps"), Ref("t.weight")),
        node("norm", "neg.default", Ref("o.weight"), shape=(4, 4)),
        node("h", "add.Tensor", Ref("latents"), Ref("t")),
        node("q", "view.default", Ref("h"), (ROWS, 2, 2), shape=(ROWS, 2, 2)),
        node("scores", "matmul.default", Ref("q"), Ref("k turned"), shape=(ROWS, 2, 2)),
        node("flat", "flatten.using_ints", Ref("scores"), 1),
        node("out", "matmul.default", Ref("flat"), Ref("norm")),
    )


def weights(part: Graph, seed: int = 0) -> dict[str, torch.Tensor]:
    return {
        name: torch.randn(
            *map(int, spec.shape), generator=torch.Generator().manual_seed(seed + len(name) + ord(name[0]))
        )
        for name, spec in part.weights.items()
    }


def values(seed: int = 0, rows: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, 4, generator=generator) for name in KINDS}


def together(
    parts: Hoisted, given: dict[str, torch.Tensor], held: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """`context`, `schedule` and `step`, each from its JSON, one after the other."""
    known = dict(given)
    result: dict[str, torch.Tensor] = {}
    for part in (parts.context, parts.schedule, parts.step):
        if not part.outputs:
            continue
        back = from_json(to_json(part), part.constants)
        engine = TorchEngine(back, {name: held[name] for name in back.weights}, CPU)
        known |= (result := engine.run({name: known[name] for name in engine.inputs}))
    return result


def assert_whole(part: Graph) -> Hoisted:
    parts = hoist(part, KINDS)
    expected = TorchEngine(part, weights(part), CPU).run(values())
    found = together(parts, values(), weights(part))
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    return parts


def names(part: Graph) -> list[str]:
    return [item.name for item in part.nodes]


def inputs(part: Graph) -> list[str]:
    return [spec.name for spec in part.inputs]


def test_ten_nodes_in_three_parts() -> None:
    parts = assert_whole(ten())
    assert inputs(parts.context) == ["text"]
    assert inputs(parts.schedule) == ["timesteps"]
    assert names(parts.context) == ["k"]
    assert parts.context.outputs == {"k": "k"}
    assert names(parts.schedule) == ["t"]
    assert inputs(parts.step) == ["latents", "k", "t"]
    assert parts.counts == {"const": 1, "request": 3, "schedule": 1, "step": 5}
    assert set(parts.context.weights) == {"k.weight"}
    assert set(parts.step.weights) == {"o.weight"}


def test_classes() -> None:
    classes = classify(ten(), KINDS)
    assert {name for name, kind in classes.items() if kind == "request"} == {"text", "k", "k heads", "k turned"}
    assert classes["norm"] == "const"
    assert classes["out"] == "step"


def test_views_sink_into_the_step() -> None:
    step = hoist(ten(), KINDS).step
    assert {"k heads", "k turned"} <= set(names(step))
    # What crosses is dense, as its layer made it.
    assert step.inputs[1] == TensorSpec("k", ("rows", 4), F32)


def test_what_is_not_one_row_per_row_sinks() -> None:
    parts = assert_whole(
        graph(
            node("k", "linear.default", Ref("text"), Ref("k.weight")),
            node("twice", "cat.default", (Ref("k"), Ref("k")), shape=(Dim("rows", 2), 4)),
            node("wide", "view.default", Ref("twice"), (ROWS, 8), shape=(ROWS, 8)),
            node("part", "slice.Tensor", Ref("wide"), 1, 0, 4),
            node("half", "neg.default", Ref("part")),
            node("out", "add.Tensor", Ref("latents"), Ref("half")),
        )
    )
    # What is made of the doubled rows is one row per row again, and is what crosses.
    assert list(parts.context.outputs.values()) == ["half"]


def test_lists_of_values_do_not_cross() -> None:
    parts = assert_whole(
        graph(
            node("t", "linear.default", Ref("timesteps"), Ref("t.weight")),
            node("both", "chunk.default", Ref("t"), 2, 1, shape=()),
            Node("scale", "python.getitem", (Ref("both"), 0), {}, (ROWS, 2), F32),
            Node("shift", "python.getitem", (Ref("both"), 1), {}, (ROWS, 2), F32),
            node("q", "slice.Tensor", Ref("latents"), 1, 0, 2, shape=(ROWS, 2)),
            node("scaled", "mul.Tensor", Ref("q"), Ref("scale"), shape=(ROWS, 2)),
            node("out", "add.Tensor", Ref("scaled"), Ref("shift"), shape=(ROWS, 2)),
        )
    )
    assert all("both" not in part.outputs.values() for part in (parts.context, parts.schedule))


def test_one_of_two_results_crosses() -> None:
    """Of an operator of the text that gives two: what the step reads of it, and not the pair."""
    part = graph(
        node("k", "linear.default", Ref("text"), Ref("k.weight")),
        Node("both", "ldmrt.add_layer_norm.default", (Ref("k"), Ref("text"), None, None, 1e-5), {}, (), F32),
        Node("total", "python.getitem", (Ref("both"), 0), {}, (ROWS, 4), F32),
        Node("norm", "python.getitem", (Ref("both"), 1), {}, (ROWS, 4), F32),
        node("negative", "neg.default", Ref("total")),
        node("q", "add.Tensor", Ref("latents"), Ref("norm")),
        node("out", "mul.Tensor", Ref("q"), Ref("negative")),
    )
    parts = assert_whole(part)
    assert list(parts.context.outputs.values()) == ["norm", "negative"]
    assert names(parts.step) == ["q", "out"]


def test_what_weights_alone_make_stands_where_it_is_read() -> None:
    """Such as the sum of two layers' biases, which the operator behind them adds."""
    part = graph(
        node("h", "add.Tensor", Ref("latents"), Ref("text")),
        node("biases", "add.Tensor", Ref("k.weight"), Ref("t.weight"), shape=(4, 4)),
        node("out", "linear.default", Ref("h"), Ref("biases")),
    )
    parts = assert_whole(part)
    assert parts.counts == {"const": 1, "request": 0, "schedule": 0, "step": 2}
    assert names(parts.step) == names(part)
    assert not parts.context.outputs


def test_schedule_may_depend_on_the_request() -> None:
    parts = assert_whole(
        graph(
            node("k", "linear.default", Ref("text"), Ref("k.weight")),
            node("t", "add.Tensor", Ref("timesteps"), Ref("k")),
            node("out", "add.Tensor", Ref("latents"), Ref("t")),
        )
    )
    assert inputs(parts.schedule) == ["timesteps", "text"]
    assert not parts.context.outputs


def test_one_layer_used_twice_makes_two_values() -> None:
    parts = assert_whole(
        graph(
            node("negative", "neg.default", Ref("text")),
            node("k", "linear.default", Ref("text"), Ref("k.weight")),
            node("l", "linear.default", Ref("negative"), Ref("k.weight")),
            node("sum", "add.Tensor", Ref("latents"), Ref("k")),
            node("out", "mul.Tensor", Ref("sum"), Ref("l")),
        )
    )
    assert len(parts.context.outputs) == 2


@pytest.mark.parametrize(
    ("layers", "name"),
    [
        (["down.0.attn2.to_k"], "down.0.attn2.to_k"),
        (["down.0.attn2.to_k", "down.0.attn2.to_v", "up.1.attn2.to_k"], "attn2.to_k+to_v"),
        (["down.0.attn1.to_k", "down.0.attn2.to_v"], "attn1+attn2.to_k+to_v"),
        (["down.0.time_emb_proj", "mid.3.time_emb_proj"], "time_emb_proj"),
        (["down.0.to_out.0", "mid.3.to_out.0"], "to_out.0"),
        (["query", "key"], "query+key"),
    ],
)
def test_a_weight_made_of_many_is_named_after_what_they_have_in_common(layers: list[str], name: str) -> None:
    part = graph(
        node("both", "cat.default", tuple(Ref(f"{layer}.weight") for layer in layers), 0, shape=(4, 4)),
        node("other", "neg.default", Ref("text")),
        node("k", "linear.default", Ref("text"), Ref("both")),
        node("l", "linear.default", Ref("other"), Ref("both")),
        node("sum", "add.Tensor", Ref("latents"), Ref("k")),
        node("out", "mul.Tensor", Ref("sum"), Ref("l")),
    )
    part = part.replace(weights={f"{x}.weight": TensorSpec(f"{x}.weight", (4, 4), F32) for x in layers})
    context = hoist(part, KINDS).context
    assert list(context.outputs) == [name, f"{name}.2"]


def test_an_output_that_does_not_need_the_latents() -> None:
    part = graph(
        node("k", "linear.default", Ref("text"), Ref("k.weight")),
        node("out", "neg.default", Ref("latents")),
        outputs={"out": "out", "keys": "k"},
    )
    assert_whole(part)


def test_an_input_without_a_class_is_refused() -> None:
    with pytest.raises(BuildError, match="no class is known for the inputs text"):
        hoist(ten(), {"latents": "step", "timesteps": "schedule"})


# ---------------------------------------------------------------------------------------------------- real networks

SMALL: dict[str, dict[str, Any]] = {
    "two levels": {"block_out_channels": (8, 16), "attention_head_dim": 2},
    "SD 2": {
        "block_out_channels": (8, 16, 16),
        "attention_head_dim": [1, 2, 2],
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "scale and shift by time": {"block_out_channels": (8, 16), "resnet_time_scale_shift": "scale_shift"},
    "two transformer layers, attention to text alone": {
        "block_out_channels": (8, 16),
        "transformer_layers_per_block": 2,
        "only_cross_attention": True,
    },
}


def unet(device: str = "cpu", **config: Any) -> UNet:
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return UNet(UNet2DConditionModel(**config).eval())


def small(device: str, config: dict[str, Any]) -> UNet:
    levels = len(config["block_out_channels"])
    return unet(
        device,
        sample_size=8,
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        **config,
    )


def captured(module: UNet, width: int, side: int) -> Graph:
    specs = (
        TensorSpec("latents", ("rows", 4, side, side), F32),
        TensorSpec("timesteps", ("rows",), F32),
        TensorSpec("text", ("rows", "tokens", width), F32),
    )
    return clean(capture("unet", module, specs, ("model_output",)))


@pytest.mark.parametrize("name", SMALL)
def test_small_unets(name: str) -> None:
    part = captured(small("meta", SMALL[name]), 12, 8)
    parts = hoist(part, KINDS)
    module = small("cpu", SMALL[name])
    held = dict(module.named_parameters())
    generator = torch.Generator().manual_seed(1)
    for rows, tokens in ((1, 5), (2, 77)):
        given = {
            "latents": torch.randn(rows, 4, 8, 8, generator=generator),
            "timesteps": torch.rand(rows, generator=generator) * 999,
            "text": torch.randn(rows, tokens, 12, generator=generator),
        }
        whole = TorchEngine(part, held, CPU).run(given)["model_output"]
        found = together(parts, given, held)["model_output"]
        assert torch.equal(found, whole)  # the same calls on the same numbers
        with torch.inference_mode():
            assert torch.equal(
                whole,
                module(*given.values())[0],
            )
    assert all(output.endswith((".to_k", ".to_v")) for output in parts.context.outputs)
    assert all("time_emb_proj" in output or output.startswith("hoisted.") for output in parts.schedule.outputs)
    assert inputs(parts.step)[0] == "latents"


def test_stable_diffusion_1_5() -> None:
    """Its architecture, as its config.json has it, on the meta device: no weights are made."""
    module = unet(
        "meta",
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        cross_attention_dim=768,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    part = captured(module, 768, 64)
    parts = hoist(part, KINDS)
    # 16 cross-attentions: a projection, a view and a transpose for the key and for the value of each.
    assert parts.counts["request"] == 16 * 2 * 3
    assert len(parts.context.nodes) == 32
    assert sorted(parts.context.outputs) == sorted(
        name.removesuffix(".weight") for name in part.weights if ".attn2.to_k." in name or ".attn2.to_v." in name
    )
    # One projection of the time embedding for each of the 22 residual blocks.
    assert len(parts.schedule.outputs) == 22
    assert all(spec.shape[0] == "rows" for spec in parts.schedule.output_specs().values())
    # The step has the views of what crosses, and nothing else of theirs.
    classes = classify(part, KINDS)
    assert len(parts.step.nodes) == parts.counts["step"] + sum(
        classes[item.name] in ("request", "schedule") and item.op in VIEWS and item.name in set(names(parts.step))
        for item in part.nodes
    )
    assert [count_of(parts.step, op) for op in ("group_norm", "layer_norm", "scaled_dot_product_attention")] == [
        61,
        48,
        32,
    ]
    assert count_of(parts.context, "linear") == 32
    # With diffusers 0.42: 887 and 78. Twenty more would be a pass that no longer finds what it did.
    assert parts.counts["step"] < 907
    assert parts.counts["schedule"] < 98


def count_of(part: Graph, operator: str) -> int:
    return sum(item.op == f"aten.{operator}.default" for item in part.nodes)
