"""What ldmrt uses of `tensorrt` to build a plan with plugins in it, strict.

The parser takes a node for a plugin under onnx-tensorrt's rules: its creator is looked for by type, version and namespace, and the
attribute `aot` decides that what was made ahead of time is taken. A built plan is JSON, and says what each plugin launches.
"""

from __future__ import annotations

import json
from enum import Enum, IntEnum
from typing import Any

import onnx

from tests.export.fake_builder import plugin as _plugin
from tests.export.fake_builder.types import DataType, Types

__all__ = ["DataType"]
__version__ = "10.14.1.48"


class ILogger:
    def __init__(self) -> None:
        pass


class NetworkDefinitionCreationFlag(IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class MemoryPoolType(Enum):
    WORKSPACE = 0


class BuilderFlag(Enum):
    REFIT = 0
    WEIGHT_STREAMING = 1


class IProgressMonitor:
    def __init__(self) -> None:
        pass


class Network:
    def __init__(self) -> None:
        self.layers: list[dict[str, Any]] = []


class Config:
    def set_flag(self, flag: BuilderFlag) -> None:
        pass


class Builder:
    def __init__(self, logger: ILogger) -> None:
        pass

    def create_network(self, flags: int) -> Network:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return Network()

    def create_builder_config(self) -> Config:
        return Config()

    def build_serialized_network(self, network: Network, config: Config) -> bytes:
        return json.dumps(network.layers).encode()


class _Error:
    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text


class OnnxParser:
    def __init__(self, network: Network, logger: ILogger) -> None:
        self._network, self._errors = network, list[_Error]()

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> _Error:
        return self._errors[index]

    def parse_from_file(self, path: str) -> bool:
        model = onnx.load(path, load_external_data=False)
        types = Types(model)
        for node in model.graph.node:
            if node.domain in {"", "ai.onnx"}:
                continue
            given = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
            version, namespace = (given.get(key, b"").decode() for key in ("plugin_version", "plugin_namespace"))
            creator = _plugin.creators.get((node.op_type, version, namespace))
            if creator is None or not given.get("aot"):
                self._errors.append(_Error(f"Plugin not found: {node.op_type}"))
                return False
            launch = creator.create([types[name] for name in node.input])
            assert launch.pop("outputs") == [types[name] for name in node.output]
            self._network.layers.append({"name": node.op_type, **launch})
        return True
