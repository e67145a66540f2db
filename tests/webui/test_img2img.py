"""From a given picture, on the real host: img2img, inpaint, the batch tab, the gallery's button, and what is refused."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from arguments import script_arguments
from PIL import Image
from readout import NODE, readouts
from test_host import at_call, snapshot  # noqa: F401
from webui_host import make_sdxl, pixels

PLAIN = {"jitter": False, "view_batch_size": 1}
TWICE = [True, 2]


@pytest.fixture(scope="module")
def picture(host):
    height = 96 if host.makes_any_size else 128
    made = host.generate(steps=12, width=128, height=height, seed=3, cfg_scale=5).images[0].convert("RGB")
    return made.crop((0, 0, 128, 96))


@pytest.fixture
def coloured():
    """pictures(width, height, ...): of the size, without two pixels alike by chance."""

    def make(width, height, seed=0):
        smooth = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), dtype=np.uint8)
        rough = np.random.default_rng(seed + 1).integers(-20, 20, (height, width, 3))
        pixels = np.asarray(Image.fromarray(smooth).resize((width, height), Image.BICUBIC), int) + rough
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    return make


def apart(image, other):
    """How far a picture, at the other's size, is from it: the mean difference, of 255."""
    small = np.asarray(image.convert("RGB").resize(other.size, Image.BOX), float)
    return np.abs(small - np.asarray(other.convert("RGB"), float)).mean()


def box_mask(size, box):
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


def refusal(host, reply, calls):
    [line] = host.comments
    said = reply.info["extra_generation_params"]["DemoFusion refused"]
    assert line == f"DemoFusion: {said}"
    assert reply.images == []
    assert calls.calls == 0
    return said


# ---------------------------------------------------------------------------------------------------------------------
# Picture


def test_no_base_is_sampled_and_the_picture_becomes_twice_as_large(host, calls, picture):
    before = snapshot(host)
    reply = host.from_pictures([picture], *TWICE)
    assert reply.images[0].size == (256, 192)
    assert host.comments == []
    [p] = host.jobs
    start = SimpleNamespace(from_picture=True, size=(96, 128), window=None)
    config = host.webui.settings.DemoFusionConfig(scale=2.0, denoising_strength=0.5)
    plan = host.webui.checks.plan_for(p, config, start)
    assert plan.phases[0].evaluations == 0
    assert calls.rows == plan.evaluations
    assert snapshot(host) == before
    assert (p.width, p.height) == (64, 64), "as the request has it"
    assert p.denoising_strength == 0.5
    assert p.mask is None
    assert not [name for name in {**vars(p), **vars(p.sampler)} if "demofusion" in name or name in ("init", "sample_img2img")]
    assert "DemoFusion start: Picture 128x96" in reply.infotexts[0]
    assert "DemoFusion scale: 2" in reply.infotexts[0]


def test_the_tabs_own_size_does_not_matter(host, picture):
    sizes = [(64, 64), (512, 64), (128, 96)]
    made = [host.from_pictures([picture], *TWICE, width=w, height=h) for w, h in sizes]
    for other in made[1:]:
        assert np.array_equal(np.asarray(made[0].images[0]), np.asarray(other.images[0]))


@pytest.mark.skipif(not NODE, reason="needs node, to run javascript/demofusion.js")
@pytest.mark.parametrize(("width", "height", "scale"), [(1920, 1280, 2), (512, 512, 4), (300, 900, 3)])
def test_the_model_is_called_as_often_as_the_readout_says(host, calls, coloured, width, height, scale):
    """With the embedded checkpoint's own windows; one step a phase, without the negative prompt."""
    fast = dict(stride=1.0, doubling=True)
    reply = host.from_pictures([coloured(width, height)], True, scale, fast, steps=2, cfg_scale=1)
    assert host.comments == []
    table = host.webui.readout.readout_table()
    form = dict(
        start="Picture", picture=[height, width], window=0, ownStrength=0.5, fixSteps=False, scale=scale, stride=1.0,
        doubling=True, strength=1, steps=2, phaseSteps=0, cfg=1, sampler="Euler", scheduler="Automatic", batchSize=1,
        batchCount=1, hires=False, uniPcOrder=3, table=table, facts=dict(native=host.webui.readout.facts()["native"]),
        width=64, height=64,
    )  # fmt: skip
    [line] = readouts([form])
    last = reply.images[0].size
    assert line.startswith(f"from {width}x{height} to {last[0]}x{last[1]}, windows of ")
    assert last == (8 * math.floor(width * scale / 8 + 0.5), 8 * math.floor(height * scale / 8 + 0.5))
    assert line.endswith(f", {calls.rows:,} model calls")


@pytest.mark.parametrize("sampler", ["Euler", "Euler a", "DPM++ 2M", "DDIM", "UniPC", "Heun", "LCM", "DPM++ SDE"])
def test_every_kind_of_sampler_enlarges(host, picture, coloured, sampler):
    reply = host.from_pictures([picture], *TWICE, sampler_name=sampler, steps=8)
    assert reply.images[0].size == (256, 192)
    assert host.comments == []
    assert apart(reply.images[0], picture) < 0.7 * apart(reply.images[0], coloured(128, 96)), "another picture"


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (dict(tiling=True), None),
        (dict(cfg_scale=1), None),
        (dict(prompt="two red rings AND grass :0.5"), None),
        (dict(subseed=7, subseed_strength=0.3), None),
        (dict(), "sdxl"),
        ({}, "v-prediction.safetensors"),
        ({}, "inpainting.safetensors"),
    ],
)
def test_features_and_kinds_of_checkpoints(host, checkpoint, checkpoints, options, picture, settings, name):
    options(show_progress_type="Approx cheap")  # the usual preview of SDXL is a download
    window = {}
    if name == "sdxl":
        name, window = make_sdxl(checkpoints), {"window": 128}
    if name:
        checkpoint(name)
    reply = host.from_pictures([picture], True, 2, window, **settings)
    assert reply.images[0].size == (256, 192)
    assert host.comments == []


def test_a_batch_is_its_pictures_one_by_one(host, coloured):
    pictures = [coloured(128, 128, seed) for seed in (1, 5)]
    both = host.from_pictures(pictures, True, 2, PLAIN, batch_size=2).images
    for picture, seed, image in zip(pictures, (1, 2), both[-2:]):
        alone = host.from_pictures([picture], True, 2, PLAIN, seed=seed).images[0]
        assert np.abs(np.asarray(alone, int) - np.asarray(image, int)).max() <= 1


def test_from_the_result_of_img2img(host, calls, picture, coloured):
    made = host.from_pictures([picture], width=128, height=96, steps=10)
    base_calls = calls.rows
    assert base_calls == 2 * 6, "int(0.5 * 10) + 1 steps"
    calls.rows = 0
    reply = host.from_pictures([picture], True, 2, {"start_from": "img2img result"}, width=128, height=96, steps=10)
    assert reply.images[0].size == (256, 192)
    assert "DemoFusion start: img2img result" in reply.infotexts[0]
    config = host.webui.settings.DemoFusionConfig(scale=2.0)
    plan = host.webui.checks.plan_for(host.jobs[0], config, SimpleNamespace(from_picture=False))
    assert 2 * plan.phases[0].evaluations == base_calls
    assert calls.rows == plan.evaluations
    assert apart(reply.images[0], made.images[0]) < 0.7 * apart(reply.images[0], coloured(128, 96))


# ---------------------------------------------------------------------------------------------------------------------
# Inpaint


def untouched(host, reply, picture, mask, index=-1):
    """The most by which the result differs from the enlarged original where the overlay is opaque."""
    result = reply.images[index].convert("RGB")
    enlarged = host.images.resize_image(0, picture, *result.size)
    blurred = host.webui.picture._mask_of(host.jobs[0])
    feather = np.asarray(host.images.resize_image(0, blurred, *result.size), int)
    outside = feather == 0
    assert outside.mean() > 0.2
    difference = np.abs(np.asarray(result, int) - np.asarray(enlarged, int)).max(-1)
    assert difference[feather > 127].max() > 0, "nothing has changed"
    return difference[outside].max()


INPAINT = [
    ("odd sizes", (101, 147), (20, 40, 70, 110), dict(), 2, {}),
    ("fractional scale", (128, 96), (30, 20, 90, 70), dict(), 1.65, {}),
    ("batch", (128, 128), (30, 20, 90, 70), dict(batch_size=2), 2, {}),
    ("inverted", (128, 96), (0, 0, 128, 60), dict(inpainting_mask_invert=1, mask_blur=7), 2, {}),
    ("not blurred", (128, 96), (30, 20, 90, 70), dict(mask_blur=0), 2, {}),
    ("latent noise", (128, 96), (30, 20, 90, 70), dict(inpainting_fill=2, denoising_strength=0.9), 2, {}),
    ("latent nothing", (128, 96), (30, 20, 90, 70), dict(inpainting_fill=3), 2, {}),
    ("original", (128, 96), (30, 20, 90, 70), dict(inpainting_fill=1), 2, {}),
    ("the result of img2img", (128, 96), (30, 20, 90, 70), dict(width=128, height=96), 2, {"start_from": "img2img result"}),
]


@pytest.mark.parametrize(
    ("size", "box", "settings", "scale", "more"), [case[1:] for case in INPAINT], ids=[c[0] for c in INPAINT]
)
def test_outside_the_mask_the_picture_is_the_original_enlarged(host, coloured, size, box, settings, scale, more):
    picture = coloured(*size)
    mask = box_mask(size, box)
    before = snapshot(host)
    reply = host.from_pictures([picture], True, scale, more, mask=mask, **settings)
    assert host.comments == []
    for index in range(-settings.get("batch_size", 1), 0):
        assert untouched(host, reply, picture, mask, index) == 0
    assert snapshot(host) == before


def test_an_inpainting_checkpoint_gets_the_mask_and_keeps_the_rest(host, checkpoint, coloured):
    checkpoint("inpainting.safetensors")
    picture, mask = coloured(128, 128), box_mask((128, 128), (32, 32, 96, 96))
    seen = []
    unet = host.unet
    handle = unet.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, 4:5].clone()))
    reply = host.from_pictures([picture], True, 2, {**PLAIN, "stride": 1.0}, mask=mask, mask_blur=0, steps=2)
    handle.remove()
    assert untouched(host, reply, picture, mask) == 0
    local = [x[0, 0] for x in seen[:4]]  # the first step's windows, row by row, without overlap
    assert len(seen) == 4 + 4
    whole = torch.cat([torch.cat(local[:2], 1), torch.cat(local[2:], 1)])
    expected = torch.zeros(32, 32)
    expected[8:24, 8:24] = 1
    assert torch.equal(whole.cpu(), expected)


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_an_interrupt_in_each_phase_leaves_the_rest_of_the_picture(host, at_call, coloured, phase):  # noqa: F811
    picture, mask = coloured(128, 128), box_mask((128, 128), (40, 40, 90, 90))
    first = {1: 1, 2: 4 * 2 + 1, 3: 8 + 9 + 2}[phase]  # 4 + 4 views in phase 2, 9 + 9 in phase 3, two steps each

    def calls_of(host):
        return host.from_pictures([picture], True, 4, {**PLAIN, "stride": 1.0}, mask=mask)

    at_call(first if phase < 3 else 2 * (4 + 4) + 2, host.shared.state.interrupt)
    reply = calls_of(host)
    at_call.clear()
    side = {1: 128, 2: 128, 3: 256}[phase]
    assert reply.images[0].size == (side, side)
    said = reply.info["extra_generation_params"]
    if side == 128:
        assert np.array_equal(np.asarray(reply.images[0].convert("RGB")), np.asarray(picture)), "never less than was given"
        assert "DemoFusion scale" not in said
        assert said["DemoFusion incomplete"].startswith("the picture is as it was given, because the next was stopped")
    else:
        assert untouched(host, reply, picture, mask) == 0
        assert said["DemoFusion scale"] == "2"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (dict(inpaint_full_res=True), "the inpaint area is Only masked; choose Whole picture"),
        (dict(mask=box_mask((128, 96), (0, 0, 0, 0))), "the mask is empty, so that nothing would change"),
        (dict(mask=box_mask((128, 96), (0, 0, 128, 96)), inpainting_mask_invert=1), "the mask is empty"),
    ],
)
def test_masks_that_cannot_work_are_refused(host, calls, picture, change, line):
    calls.calls = 0
    job = {"mask": box_mask((128, 96), (30, 20, 90, 70)), **change}
    assert refusal(host, host.from_pictures([picture], *TWICE, **job), calls).startswith(line)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, and other scripts


@pytest.mark.parametrize(
    ("sizes", "args", "settings", "line"),
    [
        ([(128, 96)], [True, 2], dict(denoising_strength=0), "at denoising strength 0 nothing would be drawn"),
        ([(128, 96)], [True, 2], dict(resize_mode=3), "it enlarges the picture itself, and not its latents"),
        ([(128, 96), (96, 128)], [True, 2], dict(batch_size=2), "the pictures of the batch are of different sizes"),
        ([(128, 96), (128, 96)], [True, 2], {}, "there are 2 pictures for a batch of 1"),
        ([], [True, 2], {}, "there is no picture"),
        ([(32, 32)], [True, 2], {}, "64x64 is no larger than what the checkpoint draws at once; scale 5.15 is the smallest"),
        ([(4096, 4096)], [True, 4], dict(width=4096, height=4096), "16384x16384 is more than 64 times as long and wide"),
        ([(128, 96)], [True, 2, {"start_from": "Prompt"}], {}, "start from must be 'Picture' or 'img2img result'"),
        ([(128, 96)], [True, 2, {"start_from": "img2img result", "window": 64}], {}, "a window is for a picture"),
        ([(128, 96)], [True, 2], {"alwayson_scripts": {"Soft Inpainting": {"args": [True]}}}, "Soft Inpainting is on"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(host, calls, coloured, sizes, args, settings, line):
    pictures = [coloured(*size, seed) for seed, size in enumerate(sizes)]
    assert refusal(host, host.from_pictures(pictures, *args, **settings), calls).startswith(line)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("SD upscale", [None, 16, "None", 2]),
        ("Loopback", [2, 0.5, "Linear", "None"]),
        ("Poor man's outpainting", [64, 4, 0, ["left"]]),
    ],
)
def test_scripts_that_draw_parts_are_refused(host, calls, picture, name, arguments):
    if name not in host.scripts.scripts_img2img.titles:
        pytest.skip(f"this host has no script {name}")
    calls.calls = 0
    host.from_pictures([picture], *TWICE, script_name=name, script_args=arguments, width=128, height=128)
    assert calls.calls == 0
    assert any(f"the script {name} is chosen, which samples parts of pictures, or again" in line for line in host.comments)


def test_the_plot_makes_pictures_of_its_cells(host, picture):
    from modules import scripts

    [plot] = [data.module for data in scripts.scripts_data if data.script_class.__module__ == "xyz_grid.py"]
    titles = [script.title() for script in host.scripts.scripts_img2img.selectable_scripts]
    script = host.scripts.scripts_img2img.selectable_scripts[titles.index("X/Y/Z plot")]
    options = [option for option in plot.axis_options if type(option) is plot.AxisOption or option.is_img2img]
    labels = [option.label for option in options]
    names = [control.label for control in script.controls]
    arguments = [control.value for control in script.controls]
    for axis in ("X type", "Y type", "Z type"):
        arguments[names.index(axis)] = 0
    arguments[names.index("X type")], arguments[names.index("X values")] = labels.index("[DemoFusion] scale"), "2, 3"
    arguments[names.index("Y type")] = labels.index("[DemoFusion] start from")
    arguments[names.index("Y values") + 1] = ["Picture"]  # its list of choices
    arguments[names.index("Include Sub Images")] = True
    reply = host.from_pictures([picture], script_name="X/Y/Z plot", script_args=arguments)
    assert host.comments == []
    assert {image.size for image in reply.images[1:]} >= {(256, 192), (384, 288)}


# ---------------------------------------------------------------------------------------------------------------------
# The batch tab, resize modes, colour correction, saved phases


def job(host, pictures, *args, **settings):
    """A job of the tab, as its button makes it."""
    processing = host.processing.StableDiffusionProcessingImg2Img(
        sd_model=host.shared.sd_model, outpath_samples=str(host.outputs), outpath_grids=str(host.outputs),
        prompt="two red striped rings on grass", seed=1, sampler_name="Euler", steps=4, cfg_scale=7, width=64, height=64,
        init_images=pictures, denoising_strength=0.5, **settings,
    )  # fmt: skip
    runner = host.scripts.scripts_img2img
    values = [getattr(control, "value", None) for control in runner.inputs]
    values[0] = 0
    script = host.img2img_script
    values[script.args_from : script.args_from + len(host.webui.settings.ARGUMENTS)] = script_arguments(host.webui, args)
    processing.scripts, processing.script_args = runner, values
    return processing


def test_the_batch_tab_enlarges_pictures_of_every_size(host, coloured, tmp_path):
    if not host.makes_any_size:
        pytest.skip("this host's batch tab makes the sides of its pictures whole numbers of 64 first")
    for number, size in enumerate([(128, 128), (160, 96), (100, 180)]):
        coloured(*size, number).save(tmp_path / f"{number}.png")
    (tmp_path / "out").mkdir()
    p = job(host, [], True, 2)
    host.shared.state.begin("img2img")
    made = host.img2img.process_batch(p, str(tmp_path), str(tmp_path / "out"), "", p.script_args)
    host.shared.state.end()
    assert [image.size for image in made.images] == [(256, 256), (320, 192), (200, 360)]
    assert (p.width, p.height) == (64, 64)
    assert ["Picture 128x128" in text for text in made.infotexts] == [True, False, False]


@pytest.mark.parametrize("mode", [1, 2])
def test_resize_modes_that_keep_the_aspect(host, coloured, mode):
    reply = host.from_pictures([coloured(101, 147)], *TWICE, resize_mode=mode)
    assert reply.images[0].size == (200, 296)
    assert host.comments == []


def test_colour_correction(host, options, coloured):
    options(img2img_color_correction=True)
    picture = coloured(128, 96)
    reply = host.from_pictures([picture], *TWICE)
    assert reply.images[0].size == (256, 192)
    assert host.comments == []
    means = [np.asarray(image.convert("RGB"), float).mean((0, 1)) for image in (reply.images[0], picture)]
    assert np.abs(means[0] - means[1]).max() < 12


def test_a_saved_phase_is_gone_on_from(host, picture, tmp_path):
    settings = {**PLAIN, "save_phases": True}
    whole = host.from_pictures([picture], True, 4, settings, save_images=True)
    files = sorted(host.data.rglob("*demofusion-phase*.safetensors"), key=lambda path: path.stat().st_mtime)
    assert files[-1].with_suffix(".png").exists()
    again = host.from_pictures([picture], True, 4, {**PLAIN, "resume": str(files[-1])})
    assert host.comments == []
    assert np.array_equal(pixels(whole.images[0]), pixels(again.images[0]))


# ---------------------------------------------------------------------------------------------------------------------
# What the infotext says, and pasting it


def pasted(host, runner, text):
    parameters = host.infotext_utils.parse_generation_parameters(text)
    controls = dict(zip(host.script_of(runner).controls, host.webui.settings.ARGUMENTS))
    fields = [field for field in runner.infotext_fields if getattr(field, "component", field[0]) in controls]
    return {controls[field[0]]: field[1](parameters) for field in fields}


def test_pasting_sets_everything_but_the_tick(host, picture):
    made = host.from_pictures([picture], True, 3, {"stride": 0.75, "window": 64})
    values = pasted(host, host.scripts.scripts_img2img, made.infotexts[0])
    assert (values["scale"], values["stride"], values["window"], values["start_from"]) == (3, 0.75, 64, "Picture")
    assert "enabled" not in values
    txt2img = pasted(host, host.scripts.scripts_txt2img, made.infotexts[0])
    assert txt2img["enabled"] is False
    assert txt2img["scale"] is None
    of_a_prompt = host.generate(True, 3, width=64).infotexts[0]
    assert pasted(host, host.scripts.scripts_img2img, of_a_prompt)["scale"] is None
    assert not [key for key in made.info["extra_generation_params"] if "upscale" in key.lower()]


def test_the_readouts_facts_name_what_the_checkpoint_was_made_for(host):
    assert host.webui.readout.facts()["native"] == 16


# ---------------------------------------------------------------------------------------------------------------------
# The gallery's button; in the browser: test_browser.py


def asked(host, image, infotext, **more):
    """The request that the button puts behind the form's arguments."""
    path = host.outputs / f"selected-{len(list(host.data.rglob('selected-*')))}.png"
    path.parent.mkdir(exist_ok=True)
    image.save(path)
    host.ui_tempdir.register_tmp_file(host.shared.demo, str(path))
    return json.dumps(
        {"picture": {"name": str(path), "is_file": True}, "infotext": infotext, "grid": False, "click": 1, **more}
    )


def click(host, text, *args, tab="txt2img", **payload):
    arguments = script_arguments(host.webui, args or (False, 2))
    arguments += [host.webui.settings.END, "", text]
    make = host.generate if tab == "txt2img" else host.from_pictures
    if tab == "txt2img":
        return make(*arguments, **payload)
    pictures = payload.pop("pictures")
    return make(pictures, *arguments, **payload)


@pytest.mark.parametrize("ticked", [False, True])
def test_the_button_enlarges_without_making_the_base_again(host, calls, coloured, ticked):
    base = host.generate(seed=8, width=96, height=64, steps=10)
    calls.rows = 0
    text = asked(host, base.images[0], base.infotexts[0])
    late = dict(denoising_strength=0.4, pixel_upsampling=True)
    reply = click(host, text, ticked, 3, late, seed=5, batch_size=2, n_iter=2, width=64, height=64, steps=10)
    assert [image.size for image in reply.images] == [(288, 192)]
    config = host.webui.settings.DemoFusionConfig(scale=3.0, **late)
    p = SimpleNamespace(sampler_name="Euler", scheduler="Automatic", steps=10, width=96, height=64, cfg_scale=7.0)
    plan = host.webui.checks.plan_for(p, config)
    assert calls.rows == plan.evaluations - plan.phases[0].evaluations * 2, "txt2img's own phases"
    assert "Seed: 8" in reply.infotexts[0]
    assert "DemoFusion start: Picture 96x64" in reply.infotexts[0]
    assert host.comments == []
    assert apart(reply.images[0], base.images[0]) < 0.7 * apart(reply.images[0], coloured(96, 64))


def test_the_button_goes_before_hires_fix(host):
    base = host.generate(seed=8)
    reply = click(host, asked(host, base.images[0], base.infotexts[0]), enable_hr=True, hr_scale=2, hr_upscaler="None")
    assert reply.images[0].size == (128, 128)
    assert "Hires" not in reply.infotexts[0]


def test_the_button_of_img2img_takes_the_selected_picture_and_no_mask(host, picture, coloured):
    made = host.from_pictures([picture], width=128, height=96)
    text = asked(host, made.images[0], made.infotexts[0])
    other, mask = coloured(64, 64), box_mask((64, 64), (10, 10, 30, 30))
    reply = click(host, text, tab="img2img", pictures=[other], mask=mask, steps=10)
    assert reply.images[0].size == (256, 192)
    assert apart(reply.images[0], made.images[0]) < 0.7 * apart(reply.images[0], other.resize((128, 96)))


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (dict(picture=None), "no picture is selected in the gallery; click one, and then the button"),
        (dict(grid=True), "the gallery shows the grid; select a single picture, and then click the button"),
        (dict(picture={"name": "/no/such.png", "is_file": True}), "the gallery's picture cannot be read: "),
    ],
)
def test_what_the_button_cannot_have_is_said(host, calls, picture, more, line):
    calls.calls = 0
    assert refusal(host, click(host, asked(host, picture, "", **more)), calls).startswith(line)


def test_the_hosts_own_button_runs_hires_fix_and_the_comment_says_so(host, picture):
    """As the host's ✨ does: Hires. fix on a picture that is given."""
    kind = host.processing.StableDiffusionProcessingTxt2Img
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "txt2img_upscale", True, raising=False)
        reply = host.generate(True, 2, enable_hr=True, hr_scale=2, hr_upscaler="None", denoising_strength=0.6)
    assert reply.images[0].size == (128, 128)
    line = "it stood aside, since a finished picture was enlarged, by Hires. fix"
    assert host.comments == [f"DemoFusion: {line}"]
