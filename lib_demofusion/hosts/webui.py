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
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from lib_demofusion.config import INFOTEXT_PREFIX, PRESETS, DemoFusionConfig, first_line, infotext_label, unwritten_settings
from lib_demofusion.fusion import Cancelled, Fusion, pad_edges
from lib_demofusion.hosts import webui_neighbours
from lib_demofusion.memory import (
    OutOfMemory,
    ViewBatch,
    check_fits,
    free_memory,
    is_out_of_memory,
    latents_bytes,
    picture_bytes,
)
from lib_demofusion.phases import Pace, Phase, Plan, clock_time, enlarge, fusion_for, make_plan, upscale
from lib_demofusion.saved import SavedPhase, read_saved
from lib_demofusion.views import Size, View, jitter_generator

FACTOR = 8  # image pixels per latent pixel, as the host has it
PREVIEW_STEPS = 10  # after how many steps the host shows what it has, unless set otherwise
PICTURES = 4  # how often the host has each finished picture in main memory, in single precision
NAME = "DemoFusion"

# ---------------------------------------------------------------------------------------------------------------------
# What the host has


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


SAMPLERS = {
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
}


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
    }
    missing = [name for name, there in needed.items() if not there]
    return f"it has no {', '.join(missing)}; update the WebUI to version 1.10, which has" if missing else None


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


def least_calls(sampler: str, scheduler: str | None, skipped: int = 0) -> int:
    """With how many predictions the host's sampler can do; with fewer it fails, as it does without us."""
    known = SAMPLERS[sampler]
    if sampler == "UniPC":
        return shared.opts.uni_pc_order
    if known.counts in ("fixed", "unknown"):  # between two noise levels, which of a single step's are one
        return 2 if skipped else 1
    return 1 if scheduler == "KL Optimal" else known.least  # which ends above 0


def readout_table() -> dict[str, Any]:
    """What the readout in the browser computes with: how each sampler's model calls count (`model_calls`, `least_calls`), and
    the presets.

    A preset: what it is and when to take it, and those of its settings on which the number of model calls depends.
    """
    return {
        "samplers": {name: [known.counts, known.levels, int(known.discards), known.least] for name, known in SAMPLERS.items()},
        "presets": {name: {"help": PRESET_HELP[name], **_costs(DemoFusionConfig.preset(name))} for name in PRESETS},
    }


def _costs(config: DemoFusionConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("phase_steps", "denoising_strength", "stride", "doubling")}


# Seconds that a model call took in the last job of a checkpoint: its title -> latent pixels of the base -> seconds, all
# that the job did beside the model's calls included. For as long as the process runs; the browser keeps what it was told.
paces: dict[str, dict[int, float]] = {}


def facts() -> dict[str, Any]:
    """What the readout in the browser is to know and only the server does, as of now. Loads no model.

    paces: those of the checkpoint on this device. memory: None while a job runs, whose memory is free when it is over.
    """
    device = devices.device
    return {
        "checkpoint": shared.opts.sd_model_checkpoint,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "paces": {str(area): seconds for area, seconds in paces.get(shared.opts.sd_model_checkpoint, {}).items()},
        "memory": None if shared.state.job else _memory(device),
    }


def _memory(device: torch.device) -> dict[str, Any]:
    """What is free, and what a job takes of it, in bytes a latent pixel of the finished image, as `check_fits` counts.

    device, main: [its name, what is free there]. latents, pictures: for each image made at once. features: of decoding
    with the checkpoint's VAE as well as it can be done (`decode`); None where others decode.
    """
    model = sd_models.model_data.sd_model  # None while none is loaded; shared.sd_model would load one
    ours = model is not None and _may_use_tiles(model)
    channels = tiles.widths(model.first_stage_model.decoder)[0] if ours else 0
    return {
        "device": [f"{device.type} memory" if device.type != "cpu" else "main memory", free_memory(device)],
        "main": ["main memory", free_memory(torch.device("cpu"))],
        "latents": latents_bytes((1, 1), getattr(model, "latent_channels", 4)),
        "pictures": PICTURES * picture_bytes((1, 1), FACTOR),
        "features": int(tiles.LIVE_FEATURES * channels * devices.dtype_vae.itemsize) if ours else None,
        "tile": tiles.SMALLEST_TILE,
    }


def add_routes(demo: Any, app: Any) -> None:
    """The host's web server has started: the browser asks for `facts` there, beside the host's own progress."""
    app.add_api_route("/internal/demofusion", facts, methods=["GET"])


# ---------------------------------------------------------------------------------------------------------------------
# Settings: from the script's arguments, and refused in one line

# The script's arguments, in the order that the API documents; those from "scale" on are optional there. In the form two
# more follow, which nobody is to send: END, and why these settings are none ("" if they are), as of pasted parameters.
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
    "hold_steps",
)
END = "end of the arguments"
CONFIG_FIELDS = {f.name: f for f in fields(DemoFusionConfig)}
PRESET_SETTINGS = [name for name in ARGUMENTS if name in CONFIG_FIELDS and name not in ("scale", "view_batch_size")]
PRESET = "Fast"
FORM = DemoFusionConfig.preset(PRESET, scale=2.0)  # what the form shows at first, and the API's values for what is left out
PRESET_HELP = {  # what it is, and when to take it; what it costs depends on the rest of the form
    "Paper": ("DemoFusion as published", "Where the others add too little detail, and time does not matter"),
    "Fast": ("the last 40 % of each phase's steps, in fewer phases and windows", "For most pictures"),
    "Turbo": ("Fast with 18 steps a phase, of which 7 are run", "While you look for a prompt, and on slow machines"),
}


@dataclass(frozen=True)
class Settings:
    """What the form says. save_phases: write the phases before the last beside the outputs. resume: a file so written."""

    config: DemoFusionConfig
    save_phases: bool = False
    resume: Path | None = None


def read_settings(args: Sequence[Any]) -> Settings | None:
    """The script's arguments as settings; None if DemoFusion is off. Raises ValueError, one line, for a wrong value."""
    if all(arg is None for arg in args):  # a list that no form and no request has filled
        return None
    values = dict(zip(ARGUMENTS, args))
    for name in ("enabled", "save_phases"):
        if not isinstance(values.setdefault(name, False), bool):
            raise ValueError(f"{name.replace('_', ' ')} must be true or false, got {values[name]!r}")
    enabled, save_phases, resume = values.pop("enabled"), values.pop("save_phases"), values.pop("resume", "")
    if not enabled:
        return None
    more = args[len(ARGUMENTS) :]
    if more and more[0] != END:
        raise ValueError(f"it has {len(ARGUMENTS)} arguments, of which {ARGUMENTS[-1]} is the last; got one more, {more[0]!r}")
    if len(more) > 1 and more[1]:
        raise ValueError(more[1])
    if not isinstance(resume, str):
        raise ValueError(f"resume must be the path of a file, got {resume!r}")
    for name, value in values.items():  # a slider's 20.0 is the whole number 20
        if type(CONFIG_FIELDS[name].default) is int and isinstance(value, float) and value.is_integer():
            values[name] = int(value)
    path = resume.strip().strip('"')  # as file managers copy a path
    return Settings(replace(FORM, **values), save_phases, Path(path) if path else None)


def read_pasted(parameters: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The settings in a picture's parameters, by their names, and what is none of them, in one line ("": nothing).

    What is not written, or cannot be read, is as in pictures that do not write it. No settings: the picture was made
    without DemoFusion.
    """
    labels = {name: infotext_label(field) for name, field in CONFIG_FIELDS.items()}
    given = {}
    for name, label in labels.items():
        if label in parameters:
            given[name] = str(parameters[label])
        elif f"{label}-1" in parameters:  # the host takes "2x3" apart, as a size
            given[name] = f"{parameters[f'{label}-1']}x{parameters.get(f'{label}-2')}"
    if "scale" not in given:
        return None, ""
    values, unread = unwritten_settings(), []
    for name, text in given.items():
        default, label = CONFIG_FIELDS[name].default, CONFIG_FIELDS[name].metadata["label"]
        try:
            values[name] = getattr(DemoFusionConfig.from_infotext({labels["scale"]: "2", labels[name]: text}), name)
            if name not in ARGUMENTS and values[name] != default:
                raise ValueError(f"{label} is {text}, and always {default} here")
        except (ValueError, OverflowError) as error:
            unread.append(first_line(error))
    told = f"of what was pasted: {'; '.join(unread)}; set in the form what you want, and empty this field" if unread else ""
    return values, told


def presets_table() -> dict[str, list]:
    """What the form's controls for PRESET_SETTINGS show under each preset."""
    configs = {name: DemoFusionConfig.preset(name) for name in PRESETS}
    return {name: [getattr(config, setting) for setting in PRESET_SETTINGS] for name, config in configs.items()}


def plan_for(p: Any, config: DemoFusionConfig) -> Plan:
    """The plan of one image of the host's processing p. Raises ValueError, one line, if it cannot work."""
    if p.sampler_name not in SAMPLERS:
        raise ValueError(f"the sampler {p.sampler_name} is not one that it knows; Euler works")

    def calls(steps: int, skipped: int) -> int:
        run = steps - skipped
        known = model_calls(p.sampler_name, p.scheduler, steps, skipped)
        made, least = run if known is None else known, least_calls(p.sampler_name, p.scheduler, skipped)
        if made < least:
            of = f"the {run} of {steps} steps that the denoising strength leaves" if skipped else f"{run} step{'s'[: run > 1]}"
            needed = run + least - made
            raise ValueError(f"{p.sampler_name} cannot do with {of}; it needs {needed} at least")
        return made

    return make_plan((p.height // FACTOR, p.width // FACTOR), p.steps, config, calls=calls)


def prepare(p: Any, args: Sequence[Any]) -> None:
    """Before anything is sampled: note the settings for the infotext. Raises ValueError, one line, where that is refused."""
    settings = read_settings(args)
    if settings is None or webui_neighbours.is_inner(p):
        return
    if _enlarges_a_finished_picture(p):
        _say(p, "note", "it stood aside, since a finished picture was enlarged, by Hires. fix")
        return
    _check(p)
    plan = plan_for(p, settings.config)
    last = plan.phases[-1]
    check_fits(last.size, last.scale, devices.device, _latent_channels(), p.batch_size, FACTOR, PICTURES)
    if settings.resume:
        _check_resume(p, _read_saved(settings.resume), plan)
    _describe(p, settings.config, last)
    _warn_of_small_jpegs(p, last)


def _enlarges_a_finished_picture(p: Any) -> bool:
    """Whether Hires. fix runs alone, on a picture of the gallery, as its button asks for."""
    given = getattr(p, "txt2img_upscale", False) or getattr(p, "firstpass_image", None) is not None
    return bool(given) and getattr(p, "enable_hr", False)


def before_batch(p: Any, args: Sequence[Any]) -> None:
    """Every script has had its turn, and nothing of the batch is sampled yet.

    Raises ValueError, one line, for what one of them has changed since `prepare` and is to be refused.
    """
    settings = read_settings(args)
    if settings is None or webui_neighbours.is_inner(p) or _enlarges_a_finished_picture(p):
        return
    for kind in ("incomplete", "note"):  # of the batch before
        p.extra_generation_params.pop(f"{INFOTEXT_PREFIX} {kind}", None)
    _refuse_hires_fix(p)
    webui_neighbours.check_again(p)
    note = webui_neighbours.note_on(p.sd_model)
    if note:
        _say(p, "note", note)
    last = plan_for(p, settings.config).phases[-1]
    check_fits(last.size, last.scale, devices.device, _latent_channels(), p.batch_size, FACTOR, PICTURES)


def _latent_channels() -> int:
    return getattr(shared.sd_model, "latent_channels", 4)


def _refuse_hires_fix(p: Any) -> None:
    if getattr(p, "enable_hr", False):
        raise ValueError("Hires. fix is on too, and only one of the two can enlarge the image; untick one of them")


def _check(p: Any) -> None:
    """Raises ValueError, one line, if DemoFusion cannot run on p."""
    _refuse_hires_fix(p)
    if getattr(shared.sd_model, "is_sd3", False):
        raise ValueError("Stable Diffusion 3 has no UNet; a Stable Diffusion 1.x, 2.x or XL checkpoint works")
    if getattr(shared.sd_model, "cond_stage_key", None) == "edit":
        raise ValueError("an instruct-pix2pix checkpoint edits a given image; a text-to-image checkpoint works")
    webui_neighbours.check(p, NAME)


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
    """Raises ValueError, one line, where a saved phase is none of this job."""
    if p.batch_size * p.n_iter != 1:
        raise ValueError("a saved phase belongs to one image; set batch size and batch count to 1")
    if saved.number >= len(plan.phases):
        raise ValueError(f"phase {saved.number} is saved, and this scale has none after it; choose a larger one")
    images, channels = saved.latents.shape[:2]
    if images != 1:
        raise ValueError(f"the saved phase is of {images} images; the WebUI saves each in a file of its own")
    if channels != _latent_channels():
        own = _latent_channels()
        raise ValueError(
            f"the saved phase has {channels} channels, and latents of this checkpoint {own}; take that of its image's PNG Info"
        )
    if saved.latents.shape[-2:] != plan.phases[saved.number - 1].size or saved.base.shape[-2:] != plan.window:
        raise ValueError("the saved phase is of other sizes than these settings make; take those in its image's PNG Info")


def _say(p: Any, kind: str, line: str) -> None:
    """A line for the form's comments, and through the infotext for the API's reply.

    kind: "incomplete", of what was asked for and is not there; "note", of anything else.
    """
    p.comment(f"{NAME}: {line}")
    _write_down(p, kind, line)


def _write_down(p: Any, kind: str, line: str) -> None:
    key, line = f"{INFOTEXT_PREFIX} {kind}", " ".join(line.split())
    known = p.extra_generation_params.get(key)
    p.extra_generation_params[key] = f"{known}; {line}" if known else line


def _describe(p: Any, config: DemoFusionConfig, reached: Phase) -> None:
    """Put the settings into the infotext of what is saved from now on, with the scale reached; none of them for the base."""
    for field in CONFIG_FIELDS.values():
        p.extra_generation_params.pop(infotext_label(field), None)
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
        self.previews = _Previews(plan)
        self.began, self.calls = time.monotonic(), 0  # of the model, those of all images and prompts
        self.checkpoint = shared.opts.sd_model_checkpoint
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

    def remember(self) -> None:
        """Keep what a model call has taken, for the readout of the next job."""
        if self.calls:
            seconds = (time.monotonic() - self.began) / self.calls
            paces.setdefault(self.checkpoint, {})[math.prod(self.plan.window)] = seconds

    def close(self) -> None:
        state = shared.state
        state.job_no = self.batch
        state.sampling_step = state.current_image_sampling_step = state.sampling_steps


class _Previews:
    """When the host is to show what a phase has got to.

    It does so whenever its page asks and the sampler has made so many steps since (a setting, 10 at first). A phase may
    have fewer, but each is many views. So here a preview is due when the model has looked at as many latent pixels for each
    pixel that is decoded as it does in the base: what previews cost is the same share of the work. Who asks for fewer than
    the host's own gets these all the same, since else no short phase would show itself; who asks for none gets none.

    Lifetime: one batch. views: since the last preview. shown: the latents of that one, as far as is known.
    """

    def __init__(self, plan: Plan):
        self.window = math.prod(plan.window)
        self.sides = plan.window
        self.last, self.views, self.shown = shared.state.id_live_preview, 0, None

    def fit(self) -> None:
        """The host decodes the whole of its latents at once: of what takes us tiles it gets a reduced copy."""
        model, latents = shared.sd_model, shared.state.current_latent
        if latents is None or shared.opts.show_progress_type != "Full" or not _may_use_tiles(model):
            return
        h, w = latents.shape[-2:]
        share = tiles.tile_for(model.first_stage_model.decoder, latents.device, self.sides) / math.sqrt(h * w)
        if share < 1:
            size = [max(math.floor(side * share), 1) for side in (h, w)]
            shared.state.current_latent = torch.nn.functional.interpolate(latents, size=size, mode="area")

    def count(self, views: int) -> None:
        """So many views have just been looked at."""
        state, opts = shared.state, shared.opts
        if state.id_live_preview != self.last:
            self.last, self.views, self.shown = state.id_live_preview, 0, state.current_latent
        self.views += views
        latents, steps = state.current_latent, min(opts.show_progress_every_n_steps, PREVIEW_STEPS)
        if not opts.live_previews_enable or steps < 1 or latents is None or latents is self.shown:
            return
        if self.views * self.window < steps * math.prod(latents.shape[-2:]):
            return
        if shared.parallel_processing_allowed:  # due, by the host's own count, when the page asks next
            state.current_image_sampling_step = state.sampling_step - opts.show_progress_every_n_steps
        else:
            self.shown = latents
            _show(latents)


def _show(latents: Tensor) -> None:
    try:
        with _autocast():
            shared.state.assign_current_image(sd_samplers_common.sample_to_image(latents))
    except Exception:  # no preview is worth a phase
        errors.report(f"{NAME}: no preview", exc_info=True)


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
        self.progress.calls += len(params.x)


def before_sampling(p: Any, args: Sequence[Any]) -> None:
    """The base is about to be sampled, or one of our phases, whose sampler has its hooks already."""
    denoiser = p.sampler.model_wrap_cfg
    if hasattr(denoiser, "demofusion") or getattr(p, "enable_hr", False):
        return
    settings = read_settings(args)
    if settings is None or webui_neighbours.is_inner(p):
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
    """Replace the base latents ps.samples [B, C, h, w] with those of the last phase that could be finished.

    Where that is not the last of all, whatever the reason, the job says so.
    """
    try:
        settings = read_settings(args)
        if settings is not None and not webui_neighbours.is_inner(p) and not _enlarges_a_finished_picture(p):
            _run_phases(p, ps, settings)
    except Exception as error:
        errors.report(f"{NAME} failed", exc_info=True)
        _say(p, "incomplete", f"the base is the last one finished, because the next {_verb(_reason(error))}")


def _run_phases(p: Any, ps: Any, settings: Settings) -> None:
    if getattr(ps.samples, "already_decoded", False):
        _say(p, "incomplete", "the base is the last one finished, because something else has made pictures of it already")
        return
    base_hooks = getattr(p.sampler.model_wrap_cfg, "demofusion", None)
    progress = base_hooks.progress if base_hooks else _Progress(plan_for(p, settings.config))
    plan = progress.plan
    try:
        webui_neighbours.check_latents(ps.samples, plan.window, FACTOR)
    except ValueError as error:
        progress.close()
        _describe(p, settings.config, plan.phases[0])
        _say(p, "incomplete", f"the base is what you get, because {error}")
        return
    if _stopped():
        progress.close()
        _describe(p, settings.config, plan.phases[0])
        _say(p, "incomplete", f"{_called(plan.phases[0], plan)}, is not finished, because it was stopped")
        return

    progress.pause(1)
    base, trouble = ps.samples, None
    finished = [(plan.phases[0], base)]
    with _restored(p), _in_turns(p.sd_model):
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
        _say(p, "note", f"a view batch size of {settings.config.view_batch_size} did not fit; {run.view_batch.size} did.")
    if trouble:
        last = finished[-1][0]
        p.comment(f"{NAME}: {trouble}; {_called(last, plan)}, is the last one finished.")
        reached = f"phase {last.number} of {len(plan.phases)} is the last one finished"
        _write_down(p, "incomplete", f"{reached}, because the next {_verb(trouble)}")
        _keep_what_is_finished()
        devices.torch_gc()
    _hand_over(p, ps, settings.config, plan, finished)
    progress.remember()


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
            _say(p, "incomplete", f"{lost}; {_called(finished[-1][0], plan)}, is what you get.")


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


def _verb(trouble: str) -> str:
    """What a phase did that ended in `trouble`."""
    return {"stopped": "was stopped"}.get(trouble, f"ran {trouble}" if trouble.startswith("out of memory") else trouble)


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
        _say(p, "note", f"phase {phase.number} was not saved: {first_line(error)}")


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
    whole = getattr(model, name)

    def code(x: Tensor) -> Any:
        network = getattr(model.first_stage_model, f"{kind}r")
        with _coding:
            return tiled(whole, x, network, tile=tiles.tile_for(network, x.device, plan.window))

    latents, shared.state.current_latent = shared.state.current_latent, None  # nor does the host begin a preview now
    try:
        with _shadowed(model, name, code if _may_use_tiles(model, kind) else whole):
            yield
    finally:
        shared.state.current_latent = latents


# The host decodes a preview whenever its page asks, on another thread. What decodes in tiles changes the decoder meanwhile.
_coding = threading.RLock()


@contextmanager
def _in_turns(model: Any) -> Iterator[None]:
    """While it lasts the model decodes for one thread at a time."""
    whole = model.decode_first_stage

    def decode(*args: Any, **kwargs: Any) -> Any:
        with _coding:
            return whole(*args, **kwargs)

    with _shadowed(model, "decode_first_stage", decode):
        yield


@contextmanager
def _shadowed(thing: Any, name: str, value: Any) -> Iterator[None]:
    """thing.name is value, on this one object; then it is as before."""
    before = vars(thing).get(name)
    setattr(thing, name, value)
    try:
        yield
    finally:
        delattr(thing, name)
        if before is not None:
            setattr(thing, name, before)


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
            encode = functools.partial(_encode, model, plan=self.plan)
            return enlarge(latents, size, self.config, decode, encode, FACTOR, self.p.tiling)

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
        webui_neighbours.check_sampler(sampler)
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
        sampler.callback_state = hooks.told_by(sampler.callback_state)
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
        self.calls: list[tuple[Tensor, float]] = []  # x and t of each since the sampler has last told of a step
        self.since: float | None = None  # t where the last step began that it has told of; None before the first
        self.told_midway = False  # rather than at a step's end
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
        if self.since is None and not self.calls:  # the phase begins
            x.copy_(self.fusion.noised_reference(noise, signal))
            if self.phase.skipped:  # prompts that change on the way, and the refiner, go by the host's count of its calls
                skipped = denoiser.sampler.config.total_steps(self.phase.skipped)
                denoiser.step += skipped
                denoiser.total_steps += skipped
        elif any(x is before and t == at for before, at in self.calls):
            return  # it asks again
        since = self.since if self.told_midway or not self.calls else self.calls[0][1]
        self.calls.append((x, t))
        self.fusion.skip_residual_(x, t, noise, signal, since)

    def told_by(self, callback: Callable) -> Callable:
        """The sampler's callback, which it calls once a step: between its calls here, those of a new step begin.

        k-diffusion's samplers tell midway, of the x that they have asked about last and that their step starts from: what
        follows until they tell again is tried out on the way, but for the last. Others tell at a step's end, of the x that
        it has led to, and what they try out comes after the call that the step starts with; one with adaptive steps may
        reject a step, to start from the same x again.
        """

        def told(state: dict) -> Any:
            if self.calls:
                first, last = self.calls[0], self.calls[-1]
                self.told_midway = state["x"] is last[0]
                self.since = (last if self.told_midway else first)[1]
                self.calls = [first] if state["x"] is first[0] and not self.told_midway else []
            return callback(state)

        return told

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
        self.progress.previews.fit()
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
            self.progress.calls += len(crops)
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
        self.progress.previews.count(views)
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


def add_plot_axes(script: type) -> None:
    """Give the host's X/Y/Z plot an axis for each setting; a plot over one of them turns DemoFusion on.

    script: the class of the extension's script, by which a job's arguments are found; names and files may be others' too.
    """
    from modules import scripts

    for data in scripts.scripts_data:
        if data.script_class.__module__ != "xyz_grid.py":
            continue
        axis = data.module.AxisOptionTxt2Img
        preset = functools.partial(_set_preset, script)
        data.module.axis_options.append(axis(f"[{NAME}] preset", str, preset, choices=lambda: list(PRESETS)))
        for name in filter(CONFIG_FIELDS.get, ARGUMENTS):
            field = CONFIG_FIELDS[name]
            flag = isinstance(field.default, bool)
            data.module.axis_options.append(
                axis(
                    f"[{NAME}] {field.metadata['label']}",
                    str if flag else type(field.default),
                    functools.partial(_set_argument, script, name),
                    choices=(lambda: ["True", "False"]) if flag else None,
                )
            )
        return


def _set_argument(script: type, name: str, p: Any, value: Any, values: Any) -> None:
    _set_arguments(script, p, {name: {"True": True, "False": False}.get(value, value)})


def _set_preset(script: type, p: Any, value: str, values: Any) -> None:
    try:
        config = DemoFusionConfig.preset(value)
    except ValueError as error:
        _set_arguments(script, p, {}, unread=str(error))  # refuses this cell, and not the whole plot
        return
    _set_arguments(script, p, {name: getattr(config, name) for name in PRESET_SETTINGS})


def _set_arguments(script: type, p: Any, values: dict[str, Any], unread: str = "") -> None:
    own = next(own for own in p.scripts.alwayson_scripts if isinstance(own, script))
    args = list(p.script_args)
    for name, value in {"enabled": True, **values}.items():
        args[own.args_from + ARGUMENTS.index(name)] = value
    if unread:
        args[own.args_from + len(ARGUMENTS) + 1] = unread
    p.script_args = args
