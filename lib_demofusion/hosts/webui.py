"""DemoFusion in the AUTOMATIC1111 WebUI; the only file that imports the host's `modules`.

Phase 1 is the host's own sampling. `post_sample` runs the phases after it. Each has a sampler of its own, made by the
host and gone with the phase, and on that sampler's denoiser hang

- a hook in front of it that gets the sampler's own x: the skip residual, Eq. 4 (`_PhaseHooks.before_step`);
- the fused prediction in place of its inner model's `forward`, put there from the host's `on_cfg_denoiser` callback at
  every step, because a refiner switch makes a new inner model (`_PhaseHooks.on_step`, `_PhaseHooks.forward`).

Nothing is put on the host's modules, classes or model; what a phase changes on `p` is put back when the phases end.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from modules import devices, errors, extra_networks, images, processing, rng, sd_models, sd_samplers, sd_samplers_common, shared
from modules.sd_hijack import model_hijack
from PIL import Image
from torch import Tensor

from lib_demofusion import decode as tiles
from lib_demofusion.config import INFOTEXT_PREFIX, PRESETS, DemoFusionConfig, first_line
from lib_demofusion.fusion import Cancelled, Fusion, pad_edges
from lib_demofusion.memory import OutOfMemory, ViewBatch, check_fits, is_out_of_memory, latents_bytes
from lib_demofusion.phases import Pace, Phase, Plan, clock_time, enlarge, fusion_for, make_plan, upscale
from lib_demofusion.saved import SavedPhase, read_saved
from lib_demofusion.views import Size, View, jitter_generator

FACTOR = 8  # image pixels per latent pixel, as the host has it
WIDTHS = (512, 128)  # channels of Stable Diffusion's decoder, at the latents' resolution and at the image's
PICTURES = 4  # how often the host has each finished picture in main memory, in single precision
NAME = "DemoFusion"  # the script's title, and so its name in the API

# ---------------------------------------------------------------------------------------------------------------------
# What the host has


@dataclass(frozen=True)
class Sampler:
    """What the method must know of one of the host's samplers.

    counts: how the model calls follow from the steps (`model_calls`). noise: whether it adds noise of its own: "never",
    "always", or if its "eta" or its "churn" is above 0. timesteps: its x is sqrt(alphas_cumprod) * z +
    sqrt(1 - alphas_cumprod) * n and its sigma a timestep, instead of z + sigma * n. levels: how many noise levels its
    model has. discards: the last level but one of its schedule is left out.
    """

    counts: str
    noise: str = "never"
    timesteps: bool = False
    levels: int = 1000
    discards: bool = False


SAMPLERS = {
    "DPM++ 2M": Sampler("first"),
    "DPM++ SDE": Sampler("second", "eta"),
    "DPM++ 2M SDE": Sampler("first", "eta"),
    "DPM++ 2M SDE Heun": Sampler("first", "eta"),
    "DPM++ 2S a": Sampler("second", "eta"),
    "DPM++ 3M SDE": Sampler("first", "eta", discards=True),
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
}


def unsupported() -> str | None:
    """Why this host cannot run the extension, in one line; None if it can."""
    for package, host in (("modules_forge", "Forge"), ("modules.processing_diffusers", "SD.Next")):
        if importlib.util.find_spec(package) is not None:
            return f"{host} calls its UNet in a way of its own"
    from modules import scripts, sd_samplers_cfg_denoiser

    needed = {
        "Script.post_sample": hasattr(scripts.Script, "post_sample"),
        "Script.process_before_every_sampling": hasattr(scripts.Script, "process_before_every_sampling"),
        "CFGDenoiser.inner_model": hasattr(sd_samplers_cfg_denoiser.CFGDenoiser, "inner_model"),
    }
    missing = [name for name, there in needed.items() if not there]
    return f"it has no {', '.join(missing)}; version 1.10 of the WebUI has" if missing else None


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
    if counts == "second":  # the last step, to sigma 0, needs one; KL Optimal ends above 0
        return 2 * run - (scheduler != "KL Optimal")
    return run


def readout_table() -> dict[str, Any]:
    """What the readout in the browser computes with: how each sampler's model calls count, as in `model_calls`, and memory.

    Bytes a latent pixel: of sampling's latents, and of decoding with Stable Diffusion's autoencoder.
    """
    itemsize = devices.dtype_vae.itemsize
    return {
        "samplers": {name: [known.counts, known.levels, int(known.discards)] for name, known in SAMPLERS.items()},
        "latents": latents_bytes((1, 1)),
        "whole": tiles.LIVE * WIDTHS[1] * FACTOR**2 * itemsize,
        "features": int(tiles.LIVE_FEATURES * WIDTHS[0] * itemsize),
        "kept": WIDTHS[0] * itemsize,
        "tile": tiles.SMALLEST_TILE,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Settings: from the script's arguments, and refused in one line

# The script's arguments, in the order that the API documents; those from "scale" on are optional there.
ARGUMENTS = (
    "enabled",
    "scale",
    "phase_steps",
    "denoising_strength",
    "doubling",
    "pixel_upsampling",
    "stride",
    "feather",
    "hold_flat",
    "jitter",
    "alpha1",
    "alpha2",
    "alpha3",
    "blur_sigma",
    "view_batch_size",
    "save_phases",
    "resume",
)
CONFIG_FIELDS = {f.name: f for f in fields(DemoFusionConfig)}
PRESET_SETTINGS = [name for name in ARGUMENTS if name in CONFIG_FIELDS and name not in ("scale", "view_batch_size")]
PRESET = "Fast"  # what the form shows at first; the API has the form's values for what is left out


@dataclass(frozen=True)
class Settings:
    """What the form says. save_phases: write the phases before the last beside the outputs. resume: a file so written."""

    config: DemoFusionConfig
    save_phases: bool = False
    resume: Path | None = None


def read_settings(args: Sequence[Any]) -> Settings | None:
    """The script's arguments as settings; None if DemoFusion is off. Raises ValueError, one line, for a wrong value."""
    values = dict(zip(ARGUMENTS, args))
    for name in ("enabled", "save_phases"):
        if not isinstance(values.setdefault(name, False), bool):
            raise ValueError(f"{name.replace('_', ' ')} must be true or false, got {values[name]!r}")
    enabled, save_phases, resume = values.pop("enabled"), values.pop("save_phases"), values.pop("resume", "")
    if not enabled:
        return None
    if not isinstance(resume, str):
        raise ValueError(f"resume must be the path of a file, got {resume!r}")
    for name, value in values.items():  # a slider's 20.0 is the whole number 20
        if type(CONFIG_FIELDS[name].default) is int and isinstance(value, float) and value.is_integer():
            values[name] = int(value)
    path = resume.strip().strip('"')  # as file managers copy a path
    return Settings(DemoFusionConfig.preset(PRESET, **values), save_phases, Path(path) if path else None)


def presets_table() -> dict[str, list]:
    """What the form's controls for PRESET_SETTINGS show under each preset."""
    configs = {name: DemoFusionConfig.preset(name) for name in PRESETS}
    return {name: [getattr(config, setting) for setting in PRESET_SETTINGS] for name, config in configs.items()}


def plan_for(p: Any, config: DemoFusionConfig) -> Plan:
    """The plan of one image of the host's processing p. Raises ValueError, one line, if it cannot work."""

    def calls(steps: int, skipped: int) -> int:
        known = model_calls(p.sampler_name, p.scheduler, steps, skipped)
        if known is not None and known < 1:
            raise ValueError(f"{p.sampler_name} makes no prediction in {steps - skipped} step; it needs at least 2")
        return steps - skipped if known is None else known

    return make_plan((p.height // FACTOR, p.width // FACTOR), p.steps, config, calls=calls)


def prepare(p: Any, args: Sequence[Any]) -> None:
    """Before anything is sampled: note the settings for the infotext, or refuse, saying why."""
    try:
        settings = read_settings(args)
        if settings is None:
            return
        if getattr(p, "enable_hr", False):
            p.comment(f"{NAME} did not run: Hires. fix is ticked, and only one of the two can enlarge the image.")
            return
        _check(p)
        plan = plan_for(p, settings.config)
        last = plan.phases[-1]
        check_fits(last.size, last.scale, devices.device, _latent_channels(), p.batch_size, FACTOR, PICTURES)
        if settings.resume:
            _check_resume(p, _read_saved(settings.resume), plan)
    except ValueError as error:
        _refuse(p, str(error))
    else:
        _describe(p, settings.config, plan.phases[-1])
        _warn_of_small_jpegs(p, plan.phases[-1])


def _latent_channels() -> int:
    return getattr(shared.sd_model, "latent_channels", 4)


def _check(p: Any) -> None:
    """Raises ValueError, one line, if DemoFusion cannot run on p."""
    if p.sampler_name not in SAMPLERS:
        raise ValueError(f"the sampler {p.sampler_name} is not one that it knows; Euler works")
    if getattr(shared.sd_model, "is_sd3", False):
        raise ValueError("Stable Diffusion 3 has no UNet; a Stable Diffusion 1.x, 2.x or XL checkpoint works")
    if getattr(shared.sd_model, "cond_stage_key", None) == "edit":
        raise ValueError("an instruct-pix2pix checkpoint edits a given image; a text-to-image checkpoint works")
    if _controlnet_is_on(p):
        raise ValueError("ControlNet steers the whole image and cannot follow single windows; untick one of the two")


def _read_saved(path: Path) -> SavedPhase:
    return read_saved(path, "WebUI")


def _warn_of_small_jpegs(p: Any, last: Phase) -> None:
    """The host's reduced copy of a large image is a JPEG of the same name: where that is what it saves, only the copy stays."""
    opts = shared.opts
    large = max(last.size) * FACTOR > opts.target_side_length
    if large and opts.export_for_4chan and opts.samples_format.lower() in ("jpg", "jpeg") and p.save_samples():
        p.comment(
            f"{NAME}: of JPEGs with more than {opts.target_side_length} pixels a side the host keeps only a reduced copy; in "
            "Settings > Saving images choose png, or switch that copy off."
        )


def _check_resume(p: Any, saved: SavedPhase, plan: Plan) -> None:
    if p.batch_size * p.n_iter != 1:
        raise ValueError("a saved phase belongs to one image; set batch size and batch count to 1")
    if saved.number >= len(plan.phases):
        raise ValueError(f"phase {saved.number} is saved, and this scale has none after it; choose a larger one")
    if saved.latents.shape[-2:] != plan.phases[saved.number - 1].size or saved.base.shape[-2:] != plan.window:
        raise ValueError("the saved phase is of other sizes than these settings make; take those in its image's PNG Info")


def _controlnet_is_on(p: Any) -> bool:
    for script in p.scripts.alwayson_scripts if p.scripts else []:
        if script.name == "controlnet":
            for unit in p.script_args[script.args_from : script.args_to]:
                on = unit.get("enabled", True) if isinstance(unit, dict) else getattr(unit, "enabled", False)
                if on:
                    return True
    return False


def _refuse(p: Any, line: str) -> None:
    """No image is made; the line reaches the form's comments and, through the infotext, the API's reply."""
    p.comment(f"{NAME}: {line}")
    p.extra_generation_params[f"{INFOTEXT_PREFIX} refused"] = line
    p.n_iter = 0
    p.do_not_save_grid = True


def _describe(p: Any, config: DemoFusionConfig, reached: Phase) -> None:
    """Put the settings into the infotext of what is saved from now on, with the scale reached; none of them for the base."""
    for key in [key for key in p.extra_generation_params if key.startswith(f"{INFOTEXT_PREFIX} ")]:
        del p.extra_generation_params[key]
    if reached.number > 1:
        p.extra_generation_params.update(replace(config, scale=reached.scale).to_infotext())


# ---------------------------------------------------------------------------------------------------------------------
# Progress


class _Progress:
    """The host's one bar, over the phases of one batch and all batches, weighted by the views that the model sees.

    The host shows (job_no + sampling_step / sampling_steps) / job_count and moves the two latter itself, sampler by
    sampler; job_no is set so that the sum is the share that is done.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self.pace = Pace(plan)
        self.batch = math.ceil(shared.state.job_no)  # which of state.job_count this is
        self.ends: dict[int, int] = {}  # phase number -> what is done when it ends
        total = 0
        for phase in plan.phases:
            total += phase.steps if phase.number == 1 else phase.evaluations
            self.ends[phase.number] = total
        self.total = total

    def show(self, done: float) -> None:
        state = shared.state
        own = state.sampling_step / state.sampling_steps if state.sampling_steps else 0
        state.job_no = self.batch + min(done / self.total, 1) - own

    def pause(self, number: int) -> None:
        """Phase `number` is finished; the host's own step stands at 0 until the next sampler goes on from there."""
        shared.state.sampling_step = 0
        self.show(self.ends[number])

    def close(self) -> None:
        shared.state.job_no = self.batch
        shared.state.sampling_step = shared.state.sampling_steps


class _BaseHooks:
    """Hangs on the base's denoiser: makes room in the bar for the phases that follow."""

    def __init__(self, progress: _Progress):
        self.progress = progress
        self.called = False

    def on_step(self, params: Any) -> None:
        self.progress.show(shared.state.sampling_step)
        if self.called:  # the callback comes before the model's call
            self.progress.pace.count(1, 1)
        self.called = True


def before_sampling(p: Any, args: Sequence[Any]) -> None:
    """The base is about to be sampled, or one of our phases, whose sampler has its hooks already."""
    denoiser = p.sampler.model_wrap_cfg
    if hasattr(denoiser, "demofusion") or getattr(p, "enable_hr", False):
        return
    settings = read_settings(args)
    if settings is None:
        return
    progress = _Progress(plan_for(p, settings.config))
    denoiser.demofusion = _BaseHooks(progress)
    shared.total_tqdm.updateTotal(progress.total * max(int(shared.state.job_count), 1))


def on_cfg_denoiser(params: Any) -> None:
    """The host's callback at every step of every sampler; ours carry what is to be called."""
    hooks = getattr(params.denoiser, "demofusion", None)
    if hooks is not None:
        hooks.on_step(params)


# ---------------------------------------------------------------------------------------------------------------------
# The phases


def post_sample(p: Any, ps: Any, args: Sequence[Any]) -> None:
    """Replace the base latents ps.samples [B, C, h, w] with those of the last phase that could be finished."""
    settings = read_settings(args)
    if settings is None or getattr(p, "enable_hr", False) or getattr(ps.samples, "already_decoded", False):
        return
    base_hooks = getattr(p.sampler.model_wrap_cfg, "demofusion", None)
    progress = base_hooks.progress if base_hooks else _Progress(plan_for(p, settings.config))
    plan = progress.plan
    if _stopped():  # during the base: as without us
        progress.close()
        _describe(p, settings.config, plan.phases[0])
        return

    progress.pause(1)
    base, trouble = ps.samples, None
    finished = [(plan.phases[0], base)]
    with _restored(p):
        run = _Phases(p, plan, settings.config, progress)
        try:
            done = None
            if settings.resume is not None:
                base, done = run.take_up(_read_saved(settings.resume), base)
                finished.append((plan.phases[done[0] - 1], done[1]))
            elif settings.save_phases:
                _save(p, settings.config, plan, plan.phases[0], base, base)
            for phase, latents in upscale(plan, base, run.noise, run.denoise, done, run.enlarge):
                finished.append((phase, latents))
                if settings.save_phases and phase is not plan.phases[-1]:
                    _save(p, settings.config, plan, phase, latents, base)
        except Cancelled:
            trouble = "stopped"
        except Exception as error:  # whatever it is, what is finished must not be lost
            errors.report(f"{NAME} failed", exc_info=True)
            trouble = _reason(error)
    progress.close()
    if run.view_batch.size < settings.config.view_batch_size:
        p.comment(f"{NAME}: a view batch size of {settings.config.view_batch_size} did not fit; {run.view_batch.size} did.")
    if trouble:
        p.comment(f"{NAME}: {trouble}; {_called(finished[-1][0], plan)}, is the last one finished.")
        _keep_what_is_finished()
        devices.torch_gc()
    _hand_over(p, ps, settings.config, plan, finished)


def _hand_over(p: Any, ps: Any, config: DemoFusionConfig, plan: Plan, finished: list[tuple[Phase, Tensor]]) -> None:
    """Give the host the last of the finished phases that can be decoded, decoded already if that takes our tiles."""
    while True:
        reached, latents = finished.pop()
        _describe(p, config, reached)
        if not finished or not _may_use_tiles(p.sd_model):
            ps.samples = latents
            return
        try:
            ps.samples = _decode(p.sd_model, latents, plan)
            return
        except Exception as error:
            errors.report(f"{NAME}: phase {reached.number} cannot be decoded", exc_info=True)
            lost = f"{_called(reached, plan)}, cannot be decoded: {_reason(error)}"
            p.comment(f"{NAME}: {lost}; {_called(finished[-1][0], plan)}, is what you get.")


def _called(phase: Phase, plan: Plan) -> str:
    return f"phase {phase.number} of {len(plan.phases)}, {phase.size[1] * FACTOR}x{phase.size[0] * FACTOR}"


def _stopped() -> bool:
    return shared.state.interrupted or shared.state.skipped


def _keep_what_is_finished() -> None:
    """The host does not save images that were interrupted or skipped; a finished phase is a whole image.

    So an interrupt becomes "stop after this image", and a skip, which is done, is over.
    """
    if shared.state.interrupted:
        shared.state.stop_generating()
        shared.state.interrupted = False
    shared.state.skipped = False


def _reason(error: Exception) -> str:
    if is_out_of_memory(error) and not isinstance(error, OutOfMemory):  # not in a view: the whole latents or picture
        return "out of memory beside the views; a smaller scale or base image needs less"
    return str(error) if isinstance(error, OutOfMemory) else f"failed: {first_line(error)}"


@contextmanager
def _restored(p: Any) -> Iterator[None]:
    """Put back what the phases change on p and in the host's state."""
    names = ("rng", "sampler", "steps", "c", "uc", "step_multiplier")
    before = {name: getattr(p, name) for name in names}
    state = shared.state
    job, textinfo = state.job, state.textinfo
    model_hijack.apply_circular(False)  # a window must not be made to tile with itself; see _PhaseHooks.fused
    try:
        yield
    finally:
        model_hijack.apply_circular(p.tiling)
        for name, value in before.items():
            setattr(p, name, value)
        state.job, state.textinfo = job, textinfo


def _autocast() -> Any:
    """How the host samples."""
    return devices.without_autocast() if devices.unet_needs_upcast else devices.autocast()


def _save(p: Any, config: DemoFusionConfig, plan: Plan, phase: Phase, latents: Tensor, base: Tensor) -> None:
    """Write a phase's images, and beside each the file from which it can be resumed. What fails here ends no phase."""
    if not p.save_samples():
        return
    _describe(p, config, phase)
    try:
        _write(p, plan, phase, latents, base)
    except Exception as error:  # a full disk, or no memory to decode
        errors.report(f"{NAME}: phase {phase.number} was not saved", exc_info=True)
        p.comment(f"{NAME}: phase {phase.number} was not saved: {first_line(error)}")


def _may_use_tiles(model: Any, kind: str = "decode") -> bool:
    """Whether the host would decode, or encode, with the whole of a network that we can run in tiles, and nobody else does."""
    network = getattr(model.first_stage_model, f"{kind}r", None)
    if network is None or getattr(shared.opts, f"sd_vae_{kind}_method") != "Full":
        return False
    if getattr(network.forward, "__func__", None) is not type(network).forward:  # Tiled VAE, for one, has taken its place
        return False
    try:
        tiles.resamplers(network)
    except ValueError:
        return False
    return True


def _decode(model: Any, latents: Tensor, plan: Plan) -> Any:
    """latents [B, C, h, w] as the host decodes them, images [3, H, W] in -1..1 on the CPU; large ones in tiles."""
    with _in_tiles(model, plan, "decode", tiles.decode):
        return processing.decode_latent_batch(model, latents, devices.cpu, check_for_nans=True)


def _encode(model: Any, image: Tensor, plan: Plan) -> Tensor:
    """An image [1, 3, H, W] in -1..1 as latents, as the host encodes it; a large one in tiles.

    The host draws them from a distribution, whose spread is next to nothing, with the noise of all programs; here always
    the same noise, so that a seed gives one picture.
    """
    with _in_tiles(model, plan, "encode", tiles.encode), torch.random.fork_rng():
        torch.manual_seed(0)
        return sd_samplers_common.images_tensor_to_samples(image.div(2).add_(0.5), model=model)


@contextmanager
def _in_tiles(model: Any, plan: Plan, kind: str, tiled: Callable) -> Iterator[None]:
    """The model decodes, or encodes, in tiles, where that may be: its method is shadowed on this one object."""
    name = f"{kind}_first_stage"
    whole, before = getattr(model, name), vars(model).get(name)

    def code(x: Tensor) -> Any:
        network = getattr(model.first_stage_model, f"{kind}r")
        return tiled(whole, x, network, tile=tiles.tile_for(network, x.device, plan.window))

    if _may_use_tiles(model, kind):
        setattr(model, name, code)
    try:
        yield
    finally:
        vars(model).pop(name, None)
        if before is not None:
            setattr(model, name, before)


def _write(p: Any, plan: Plan, phase: Phase, latents: Tensor, base: Tensor) -> None:
    for i, pixels in enumerate(_decode(p.sd_model, latents, plan)):
        image = pixels.float().add(1).mul(127.5).clamp(0, 255).byte().permute(1, 2, 0).numpy()
        info = processing.create_infotext(p, p.prompts, p.seeds, p.subseeds, index=i, all_negative_prompts=p.negative_prompts)
        path, _ = images.save_image(
            Image.fromarray(image),
            p.outpath_samples,
            "",
            p.seeds[i],
            p.prompts[i],
            shared.opts.samples_format,
            info=info,
            p=p,
            suffix=f"-demofusion-phase{phase.number}",
        )
        SavedPhase(phase.number, latents[i : i + 1], base[i : i + 1], "WebUI").write(Path(path).with_suffix(".safetensors"))


class _Phases:
    """The host's side of `upscale`, for the images of one batch."""

    def __init__(self, p: Any, plan: Plan, config: DemoFusionConfig, progress: _Progress):
        self.p = p
        self.plan = plan
        self.config = config
        self.progress = progress
        self.view_batch = ViewBatch(config.view_batch_size, devices.device)

    def take_up(self, saved: SavedPhase, base: Tensor) -> tuple[Tensor, tuple[int, Tensor]]:
        """The base and the finished phase of a file, checked against the base just made, [1, C, h, w]."""
        kept = saved.base.to(base)
        if (kept - base).square().mean().sqrt() > 0.1 * base.std():  # another card moves the last bits, not the picture
            raise ValueError("the saved phase is of another image; take prompt, seed and settings from its image's PNG Info")
        self.progress.pause(saved.number)
        return kept, (saved.number, saved.latents.to(base))

    def noise(self, phase: Phase) -> Tensor:
        """The images' own noise at the phase's size; the host's generators then also feed samplers that want more."""
        p = self.p
        p.rng = rng.ImageRNG(
            (_latent_channels(), *phase.size),
            p.seeds,
            subseeds=p.subseeds,
            subseed_strength=p.subseed_strength,
            seed_resize_from_h=p.seed_resize_from_h,
            seed_resize_from_w=p.seed_resize_from_w,
        )
        return p.rng.next()

    def enlarge(self, latents: Tensor, size: Size) -> tuple[Tensor, Tensor | None]:
        model = self.p.sd_model

        def decode(z: Tensor) -> Tensor:
            return _decode(model, z, self.plan)[0].float()[None]

        with _autocast():
            return enlarge(latents, size, self.config, decode, lambda image: _encode(model, image, self.plan), FACTOR)

    def denoise(self, phase: Phase, reference: Tensor, noise: Tensor, held: Tensor | None) -> Tensor:
        """One phase with a sampler of its own. Raises Cancelled if the user interrupts or skips."""
        p = self.p
        shared.state.job = shared.state.textinfo = f"{NAME} phase {phase.number} of {len(self.plan.phases)}"
        seconds = self.progress.pace.seconds(phase.number)
        if seconds is not None and SAMPLERS[p.sampler_name].counts != "unknown":
            shared.state.textinfo += f" (about {clock_time(seconds)})"
        shared.state.current_image_sampling_step = 0  # the steps count from 0 again, and previews with them
        self._set_up_model(phase)
        p.sampler = sampler = sd_samplers.create_sampler(p.sampler_name, p.sd_model)
        if p.sampler_name == "UniPC":
            sampler.func = _unipc_without_corrector
        fusion = fusion_for(
            self.plan,
            phase,
            self.config,
            reference,
            noise,
            fresh_noise=_adds_noise(p, sampler),
            cancelled=_stopped,
            held=held,
            view_batch=self.view_batch,
        )
        denoiser = sampler.model_wrap_cfg
        denoiser.demofusion = hooks = _PhaseHooks(phase, fusion, SAMPLERS[p.sampler_name], p.tiling, self.progress)
        handle = denoiser.register_forward_pre_hook(hooks.before_step)
        try:
            if p.scripts is not None:
                p.scripts.process_before_every_sampling(p=p, x=reference, noise=noise, c=p.c, uc=p.uc)
            with _autocast():
                h, w = phase.size
                image_conditioning = p.txt2img_image_conditioning(noise, width=w * FACTOR, height=h * FACTOR)
                latents = _sample(p, sampler, phase, noise, image_conditioning)
        finally:
            handle.remove()
            del denoiser.demofusion
        if _stopped():
            raise Cancelled
        self.progress.pause(phase.number)
        devices.test_for_nans((0 * latents).sum(), "unet")  # not finite anywhere: NaN; the host would see the first pixel
        return latents

    def _set_up_model(self, phase: Phase) -> None:
        """The first model again if the refiner has taken its place, and prompts on the phase's own steps."""
        p = self.p
        refined = p.refiner_checkpoint_info is not None
        if refined:
            sd_models.reload_model_weights()
            sd_models.apply_alpha_schedule_override(p.sd_model, p)
            if not p.disable_extra_networks:
                with devices.autocast():
                    extra_networks.activate(p, p.extra_network_data)
        if refined or p.steps != phase.steps:
            p.steps = phase.steps
            p.setup_conds()


def _sample(p: Any, sampler: Any, phase: Phase, noise: Tensor, image_conditioning: Tensor) -> Tensor:
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


def _adds_noise(p: Any, sampler: Any) -> bool:
    kind = SAMPLERS[p.sampler_name].noise
    if kind == "eta":
        eta = p.eta if p.eta is not None else getattr(shared.opts, sampler.eta_option_field, 0)
        return eta > 0
    if kind == "churn":
        return getattr(shared.opts, "s_churn", p.s_churn) > 0
    return kind == "always"


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


class _PhaseHooks:
    """What hangs on the denoiser of one phase's sampler. "Life of one denoising step", in `fusion`, is told from here."""

    def __init__(self, phase: Phase, fusion: Fusion, sampler: Sampler, tiling: bool, progress: _Progress):
        self.phase = phase
        self.fusion = fusion
        self.timesteps = sampler.timesteps
        self.tiling = tiling
        self.progress = progress
        self.done = progress.ends[phase.number - 1]
        self.blended: Any = None  # the x and the level that were blended last
        self.log_alphas = shared.sd_model.alphas_cumprod.double().cpu().log().numpy()
        self.log_sigmas = 0.5 * (np.log1p(-np.exp(self.log_alphas)) - self.log_alphas)
        self.steps = np.arange(len(self.log_alphas))

    def levels(self, sigma: float) -> tuple[float, float, float]:
        """(t, noise, signal): the training timestep of the host's sigma, and x = signal * z + noise * n there."""
        if self.timesteps:
            kept = math.exp(np.interp(sigma, self.steps, self.log_alphas))
            return sigma, math.sqrt(1 - kept), math.sqrt(kept)
        return float(np.interp(math.log(sigma), self.log_sigmas, self.steps)), sigma, 1.0

    def before_step(self, denoiser: Any, args: tuple) -> None:
        """The skip residual, in place on the x that the sampler goes on with."""
        x, level = args[0], float(args[1][0])
        t, noise, signal = self.levels(level)
        if self.blended is None:  # the phase begins
            x.copy_(self.fusion.noised_reference(noise, signal))
            if self.phase.skipped:  # prompts that change on the way, and the refiner, go by the host's count of its calls
                skipped = denoiser.sampler.config.total_steps(self.phase.skipped)
                denoiser.step += skipped
                denoiser.total_steps += skipped
        elif self.blended[0] is x and self.blended[1] == level:
            return  # a sampler with adaptive steps tries a step again
        self.fusion.skip_residual_(x, t, noise, signal)
        self.blended = x, level

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
        self.announced = 1  # the host counts a step as one
        self.progress.show(self.done)

    def forward(self, original: Callable, x: Tensor, sigma: Tensor, cond: dict, **kwargs: Any) -> Tensor:
        """In place of the inner model's forward. x: [rows, C, H, W], the images once for each prompt.

        At CFG 1 guidance cancels out: the negative prompt's rows, which come last, get the prompt's answer.
        """
        first, self.row = self.row, self.row + len(x)
        own = min(max(self.conds - first, 0), len(x)) if self.unguided else len(x)
        parts = []
        if own:
            cond = {key: _rows(value, own) for key, value in cond.items()}
            parts.append(self.fused(original, x[:own], sigma[:own], cond, count=first == 0, **kwargs))
            self.answers += parts
        if own < len(x):
            start = first + own - self.conds
            parts.append(torch.cat(self.answers)[start : start + len(x) - own])
        return torch.cat(parts)

    def fused(self, original: Callable, x: Tensor, sigma: Tensor, cond: dict, count: bool, **kwargs: Any) -> Tensor:
        level = float(sigma[0])
        t, noise, _ = self.levels(level)
        # Where the image is to tile, the plane is rolled by another offset at every step, so that no border stays one.
        generator = jitter_generator(-self.phase.number, t)
        h, w = self.phase.size
        roll = [int(torch.randint(side, (), generator=generator)) if self.tiling else 0 for side in (h, w)]

        def denoise(crops: Tensor, views: Sequence[View]) -> Tensor:
            with _autocast():
                out = original(crops, sigma.repeat(len(views)), cond=self._cond_for(cond, views, roll), **kwargs)
            if count:
                self._count(len(views))
            return out if self.timesteps else (crops - out) / noise

        try:
            with devices.without_autocast():
                eps = self.fusion.predict(_rolled(x, roll), t, denoise, noise)
        except Cancelled:
            raise sd_samplers_common.InterruptedException from None
        eps = _rolled(eps, [-shift for shift in roll])
        return eps if self.timesteps else x - noise * eps

    def _count(self, views: int) -> None:
        self.progress.pace.count(self.phase.number, views)
        self.done = min(self.done + views, self.progress.ends[self.phase.number])
        self.progress.show(self.done)
        for _ in range(views - self.announced):
            shared.total_tqdm.update()
        self.announced = 0

    def _cond_for(self, cond: dict, views: Sequence[View], roll: Sequence[int]) -> dict:
        """The host's conditions of some rows [rows, ...], once for each view; what has the image's size is cropped."""

        def each(value: Any) -> Any:
            if isinstance(value, list):
                return [each(item) for item in value]
            if value.ndim == 4 and value.shape[-2:] == self.phase.size:
                return self._crops(_rolled(value, roll), views)
            return value.repeat(len(views), *[1] * (value.ndim - 1))

        made = {key: each(value) for key, value in cond.items()}
        if "vector" in made:
            self._set_size_ids(made["vector"], views)
        return made

    def _crops(self, value: Tensor, views: Sequence[View]) -> Tensor:
        h, w = self.fusion.window
        grown, _ = pad_edges(value, (h * self.phase.dilation, w * self.phase.dilation))
        return torch.cat([view.crop(value if view.kind == "local" else grown) for view in views])

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


def _rolled(x: Tensor, shifts: Sequence[int]) -> Tensor:
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


# ---------------------------------------------------------------------------------------------------------------------
# X/Y/Z plot


def add_plot_axes() -> None:
    """Give the host's X/Y/Z plot an axis for each setting; a plot over one of them turns DemoFusion on."""
    from modules import scripts

    for data in scripts.scripts_data:
        if data.script_class.__module__ != "xyz_grid.py":
            continue
        axis = data.module.AxisOptionTxt2Img
        data.module.axis_options.append(axis(f"[{NAME}] preset", str, _set_preset, choices=lambda: list(PRESETS)))
        for name in filter(CONFIG_FIELDS.get, ARGUMENTS):
            field = CONFIG_FIELDS[name]
            flag = isinstance(field.default, bool)
            data.module.axis_options.append(
                axis(
                    f"[{NAME}] {field.metadata['label']}",
                    str if flag else type(field.default),
                    functools.partial(_set_argument, name),
                    choices=(lambda: ["True", "False"]) if flag else None,
                )
            )
        return


def _set_argument(name: str, p: Any, value: Any, values: Any) -> None:
    _set_arguments(p, {name: {"True": True, "False": False}.get(value, value)})


def _set_preset(p: Any, value: str, values: Any) -> None:
    config = DemoFusionConfig.preset(value)
    _set_arguments(p, {name: getattr(config, name) for name in PRESET_SETTINGS})


def _set_arguments(p: Any, values: dict[str, Any]) -> None:
    script = next(script for script in p.scripts.alwayson_scripts if script.name == NAME.lower())
    args = list(p.script_args)
    for name, value in {"enabled": True, **values}.items():
        args[script.args_from + ARGUMENTS.index(name)] = value
    p.script_args = args
