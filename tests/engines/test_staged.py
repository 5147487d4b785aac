"""An engine that comes and goes."""

from __future__ import annotations

import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.engines.staged import StagedEngine
from ldmrt.engines.torch import TorchEngine
from ldmrt.graph import Graph, Node, Ref

X = TensorSpec("x", (2,), torch.float32)
DOUBLE = Graph(
    "double", (X,), {}, {}, (Node("y", "aten.mul.Scalar", (Ref("x"), 2.0), {}, (2,), torch.float32),), {"y": "y"}
)


def test_it_is_loaded_once_and_again_only_when_it_is_used() -> None:
    loads: list[TorchEngine] = []

    def load() -> TorchEngine:
        loads.append(TorchEngine(DOUBLE, {}, torch.device("cpu")))
        return loads[-1]

    engine = StagedEngine(load)
    for _ in range(2):
        assert engine.run({"x": torch.ones(2)})["y"].tolist() == [2, 2]
    assert len(loads) == 1
    engine.unload()
    engine.unload()
    assert engine.inputs == loads[0].inputs
    assert engine.outputs == loads[0].outputs
    assert len(loads) == 1
    x, y = torch.full((2,), 3.0), torch.zeros(2)
    engine.bind({"x": x, "y": y})
    engine.enqueue()
    assert y.tolist() == [6, 6]
    assert len(loads) == 2
