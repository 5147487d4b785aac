"""What goes from one process to another comes as it was."""

from __future__ import annotations

import json
from typing import Any

import pytest
from PIL import Image

from ldmrt import errors
from ldmrt.request import Defaults
from ldmrt.serving.channel import ChannelError
from ldmrt.serving.engine import Facts
from ldmrt.serving.wire import error_fields, error_of, facts_fields, facts_of, packed, unpacked


def sent(fields: dict[str, Any]) -> dict[str, Any]:
    received: dict[str, Any] = json.loads(json.dumps(fields))
    return received


def test_pictures() -> None:
    picture = Image.effect_mandelbrot((13, 7), (-2, -1.5, 1, 1.5), 20).convert("RGB")
    assert unpacked(packed(picture), (13, 7)).tobytes() == picture.tobytes()
    with pytest.raises(ChannelError):
        unpacked(packed(picture), (14, 7))


@pytest.mark.parametrize("kind", [errors.BundleError, errors.NumericalError, errors.Cancelled, errors.LdmrtError])
def test_errors(kind: type[errors.LdmrtError]) -> None:
    found = error_of(sent(error_fields(kind("why"))))
    assert (type(found), str(found)) == (kind, "why")


def test_the_name_of_a_parameter_comes_along() -> None:
    found = error_of(sent(error_fields(errors.BadRequest("why", param="seed"))))
    assert isinstance(found, errors.BadRequest)
    assert found.param == "seed"


@pytest.mark.parametrize("error", [ZeroDivisionError("why"), errors.Overloaded("why", retry_after=1.0)])
def test_what_means_nothing_on_the_other_side_is_an_error_of_ours(error: Exception) -> None:
    assert type(error_of(sent(error_fields(error)))) is errors.LdmrtError


@pytest.mark.parametrize("kind", ["annotations", "nothing", "SystemExit"])
def test_names_that_are_no_errors_of_ours(kind: str) -> None:
    assert type(error_of({"type": kind, "message": "", "param": None})) is errors.LdmrtError


def test_facts() -> None:
    sizes = ((128, 64), (64, 64))
    defaults = Defaults(width=128, height=64, num_inference_steps=20, guidance_scale=5.0, sizes=sizes)
    facts = Facts("shapes", "stable-diffusion", defaults, True, False, True, False, True)
    assert facts_of(sent(facts_fields(facts))) == facts
