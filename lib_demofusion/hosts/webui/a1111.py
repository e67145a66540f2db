"""What only the AUTOMATIC1111 WebUI does in this way: its samplers' ways in, its model's calls, its refiner."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from modules import devices, extra_networks, sd_models, sd_samplers, sd_samplers_common, shared
from modules.sd_hijack import model_hijack
from torch import Tensor

from lib_demofusion.fusion import crops_of
from lib_demofusion.hosts.webui.samplers import SAMPLERS
from lib_demofusion.phases import Phase
from lib_demofusion.views import View

FACTOR = 8  # image pixels per latent pixel, as the host has it


def unsupported() -> str | None:
    """Why this host cannot run the extension, and what to do, in one line; None if it can."""
    for package, host in (("modules_forge", "Forge"), ("modules.processing_diffusers", "SD.Next")):
        if importlib.util.find_spec(package) is not None:
            return f"{host} calls its UNet in a way of its own; version 1.10 of AUTOMATIC1111's WebUI works"
    from modules import scripts, sd_samplers_cfg_denoiser

    needed = {
        "Script.post_sample": hasattr(scripts.Script, "post_sample"),
        "Script.process_before_every_sampling": hasattr(scripts.Script, "process_before_every_sampling"),
        "CFGDenoiser.inner_model": hasattr(sd_samplers_cfg_denoiser.CFGDenoiser, "inner_model"),
        "CFGDenoiser.combine_denoised": hasattr(sd_samplers_cfg_denoiser.CFGDenoiser, "combine_denoised"),
    }
    missing = [name for name, there in needed.items() if not there]
    return f"it has no {', '.join(missing)}; update the WebUI to version 1.10, which has" if missing else None


def check_model() -> None:
    """Raises ValueError, one line, for a checkpoint that cannot be enlarged with."""
    if getattr(shared.sd_model, "is_sd3", False):
        raise ValueError("Stable Diffusion 3 has no UNet; a Stable Diffusion 1.x, 2.x or XL checkpoint works")
    if getattr(shared.sd_model, "cond_stage_key", None) == "edit":
        raise ValueError("an instruct-pix2pix checkpoint edits a given image; a text-to-image checkpoint works")


def latent_channels() -> int:
    return getattr(shared.sd_model, "latent_channels", 4)


def autocast() -> Any:
    """How the host samples."""
    return devices.without_autocast() if devices.unet_needs_upcast else devices.autocast()


@contextmanager
def untiled(p: Any) -> Iterator[None]:
    """The model's convolutions do not wrap around: a window must not be made to tile with itself (`step.PhaseHooks.fused`)."""
    model_hijack.apply_circular(False)
    try:
        yield
    finally:
        model_hijack.apply_circular(p.tiling)


def wrap_around(enable: bool) -> None:
    """Whether the loaded model's convolutions wrap around; the host goes by the layers of the model that it has built last."""
    model_hijack.layers = list(shared.sd_model.modules())
    model_hijack.circular_enabled = not enable
    model_hijack.apply_circular(enable)


def native_side() -> float:
    """The side of the square images that the loaded checkpoint was made for, latent pixels."""
    model = shared.sd_model
    if getattr(model, "is_sdxl", False):
        return 1024 / FACTOR
    if getattr(model, "is_sd2", False) and model.parameterization == "v":  # whose configuration says 512
        return 768 / FACTOR
    return getattr(model, "image_size", 512 / FACTOR)


def base_steps(p: Any) -> tuple[int, int]:
    """The steps of the base's schedule, and how many of the first ones are not run, as img2img's denoising strength has it."""
    steps, encoded = sd_samplers_common.setup_img2img_steps(p)
    run = encoded if SAMPLERS[p.sampler_name].timesteps else encoded + 1
    return steps, steps - run


def sees_picture(sampler: Any) -> bool:
    """Whether the checkpoint gets a given picture as a condition: it inpaints, say, or goes by depth."""
    if sampler.conditioning_key in ("hybrid", "concat", "crossattn-adm"):
        return True
    return bool(getattr(sampler.model_wrap.inner_model, "is_sdxl_inpaint", False))


def log_alphas() -> np.ndarray:
    """The logarithms of the model's alphas_cumprod, by timestep, in double precision."""
    return shared.sd_model.alphas_cumprod.double().cpu().log().numpy()


def activate(p: Any, networks: Any) -> None:
    """Make a prompt's extra networks (the host's, by kind) the active ones, and no others."""
    if p.disable_extra_networks:
        return
    prompts, told = p.all_prompts, len(model_hijack.comments)
    with devices.autocast():
        extra_networks.activate(p, networks)
    p.all_prompts = prompts  # to which the host adds the network of its settings each time
    for comment in model_hijack.comments[told:]:
        p.comment(comment)


def set_up_model(p: Any, phase: Phase, checkpoint: Any = None) -> bool:
    """The phases' model again if the refiner has taken its place, and prompts on the phase's own steps.

    checkpoint: the phases' own (the host's CheckpointInfo), which is loaded already. Returns whether p's conditions have been
    set up anew, as they are where p has none.
    """
    refined = p.refiner_checkpoint_info is not None
    if refined:
        with sd_models.SkipWritingToConfig() if checkpoint else nullcontext():
            sd_models.reload_model_weights(info=checkpoint)
        sd_models.apply_alpha_schedule_override(p.sd_model, p)
        activate(p, p.extra_network_data)
    anew = refined or p.c is None or p.steps != phase.steps
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


@contextmanager
def unguided(denoiser: Any, areas: Tensor | None) -> Iterator[None]:
    """The denoiser combines prompts and negative prompt as at CFG scale 1 in these areas, [B or 1, 1, H, W] in 0..1."""
    if areas is None:
        yield
        return
    combine = denoiser.combine_denoised

    def combined(x_out: Tensor, conds_list: Any, uncond: Any, cond_scale: float) -> Tensor:
        guided, plain = (combine(x_out, conds_list, uncond, scale) for scale in (cond_scale, 1.0))
        return torch.lerp(guided, plain, areas.to(guided))

    denoiser.combine_denoised = combined
    try:
        yield
    finally:
        del denoiser.combine_denoised


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


class Prediction:
    """What one phase puts in place of the model's own prediction, and how it calls the model for single views.

    fused: (x, sigma, call, first) -> what the inner model's forward is to answer for x [rows, C, H, W] at sigma [rows];
    first: these are the first rows of a step. Its `call` takes crops [len(views) * rows, C, h, w], their views and by how
    much the plane is rolled, (rows, columns), and asks the model. around: (ask, crops, views, roll) -> the answer of
    ask(crops, views), where something is to be shown to others meanwhile (`controlnet.Hints`).
    """

    def __init__(
        self,
        phase: Phase,
        fused: Callable[[Tensor, Tensor, Callable, bool], Tensor],
        around: Callable[[Callable, Tensor, Sequence[View], Sequence[int]], Tensor] | None = None,
    ):
        self.phase = phase
        self.fused = fused
        self.around = around

    def on_step(self, params: Any) -> None:
        """The host is about to ask its inner model, in one call or in several, rows of the prompt first."""
        denoiser = params.denoiser
        inner = denoiser.inner_model
        if not hasattr(inner.forward, "demofusion"):
            forward = functools.partial(self.forward, inner.forward)
            forward.demofusion = True
            inner.forward = forward
        self.conds = params.text_cond.shape[0]
        self.unguided = _is_unguided(denoiser)
        self.row = 0
        self.answers: list[Tensor] = []

    def forward(self, original: Callable, x: Tensor, sigma: Tensor, cond: dict, **kwargs: Any) -> Tensor:
        """In place of the inner model's forward. x: [rows, C, H, W], the images once for each prompt.

        At CFG 1 guidance cancels out: the negative prompt's rows, which come last, get the prompt's answer.
        """
        first, self.row = self.row, self.row + len(x)
        own = min(max(self.conds - first, 0), len(x)) if self.unguided else len(x)
        parts = []
        if own:
            cond, sigma = {key: _rows(value, own) for key, value in cond.items()}, sigma[:own]

            def call(crops: Tensor, views: Sequence[View], roll: Sequence[int]) -> Tensor:
                def ask(crops: Tensor, views: Sequence[View]) -> Tensor:
                    with autocast():
                        return original(crops, sigma.repeat(len(views)), cond=self._cond_for(cond, views, roll), **kwargs)

                return ask(crops, views) if self.around is None else self.around(ask, crops, views, roll)

            parts.append(self.fused(x[:own], sigma, call, first == 0))
            self.answers += parts
        if own < len(x):
            start = first + own - self.conds
            parts.append(torch.cat(self.answers)[start : start + len(x) - own])
        return torch.cat(parts)

    def _cond_for(self, cond: dict, views: Sequence[View], roll: Sequence[int]) -> dict:
        """The host's conditions of some rows [rows, ...], once for each view; what has the image's size is cropped."""

        def each(value: Any) -> Any:
            if isinstance(value, list):
                return [each(item) for item in value]
            if value.ndim == 4 and value.shape[-2:] == self.phase.size:
                return crops_of(rolled(value, roll), views)
            return value.repeat(len(views), *[1] * (value.ndim - 1))

        made = {key: each(value) for key, value in cond.items()}
        if "vector" in made:
            self._set_size_ids(made["vector"], views)
        return made

    def _set_size_ids(self, vector: Tensor, views: Sequence[View]) -> None:
        """SDXL, in place: `vector` [views * rows, .] ends in embeddings of original size, crop and target size.

        Sizes are the phase's; the crop is where the window lies, from the corner set in the host's settings.
        """
        h, w = (side * FACTOR for side in self.phase.size)
        crops = [view.crop_pixels(FACTOR) for view in views]
        top, left = shared.opts.sdxl_crop_top, shared.opts.sdxl_crop_left
        ids = {
            "original_size_as_tuple": [(h, w)] * len(views),
            "crop_coords_top_left": [(top + y, left + x) for y, x in crops],
            "target_size_as_tuple": [(h, w)] * len(views),
        }
        end = vector.shape[1]
        for embedder in reversed(shared.sd_model.conditioner.embedders):
            if not hasattr(embedder, "outdim"):  # from here on pooled text
                break
            values = ids.get(embedder.input_key)
            start = end - embedder.outdim * (2 if values else 1)  # the refiner's aesthetic score is a single number
            if values:
                numbers = torch.tensor(values, device=vector.device, dtype=torch.float32)
                vector[:, start:end] = embedder(numbers).to(vector.dtype).repeat_interleave(len(vector) // len(views), 0)
            end = start


def rolled(x: Tensor, shifts: Sequence[int]) -> Tensor:
    return torch.roll(x, tuple(shifts), (-2, -1)) if any(shifts) else x


def _rows(value: Any, rows: int) -> Any:
    return [item[:rows] for item in value] if isinstance(value, list) else value[:rows]


def _is_unguided(denoiser: Any) -> bool:
    """Whether the negative prompt has no weight: CFG 1, and one prompt of weight 1 for every image."""
    given = denoiser.sampler.sampler_extra_args
    prompts = given["cond"].batch
    return given["cond_scale"] * denoiser.cond_scale_miltiplier == 1 and all(
        len(parts) == 1 and parts[0].weight == 1 for parts in prompts
    )
