"""Before anything is sampled: the plan of a job, and whatever cannot work refused in one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modules import devices, shared

from lib_demofusion.config import INFOTEXT_PREFIX, DemoFusionConfig
from lib_demofusion.hosts.webui import a1111, neighbours
from lib_demofusion.hosts.webui.a1111 import FACTOR
from lib_demofusion.hosts.webui.samplers import SAMPLERS, least_calls, model_calls
from lib_demofusion.hosts.webui.settings import NAME, describe, read_settings, say
from lib_demofusion.memory import check_fits
from lib_demofusion.phases import Phase, Plan, make_plan
from lib_demofusion.saved import SavedPhase, read_saved

PICTURES = 4  # how often the host has each finished picture in main memory, in single precision


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
    if settings is None or neighbours.is_inner(p):
        return
    if enlarges_a_finished_picture(p):
        say(p, "note", "it stood aside, since a finished picture was enlarged, by Hires. fix")
        return
    _check(p)
    plan = plan_for(p, settings.config)
    last = plan.phases[-1]
    check_fits(last.size, last.scale, devices.device, a1111.latent_channels(), p.batch_size, FACTOR, PICTURES)
    if settings.resume:
        _check_resume(p, read_resumed(settings.resume), plan)
    describe(p, settings.config, last)
    _warn_of_small_jpegs(p, last)


def enlarges_a_finished_picture(p: Any) -> bool:
    """Whether Hires. fix runs alone, on a picture of the gallery, as its button asks for."""
    given = getattr(p, "txt2img_upscale", False) or getattr(p, "firstpass_image", None) is not None
    return bool(given) and getattr(p, "enable_hr", False)


def before_batch(p: Any, args: Sequence[Any]) -> None:
    """Every script has had its turn, and nothing of the batch is sampled yet.

    Raises ValueError, one line, for what one of them has changed since `prepare` and is to be refused.
    """
    settings = read_settings(args)
    if settings is None or neighbours.is_inner(p) or enlarges_a_finished_picture(p):
        return
    for kind in ("incomplete", "note"):  # of the batch before
        p.extra_generation_params.pop(f"{INFOTEXT_PREFIX} {kind}", None)
    _refuse_hires_fix(p)
    neighbours.check_again(p)
    note = neighbours.note_on(p.sd_model)
    if note:
        say(p, "note", note)
    last = plan_for(p, settings.config).phases[-1]
    check_fits(last.size, last.scale, devices.device, a1111.latent_channels(), p.batch_size, FACTOR, PICTURES)


def _refuse_hires_fix(p: Any) -> None:
    if getattr(p, "enable_hr", False):
        raise ValueError("Hires. fix is on too, and only one of the two can enlarge the image; untick one of them")


def _check(p: Any) -> None:
    """Raises ValueError, one line, if DemoFusion cannot run on p."""
    _refuse_hires_fix(p)
    a1111.check_model()
    neighbours.check(p, NAME)


def read_resumed(path: Path) -> SavedPhase:
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
    if channels != a1111.latent_channels():
        own = a1111.latent_channels()
        raise ValueError(
            f"the saved phase has {channels} channels, and latents of this checkpoint {own}; take that of its image's PNG Info"
        )
    if saved.latents.shape[-2:] != plan.phases[saved.number - 1].size or saved.base.shape[-2:] != plan.window:
        raise ValueError("the saved phase is of other sizes than these settings make; take those in its image's PNG Info")
