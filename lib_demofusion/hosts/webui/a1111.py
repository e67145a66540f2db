"""What only the AUTOMATIC1111 WebUI does in this way: its samplers' ways in, its model's calls, its refiner."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from modules import devices, extra_networks, sd_models, shared
from modules.sd_hijack import model_hijack
from torch import Tensor, nn

from lib_demofusion.hosts.webui import units
from lib_demofusion.hosts.webui.sampling import FACTOR, for_views, set_up_prompts, size_ids
from lib_demofusion.memory import ViewBatch
from lib_demofusion.phases import Phase
from lib_demofusion.views import Size, View


def unsupported() -> str | None:
    """Why this host cannot run the extension, and what to do, in one line; None if it can."""
    for package, host in (("modules_forge", "this Forge"), ("modules.processing_diffusers", "SD.Next")):
        if importlib.util.find_spec(package) is not None:
            works = "version 1.10 of AUTOMATIC1111's WebUI works, and so do Forge, Forge Neo and ersatzForge"
            return f"{host} calls its UNet in a way of its own; {works}"
    from modules import scripts, sd_samplers_cfg_denoiser

    needed = {
        "Script.post_sample": hasattr(scripts.Script, "post_sample"),
        "Script.process_before_every_sampling": hasattr(scripts.Script, "process_before_every_sampling"),
        "CFGDenoiser.inner_model": hasattr(sd_samplers_cfg_denoiser.CFGDenoiser, "inner_model"),
        "CFGDenoiser.combine_denoised": hasattr(sd_samplers_cfg_denoiser.CFGDenoiser, "combine_denoised"),
    }
    missing = [name for name, there in needed.items() if not there]
    return f"it has no {', '.join(missing)}; update the WebUI to version 1.10, which has" if missing else None


def check_model(p: Any) -> None:
    """Raises ValueError, one line, for a checkpoint that p cannot be enlarged with."""
    if getattr(shared.sd_model, "is_sd3", False):
        raise ValueError("Stable Diffusion 3 has no UNet; a Stable Diffusion 1.x, 2.x or XL checkpoint works")
    if getattr(shared.sd_model, "cond_stage_key", None) == "edit":
        raise ValueError("an instruct-pix2pix checkpoint edits a given image; a text-to-image checkpoint works")


BASE_ALWAYS_GUIDED = True  # both branches are asked for, whatever the CFG scale is
DECODES_PREVIEWS = True  # where its settings ask for full ones
check_controls = units.check_hooked  # of ControlNet, when every script has had its turn


def loaded_model() -> Any:
    """The loaded checkpoint's; None while none is, where shared.sd_model would load one."""
    return sd_models.model_data.sd_model


def latent_channels() -> int:
    return getattr(shared.sd_model, "latent_channels", 4)


def unet(model: Any) -> nn.Module:
    return model.model.diffusion_model


def coder(model: Any, kind: str) -> nn.Module | None:
    """The network that would encode or decode ("encode", "decode"); None where there is none."""
    return getattr(model.first_stage_model, f"{kind}r", None)


def coding(model: Any, kind: str, whole: Callable, x: Tensor, base: Size) -> tuple[Callable[[Tensor], Any], Tensor]:
    """What encodes or decodes x by that network, which can now be run in tiles, and x as it takes it.

    whole: the model's own method. base: (h, w), latent pixels, of what the model makes at once.
    """
    return whole, x


def autocast() -> Any:
    """How the host samples."""
    return devices.without_autocast() if devices.unet_needs_upcast else devices.autocast()


without_autocast = devices.without_autocast


def check_finite(latents: Tensor) -> None:
    """Raises the host's NansException for latents, or an image, not finite anywhere; the host sees the first pixel."""
    devices.test_for_nans((0 * latents).sum(), "unet")


def tiles(p: Any) -> bool:
    """Whether the image is to tile."""
    return bool(p.tiling)


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


def layers_that_wrap() -> Any:
    """The layers that the host knows of, for tiling; for `load_again`."""
    return model_hijack.layers


def load_checkpoint(p: Any, info: Any, again: bool = False) -> None:
    """Load a checkpoint (the host's CheckpointInfo) in place of the loaded one. again: even if it seems to be loaded."""
    if shared.sd_model is not None:  # what failed to load leaves none
        sd_models.apply_token_merging(shared.sd_model, 0)
    with sd_models.SkipWritingToConfig():
        sd_models.reload_model_weights(info=info, forced_reload=again)
    devices.torch_gc()
    sd_models.apply_alpha_schedule_override(shared.sd_model, p)
    sd_models.apply_token_merging(shared.sd_model, p.get_token_merging_ratio())


def load_again(p: Any, info: Any, known: Any) -> None:
    """The checkpoint that was loaded before, with the layers that the host knew of then."""
    model_hijack.apply_circular(False)
    layers = model_hijack.layers
    load_checkpoint(p, info)
    if model_hijack.layers is layers and known is not None:  # the host has put an older model in its place
        model_hijack.layers = known
    model_hijack.apply_circular(bool(p.tiling))


def native_side() -> float:
    """The side of the square images that the loaded checkpoint was made for, latent pixels."""
    model = shared.sd_model
    if getattr(model, "is_sdxl", False):
        return 1024 / FACTOR
    if getattr(model, "is_sd2", False) and model.parameterization == "v":  # whose configuration says 512
        return 768 / FACTOR
    return getattr(model, "image_size", 512 / FACTOR)


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
    return set_up_prompts(p, phase, refined)


def levels_of(p: Any) -> Any:
    """While it lasts the model's noise levels are those that the host samples p with."""
    return nullcontext()


@contextmanager
def sampling(
    p: Any, prediction: Prediction, reference: Tensor, noise: Tensor, unguided: Tensor | None, pictures: Sequence[Any]
) -> Iterator[None]:
    """While it lasts a phase can be sampled: other scripts have had their turn, and a prediction is in the model's place.

    reference, noise: [B, C, H, W], of the phase. unguided: areas without guidance, [B or 1, 1, H, W] in 0..1; None: nowhere.
    pictures: what the phases start from where no base is sampled; here `controlnet` has made all of them already.
    """
    if p.scripts is not None:
        p.scripts.process_before_every_sampling(p=p, x=reference, noise=noise, c=p.c, uc=p.uc)
    with autocast(), _unguided(p.sampler.model_wrap_cfg, unguided):
        yield


@contextmanager
def _unguided(denoiser: Any, areas: Tensor | None) -> Iterator[None]:
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


class Prediction:
    """What one phase puts in place of the model's own prediction, and how it calls the model for single views.

    fused: (x, sigma, call, first) -> what the inner model's forward is to answer for x [rows, C, H, W] at sigma [rows];
    first: these are the first rows of a step. Its `call` takes crops [len(views) * rows, C, h, w], their views and by how
    much the plane is rolled, (rows, columns), and asks the model. around: (ask, crops, views, roll) -> the answer of
    ask(crops, views), where something is to be shown to others meanwhile (`controlnet.Hints`). timesteps: whether the
    sampler's sigma is a timestep; then x is as `samplers.Sampler` says, and what is answered is noise, not the denoised x.
    window: (h, w) of a view. view_batch: how many of them go into a call.
    """

    def __init__(
        self,
        phase: Phase,
        fused: Callable[[Tensor, Tensor, Callable, bool], Tensor],
        around: Callable[[Callable, Tensor, Sequence[View], Sequence[int]], Tensor] | None,
        timesteps: bool,
        window: Size,
        view_batch: ViewBatch,
    ):
        self.phase = phase
        self.fused = fused
        self.around = around
        self.timesteps = timesteps

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
            return for_views(value, views, roll, self.phase.size)

        made = {key: each(value) for key, value in cond.items()}
        if "vector" in made:
            self._set_size_ids(made["vector"], views)
        return made

    def _set_size_ids(self, vector: Tensor, views: Sequence[View]) -> None:
        """SDXL, in place: `vector` [views * rows, .] ends in embeddings of original size, crop and target size."""
        names = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
        ids = dict(zip(names, zip(*size_ids(self.phase.size, views))))
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


def _rows(value: Any, rows: int) -> Any:
    return [item[:rows] for item in value] if isinstance(value, list) else value[:rows]


def _is_unguided(denoiser: Any) -> bool:
    """Whether the negative prompt has no weight: CFG 1, and one prompt of weight 1 for every image."""
    given = denoiser.sampler.sampler_extra_args
    prompts = given["cond"].batch
    return given["cond_scale"] * denoiser.cond_scale_miltiplier == 1 and all(
        len(parts) == 1 and parts[0].weight == 1 for parts in prompts
    )
