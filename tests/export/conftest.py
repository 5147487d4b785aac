"""What several tests of the compiler share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldmrt import original
from ldmrt.original import Piece
from tests.interpreted import pytest_configure, pytest_pyfunc_call, pytest_runtest_logreport

__all__ = ["pytest_configure", "pytest_pyfunc_call", "pytest_runtest_logreport"]


@pytest.fixture(scope="session")
def assert_strictly_typed() -> Callable[[Path], None]:
    """`assert_strictly_typed(path)`: in an ONNX file, what an operator declares to be of one type is of one type."""
    return strictly_typed


def strictly_typed(path: Path) -> None:
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    graph = model.graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    types |= {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    opset = next(item.version for item in model.opset_import if not item.domain)
    for node in graph.node:
        declared = onnx.defs.get_schema(node.op_type, opset).inputs
        found: dict[str, set[int]] = {}
        for place, name in enumerate(node.input):
            # The last input of some operators stands for any number of them.
            kind = declared[min(place, len(declared) - 1)].type_str
            if name:
                found.setdefault(kind, set()).add(types[name])
        for kind, several in found.items():
            names = sorted(map(onnx.TensorProto.DataType.Name, several))
            assert len(names) == 1, f"{node.op_type} {node.name}: its inputs of type {kind} are {names}"


@pytest.fixture(scope="session")
def write_single_file() -> Callable[..., Path]:
    """`write_single_file(path, model, components=None)` writes a diffusers folder's components (all if None) as one file in the original
    layout, and returns the path. The names are tested against diffusers' own conversion in tests/test_original.py.
    """
    return single_file


def single_file(path: Path, model: Path, components: tuple[str, ...] | None = None, prefixed: bool = True) -> Path:
    held = {
        folder.name: load_file(next(folder.glob("*.safetensors")))
        for folder in model.iterdir()
        if any(folder.glob("*.safetensors")) and (components is None or folder.name in components)
    }
    xl = (model / "text_encoder_2").is_dir()
    first = model / "text_encoder" / "config.json"
    refiner = not first.is_file()
    second = not refiner and json.loads(first.read_text())["hidden_act"] == "gelu"
    tensors: dict[str, torch.Tensor] = {}
    for folder, weights in held.items():
        if folder == "unet":
            prefix, pieces = "model.diffusion_model.", {n: Piece(c) for n, c in original.unet(weights).items()}
        elif folder == "vae":
            prefix, pieces = "first_stage_model.", {n: Piece(c) for n, c in original.vae(weights).items()}
        elif folder == "text_encoder_2" or second:
            prefix = f"conditioner.embedders.{0 if refiner else 1}.model." if xl else "cond_stage_model.model."
            pieces = {name: original.open_clip(name) for name in weights}
        else:
            prefix = "conditioner.embedders.0.transformer." if xl else "cond_stage_model.transformer."
            pieces = {name: Piece(f"text_model.{name.removeprefix('text_model.')}") for name in weights}
        tensors |= packed(weights, pieces, prefix if prefixed else "")
    save_file(tensors, path)
    return path


def packed(weights: Mapping[str, torch.Tensor], pieces: Mapping[str, Piece], prefix: str) -> dict[str, torch.Tensor]:
    """Weights as the original code has them: matrices of queries, keys and values in one, projections the other way round."""
    tensors: dict[str, torch.Tensor] = {}
    thirds: dict[str, dict[int, torch.Tensor]] = {}
    for name, piece in pieces.items():
        tensor = weights[name].T if piece.transposed else weights[name]
        if piece.third is not None:
            thirds.setdefault(piece.name, {})[piece.third] = tensor
            continue
        pixel = ".attn_1." in piece.name and tensor.dim() == 2
        tensors[prefix + piece.name] = (tensor[:, :, None, None] if pixel else tensor).contiguous()
    return tensors | {prefix + name: torch.cat([parts[i] for i in range(3)]) for name, parts in thirds.items()}
