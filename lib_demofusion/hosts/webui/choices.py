"""What the form offers where a setting is a choice of one of the host's lists: what the host's Hires. fix offers, too."""

from __future__ import annotations

from lib_demofusion.hosts.webui.settings import SAME


def _samplers() -> list[str]:
    from modules import sd_samplers

    return sd_samplers.visible_sampler_names()


def _schedules() -> list[str]:
    from modules import sd_schedulers

    return [scheduler.label for scheduler in sd_schedulers.schedulers]


def _checkpoints() -> list[str]:
    from modules import sd_models

    return sd_models.checkpoint_tiles(use_short=True)


def _upscalers() -> list[str]:
    from modules import shared

    return [*shared.latent_upscale_modes, *(upscaler.name for upscaler in shared.sd_upscalers)]


LISTS = {
    "phase_sampler": _samplers,
    "phase_schedule": _schedules,
    "phase_checkpoint": _checkpoints,
    "upscaler": _upscalers,
}


def choices(name: str) -> list[str]:
    """Of one of SAME's settings: as the base, and then the host's list, as of now; nothing more where the host has none."""
    try:
        offered = LISTS[name]()
    except (ImportError, AttributeError, TypeError):  # a host of another version
        offered = []
    return list(dict.fromkeys([SAME[name], *offered]))


def refresh_checkpoints() -> None:
    """Look for checkpoints that have come to the host's folders, or have left them."""
    from modules import sd_models

    sd_models.list_models()
