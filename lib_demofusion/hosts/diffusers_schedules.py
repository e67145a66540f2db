"""diffusers' schedulers as DemoFusion's samplers: what a checkpoint's own one hands over to them, and what they can make."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lib_demofusion.config import DemoFusionConfig, first_line
from lib_demofusion.hosts.diffusers_arguments import short, whole_number


@dataclass(frozen=True)
class Sampler:
    """A diffusers scheduler and what the method must know of it.

    variance_preserving: its x is sqrt(alphas_cumprod) * z + sqrt(1 - alphas_cumprod) * n, instead of z + sigma * n.
    fresh_noise: it adds noise of its own. calls: model predictions for steps, some of them skipped. phase_settings: what the
    scheduler needs besides in the phases after the base.
    """

    scheduler: str
    variance_preserving: bool = False
    fresh_noise: bool = False
    calls: Callable[[int, int], int] = lambda steps, skipped: steps - skipped
    phase_settings: Mapping[str, Any] = field(default_factory=dict)


SAMPLERS = {
    "Euler": Sampler("EulerDiscreteScheduler"),
    "Euler a": Sampler("EulerAncestralDiscreteScheduler", fresh_noise=True),
    "DDIM": Sampler("DDIMScheduler", variance_preserving=True),
    "DPM++ 2M": Sampler("DPMSolverMultistepScheduler", variance_preserving=True),
    "Heun": Sampler("HeunDiscreteScheduler", calls=lambda steps, skipped: 2 * (steps - skipped) - 1),
    "LCM": Sampler("LCMScheduler", variance_preserving=True, fresh_noise=True),
    # UniPC's corrector takes its step again from the state before the skip residual, which would undo it.
    "UniPC": Sampler(
        "UniPCMultistepScheduler", variance_preserving=True, phase_settings={"disable_corrector": list(range(1000))}
    ),
}
# The WebUI's names for how the noise levels lie, "" being its Automatic: as the checkpoint's own scheduler says. What each
# becomes, of T training timesteps and n steps:
# Uniform, Normal: timesteps from T - 1 to 0, both among them (timestep_spacing "linspace").
# SGM Uniform, Simple: every T / n-th timestep from T - 1 down (timestep_spacing "trailing"), rounded, or to the one above.
# Karras, Exponential, Beta: diffusers' noise levels of that name, between those of T - 1 and of 0.
# They are the WebUI's to within a timestep.
SCHEDULES: Mapping[str, Mapping[str, Any]] = {
    "": {},
    "Uniform": {"timestep_spacing": "linspace"},
    "Karras": {"timestep_spacing": "linspace", "use_karras_sigmas": True},
    "Exponential": {"timestep_spacing": "linspace", "use_exponential_sigmas": True},
    "SGM Uniform": {"timestep_spacing": "trailing"},
    "Simple": {"timestep_spacing": "trailing"},
    "Normal": {"timestep_spacing": "linspace"},
    "Beta": {"timestep_spacing": "linspace", "use_beta_sigmas": True},
}
AUTOMATIC = "Automatic"
SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
# These are given the timesteps themselves: their own spacings are others, or make one too many for some numbers of steps.
GIVEN_TIMESTEPS = ("DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "LCMScheduler")
# Settings of a scheduler that say how much noise the model was trained with; they hold for every sampler.
TRAINED_WITH = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class Sampling:
    """How the base or the phases after it are sampled: sampler in SAMPLERS, schedule in SCHEDULES, steps of the schedule."""

    sampler: str
    schedule: str
    steps: int
    cfg_scale: float

    @property
    def branches(self) -> int:
        """Of guidance: without it the model is asked once."""
        return 2 if self.cfg_scale > 1 else 1

    @property
    def kind(self) -> Sampler:
        return SAMPLERS[self.sampler]


def samplings(config: DemoFusionConfig, steps: Any, cfg_scale: Any, sampler: Any, schedule: Any) -> tuple[Sampling, Sampling]:
    """How the base is sampled and how the phases after it, which take from it what config leaves open.

    Raises ValueError, one line, for what is no number of steps, CFG scale, sampler or schedule.
    """
    steps = whole_number(steps, "steps", 1)
    if isinstance(cfg_scale, bool) or not isinstance(cfg_scale, Real) or not math.isfinite(cfg_scale):
        raise ValueError(f"CFG scale must be a number, got {short(cfg_scale)}")
    if cfg_scale < 1:
        raise ValueError(f"CFG scale must be at least 1, got {cfg_scale:g}")
    base = Sampling(sampler_named(sampler), schedule_named(schedule), steps, float(cfg_scale))
    phases = Sampling(
        sampler_named(config.phase_sampler) if config.phase_sampler else base.sampler,
        schedule_named(config.phase_schedule) if config.phase_schedule else base.schedule,
        config.phase_steps_of(steps),
        float(config.phase_cfg_scale or cfg_scale),
    )
    for sampling in (base, phases):
        check_schedule(sampling.sampler, sampling.schedule)
    return base, phases


class InfiniteNoise(ValueError):
    """A sampler cannot start where this checkpoint does, whatever the steps."""


def sampler_named(name: str) -> str:
    """The key in SAMPLERS of a sampler by the WebUI's name or the diffusers class. Raises ValueError if there is none."""
    if not isinstance(name, str):
        raise ValueError(f"the sampler must be a name, got a {type(name).__name__}; there are: {', '.join(SAMPLERS)}")
    for label, sampler in SAMPLERS.items():
        if name in (label, sampler.scheduler):
            return label
    raise ValueError(f"no sampler called {name!r}; there are: {', '.join(SAMPLERS)}")


def schedule_named(name: str) -> str:
    """The key in SCHEDULES of a schedule by the WebUI's name, whatever its case; "" for Automatic.

    Raises ValueError, one line, if there is none.
    """
    there = ", ".join([AUTOMATIC, *filter(None, SCHEDULES)])
    if not isinstance(name, str):
        raise ValueError(f"the schedule must be a name, got a {type(name).__name__}; there are: {there}")
    if name.lower() == AUTOMATIC.lower():
        return ""
    for known in SCHEDULES:
        if name.lower() == known.lower():
            return known
    raise ValueError(f"no schedule called {name!r}; there are: {there}")


def check_schedule(label: str, schedule: str) -> None:
    """Raises ValueError, one line, if a sampler, as this diffusers has it, cannot have a schedule. Both by their keys."""
    if _has(SAMPLERS[label], schedule):
        return
    import diffusers

    there = ", ".join([AUTOMATIC, *(name for name in SCHEDULES if name and _has(SAMPLERS[label], name))])
    raise ValueError(f"{label} of diffusers {diffusers.__version__} has no schedule {schedule}; it has: {there}")


def _has(sampler: Sampler, schedule: str) -> bool:
    known = inspect.signature(_scheduler_of(sampler).__init__).parameters
    if SCHEDULES[schedule] == {"timestep_spacing": "linspace"} and sampler is SAMPLERS["UniPC"]:
        return False  # whose "linspace" leaves out the last one
    return all(name in known for name in SCHEDULES[schedule])


def _scheduler_of(sampler: Sampler) -> type:
    import diffusers

    return getattr(diffusers, sampler.scheduler)


def _given_timesteps(sampler: Sampler, schedule: str) -> bool:
    """Whether a scheduler is told the timesteps of a schedule, and not only how to make them."""
    spaced = bool(schedule) and not any(name in SIGMAS for name in SCHEDULES[schedule])
    return spaced and sampler.scheduler in GIVEN_TIMESTEPS


def _spacing(sampler: Sampler, schedule: str, steps: int, trained: int) -> dict[str, Any]:
    """The settings by which a scheduler has a schedule."""
    if not schedule:
        return {}
    spacing = {**dict.fromkeys(SIGMAS, False), "interpolation_type": "linear", **SCHEDULES[schedule]}
    if steps == 1:
        spacing["timestep_spacing"] = "trailing"  # at all the noise; "linspace" would put it at none
    if _given_timesteps(sampler, schedule):
        spacing["original_inference_steps"] = trained  # LCM's own would be fewer, and it warns of others than these
    known = inspect.signature(_scheduler_of(sampler).__init__).parameters
    return {name: value for name, value in spacing.items() if name in known}


def _timesteps(schedule: str, trained: int, steps: int) -> list[int]:
    """A schedule of timestep_spacing as whole timesteps, from high to low."""
    if schedule == "Simple":
        return [trained - 1 - step * trained // steps for step in range(steps)]
    if SCHEDULES[schedule]["timestep_spacing"] == "trailing":
        return [round(trained - step * trained / steps) - 1 for step in range(steps)]
    return [round((trained - 1) * (1 - step / max(steps - 1, 1))) for step in range(steps)]


def prediction_type(scheduler: Any) -> str:
    """What the model predicts, as the checkpoint's scheduler says."""
    return scheduler.config.get("prediction_type", "epsilon")


def check_scheduler(scheduler: Any) -> None:
    """Raises ValueError, one line, for a checkpoint's scheduler whose noise levels are not those of Stable Diffusion's kind."""
    config, kind = scheduler.config, type(scheduler).__name__
    if prediction_type(scheduler) not in PREDICTIONS:
        raise ValueError(f"prediction type {prediction_type(scheduler)} is not known; {' and '.join(PREDICTIONS)} are")
    continuous = config.get("timestep_type") == "continuous" and prediction_type(scheduler) == "v_prediction"
    if not isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor) or config.get("use_flow_sigmas") or continuous:
        raise ValueError(
            f"the noise levels of this checkpoint's {kind} are not of Stable Diffusion's kind; use another checkpoint"
        )


def settings_for(kind: type, scheduler: Any) -> dict[str, Any]:
    """What a checkpoint's scheduler says to a scheduler of another class.

    Values that nobody has set take the other class's default, as in diffusers' own from_config, but for two kinds. The
    noise levels are the model's, so they are those that its own scheduler goes by. And samples are not clipped unless it
    is said that they are: clipping to -1..1 is for models of pixels, latents are larger.
    """
    settings = dict(scheduler.config)
    unset = settings.pop("_use_default_values", ())
    if type(scheduler) is kind:
        return settings
    defaults = inspect.signature(type(scheduler).__init__).parameters
    for key in unset:  # a pipeline may have put something there since
        if key not in TRAINED_WITH and key in defaults and settings.get(key) == defaults[key].default:
            del settings[key]
    settings.setdefault("clip_sample", False)
    return settings


def make_schedule(
    scheduler: Any,
    sampler: Sampler,
    steps: int,
    more: Mapping[str, Any] = MappingProxyType({}),
    schedule: str = "",
) -> Any:
    """A scheduler for so many steps of a sampler, from the checkpoint's own; its levels are on the CPU, where they are read.

    more: settings on top. schedule: in SCHEDULES, one that check_schedule lets pass.

    Raises ValueError, one line, if the checkpoint's noise levels and the sampler do not go together; whatever the scheduler
    raises if it cannot make so many steps.
    """
    kind, trained = _scheduler_of(sampler), scheduler.config.num_train_timesteps
    settings = {**settings_for(kind, scheduler), **_spacing(sampler, schedule, steps, trained), **more}
    # The fused prediction is noise whatever the model predicts, since the dilated views see another x.
    try:
        made = kind.from_config(settings, prediction_type="epsilon")
    except Exception as error:  # a setting that this class does not know, or a package that it needs
        raise ValueError(f"{kind.__name__} cannot be made from this checkpoint's scheduler: {first_line(error)}") from error
    levels = scheduler.alphas_cumprod
    if made.alphas_cumprod.shape != levels.shape or not torch.allclose(
        made.alphas_cumprod.cpu().float(), levels.cpu().float(), atol=1e-6
    ):
        way_out = "checkpoint" if sampler is SAMPLERS["Euler"] else "sampler, Euler for one"
        own = type(scheduler).__name__
        raise ValueError(f"{kind.__name__} cannot take over the noise levels of this checkpoint's {own}; use another {way_out}")
    if _given_timesteps(sampler, schedule):
        made.set_timesteps(timesteps=_timesteps(schedule, trained, steps))
    else:
        made.set_timesteps(steps)
    if sigma_at(made, 0) > 1e4:  # zero terminal SNR; schedulers that can take it stop at 4096
        way_out = "another checkpoint" if sampler is SAMPLERS["Euler"] else "Euler"
        raise InfiniteNoise(f"this checkpoint starts at infinite noise, which this sampler divides by; use {way_out}")
    return made


def check_steps(
    scheduler: Any,
    label: str,
    steps: int,
    name: str = "steps",
    more: Mapping[str, Any] = MappingProxyType({}),
    skipped: int = 0,
    schedule: str = "",
) -> None:
    """Raises ValueError, one line with a number that works, if a sampler cannot make so many steps, or take them to the end.

    label: in SAMPLERS. more, schedule: as in make_schedule. skipped: of the steps, which are not taken.
    """
    sampler, made = SAMPLERS[label], dict(more=more, schedule=schedule)
    make_schedule(scheduler, sampler, 1, **made)
    why = _why_not(scheduler, sampler, steps, skipped, made)
    if why is None:
        return
    low, high = 1, min(steps, scheduler.config.num_train_timesteps + 1)  # low works, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _why_not(scheduler, sampler, middle, None, made) else (middle, high)
    while low > 1 and _why_not(scheduler, sampler, low, 0, made):
        low -= 1
    raise ValueError(f"{label} cannot make {steps} {name} with this checkpoint ({why}); {low} works")


def _why_not(scheduler: Any, sampler: Sampler, steps: int, skipped: int | None, made: Mapping[str, Any]) -> str | None:
    """Why a sampler cannot make so many steps; None if it can.

    skipped: of the steps that are tried; None: none is. made: how the schedule is, make_schedule's arguments.
    """
    most = scheduler.config.num_train_timesteps
    if steps > most:
        return f"it was trained with {most}"
    try:
        schedule = make_schedule(scheduler, sampler, steps, **made)
        levels = [sigma_at(schedule, index) for index in range(len(schedule.timesteps))]
        falling = all(before >= after for before, after in zip(levels, levels[1:]))
        if len(levels) != sampler.calls(steps, 0) or len(set(levels)) != steps or not falling:
            return "its noise levels would repeat"
        if skipped is None:
            return None
        x = torch.ones(1, 4, 2, 2) * schedule.init_noise_sigma
        x = take_steps(schedule, x, lambda x, *_: torch.zeros_like(x), skipped * schedule.order)
        return None if torch.isfinite(x).all() else "it would end in NaN"
    except InfiniteNoise:
        raise
    except Exception as error:
        return first_line(error)


def draws_noise(sampler: Sampler, schedule: Any) -> bool:
    """Whether the sampler adds noise of its own: always, or since the checkpoint's scheduler is set so."""
    stochastic = str(schedule.config.get("algorithm_type", "")).startswith("sde")
    return sampler.fresh_noise or stochastic and sampler.scheduler == "DPMSolverMultistepScheduler"


def sigma_at(schedule: Any, index: int) -> float:
    """The noise level, over the signal, at a step."""
    if hasattr(schedule, "sigmas"):
        return float(schedule.sigmas[index])
    kept = float(schedule.alphas_cumprod[int(schedule.timesteps[index])])
    return math.sqrt((1 - kept) / kept) if kept else math.inf


def take_steps(
    template: Any,
    x: Tensor,
    predict: Callable[[Tensor, Tensor, float, float | None], Tensor],
    first: int = 0,
    generators: Sequence[torch.Generator] | None = None,
) -> Tensor:
    """x from the first of the schedule's timesteps that is not skipped to the end.

    predict: the noise in x at timestep t and noise level sigma. The step that has led there began at a timestep that it
    gets last, None at the first; samplers of second order ask twice a step. generators: what fresh noise is drawn from, one
    for each image; needed if the sampler adds some.
    """
    schedule = copy.deepcopy(template)  # multistep ones keep a history; it ends with the phase
    if first and hasattr(schedule, "set_begin_index"):  # DDIM's goes by the timesteps alone
        schedule.set_begin_index(first)
    extra = {}
    if "generator" in inspect.signature(schedule.step).parameters:
        # Some draw noise that they do not use; that must not move the images' generators, nor torch's.
        extra["generator"] = list(generators) if generators else torch.Generator().manual_seed(0)
    for index, t in enumerate(schedule.timesteps[first:], start=first):
        schedule.scale_model_input(x, t)  # some warn if they are not asked; the crops are scaled one by one
        began = (index - 1) // schedule.order * schedule.order
        since = float(schedule.timesteps[began]) if index > first else None
        eps = predict(x, t, sigma_at(schedule, index), since)
        x = schedule.step(eps, t, x, return_dict=False, **extra)[0]
    return x
