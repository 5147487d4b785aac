"""Noise schedules: the noise that a model was trained with, and what its maker says about sampling it.

Notation: alphas_cumprod[t] is the share of the picture's variance that is left at training timestep t (alpha_t in
DDIM, arXiv 2010.02502; alpha-bar_t in DDPM, arXiv 2006.11239), so that x_t = sqrt(a) x_0 + sqrt(1 - a) noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ldmrt.errors import BadRequest, BundleError

PredictionType = Literal["epsilon", "v_prediction", "sample"]
_FLOATS = (
    "beta_start",
    "beta_end",
    "clip_sample_range",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "timestep_scaling",
)
TimestepSpacing = Literal["leading", "linspace", "trailing"]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
# Training timesteps: a thousand times those of any model.
_MOST_STEPS = 1 << 20

# What a diffusers class means by a key that its configuration file leaves out, where that differs from _DEFAULTS.
# Files written by old versions carry few keys, so these decide real pictures.
_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
    "timestep_spacing": None,
    "steps_offset": 0,
    "set_alpha_to_one": True,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
}
_DISTILLED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"clip_sample": True},
    "DDPMScheduler": {"clip_sample": True},
    "PNDMScheduler": {"set_alpha_to_one": False},
    "LCMScheduler": _DISTILLED,
    "TCDScheduler": _DISTILLED,
    "HeunDiscreteScheduler": {"beta_start": 0.00085, "beta_end": 0.012},
    "KDPM2DiscreteScheduler": {"beta_start": 0.00085, "beta_end": 0.012},
    "KDPM2AncestralDiscreteScheduler": {"beta_start": 0.00085, "beta_end": 0.012},
    "DPMSolverSDEScheduler": {"beta_start": 0.00085, "beta_end": 0.012},
}


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """The noise a model was trained with, and how its timesteps are to be picked.

    Attributes:
        train_steps: training timesteps; t runs over 0 .. train_steps - 1.
        beta_schedule: how betas run from beta_start to beta_end. "scaled_linear" is linear in sqrt(beta);
            "squaredcos_cap_v2" is the cosine of arXiv 2102.09672, eq. 17, and ignores beta_start and beta_end.
        trained_betas: the betas themselves, (train_steps,); empty when beta_schedule makes them.
        zero_terminal_snr: shift and scale so that the last timestep is pure noise (arXiv 2305.08891, algorithm 1).
        prediction_type: what the model puts out: the noise, v = sqrt(a) noise - sqrt(1 - a) x_0 (arXiv 2202.00512), or
            x_0 itself.
        timestep_spacing: which timesteps are visited (arXiv 2305.08891, table 2); None for each sampler's own way, as diffusers
            takes it where a configuration file says nothing.
        steps_offset: added to each timestep of "leading" spacing.
        set_alpha_to_one: past the last step, a = 1 (no noise left) rather than a at timestep 0.
        clip_sample_range: |x_0| is clipped to this at each step; infinity for no clipping (any latent diffusion model).
        thresholding: at each step x_0 is clipped to a quantile of itself and divided by it (arXiv 2205.11487, section 2.3).
        dynamic_thresholding_ratio: which quantile of |x_0|.
        sample_max_value: the most that the quantile may be.
        original_inference_steps: the steps that a consistency model was distilled with; it is sampled at some of them.
        timestep_scaling: of the boundary conditions of latent consistency models (arXiv 2310.04378).
        alphas_cumprod: float64 (train_steps,), derived from the above.

    Raises:
        BadRequest: a value is not supported; found and expected are named.
    """

    train_steps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: BetaSchedule = "linear"
    trained_betas: tuple[float, ...] = ()
    zero_terminal_snr: bool = False
    prediction_type: PredictionType = "epsilon"
    timestep_spacing: TimestepSpacing | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    clip_sample_range: float = math.inf
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    alphas_cumprod: NDArray[np.float64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._make_floats()
        _one_of("prediction_type", self.prediction_type, get_args(PredictionType))
        if self.timestep_spacing is not None:
            _one_of("timestep_spacing", self.timestep_spacing, get_args(TimestepSpacing))
        if not self.trained_betas:
            _one_of("beta_schedule", self.beta_schedule, get_args(BetaSchedule))
        elif len(self.trained_betas) != self.train_steps:
            raise _unsupported(
                "trained_betas", f"{len(self.trained_betas)} values", f"{self.train_steps}, one a timestep"
            )
        if not 1 <= self.train_steps <= _MOST_STEPS:
            raise _unsupported("num_train_timesteps", self.train_steps, f"1 to {_MOST_STEPS}")
        if not self.clip_sample_range > 0:
            raise _unsupported("clip_sample_range", self.clip_sample_range, "a positive number")
        if not 0 < self.dynamic_thresholding_ratio <= 1:
            raise _unsupported("dynamic_thresholding_ratio", self.dynamic_thresholding_ratio, "above 0 and at most 1")
        if not self.sample_max_value > 0:
            raise _unsupported("sample_max_value", self.sample_max_value, "a positive number")
        if self.steps_offset < 0:
            raise _unsupported("steps_offset", self.steps_offset, "0 or more")
        if self.original_inference_steps < 1:
            raise _unsupported("original_inference_steps", self.original_inference_steps, "at least 1")
        betas = self._betas()
        if not bool(np.all((betas >= 0) & (betas < 1))):
            raise _unsupported("betas", f"{betas.min():g} to {betas.max():g}", "values in [0, 1)")
        alphas_cumprod = np.cumprod(1.0 - betas)
        if self.zero_terminal_snr:
            root = np.sqrt(alphas_cumprod)
            alphas_cumprod = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        alphas_cumprod.flags.writeable = False
        object.__setattr__(self, "alphas_cumprod", alphas_cumprod)

    def _make_floats(self) -> None:
        """A whole number that no float holds is refused here, and not where it is used."""
        for name in _FLOATS:
            object.__setattr__(self, name, float(getattr(self, name)))

    def _betas(self) -> NDArray[np.float64]:
        """The variance added at each training step, float64 (train_steps,)."""
        if self.trained_betas:
            return np.array(self.trained_betas, dtype=np.float64)
        if self.beta_schedule == "linear":
            return np.linspace(self.beta_start, self.beta_end, self.train_steps, dtype=np.float64)
        if self.beta_schedule == "scaled_linear":
            return np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.train_steps, dtype=np.float64) ** 2
        time = np.arange(self.train_steps + 1, dtype=np.float64) / self.train_steps
        alpha_bar: NDArray[np.float64] = np.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1.0 - alpha_bar[1:] / alpha_bar[:-1]).clip(max=0.999)

    @property
    def final_alpha_cumprod(self) -> float:
        """The alphas_cumprod past the last step, where there is no timestep left to look it up at."""
        return 1.0 if self.set_alpha_to_one else float(self.alphas_cumprod[0])

    @property
    def sigmas(self) -> NDArray[np.float64]:
        """Noise for one part of picture at each training timestep, sqrt((1 - a) / a), float64 (train_steps,), rising.

        Where nothing is left of the picture, at the end of `zero_terminal_snr`, a is taken to be 2^-24, as in diffusers.
        """
        alphas = self.alphas_cumprod.copy()
        if self.zero_terminal_snr:
            alphas[-1] = 2.0**-24
        return np.sqrt((1.0 - alphas) / alphas)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read the dictionary of a diffusers `scheduler_config.json`, whichever class wrote it.

        A key that is left out means what `_class_name` means by it; a class not known here has the common defaults
        and no clipping. Keys that only concern that class's own sampler are ignored.

        Raises:
            BadRequest: a value that this runtime does not support, or of a wrong type.
        """
        known = _DEFAULTS | _CLASS_DEFAULTS.get(str(config.get("_class_name")), {})
        values = known | {key: config[key] for key in known if config.get(key) is not None}
        try:
            return cls(
                train_steps=int(values["num_train_timesteps"]),
                beta_start=float(values["beta_start"]),
                beta_end=float(values["beta_end"]),
                beta_schedule=values["beta_schedule"],
                trained_betas=tuple(float(beta) for beta in values["trained_betas"] or ()),
                zero_terminal_snr=bool(values["rescale_betas_zero_snr"]),
                prediction_type=values["prediction_type"],
                timestep_spacing=values["timestep_spacing"],
                steps_offset=int(values["steps_offset"]),
                set_alpha_to_one=bool(values["set_alpha_to_one"]),
                clip_sample_range=float(values["clip_sample_range"]) if values["clip_sample"] else math.inf,
                thresholding=bool(values["thresholding"]),
                dynamic_thresholding_ratio=float(values["dynamic_thresholding_ratio"]),
                sample_max_value=float(values["sample_max_value"]),
                original_inference_steps=int(values["original_inference_steps"]),
                timestep_scaling=float(values["timestep_scaling"]),
            )
        except BadRequest:
            raise
        except (ArithmeticError, TypeError, ValueError) as error:
            raise BadRequest(f"scheduler_config.json holds a value of the wrong type: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """A small dictionary for the manifest, safe in strict JSON: no clipping is null, not Infinity."""
        values = asdict(self)
        del values["alphas_cumprod"]
        values["trained_betas"] = list(self.trained_betas)
        values["clip_sample_range"] = None if math.isinf(self.clip_sample_range) else self.clip_sample_range
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NoiseSchedule:
        """The inverse of `to_dict`.

        Raises:
            BundleError: keys are unknown, or values are not usable.
        """
        clip = values.get("clip_sample_range")
        try:
            return cls(
                **{
                    **values,
                    "trained_betas": tuple(values.get("trained_betas") or ()),
                    "clip_sample_range": math.inf if clip is None else clip,
                }
            )
        except (ArithmeticError, TypeError, ValueError) as error:
            raise BundleError(
                f"the bundle's noise schedule cannot be read ({error}): build the bundle again"
            ) from error


def _one_of(key: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise _unsupported(key, repr(value), f"one of: {', '.join(known)}")


def _unsupported(key: str, found: object, expected: str) -> BadRequest:
    return BadRequest(f"noise schedule: {key} is {found}, expected {expected}", param=key)
