"""The units of the extension ControlNet (sd-webui-controlnet) in a job: which are on, what they are, and which are refused.

Types are told by the names of the extension's own enumeration, so that nothing of it is imported here. `check` sees what is
asked for, before any script has had its turn; `check_hooked` what the extension has made of it. The host's modules are
arguments here, and not imported. What the units show to the views is in `controlnet`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lib_demofusion.hosts.webui.neighbours import WINDOWS, said, scripts_of

# What follows the image pixel by pixel: a view gets its part of the hint.
LOCAL = {"ControlNet", "ControlLoRA", "ControlNetUnion", "InstantID", "T2I_Adapter", "Controlllite"}
# What says something of the image as a whole: every view gets all of it.
GLOBAL = {"IPAdapter", "T2I_StyleAdapter", "ReVision"}

UNKNOWN = "this version of ControlNet is not one that it knows; switch the unit off, or DemoFusion"
INSTEAD = "switch that unit off, or DemoFusion"
NOT_BEGUN = (
    "a unit of ControlNet is on, and ControlNet did not begin, for want of an image or a model perhaps, as the console says; "
    "mend that, or switch the unit off"
)
NO_IMAGE = (
    "a unit of ControlNet has no image of its own and would show the first picture to all of them; give it one, or send each "
    "picture by itself"
)
# Preprocessors whose effect is no control image, by what their names begin with or hold: what they do.
WHOLE = {
    "reference": "it draws with the attention of the whole image",
    "inpaint_only": "it puts the image around the mask back at the base's size",
    "recolor": "it puts the image's brightness back at the base's size",
}
WAYS_OUT = {"inpaint_only": "choose inpaint_global_harmonious, or img2img's Inpaint, "}


def script_of(p: Any) -> tuple[Any, Sequence[Any]]:
    """The extension's script in the job p, and its arguments; None and nothing where it is not there."""
    for script, args in scripts_of(p):
        if script.title().lower() == "controlnet":
            return script, args
    return None, ()


def hook_of(p: Any) -> Any:
    """The extension's hook on the UNet for the job p; None where no unit is on."""
    return getattr(script_of(p)[0], "latest_network", None)


def refines(p: Any) -> bool:
    """Whether p asks for a refiner."""
    return getattr(p, "refiner_checkpoint", None) not in (None, "", "None", "none")


def asked(args: Sequence[Any]) -> list[Any]:
    """The units among the script's arguments that say they are on; what becomes of others the extension decides."""
    units = [unit for unit in args if unit is not None and not isinstance(unit, (bool, str))]
    return [unit for unit in units if said(unit, "enabled") in (True, 1)]


def check(p: Any, own_checkpoint: bool = False) -> None:
    """Before any script has had its turn. Raises ValueError, one line, for what cannot work, as far as it is asked for.

    own_checkpoint: whether the phases after the base have another one.
    """
    script, args = script_of(p)
    state = getattr(script, "ui_batch_option_state", None)
    if isinstance(state, (list, tuple)) and len(state) > 1 and state[1] is True:  # needs no unit, and is no argument
        raise ValueError(
            f"ControlNet's StyleAlign is on: it joins all that the model sees in a call, and {WINDOWS}; untick it "
            "under ControlNet's Batch Options, or DemoFusion"
        )
    wanted = asked(args)
    if wanted and refines(p):
        raise ValueError("ControlNet hangs on one checkpoint, and the refiner is another; untick one of the two")
    if wanted and own_checkpoint:
        raise ValueError(
            "ControlNet hangs on one checkpoint, and the phases have another; choose none for them, or switch the unit off"
        )
    for unit in wanted:
        name = str(said(unit, "module") or "none").lower()
        if name == "inpaint_only" and getattr(p, "image_mask", None) is not None:
            continue  # there the extension itself makes it inpaint_global_harmonious
        _check_preprocessor(name)


def _check_preprocessor(name: str) -> None:
    for part, does in WHOLE.items():
        if name.startswith(part):
            way_out = f"{WAYS_OUT.get(part, 'choose another preprocessor, ')}{INSTEAD}"
            raise ValueError(f"ControlNet's {name} cannot follow windows, since {does}; {way_out}")


def check_hooked(p: Any, pictures: int = 0) -> None:
    """Every script has had its turn. Raises ValueError, one line, for units whose hints the views cannot follow.

    pictures: how many are given to start from.
    """
    script, args = script_of(p)
    network = hook_of(p)
    if network is None:
        if asked(args):
            raise ValueError(NOT_BEGUN)
        return
    _check_version(script, network)
    units, params = list(script.enabled_units), list(network.control_params or [])
    if network.model is not p.sd_model.model.diffusion_model:
        raise ValueError("ControlNet hangs on another checkpoint than the loaded one; load the checkpoint again")
    for unit, param in zip(units, params):
        _check_unit(unit, param, p.sd_model)
        if pictures > 1 and getattr(unit, "image", None) is None:
            raise ValueError(NO_IMAGE)
    separate = "Each ControlNet unit for each image in a batch"
    state = getattr(script, "ui_batch_option_state", None) or [None]
    if params and state[0] == separate and p.batch_size % len(params):
        raise ValueError(
            f"ControlNet's units are each for one image of a batch, and {len(params)} units do not go into {p.batch_size} "
            "images; set its Batch Option back, or the batch size to as many"
        )


# What `controlnet` calls, by the object in whose class's module it lies, and the method by which that is found.
CALLED = {
    "controlnet_main_entry": ("get_control", "get_pytorch_control", "Preprocessor", "ResizeMode"),
    "hook": ("mark_prompt_context",),
}


def module_of(thing: Any, method: str) -> dict[str, Any]:
    """The module of the extension that a method of one of its objects was written in, by names.

    The host loads scripts without a place in `sys.modules`.
    """
    return getattr(getattr(type(thing), method, None), "__globals__", {})


def _check_version(script: Any, network: Any) -> None:
    for thing, method in ((script, "controlnet_main_entry"), (network, "hook")):
        if not module_of(thing, method).keys() >= set(CALLED[method]):
            raise ValueError(UNKNOWN)
    if len(getattr(script, "enabled_units", ())) != len(network.control_params or ()):
        raise ValueError(UNKNOWN)


def _check_unit(unit: Any, param: Any, model: Any) -> None:
    _check_preprocessor(param.preprocessor["name"])
    kind = param.control_model_type.name
    if kind not in LOCAL | GLOBAL:
        raise ValueError(f"ControlNet's type {kind} looks at the whole image, and {WINDOWS}; {INSTEAD}")
    hint = param.hint_cond
    if kind in GLOBAL:
        return
    films = type(getattr(param.control_model, "control_model", None)).__name__ == "SparseCtrl"
    if films or getattr(unit, "is_animate_diff_batch", False) or not isinstance(hint, Tensor) or len(hint) != 1:
        raise ValueError(f"a unit of ControlNet is for the frames of a film, SparseCtrl or AnimateDiff; {INSTEAD}")
    if hint.ndim != 4 or hint.shape[1] not in (3, 4):
        raise ValueError(f"ControlNet's unit {unit.module} has a hint of a kind that it does not know; {INSTEAD}")
    inputs = getattr(getattr(model.model, "diffusion_model", None), "in_channels", None)
    if hint.shape[1] == 4 and inputs == 9:
        raise ValueError(
            "ControlNet's inpaint changes what an inpainting checkpoint sees, and does so for the whole image; use img2img's "
            f"Inpaint without the unit, or another checkpoint, or {INSTEAD}"
        )
