"""Which samplers there are, and what people call them. Nothing heavy is imported: the command line's help reads it.

docs/samplers.md shows this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ldmrt.errors import BadRequest

SigmaSpacing = Literal["karras", "exponential"]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A sampler, before it is told a noise schedule and a number of steps.

    Attributes:
        name: ours.
        title: what AUTOMATIC1111's web UI calls it, or would.
        scheduler: the class of diffusers whose numbers it gives.
        aliases: other names.
        evaluations: of the model, for n steps.
        noise: whether it draws noise in its steps; of those with `eta`, if that is not 0.
        sigmas: whether it may visit other noise levels: `karras` or `exponential` behind the name.
        eta: whether it has a parameter `eta`.
        source: the paper.
    """

    name: str
    title: str
    scheduler: str
    aliases: tuple[str, ...] = ()
    evaluations: str = "n"
    noise: bool = False
    sigmas: bool = False
    eta: bool = False
    source: str


_KARRAS = "Karras et al. 2022, arXiv 2206.00364"
_PLUS = "Lu et al. 2022, arXiv 2211.01095"

SAMPLERS: dict[str, Sampler] = {
    sampler.name: sampler
    for sampler in (
        Sampler(
            name="ddim",
            title="DDIM",
            scheduler="DDIMScheduler",
            noise=True,
            eta=True,
            source="Song et al. 2020, arXiv 2010.02502",
        ),
        Sampler(
            name="ddpm",
            title="DDPM",
            scheduler="DDPMScheduler",
            noise=True,
            source="Ho et al. 2020, arXiv 2006.11239",
        ),
        Sampler(
            name="pndm",
            title="PLMS",
            scheduler="PNDMScheduler",
            evaluations="n + 1",
            source="Liu et al. 2022, arXiv 2202.09778",
        ),
        Sampler(name="euler", title="Euler", scheduler="EulerDiscreteScheduler", sigmas=True, source=_KARRAS),
        Sampler(
            name="euler-ancestral",
            title="Euler a",
            scheduler="EulerAncestralDiscreteScheduler",
            noise=True,
            sigmas=True,
            source=f"{_KARRAS}, with k-diffusion's ancestral steps",
        ),
        Sampler(
            name="heun",
            title="Heun",
            scheduler="HeunDiscreteScheduler",
            evaluations="2n - 1",
            sigmas=True,
            source=f"{_KARRAS}, algorithm 1",
        ),
        Sampler(
            name="lms",
            title="LMS",
            scheduler="LMSDiscreteScheduler",
            sigmas=True,
            source="k-diffusion; Adams and Bashforth 1883",
        ),
        Sampler(
            name="kdpm2",
            title="DPM2",
            scheduler="KDPM2DiscreteScheduler",
            aliases=("dpm 2",),
            evaluations="2n - 1",
            sigmas=True,
            source=f"Lu et al. 2022, arXiv 2206.00927; {_KARRAS}",
        ),
        Sampler(
            name="kdpm2-ancestral",
            title="DPM2 a",
            scheduler="KDPM2AncestralDiscreteScheduler",
            aliases=("dpm2 ancestral", "dpm 2 ancestral"),
            evaluations="2n - 1",
            noise=True,
            sigmas=True,
            source=f"Lu et al. 2022, arXiv 2206.00927; {_KARRAS}",
        ),
        Sampler(name="dpm++ 2m", title="DPM++ 2M", scheduler="DPMSolverMultistepScheduler", sigmas=True, source=_PLUS),
        Sampler(
            name="dpm++ 2m sde",
            title="DPM++ 2M SDE",
            scheduler="DPMSolverMultistepScheduler",
            noise=True,
            sigmas=True,
            source=_PLUS,
        ),
        Sampler(
            name="dpm++ sde",
            title="DPM++ SDE",
            scheduler="DPMSolverSDEScheduler",
            evaluations="2n - 1",
            noise=True,
            sigmas=True,
            source=f"{_PLUS}; k-diffusion",
        ),
        Sampler(
            name="unipc",
            title="UniPC",
            scheduler="UniPCMultistepScheduler",
            aliases=("uni pc",),
            sigmas=True,
            source="Zhao et al. 2023, arXiv 2302.04867",
        ),
        Sampler(
            name="lcm", title="LCM", scheduler="LCMScheduler", noise=True, source="Luo et al. 2023, arXiv 2310.04378"
        ),
        Sampler(
            name="tcd",
            title="TCD",
            scheduler="TCDScheduler",
            noise=True,
            eta=True,
            source="Zheng et al. 2024, arXiv 2402.19159",
        ),
    )
}


@dataclass(frozen=True)
class Choice:
    """A sampler, and the noise levels it is to visit.

    Attributes:
        sampler: which.
        sigmas: None for those of the model's timesteps.
    """

    sampler: Sampler
    sigmas: SigmaSpacing | None = None

    @property
    def name(self) -> str:
        """Ours, such as `dpm++ 2m karras`."""
        return f"{self.sampler.name} {self.sigmas}" if self.sigmas else self.sampler.name

    @property
    def title(self) -> str:
        """AUTOMATIC1111's, such as `DPM++ 2M Karras`."""
        return f"{self.sampler.title} {self.sigmas.capitalize()}" if self.sigmas else self.sampler.title

    def check_eta(self, eta: float) -> None:
        """Check eta, the noise of a sampler that has it.

        Raises:
            BadRequest: it is out of range, or the sampler has none and this is not 0.
        """
        if not 0 <= eta <= 1:
            raise BadRequest(f"eta is {eta}, expected a number from 0 to 1", param="eta")
        if eta and not self.sampler.eta:
            having = ", ".join(one.name for one in SAMPLERS.values() if one.eta)
            raise BadRequest(
                f"eta is {eta:g}, but {self.sampler.name} has none: leave it out, or use {having}", param="eta"
            )


def resolve(name: str) -> Choice:
    """Find a sampler by any of its names: ours, AUTOMATIC1111's, k-diffusion's or the class in diffusers; then `karras` or
    `exponential` for its noise levels. Case does not matter, and `_` and `-` are spaces.

    Raises:
        BadRequest: there is none of that name (those there are get listed), or it has no such noise levels.
    """
    words = _words(name)
    spacing = next((one for one in get_args(SigmaSpacing) if words[-1:] == [one]), None)
    sampler = _NAMES.get(" ".join(words[:-1] if spacing else words))
    if sampler is None:
        raise BadRequest(
            f"sampler is {name!r}, expected one of: {', '.join(SAMPLERS)}; with karras or exponential behind it:"
            f" {', '.join(one.name for one in SAMPLERS.values() if one.sigmas)}",
            param="sampler",
        )
    if spacing and not sampler.sigmas:
        raise BadRequest(
            f"sampler is {name!r}, but {sampler.name} goes by timesteps: expected {sampler.name!r} alone",
            param="sampler",
        )
    return Choice(sampler, spacing)


def default_sampler(config: Mapping[str, Any]) -> str:
    """The name of the sampler that a diffusers `scheduler_config.json` asks for; `ddim` for one that is not here."""
    sampler = _NAMES.get(str(config.get("_class_name")).casefold(), SAMPLERS["ddim"])
    if sampler.name == "dpm++ 2m" and config.get("algorithm_type") == "sde-dpmsolver++":
        sampler = SAMPLERS["dpm++ 2m sde"]
    spacings = (one for one in get_args(SigmaSpacing) if sampler.sigmas and config.get(f"use_{one}_sigmas"))
    return Choice(sampler, next(spacings, None)).name


def _words(name: str) -> list[str]:
    return name.casefold().replace("dpmpp", "dpm++").replace("_", " ").replace("-", " ").split()


# A class of diffusers that does several things stands for the first of them.
_NAMES: dict[str, Sampler] = {}
for _sampler in SAMPLERS.values():
    for _name in (_sampler.name, _sampler.title, _sampler.scheduler, *_sampler.aliases):
        _NAMES.setdefault(" ".join(_words(_name)), _sampler)
