"""DemoFusion beside the real ControlNet: each view sees its own part of each hint, and nothing of it stays behind."""

import random

import control_host
import control_models
import numpy as np
import pytest
import torch
from PIL import Image
from webui_host import same_but_for_rounding

from lib_demofusion.fusion import pad_edges

host = control_host.host

KINDS = list(control_models.MODELS)
LOCAL = [
    kind for kind in KINDS if control_host.CONTROL_TYPES[kind] not in ("IPAdapter", "T2I_StyleAdapter") and kind != "shuffle"
]


@pytest.fixture
def shown(host, monkeypatch):
    """(views, rows, roll, phase's size, what each unit of the extension has meanwhile) of every call of a phase."""
    seen, show = [], host.webui.controlnet.Hints.shown

    def look(self, views, rows, roll):
        with_hints = show(self, views, rows, roll)

        class Watched:
            def __enter__(self_):
                with_hints.__enter__()
                params = control_host.script(host).latest_network.control_params
                seen.append((list(views), rows, tuple(roll), self.size, [(param, param.used_hint_cond) for param in params]))

            def __exit__(self_, *error):
                return with_hints.__exit__(*error)

        return Watched()

    monkeypatch.setattr(host.webui.controlnet.Hints, "shown", look)
    return seen


def controlled(host, kind, *args, image=None, fields=None, more=(), **payload):
    """The last latents, and the reply's comments in host.comments."""
    size = payload.get("width", 64), payload.get("height", 64)
    units = control_host.units(kind, image or control_host.ramp(*(4 * side for side in size)), **(fields or {}))
    return host.latents(*args, alwayson_scripts=control_host.scripts([*units, *more]), **payload)


# ---------------------------------------------------------------------------------------------------------------------
# Each view sees its own part


def places(size, axis):
    """Of the latent's pixels (H, W), how far along an axis each one lies, [1, 1, H, W], in pixels of the picture."""
    along = (torch.arange(size[axis]) + 0.5) * 8
    return along.view((1, 1, -1, 1) if axis == 0 else (1, 1, 1, -1)).expand(1, 1, *size)


def mean_place(hint, size):
    """Where in the picture of (H, W) latent pixels a ramp [3, h, w] that was seen lies in the mean, (row, column), pixels."""
    column, row = (float(hint[channel].mean()) for channel in (0, 1))
    return row * (8 * size[0] - 1) + 0.5, column * (8 * size[1] - 1) + 0.5


RAMPS = {
    "square": dict(args=(2, {}), size=(64, 64)),
    "2:3": dict(args=(2, {}), size=(64, 96)),
    "1.5": dict(args=(1.5, {}), size=(64, 64)),
    "2.5": dict(args=(2.5, {"stride": 0.7}), size=(64, 64)),
    "4, doubling": dict(args=(4, {"doubling": True, "stride": 0.75}), size=(64, 64)),
    "batch": dict(args=(2, {}), size=(64, 64), batch_size=2),
    "CFG 1": dict(args=(2, {}), size=(64, 64), cfg_scale=1),
    "AND": dict(args=(2, {}), size=(64, 64), prompt="two red rings AND one blue disc"),
    "tiling": dict(args=(2, {}), size=(64, 64), tiling=True),
}


@pytest.mark.parametrize("case", RAMPS)
@pytest.mark.parametrize("kind", ["controlnet", "lllite"])
def test_the_hint_lies_where_the_view_does(host, shown, kind, case):
    """To one pixel, for every view of every step; jitter is on."""
    settings = dict(RAMPS[case])
    (scale, more), (width, height) = settings.pop("args"), settings.pop("size")
    lllite = []
    if kind == "lllite":
        make = host.webui.controlnet.Hints._show

        def look(self, unit, *rest):
            make(self, unit, *rest)
            lllite.append(next(iter(unit.param.control_model.modules.values())).cond_image / 2 + 0.5)

    with pytest.MonkeyPatch.context() as patch:
        if kind == "lllite":
            patch.setattr(host.webui.controlnet.Hints, "_show", look)
        image = control_host.ramp(2 * width, 2 * height)
        controlled(
            host, kind, True, scale, {"phase_steps": 3, **more}, image=image, steps=3, width=width, height=height, **settings
        )
    assert shown
    jittered = set()
    for number, (views, rows, roll, size, units) in enumerate(shown):
        [(_, hint)] = units
        hint = lllite[number] if kind == "lllite" else hint
        assert len(hint) == len(views) * rows
        branches = (1 if settings.get("cfg_scale") == 1 else 2) + (case == "AND")
        assert rows == branches * settings.get("batch_size", 1)
        for view, seen in zip(views, hint.split(rows)):
            assert all(torch.equal(seen[0], other) for other in seen)
            assert seen.shape[-2:] == (height, width)
            grown = []
            for axis in (0, 1):
                place = torch.roll(places(size, axis), roll, (-2, -1))
                padded, _ = pad_edges(place, (height // 8 * view.dilation, width // 8 * view.dilation))
                grown.append(view.crop(place if view.kind == "local" else padded))
            if view.kind == "local":
                jittered.add((view.top, view.left))
            for axis, (expected, actual) in enumerate(zip(grown, mean_place(seen[0], size))):
                assert abs(float(expected.mean()) - actual) <= 1, (view, axis)
    assert len(jittered) > 9


@pytest.mark.parametrize("kind", KINDS)
def test_any_view_batch_makes_the_same_picture(host, kind):
    one, four, every = (
        controlled(host, kind, True, 2, {"phase_steps": 3, "view_batch_size": size}, batch_size=2, steps=3)
        for size in (1, 4, 0)
    )
    without = host.latents(True, 2, {"phase_steps": 3}, batch_size=2, steps=3)
    assert same_but_for_rounding(one, four)
    assert same_but_for_rounding(one, every)
    assert (one - without).std() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_one_call_for_prompts_or_two_make_the_same_picture(host, options, kind):
    """And low VRAM, and a picture by itself or in a batch."""
    settings = dict(steps=3)
    together = controlled(host, kind, True, 2, {"phase_steps": 2}, **settings)
    options(batch_cond_uncond=False)
    assert same_but_for_rounding(controlled(host, kind, True, 2, {"phase_steps": 2}, **settings), together)
    options(batch_cond_uncond=True)
    low = controlled(host, kind, True, 2, {"phase_steps": 2}, fields={"low_vram": True}, **settings)
    assert same_but_for_rounding(low, together)
