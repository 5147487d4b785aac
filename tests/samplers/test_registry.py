"""Names of samplers: what people type, and what models are configured with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest

from ldmrt.errors import BadRequest
from ldmrt.samplers.registry import SAMPLERS, default_sampler, resolve


@pytest.mark.parametrize(
    ("typed", "name", "title"),
    [
        ("DDIM", "ddim", "DDIM"),
        ("plms", "pndm", "PLMS"),
        ("Euler a", "euler-ancestral", "Euler a"),
        ("euler_ancestral", "euler-ancestral", "Euler a"),
        ("EULER A KARRAS", "euler-ancestral karras", "Euler a Karras"),
        ("DPM2", "kdpm2", "DPM2"),
        ("dpm_2", "kdpm2", "DPM2"),
        ("DPM2 a Karras", "kdpm2-ancestral karras", "DPM2 a Karras"),
        ("LMS Karras", "lms karras", "LMS Karras"),
        ("DPM++ 2M", "dpm++ 2m", "DPM++ 2M"),
        ("  dpm++  2m   karras ", "dpm++ 2m karras", "DPM++ 2M Karras"),
        ("DPM++ 2M SDE Exponential", "dpm++ 2m sde exponential", "DPM++ 2M SDE Exponential"),
        ("dpmpp_2m_sde", "dpm++ 2m sde", "DPM++ 2M SDE"),
        ("dpmpp_sde karras", "dpm++ sde karras", "DPM++ SDE Karras"),
        ("uni_pc", "unipc", "UniPC"),
        ("EulerDiscreteScheduler", "euler", "Euler"),
        ("DPMSolverMultistepScheduler", "dpm++ 2m", "DPM++ 2M"),
        ("LCM", "lcm", "LCM"),
    ],
)
def test_what_people_type(typed: str, name: str, title: str) -> None:
    choice = resolve(typed)
    assert (choice.name, choice.title) == (name, title)
    assert resolve(name) == resolve(title) == choice


def test_the_documentation_shows_the_registry() -> None:
    page = (Path(__file__).parents[2] / "docs" / "samplers.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| `")
    ]
    assert rows == [
        [
            f"`{one.name}`",
            ", ".join(f"`{name}`" for name in (one.title, *one.aliases)),
            one.evaluations,
            "with eta" if one.eta else "yes" if one.noise else "no",
            "yes" if one.sigmas else "no",
            f"`{one.scheduler}`",
            one.source,
        ]
        for one in SAMPLERS.values()
    ]


def test_every_name_means_one_sampler() -> None:
    taken: dict[str, str] = {}
    for sampler in SAMPLERS.values():
        for name in (sampler.name, sampler.title, *sampler.aliases):
            assert taken.setdefault(name.casefold(), sampler.name) == sampler.name
            assert resolve(name).sampler is sampler
        assert hasattr(diffusers, sampler.scheduler)


@pytest.mark.parametrize("typed", ["magic", "", "karras", "euler b", "ddim 2", "DPM++ 2M Turbo"])
def test_unknown_names_list_the_known_ones(typed: str) -> None:
    with pytest.raises(BadRequest, match=r"expected one of: ddim, ddpm, pndm, euler, .*; with karras") as caught:
        resolve(typed)
    assert caught.value.param == "sampler"
    assert "\n" not in str(caught.value)


def test_samplers_that_go_by_timesteps_have_no_other_levels() -> None:
    with pytest.raises(BadRequest, match="'ddim karras', but ddim goes by timesteps: expected 'ddim' alone"):
        resolve("ddim karras")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"_class_name": "PNDMScheduler"}, "pndm"),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": False}, "euler"),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, "euler karras"),
        ({"_class_name": "UniPCMultistepScheduler", "use_exponential_sigmas": True}, "unipc exponential"),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "dpm++ 2m"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, "dpm++ 2m sde"),
        ({"_class_name": "LCMScheduler"}, "lcm"),
        ({"_class_name": "DDIMScheduler", "use_karras_sigmas": True}, "ddim"),
        ({"_class_name": "ScoreSdeVeScheduler"}, "ddim"),
        ({}, "ddim"),
    ],
)
def test_the_sampler_that_a_model_is_configured_with(config: dict[str, Any], name: str) -> None:
    assert default_sampler(config) == name
