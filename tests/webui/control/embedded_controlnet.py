"""Teaches the ControlNet extension, in a host of the tests, to read the embedded checkpoint's ControlNet.

The extension's hook has places for 12 + 1 + 12 blocks, as Stable Diffusion 1 has, and the embedded UNet is of 6 + 1 + 6; and
it knows no checkpoint but by its file. What is taught is where what the ControlNet makes belongs; the rest is its own.

A browser's host loads this file as the script of an extension, which has only this.
"""

import sys
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch

NAME = "demofusion-embedded-tile"
WIDTHS, GROUPS, CONTEXT, HEADS = (64, 96, 88), 8, 64, 4
BLOCKS = 6  # on each way


class Width(int):
    """A level's width where the multiple of the base's is expected."""

    def __mul__(self, other):
        return int(self)

    __rmul__ = __mul__


def teach(scripts_data):
    """scripts_data: the host's list of the scripts it has loaded. Says whether the extension's is there."""
    modules = [
        vars(data.script_class)["controlnet_main_entry"].__globals__
        for data in scripts_data
        if "controlnet_main_entry" in vars(data.script_class)
    ]
    for module in modules:
        build = module["build_model_by_guess"]
        if build.__name__ != "build":
            module["build_model_by_guess"] = _taught(build)
    return bool(modules)


def _taught(original):
    def build(state_dict, unet, model_path):
        if NAME not in Path(model_path).name:
            return original(state_dict, unet, model_path)
        known = original.__globals__
        network = _network(known["PlugableControlModel"], state_dict)
        return known["ControlModel"](network, known["ControlModelType"].ControlNet)

    return build


def _network(base, state_dict):
    class Embedded(base):
        def forward(self, *args, **kwargs):
            made = super().forward(*args, **kwargs)
            return [made[0].new_zeros(()).expand_as(made[0])] * (12 - BLOCKS) + made

    config = dict(
        in_channels=4,
        model_channels=WIDTHS[0],
        hint_channels=3,
        num_res_blocks=1,
        attention_resolutions=[],
        channel_mult=[Width(width) for width in WIDTHS],
        transformer_depth=[0, 0, 0],
        transformer_depth_middle=0,
        context_dim=CONTEXT,
        num_heads=HEADS,
        use_fp16=False,
    )
    blocks = sys.modules[base.__module__]
    with ExitStack() as stack:
        for part, name, eps in (("ResBlock", "normalization", 1e-5), ("SpatialTransformer", "Normalize", 1e-6)):
            module = sys.modules[getattr(blocks, part).__module__]
            groups = {"normalization": lambda c: torch.nn.GroupNorm(GROUPS, c)}
            groups["Normalize"] = lambda c, eps=eps, **more: torch.nn.GroupNorm(GROUPS, c, eps=eps)
            for patched in {name, "Normalize"} & vars(module).keys():
                stack.enter_context(mock.patch.object(module, patched, groups[patched]))
        network = Embedded(config)
    weights = {name.removeprefix("control_model."): value.float() for name, value in state_dict.items()}
    network.control_model.load_state_dict(weights)
    return network


if "modules.script_callbacks" in sys.modules and __name__ != "embedded_controlnet":  # as a script of the host
    from modules import script_callbacks, scripts

    script_callbacks.on_before_ui(lambda: teach(scripts.scripts_data))
