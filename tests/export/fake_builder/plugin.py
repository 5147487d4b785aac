"""What ldmrt uses of `tensorrt.plugin` 10.14, strict: signatures are checked as the library checks them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, get_args, get_origin

from tests.export.fake_builder.types import DataType, Type

creators: dict[tuple[str, str, str], Creator] = {}
op = SimpleNamespace()


class TensorDesc:
    def __init__(self, shape: tuple[int, ...], dtype: DataType) -> None:
        self.type: Type = (shape, dtype)


class SymExprs:
    def __init__(self, length: int) -> None:
        self.length = length


class SymIntExprs(SymExprs):
    pass


class KernelLaunchParams:
    def __init__(
        self,
        grid_x: int = 1,
        grid_y: int = 1,
        grid_z: int = 1,
        block_x: int = 1,
        block_y: int = 1,
        block_z: int = 1,
        shared_mem: int = 0,
    ) -> None:
        self.grid, self.block, self.shared = (grid_x, grid_y, grid_z), (block_x, block_y, block_z), shared_mem


def from_shape_expr(shape_expr: tuple[int, ...], dtype: DataType) -> TensorDesc:
    assert isinstance(shape_expr, tuple)
    assert isinstance(dtype, DataType)
    return TensorDesc(shape_expr, dtype)


class Creator:
    def __init__(self, describe: Callable[..., Any]) -> None:
        signature = inspect.signature(describe)
        self._names = list(signature.parameters)
        if any(parameter.annotation is not TensorDesc for parameter in signature.parameters.values()):
            raise ValueError("only tensors are expected here")
        self._outputs = get_args(signature.return_annotation)
        if get_origin(signature.return_annotation) is not tuple or set(self._outputs) != {TensorDesc}:
            raise ValueError(f"Return argument is of type {signature.return_annotation}")
        self._describe = describe
        self._kernel: Callable[..., Any] | None = None

    def implement(self, kernel: Callable[..., Any]) -> None:
        signature = inspect.signature(kernel)
        if list(signature.parameters) != [*self._names, "outputs", "tactic"]:
            raise ValueError(f"Signature {signature} does not match")
        if get_args(signature.return_annotation) != (str, str, KernelLaunchParams, SymExprs):
            raise ValueError(f"Return annotation is {signature.return_annotation}")
        self._kernel = kernel

    def create(self, inputs: list[Type]) -> dict[str, Any]:
        """What a layer of these inputs launches."""
        assert self._kernel is not None
        assert len(inputs) == len(self._names)
        given = [TensorDesc(*each) for each in inputs]
        described = self._describe(*given)
        assert len(described) == len(self._outputs)
        symbol, text, how, extra = self._kernel(*given, described, 0)
        assert isinstance(how, KernelLaunchParams)
        assert isinstance(extra, SymExprs)
        return {
            "outputs": [each.type for each in described],
            "symbol": symbol,
            "text": text,
            "grid": how.grid,
            "block": how.block,
            "shared": how.shared,
            "numbers": extra.length,
        }


def register(plugin_id: str, lazy_register: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    namespace, name = plugin_id.split("::")
    held = op.__dict__.setdefault(namespace, SimpleNamespace())
    if hasattr(held, name):
        raise ValueError(f"'_Op' already has a defintion for '{name}'")

    def decorate(describe: Callable[..., Any]) -> Callable[..., Any]:
        creator = Creator(describe)
        setattr(held, name, creator)
        creators[name, "1", namespace] = creator
        return describe

    return decorate


def aot_impl(plugin_id: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    namespace, name = plugin_id.split("::")

    def decorate(kernel: Callable[..., Any]) -> Callable[..., Any]:
        creators[name, "1", namespace].implement(kernel)
        return kernel

    return decorate
