"""Kernels of ours as layers of TensorRT plans: what is launched, on what, and with which numbers.

TensorRT itself needs a GPU to be loaded. What stands in for it here keeps the rules of its parser and of its plugin module; that the
launches compute what they should is tried in Triton's interpreter.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

import ldmrt
from ldmrt.engines.protocol import TensorSpec
from ldmrt.engines.tensorrt import LIBRARIES, Library
from ldmrt.errors import BuildError, EngineMismatch
from ldmrt.export.onnx import write_onnx
from ldmrt.export.options import Options
from ldmrt.export.plugins import OPERATORS, Layer, layers, plugins_of, register
from ldmrt.export.source import Source
from ldmrt.export.tensorrt import build_plan
from ldmrt.graph import Graph, Node, Ref
from ldmrt.kernels import elf, launch
from ldmrt.kernels.attention import attention, attention_reference
from ldmrt.kernels.group_norm import group_norm_silu
from ldmrt.kernels.variant import function
from ldmrt.weights import WeightFile, write
from tests.kernels.compiled import needs_triton, tool

pytestmark = needs_triton

F16, F32 = torch.float16, torch.float32
FAKE = Library("tensorrt", ("tests.export.fake_builder",), "tensorrt", (10, 13), None, False, plugins=True)

# Two programs for each row of queries, and a group norm whose positions are shared by several programs.
QUERIES, KEYS, HEADS, WIDTH = 130, 77, 2, 32
CHANNELS, GROUPS, SIDE = 32, 4, 64


def graph(dtype: torch.dtype, side: int = SIDE) -> Graph:
    """An attention, and a group norm with the time embedding; what they give is changed by other operators."""
    rows = (1, QUERIES, WIDTH)
    picture = (2, CHANNELS, side, side)
    return Graph(
        name="part",
        inputs=(
            TensorSpec("q", rows, dtype),
            TensorSpec("k", (1, KEYS, WIDTH), dtype),
            TensorSpec("v", (1, KEYS, WIDTH), dtype),
            TensorSpec("x", picture, dtype),
            TensorSpec("t", (2, CHANNELS), dtype),
        ),
        weights={name: TensorSpec(name, (CHANNELS,), dtype) for name in ("norm.weight", "norm.bias")},
        constants={},
        nodes=(
            Node("k2", "aten.mul.Tensor", (Ref("k"), 2.0), {}, (1, KEYS, WIDTH), dtype),
            Node("att", OPERATORS[0], (Ref("q"), Ref("k2"), Ref("v"), HEADS, 0.3), {}, rows, dtype),
            Node("out", "aten.neg.default", (Ref("att"),), {}, rows, dtype),
            Node(
                "norm",
                OPERATORS[1],
                (Ref("x"), Ref("norm.weight"), Ref("norm.bias"), GROUPS, 1e-5, True, Ref("t")),
                {},
                picture,
                dtype,
            ),
            Node("sum", "aten.add.Tensor", (Ref("norm"), Ref("x")), {}, picture, dtype),
        ),
        outputs={"attended": "out", "normed": "sum"},
    )


@pytest.fixture
def held(tmp_path: Path) -> dict[str, WeightFile]:
    return written(tmp_path, F16)


def written(folder: Path, dtype: torch.dtype) -> dict[str, WeightFile]:
    (folder / "weights").mkdir()
    path, generator = folder / "weights" / "w.safetensors", torch.Generator().manual_seed(5)
    specs = list(graph(dtype).weights.values())
    write(path, specs, lambda _: torch.randn(CHANNELS, generator=generator).to(dtype))
    return dict.fromkeys(graph(dtype).weights, WeightFile(path))


def flat(found: dict[str, tuple[Layer, ...]]) -> list[Layer]:
    return [layer for made in found.values() for layer in made]


@pytest.mark.parametrize("arch", [80, 89, 90, 120])
@pytest.mark.parametrize("side", [4, SIDE])
def test_they_launch_what_the_operators_launch(arch: int, side: int) -> None:
    made = flat(layers(graph(F16, side), arch))
    meta = {spec.name: torch.empty(spec.shape, dtype=F16, device="meta") for spec in graph(F16, side).inputs}  # type: ignore[arg-type]
    weight = torch.empty(CHANNELS, dtype=F16, device="meta")
    with launch.tracing(arch) as expected:
        attention(meta["q"], meta["k"], meta["v"], HEADS, 0.3)
        group_norm_silu(meta["x"], weight, weight.clone(), GROUPS, 1e-5, True, meta["t"])
    assert [layer.plugin.variant.kernel for layer in made] == [each.variant.kernel for each in expected]
    assert [layer.plugin.grid for layer in made] == [each.grid for each in expected]
    for layer, each in zip(made, expected, strict=True):
        names, variant = function(each.variant.kernel).arg_names, layer.plugin.variant
        numbers = {n: a for n, a in zip(names, each.arguments, strict=False) if not isinstance(a, torch.Tensor)}
        assert dict(variant.constants) == {**dict(each.variant.constants), **numbers, "DEPENDENT": False}
        tensors = [argument for argument in each.arguments if isinstance(argument, torch.Tensor)]
        assert layer.plugin.inputs + len(layer.plugin.outputs) == len(tensors) == len(variant.types)
        assert [(tuple(t.shape), t.dtype) for t in tensors[layer.plugin.inputs :]] == list(layer.plugin.outputs)
        assert (variant.num_warps, variant.num_stages) == (each.variant.num_warps, each.variant.num_stages)


def test_what_they_read_and_make() -> None:
    found = layers(graph(F16), 89)
    assert [(layer.inputs[:3], layer.outputs) for layer in found["att"]] == [(("q", "k2", "v"), ("att",))]
    moments, normalize = found["norm"]
    assert {"x", "t"} <= set(moments.inputs) <= {"x", "t", "norm.weight", "norm.bias"}
    assert {*moments.outputs, "norm.weight", "norm.bias", "t", "x"} == set(normalize.inputs)
    assert normalize.outputs == ("norm",)


def test_names_tell_apart_what_differs() -> None:
    several = [layers(graph(dtype, side), arch) for dtype in (F16, F32) for side in (4, SIDE) for arch in (86, 89)]
    norms = [[layer.plugin.name for layer in found["norm"]] for found in several]
    assert len({name for names in norms for name in names}) == sum(map(len, norms))
    attentions = [found["att"][0].plugin.name for found in several if "att" in found]
    assert len(attentions) == 4  # float32 is the library's
    assert len(set(attentions)) == 2  # whatever the picture's side is
    assert [p.name for p in plugins_of(layers(graph(F16), 89))] == sorted(
        layer.plugin.name for layer in flat(layers(graph(F16), 89))
    )


def test_the_onnx_file_names_them(held: dict[str, WeightFile], tmp_path: Path) -> None:
    found = layers(graph(F16), 89)
    write_onnx(graph(F16), held, tmp_path / "part.onnx", found)
    model = onnx.load(str(tmp_path / "part.onnx"), load_external_data=False)
    assert {(item.domain, item.version) for item in model.opset_import} == {("", 21), ("ldmrt", 1)}
    ours = [node for node in model.graph.node if node.domain == "ldmrt"]
    assert [node.op_type for node in ours] == [layer.plugin.name for layer in flat(found)]
    for node in ours:
        attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        assert attributes == {"plugin_namespace": b"ldmrt", "plugin_version": b"1", "aot": 1}
    assert {"norm.weight", "norm.bias"} <= set(ours[2].input)
    assert {node.op_type for node in model.graph.node if not node.domain} == {"Mul", "Neg", "Add"}


@pytest.mark.parametrize("arch", [80, 90])
def test_the_assembly_takes_pointers_alone(arch: int, tmp_path: Path) -> None:
    """By what the assembler that comes with Triton makes of it."""
    for layer in flat(layers(graph(F16), arch)):
        made = layer.plugin.compile()
        assert re.search(rf"^\.target sm_{arch}a?$", made.text, re.MULTILINE)
        (tmp_path / "kernel.ptx").write_text(made.text)
        target = re.search(r"^\.target (\S+)$", made.text, re.MULTILINE)
        assert target is not None
        tool("ptxas", f"--gpu-name={target[1]}", tmp_path / "kernel.ptx", "-o", tmp_path / "kernel.cubin")
        usage = elf.usage((tmp_path / "kernel.cubin").read_bytes())
        assert usage.symbol == made.symbol
        assert usage.threads == made.threads == 32 * layer.plugin.variant.num_warps
        assert usage.parameters == (8,) * (len(layer.inputs) + len(layer.outputs))


@pytest.mark.interpreted
@pytest.mark.parametrize(("dtype", "side"), [(F16, SIDE), (F32, 4)])
@pytest.mark.slow
def test_the_file_computes_what_the_graph_does(tmp_path: Path, dtype: torch.dtype, side: int) -> None:
    """Each node of ours launches what its plugin says, on what the node reads: in the interpreter, pointers only."""
    part = graph(dtype, side)
    held, found = written(tmp_path, dtype), layers(part, 89)
    write_onnx(part, held, tmp_path / "part.onnx", found)
    runs = ReferenceEvaluator(str(tmp_path / "part.onnx"), new_ops=[evaluated(layer) for layer in flat(found)])
    generator = torch.Generator().manual_seed(3)
    given = {spec.name: torch.randn(spec.shape, generator=generator).to(dtype) for spec in part.inputs}  # type: ignore[arg-type]
    attended, normed = runs.run(None, {name: tensor.numpy() for name, tensor in given.items()})
    weight, bias = (held[name][name].double() for name in ("norm.weight", "norm.bias"))
    q, k, v, x, t = (tensor.double() for tensor in given.values())
    expected = -attention_reference(q, k * 2, v, HEADS, 0.3)
    norm = torch.nn.functional.group_norm(x + t[:, :, None, None], GROUPS, weight, bias, 1e-5)
    # A few roundings of the dtype; TF32, of attention in float16's products, rounds no more.
    allowed = 3e-3 if dtype == F16 else 1e-5
    assert relative(attended, expected) < allowed
    assert relative(normed, torch.nn.functional.silu(norm) + x) < allowed


def relative(found: Any, expected: torch.Tensor) -> float:
    return float((torch.from_numpy(found).double() - expected).norm() / expected.norm())


def evaluated(layer: Layer) -> type[OpRun]:
    plugin = layer.plugin

    def run(_self: Any, *inputs: np.ndarray, **_attributes: Any) -> tuple[np.ndarray, ...]:
        outputs = [torch.full(shape, torch.nan, dtype=dtype) for shape, dtype in plugin.outputs]
        tensors = [*(torch.from_numpy(np.array(array)) for array in inputs), *outputs]
        kernel, constants = function(plugin.variant.kernel), dict(plugin.variant.constants)
        pointers = dict(zip((n for n in kernel.arg_names if n not in constants), tensors, strict=True))
        kernel[plugin.grid](**pointers, **constants, num_warps=plugin.variant.num_warps)
        return tuple(output.numpy() for output in outputs)

    return type(plugin.name, (OpRun,), {"op_domain": "ldmrt", "_run": run})


def test_the_library_is_told_the_launch(held: dict[str, WeightFile], tmp_path: Path) -> None:
    found = layers(graph(F16), 89)
    write_onnx(graph(F16), held, tmp_path / "part.onnx", found)
    with pytest.raises(BuildError, match=r"tensorrt cannot read part.onnx: Plugin not found: attention_forward_"):
        build_plan(FAKE, tmp_path / "part.onnx", tmp_path / "plan", targets=["sm_89"])
    for _ in range(2):  # as often as there are engines
        register(FAKE, plugins_of(found))
    build_plan(FAKE, tmp_path / "part.onnx", tmp_path / "plan", targets=["sm_89"])
    built = json.loads((tmp_path / "plan").read_bytes())
    assert [each["name"] for each in built] == [layer.plugin.name for layer in flat(found)]
    for each, layer in zip(built, flat(found), strict=True):
        made = layer.plugin.compile()
        assert each["grid"] == [*layer.plugin.grid, 1][:3]
        assert each["block"] == [made.threads, 1, 1]
        assert (each["symbol"], each["text"], each["shared"]) == (made.symbol, made.text, made.shared)
        assert each["numbers"] == 0


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, and TensorRT, for what asks whether they are there."""
    monkeypatch.setitem(LIBRARIES, "tensorrt", FAKE)
    monkeypatch.setattr("ldmrt.export.options.gpu_at_hand", lambda: "sm_89")
    monkeypatch.setattr("ldmrt.export.build.certified", lambda *given: given[4])  # the plans themselves cannot run


@pytest.mark.slow
@pytest.mark.usefixtures("a_gpu")
def test_a_bundle_of_such_plans(tiny_model: Path, tmp_path: Path) -> None:
    bundle = ldmrt.build_engines(tiny_model, tmp_path / "out", engine="tensorrt", plugins=True)
    for component, source in (("text_encoder", "text_encoder"), ("step", "unet"), ("decoder", "decoder")):
        passes = bundle.manifest.passes[source]
        (record,) = [r for r in bundle.manifest.engines if r.component == component]
        built = json.loads(bundle.checked(record.files[0]).read_bytes())
        kernels = [each["name"].rpartition("_")[0] for each in built]
        norms = [name for name in kernels if name in ("group_norm_fused", "group_norm_normalize")]
        assert len(norms) == passes["group_norm.fused"]
        assert kernels.count("attention_forward") == passes["attention.fused"]
        assert len(norms) > 0 or component == "text_encoder"
        assert all(".target sm_89" in each["text"] for each in built)
    again = ldmrt.build_engines(tiny_model, tmp_path / "out", engine="tensorrt", plugins=True)
    assert again.manifest.engines == bundle.manifest.engines


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"engine": "torch"}, BuildError, r"layers of TensorRT plans, engine torch has none; use --engine tensorrt$"),
        ({"engine": "onnxruntime"}, BuildError, r"engine onnxruntime has none; use --engine tensorrt$"),
        (
            {"engine": "tensorrt-rtx", "targets": ["sm_89"]},
            EngineMismatch,
            r"engine tensorrt-rtx takes no plugins; use ",
        ),
    ],
)
def test_engines_that_take_none(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, options: Any, error: type[Exception], message: str
) -> None:
    rtx = LIBRARIES["tensorrt-rtx"]
    there = Library(rtx.kind, FAKE.modules, rtx.extra, rtx.least, rtx.targets, compiles_at_run_time=True)
    monkeypatch.setitem(LIBRARIES, "tensorrt-rtx", there)
    with pytest.raises(error, match=message):
        Options.resolve(Source.open(tiny_model), sizes=None, batch_sizes=(1,), dtype="auto", plugins=True, **options)


def test_a_gpu_that_kernels_are_not_compiled_for(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, a_gpu: None
) -> None:
    monkeypatch.setattr("ldmrt.export.options.gpu_at_hand", lambda: "sm_75")
    with pytest.raises(BuildError, match=r"target 'sm_75' is not known; choose among sm_80"):
        ldmrt.build_engines(tiny_model, tiny_model / "out", engine="tensorrt", plugins=True)


def test_a_library_without_the_module() -> None:
    bare = Library("tensorrt", ("tests.engines.fake_tensorrt",), "tensorrt", (1, 4), None, False, plugins=True)
    with pytest.raises(
        EngineMismatch, match=r"^engine tensorrt: .*plugin cannot be loaded .*leave --plugins out$"
    ) as e:
        bare.load_plugins()
    assert "\n" not in str(e.value)
