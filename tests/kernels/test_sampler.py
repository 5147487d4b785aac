"""sampler_step against a computation in float64, written slot by slot, and the other bodies against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldmrt.kernels import launch, native
from ldmrt.kernels.sampler import (
    WIDTH,
    Basis,
    Column,
    advance,
    advance_reference,
    advance_triton,
    sampler_step,
    sampler_step_reference,
    sampler_step_triton,
)

Float64 = NDArray[np.float64]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1, 1), (3, 5, 7), (4, 16, 16), (4, 17, 31)]  # below, at and beyond the native body's block of 256

needs_native = pytest.mark.skipif(not native.available(), reason=str(native.why_not()))
BODIES = [
    pytest.param(sampler_step_reference, id="reference"),
    pytest.param(sampler_step, id="native", marks=needs_native),
    pytest.param(sampler_step_triton, id="triton", marks=pytest.mark.interpreted),
]
ADVANCES = [
    pytest.param(advance_reference, id="reference"),
    pytest.param(advance_triton, id="triton", marks=pytest.mark.interpreted),
]
Body = Callable[..., None]


@dataclass
class State:
    """The arguments of sampler_step by name."""

    x: Tensor
    saved: Tensor
    history: Tensor
    model_output: Tensor
    table: Tensor
    row: Tensor
    noise: Tensor | None
    guidance_scale: Tensor
    cond_row: Tensor
    uncond_row: Tensor
    model_input: Tensor

    def arguments(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def clone(self) -> State:
        return replace(self, **{name: value.clone() for name, value in self.arguments().items() if value is not None})

    def to(self, device: str) -> State:
        moved = {name: value.to(device) for name, value in self.arguments().items() if value is not None}
        return replace(self, **moved)

    def after(self, body: Body) -> State:
        state = self.clone()
        body(**state.arguments())
        return state


def make_state(size: tuple[int, int, int] = (3, 5, 7), dtype: torch.dtype = torch.float32, seed: int = 0) -> State:
    """Four slots on seven model rows: guided, idle, unguided, guided; one model row belongs to nobody."""
    random = torch.Generator().manual_seed(seed)
    slots, rows, entries = 4, 6, 5

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    table = normal(entries, WIDTH)
    table[torch.rand(entries, WIDTH, generator=random) < 0.3] = 0
    table[:, Column.CLIP] = torch.tensor([torch.inf, 0.5, 1.0, torch.inf, 0.25])
    table[:, Column.PUSH] = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    table[:, Column.NEXT_INPUT_SCALE + 1 :] = 0
    return State(
        x=normal(slots, *size),
        saved=normal(slots, *size),
        history=normal(3, slots, *size),
        model_output=normal(rows, *size).to(dtype),
        table=table,
        row=torch.tensor([2, 0, 3, 1]),
        noise=normal(entries, *size),
        guidance_scale=torch.tensor([7.5, 3.0, 2.0, 1.0]),
        cond_row=torch.tensor([4, -1, 0, 2]),
        uncond_row=torch.tensor([1, -1, -1, 5]),
        model_input=normal(rows, *size).to(dtype),
    )


def plain_state(*, model: float = 1.0) -> State:
    """One slot, one element, a table of zeros: for tests of one column at a time."""
    one = torch.ones(1, 1, 1, 1)
    return State(
        x=2 * one,
        saved=3 * one,
        history=torch.tensor([4.0, 5.0, 6.0]).view(3, 1, 1, 1, 1),
        model_output=model * one,
        table=torch.zeros(1, WIDTH),
        row=torch.tensor([0]),
        noise=7 * one,
        guidance_scale=torch.tensor([1.0]),
        cond_row=torch.tensor([0]),
        uncond_row=torch.tensor([-1]),
        model_input=torch.zeros(1, 1, 1, 1),
    )


def float64(tensor: Tensor) -> Float64:
    return np.asarray(tensor.double().numpy(), dtype=np.float64)


@dataclass
class Expected:
    """State after a step in float64, and for each array the sum of the terms' magnitudes, which rounding grows with."""

    values: dict[str, Float64]
    scales: dict[str, Float64]


def oracle(state: State) -> Expected:
    """The definition, slot by slot, in float64 of the float32 (or half) inputs."""
    names = ("x", "saved", "history", "model_input")
    values = {name: float64(getattr(state, name)).copy() for name in names}
    scales = {name: np.zeros_like(value) for name, value in values.items()}
    output, table = float64(state.model_output), float64(state.table)
    noise = None if state.noise is None else float64(state.noise)

    for slot in range(state.x.shape[0]):
        cond, uncond = int(state.cond_row[slot]), int(state.uncond_row[slot])
        if cond < 0:
            continue
        at = int(state.row[slot])
        c = table[at]
        m, m_scale = output[cond], np.abs(output[cond])
        if uncond >= 0:
            scale = float(state.guidance_scale[slot])
            m = output[uncond] + scale * (output[cond] - output[uncond])
            m_scale = np.abs(output[uncond]) + abs(scale) * (np.abs(output[cond]) + np.abs(output[uncond]))
        x, h = values["x"][slot], values["history"][:, slot].copy()
        d = np.clip(c[Column.DENOISED_X] * x + c[Column.DENOISED_M] * m, -c[Column.CLIP], c[Column.CLIP])
        d_scale = np.abs(c[Column.DENOISED_X] * x) + np.abs(c[Column.DENOISED_M]) * m_scale
        zero = np.zeros_like(x)
        basis = [x, m, d, values["saved"][slot], h[0], h[1], h[2], zero if noise is None else noise[at]]
        basis_scale = [np.abs(value) for value in basis]
        basis_scale[Basis.M], basis_scale[Basis.D] = m_scale, d_scale

        def combine(first: int, terms: list[Float64], c: Float64 = c) -> Float64:
            return np.asarray(sum(c[first + k] * terms[k] for k in range(8)), dtype=np.float64)

        def magnitude(first: int, terms: list[Float64], c: Float64 = c) -> Float64:
            return np.asarray(sum(abs(c[first + k]) * terms[k] for k in range(8)), dtype=np.float64)

        next_x, next_saved, pushed = (combine(k, basis) for k in (Column.NEXT_X, Column.NEXT_SAVED, Column.PUSHED))
        scales["x"][slot] = magnitude(Column.NEXT_X, basis_scale)
        scales["saved"][slot] = magnitude(Column.NEXT_SAVED, basis_scale)
        values["x"][slot], values["saved"][slot] = next_x, next_saved
        if c[Column.PUSH]:
            values["history"][:, slot] = pushed, h[0], h[1]
            scales["history"][0, slot] = magnitude(Column.PUSHED, basis_scale)
        for model_row in (cond, uncond):
            if model_row >= 0:
                values["model_input"][model_row] = next_x * c[Column.NEXT_INPUT_SCALE]
                scales["model_input"][model_row] = scales["x"][slot] * abs(c[Column.NEXT_INPUT_SCALE])
    return Expected(values, scales)


def assert_close(state: State, expected: Expected, body: Body) -> None:
    # Twelve float32 roundings lie between an input and a sum; half a unit of the last place is 2^-24 of the terms.
    half_unit = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[state.model_input.dtype]
    if body is sampler_step_triton and state.model_input.dtype == torch.bfloat16:
        half_unit *= 2  # Triton's interpreter does not round to bfloat16, it cuts off
    for name, value in expected.values.items():
        found = float64(getattr(state, name))
        tolerance = 1e-6 * expected.scales[name]
        if name == "model_input":
            tolerance = tolerance * (1 + half_unit) + half_unit * np.abs(value)
            # Rows that no slot owns are not rounded again, and float16 is coarser than relative below 2^-14.
            tolerance = np.where(expected.scales[name] > 0, tolerance + 2.0**-25 * (half_unit > 0), 0)
        excess = np.abs(found - value) - tolerance
        assert excess.max() <= 0, f"{name} differs by {excess.max()} more than its tolerance"


def assert_same(found: State, expected: State) -> None:
    for name in ("x", "saved", "history", "model_input"):
        np.testing.assert_array_equal(float64(getattr(found, name)), float64(getattr(expected, name)), err_msg=name)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("with_noise", [True, False])
def test_against_float64(body: Body, dtype: torch.dtype, size: tuple[int, int, int], with_noise: bool) -> None:
    for seed in range(4):
        state = make_state(size, dtype, seed)
        if not with_noise:
            state = replace(state, noise=None)
        assert_close(state.after(body), oracle(state), body)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [*SIZES, (4, 128, 128)])  # the last is large enough for threads
def test_native_equals_the_reference_bit_for_bit(dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    state = make_state(size, dtype)
    assert_same(state.after(sampler_step), state.after(sampler_step_reference))


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("with_noise", [True, False])
def test_triton_equals_the_reference_bit_for_bit(
    dtype: torch.dtype, size: tuple[int, int, int], with_noise: bool
) -> None:
    state = make_state(size, dtype)
    if not with_noise:
        state = replace(state, noise=None)
    expected = state.after(sampler_step_reference)
    if dtype == torch.bfloat16:
        # Triton's interpreter does not round to bfloat16, it cuts off.
        wide = replace(state, model_output=state.model_output.float(), model_input=state.model_input.float())
        bits = wide.after(sampler_step_reference).model_input.view(torch.int32)
        expected.model_input = (bits & -(2**16)).view(torch.float32).bfloat16()
    assert_same(state.after(sampler_step_triton), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1, 1), (4, 17, 31), (4, 64, 64)])
def test_gpu_equals_the_reference_bit_for_bit(dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    state = make_state(size, dtype)
    on_gpu = state.to("cuda")
    assert launch.ready(on_gpu.x.device)
    assert_same(on_gpu.after(sampler_step).to("cpu"), state.after(sampler_step_reference))
    assert_same(on_gpu.after(sampler_step_reference).to("cpu"), state.after(sampler_step_reference))


@pytest.mark.parametrize("arch", [80, 90])
def test_one_variant_serves_every_slot_count_and_latent_of_a_kind(arch: int) -> None:
    with launch.recording(arch) as variants:
        for slots, side in ((1, 64), (2, 64), (8, 96), (8, 128)):
            state = make_state((4, side, side), torch.float16).to("meta")
            buffers = {name: getattr(state, name)[:slots] for name in ("x", "saved", "row", "cond_row", "uncond_row")}
            history, guidance = torch.empty(3, *buffers["x"].shape, device="meta"), state.guidance_scale[:slots]
            sampler_step(**{**state.arguments(), **buffers, "history": history, "guidance_scale": guidance})
            advance(state.row, state.row.clone())
    assert [variant.kernel for variant in variants] == ["sampler.step", "sampler.advance"]
    assert not next(iter(variants)).fp_fusion  # each operation is rounded by itself


@pytest.mark.parametrize("body", BODIES)
def test_several_steps_follow_the_table(body: Body) -> None:
    state = make_state(seed=1)
    state.table *= 0.3  # no growth over the steps
    last_row = torch.tensor([4, 4, 4, 2])
    for _ in range(4):
        expected = oracle(state)
        state = state.after(body)
        assert_close(state, expected, body)
        state.model_output = state.model_input.clone()
        advance(state.row, last_row)
    assert state.row.tolist() == [4, 4, 4, 2]


@pytest.mark.parametrize("body", BODIES)
def test_idle_slot_is_untouched_even_on_a_row_out_of_range(body: Body) -> None:
    state = make_state()
    state.row[1] = 99
    after = state.after(body)
    for name in ("x", "saved"):
        assert torch.equal(getattr(after, name)[1], getattr(state, name)[1])
    assert torch.equal(after.history[:, 1], state.history[:, 1])
    assert torch.equal(after.model_input[3], state.model_input[3])  # the row that belongs to nobody


@pytest.mark.parametrize("body", BODIES)
def test_slot_without_conditional_row_is_idle_whatever_its_unconditional_row(body: Body) -> None:
    state = make_state()
    state.uncond_row[1] = 3
    assert_same(state.after(body), replace(state, uncond_row=torch.tensor([1, -1, -1, 5])).after(body))


@pytest.mark.parametrize("body", BODIES)
def test_both_rows_of_a_guided_slot_receive_the_same_input(body: Body) -> None:
    after = make_state().after(body)
    assert torch.equal(after.model_input[4], after.model_input[1])
    assert torch.equal(after.model_input[2], after.model_input[5])


@pytest.mark.parametrize("body", BODIES)
def test_history_shifts_only_on_push(body: Body) -> None:
    state = plain_state()
    state.table[0, Column.PUSHED + Basis.X] = 10
    assert state.after(body).history.flatten().tolist() == [4, 5, 6]
    state.table[0, Column.PUSH] = 1
    assert state.after(body).history.flatten().tolist() == [20, 4, 5]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("target", [Column.NEXT_X, Column.NEXT_SAVED, Column.PUSHED])
def test_each_coefficient_takes_the_state_before_the_step(body: Body, target: Column) -> None:
    values = {"X": 2, "M": 11, "D": 1, "SAVED": 3, "H1": 4, "H2": 5, "H3": 6, "NOISE": 7}
    for basis in Basis:
        state = plain_state(model=11)
        state.table[0, Column.DENOISED_M] = 1
        state.table[0, Column.CLIP] = 1
        state.table[0, Column.PUSH] = 1
        state.table[0, target + basis] = 100
        after = state.after(body)
        found = {Column.NEXT_X: after.x, Column.NEXT_SAVED: after.saved, Column.PUSHED: after.history[0]}[target]
        assert found.item() == 100 * values[basis.name], basis


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize(("model", "clip", "expected"), [(9, 1, 1), (-9, 1, -1), (9, torch.inf, 9), (0.5, 1, 0.5)])
def test_clip_bounds_the_denoised_estimate(body: Body, model: float, clip: float, expected: float) -> None:
    state = plain_state(model=model)
    state.table[0, Column.DENOISED_M] = 1
    state.table[0, Column.CLIP] = clip
    state.table[0, Column.NEXT_X + Basis.D] = 1
    assert state.after(body).x.item() == expected


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["x", "saved", "history", "noise", "model_output"])
def test_zero_coefficient_keeps_poison_out(body: Body, name: str, poison: float) -> None:
    state = plain_state()
    getattr(state, name).fill_(poison)
    source = Basis.SAVED if name == "x" else Basis.X
    for target in (Column.NEXT_X, Column.NEXT_SAVED, Column.PUSHED):
        state.table[0, target + source] = 1
    state.table[0, Column.PUSH] = 1
    state.table[0, Column.NEXT_INPUT_SCALE] = 1
    after = state.after(body)
    value = 3 if name == "x" else 2
    assert [after.x.item(), after.saved.item(), after.history[0].item(), after.model_input.item()] == [value] * 4


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("basis", list(Basis))
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_passes_where_the_coefficient_is_not_zero(body: Body, basis: Basis, dtype: torch.dtype) -> None:
    state = plain_state()
    state = replace(state, model_output=state.model_output.to(dtype), model_input=state.model_input.to(dtype))
    state.table[0, Column.DENOISED_M] = 1
    state.table[0, Column.CLIP] = 1
    state.table[0, Column.NEXT_X + basis] = 0.001
    state.table[0, Column.NEXT_INPUT_SCALE] = 1
    assert not state.after(body).x.isnan()
    assert state.noise is not None
    poisoned = [state.x, state.model_output, state.model_output, state.saved, *state.history, state.noise][basis]
    poisoned.fill_(torch.nan)
    after = state.after(body)
    assert after.x.isnan()
    assert after.model_input.isnan()


@pytest.mark.parametrize("body", BODIES)
def test_without_noise_its_coefficient_does_not_matter(body: Body) -> None:
    state = replace(make_state(), noise=None)
    silent = state.clone()
    for target in (Column.NEXT_X, Column.NEXT_SAVED, Column.PUSHED):
        silent.table[:, target + Basis.NOISE] = 0
        state.table[:, target + Basis.NOISE] = torch.nan
    assert_same(state.after(body), silent.after(body))


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_native_reads_every_half_and_writes_as_torch_does(dtype: torch.dtype) -> None:
    """All 65,536 halves in; and out, halves, their midpoints (ties) and both sides of each, by the input scale."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(1, 1, 256, 256)
    low = every.float()
    high = (every.view(torch.int16) + 1).view(dtype).float()
    middle = (low + high) / 2
    wanted = torch.stack([low, middle, middle.nextafter(low), middle.nextafter(high)], dim=1).reshape(4, 1, 256, 256)
    table = torch.zeros(1, WIDTH)
    table[0, Column.NEXT_X + Basis.X] = 1
    table[0, Column.NEXT_SAVED + Basis.M] = 1
    table[0, Column.NEXT_INPUT_SCALE] = 1
    state = State(
        x=wanted.clone(),
        saved=torch.zeros_like(wanted),
        history=torch.zeros(3, *wanted.shape),
        model_output=every.repeat(4, 1, 1, 1),
        table=table,
        row=torch.zeros(4, dtype=torch.int64),
        noise=None,
        guidance_scale=torch.ones(4),
        cond_row=torch.arange(4),
        uncond_row=torch.full((4,), -1),
        model_input=torch.zeros(4, 1, 256, 256, dtype=dtype),
    )
    after = state.after(sampler_step)
    torch.testing.assert_close(after.saved[:1], low, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(after.model_input, wanted.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("body", ADVANCES)
@pytest.mark.parametrize("slots", [4, 300])
def test_advance_stops_at_the_last_row(body: Body, slots: int) -> None:
    row, last_row = torch.tensor([0, 3, 4, 0]).repeat(slots // 4), torch.tensor([4, 4, 4, 0]).repeat(slots // 4)
    body(row, last_row)
    assert row.tolist() == [1, 4, 4, 0] * (slots // 4)


@pytest.mark.parametrize(
    ("last_row", "message"),
    [
        (torch.zeros(4), r"last_row is \(4,\) torch.float32"),
        (torch.zeros(4, 2, dtype=torch.int64)[:, 0], r"strides \(2,\); expected a contiguous"),
        (torch.zeros(3, dtype=torch.int64), r"row is \(4,\) on cpu, last_row \(3,\) on cpu; expected one shape"),
        (torch.zeros(4, dtype=torch.int64, device="meta"), "last_row .* on meta; expected one shape and device"),
    ],
)
def test_advance_refuses_misuse(last_row: Tensor, message: str) -> None:
    row = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        advance(row, last_row)
    assert not row.any()


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("x", torch.zeros(4, 3, 5), ValueError, r"x has shape \(4, 3, 5\), expected \(slots, C, H, W\)"),
        ("saved", torch.zeros(4, 3, 5, 8), ValueError, r"saved has shape .* expected \(4, 3, 5, 7\)"),
        ("history", torch.zeros(2, 4, 3, 5, 7), ValueError, r"history has shape .* expected \(3, 4, 3, 5, 7\)"),
        ("table", torch.zeros(5, 31), ValueError, r"table has shape \(5, 31\), expected \(5, 32\)"),
        ("table", torch.zeros(0, 32), ValueError, r"table has shape \(0, 32\), expected \(1, 32\)"),
        ("table", torch.zeros(5, 32).double(), TypeError, "table is torch.float64, expected torch.float32"),
        ("noise", torch.zeros(4, 3, 5, 7), ValueError, r"noise has shape .* expected \(5, 3, 5, 7\)"),
        ("row", torch.zeros(4, dtype=torch.int32), TypeError, "row is torch.int32, expected torch.int64"),
        ("model_output", torch.zeros(6, 3, 5, 7).double(), TypeError, "model_output is torch.float64, expected"),
        ("model_input", torch.zeros(6, 3, 5, 7).half(), TypeError, "model_input is torch.float16, expected"),
        ("x", torch.zeros(4, 3, 7, 5).mT, ValueError, "x is not contiguous"),
        ("saved", torch.zeros(4, 3, 5, 7, device="meta"), ValueError, "saved is on meta, expected cpu"),
        ("row", torch.tensor([0, 0, 5, 0]), IndexError, "row of slot 2 is 5, expected 0 to 4"),
        ("row", torch.tensor([0, 0, -1, 0]), IndexError, "row of slot 2 is -1, expected 0 to 4"),
        ("cond_row", torch.tensor([4, -2, 0, 2]), IndexError, "cond_row of slot 1 is -2, expected -1 to 5"),
        ("uncond_row", torch.tensor([1, -1, -1, 6]), IndexError, "uncond_row of slot 3 is 6, expected -1 to 5"),
    ],
)
def test_misuse_is_refused_before_anything_is_written(
    name: str, value: Tensor, error: type[Exception], message: str
) -> None:
    state = replace(make_state(), **{name: value})
    before = state.clone()
    with pytest.raises(error, match=message):
        sampler_step(**state.arguments())
    for argument, kept in state.arguments().items():
        assert kept.is_meta or torch.equal(kept, getattr(before, argument)), argument
