"""What only the hosts of Forge's kind do in their way: Forge, Forge Neo and ersatzForge.

There a model is a set of patchers (`forge_objects`), of which every sampling has a copy of its own. What a phase puts in the
place of the model's prediction hangs on a clone of that copy's UNet patcher, and is gone with it. The host asks it for
all rows of a step in one call or in several, those of the negative prompt first; x is z + sigma * n for every sampler, and
what is answered is denoised. Samplers whose sigma is a timestep get their own x and noise from the host's denoiser.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from backend import memory_management
from backend.modules.k_prediction import rescale_zero_terminal_snr_sigmas
from backend.patcher.unet import UnetPatcher
from modules import extra_networks, scripts, sd_models, sd_samplers_common, shared
from modules_forge.utils import apply_circular_forge
from torch import Tensor, nn

from lib_demofusion.hosts.webui import patched_controls, units
from lib_demofusion.hosts.webui.patched_controls import Controls
from lib_demofusion.hosts.webui.sampling import FACTOR, for_views, set_up_prompts, size_ids
from lib_demofusion.memory import ViewBatch
from lib_demofusion.phases import Phase
from lib_demofusion.views import Size, View

autocast = without_autocast = nullcontext  # its models cast by themselves
BASE_ALWAYS_GUIDED = DECODES_PREVIEWS = False  # the latter not even where its settings ask for full ones
EMBEDDED = 256  # numbers that the host makes of one of SDXL's sizes


def unsupported() -> str | None:
    """Why this host cannot run the extension, and what to do, in one line; None if it can."""
    needed = [(scripts.Script, "post_sample"), (scripts.Script, "process_before_every_sampling")]
    needed += [(UnetPatcher, "add_conditioning_modifier"), (UnetPatcher, "set_model_unet_function_wrapper")]
    needed += [(sd_models, "forge_model_reload"), (memory_management, "load_models_gpu")]
    missing = [f"{thing.__name__}.{name}" for thing, name in needed if not hasattr(thing, name)]
    return f"it has no {', '.join(missing)}; update this extension, or the WebUI" if missing else None


def check_model(p: Any) -> None:
    """Raises ValueError, one line, for a checkpoint that p cannot be enlarged with."""
    predictor = shared.sd_model.forge_objects.unet.model.predictor
    if not hasattr(unet(shared.sd_model), "input_blocks") or predictor.prediction_type == "const":
        works = "a Stable Diffusion 1.x, 2.x or XL checkpoint works"
        raise ValueError(f"this checkpoint has no UNet of Stable Diffusion, or was trained for rectified flow; {works}")
    if p.tiling in ("X", "Y"):
        raise ValueError(f"the image is to tile along {p.tiling} alone; choose XY, or None")
    if units.refines(p) and hasattr(sd_samplers_common, "ORIGINAL_CHECKPOINT"):
        raise ValueError("this host's refiner does not go back to the first checkpoint within a picture; untick it")


check_controls = patched_controls.check  # of ControlNet, when every script has had its turn


def loaded_model() -> Any:
    """The loaded checkpoint's; None while none is."""
    model = sd_models.model_data.sd_model
    return model if getattr(model, "forge_objects", None) is not None else None


def latent_channels() -> int:
    return shared.sd_model.forge_objects.vae.latent_channels


def unet(model: Any) -> nn.Module:
    return model.forge_objects.unet.model.diffusion_model


def coder(model: Any, kind: str) -> nn.Module | None:
    """The network that would encode or decode ("encode", "decode") at once; None where the host tiles, or another codes."""
    vae = model.forge_objects.vae
    if memory_management.VAE_ALWAYS_TILED or vae.patcher.model_options.get(f"model_vae_{kind}_wrapper") is not None:
        return None
    return getattr(vae.first_stage_model, f"{kind}r", None)


def coding(model: Any, kind: str, whole: Callable, x: Tensor, base: Size) -> tuple[Callable[[Tensor], Any], Tensor]:
    """As in `a1111`, but not by the host's own method, `whole`, which asks memory for all of x: here it is the base's."""
    vae = model.forge_objects.vae
    network, (h, w) = vae.first_stage_model, base
    if kind == "decode":
        needed = vae.memory_used_decode((1, vae.latent_channels, h, w), vae.vae_dtype)
        function, made = (lambda z: network.decode(z).float().clamp(-1, 1)), network.process_out(x)
    else:
        needed = vae.memory_used_encode((1, 3, h * FACTOR, w * FACTOR), vae.vae_dtype)
        function, made = (lambda image: network.process_in(network.encode(image).to(x))), x
    memory_management.load_models_gpu([vae.patcher], memory_required=needed)
    return function, made.to(vae.device, vae.vae_dtype)


def check_finite(latents: Tensor) -> None:
    """Raises ValueError, one line, for latents, or an image, that are not finite everywhere."""
    if not torch.isfinite(latents).all():
        raise ValueError("the model or its autoencoder gave NaN; start the host with its options for single precision")


@functools.cache
def _tiling_works() -> bool:
    """Whether the host makes convolutions wrap around; some of the family have the setting alone."""
    layer = nn.Conv2d(1, 1, 3, padding=1)
    unet = SimpleNamespace(model=SimpleNamespace(diffusion_model=layer))
    objects = SimpleNamespace(unet=unet, vae=SimpleNamespace(first_stage_model=layer))
    model = SimpleNamespace(tiling_enabled=False, forge_objects=objects, is_webui_legacy_model=lambda: True)
    apply_circular_forge(model, True)
    return layer.padding_mode == "circular"


def _by_name() -> bool:
    """Whether the host calls how an image tiles "XY" or "None"."""
    return isinstance([*inspect.signature(apply_circular_forge).parameters.values()][-1].default, str)


def tiles(p: Any) -> bool:
    """Whether the image is to tile, and can."""
    return p.tiling == "XY" if _by_name() else bool(p.tiling) and _tiling_works()


@contextmanager
def untiled(p: Any) -> Iterator[None]:
    """The model's convolutions do not wrap around: a window must not be made to tile with itself (`step.PhaseHooks.fused`)."""
    wrap_around(False)
    try:
        yield
    finally:
        apply_circular_forge(shared.sd_model, p.tiling)


def wrap_around(enable: bool) -> None:
    """Whether the loaded model's convolutions wrap around."""
    apply_circular_forge(shared.sd_model, ("XY" if enable else "None") if _by_name() else enable)


def layers_that_wrap() -> None:
    """The host goes by the model."""


def load_checkpoint(p: Any, info: Any, again: bool = False) -> None:
    """Load a checkpoint (the host's CheckpointInfo) in place of the loaded one. again: even if it seems to be loaded.

    The host's own choice stays what it is, so that its next job begins with that.
    """
    data = sd_models.model_data
    chosen = data.forge_loading_parameters
    if again:
        data.forge_hash = ""
    try:
        data.forge_loading_parameters = {**chosen, "checkpoint_info": info}
        sd_models.forge_model_reload()
    finally:
        data.forge_loading_parameters = chosen


def load_again(p: Any, info: Any, known: Any) -> None:
    """The checkpoint that was loaded before."""
    load_checkpoint(p, info)
    apply_circular_forge(shared.sd_model, p.tiling)


def native_side() -> float:
    """The side of the square images that the loaded checkpoint was made for, latent pixels."""
    model = shared.sd_model
    if getattr(model, "is_sdxl", False):
        return 1024 / FACTOR
    if getattr(model, "is_sd2", False) and model.forge_objects.unet.model.predictor.prediction_type == "v_prediction":
        return 768 / FACTOR
    return getattr(model, "image_size", 512 / FACTOR)


def sees_picture(sampler: Any) -> bool:
    """Whether the checkpoint gets a given picture as a condition: it inpaints."""
    return bool(shared.sd_model.is_inpaint)


def log_alphas() -> np.ndarray:
    """The logarithms of the model's alphas_cumprod, by timestep, in double precision."""
    return -np.log1p(shared.sd_model.forge_objects.unet.model.predictor.sigmas.double().cpu().numpy() ** 2)


def activate(p: Any, networks: Any) -> None:
    """Make a prompt's extra networks (the host's, by kind) the active ones, and no others."""
    if p.disable_extra_networks:
        return
    prompts, model = p.all_prompts, shared.sd_model
    model.forge_objects = model.forge_objects_original.shallow_copy()
    extra_networks.activate(p, networks)
    model.forge_objects = model.forge_objects_after_applying_lora.shallow_copy()
    p.all_prompts = prompts  # to which the host adds the network of its settings each time


def set_up_model(p: Any, phase: Phase, checkpoint: Any = None) -> bool:
    """The phases' model again if the refiner has taken its place, and prompts on the phase's own steps. As in `a1111`."""
    refined = p.refiner_checkpoint_info is not None
    if refined:
        load_checkpoint(p, checkpoint or sd_models.model_data.forge_loading_parameters["checkpoint_info"])
        wrap_around(False)
        activate(p, p.extra_network_data)
    return set_up_prompts(p, phase, refined)


@contextmanager
def levels_of(p: Any) -> Iterator[None]:
    """While it lasts the model's noise levels are those that the host samples p with: it changes them around the base alone."""
    model = shared.sd_model
    predictor = model.forge_objects.unet.model.predictor
    before = predictor.sigmas
    if shared.opts.sd_noise_schedule == "Zero Terminal SNR" or getattr(model.model_config, "ztsnr", False):
        predictor.set_sigmas(rescale_zero_terminal_snr_sigmas(before))
    try:
        yield
    finally:
        if predictor.sigmas is not before:
            predictor.set_sigmas(before)


@contextmanager
def sampling(
    p: Any, prediction: Prediction, reference: Tensor, noise: Tensor, unguided: Tensor | None, pictures: Sequence[Any]
) -> Iterator[None]:
    """While it lasts a phase can be sampled, on a copy of the host's objects. As in `a1111`."""
    model, objects = shared.sd_model, shared.sd_model.forge_objects
    model.forge_objects = model.forge_objects_after_applying_lora.shallow_copy()
    sd_models.apply_token_merging(model, p.get_token_merging_ratio())
    prediction.unguided = unguided
    try:
        with patched_controls.at_size(p, prediction.phase, prediction.window, pictures) as prediction.coarse:
            if p.scripts is not None:
                p.scripts.process_before_every_sampling(p=p, x=reference, noise=noise, c=p.c, uc=p.uc)
        prediction.install()
        yield
    finally:
        if shared.sd_model.forge_objects.unet is prediction.installed:  # a refiner's
            shared.sd_model.forge_objects.unet = prediction.before
        model.forge_objects = objects


class Prediction:
    """As in `a1111`, but that the host has a ControlNet of its own (`patched_controls`), and `around` is another's."""

    timesteps = False  # whatever the sampler is
    unguided: Tensor | None = None
    coarse: Sequence[Tensor] = ()

    def __init__(self, phase: Phase, fused: Callable, around: Any, timesteps: bool, window: Size, view_batch: ViewBatch):
        self.phase = phase
        self.fused = fused
        self.window = window
        self.view_batch = view_batch
        self.installed = self.before = None  # a patcher, and the one in whose place it is
        self.controls: Controls | None = None
        self.row = 0

    def __deepcopy__(self, memo: dict) -> Prediction:
        """Who clones the patcher has the same phase's on it."""
        return self

    def install(self) -> None:
        """On a clone of the loaded model's patcher, with what other extensions have put on it."""
        before = shared.sd_model.forge_objects.unet
        if before is self.installed:
            return
        self.before, self.installed = before, (ours := before.clone())
        options = ours.model_options
        ours.add_conditioning_modifier(self._take_controls)
        ours.set_model_unet_function_wrapper(functools.partial(self.forward, options.get("model_function_wrapper")))
        options["sampler_post_cfg_function"] = [self._unguide, *options.get("sampler_post_cfg_function", [])]
        h, w = self.window

        def memory_required(shape: Sequence[int]) -> float:
            """Of a call: the host counts the whole latent."""
            return before.memory_required([shape[0] * self.view_batch.size, shape[1], h, w])

        ours.memory_required = options["memory_peak_estimation_modifier"] = memory_required
        shared.sd_model.forge_objects.unet = ours
        self.controls = Controls(before.controlnet_linked_list, self.phase, self.window, self.coarse)

    def on_step(self, params: Any) -> None:
        """The host is about to ask its model; a refiner's has nothing on it yet."""
        self.install()
        self.row = 0

    @staticmethod
    def _take_controls(model, x, timestep, uncond, cond, *rest):
        """The host would ask its control models for the whole latent."""
        for part in (*cond, *(uncond or ())):
            part.pop("control", None)
        return model, x, timestep, uncond, cond, *rest

    def _unguide(self, args: dict) -> Tensor:
        if self.unguided is None or args["uncond"] is None:
            return args["denoised"]
        weight = sum(part.get("strength", 1) for part in args["cond"])
        plain = torch.lerp(args["uncond_denoised"], args["cond_denoised"], float(weight))
        return torch.lerp(args["denoised"], plain, self.unguided.to(plain))

    def forward(self, theirs: Callable | None, apply_model: Callable, args: dict) -> Tensor:
        """In place of the model; `cond_or_uncond` says what each block of rows is. theirs: another extension's wrapper."""
        sigma, kinds, first = args["timestep"], list(args["cond_or_uncond"]), self.row == 0
        self.row += 1

        def call(crops: Tensor, views: Sequence[View], roll: Sequence[int]) -> Tensor:
            sigmas, c = sigma.repeat(len(views)), self._cond_for(args["c"], views, roll, kinds)
            self.controls.show(crops, sigmas, c, views, roll, len(kinds))
            if theirs is None:
                return apply_model(crops, sigmas, **c)
            return theirs(apply_model, {"input": crops, "timestep": sigmas, "c": c, "cond_or_uncond": kinds * len(views)})

        return self.fused(args["input"], sigma, call, first)

    def _cond_for(self, cond: dict, views: Sequence[View], roll: Sequence[int], kinds: list) -> dict:
        """The host's conditions of some rows [rows, ...], once for each view; what has the image's size is cropped."""

        def each(value: Any) -> Any:
            return for_views(value, views, roll, self.phase.size) if isinstance(value, Tensor) else value

        made = {key: each(value) for key, value in cond.items()}
        options, blocks = dict(cond["transformer_options"]), kinds * len(views)
        marks = options["cond_mark"].repeat(len(views))
        rows = [blocks[row * len(blocks) // len(marks)] for row in range(len(marks))]
        of = {kind: [row for row, own in enumerate(rows) if own == kind] for kind in (0, 1)}
        options |= dict(cond_mark=marks, cond_indices=of[0], uncond_indices=of[1], cond_or_uncond=blocks)
        made["transformer_options"] = options
        if "y" in made:
            self._set_size_ids(made["y"], views)
        return made

    def _set_size_ids(self, vector: Tensor, views: Sequence[View]) -> None:
        """SDXL, in place: `vector` [views * rows, .] ends in embeddings of original size, crop and target size.

        A refiner's has an aesthetic score in the place of the last.
        """
        scored = vector.shape[1] % (5 * EMBEDDED) == 0  # pooled text is 1280 wide
        ids = torch.tensor([sizes[: 3 - scored] for sizes in size_ids(self.phase.size, views)], dtype=torch.float32)
        made = shared.sd_model.embedder(ids.flatten()).view(len(views), -1).to(vector)
        start = vector.shape[1] - (5 if scored else 6) * EMBEDDED
        vector[:, start : start + made.shape[1]] = made.repeat_interleave(len(vector) // len(views), 0)
