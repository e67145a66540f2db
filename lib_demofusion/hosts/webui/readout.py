"""What the readout in the browser is told: what it computes with, what has been measured, and what is free."""

from __future__ import annotations

from typing import Any

import torch
from modules import devices, sd_samplers, sd_schedulers, shared

from lib_demofusion import decode as tiles
from lib_demofusion.config import PRESETS, DemoFusionConfig
from lib_demofusion.hosts.webui.checks import PICTURES
from lib_demofusion.hosts.webui.choices import choices
from lib_demofusion.hosts.webui.decoding import may_use_tiles
from lib_demofusion.hosts.webui.host import host
from lib_demofusion.hosts.webui.samplers import SAMPLERS
from lib_demofusion.hosts.webui.sampling import FACTOR
from lib_demofusion.hosts.webui.settings import CONFIG_FIELDS, PRESET_HELP, SAME
from lib_demofusion.memory import free_memory, latents_bytes, picture_bytes
from lib_demofusion.phases import FITTING, LARGEST, WORTH


def readout_table() -> dict[str, Any]:
    """What the readout in the browser computes with: how each sampler's model calls count (`model_calls`, `least_calls`), the
    presets, how a given picture's windows are chosen (`phases.plan_from_picture`), and what names stand for
    (`second_pass.resolved`).

    A preset: what it is and when to take it, and those of its settings on which the number of model calls depends. same:
    what the form shows for "as the base". guided: whether the base has both branches at any CFG scale. scales: a result's
    sides are more than the first times those of what it is made from, and at most the second. schedules: by their labels the
    names that they have, in small letters.
    """
    scale = CONFIG_FIELDS["scale"].metadata
    return {
        "same": SAME,
        "guided": host.BASE_ALWAYS_GUIDED,
        "scales": [scale["low"], scale["high"]],
        "windows": {"largest": LARGEST, "fitting": FITTING, "worth": WORTH},
        "samplers": {name: [known.counts, known.levels, int(known.discards), known.least] for name, known in SAMPLERS.items()},
        "names": {
            "samplers": [data.name for data in sd_samplers.all_samplers if data.name in SAMPLERS],
            "aliases": sd_samplers.samplers_map,
            "schedules": {own.label: _lower(own.label, own.name, *(own.aliases or [])) for own in sd_schedulers.schedulers},
            "upscalers": choices("upscaler")[1:],
        },
        "presets": {name: {"help": PRESET_HELP[name], **_costs(DemoFusionConfig.preset(name))} for name in PRESETS},
    }


def _lower(*names: str) -> list[str]:
    return [name.lower() for name in names]


COSTS = ("phase_steps", "most_phase_steps", "denoising_strength", "stride", "doubling")
COSTS += ("phase_sampler", "phase_schedule", "phase_cfg_scale")  # what presets have of which the model calls depend


def _costs(config: DemoFusionConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in COSTS}


# Seconds that a model call took in the last job of a checkpoint: its title -> latent pixels of the base -> seconds, all
# that the job did beside the model's calls included. For as long as the process runs; the browser keeps what it was told.
paces: dict[str, dict[int, float]] = {}


def facts() -> dict[str, Any]:
    """What the readout in the browser is to know and only the server does, as of now. Loads no model.

    paces: those of the checkpoint on this device. native: the side of what it was made for, latent pixels; None while none
    is loaded. memory: None while a job runs, whose memory is free when it is over.
    """
    device = devices.device
    return {
        "checkpoint": shared.opts.sd_model_checkpoint,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "paces": {str(area): seconds for area, seconds in paces.get(shared.opts.sd_model_checkpoint, {}).items()},
        "native": None if host.loaded_model() is None else host.native_side(),
        "memory": None if shared.state.job else _memory(device),
    }


def _memory(device: torch.device) -> dict[str, Any]:
    """What is free, and what a job takes of it, in bytes a latent pixel of the finished image, as `check_fits` counts.

    device, main: [its name, what is free there]. latents, pictures: for each image made at once. features: of decoding
    with the checkpoint's VAE as well as it can be done (`decode`); None where others decode.
    """
    model = host.loaded_model()
    ours = model is not None and may_use_tiles(model)
    channels = tiles.widths(host.coder(model, "decode"))[0] if ours else 0
    return {
        "device": [f"{device.type} memory" if device.type != "cpu" else "main memory", free_memory(device)],
        "main": ["main memory", free_memory(torch.device("cpu"))],
        "latents": latents_bytes((1, 1), 4 if model is None else host.latent_channels()),
        "pictures": PICTURES * picture_bytes((1, 1), FACTOR),
        "features": int(tiles.LIVE_FEATURES * channels * devices.dtype_vae.itemsize) if ours else None,
        "tile": tiles.SMALLEST_TILE,
    }


def add_routes(demo: Any, app: Any) -> None:
    """The host's web server has started: the browser asks for `facts` there, beside the host's own progress."""
    app.add_api_route("/internal/demofusion", facts, methods=["GET"])
