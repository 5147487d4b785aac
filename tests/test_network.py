"""A denoising network over static buffers, with engines that are sums: which row reads what, and when."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.errors import EngineMismatch
from ldmrt.network import Network, Parts, rows_of, sizes
from ldmrt.samplers.ddim import ddim
from ldmrt.samplers.table import SamplerTable
from ldmrt.schedule import NoiseSchedule

CPU, F32, F64 = torch.device("cpu"), torch.float32, torch.float64
Tensors = Mapping[str, torch.Tensor]
ROWS, ENTRIES, TOKENS = 4, 3, 5


class Sums:
    """An engine that computes what it is told; each tensor is named with its shape, its rows first."""

    def __init__(
        self,
        inputs: dict[str, tuple[int | str, ...]],
        outputs: dict[str, tuple[int | str, ...]],
        compute: Callable[[Tensors], dict[str, torch.Tensor]],
        dtype: torch.dtype = F32,
    ) -> None:
        self.inputs = {name: TensorSpec(name, shape, dtype) for name, shape in inputs.items()}
        self.outputs = {name: TensorSpec(name, shape, dtype) for name, shape in outputs.items()}
        self.compute = compute
        self.bound: Tensors = {}

    def bind(self, buffers: Tensors) -> None:
        assert buffers.keys() == {*self.inputs, *self.outputs}
        for name, spec in (self.inputs | self.outputs).items():
            assert tuple(buffers[name].shape) == sizes(spec, tokens=TOKENS)
        self.bound = buffers

    def enqueue(self) -> None:
        for name, tensor in self.compute(self.bound).items():
            self.bound[name].copy_(tensor)

    def run(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        assert inputs.keys() == self.inputs.keys()
        assert all(inputs[name].dtype == spec.dtype for name, spec in self.inputs.items())
        return self.compute(inputs)


def step(rows: int, *more: str) -> Sums:
    """Latents + keys + time (+ whatever else it is given): the places of the tokens are summed."""
    inputs: dict[str, tuple[int | str, ...]] = {"latents": (rows, 2), "keys": (rows, "tokens", 2), "time": (rows, 2)}
    inputs |= dict.fromkeys(more, (rows, 2))
    return Sums(
        inputs,
        {"model_output": (rows, 2)},
        lambda given: {
            "model_output": given["latents"] + given["keys"].sum(1) + sum(given[n] for n in ("time", *more))
        },
    )


def parts(first: Sums, *, pooled: bool = False) -> Parts:
    context = Sums(
        {"encoder_hidden_states": ("rows", "tokens", 2)},
        {"keys": ("rows", "tokens", 2)},
        lambda given: {"keys": 10 * given["encoder_hidden_states"]},
    )
    timed: dict[str, tuple[int | str, ...]] = {"timesteps": ("rows",)}
    schedule = Sums(
        timed | ({"pooled": ("rows", 2)} if pooled else {}),
        {"time": ("rows", 2)},
        lambda given: {"time": given["timesteps"][:, None].repeat(1, 2) + (1000 * given["pooled"] if pooled else 0)},
    )
    return Parts(context, schedule, first)


def buffers() -> dict[str, torch.Tensor]:
    return {"latents": torch.arange(2.0 * ROWS).view(ROWS, 2), "model_output": torch.full((ROWS, 2), torch.nan)}


def network(made: Parts, held: dict[str, torch.Tensor]) -> Network:
    return Network(made, rows=ROWS, tokens=TOKENS, entries=ENTRIES, device=CPU, buffers=held)


def table(*timesteps: float) -> SamplerTable:
    known = ddim(NoiseSchedule.from_config({"num_train_timesteps": 1000}), len(timesteps), 0.0)
    return replace(known, timesteps=np.array(timesteps))


def text(value: float) -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": torch.full((TOKENS, 2), value)}


def entries(*evaluations: int) -> torch.Tensor:
    """Of each row the entry of its evaluation."""
    return torch.tensor([row * ENTRIES + evaluation for row, evaluation in enumerate(evaluations)])


def test_each_row_reads_its_own_context_and_its_own_time() -> None:
    held = buffers()
    found = network(parts(step(ROWS)), held)
    found.prepare([0, 2], table(7.0, 5.0, 3.0), [text(1.0), text(2.0)])
    found.prepare([1, 3], table(90.0, 80.0), [text(3.0), text(4.0)])
    for evaluations, times in (((0, 1, 2, 0), (7, 80, 3, 90)), ((1, 0, 0, 1), (5, 90, 7, 80))):
        found.enqueue(entries(*evaluations))
        keys = torch.tensor([1.0, 3.0, 2.0, 4.0]) * 10 * TOKENS
        expected = held["latents"] + (keys + torch.tensor(times))[:, None]
        assert torch.equal(held["model_output"], expected)


def test_another_request_takes_a_rows_place_and_no_other() -> None:
    held = buffers()
    found = network(parts(step(ROWS)), held)
    found.prepare(range(ROWS), table(7.0, 5.0, 3.0), [text(float(row)) for row in range(ROWS)])
    found.enqueue(entries(0, 0, 0, 0))
    before = held["model_output"].clone()
    found.prepare([1], table(1.0), [text(50.0)])
    found.enqueue(entries(0, 0, 0, 0))
    assert torch.equal(held["model_output"][[0, 2, 3]], before[[0, 2, 3]])
    assert torch.equal(held["model_output"][1], held["latents"][1] + 50 * 10 * TOKENS + 1)


def test_steps_of_fewer_rows_share_the_buffers() -> None:
    held, whole, small = buffers(), step(ROWS), step(2)
    found = network(parts(whole), held)
    found.add(small)
    assert rows_of(small) == 2
    found.prepare(range(ROWS), table(7.0), [text(float(row)) for row in range(ROWS)])
    addresses = {name: tensor.data_ptr() for name, tensor in whole.bound.items()}
    assert {name: tensor.data_ptr() for name, tensor in small.bound.items()} == addresses
    found.enqueue(entries(0, 0))
    assert held["model_output"][:2].isfinite().all()
    assert held["model_output"][2:].isnan().all()
    found.prepare(range(ROWS), table(9.0), [text(float(row)) for row in range(ROWS)])
    # What a CUDA graph has captured stays where it is.
    assert {name: tensor.data_ptr() for name, tensor in whole.bound.items()} == addresses


def test_a_row_moves_with_all_that_was_made_for_it() -> None:
    held = buffers()
    found = network(parts(step(ROWS)), held)
    found.prepare([3], table(7.0, 5.0, 3.0), [text(6.0)])
    found.move(3, 0)
    for evaluation, time in enumerate((7, 5, 3)):
        found.enqueue(entries(evaluation, 0, 0, evaluation))
        made = held["model_output"] - held["latents"]
        assert torch.equal(made[0], made[3])
        assert torch.equal(made[0], torch.full((2,), 6.0 * 10 * TOKENS + time))


def test_what_the_request_says_at_every_step() -> None:
    """A ControlNet's scale is told by evaluation; what is joined to the latents once."""
    held = buffers()
    found = network(parts(step(ROWS, "conditioning_scale", "mask")), held)
    scales = torch.tensor([[100.0, 200.0], [300.0, 400.0]])
    told = [{**text(0.0), "conditioning_scale": scales, "mask": torch.full((2,), 0.5)}]
    found.prepare([1], table(0.0, 0.0), told)
    for evaluation in (1, 0):
        found.enqueue(entries(0, evaluation, 0, 0))
        made = held["model_output"] - held["latents"]
        assert torch.equal(made[1], scales[evaluation] + 0.5)
        assert not made[[0, 2, 3]].any()


def test_a_schedule_that_reads_the_request() -> None:
    """The pooled text of Stable Diffusion XL is part of every entry of its row, in the engine's dtype."""
    held = buffers()
    found = network(parts(step(ROWS), pooled=True), held)
    told = [{**text(0.0), "pooled": torch.full((2,), value, dtype=F64)} for value in (1.0, 2.0)]
    found.prepare([0, 1], table(7.0, 5.0), told)
    found.enqueue(entries(1, 0, 0, 0))
    made = held["model_output"] - held["latents"]
    assert made[:2].tolist() == [[1005.0, 1005.0], [2007.0, 2007.0]]


def test_what_nobody_makes_is_named() -> None:
    with pytest.raises(EngineMismatch, match=r"^the step reads hue, tint, which no other engine makes$"):
        network(parts(step(ROWS, "tint", "hue")), buffers())


def test_sizes_of_free_dimensions() -> None:
    assert sizes(TensorSpec("x", ("rows", 3, "tokens"), F32), rows=2, tokens=77) == (2, 3, 77)
    with pytest.raises(KeyError):
        sizes(TensorSpec("x", ("rows",), F32))
