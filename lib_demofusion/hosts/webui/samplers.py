"""What the method must know of the host's samplers, and how many model calls they make."""

from __future__ import annotations

import math
from dataclasses import dataclass

from modules import sd_samplers_kdiffusion, shared


@dataclass(frozen=True)
class Sampler:
    """What the method must know of one of the host's samplers.

    counts: how the model calls follow from the steps (`model_calls`). noise: whether it adds noise of its own: "never",
    "always", or if its "eta" or its "churn" is above 0. timesteps: its x is sqrt(alphas_cumprod) * z +
    sqrt(1 - alphas_cumprod) * n and its sigma a timestep, instead of z + sigma * n. levels: how many noise levels its
    model has. discards: the last level but one of its schedule is left out. least: it fails with fewer predictions than
    that on the way to noise level 0.
    """

    counts: str
    noise: str = "never"
    timesteps: bool = False
    levels: int = 1000
    discards: bool = False
    least: int = 1


SAMPLERS = {  # of all hosts of the family
    "DPM++ 2M": Sampler("first"),
    "DPM++ SDE": Sampler("second", "eta"),
    "DPM++ 2M SDE": Sampler("first", "eta", least=2),
    "DPM++ 2M SDE Heun": Sampler("first", "eta", least=2),
    "DPM++ 2S a": Sampler("second", "eta"),
    "DPM++ 3M SDE": Sampler("first", "eta", discards=True, least=2),
    "Euler a": Sampler("first", "eta"),
    "Euler": Sampler("first", "churn"),
    "LMS": Sampler("first"),
    "Heun": Sampler("second", "churn"),
    "DPM2": Sampler("second", "churn", discards=True),
    "DPM2 a": Sampler("second", "eta", discards=True),
    "DPM fast": Sampler("fixed", "eta"),
    "DPM adaptive": Sampler("unknown", "eta"),
    "Restart": Sampler("second", "always"),
    "DDIM": Sampler("ddim", "eta", timesteps=True),
    "DDIM CFG++": Sampler("ddim", "eta", timesteps=True),
    "PLMS": Sampler("grid", timesteps=True),
    "UniPC": Sampler("grid", timesteps=True),
    "LCM": Sampler("first", "always", levels=50),
    "HeunPP2": Sampler("heunpp"),
    "IPNDM": Sampler("first"),
    "IPNDM_V": Sampler("first"),
    "DEIS": Sampler("first"),
    "DDPM": Sampler("first", "always"),
}
_OF_K_DIFFUSION = {name for name, *_ in getattr(sd_samplers_kdiffusion, "samplers_k_diffusion", ())}
if "LCM" in _OF_K_DIFFUSION:  # with all levels
    SAMPLERS["LCM"] = Sampler("first", "always")
if "UniPC" in _OF_K_DIFFUSION:  # whose corrector would undo the skip residual
    del SAMPLERS["UniPC"]


def model_calls(sampler: str, scheduler: str | None, steps: int, skipped: int = 0) -> int | None:
    """How many predictions the host's sampler asks for in so many steps; None if that depends on the picture.

    skipped: how many of the first ones are not run.
    """
    known, run = SAMPLERS[sampler], steps - skipped
    counts = known.counts
    if counts in ("ddim", "grid"):
        grid = run if skipped else math.ceil(1000 / max(1000 // steps, 1))
        return grid - 1 if counts == "ddim" else grid
    if counts == "unknown":
        return None
    if counts == "fixed" and not skipped:
        return steps
    if scheduler == "DDIM":
        stride = max(known.levels // (steps + known.discards), 1)
        run = math.ceil((known.levels - 1) / stride) - known.discards - skipped
    if counts == "heunpp":  # three in a step, but for the last two
        return 3 * run - 3 if run > 1 else run
    if counts == "second":  # the last step, to sigma 0, needs one; KL Optimal ends above 0
        return 2 * run - (scheduler != "KL Optimal")
    return run


def least_calls(sampler: str, scheduler: str | None, skipped: int = 0) -> int:
    """With how many predictions the host's sampler can do; with fewer it fails, as it does without us."""
    known = SAMPLERS[sampler]
    if sampler == "UniPC":
        return shared.opts.uni_pc_order
    if known.counts in ("fixed", "unknown"):  # between two noise levels, which of a single step's are one
        return 2 if skipped else 1
    return 1 if scheduler == "KL Optimal" else known.least  # which ends above 0
