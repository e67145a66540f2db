"""Before anything is sampled: the plan of a job, and whatever cannot work refused in one line."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from modules import devices, shared

from lib_demofusion.config import INFOTEXT_PREFIX, DemoFusionConfig
from lib_demofusion.hosts.webui import neighbours, sampling, second_pass, units
from lib_demofusion.hosts.webui.checkpoints import another
from lib_demofusion.hosts.webui.gallery import Selected
from lib_demofusion.hosts.webui.host import host
from lib_demofusion.hosts.webui.picture import LATENT_RESIZE, Start
from lib_demofusion.hosts.webui.samplers import SAMPLERS, least_calls, model_calls
from lib_demofusion.hosts.webui.sampling import FACTOR
from lib_demofusion.hosts.webui.second_pass import resolved
from lib_demofusion.hosts.webui.settings import CONFIG_FIELDS, NAME, PICTURE, RESULT, Settings, describe, read_settings, say
from lib_demofusion.memory import check_fits
from lib_demofusion.phases import Phase, Plan, make_plan, plan_from_picture, resize_target
from lib_demofusion.saved import SavedPhase, read_saved
from lib_demofusion.views import Size

PICTURES = 4  # how often the host has each finished picture in main memory, in single precision


def plan_for(p: Any, config: DemoFusionConfig, start: Start | None = None) -> Plan:
    """The plan of one image of the host's processing p, whose fields are the base's. Raises ValueError, one line, if it cannot
    work.
    """
    calls = _calls_of(config.phase_sampler or p.sampler_name, config.phase_schedule or p.scheduler)
    own = 1 if p.cfg_scale == 1 and not host.BASE_ALWAYS_GUIDED else 2
    more = dict(branches=(own, 1 if (config.phase_cfg_scale or p.cfg_scale) == 1 else 2), calls=calls)
    more["final"] = resize_target(_own_size(p, start), config, FACTOR)
    if start is not None and start.from_picture:
        if start.window is None or config.window:
            return plan_from_picture(start.size, host.native_side(), p.steps, config, factor=FACTOR, **more)
        h, w = (side // FACTOR for side in start.window)
        return make_plan((h, w), p.steps, config, from_image=True, **more)
    if config.window:
        raise ValueError("a window is for a picture that is given; here it is the base's size, so set window to 0")
    more["base_calls"] = _calls_of(p.sampler_name, p.scheduler)
    base = None if start is None else sampling.base_steps(p)
    return make_plan((p.height // FACTOR, p.width // FACTOR), p.steps, config, base=base, **more)


def _own_size(p: Any, start: Start | None) -> Size:
    """(height, width) in pixels of what is enlarged."""
    return start.size if start is not None and start.from_picture else (p.height, p.width)


def _calls_of(sampler: str, schedule: str) -> Callable[[int, int], int]:
    """How many predictions a sampler asks for in so many steps, of which so many are skipped.

    Raises ValueError, one line, for a sampler that is not known, and when it is asked, for steps that are too few.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"the sampler {sampler} is not one that it knows; Euler works")

    def calls(steps: int, skipped: int) -> int:
        run = steps - skipped
        known = model_calls(sampler, schedule, steps, skipped)
        made, least = run if known is None else known, least_calls(sampler, schedule, skipped)
        if made < least:
            of = f"the {run} of {steps} steps that the denoising strength leaves" if skipped else f"{run} step{'s'[: run > 1]}"
            needed = run + least - made
            raise ValueError(f"{sampler} cannot do with {of}; it needs {needed} at least")
        return made

    return calls


def settings_for(p: Any, args: Sequence[Any], start: Start | None) -> Settings | None:
    """What is asked of the job p, in the script's arguments and, from a given picture, in img2img's own denoising strength.

    None: nothing, or another one's work goes before. Raises ValueError, one line, for a wrong value.
    """
    settings = read_settings(args)
    if settings is None or enlarges_a_finished_picture(p) or neighbours.stands_aside_for(p):
        return None
    settings = replace(settings, config=resolved(settings.config))
    if start is not None and start.from_picture and hasattr(p, "init_images"):
        if p.denoising_strength <= 0:
            raise ValueError("at denoising strength 0 nothing would be drawn; raise it")
        settings = replace(settings, config=replace(settings.config, denoising_strength=float(p.denoising_strength)))
    return settings


def prepare(p: Any, args: Sequence[Any], selected: Selected | None = None) -> Start | None:
    """Before anything is sampled: what the job starts from, if that is a picture; and the settings for the infotext.

    selected: of the gallery. Raises ValueError, one line, where the job is refused.
    """
    settings = read_settings(args)
    if settings is None:
        return None
    if enlarges_a_finished_picture(p):
        say(p, "note", "it stood aside, since a finished picture was enlarged, by Hires. fix")
        return None
    if neighbours.stands_aside_for(p):
        _stand_aside(p)
        return None
    _refuse_hires_fix(p)
    host.check_model(p)
    neighbours.check(p, NAME)
    settings = replace(settings, config=resolved(settings.config))
    units.check(p, bool(another(settings.config.phase_checkpoint)))
    second_pass.check(settings.config)
    start = _start(p, settings, selected)
    settings = settings_for(p, args, start)
    plan = plan_for(p, settings.config, start)
    _check_fits(p, plan, settings.config, start)
    last = plan.phases[-1]
    if settings.resume:
        _check_resume(p, read_resumed(settings.resume), plan)
    describe(p, *reached(p, plan, last, settings.config, start))
    _warn_of_small_jpegs(p, last)
    if start is not None and start.from_picture:
        start.set(width=plan.window[1] * FACTOR, height=plan.window[0] * FACTOR)
    return start


def _stand_aside(p: Any) -> None:
    describe(p, DemoFusionConfig(), 1.0)
    say(p, "note", f"it stood aside, since {neighbours.stands_aside_for(p)} is on; untick one of the two")


def _start(p: Any, settings: Settings, selected: Selected | None) -> Start | None:
    """What p starts from; None: from a prompt. Raises ValueError, one line, for pictures that cannot be taken."""
    if hasattr(p, "init_images"):
        neighbours.check_chosen(p, NAME)
    if selected is not None:
        return Start(p, [selected.image], PICTURE, selected.drawn_at_once, settings.config.upscaler)
    if not hasattr(p, "init_images"):
        if settings.start_from:
            raise ValueError(f"there is no picture in txt2img to start from, as {settings.start_from!r} wants; img2img has one")
        return None
    given = list(p.init_images or [])
    if not given or any(picture is None for picture in given):
        raise ValueError("there is no picture; drop one on the tab")
    if len(given) > p.batch_size:
        raise ValueError(
            f"there are {len(given)} pictures for a batch of {p.batch_size}; send as many as the batch has, or one"
        )
    if all(picture is given[0] for picture in given):
        given = given[:1]
    start = Start(p, given, settings.start_from or PICTURE, upscaler=settings.config.upscaler)
    if start.from_picture and len({picture.size for picture in given}) > 1:
        raise ValueError("the pictures of the batch are of different sizes; send each by itself, or those of one size together")
    if start.from_picture and p.resize_mode == LATENT_RESIZE:
        raise ValueError("it enlarges the picture itself, and not its latents; choose another resize mode, Just resize for one")
    if start.mask is not None and p.inpaint_full_res:
        raise ValueError("the inpaint area is Only masked; choose Whole picture (inpaint_full_res false), or untick DemoFusion")
    if start.mask is not None and start.mask.getextrema()[1] == 0:
        raise ValueError("the mask is empty, so that nothing would change; paint over what is to change")
    return start


def reached(
    p: Any, plan: Plan, phase: Phase, config: DemoFusionConfig, start: Start | None
) -> tuple[DemoFusionConfig, float, str]:
    """What the infotext says of a picture that got as far as `phase`: `describe`'s arguments.

    The settings; its scale, of what it started from; and what that is. A size that was asked for is claimed of that size alone.
    """
    last = phase is plan.phases[-1]
    scale = _scale_of(p, plan, config, start) if last else phase.scale
    if not last:
        config = replace(config, resize_width=0, resize_height=0)
    if start is None or not start.from_picture:
        return config, scale, RESULT if start is not None else ""
    height, width = start.size
    if not last:
        scale = FACTOR * math.sqrt(math.prod(phase.size) / (height * width)) if phase.number > 1 else 1.0
    return config, scale, f"{PICTURE} {width}x{height}"


def _scale_of(p: Any, plan: Plan, config: DemoFusionConfig, start: Start | None) -> float:
    """How many times larger the sides of what is enlarged become."""
    if not (config.resize_width or config.resize_height):
        return config.scale
    times = [FACTOR * side / own for side, own in zip(plan.phases[-1].size, _own_size(p, start))]
    return min(round(max(times), 4), CONFIG_FIELDS["scale"].metadata["high"])


def enlarges_a_finished_picture(p: Any) -> bool:
    """Whether Hires. fix runs alone, on a picture of the gallery, as its button asks for."""
    given = getattr(p, "txt2img_upscale", False) or getattr(p, "firstpass_image", None) is not None
    return bool(given) and getattr(p, "enable_hr", False)


def before_batch(p: Any, args: Sequence[Any], start: Start | None = None) -> None:
    """Every script has had its turn, and nothing of the batch is sampled yet.

    Raises ValueError, one line, for what one of them has changed since `prepare` and is to be refused.
    """
    settings = settings_for(p, args, start)
    if settings is None:
        if start is not None:  # asked for since `prepare`, by a script that comes after ours
            _stand_aside(p)
        return
    for kind in ("incomplete", "note"):  # of the batch before
        p.extra_generation_params.pop(f"{INFOTEXT_PREFIX} {kind}", None)
    if start is not None:
        start.reached = None
        if start.from_picture and getattr(p, "initial_noise_multiplier", 1) != 1:
            say(p, "note", "the settings' noise multiplier changes nothing here, since no base is sampled")
    _refuse_hires_fix(p)
    neighbours.check_again(p)
    host.check_controls(p, 0 if start is None else len(start.pictures))
    note = neighbours.note_on(p.sd_model, host.unet(p.sd_model))
    if note:
        say(p, "note", note)
    _check_fits(p, plan_for(p, settings.config, start), settings.config, start)


def _check_fits(p: Any, plan: Plan, config: DemoFusionConfig, start: Start | None) -> None:
    size, scale, what = plan.phases[-1].size, _scale_of(p, plan, config, start), "picture" if plan.from_picture else "base"
    check_fits(size, scale, devices.device, host.latent_channels(), p.batch_size, FACTOR, PICTURES, what)


def _refuse_hires_fix(p: Any) -> None:
    if getattr(p, "enable_hr", False):
        raise ValueError("Hires. fix is on too, and only one of the two can enlarge the image; untick one of them")


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
    if channels != host.latent_channels():
        own = host.latent_channels()
        raise ValueError(
            f"the saved phase has {channels} channels, and latents of this checkpoint {own}; take that of its image's PNG Info"
        )
    if saved.latents.shape[-2:] != plan.phases[saved.number - 1].size or saved.base.shape[-2:] != plan.window:
        raise ValueError("the saved phase is of other sizes than these settings make; take those in its image's PNG Info")
    if saved.from_picture != plan.from_picture:
        raise ValueError(f"the saved phase is of a job with{'' if saved.from_picture else 'out'} a picture to start from")
