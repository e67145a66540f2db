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


def places(size, axis, tiling):
    """Where along an axis each of the latent's pixels (H, W) lies, [1, 1, H, W], as `control_host.ramp` has it in 0..1."""
    along = (torch.arange(size[axis]) + 0.5) / size[axis]
    along = 1 - (2 * along - 1).abs() if tiling else along
    return along.view((1, 1, -1, 1) if axis == 0 else (1, 1, 1, -1)).expand(1, 1, *size)


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


def looking(shown):
    """A hook for all modules, and what control models look at in each call of `shown`, by its number; 0 is the base."""
    looked = []

    def look(module, args):
        if isinstance(module, torch.nn.PixelUnshuffle) or (isinstance(module, torch.nn.Conv2d) and module.in_channels == 3):
            looked.append((len(shown), args[0]))

    return torch.nn.modules.module.register_module_forward_pre_hook(look), looked


@pytest.mark.parametrize("case", RAMPS)
@pytest.mark.parametrize("kind", ["controlnet", "t2i_adapter", "lllite"])
def test_the_hint_lies_where_the_view_does(host, shown, kind, case):
    """To one pixel, for every view of every step, as the model itself looks at it; jitter is on."""
    settings = dict(RAMPS[case])
    (scale, more), (width, height) = settings.pop("args"), settings.pop("size")
    tiling, more = "tiling" in settings, {"phase_steps": 3, **more}
    image = control_host.ramp(2 * width, 2 * height, tiling)
    handle, looked = looking(shown)
    try:
        controlled(host, kind, True, scale, more, image=image, steps=3, width=width, height=height, **settings)
    finally:
        handle.remove()
    assert {number for number, _ in looked} == set(range(len(shown) + 1))
    jittered = set()
    for number, (views, rows, roll, size, _) in enumerate(shown, 1):
        hint, *again = [seen for call, seen in looked if call == number]
        assert all(torch.equal(seen, hint) for seen in again)
        hint = (hint + 1) / 2 if kind == "lllite" else hint
        assert len(hint) == len(views) * rows
        branches = (1 if settings.get("cfg_scale") == 1 else 2) + (case == "AND")
        assert rows == branches * settings.get("batch_size", 1)
        for view, seen in zip(views, hint.split(rows)):
            assert all(torch.equal(seen[0], other) for other in seen)
            assert seen.shape[-2:] == (height, width)
            grown = []
            for axis in (0, 1):
                place = torch.roll(places(size, axis, tiling), roll, (-2, -1))
                padded, _ = pad_edges(place, (height // 8 * view.dilation, width // 8 * view.dilation))
                grown.append(view.crop(place if view.kind == "local" else padded))
            if view.kind == "local":
                jittered.add((view.top, view.left))
            for axis, expected in enumerate(grown):
                error = float(expected.mean() - seen[0, 1 - axis].mean()) * 8 * size[axis]
                assert abs(error) <= (2 if tiling else 1), (view, axis)
    assert len(jittered) > (9 if case == "square" else 3)


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
    """And low VRAM."""
    settings = dict(steps=3)
    together = controlled(host, kind, True, 2, {"phase_steps": 2}, **settings)
    if kind not in ("ip_adapter", "instant_id"):  # whose keys and values of the prompt serve the negative one too, in the base
        options(batch_cond_uncond=False)
        assert same_but_for_rounding(controlled(host, kind, True, 2, {"phase_steps": 2}, **settings), together)
        options(batch_cond_uncond=True)
    low = controlled(host, kind, True, 2, {"phase_steps": 2}, fields={"low_vram": True}, **settings)
    assert same_but_for_rounding(low, together)


def test_units_that_are_off_change_no_bit(host):
    """One that does not say whether it is on is off to the extension."""
    without = host.latents(True, 2, {"phase_steps": 3})
    [off] = control_host.units("controlnet", control_host.ramp(64, 64), enabled=False)
    for unit in (off, {name: value for name, value in off.items() if name != "enabled"}):
        scripts = control_host.scripts([unit])
        assert torch.equal(host.latents(True, 2, {"phase_steps": 3}, alwayson_scripts=scripts), without)


MODES = ["Balanced", "My prompt is more important", "ControlNet is more important"]


@pytest.mark.parametrize("kind", ["controlnet", "t2i_adapter"])
def test_all_control_modes(host, kind, monkeypatch):
    """Where the phases have steps of their own, prompts are told from negative ones as in the base."""
    unet, marks = host.shared.sd_model.model.diffusion_model, []
    hook = control_host.script(host)

    def look(module, args):
        network = hook.latest_network
        if network is not None and hasattr(unet, "cond_mark"):
            marks.append(unet.cond_mark.flatten().tolist())

    handle = unet.input_blocks[0].register_forward_pre_hook(look)
    made = [controlled(host, kind, True, 2, {"phase_steps": 2}, fields={"control_mode": mode}, steps=3) for mode in MODES]
    handle.remove()
    assert marks
    assert all(set(mark) == {0.0, 1.0} for mark in marks)
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert (made[one] - made[other]).std() > 0.01
    whole = controlled(
        host, kind, True, 2, {"phase_steps": 2, "view_batch_size": 1}, fields={"control_mode": MODES[2]}, steps=3
    )
    assert same_but_for_rounding(whole, made[2])


def test_end_counts_the_steps_that_run_of_each_phase(host, monkeypatch):
    called = []

    def look(self, x, hint, timesteps, context, **more):
        called.append(tuple(x.shape[-2:]))
        return forward(self, x, hint, timesteps, context, **more)

    from scripts.cldm import ControlNet

    forward = ControlNet.forward
    monkeypatch.setattr(ControlNet, "forward", look)
    late = {"phase_steps": 10, "denoising_strength": 0.4, "view_batch_size": 16}
    controlled(host, "controlnet", True, 2, late, fields={"guidance_end": 0.2}, steps=4, width=64, height=64)
    # Of four steps in the base and four in the phase the first two, as the host counts a step when it is made.
    assert len(called) == 4


@pytest.mark.parametrize("kind", ["controlnet", "t2i_adapter", "ip_adapter", "shuffle", "instant_id"])
@pytest.mark.parametrize("settings", [{}, {"tiling": True}], ids=["", "tiling"])
def test_a_region_mask_lies_where_the_view_does(host, kind, settings):
    """Half a mask is half the picture's unit; all of it none at all; and any view batch makes the same picture."""

    def made(mask, batch=0):
        fields = {} if mask is None else {"effective_region_mask": encoded_mask(mask)}
        return controlled(host, kind, True, 2, {"phase_steps": 2, "view_batch_size": batch}, fields=fields, steps=3, **settings)

    half = np.zeros((64, 64), np.uint8)
    half[:, 32:] = 255
    whole, masked = made(np.full((64, 64), 255, np.uint8)), made(half)
    assert same_but_for_rounding(whole, made(None))
    assert same_but_for_rounding(made(half, 1), masked)
    assert (masked - whole).std() > 0.01


def encoded_mask(pixels):
    from webui_host import encoded

    return encoded(Image.fromarray(pixels).convert("RGB"))


PAIRS = [("controlnet", "t2i_adapter"), ("lllite", "ip_adapter"), ("controlnet", "controlnet"), ("union", "control_lora")]


@pytest.mark.parametrize("kinds", PAIRS, ids="+".join)
def test_several_units_at_once(host, kinds):
    """Each has its part in it, and any view batch makes the same picture."""
    image = control_host.ramp(256, 256)
    first, more = (control_host.units(kind, image) for kind in kinds)

    def made(units, size=0):
        scripts = control_host.scripts(units)
        return host.latents(True, 2, {"phase_steps": 2, "view_batch_size": size}, steps=3, alwayson_scripts=scripts)

    both = made([*first, *more])
    assert same_but_for_rounding(made([*first, *more], 1), both)
    assert (both - made(first)).std() > 0.01
    assert (both - made(more)).std() > 0.01


def test_each_unit_for_each_image_of_a_batch(host):
    script = control_host.script(host)
    image = control_host.ramp(256, 256)
    two = [control_host.units("controlnet", image)[0], control_host.units("controlnet", image.rotate(180))[0]]
    settings = dict(steps=3, batch_size=2, alwayson_scripts=control_host.scripts(two))
    script.ui_batch_option_state = ["Each ControlNet unit for each image in a batch", False]
    try:
        one, every = (host.latents(True, 2, {"phase_steps": 2, "view_batch_size": size}, **settings) for size in (1, 0))
        assert same_but_for_rounding(one, every)
        host.generate(True, 2, steps=3, alwayson_scripts=control_host.scripts(two))
        assert "2 units do not go into 1 images; set its Batch Option back" in host.comments[0]
    finally:
        script.ui_batch_option_state = ["All ControlNet units for all images in a batch", False]
    together = host.latents(True, 2, {"phase_steps": 2}, **settings)
    assert (together - every).std() > 0.01


MODULES = [
    "canny",
    "invert",
    "blur_gaussian",
    "tile_resample",
    "tile_colorfix",
    "tile_colorfix+sharp",
    "inpaint",
    "scribble_xdog",
]


@pytest.mark.parametrize("module", MODULES)
def test_preprocessors(host, module):
    """Any view batch makes the same picture; and pixel perfect goes by the base's size, as in Hires. fix."""
    image, fields = control_host.ramp(300, 200).rotate(30), {"module": module}
    if module == "inpaint":
        fields["mask"] = encoded_mask(np.pad(np.full((100, 100), 255, np.uint8), ((50, 50), (100, 100))))

    def made(size, **more):
        torch.manual_seed(0)  # tile_colorfix encodes with the noise of all programs, in the base
        settings = {"phase_steps": 2, "view_batch_size": size}
        return controlled(host, "controlnet", True, 2, settings, image=image, fields={**fields, **more}, steps=3)

    every = made(0)
    assert host.comments == []
    assert same_but_for_rounding(made(1), every)
    assert torch.isfinite(made(0, pixel_perfect=True)).all()
    assert host.comments == []


def test_a_preprocessor_is_asked_once_by_all_phases(host, monkeypatch):
    """And once by the extension itself, which keeps nothing of what they find, unless it is told to."""
    from scripts.supported_preprocessor import Preprocessor

    asked, call = [], Preprocessor.cached_call
    monkeypatch.setattr(Preprocessor, "cached_call", lambda self, *args, **more: asked.append(1) or call(self, *args, **more))
    controlled(host, "controlnet", True, 3, {"phase_steps": 1}, fields={"module": "canny"}, steps=2)
    assert host.comments == []
    assert len(asked) == 2


def test_lines_stay_thin_and_colours_unmixed(host, shown):
    """At four times the base's size lines of one pixel are lines of one pixel, and a map has the colours that it had."""
    lines = np.zeros((64, 64, 3), np.uint8)
    lines[::16], lines[:, 8::16] = 255, 255
    colours = np.zeros((64, 64, 3), np.uint8)
    for i in range(4):
        for j in range(4):
            colours[16 * i : 16 * i + 16, 16 * j : 16 * j + 16] = (60 * i, 80 * j, 200)
    for pixels in (lines, colours):
        shown.clear()
        settings = {"phase_steps": 1, "doubling": True, "jitter": False}
        controlled(host, "controlnet", True, 4, settings, image=Image.fromarray(pixels), steps=2)
        known = {tuple(colour) for colour in pixels.reshape(-1, 3).tolist()}
        for views, rows, _, _, [(_, hint)] in shown:
            seen = (hint * 255).round().byte()
            assert {tuple(colour) for colour in seen.permute(0, 2, 3, 1).reshape(-1, 3).unique(dim=0).tolist()} <= known
            if pixels is lines:
                for view, part in zip(views, seen.split(rows)):
                    if view.kind == "local":
                        thick = torch.nn.functional.avg_pool2d((part[:, :1] > 0).float(), 2, stride=1) == 1
                        assert thick.float().mean() < 0.01


# ---------------------------------------------------------------------------------------------------------------------
# From a picture


def from_picture(host, *args, units, **payload):
    """The last latents of a job in img2img."""
    seen, decode = [], host.processing.decode_latent_batch

    def record(model, batch, *rest, **kwargs):
        seen.append(batch.clone())
        return decode(model, batch, *rest, **kwargs)

    picture = control_host.ramp(96, 64).rotate(180)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host.processing, "decode_latent_batch", record)
        host.from_pictures([picture], *args, alwayson_scripts=control_host.scripts(units), **payload)
    return seen[-1], picture


@pytest.mark.parametrize("kind", ["controlnet", "t2i_adapter", "lllite", "shuffle"])
def test_a_unit_without_an_image_takes_the_picture(host, kind):
    args = (True, 2, {"phase_steps": 4, "window": 64})
    without, picture = from_picture(host, *args, units=control_host.units(kind, None))
    given, _ = from_picture(host, *args, units=control_host.units(kind, picture, resize_mode="Just Resize"))
    assert torch.equal(without, given)
    assert (without - from_picture(host, *args, units=[])[0]).std() > 0.01
    assert host.comments == []


def test_the_tabs_size_does_not_matter_to_the_picture(host):
    """The extension has made its hint for that."""
    args = (True, 2, {"phase_steps": 4, "window": 64})
    units = [
        *control_host.units("ip_adapter", None),
        *control_host.units("controlnet", None),
        *control_host.units("shuffle", None),
    ]
    small, _ = from_picture(host, *args, units=units)
    large, _ = from_picture(host, *args, units=units, width=128, height=192)
    assert torch.equal(small, large)


# ---------------------------------------------------------------------------------------------------------------------
# Refused


REFUSED = {  # what the line begins with; a unit's fields
    "ControlNet's reference_only cannot follow windows": dict(model="None", module="reference_only"),
    "ControlNet's reference_adain+attn cannot follow windows": dict(model="None", module="reference_adain+attn"),
    "ControlNet's inpaint_only cannot follow windows": dict(model="sd15_controlnet", module="inpaint_only"),
    "ControlNet's inpaint_only+lama cannot follow windows": dict(model="sd15_controlnet", module="inpaint_only+lama"),
    "ControlNet's recolor_luminance cannot follow windows": dict(model="sd15_controlnet", module="recolor_luminance"),
    "a unit of ControlNet is on, and ControlNet did not begin": dict(model="no such model", module="none"),
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_cannot_follow_is_refused_before_anything_is_computed(host, calls, line):
    unit = control_host.unit(image=control_host.ramp(64, 64), **REFUSED[line])
    reply = host.generate(True, 2, alwayson_scripts=control_host.scripts([unit]))
    assert (reply.images, calls.rows) == ([], 0)
    assert len(host.comments) == 1
    assert host.comments[0].startswith(f"DemoFusion: {line}")
    assert "\n" not in host.comments[0]
    assert host.generate(alwayson_scripts=control_host.scripts([])).images


def test_style_align_is_refused_though_no_unit_is_on(host, calls):
    script = control_host.script(host)
    script.ui_batch_option_state = [script.ui_batch_option_state[0], True]
    try:
        reply = host.generate(True, 2)
    finally:
        script.ui_batch_option_state = [script.ui_batch_option_state[0], False]
    assert (reply.images, calls.rows) == ([], 0)
    assert host.comments[0].startswith("DemoFusion: ControlNet's StyleAlign is on: ")


def test_a_unit_without_an_image_in_txt2img_is_refused(host, calls):
    """There the extension gives up, which the host only tells its console."""
    reply = host.generate(True, 2, alwayson_scripts=control_host.scripts(control_host.units("controlnet", None)))
    assert (reply.images, calls.rows) == ([], 0)
    assert "for want of an image or a model perhaps" in host.comments[0]


def test_a_refiner_is_refused(host, calls):
    units = control_host.units("controlnet", control_host.ramp(64, 64))
    refiner = {"refiner_checkpoint": "refiner.safetensors", "refiner_switch_at": 0.5}
    reply = host.generate(True, 2, alwayson_scripts=control_host.scripts(units), **refiner)
    assert (reply.images, calls.rows) == ([], 0)
    assert host.comments == [
        "DemoFusion: ControlNet hangs on one checkpoint, and the refiner is another; untick one of the two"
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Nothing stays behind


def attributes(host):
    """All that the extension's hook and units hold, deep: numbers as they are, tensors by place and content."""
    network = control_host.script(host).latest_network
    found = {}

    def look(thing, path):
        for name, value in vars(thing).items():
            if isinstance(value, torch.Tensor):
                found[f"{path}.{name}"] = (id(value), value._version, value.detach().clone())
            elif isinstance(value, dict) and not name.startswith("_"):
                found[f"{path}.{name}"] = (id(value), *sorted((str(key), id(item)) for key, item in value.items()))
            else:
                simple = isinstance(value, (int, float, str, bool, tuple, list, type(None)))
                found[f"{path}.{name}"] = repr(value) if simple else id(value)

    look(network, "hook")
    for i, param in enumerate(network.control_params):
        look(param, f"unit {i}")
        for name, module in param.control_model.named_modules():
            look(module, f"unit {i} {name}")
        if param.control_model_type.name == "Controlllite":
            for name, module in param.control_model.modules.items():
                look(module, f"unit {i} {name}")
    for name, module in network.model.named_modules():
        look(module, f"unet {name}")
    return found


def changed(before, after):
    def same(one, other):
        if isinstance(one, tuple) and len(one) == 3 and isinstance(one[2], torch.Tensor):
            return one[0] == other[0] and one[2].shape == other[2].shape and torch.equal(one[2], other[2])
        return one == other

    return [
        name for name in {*before, *after} if name not in before or name not in after or not same(before[name], after[name])
    ]


@pytest.mark.parametrize("seed", range(20))
def test_all_of_the_extension_is_as_it_was(host, monkeypatch, seed):
    """After success, an interrupt, out of memory, an exception, wherever in the phases it happens."""
    draw = random.Random(seed)
    kinds = draw.sample(KINDS, 2)
    before, after, post_sample = [], [], host.webui.loop.post_sample

    def look(p, ps, args, start=None):
        before.append(attributes(host))
        in_phases.append(True)
        post_sample(p, ps, args, start)
        after.append(attributes(host))

    def trouble(module, args):
        if in_phases:
            calls.append(True)
            if len(calls) == at:
                what()

    def out_of_memory():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    def fail():
        raise RuntimeError("on the way")

    in_phases, calls, at = [], [], draw.randrange(1, 7)
    what = [lambda: None, host.shared.state.interrupt, out_of_memory, fail][seed % 4]
    unet = host.shared.sd_model.model.diffusion_model
    places = [unet.input_blocks[0], unet.middle_block, unet.output_blocks[5]]
    monkeypatch.setattr(host.webui.loop, "post_sample", look)
    handle = draw.choice(places).register_forward_pre_hook(trouble)
    try:
        image = control_host.ramp(128, 128)
        units = [unit for kind in kinds for unit in control_host.units(kind, image)]
        settings = {"phase_steps": 2, "view_batch_size": draw.choice([1, 2, 5])}
        host.generate(True, 2, settings, steps=3, alwayson_scripts=control_host.scripts(units))
    finally:
        handle.remove()
    assert len(before) == len(after) == 1
    assert len(calls) >= at
    assert changed(before[0], after[0]) == []
    assert control_host.script(host).latest_network is None
