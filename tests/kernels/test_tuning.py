"""What is chosen for a problem reaches the operator's launch; what operators are asked for is recorded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ldmrt.kernels import add_group_norm, geglu, group_norm, launch, layer_norm, tuning, upsample
from ldmrt.kernels.attention import attention
from ldmrt.kernels.configurations import ATTENTION, Problem
from ldmrt.kernels.ops import OPERATORS
from ldmrt.kernels.tuning import Call, Form
from ldmrt.kernels.variant import Variant, source_hash

F16 = torch.float16
ARCH = 89


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=F16, device="meta")


def _attention() -> object:
    return attention(empty(2, 4096, 320), empty(2, 4096, 320), empty(2, 4096, 320), 8, 0.125)


def _geglu() -> object:
    return geglu.geglu(empty(2, 4096, 2560))


def _group_norm() -> object:
    return group_norm.group_norm_silu(empty(2, 320, 64, 64), empty(320), None, 32, 1e-5, True)


def _add_group_norm() -> object:
    pictures = empty(2, 640, 64, 64), empty(2, 640, 64, 64), empty(2, 320, 64, 64)
    return add_group_norm.add_group_norm_silu(*pictures, empty(960), None, 32, 1e-5, True, empty(640))


def _upsample() -> object:
    return upsample.add_upsample(empty(2, 640, 32, 32), empty(2, 640, 32, 32), empty(640), 2)


def _layer_norm() -> object:
    return layer_norm.add_layer_norm(empty(2, 4096, 320), empty(2, 4096, 320), None, None, 1e-5)


CASES = [
    pytest.param(ATTENTION, _attention, Problem(40, 8, 4096, 4096, F16), id="attention"),
    pytest.param(geglu.OPERATOR, _geglu, geglu.Problem(8192, 1280, F16), id="geglu"),
    pytest.param(
        group_norm.OPERATOR, _group_norm, group_norm.Problem(2, 320, 32, 4096, F16, False), id="group_norm_silu"
    ),
    pytest.param(
        add_group_norm.OPERATOR,
        _add_group_norm,
        add_group_norm.Problem(2, 960, 32, 4096, 640, True, F16, False),
        id="add_group_norm_silu",
    ),
    pytest.param(upsample.OPERATOR, _upsample, upsample.Problem(2048, 640, 2, F16), id="add_upsample"),
    pytest.param(layer_norm.OPERATOR, _layer_norm, layer_norm.Problem(8192, 320, F16), id="add_layer_norm"),
]
Operator = tuning.Operator[Any, Any]


@pytest.fixture(autouse=True)
def _nothing_chosen() -> Iterator[None]:
    tuning.clear()
    yield
    tuning.clear()


def launched(call: Callable[[], object], arch: int = ARCH) -> list[Variant]:
    with launch.recording(arch) as variants:
        call()
    return list(variants)


@pytest.mark.parametrize(("operator", "call", "problem"), CASES)
def test_a_choice_counts_for_its_problem_and_architecture_until_cleared(
    operator: Operator, call: Callable[[], object], problem: Any
) -> None:
    before = {arch: launched(call, arch) for arch in (ARCH, 80)}
    candidates = operator.candidates(ARCH, problem)
    assert operator.choose(ARCH, problem) == candidates[0]
    plans = set()
    for choice in candidates:
        tuning.override(operator.name, ARCH, problem, choice)
        assert operator.choose(ARCH, problem) == choice
        plans.add(tuple(launched(call)))
        assert launched(call, 80) == before[80]
    # Each candidate is a launch of its own; only torch's body of attention launches nothing of ours.
    assert len(plans) == len(candidates) > 1
    assert sum(plan == () for plan in plans) == sum(not operator.launches(choice) for choice in candidates)
    tuning.clear()
    assert launched(call) == before[ARCH]


@pytest.mark.parametrize(("operator", "call", "problem"), CASES)
def test_what_an_operator_is_asked_for_is_recorded(
    operator: Operator, call: Callable[[], object], problem: Any
) -> None:
    with launch.recording(ARCH), tuning.recording() as calls:
        call()
        call()
    first, second = calls
    assert first == second
    assert hash(first) == hash(second)
    assert (first.operator, first.problem) == (operator.name, problem)
    # The call can be made again of what was recorded, and asks for the same.
    function = OPERATORS[f"ldmrt.{operator.name}.default"]
    arguments = [
        empty(*argument.shape).as_strided(argument.shape, argument.strides) if isinstance(argument, Form) else argument
        for argument in first.arguments
    ]
    with launch.recording(ARCH), tuning.recording() as calls:
        function(*arguments)
    assert calls == [first]
    assert source_hash(operator.source)


def test_slices_are_recorded_as_they_lie() -> None:
    merged = empty(2, 64, 3 * 40 + 8)
    query, key, value = merged[..., :40], merged[..., 40:80], merged[..., 81:121]
    with launch.recording(ARCH), tuning.recording() as calls:
        attention(query, key, value, 1, 0.125)
    (call,) = calls
    form = Form((2, 64, 40), (64 * 128, 128, 1), 0, F16)
    assert call.arguments == (form, form._replace(offset=8), form._replace(offset=1), 1, 0.125, False, None)


def test_nothing_is_recorded_of_a_given_configuration_or_another_thread() -> None:
    with launch.recording(ARCH), tuning.recording() as calls:
        geglu.geglu_triton(empty(4, 128), chosen=geglu.Configuration(1, 64, 4))
        assert ATTENTION.choose(ARCH, Problem(40, 8, 64, 64, F16))
        thread = threading.Thread(target=lambda: launched(_geglu))
        thread.start()
        thread.join()
    assert calls == []


def test_recordings_within_each_other() -> None:
    with launch.recording(ARCH), tuning.recording() as outer:
        _geglu()
        with tuning.recording() as inner:
            _layer_norm()
        _geglu()
    assert [call.operator for call in outer] == ["geglu", "geglu"]
    assert [call.operator for call in inner] == ["add_layer_norm"]


def test_a_trial_ends_with_what_was_chosen_before() -> None:
    problem = Problem(40, 8, 4096, 4096, F16)
    first, second, third = ATTENTION.candidates(ARCH, problem)[:3]

    def fail() -> None:
        with tuning.trying("attention", ARCH, problem, third):
            assert ATTENTION.choose(ARCH, problem) == third
            assert ATTENTION.choose(ARCH, replace(problem, heads=4)) != third
            raise RuntimeError("out of shared memory")

    with pytest.raises(RuntimeError):
        fail()
    assert ATTENTION.choose(ARCH, problem) == first
    tuning.override("attention", ARCH, problem, second)
    with pytest.raises(RuntimeError):
        fail()
    assert ATTENTION.choose(ARCH, problem) == second


def test_a_call_is_told_from_another_by_its_forms() -> None:
    form = Form.of(torch.empty(4, 6, dtype=F16).t())
    assert form == Form((6, 4), (1, 6), 0, F16)
    assert Call("geglu", None, (form,)) != Call("geglu", None, (form._replace(strides=(4, 1)),))
