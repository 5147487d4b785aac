"""A captured engine against the engine it wraps, with a recorder that replays on the CPU."""

from __future__ import annotations

import pytest
import torch

from ldmrt.engines.captured import CapturedEngine
from ldmrt.engines.protocol import TensorSpec
from ldmrt.engines.torch import TorchEngine
from ldmrt.errors import EngineMismatch
from ldmrt.graph import Dim, Graph, Node, Ref
from ldmrt.parameters import Parameters
from tests.replay import Recorder

CPU = torch.device("cpu")
F32 = torch.float32
ROWS = Dim("rows")


def linear() -> Graph:
    return Graph(
        name="part",
        inputs=(TensorSpec("x", ("rows", 4), F32),),
        weights={"w": TensorSpec("w", (3, 4), F32)},
        constants={},
        nodes=(
            Node("y", "aten.linear.default", (Ref("x"), Ref("w")), {}, (ROWS, 3), F32),
            Node("z", "aten.silu.default", (Ref("y"),), {}, (ROWS, 3), F32),
        ),
        outputs={"z": "z"},
    )


class Counting(Recorder):
    @property
    def count(self) -> int:
        return len(self.calls)


def engines() -> tuple[CapturedEngine, TorchEngine, Counting, Parameters]:
    recorder = Counting()
    parameters = Parameters.of({"w": torch.randn(3, 4, generator=torch.Generator().manual_seed(0))}, CPU)
    plain = TorchEngine(linear(), parameters, CPU)
    return CapturedEngine(TorchEngine(linear(), parameters, CPU), recorder), plain, recorder, parameters


def test_each_shape_is_recorded_once_and_its_replay_is_what_the_engine_gives() -> None:
    captured, plain, recorder, _ = engines()
    for seed, rows in enumerate([2, 5, 2, 5, 2]):
        x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(captured.run({"x": x})["z"], plain.run({"x": x})["z"])
    assert recorder.count == 2


def test_results_are_the_callers_own() -> None:
    captured, _, _, _ = engines()
    first = captured.run({"x": torch.ones(2, 4)})["z"]
    kept = first.clone()
    captured.run({"x": torch.zeros(2, 4)})
    assert torch.equal(first, kept)


def test_strided_inputs() -> None:
    captured, plain, _, _ = engines()
    x = torch.arange(8.0).view(4, 2).T
    torch.testing.assert_close(captured.run({"x": x})["z"], plain.run({"x": x})["z"])
    torch.testing.assert_close(captured.run({"x": 2 * x})["z"], plain.run({"x": 2 * x})["z"])


def test_weights_changed_in_place() -> None:
    captured, plain, _, parameters = engines()
    x = torch.ones(2, 4)
    before = captured.run({"x": x})["z"]
    parameters.update({"w": torch.full((3, 4), 0.5)})
    assert not torch.equal(captured.run({"x": x})["z"], before)
    assert torch.equal(captured.run({"x": x})["z"], plain.run({"x": x})["z"])


def test_old_recordings_are_given_up() -> None:
    captured, _, recorder, _ = engines()
    for rows in range(1, 12):
        captured.run({"x": torch.ones(rows, 4)})
    captured.run({"x": torch.ones(11, 4)})
    assert recorder.count == 11
    captured.run({"x": torch.ones(1, 4)})
    assert recorder.count == 12


@pytest.mark.parametrize("inputs", [{}, {"x": torch.ones(2, 5)}, {"x": torch.ones(2, 4).double()}])
def test_inputs_that_do_not_fit(inputs: dict[str, torch.Tensor]) -> None:
    captured, _, recorder, _ = engines()
    with pytest.raises(EngineMismatch, match="input 'x'"):
        captured.run(inputs)
    assert recorder.count == 0


def test_another_recorder_makes_the_graphs_anew() -> None:
    captured, plain, recorder, _ = engines()
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    captured.run({"x": x})
    other = Counting()
    captured.record_with(other)
    assert torch.equal(captured.run({"x": 2 * x})["z"], plain.run({"x": 2 * x})["z"])
    assert (recorder.count, other.count) == (1, 1)
