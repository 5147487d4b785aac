"""Noise schedules, and samplers as tables of coefficients.

A sampler is a table made once on the host in float64: one row for each evaluation of the model, holding every number
that the update of the latents needs (the meaning of the columns is `ldmrt.kernels.sampler.Column`). The sampling loop
then has no arithmetic of its own: it reads a row and applies it, on any device, whatever the sampler.

Notation: alphas_cumprod[t] is the share of the picture's variance that is left at training timestep t (alpha_t in
DDIM, arXiv 2010.02502; alpha-bar_t in DDPM, arXiv 2006.11239), so that x_t = sqrt(a) x_0 + sqrt(1 - a) noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ldmrt.errors import BadRequest, BundleError
from ldmrt.kernels.sampler import WIDTH, Basis, Column

PredictionType = Literal["epsilon", "v_prediction", "sample"]
TimestepSpacing = Literal["leading", "linspace", "trailing"]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]

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
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "set_alpha_to_one": True,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "thresholding": False,
}
_CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"timestep_spacing": "leading", "clip_sample": True},
    "DDPMScheduler": {"timestep_spacing": "leading", "clip_sample": True},
    "PNDMScheduler": {"timestep_spacing": "leading", "set_alpha_to_one": False},
    "LCMScheduler": {
        "timestep_spacing": "leading",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    },
    "HeunDiscreteScheduler": {"beta_start": 0.00085, "beta_end": 0.012},
    "KDPM2DiscreteScheduler": {"beta_start": 0.00085, "beta_end": 0.012},
    "KDPM2AncestralDiscreteScheduler": {"beta_start": 0.00085, "beta_end": 0.012},
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
        timestep_spacing: which timesteps are visited (arXiv 2305.08891, table 2).
        steps_offset: added to each timestep of "leading" spacing.
        set_alpha_to_one: past the last step, a = 1 (no noise left) rather than a at timestep 0.
        clip_sample_range: |x_0| is clipped to this at each step; infinity for no clipping (any latent diffusion model).
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
    timestep_spacing: TimestepSpacing = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    clip_sample_range: float = math.inf
    alphas_cumprod: NDArray[np.float64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _one_of("prediction_type", self.prediction_type, get_args(PredictionType))
        _one_of("timestep_spacing", self.timestep_spacing, get_args(TimestepSpacing))
        if not self.trained_betas:
            _one_of("beta_schedule", self.beta_schedule, get_args(BetaSchedule))
        elif len(self.trained_betas) != self.train_steps:
            raise _unsupported(
                "trained_betas", f"{len(self.trained_betas)} values", f"{self.train_steps}, one a timestep"
            )
        if self.train_steps < 1:
            raise _unsupported("num_train_timesteps", self.train_steps, "at least 1")
        if not self.clip_sample_range > 0:
            raise _unsupported("clip_sample_range", self.clip_sample_range, "a positive number")
        if self.steps_offset < 0:
            raise _unsupported("steps_offset", self.steps_offset, "0 or more")
        betas = self._betas()
        if not bool(np.all((betas >= 0) & (betas < 1))):
            raise _unsupported("betas", f"{betas.min():g} to {betas.max():g}", "values in [0, 1)")
        alphas_cumprod = np.cumprod(1.0 - betas)
        if self.zero_terminal_snr:
            root = np.sqrt(alphas_cumprod)
            alphas_cumprod = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        alphas_cumprod.flags.writeable = False
        object.__setattr__(self, "alphas_cumprod", alphas_cumprod)

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

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read the dictionary of a diffusers `scheduler_config.json`, whichever class wrote it.

        A key that is left out means what `_class_name` means by it; a class not known here has the common defaults
        and no clipping. Keys that only concern that class's own sampler are ignored.

        Raises:
            BadRequest: a value that this runtime does not support (such as dynamic thresholding), or of a wrong type.
        """
        known = _DEFAULTS | _CLASS_DEFAULTS.get(str(config.get("_class_name")), {})
        values = known | {key: config[key] for key in known if config.get(key) is not None}
        if values["thresholding"]:
            raise _unsupported("thresholding", "true", "false; dynamic thresholding is not supported yet")
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
            )
        except BadRequest:
            raise
        except (TypeError, ValueError) as error:
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
        except (TypeError, ValueError) as error:
            raise BundleError(
                f"the bundle's noise schedule cannot be read ({error}): build the bundle again"
            ) from error


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """A sampler for one schedule and number of steps: one row per evaluation of the model.

    Attributes:
        name: the key of `SAMPLERS` it was made by.
        timesteps: float64 (evaluations,), the timestep given to the model.
        coefficients: float64 (evaluations, WIDTH); the columns are `ldmrt.kernels.sampler.Column`.
        steps: int64 (evaluations,), the index of the step, as the user counts them, that this evaluation completes; -1
            for an evaluation in the middle of a step.
        draws_noise: bool (evaluations,), the rows for which fresh standard normal noise is to be drawn.
        initial_input_scale: the first model input is the initial x times this.
        initial_noise_scale: the initial x is standard normal noise times this.
    """

    name: str
    timesteps: NDArray[np.float64]
    coefficients: NDArray[np.float64]
    steps: NDArray[np.int64]
    draws_noise: NDArray[np.bool_]
    initial_input_scale: float = 1.0
    initial_noise_scale: float = 1.0

    @property
    def evaluations(self) -> int:
        """How often the model runs."""
        return len(self.timesteps)

    @property
    def uses_noise(self) -> bool:
        """Whether any row draws noise."""
        return bool(self.draws_noise.any())


def blank_rows(count: int) -> NDArray[np.float64]:
    """Rows that change nothing, float64 (count, WIDTH): next x = x, next saved = saved, no push, no clip, scale 1."""
    rows = np.zeros((count, WIDTH), dtype=np.float64)
    rows[:, Column.CLIP] = math.inf
    rows[:, Column.NEXT_X + Basis.X] = 1.0
    rows[:, Column.NEXT_SAVED + Basis.SAVED] = 1.0
    rows[:, Column.NEXT_INPUT_SCALE] = 1.0
    return rows


def ddim(schedule: NoiseSchedule, num_inference_steps: int, eta: float = 0.0) -> SamplerTable:
    """DDIM (Song et al. 2020, arXiv 2010.02502, eqs. 12 and 16), with diffusers' choices where the paper leaves room.

    Each step turns x_t into

        sqrt(a_prev) clip(x_0) + sqrt(1 - a_prev - sigma^2) noise_hat + sigma z

    where x_0 and noise_hat are both linear in x_t and the model output, noise_hat is *not* derived again from the clipped
    x_0, and the previous timestep is t - train_steps // steps whatever the spacing.

    Args:
        schedule: of the model to be sampled.
        num_inference_steps: steps, from 1 to schedule.train_steps.
        eta: 0 for the deterministic sampler, 1 for the noise of DDPM.

    Raises:
        BadRequest: the steps or eta are out of range, or the schedule cannot be sampled with them.
    """
    if not 0 <= eta <= 1:
        raise BadRequest(f"eta is {eta}, expected a number from 0 to 1", param="eta")
    timesteps = _timesteps(schedule, num_inference_steps)
    previous = timesteps - schedule.train_steps // num_inference_steps
    alpha = schedule.alphas_cumprod[timesteps]
    alpha_previous = np.where(
        previous >= 0, schedule.alphas_cumprod[np.maximum(previous, 0)], schedule.final_alpha_cumprod
    )
    if schedule.prediction_type == "epsilon" and not alpha.all():
        raise BadRequest(
            "the schedule's last timestep is pure noise (rescale_betas_zero_snr), where a model with prediction_type"
            ' "epsilon" says nothing about the picture: expected "v_prediction" or "sample"',
            param="prediction_type",
        )
    signal, noise = np.sqrt(alpha), np.sqrt(1.0 - alpha)

    # x_0 and noise_hat as coefficients of (x, m), for each of the three things a model may predict.
    ones, zeros = np.ones_like(alpha), np.zeros_like(alpha)
    if schedule.prediction_type == "epsilon":
        denoised, noise_hat = (1.0 / signal, -noise / signal), (zeros, ones)
    elif schedule.prediction_type == "v_prediction":
        denoised, noise_hat = (signal, -noise), (noise, signal)
    else:
        denoised, noise_hat = (zeros, ones), (1.0 / noise, -signal / noise)

    variance = (1.0 - alpha_previous) / (1.0 - alpha) * (1.0 - alpha / alpha_previous)
    sigma = eta * np.sqrt(variance)
    # Rounding may leave -1e-17 where the exact value is 0: eta = 1, last step.
    direction = np.sqrt(np.maximum(1.0 - alpha_previous - sigma**2, 0.0))

    rows = blank_rows(num_inference_steps)
    rows[:, Column.DENOISED_X], rows[:, Column.DENOISED_M] = denoised
    rows[:, Column.CLIP] = schedule.clip_sample_range
    rows[:, Column.NEXT_X + Basis.X] = direction * noise_hat[0]
    rows[:, Column.NEXT_X + Basis.M] = direction * noise_hat[1]
    rows[:, Column.NEXT_X + Basis.D] = np.sqrt(alpha_previous)
    rows[:, Column.NEXT_X + Basis.NOISE] = sigma
    return SamplerTable(
        name="ddim",
        timesteps=timesteps.astype(np.float64),
        coefficients=rows,
        steps=np.arange(num_inference_steps, dtype=np.int64),
        # Noise is drawn even where sigma is 0, to use up a generator as diffusers does.
        draws_noise=np.full(num_inference_steps, eta > 0),
    )


SAMPLERS: dict[str, Callable[[NoiseSchedule, int, float], SamplerTable]] = {"ddim": ddim}


def sampler_table(name: str, schedule: NoiseSchedule, num_inference_steps: int, eta: float = 0.0) -> SamplerTable:
    """The table of the sampler called `name`.

    Raises:
        BadRequest: there is no such sampler (those there are get listed), or its arguments are out of range.
    """
    if name not in SAMPLERS:
        raise BadRequest(f"there is no sampler {name!r}, expected one of: {', '.join(SAMPLERS)}", param="sampler")
    return SAMPLERS[name](schedule, num_inference_steps, eta)


def _timesteps(schedule: NoiseSchedule, count: int) -> NDArray[np.int64]:
    """The training timesteps to visit, from noisy to clean, int64 (count,); rounding as in diffusers."""
    last = schedule.train_steps - 1
    if not 1 <= count <= schedule.train_steps:
        raise BadRequest(
            f"num_inference_steps is {count}, expected 1 to {schedule.train_steps}", param="num_inference_steps"
        )
    timesteps: NDArray[np.floating[Any]]
    if schedule.timestep_spacing == "linspace":
        timesteps = np.linspace(0, last, count).round()[::-1]
    elif schedule.timestep_spacing == "leading":
        timesteps = np.arange(count)[::-1] * (schedule.train_steps // count) + float(schedule.steps_offset)
    else:
        # A step that is not exact in binary can make arange one element too long.
        timesteps = np.arange(schedule.train_steps, 0, -schedule.train_steps / count)[:count].round() - 1
    if timesteps[0] > last:
        raise BadRequest(
            f"{count} steps with steps_offset {schedule.steps_offset} begin at timestep {timesteps[0]:.0f}, but the model"
            f" was trained up to {last}: ask for fewer steps",
            param="num_inference_steps",
        )
    return timesteps.astype(np.int64)


def _one_of(key: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise _unsupported(key, repr(value), f"one of: {', '.join(known)}")


def _unsupported(key: str, found: object, expected: str) -> BadRequest:
    return BadRequest(f"noise schedule: {key} is {found}, expected {expected}", param=key)
