"""Beside ControlNet, on stand-ins for it and for the host; beside the real one in tests/webui."""

import random
from types import SimpleNamespace

import fake_controlnet
import numpy as np
import pytest
import torch
from fake_controlnet import ControlNetUnit
from PIL import Image
from webui_fixtures import refusal, snapshot

from lib_demofusion.fusion import pad_edges
from lib_demofusion.hosts.webui import units


def ramp(height, width, tiling=False):
    """uint8 [height, width, 3]: red grows downwards, green to the right; as far as the middle, where it tiles."""
    rows, columns = (_up(side, tiling) for side in (height, width))
    return np.stack(np.broadcast_arrays(rows[:, None], columns[None], np.uint8(128)), 2).copy()


def _up(side, tiling):
    along = (np.arange(side) + 0.5) / side
    return np.round(255 * (1 - np.abs(2 * along - 1) if tiling else along)).astype(np.uint8)


SMALL = {"window": 64}


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


@pytest.fixture
def controlnet(host):
    """The extension, after ours in the order of scripts."""
    return fake_controlnet.install(host)


def generate(host, *args, unit=None, more=(), **settings):
    """A job with these units."""
    p = host.processing_for(*args, **settings)
    runner = p.scripts
    script = next(script for script in runner.alwayson_scripts if script.title() == "ControlNet")
    for i, value in enumerate([] if unit is None else [unit, *more]):
        p.script_args[script.args_from + i] = value
    host.processing_for = lambda *args, **settings: p
    try:
        return host.generate()
    finally:
        del host.processing_for


# ---------------------------------------------------------------------------------------------------------------------
# Each view sees its own part


@pytest.fixture
def shown(host, monkeypatch):
    """(views, rows, roll, the phase's size, the first unit's param) of each call of a phase, while it lasts."""
    seen, show = [], host.webui.controlnet.Hints._show

    def look(self, unit, views, rows, roll, put):
        show(self, unit, views, rows, roll, put)
        seen.append((list(views), rows, tuple(roll), self.size, unit.param, unit.param.used_hint_cond))

    monkeypatch.setattr(host.webui.controlnet.Hints, "_show", look)
    return seen


CASES = {
    "square": ((2, {}), (64, 64), {}),
    "2:3": ((2, {}), (64, 96), {}),
    "1.5": ((1.5, {}), (64, 64), {}),
    "2.5": ((2.5, {"stride": 0.7}), (64, 64), {}),
    "4": ((4, {"doubling": True}), (64, 64), {}),
    "batch": ((2, {}), (64, 64), {"batch_size": 2}),
    "tiling": ((2, {}), (64, 96), {"tiling": True}),
    "CFG 1": ((2, {}), (64, 64), {"cfg_scale": 1}),
    "AND": ((2, {}), (64, 64), {"prompt": "a ring AND a disc"}),
    "second pass": ((2, {"phase_sampler": "DDIM", "phase_cfg_scale": 1.0, "phase_prompt": "a disc"}), (64, 64), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_hint_lies_where_the_view_does(host, controlnet, shown, case):
    (scale, more), (height, width), settings = CASES[case]
    tiling = "tiling" in settings
    unit = ControlNetUnit(image=ramp(8 * height, 8 * width, tiling))
    generate(host, True, scale, {"phase_steps": 3, **more}, unit=unit, height=height, width=width, steps=3, **settings)
    assert shown
    for views, rows, roll, size, _, hint in shown:
        assert hint.shape == (len(views) * rows, 3, height, width)
        for view, seen in zip(views, hint.split(rows)):
            assert all(torch.equal(seen[0], other) for other in seen)
            for axis in (0, 1):
                along = (torch.arange(size[axis]) + 0.5) / size[axis]
                along = 1 - (2 * along - 1).abs() if tiling else along
                place = along.view((1, 1, -1, 1) if axis == 0 else (1, 1, 1, -1)).expand(1, 1, *size)
                place = torch.roll(place, roll, (-2, -1))
                grown, _ = pad_edges(place, (height // 8 * view.dilation, width // 8 * view.dilation))
                expected = float(view.crop(place if view.kind == "local" else grown).mean())
                assert abs(expected - float(seen[0, axis].mean())) * 8 * size[axis] <= (2 if tiling else 1)


KINDS = {
    "ControlNet": {},
    "ControlNetUnion": {},
    "more important": {"kind": "ControlNet", "control": True},
    "pooled": {"kind": "ControlNet", "pooled": True},
    "mask": {"kind": "ControlNet", "mask": noise(40, 40)},
    "inpaint": {"kind": "ControlNet", "module": "inpaint", "image": noise(100, 100, 4)},
    "colorfix": {"kind": "ControlNet", "module": "tile_colorfix"},
    "invert": {"kind": "ControlNet", "module": "invert"},
    "T2I_Adapter": {},
    "T2I_Adapter, more important": {"kind": "T2I_Adapter", "control": True},
    "Controlllite": {},
    "IPAdapter": {},
    "IPAdapter with a mask": {"kind": "IPAdapter", "mask": noise(40, 40)},
}


def of_kind(name):
    return ControlNetUnit(**{"kind": name, "image": noise(128, 128), **KINDS[name]})


@pytest.mark.parametrize("name", KINDS)
def test_any_view_batch_makes_the_same_picture(host, controlnet, name):
    """And where the host asks for the prompts one by one; and the hint has its part in it."""
    made = [
        generate(host, True, 2, {"phase_steps": 3, "view_batch_size": size}, unit=of_kind(name), batch_size=2).latents[0]
        for size in (1, 4, 0)
    ]
    host.shared.opts.batch_cond_uncond = False
    if "IPAdapter" not in name:  # which then takes the prompt's for both, of itself, in the base
        made.append(generate(host, True, 2, {"phase_steps": 3}, unit=of_kind(name), batch_size=2).latents[0])
    for other in made[1:]:
        torch.testing.assert_close(other, made[0])
    assert (made[0] - generate(host, True, 2, {"phase_steps": 3}, batch_size=2).latents[0]).abs().mean() > 0.01


@pytest.mark.parametrize("name", KINDS)
def test_several_units_are_as_one_of_their_sum(host, controlnet, name):
    both = generate(host, True, 2, unit=of_kind(name), more=[of_kind("ControlNet")]).latents[0]
    other = generate(host, True, 2, unit=of_kind("ControlNet"), more=[of_kind(name)]).latents[0]
    torch.testing.assert_close(both, other, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both, generate(host, True, 2, unit=of_kind(name)).latents[0])


def test_units_that_are_off_change_no_bit(host):
    without = host.generate(True, 2).latents[0]
    fake_controlnet.install(host)
    assert torch.equal(host.generate(True, 2).latents[0], without)
    assert torch.equal(generate(host, True, 2, unit=ControlNetUnit(enabled=False)).latents[0], without)


def test_the_base_is_the_extensions_own(host, controlnet):
    base = generate(host, False, unit=of_kind("ControlNet")).latents[0]
    with_phases, seen = None, []
    host.script_callbacks.on_cfg_denoiser(lambda params: None)
    post_sample = host.webui.loop.post_sample

    def look(p, ps, args, start=None):
        seen.append(ps.samples.clone())
        post_sample(p, ps, args, start)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host.webui.loop, "post_sample", look)
        with_phases = generate(host, True, 2, unit=of_kind("ControlNet")).latents[0]
    assert torch.equal(seen[0], base)
    assert with_phases.shape[-1] == 2 * base.shape[-1]


@pytest.mark.parametrize("settings", [{"phase_steps": 3}, {"phase_prompt": "a disc"}, {"phase_negative_prompt": "green"}])
def test_the_negative_prompt_is_told_from_the_prompt_in_every_phase(host, controlnet, monkeypatch, settings):
    """Where the phases have steps or prompts of their own, the host sets conditions up anew, without the extension's marks."""
    marks, forward = [], type(host.unet).forward

    def look(unet, *args):
        marks.append(unet.cond_mark.flatten().tolist())
        return forward(unet, *args)

    monkeypatch.setattr(type(host.unet), "forward", look)
    generate(host, True, 2, {**settings, "view_batch_size": 1}, unit=of_kind("more important"), steps=5)
    assert marks
    assert all(mark == [1, 0] for mark in marks)


def test_start_and_end_count_the_steps_of_each_phase(host, controlnet, shown):
    """As in Hires. fix: a phase that is entered late has all of its steps."""
    unit = ControlNetUnit(image=noise(64, 64), end=0.2)
    reply = generate(host, True, 2, {"phase_steps": 10, "denoising_strength": 0.4, "view_batch_size": 64}, unit=unit, steps=4)
    [param] = {id(entry[4]): entry[4] for entry in shown}.values()
    assert len(shown) == 4
    assert len(param.seen) == 2 + 2  # the host counts a step when it is made
    assert reply.sizes == [(16, 16)]


def test_a_unit_without_an_image_takes_the_picture(host):
    controlnet = fake_controlnet.install(host, img2img=True)
    picture = Image.fromarray(noise(96, 96))
    own = generate(host, True, 2, SMALL, unit=ControlNetUnit(image=np.asarray(picture)), init_images=[picture]).latents[0]
    assert torch.equal(generate(host, True, 2, SMALL, unit=ControlNetUnit(), init_images=[picture]).latents[0], own)
    assert not torch.equal(generate(host, True, 2, SMALL, init_images=[picture]).latents[0], own)
    assert controlnet.failed is None
    line = refusal(
        generate(host, True, 2, SMALL, unit=ControlNetUnit(), init_images=[picture, picture.rotate(90)], batch_size=2)
    )
    assert line.startswith("a unit of ControlNet has no image of its own and would show the first picture to all of them;")


def test_a_preprocessor_is_asked_once_by_all_phases(host, controlnet, monkeypatch):
    """And once by the extension itself. Many are networks, and the extension keeps nothing of what they find."""
    monkeypatch.setattr(fake_controlnet.Preprocessor, "asked", 0)
    generate(host, True, 4, unit=of_kind("invert"), more=[of_kind("ControlNet")])
    assert fake_controlnet.Preprocessor.asked == 4


@pytest.mark.parametrize("first", [True, False])
def test_the_order_of_the_scripts_does_not_matter(host, first):
    picture = Image.fromarray(noise(96, 64))
    controlnet = fake_controlnet.install(host, first=first, img2img=True)
    reply = generate(
        host, True, 2, SMALL, unit=of_kind("IPAdapter with a mask"), more=[of_kind("pooled")], init_images=[picture]
    )
    assert reply.sizes == [(24, 16)]
    assert controlnet.failed is None
    assert host.reports == []


# ---------------------------------------------------------------------------------------------------------------------
# Nothing stays behind


def everything(controlnet, host):
    """What the extension's objects hold, deep, by names; tensors and objects by themselves."""
    found = {}

    def look(thing, path):
        for name, value in vars(thing).items():
            if name in ("seen", "model", "_forward_pre_hooks") or name.startswith("_"):
                continue
            if isinstance(value, dict):
                found[f"{path}.{name}"] = {key: id(item) for key, item in value.items()}
            elif isinstance(value, (torch.Tensor, np.ndarray)):
                found[f"{path}.{name}"] = (id(value), value.clone() if isinstance(value, torch.Tensor) else value.copy())
            else:
                found[f"{path}.{name}"] = value if isinstance(value, (int, float, str, bool, tuple, list)) else id(value)

    network = controlnet.latest_network
    look(network, "hook")
    for i, param in enumerate(network.control_params):
        look(param, f"unit {i}")
        look(param.control_model, f"model {i}")
        for name, module in (
            getattr(param.control_model, "modules", {}).items() if param.control_model.kind == "Controlllite" else ()
        ):
            look(module, f"model {i} {name}")
    look(host.unet, "unet")
    return found


def same(before, after):
    return before.keys() == after.keys() and all(_same(value, after[name]) for name, value in before.items())


def _same(one, other):
    if isinstance(one, tuple) and len(one) == 2 and isinstance(one[1], torch.Tensor):
        return one[0] == other[0] and torch.equal(one[1], other[1])
    if isinstance(one, tuple) and len(one) == 2 and isinstance(one[1], np.ndarray):
        return one[0] == other[0] and np.array_equal(one[1], other[1])
    return one == other


class Trouble(Exception):
    pass


def out_of_memory():
    raise torch.cuda.OutOfMemoryError("CUDA out of memory")


def fail():
    raise Trouble("on the way")


@pytest.mark.parametrize("seed", range(20))
def test_all_of_the_extension_is_as_it_was(host, controlnet, monkeypatch, seed, at_call):
    """After success, an interrupt, out of memory, an exception, wherever it happens."""
    draw = random.Random(seed)
    names = draw.sample(list(KINDS), 2)
    before, after, post_sample = [], [], host.webui.loop.post_sample

    def look(p, ps, args, start=None):
        before.append(everything(controlnet, host))
        post_sample(p, ps, args, start)
        after.append(everything(controlnet, host))

    monkeypatch.setattr(host.webui.loop, "post_sample", look)
    what = [None, host.shared.state.interrupt, out_of_memory, fail][seed % 4]
    if what is not None:
        at_call(draw.randrange(5, 20), what)
    was = snapshot(host)
    generate(host, True, 2, {"phase_steps": 3, "view_batch_size": 2}, unit=of_kind(names[0]), more=[of_kind(names[1])], steps=4)
    assert len(before) == len(after) == 1
    assert same(before[0], after[0])
    host.shared.state.interrupted = False
    now = snapshot(host)
    assert now["classes"] == was["classes"]
    assert now["circular"] == was["circular"]
    assert fake_controlnet.get_pytorch_control.__name__ == "get_pytorch_control"


# ---------------------------------------------------------------------------------------------------------------------
# Refused


def job(*args, state=("All ControlNet units for all images in a batch", False), **fields):
    script = SimpleNamespace(title=lambda: "ControlNet", args_from=1, args_to=1 + len(args), ui_batch_option_state=state)
    return SimpleNamespace(scripts=SimpleNamespace(alwayson_scripts=[script]), script_args=(0, *args), **fields)


def on(module, **fields):
    return [SimpleNamespace(enabled=True, module=module, **fields), {"enabled": True, "module": module}]


ATTENTION = (
    "since it draws with the attention of the whole image; choose another preprocessor, switch that unit off, or DemoFusion"
)
REFUSED = {
    "reference_only": ATTENTION,
    "reference_adain": ATTENTION,
    "reference_adain+attn": ATTENTION,
    "inpaint_only": "since it puts the image around the mask back at the base's size; choose inpaint_global_harmonious, or "
    "img2img's Inpaint, switch that unit off, or DemoFusion",
    "recolor_luminance": "since it puts the image's brightness back at the base's size; choose another preprocessor, switch "
    "that unit off, or DemoFusion",
}
REFUSED["inpaint_only+lama"] = REFUSED["inpaint_only"]
REFUSED["recolor_intensity"] = REFUSED["recolor_luminance"]


@pytest.mark.parametrize("module", REFUSED)
def test_preprocessors_that_are_no_control_image_are_refused(module):
    for unit in on(module):
        with pytest.raises(ValueError, match="^ControlNet's ") as caught:
            units.check(job(None, unit))
        assert str(caught.value) == f"ControlNet's {module} cannot follow windows, {REFUSED[module]}"
    off = SimpleNamespace(enabled=False, module=module), {"enabled": False, "module": module}, {"module": module}
    units.check(job(*off, None, True, "text"))


def test_other_preprocessors_are_left_alone():
    for module in (
        "none",
        "canny",
        "tile_resample",
        "tile_colorfix",
        "inpaint",
        "depth_midas",
        "ip-adapter_clip_sd15",
        "invert",
    ):
        for unit in on(module):
            units.check(job(unit))


def test_inpaint_only_in_img2img_is_made_another_by_the_extension():
    [unit, *_] = on("inpaint_only")
    units.check(job(unit, init_images=[1], image_mask=object()))
    with pytest.raises(ValueError, match="inpaint_only"):
        units.check(job(unit, init_images=[1], image_mask=None))


@pytest.mark.parametrize("args", [(), (SimpleNamespace(enabled=False),)])
def test_style_align_needs_no_unit(args):
    line = "^ControlNet's StyleAlign is on: .*; untick it under ControlNet's Batch Options, or DemoFusion$"
    with pytest.raises(ValueError, match=line):
        units.check(job(*args, state=["Default", True]))
    for state in (("Default", False), (), None):
        units.check(job(*args, state=state))


def test_a_refiner_is_refused_where_a_unit_is_on():
    line = "^ControlNet hangs on one checkpoint, and the refiner is another; untick one of the two$"
    with pytest.raises(ValueError, match=line):
        units.check(job(*on("none"), refiner_checkpoint="a.safetensors"))
    units.check(job({"enabled": False}, refiner_checkpoint="a.safetensors"))
    for none in (None, "", "None"):
        units.check(job(*on("none"), refiner_checkpoint=none))


KNOWN_LATER = {
    "ControlNet's type AttentionInjection looks at the whole image": dict(kind="AttentionInjection"),
    "ControlNet's type StableSR looks at the whole image": dict(kind="StableSR"),
    "a unit of ControlNet is for the frames of a film, SparseCtrl or AnimateDiff": dict(is_animate_diff_batch=True),
}


@pytest.mark.parametrize("line", KNOWN_LATER)
def test_what_the_extension_finds_in_a_model_is_refused_before_anything_is_computed(host, controlnet, calls, line):
    reply = generate(host, True, 2, unit=ControlNetUnit(image=noise(64, 64), **KNOWN_LATER[line]))
    assert refusal(reply).startswith(line)
    assert calls.rows == 0


def test_frames_and_hints_of_other_kinds_are_refused(host, controlnet, calls):
    films, unknown = "a unit of ControlNet is for the frames of a film", "ControlNet's unit none has a hint of a kind that it"
    for hint, line in ((torch.zeros(2, 3, 64, 64), films), (torch.zeros(1, 5, 64, 64), unknown), ([1], films)):
        controlnet.then = lambda network, hint=hint: setattr(network.control_params[0], "hint_cond", hint)
        assert refusal(generate(host, True, 2, unit=ControlNetUnit(image=noise(64, 64)))).startswith(line)
    controlnet.then = lambda network: setattr(network.control_params[0].control_model, "control_model", SparseCtrl())
    assert refusal(generate(host, True, 2, unit=ControlNetUnit(image=noise(64, 64)))).startswith(films)
    assert calls.rows == 0


class SparseCtrl:
    pass


def test_a_unit_with_which_the_extension_did_not_begin_is_refused(host, controlnet, calls):
    line = refusal(generate(host, True, 2, unit=ControlNetUnit()))
    assert isinstance(controlnet.failed, ValueError)
    assert line == (
        "a unit of ControlNet is on, and ControlNet did not begin, for want of an image or a model perhaps, as the console "
        "says; mend that, or switch the unit off"
    )
    assert calls.rows == 0


def test_a_unit_on_another_checkpoint_is_refused(host, controlnet):
    controlnet.then = lambda network: setattr(network, "model", torch.nn.Identity())
    line = refusal(generate(host, True, 2, unit=ControlNetUnit(image=noise(64, 64))))
    assert line == "ControlNet hangs on another checkpoint than the loaded one; load the checkpoint again"


def test_inpainting_checkpoints_and_inpaint_are_refused(host, controlnet, monkeypatch):
    monkeypatch.setattr(host.unet, "in_channels", 9, raising=False)
    line = refusal(generate(host, True, 2, unit=of_kind("inpaint")))
    assert line.startswith(
        "ControlNet's inpaint changes what an inpainting checkpoint sees, and does so for the whole image; use"
    )
    assert generate(host, True, 2, unit=of_kind("ControlNet")).sizes == [(16, 16)]


def test_units_that_are_each_for_one_image_must_go_into_the_batch(host, controlnet):
    controlnet.ui_batch_option_state = ["Each ControlNet unit for each image in a batch", False]
    unit = ControlNetUnit(image=noise(64, 64))
    assert refusal(generate(host, True, 2, unit=unit, more=[unit.copy()])).startswith(
        "ControlNet's units are each for one image"
    )
    assert generate(host, True, 2, unit=unit, more=[unit.copy()], batch_size=2).sizes == [(16, 16)]


def test_an_unknown_version_is_refused(host, controlnet, calls, monkeypatch):
    monkeypatch.delattr(fake_controlnet, "get_control")
    monkeypatch.setattr(fake_controlnet.Script, "controlnet_main_entry", lambda *args: None)
    controlnet.latest_network = SimpleNamespace(control_params=[], model=None)
    monkeypatch.setattr(controlnet, "postprocess", lambda *args: None)
    line = "this version of ControlNet is not one that it knows; switch the unit off, or DemoFusion"
    assert refusal(generate(host, True, 2, unit=ControlNetUnit(image=noise(64, 64)))) == line
    assert calls.rows == 0
