"""What the host's samplers are asked for, and how, in all hosts of the family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from modules import sd_samplers, sd_samplers_common, shared
from torch import Tensor

from lib_demofusion.fusion import crops_of
from lib_demofusion.hosts.webui.samplers import SAMPLERS
from lib_demofusion.phases import Phase
from lib_demofusion.views import Size, View

FACTOR = 8  # image pixels per latent pixel, as the host has it


def base_steps(p: Any) -> tuple[int, int]:
    """The steps of the base's schedule, and how many of the first ones are not run, as img2img's denoising strength has it."""
    steps, encoded = sd_samplers_common.setup_img2img_steps(p)
    run = encoded if SAMPLERS[p.sampler_name].timesteps else encoded + 1
    return steps, steps - run


def set_up_prompts(p: Any, phase: Phase, again: bool) -> bool:
    """p's prompts on the phase's own steps. again: whatever they are now. Returns whether they have been set up anew."""
    unguided = p.uc is None and p.cfg_scale != 1  # the base was, for which some hosts set up no negative prompt
    anew = again or unguided or p.c is None or p.steps != phase.steps
    if anew:
        p.steps = phase.steps
        p.setup_conds()
    return anew


def create_sampler(p: Any) -> Any:
    """A sampler of p's own kind, as a phase needs it."""
    sampler = sd_samplers.create_sampler(p.sampler_name, p.sd_model)
    if p.sampler_name == "UniPC":
        sampler.func = _unipc_without_corrector
    return sampler


def sample(p: Any, sampler: Any, phase: Phase, noise: Tensor, image_conditioning: Tensor) -> Tensor:
    """The host's sampler over the steps of a phase that are not skipped; the hook, which knows the level, sets its first x."""
    if not phase.skipped:
        return sampler.sample(p, noise.clone(), p.c, p.uc, steps=phase.steps, image_conditioning=image_conditioning)
    run, before = phase.steps - phase.skipped, p.denoising_strength
    if SAMPLERS[p.sampler_name].timesteps:
        run += 1  # the host drops one
    p.denoising_strength = run / (phase.steps + 0.5)  # from which, and from run, the host works out the phase's steps
    try:
        return sampler.sample_img2img(p, noise, noise, p.c, p.uc, steps=run, image_conditioning=image_conditioning)
    finally:
        p.denoising_strength = before


def adds_noise(p: Any, sampler: Any) -> bool:
    kind = SAMPLERS[p.sampler_name].noise
    if kind == "eta":
        eta = p.eta if p.eta is not None else getattr(shared.opts, sampler.eta_option_field, 0)
        return eta > 0
    if kind == "churn":
        return getattr(shared.opts, "s_churn", p.s_churn) > 0
    return kind == "always"


def rolled(x: Tensor, shifts: Sequence[int]) -> Tensor:
    return torch.roll(x, tuple(shifts), (-2, -1)) if any(shifts) else x


def for_views(value: Tensor, views: Sequence[View], roll: Sequence[int], size: Size) -> Tensor:
    """One of the host's conditions [rows, ...], once for each view; what has the image's size, (H, W), is cropped.

    roll: (rows, columns) by which the plane is rolled.
    """
    if value.ndim == 4 and value.shape[-2:] == size:
        return crops_of(rolled(value, roll), views)
    return value.repeat(len(views), *[1] * (value.ndim - 1))


def size_ids(size: Size, views: Sequence[View]) -> list[tuple[Size, Size, Size]]:
    """SDXL's original size, crop (top, left) and target size in pixels, for each view of an image of (H, W) latent pixels.

    The crop is where the window lies, from the corner set in the host's settings.
    """
    h, w = (side * FACTOR for side in size)
    top, left = shared.opts.sdxl_crop_top, shared.opts.sdxl_crop_left
    corners = [view.crop_pixels(FACTOR) for view in views]
    return [((h, w), (top + y, left + x), (h, w)) for y, x in corners]


def _unipc_without_corrector(model, x, timesteps, extra_args=None, callback=None, disable=None, is_img2img=False):
    """The host's UniPC by its predictor alone.

    Its corrector takes every step again from the state before the skip residual, which would undo it.
    """
    from modules import sd_samplers_timesteps_impl as host

    class Predictor(host.UniPCCFG):
        def multistep_uni_pc_update(self, *args, use_corrector=True, **kwargs):
            return super().multistep_uni_pc_update(*args, use_corrector=False, **kwargs)

    schedule = host.uni_pc.NoiseScheduleVP("discrete", alphas_cumprod=model.inner_model.inner_model.alphas_cumprod)
    opts = shared.opts
    solver = Predictor(model, extra_args, callback, schedule, predict_x0=True, variant=opts.uni_pc_variant)
    return solver.sample(
        x,
        steps=len(timesteps),
        t_start=timesteps[-1] / 1000 + 1 / 1000 if is_img2img else None,
        skip_type=opts.uni_pc_skip_type,
        method="multistep",
        order=opts.uni_pc_order,
        lower_order_final=opts.uni_pc_lower_order_final,
    )
