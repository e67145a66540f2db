"""Other extensions of the WebUI beside this one: what cannot work together is refused in one line, with a way out.

`check` looks for the extensions that are known, before anything is sampled, by the titles of their scripts and by what
their controls say. `check_again`, when every script has had its turn, and `check_latents` see what nobody knows by name:
that another has taken the sampling over, or changed the size. The host's modules are arguments here, and not imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

WINDOWS = "here the model sees windows of the image"


@dataclass(frozen=True)
class Neighbour:
    """A script of another extension that cannot work beside this one.

    title: of the script, letter by letter, but for a bracket behind it. name: as its form calls it. does: what cannot go
    together, in words that follow the name. on: (p, the script, its arguments) -> whether it is asked to do that.
    """

    title: str
    name: str
    does: str
    on: Callable[[Any, Any, Sequence[Any]], bool]


def said(value: Any, *names: str) -> Any:
    """What a dict, or an object, says under the first of the names that it has; None if it has none."""
    for name in names:
        if isinstance(value, dict):
            if name in value:
                return value[name]
        elif hasattr(value, name):
            return getattr(value, name)
    return None


def _ticked(p: Any, script: Any, args: Sequence[Any]) -> bool:
    """The first control is the tick; some take all their settings as one dict instead."""
    first = args[0] if args else None
    return first is True or first == 1 or said(first, "enable", "enabled") is True


def _plotted(name: str) -> Callable[[Any, Any, Sequence[Any]], bool]:
    """Ticked, unless an X/Y/Z plot has said otherwise on p."""

    def on(p: Any, script: Any, args: Sequence[Any]) -> bool:
        return bool(getattr(p, name)) if hasattr(p, name) else _ticked(p, script, args)

    return on


def _regions(p: Any, script: Any, args: Sequence[Any]) -> bool:
    """Ticked, or set to work by its other script, which makes films."""
    return bool(getattr(p, "rps_diff", False)) or _ticked(p, script, args)


NEIGHBOURS = [
    Neighbour("Tiled Diffusion", "Tiled Diffusion", "it samples in tiles of its own", _ticked),
    Neighbour("demofusion", "the DemoFusion of Tiled Diffusion", "it enlarges the image too", _ticked),
    Neighbour("Regional Prompter", "Regional Prompter", f"its regions are those of the whole, and {WINDOWS}", _regions),
    Neighbour(
        "Self Attention Guidance",
        "Self Attention Guidance",
        f"it reads the attention of the whole image, and {WINDOWS}",
        _ticked,
    ),
    Neighbour("AnimateDiff", "AnimateDiff", "it makes the images of a batch the frames of one film", _ticked),
    Neighbour(
        "Dynamic Thresholding (CFG Scale Fix)",
        "Dynamic Thresholding",
        "it puts samplers of its own in place of the host's",
        _plotted("dynthres_enabled"),
    ),
    # Those that hosts of the Forge family have built in.
    Neighbour("MultiDiffusion Integrated", "MultiDiffusion", "it samples in tiles of its own", _ticked),
    Neighbour(
        "SelfAttentionGuidance Integrated",
        "Self Attention Guidance",
        f"it reads the attention of the whole image, and {WINDOWS}",
        _ticked,
    ),
    Neighbour("StyleAlign Integrated", "StyleAlign", f"it joins all that the model sees in a call, and {WINDOWS}", _ticked),
    Neighbour("Forge Couple", "Forge Couple", f"its regions are those of the whole, and {WINDOWS}", _ticked),
    Neighbour(
        "First Block Cache / TeaCache Integrated",
        "First Block Cache",
        f"it keeps what the model has made of one call for the next, and {WINDOWS}",
        _ticked,
    ),
    Neighbour("Soft Inpainting", "Soft Inpainting", "it blends at the base's size, and not at the phases'", _ticked),
]


def check(p: Any, own: str) -> None:
    """Raises ValueError, one line, if a script of p that is known not to work beside this one is on. own: our name."""
    for script, args in scripts_of(p):
        title = script.title()
        for known in NEIGHBOURS:
            if (title == known.title or title.startswith(f"{known.title} (")) and known.on(p, script, args):
                raise ValueError(f"{known.name} is on: {known.does}; untick it, or {own}")


def scripts_of(p: Any) -> Iterator[tuple[Any, Sequence[Any]]]:
    """The scripts that are to run for p, with their arguments: those always there, and the one that is chosen."""
    runner, given = getattr(p, "scripts", None), p.script_args
    if not runner or not given:
        return
    scripts = list(runner.alwayson_scripts)
    chosen = given[0] if isinstance(given[0], int) else 0
    selectable = getattr(runner, "selectable_scripts", [])
    if 0 < chosen <= len(selectable):
        scripts.append(selectable[chosen - 1])
    for script in scripts:
        yield script, given[script.args_from : script.args_to]


# Scripts of the list in img2img that make whole pictures one after the other, as if each had been asked for by itself.
PLAIN_SCRIPTS = ("X/Y/Z plot", "Prompts from file or textbox", "Prompt matrix")


def check_chosen(p: Any, own: str) -> None:
    """Raises ValueError, one line, if the script that is chosen in img2img's list enlarges, or draws again and again."""
    for script, _ in scripts_of(p):
        if script not in p.scripts.alwayson_scripts and script.title() not in PLAIN_SCRIPTS:
            what = f"the script {script.title()} is chosen, which samples parts of pictures, or again and again"
            raise ValueError(f"{what}; choose None there, or untick {own}")


def is_inner(p: Any, is_img2img: bool) -> bool:
    """Whether p is another extension's pass over a finished image, as ADetailer's, that carries our script along.

    is_img2img: whether our script is img2img's. p is inner as well where it is a copy, or a new one, of another extension
    in the midst of the job that the user asked for: the host's function for a job is running for another p.
    """
    if getattr(p, "_ad_inner", False) or hasattr(p, "init_images") != is_img2img:
        return True
    job, frame = None, sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "process_images_inner" and "p" in frame.f_locals:
            job = frame.f_locals["p"]  # in the end that of the outermost
        frame = frame.f_back
    return job is not None and job is not p


def stands_aside_for(p: Any) -> str | None:
    """What the user has asked another extension for instead of a picture of this job; None where that is nothing."""
    return "ADetailer's Skip img2img" if getattr(p, "_ad_skip_img2img", False) else None


def check_again(p: Any) -> None:
    """Raises ValueError, one line, if an extension has put a sampling of its own into this job.

    That it has wrapped what makes the host's samplers says nothing: there are those that work, Neutral Prompt for one.
    """
    _refuse_replaced(_beneath_controlnet(p, "sample"))


def check_sampler(sampler: Any) -> None:
    """The same of a sampler just made, and of what it calls."""
    denoiser = sampler.model_wrap_cfg
    own = [vars(sampler).get("sample"), vars(sampler).get("sample_img2img")]
    _refuse_replaced(*own, vars(denoiser).get("forward"), vars(denoiser.inner_model).get("forward"))


def _refuse_replaced(*functions: Callable | None) -> None:
    for function in functions:
        extension = _extension_of(function)
        if extension:
            raise ValueError(f"the extension {extension} has replaced the host's sampling, and {WINDOWS}; switch it off")


def note_on(model: Any, unet: Any) -> str | None:
    """What the user should know of a model that an extension has changed in a way that may be right or wrong here."""
    for function in (vars(model).get("apply_model"), _beneath_controlnet(unet, "forward")):
        extension = _extension_of(function)
        if extension:
            return f"the extension {extension} has changed the model, and {WINDOWS}; if that does not fit, switch it off"
    return None


def check_latents(latents: Tensor, size: tuple[int, int], factor: int) -> None:
    """Raises ValueError, one line, if base latents [B, C, h, w] are not of the (h, w) that the phases are planned for."""
    made = tuple(latents.shape[-2:])
    if made != tuple(size):
        (h, w), (height, width) = ([side * factor for side in sides] for sides in (made, size))
        raise ValueError(f"another extension has made the base {w}x{h}, and not {width}x{height}; switch it off")


# Where ControlNet, which is known (`controlnet`), keeps what it has put its own in place of.
KEPT_BY_CONTROLNET = {"sample": "sample_before_CN_hack", "forward": "_original_forward"}


def _beneath_controlnet(thing: Any, name: str) -> Any:
    """What a thing has of its own under a name, without ControlNet's hook on it; None if nothing."""
    own = vars(thing).get(name)
    hooked = getattr(getattr(own, "__func__", own), "__qualname__", "").startswith("UnetHook.hook.")
    return vars(thing).get(KEPT_BY_CONTROLNET[name]) if hooked else own


def _extension_of(function: Any) -> str | None:
    """The folder of the extension whose code a function is; None if it is no extension's."""
    while hasattr(function, "func"):  # a partial
        function = function.func
    function = getattr(function, "__func__", function)
    if not hasattr(function, "__code__") or str(function.__module__).startswith("modules."):
        return None
    parts = Path(function.__code__.co_filename).parts
    if "extensions" not in parts[:-1]:
        return None
    return parts[len(parts) - parts[::-1].index("extensions")]
