"""img2img, inpaint and the gallery's button, on the fake host of fake_webui.py, with a checkpoint that was made for 64x64."""

import copy
import itertools
import json
import math
from pathlib import Path
from types import ModuleType, SimpleNamespace

import fake_webui
import numpy as np
import pytest
import torch
from arguments import script_arguments, settings_of
from PIL import Image, ImageDraw, ImageOps
from readout import NODE, in_node, readouts
from scipy.ndimage import gaussian_filter1d
from webui_fixtures import assert_as_before, refusal, said, snapshot, watch_calls

from lib_demofusion.areas import areas_of
from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.phases import make_plan
from lib_demofusion.saved import SavedPhase, read_saved
from lib_demofusion.views import dilated_views, local_views

PICTURE, RESULT = "Picture", "img2img result"
STEPS = 4
SIDE = 8  # of the images that the checkpoint was made for, latent pixels
PLAIN = {"jitter": False, "view_batch_size": 1}

# A picture of 96x96 at 2x: its windows are 64x64, and phases 2 and 3 are 128x128 and 192x192. At denoising strength 0.75
# three of four steps are run.
VIEWS = {2: 9 + 4, 3: 25 + 9}
RUN = 3


@pytest.fixture
def host(host):
    host.shared.sd_model.image_size = SIDE
    return host


@pytest.fixture
def encoded(host):
    """(height, width) of what is encoded from now on."""
    sizes = []
    network = host.shared.sd_model.first_stage_model.encoder
    network.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape[-2:])))
    return sizes


@pytest.fixture
def fusions(host, monkeypatch):
    """The phases' Fusions, in their order."""
    made, make = [], host.webui.phases.fusion_for

    def look(*args, **more):
        made.append(make(*args, **more))
        return made[-1]

    monkeypatch.setattr(host.webui.phases, "fusion_for", look)
    return made


@pytest.fixture
def overlays(host):
    """What the host lays over each picture: its mask and its overlay."""
    seen = []
    script = add_script(host, "One that looks")
    script.postprocess_maskoverlay = lambda p, ppmo: seen.append((ppmo.mask_for_overlay, ppmo.overlay_image))
    return seen


def add_script(host, title, *values, img2img=True):
    """Another script in the form, after ours."""
    script, runner = host.scripts.Script(), host.img2img_runner if img2img else host.runner
    script.title, script.ui = lambda: title, lambda is_img2img: [SimpleNamespace(value=value) for value in values]
    runner.create_script_ui(script)
    runner.alwayson_scripts.append(script)
    return script


def picture(width=96, height=96, seed=0):
    """Some coloured spots."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def disc(width=96, height=96):
    """A mask: white in the middle."""
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).ellipse((width // 4, height // 4, 3 * width // 4, 3 * height // 4), fill=255)
    return mask


def numbers(image):
    return np.asarray(image.convert("RGB"))


def assert_equal(a, b):
    """Two pictures, to the bit."""
    assert a.size == b.size
    assert np.array_equal(numbers(a), numbers(b))


def assert_same(a, b, tolerance=1e-4):
    assert a.shape == b.shape
    assert ((a - b).abs().max() / b.std()).item() < tolerance


def enlarge(host, given, scale=2.0, settings=None, **job):
    """A job of img2img with DemoFusion on. given: a picture, or several."""
    given = given if isinstance(given, list) else [given]
    return host.generate(True, scale, settings or {}, init_images=given, **job)


def inpaint(host, given, mask, scale=2.0, settings=None, **job):
    return enlarge(host, given, scale, settings, **{"mask": mask, "inpaint_full_res": False, **job})


def plan_for(host, p, scale=2.0, settings=None, start_from=PICTURE):
    """The plan of a job that was made."""
    strength = {"denoising_strength": p.denoising_strength} if start_from == PICTURE else {}
    given = {name: value for name, value in (settings or {}).items() if name != "start_from"}
    config = DemoFusionConfig(**{"scale": scale, **given, **strength})
    return host.webui.checks.plan_for(p, config, host.webui.picture.Start(p, p.init_images, start_from))


def encode(host, image):
    """A PIL image as latents, at once, with the noise that DemoFusion has for it."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        x = torch.from_numpy(numbers(image).astype(np.float32)).permute(2, 0, 1)[None] / 255
        return host.sd_samplers_common.images_tensor_to_samples(x, model=host.shared.sd_model)


def resized(host, image, size):
    """size: (h, w) in latent pixels."""
    return host.images.resize_image(0, image, size[1] * 8, size[0] * 8)


def parameters(host, reply, index=0):
    return host.infotext_utils.parse_generation_parameters(reply.infotexts[index])


def job_parameters(host, reply, index=0):
    """What a picture's parameters say of DemoFusion."""
    return {key: value for key, value in parameters(host, reply, index).items() if "DemoFusion" in key}


# ---------------------------------------------------------------------------------------------------------------- a picture


SIZES = [(96, 96, 2.0), (100, 77, 2.0), (64, 64, 4.0), (128, 40, 2.5), (150, 90, 1.55), (61, 63, 3.05)]


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
@pytest.mark.parametrize(("width", "height", "scale"), SIZES)
def test_no_base_is_sampled_and_the_model_sees_what_is_planned(host, calls, sampler, width, height, scale):
    reply = enlarge(host, picture(width, height), scale, sampler_name=sampler, steps=5, denoising_strength=0.6, batch_size=2)
    plan = plan_for(host, reply.p, scale)
    assert plan.phases[0].evaluations == 0
    assert calls.rows == 2 * plan.evaluations > 0
    assert {tuple(args[0].shape[-2:]) for args, _ in calls.inputs} == {plan.window}
    bar = host.shared.total_tqdm
    assert bar._done == bar._total == plan.evaluations // 2
    assert host.shared.state.job_no == 1
    assert reply.comments == []


def test_by_hand(host, calls):
    enlarge(host, picture())
    assert calls.rows == 2 * RUN * (VIEWS[2] + VIEWS[3])


@pytest.mark.skipif(not NODE, reason="needs node, to run the form's script")
def test_the_readout_says_what_the_model_sees(host, calls):
    lines = []
    for (width, height, scale), start in itertools.product(SIZES[:3], (PICTURE, RESULT)):
        calls.rows = 0
        enlarge(host, picture(width, height), scale, {"start_from": start}, denoising_strength=0.6, steps=5, width=80)
        lines.append((dict(picture=[height, width], scale=scale, start=start), f"{calls.rows:,} model calls"))
    form = dict(width=80, height=64, steps=5, cfg=5, sampler="Euler", scheduler="Automatic", batchSize=1, batchCount=1)
    form |= dict(window=0, ownStrength=0.6, fixSteps=False, stride=0.5, phaseSteps=0, strength=1, doubling=False, hires=False)
    form |= dict(facts={"native": SIDE}, table=host.webui.readout.readout_table(), uniPcOrder=3)
    for line, (_, known) in zip(readouts([{**form, **given} for given, _ in lines]), lines, strict=True):
        assert line.endswith(known)


@pytest.mark.parametrize(("width", "height", "scale"), SIZES)
def test_the_result_is_the_picture_times_the_scale_to_whole_latent_pixels(host, width, height, scale):
    reply = enlarge(host, picture(width, height), scale)
    assert reply.images[0].size == tuple(8 * math.floor(side * scale / 8 + 0.5) for side in (width, height))
    said = job_parameters(host, reply)
    assert (said["DemoFusion scale"], said["DemoFusion start"]) == (f"{scale:g}", f"Picture {width}x{height}")


@pytest.mark.parametrize(("width", "height"), [(96, 96), (100, 77)])
def test_the_first_phase_begins_with_the_picture_at_its_own_size(host, fusions, width, height):
    given = picture(width, height)
    enlarge(host, given)
    size = tuple(fusions[0].reference.shape[-2:])
    assert math.prod(size) * 64 > width * height
    torch.testing.assert_close(fusions[0].reference, encode(host, resized(host, given, size)), rtol=0, atol=1e-5)
    shrunken = resized(host, resized(host, given, fusions[0].window), size)
    assert (fusions[0].reference - encode(host, shrunken)).abs().max() > 1e-2
    assert fusions[0].held is None
    assert len(fusions) == 2


def test_phases_keep_the_moments_of_the_shrunken_picture(host):
    given = picture()
    latents = enlarge(host, given).latents[-1]
    base = encode(host, resized(host, given, (SIDE, SIDE)))
    torch.testing.assert_close(torch.stack(torch.std_mean(latents)), torch.stack(torch.std_mean(base)), rtol=1e-4, atol=1e-4)


def test_the_tabs_denoising_strength_is_the_phases_and_not_our_own(host, calls):
    one, other = (enlarge(host, picture(), 2.0, {"denoising_strength": own}, denoising_strength=0.5) for own in (0.2, 1))
    assert calls.rows == 2 * 2 * 2 * (VIEWS[2] + VIEWS[3])
    assert_equal(one.images[0], other.images[0])
    assert one.infotexts == other.infotexts
    assert job_parameters(host, one)["DemoFusion denoising strength"] == "0.5"
    assert not np.array_equal(numbers(one.images[0]), numbers(enlarge(host, picture(), denoising_strength=1).images[0]))


@pytest.mark.parametrize("size", [dict(width=128), dict(height=40), dict(width=200, height=208)])
def test_the_tabs_width_and_height_do_not_matter(host, encoded, size):
    reply = enlarge(host, picture())
    alone, encoded[:] = encoded[:], []
    other = enlarge(host, picture(), **size)
    assert_equal(other.images[0], reply.images[0])
    assert other.infotexts == reply.infotexts
    assert encoded == alone
    assert max(encoded) == (128, 128), "the largest is the first phase's"


def test_the_noise_of_all_programs_does_not_matter(host):
    torch.manual_seed(1)
    reply = enlarge(host, picture())
    torch.manual_seed(2)
    assert_equal(enlarge(host, picture()).images[0], reply.images[0])


def test_a_window_goes_before_the_checkpoints_own_size(host, fusions):
    own = enlarge(host, picture(), 4.0)
    host.shared.sd_model.image_size = 2 * SIDE
    as_told = enlarge(host, picture(), 4.0, {"window": 8 * SIDE})
    larger = enlarge(host, picture(), 4.0)
    assert_equal(own.images[0], as_told.images[0])
    assert {fusion.window for fusion in fusions[:-2]} == {(SIDE, SIDE)}
    assert {fusion.window for fusion in fusions[-2:]} == {(2 * SIDE, 2 * SIDE)}
    assert "DemoFusion window" not in own.infotexts[0]
    assert job_parameters(host, as_told)["DemoFusion window"] == "64"
    assert not np.array_equal(numbers(larger.images[0]), numbers(own.images[0]))


def test_flat_areas_of_the_picture_are_held(host, fusions):
    given = picture()
    given.paste((90, 120, 30), (0, 0, 60, 96))
    enlarge(host, given, 2.0, {"hold_flat": 50.0})
    x = torch.from_numpy(numbers(given).astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    want = areas_of(x, DemoFusionConfig(hold_flat=50.0)).at((16, 16)).held
    assert 0 < want.mean() < 1
    torch.testing.assert_close(fusions[0].held, want)
    assert fusions[1].held.shape == (1, 1, 24, 24)


def test_a_picture_that_tiles_is_encoded_as_one(host, fusions):
    given = picture()
    reply = enlarge(host, given, tiling=True)
    assert reply.images[0].size == (192, 192)
    host.sd_hijack.model_hijack.apply_circular(False)  # as while the phases run
    around = np.pad(numbers(resized(host, given, (16, 16))), [(64, 64), (64, 64), (0, 0)], mode="wrap")
    want = encode(host, Image.fromarray(around))[..., 8:-8, 8:-8]
    torch.testing.assert_close(fusions[0].reference, want, rtol=0, atol=1e-5)


def test_a_picture_with_alpha_lies_on_the_hosts_background(host):
    given = picture()
    given.putalpha(disc())
    host.shared.opts.img2img_background_color = "#0000ff"
    flat = Image.composite(picture(), Image.new("RGB", given.size, "#0000ff"), disc())
    assert_equal(enlarge(host, given).images[0], enlarge(host, flat).images[0])


def test_a_batch_of_one_picture_has_a_seed_each(host):
    both = enlarge(host, picture(), batch_size=2).latents[0]
    for i in range(2):
        assert_same(both[i : i + 1], enlarge(host, picture(), seed=1 + i).latents[0])
    assert not torch.allclose(both[0], both[1], atol=0.1)


def test_a_batch_of_two_pictures_makes_both(host):
    given = [picture(seed=seed) for seed in (1, 2)]
    both = enlarge(host, given, batch_size=2)
    for i in range(2):
        assert_same(both.latents[0][i : i + 1], enlarge(host, given[i], seed=1 + i).latents[0])
    assert enlarge(host, given, batch_size=3).p.batch_size == 2, "as the host alone has it"


def test_no_batch_samples_a_base(host, calls):
    """img2img has one sampler for all of them."""
    reply = enlarge(host, picture(), n_iter=3)
    assert calls.rows == 3 * 2 * RUN * (VIEWS[2] + VIEWS[3])
    bar = host.shared.total_tqdm
    assert bar._done == bar._total > 0
    assert host.shared.state.job_no == 3
    assert_equal(reply.images[2], enlarge(host, picture(), seed=3).images[0])


def test_off_is_the_host_alone(host, calls):
    torch.manual_seed(0)
    off = host.generate(False, init_images=[picture()])
    assert calls.rows == 2 * STEPS
    host.img2img_runner.alwayson_scripts.clear()
    torch.manual_seed(0)
    assert_equal(host.generate(init_images=[picture()]).images[0], off.images[0])
    assert off.images[0].size == (64, 64)
    assert job_parameters(host, off) == {}


def test_whoever_names_no_start_means_the_picture(host):
    whole = [True, *(control.value for control in host.img2img_script.controls[1:])]
    names = host.webui.settings.ARGUMENTS
    assert whole[names.index("start_from")] == PICTURE
    reply = host.generate(*whole, init_images=[picture()])
    for count in (1, names.index("start_from")):
        assert_equal(host.generate(*whole[:count], init_images=[picture()]).images[0], reply.images[0])


# ------------------------------------------------------------------------------------------------------------ p afterwards


def fail():
    raise RuntimeError("the model broke\nsecond line")


ENDS = {
    "finished": dict(),
    "in the first phase": dict(call=5),
    "in the last phase": dict(call=60),
    "broken": dict(call=60, action=fail),
    "refused": dict(scale=1.0),
    "refused at last": dict(free=2**14),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("start", [PICTURE, RESULT])
@pytest.mark.parametrize("end", ENDS)
def test_p_is_as_it_was_and_nothing_stays_on_the_host(host, at_call, monkeypatch, end, start, masked):
    mask = dict(mask=disc(), inpaint_full_res=False) if masked else {}
    job = dict(init_images=[picture()], width=72, height=56, n_iter=2, **mask)
    own = host.processing_for(False, **job)
    fake_webui.process_images(own)
    host.shared.state.end()
    before, how = snapshot(host), ENDS[end]
    p = host.processing_for(True, how.get("scale", 2.0), {**PLAIN, "start_from": start}, **job)
    given = {name: value for name, value in vars(p).items() if name not in ("comments", "extra_generation_params")}
    if "call" in how:
        handle = at_call(how["call"] + 8 * (start == RESULT), how.get("action", host.shared.state.skip))
    if "free" in how:
        monkeypatch.setattr("lib_demofusion.memory.free_memory", lambda device: how["free"])
    images = fake_webui.process_images(p).images
    host.shared.state.end()
    if "call" in how:
        handle.remove()
    assert len(images) == (0 if "refused" in end else 2)
    assert_as_before(host, before)
    assert set(vars(p)) == set(vars(own)) - ({"batch_index", "lora_hashes"} if "refused" in end else set())
    made = {name for name, value in given.items() if getattr(p, name) is not value}
    assert made <= {name for name, value in given.items() if getattr(own, name) is not value}, "what the host changes"
    assert (p.width, p.height, p.n_iter, p.steps, p.denoising_strength) == (72, 56, 2, STEPS, 0.75)
    if "refused" not in end:
        assert set(vars(p.sampler)) == set(vars(own.sampler))
        assert set(vars(p.sampler.model_wrap_cfg)) == set(vars(own.sampler.model_wrap_cfg))
    assert host.img2img_script.start is None


def test_while_it_runs_other_scripts_see_the_windows_size(host):
    seen = []
    script = add_script(host, "Another")
    script.process = lambda p, *args: seen.append((p.width, p.height))
    script.before_process_batch = lambda p, *args, **kwargs: seen.append((p.width, p.height))
    p = enlarge(host, picture(100, 77), width=200, height=200).p
    assert seen == [(72, 56)] * 2
    assert (p.width, p.height) == (200, 200)


# ----------------------------------------------------------------------------------------------------------------- refusals


MASK = dict(mask=disc(), inpaint_full_res=False)
REFUSALS = {
    "mixed sizes": (
        dict(init_images=[picture(), picture(96, 88)], batch_size=2),
        "the pictures of the batch are of different sizes; send each by itself, or those of one size together",
    ),
    "more than the batch": (
        dict(init_images=[picture()] * 3, batch_size=2),
        "there are 3 pictures for a batch of 2; send as many as the batch has, or one",
    ),
    "an empty list": (dict(init_images=[]), "there is no picture; drop one on the tab"),
    "no list": (dict(init_images=None), "there is no picture; drop one on the tab"),
    "no picture": (dict(init_images=[None]), "there is no picture; drop one on the tab"),
    "nothing drawn": (dict(denoising_strength=0), "at denoising strength 0 nothing would be drawn; raise it"),
    "latents": (
        dict(resize_mode=3),
        "it enlarges the picture itself, and not its latents; choose another resize mode, Just resize for one",
    ),
    "too small": (
        dict(init_images=[picture(24, 24)]),
        "48x48 is no larger than what the checkpoint draws at once; scale 3.5 is the smallest that works",
    ),
    "not larger": (
        dict(init_images=[picture(64, 64)], scale=1.05),
        "64x64 is not larger than the picture, 64x64; choose a larger size",
    ),
    "too large": (
        dict(init_images=[picture(1024, 512)], scale=8.0),
        "8192x4096 is more than 64 times as long and wide as a window of 64; scale 5.65 is the largest that works",
    ),
    "a tiny window": (
        dict(settings={"window": 4}),
        "a window of 4 pixels is too small; a latent pixel is 8 pixels",
    ),
    "a window for a base": (
        dict(settings={"window": 64, "start_from": RESULT}),
        "a window is for a picture that is given; here it is the base's size, so set window to 0",
    ),
    "another start": (
        dict(settings={"start_from": "picture"}),
        "start from must be 'Picture' or 'img2img result', got 'picture'",
    ),
    "only masked": (
        dict(mask=disc()),
        "the inpaint area is Only masked; choose Whole picture (inpaint_full_res false), or untick DemoFusion",
    ),
    "only masked of a base": (
        dict(mask=disc(), settings={"start_from": RESULT}),
        "the inpaint area is Only masked; choose Whole picture (inpaint_full_res false), or untick DemoFusion",
    ),
    "an empty mask": (
        dict(MASK, mask=Image.new("L", (96, 96))),
        "the mask is empty, so that nothing would change; paint over what is to change",
    ),
    "all masked, inverted": (
        dict(MASK, mask=Image.new("L", (96, 96), 255), inpainting_mask_invert=1),
        "the mask is empty, so that nothing would change; paint over what is to change",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_is_refused_in_one_line_before_anything_is_computed(host, calls, encoded, case):
    job, line = REFUSALS[case]
    job = {"init_images": [picture()], **job}
    reply = host.generate(True, job.pop("scale", 2.0), job.pop("settings", {}), **job)
    assert refusal(reply) == line
    assert job_parameters(host, reply) == {"DemoFusion refused": line}
    assert calls.rows == 0
    assert encoded == []
    assert host.reports == []
    assert enlarge(host, picture()).images[0].size == (192, 192), "the next job"


def test_pictures_of_several_sizes_can_be_the_base(host):
    """The host makes them one size, the tab's."""
    given = [picture(), picture(96, 88)]
    assert enlarge(host, given, 2.0, {"start_from": RESULT}, batch_size=2).images[1].size == (128, 128)


def test_soft_inpainting_is_refused_where_it_is_ticked(host, calls):
    add_script(host, "Soft Inpainting", True, 1)
    line = refusal(inpaint(host, picture(), disc()))
    assert line.startswith("Soft Inpainting is on: it blends at the base's size, and not at the phases'; untick it")
    assert calls.rows == 0
    host.img2img_runner.inputs[-2].value = False
    assert inpaint(host, picture(), disc()).images


def chosen(host, title, *args, **job):
    """A job with a script of the list at the bottom."""
    other = SimpleNamespace(title=lambda: "Another", args_from=0, args_to=0)
    host.img2img_runner.selectable_scripts[:] = [other, SimpleNamespace(title=lambda: title, args_from=0, args_to=0)]
    p = host.processing_for(*args, **{"init_images": [picture()], **job})
    p.script_args[0] = 2
    return p, fake_webui.process_images(p)


@pytest.mark.parametrize("title", ["X/Y/Z plot", "Prompts from file or textbox", "Prompt matrix"])
def test_scripts_of_the_list_that_make_whole_pictures_work(host, title):
    p, processed = chosen(host, title, True, 2.0)
    assert [image.size for image in processed.images] == [(192, 192)]
    assert "DemoFusion refused" not in p.extra_generation_params


@pytest.mark.parametrize("start", [PICTURE, RESULT])
@pytest.mark.parametrize("title", ["SD upscale", "Ultimate SD upscale", "Loopback", "Outpainting mk2", "A new one"])
def test_other_scripts_of_the_list_are_refused(host, calls, title, start):
    p, _ = chosen(host, title, True, 2.0, {"start_from": start})
    line = f"the script {title} is chosen, which samples parts of pictures, or again and again"
    assert p.extra_generation_params["DemoFusion refused"] == f"{line}; choose None there, or untick DemoFusion"
    assert calls.rows == 0
    assert len(chosen(host, title, False)[1].images) == 1


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"start_from": PICTURE}, "there is no picture in txt2img to start from, as 'Picture' wants; img2img has one"),
        ({"start_from": RESULT}, "there is no picture in txt2img to start from, as 'img2img result' wants; img2img has one"),
        ({"window": 64}, "a window is for a picture that is given; here it is the base's size, so set window to 0"),
    ],
)
def test_txt2img_has_no_picture_to_start_from(host, calls, settings, line):
    assert refusal(host.generate(True, 2.0, settings)) == line
    assert calls.rows == 0


# -------------------------------------------------------------------------------------------------------- the host's result


@pytest.mark.parametrize("fix_steps", [False, True])
@pytest.mark.parametrize(("sampler", "strength"), [("Euler", 0.75), ("Euler", 0.3), ("DDIM", 0.8)])
def test_the_base_is_the_hosts_own_result(host, calls, monkeypatch, sampler, strength, fix_steps):
    """What follows is what would follow if txt2img had made it."""
    host.shared.opts.img2img_fix_steps = fix_steps
    job = dict(sampler_name=sampler, steps=5, width=72)
    torch.manual_seed(0)
    own = host.generate(False, init_images=[picture()], denoising_strength=strength, **job)
    [base], rows = own.latents, calls.rows
    whole, encoded = fake_webui.setup_img2img_steps(own.p)
    run = encoded + 1 if sampler == "Euler" else encoded - 1
    assert rows == 2 * run

    calls.rows = 0
    torch.manual_seed(0)
    settings = {"start_from": RESULT, "denoising_strength": 0.6}
    reply = enlarge(host, picture(), 2.0, settings, denoising_strength=strength, **job)
    plan = plan_for(host, reply.p, 2.0, settings, RESULT)
    assert calls.rows == plan.evaluations
    assert plan.phases[0].calls == run
    assert plan.phases[0].steps == whole
    assert (plan.phases[1].steps, plan.phases[1].skipped) == (5, 2)
    bar = host.shared.total_tqdm
    assert bar._total == plan.phases[0].steps - plan.phases[0].skipped + plan.phases[1].evaluations
    assert reply.comments == []
    said = job_parameters(host, reply)
    assert (said["DemoFusion scale"], said["DemoFusion start"]) == ("2", "img2img result")

    def sample(p, *args):
        p.sampler = host.sd_samplers.create_sampler(p.sampler_name, p.sd_model)
        x = p.rng.next()
        p.scripts.process_before_every_sampling(p, x=x, noise=x, c=p.c, uc=p.uc)
        return base.clone()

    monkeypatch.setattr(host.processing.StableDiffusionProcessingTxt2Img, "sample", sample)
    assert torch.equal(reply.latents[-1], host.generate(True, 2.0, {"denoising_strength": 0.6}, **job).latents[-1])


@pytest.mark.parametrize("stop", ["interrupt", "skip"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_stop_in_the_base_is_as_without_us_and_told(host, at_call, stop, masked):
    at_call(2, getattr(host.shared.state, stop))
    reply = enlarge(host, picture(), 2.0, {"start_from": RESULT}, **(MASK if masked else {}))
    assert reply.images[0].size == (64, 64)
    line = "phase 1 of 2, 64x64, is not finished, because it was stopped"
    assert reply.comments == [f"DemoFusion: {line}"]
    assert job_parameters(host, reply) == {"DemoFusion incomplete": line}


def test_a_stop_in_the_base_of_the_second_batch_has_an_overlay_of_its_size(host, overlays):
    numbers_of_calls = []

    def stop(number, rows):
        numbers_of_calls.append(number)
        if number == first + 2:
            host.shared.state.skip()

    handle = watch_calls(host, lambda number, rows: numbers_of_calls.append(number))
    inpaint(host, picture(), disc(), 2.0, {"start_from": RESULT})
    first = len(numbers_of_calls)
    handle.remove()
    watch_calls(host, stop)
    reply = inpaint(host, picture(), disc(), 2.0, {"start_from": RESULT}, n_iter=2)
    assert [image.size for image in reply.images] == [(128, 128), (64, 64)]
    assert [mask.size for mask, _ in overlays[-2:]] == [(128, 128), (64, 64)]
    assert "is not finished, because it was stopped" in said(host, reply, 1)["DemoFusion incomplete"]


# ------------------------------------------------------------------------------------------------------------------ inpaint


def latent_mask(host, mask, size, blur=4):
    """What the host makes of a mask, at (h, w) latent pixels: 1 where the picture is to change."""
    pixels = np.asarray(mask, np.float32)
    for axis in (1, 0):
        pixels = gaussian_filter1d(pixels, blur, axis=axis, mode="mirror", truncate=2.5) if blur else pixels
    pixels = Image.fromarray(pixels.round().astype(np.uint8)).resize((size[1] * 8, size[0] * 8), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.around(np.asarray(pixels.resize((size[1], size[0])), np.float32) / 255))[None, None]


def assert_kept(host, reply, given, overlays, index=0):
    """Outside of the mask the picture is the enlarged original, and inside it is another one."""
    image, (kept, _) = reply.images[index], overlays[index - len(reply.images)]
    assert kept.size == image.size
    enlarged = numbers(host.images.resize_image(0, given, *image.size))
    outside, inside = np.asarray(kept) == 0, np.asarray(kept) == 255
    assert outside.mean() > 0.05
    assert np.array_equal(numbers(image)[outside], enlarged[outside])
    return np.abs(numbers(image)[inside].astype(int) - enlarged[inside]).mean()


@pytest.mark.parametrize("start", [PICTURE, RESULT])
@pytest.mark.parametrize(
    ("width", "height", "scale"), [(96, 96, 2.0), (101, 77, 2.0), (90, 120, 1.75), (96, 64, 2.35), (64, 64, 3.0)]
)
def test_what_is_not_masked_is_the_enlarged_picture_to_the_bit(host, overlays, width, height, scale, start):
    given = picture(width, height)
    reply = inpaint(host, given, disc(width, height), scale, {"start_from": start}, batch_size=2)
    own = (width, height) if start == PICTURE else (64, 64)
    for i in range(2):
        assert reply.images[i].size == tuple(8 * math.floor(side * scale / 8 + 0.5) for side in own)
        assert assert_kept(host, reply, given, overlays, i) > 5
        mask = host.webui.picture._mask_of(reply.p).resize(reply.images[i].size, Image.Resampling.LANCZOS)
        assert_equal(overlays[i][0], mask.point([min(2 * value, 255) for value in range(256)]))
    assert reply.comments == []


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_picture_and_mask_are_resized_by_the_tabs_own_mode(host, monkeypatch, mode):
    modes, resize = [], host.images.resize_image
    monkeypatch.setattr(
        host.images, "resize_image", lambda mode, *args: modes.append(mode) or resize(mode, *args).convert("RGB")
    )
    reply = inpaint(host, picture(), disc(), resize_mode=mode)
    assert reply.comments == []
    assert set(modes) == {mode}


def test_pictures_of_a_batch_have_each_its_own_surroundings(host, overlays):
    given = [picture(seed=seed) for seed in (1, 2)]
    reply = inpaint(host, given, disc(), batch_size=2)
    for i in range(2):
        assert_kept(host, reply, given[i], overlays, i)


@pytest.mark.parametrize(("stop", "inpainting"), [("interrupt", False), ("skip", True)])
@pytest.mark.parametrize(("call", "side"), [(1, 96), (20, 96), (39, 96), (40, 128), (100, 128), (141, 128)])
def test_a_stop_in_each_phase_keeps_what_is_not_masked(host, overlays, stop, call, side, inpainting):
    if inpainting:
        fake_webui.add_model(fake_webui.ToyModel(inpainting=True)).image_size = SIDE
    given = picture()
    watch_calls(host, lambda number, rows: getattr(host.shared.state, stop)() if number == call else None)
    reply = inpaint(host, given, disc(), settings=PLAIN)
    assert reply.images[0].size == (side, side)
    changed = assert_kept(host, reply, given, overlays)
    if side == 96:
        assert_equal(reply.images[0], given)
    else:
        assert changed > 5
    assert "stopped" in reply.comments[0]


def test_a_stop_before_the_first_phase_gives_the_picture_back(host, calls, overlays):
    script = add_script(host, "Impatient")
    script.process_before_every_sampling = lambda p, *args, **kwargs: host.shared.state.interrupt()
    for given in (picture(), picture(101, 77)):
        for mask in ({}, dict(MASK, mask=disc(*given.size))):
            reply = enlarge(host, given, **mask)
            assert_equal(reply.images[0], given)
            assert calls.rows == 0
            line = "the picture is as it was given, because the next was stopped"
            assert job_parameters(host, reply) == {"DemoFusion incomplete": line}
            size = "x".join(map(str, given.size))
            assert reply.comments == [f"DemoFusion: stopped; the picture as it was given, {size}, is what you get."]
    assert [None if mask is None else mask.size for mask, _ in overlays] == [None, (96, 96), None, (101, 77)]


@pytest.mark.parametrize("masked", [True, False])
def test_an_inpainting_checkpoint_sees_the_mask_and_the_picture_without_it(host, masked):
    model = fake_webui.add_model(fake_webui.ToyModel(inpainting=True))
    model.image_size, seen, given = SIDE, [], picture(64, 64)
    host.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, 4:]))
    mask = dict(MASK, mask=disc(64, 64), mask_blur_x=0, mask_blur_y=0) if masked else {}
    reply = enlarge(host, given, 2.0, PLAIN, steps=1, denoising_strength=1, batch_size=2, **mask)
    large = resized(host, disc(64, 64) if masked else Image.new("L", (64, 64), 255), (16, 16))
    share = torch.from_numpy(np.asarray(large, np.float32))[None, None] / 255
    drawn = resized(host, given, (16, 16))
    drawn = fake_webui.fill(drawn, large) if masked else drawn
    x = torch.from_numpy(numbers(drawn).astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        want = model.get_first_stage_encoding(model.encode_first_stage(x * (1 - share)))
    want = torch.cat([torch.nn.functional.interpolate(share, size=(16, 16)), want], 1)
    assert want[:, 0].unique().numel() > 1 if masked else (want[:, 0] == 1).all()
    views = local_views((16, 16), (8, 8), (4, 4)) + dilated_views((8, 8), 2)
    for rows, view in zip(seen, views, strict=True):
        torch.testing.assert_close(rows, view.crop(want).expand(4, -1, -1, -1), rtol=0, atol=1e-5)
    assert reply.images[0].size == (128, 128)


@pytest.mark.parametrize("start", [PICTURE, RESULT])
def test_outside_the_mask_every_phase_holds_the_encoded_picture(host, fusions, start):
    given, mask = picture(), disc()
    inpaint(host, given, mask, {PICTURE: 2.0, RESULT: 3.0}[start], {"start_from": start, "hold_flat": 20.0}, inpainting_fill=1)
    assert len(fusions) == 2
    for fusion in fusions:
        size = tuple(fusion.reference.shape[-2:])
        outside = latent_mask(host, mask, size) == 0
        assert 0.2 < outside.float().mean() < 0.9
        assert (fusion.held[outside] == 1).all()
        assert (fusion.held[~outside] < 1).any()
        where = outside.expand_as(fusion.reference)
        want = encode(host, resized(host, given, size))
        torch.testing.assert_close(fusion.reference[where], want[where], rtol=0, atol=1e-5)
        assert (fusion.reference - want).abs()[~where].max() > 1e-2 or fusion is fusions[0]


@pytest.mark.parametrize("start", [PICTURE, RESULT])
def test_what_is_not_masked_is_put_back_after_a_phase_too(host, start):
    """Taking on the base's moments has moved it."""
    given, mask = picture(), disc()
    latents = inpaint(host, given, mask, 2.0, {"start_from": start}, inpainting_fill=1).latents[-1]
    size = tuple(latents.shape[-2:])
    outside = latent_mask(host, mask, size) == 0
    assert_same_where(latents, encode(host, resized(host, given, size)), outside)


@pytest.mark.parametrize("fill", [0, 1, 2, 3])
def test_the_first_phase_begins_with_what_masked_content_says(host, fusions, overlays, fill):
    given, mask = picture(), disc()
    reply = inpaint(host, given, mask, inpainting_fill=fill, batch_size=2)
    reference, inside = fusions[0].reference, latent_mask(host, mask, (16, 16)) == 1
    drawn = resized(host, given, (16, 16))
    if fill != 1:
        drawn = fake_webui.fill(drawn, resized(host, host.webui.picture._mask_of(reply.p), (16, 16)))
    want = encode(host, drawn).expand(2, -1, -1, -1)
    assert_same_where(reference, want, ~inside)
    if fill == 2:
        want = fake_webui.ImageRNG((4, 16, 16), reply.p.seeds).next()
    assert_same_where(reference, torch.zeros_like(want) if fill == 3 else want, inside)
    assert [assert_kept(host, reply, given, overlays, i) > 5 for i in range(2)] == [True, True]


def assert_same_where(a, b, where):
    where = where.expand_as(a)
    torch.testing.assert_close(a[where], b[where], rtol=0, atol=1e-5)


def test_fills_make_different_pictures(host):
    made = [inpaint(host, picture(), disc(), inpainting_fill=fill).images[0] for fill in range(4)]
    for a, b in itertools.combinations(made, 2):
        assert not np.array_equal(numbers(a), numbers(b))


def test_an_inverted_mask_is_the_mask_inverted(host, overlays):
    inverted = inpaint(host, picture(), disc(), inpainting_mask_invert=1)
    assert_equal(inverted.images[0], inpaint(host, picture(), ImageOps.invert(disc())).images[0])
    kept = np.asarray(overlays[0][0])
    assert kept[96, 96] == 0
    assert kept[0, 0] == 255
    assert_kept(host, inverted, picture(), overlays[:1])


@pytest.mark.parametrize("blur", [(0, 0), (4, 4), (7, 0), (0, 3), (1, 9), (12, 2)])
@pytest.mark.parametrize("size", [(96, 96), (101, 77)])
def test_a_mask_is_blurred_as_the_host_blurs_it(host, blur, size):
    mask = disc(*size)
    p = host.processing_for(init_images=[picture(*size)], mask=mask, mask_blur_x=blur[0], mask_blur_y=blur[1])
    want = np.asarray(mask, np.float64)
    for sigma, axis in zip(blur, (1, 0)):
        want = gaussian_filter1d(want, sigma, axis=axis, mode="mirror", truncate=2.5) if sigma else want
    made = host.webui.picture._mask_of(p)
    assert (made.mode, made.size) == ("L", size)
    assert np.abs(np.asarray(made, np.float64) - want).max() <= 0.5 + 1e-3
    assert p.image_mask is mask


def test_a_blur_that_is_wider_than_the_mask_is_one(host):
    mask = Image.new("L", (20, 10))
    mask.paste(255, (0, 0, 10, 10))
    p = host.processing_for(init_images=[picture()], mask=mask, mask_blur_x=64, mask_blur_y=64)
    made = np.asarray(host.webui.picture._mask_of(p), int)
    assert (np.diff(made, axis=1) <= 0).all()
    assert (np.diff(made, axis=0) == 0).all()
    assert made[0, 0] > 127 > made[0, -1]


@pytest.mark.parametrize("size", [(48, 48), (200, 200), (50, 96)])
def test_a_mask_may_have_another_size_than_the_picture(host, overlays, fusions, size):
    given = picture()
    reply = inpaint(host, given, disc(*size), mask_blur_x=0, mask_blur_y=0)
    assert assert_kept(host, reply, given, overlays) > 5
    for fusion in fusions:
        want = latent_mask(host, disc(*size), tuple(fusion.reference.shape[-2:]), blur=0)
        assert torch.equal(fusion.held, 1 - want)


@pytest.mark.parametrize("start", [PICTURE, RESULT])
def test_who_wants_no_overlay_gets_none(host, overlays, start):
    host.shared.opts.overlay_inpaint = False
    reply = inpaint(host, picture(), disc(), 2.0, {"start_from": start})
    [(mask, overlay)] = overlays
    assert overlay is None
    assert mask.size == reply.images[0].size
    assert not np.array_equal(numbers(reply.images[0])[:8], numbers(picture().resize(mask.size, 1))[:8])


@pytest.mark.parametrize("start", [PICTURE, RESULT])
def test_while_phases_run_the_host_blends_nothing(host, start):
    p = host.processing_for(True, 2.0, {"start_from": start}, init_images=[picture()], **MASK)
    seen = []

    def look(number, rows):
        denoiser = p.sampler.model_wrap_cfg
        seen.append([x is None for x in (p.mask, p.nmask, denoiser.mask, denoiser.nmask)])

    watch_calls(host, look)
    fake_webui.process_images(p)
    base = STEPS if start == RESULT else 0
    assert seen[:base] == [[False] * 4] * base
    assert len(seen) > base
    assert all(row == [True] * 4 for row in seen[base:])
    assert p.mask.shape == p.nmask.shape == (4, 8, 8)


def test_a_mask_over_all_of_it_changes_all_of_it(host, overlays):
    given = picture()
    masked = inpaint(host, given, Image.new("L", (96, 96), 255), inpainting_fill=1)
    assert_same(masked.latents[-1], enlarge(host, given).latents[-1])


# ------------------------------------------------------------------------------------------------------------------ trouble


def no_memory():
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")


TROUBLE = {
    "interrupt": ("was stopped", "stopped"),
    "skip": ("was stopped", "stopped"),
    "error": ("failed: the model broke", "failed: the model broke"),
    "memory": (
        "ran out of memory with one view at a time; a smaller window or half precision needs less",
        "out of memory with one view at a time; a smaller window or half precision needs less",
    ),
    "nan": ("failed: NaN in what the unet made", "failed: NaN in what the unet made"),
}


@pytest.mark.parametrize("kind", TROUBLE)
@pytest.mark.parametrize(("call", "reached"), [(1, 1), (39, 1), (40, 2), (141, 2)])
def test_trouble_keeps_the_last_finished_phase_or_the_picture(host, at_call, kind, call, reached):
    given = picture(96, 96)
    if reached == 2:
        host.shared.opts.samples_save = True
        expected = enlarge(host, given, 2.0, {**PLAIN, "save_phases": True}, outpath_samples="/nowhere").latents[0]
        host.shared.opts.samples_save = False
    before = snapshot(host)
    if kind == "nan":
        seen = itertools.count(1)
        handle = host.unet.register_forward_hook(lambda *args: args[-1].fill_(math.nan) if next(seen) == call else None)
    else:
        state = host.shared.state
        action = {"interrupt": state.interrupt, "skip": state.skip, "error": fail, "memory": no_memory}[kind]
        handle = at_call(call, action)
    host.reports.clear()
    reply = enlarge(host, given, 2.0, PLAIN)
    handle.remove()
    assert_as_before(host, before)
    assert len(host.reports) == (kind not in ("interrupt", "skip"))

    why, short = TROUBLE[kind]
    told = job_parameters(host, reply)
    if reached == 1:
        assert_equal(reply.images[0], given)
        assert reply.latents == [], "nothing is decoded"
        assert list(told) == ["DemoFusion incomplete"]
        line, kept = "the picture is as it was given, because the next", "the picture as it was given, 96x96, is what you get."
    else:
        assert torch.equal(reply.latents[0], expected)
        assert reply.images[0].size == (128, 128)
        assert told["DemoFusion scale"] == "1.33333333333"
        assert told["DemoFusion start"] == "Picture 96x96"
        line, kept = (
            "phase 2 of 3 is the last one finished, because the next",
            "phase 2 of 3, 128x128, is the last one finished.",
        )
    assert told["DemoFusion incomplete"].startswith(f"{line} {why}")
    assert len(reply.comments) == 1
    assert reply.comments[0].startswith(f"DemoFusion: {short}")
    assert reply.comments[0].endswith(kept)
    assert "\n" not in reply.comments[0]


def test_every_colour_comes_back_to_the_bit(host, at_call):
    ramp = np.stack(np.meshgrid(np.arange(256), np.arange(0, 256, 4)), -1).astype(np.uint8)
    given = Image.fromarray(np.concatenate([ramp, 255 - ramp[..., :1]], -1))
    at_call(1, host.shared.state.interrupt)
    assert_equal(enlarge(host, given).images[0], given)
    at_call(1, host.shared.state.interrupt)
    assert_equal(inpaint(host, given, disc(*given.size)).images[0], given)


def test_a_batch_of_pictures_comes_back_as_it_was(host, at_call):
    given = [picture(101, 77, seed) for seed in (1, 2)]
    at_call(1, fail)
    for image, own in zip(enlarge(host, given, batch_size=2).images, given, strict=True):
        assert_equal(image, own)
    at_call(1, fail)
    for image in enlarge(host, given[0], batch_size=3).images:
        assert_equal(image, given[0])


def test_an_interrupt_ends_the_batches_after_it_and_a_skip_does_not(host, at_call):
    at_call(1, host.shared.state.interrupt)
    assert [image.size for image in enlarge(host, picture(), n_iter=3).images] == [(96, 96)]
    at_call(1, host.shared.state.skip)
    reply = enlarge(host, picture(), n_iter=2)
    assert [image.size for image in reply.images] == [(96, 96), (192, 192)]
    assert [list(said(host, reply, i)) for i in range(2)] == [["DemoFusion incomplete"], []]
    assert [parameters(host, reply, i).get("DemoFusion scale") for i in range(2)] == [None, "2"]


@pytest.mark.parametrize(("most", "side"), [(0, 96), (16, 128), (23, 128)])
@pytest.mark.parametrize("kind", ["memory", "nan"])
@pytest.mark.parametrize("masked", [False, True])
def test_what_cannot_be_decoded_leaves_the_phase_before_or_the_picture(host, monkeypatch, overlays, most, side, kind, masked):
    given, model, decode = picture(), host.shared.sd_model, host.shared.sd_model.decode_first_stage

    def small(own, z):
        if z.shape[-1] <= most:
            return decode(z)
        return no_memory() if kind == "memory" else torch.full((1, 3, 8, 8), math.nan)

    monkeypatch.setattr(type(model), "decode_first_stage", small)
    reply = enlarge(host, given, **(MASK if masked else {}))
    assert reply.images[0].size == (side, side)
    if side == 96:
        assert_equal(reply.images[0], given)
        assert reply.comments[-1].endswith("; the picture as it was given, 96x96, is what you get.")
        assert "DemoFusion scale" not in parameters(host, reply)
    else:
        assert parameters(host, reply)["DemoFusion scale"] == "1.33333333333"
    if masked:
        assert_kept(host, reply, given, overlays)
    assert list(said(host, reply)) == ["DemoFusion incomplete"]


def test_a_picture_that_cannot_be_encoded_comes_back(host, monkeypatch):
    """The first phase's size is the first that is larger than what the host has encoded for its base."""
    encode_whole = host.shared.sd_model.encode_first_stage
    monkeypatch.setattr(
        type(host.shared.sd_model), "encode_first_stage", lambda model, x: no_memory() if x.shape[-1] > 64 else encode_whole(x)
    )
    given = picture()
    reply = enlarge(host, given)
    assert_equal(reply.images[0], given)
    assert "out of memory" in said(host, reply)["DemoFusion incomplete"]


def test_out_of_memory_beside_the_views_speaks_of_windows(host, monkeypatch):
    monkeypatch.setattr(host.webui.phases, "fusion_for", lambda *args, **more: no_memory())
    reply = enlarge(host, picture())
    line = (
        "the picture is as it was given, because the next ran out of memory beside the views; a smaller scale or window needs"
    )
    assert said(host, reply)["DemoFusion incomplete"].startswith(line)


WHATEVER = ["Phases", "_restored", "Progress.pause", "_keep_what_is_finished", "may_use_tiles", "_Job.called", "read_resumed"]


@pytest.mark.parametrize("what", WHATEVER)
@pytest.mark.parametrize("start", [PICTURE, RESULT])
def test_whatever_else_fails_nothing_is_lost_and_no_scale_is_claimed(host, monkeypatch, tmp_path, what, start):
    def fail(*args, **kwargs):
        raise KeyError("a surprise")

    settings = {"start_from": start}
    if what in ("_keep_what_is_finished", "_Job.called"):
        base = STEPS if start == RESULT else 0
        watch_calls(host, lambda number, rows: host.shared.state.skip() if number == base + 2 else None)
    if what == "read_resumed":
        settings["resume"] = str(tmp_path / "phase.safetensors")
        saved = SavedPhase(2, torch.ones(1, 4, 16, 16), torch.ones(1, 4, 8, 8), "WebUI", from_picture=start == PICTURE)
        saved.write(Path(settings["resume"]))
    owner, _, name = what.rpartition(".")
    monkeypatch.setattr(getattr(host.webui.loop, owner) if owner else host.webui.loop, name, fail)
    given = picture()
    reply = inpaint(host, given, disc(), 3.0 if start == RESULT else 2.0, settings)
    told = job_parameters(host, reply)
    assert list(told) == ["DemoFusion incomplete"]
    assert "because the next failed: 'a surprise'" in told["DemoFusion incomplete"]
    assert len(host.reports) == 1
    if start == PICTURE:
        assert_equal(reply.images[0], given)
    else:
        assert reply.images[0].size == (64, 64)


def test_a_base_of_another_size_than_the_windows_gives_the_picture_back(host, calls, overlays):
    """Another extension has changed the size since."""
    script = add_script(host, "Another")
    script.process = lambda p, *args: setattr(p, "width", 80)
    given = picture()
    reply = inpaint(host, given, disc(), width=88)
    assert_equal(reply.images[0], given)
    assert calls.rows == 0
    line = "the picture is what you get, because another extension has made the base 80x64, and not 64x64; switch it off"
    assert job_parameters(host, reply) == {"DemoFusion incomplete": line}
    assert reply.p.width == 88


# ---------------------------------------------------------------------------------------------------------- saved, and resumed


SAVE = {"save_phases": True}


@pytest.fixture
def saving(host, tmp_path):
    """The folder where the host saves its images."""
    host.shared.opts.samples_save = True
    return tmp_path


@pytest.mark.parametrize(
    ("side", "start", "sizes"),
    [(96, PICTURE, {2: 128}), (128, PICTURE, {2: 192}), (96, RESULT, {1: 64, 2: 128})],
)
def test_phases_are_saved_but_not_the_shrunken_picture(host, saving, side, start, sizes):
    """The picture of 128x128 has windows of 64x64 too, and its first phase is three times as wide."""
    reply = enlarge(
        host, picture(side, side), 3.0 if start == RESULT else 2.0, {**SAVE, "start_from": start}, outpath_samples=saving
    )
    assert reply.comments == []
    assert {int(image["suffix"][-1]): image["size"][0] for image in host.saved} == sizes
    assert len(host.saved) == len(sizes)
    told = host.infotext_utils.parse_generation_parameters(host.saved[-1]["info"])
    if start == PICTURE:
        assert float(told["DemoFusion scale"]) == pytest.approx(sizes[2] / side)
        assert told["DemoFusion start"] == f"Picture {side}x{side}"
    else:
        assert (told["DemoFusion scale"], told["DemoFusion start"]) == ("2", "img2img result")
    [*_, last] = sorted(saving.iterdir())
    phase = read_saved(last, "WebUI")
    assert (phase.number, phase.from_picture) == (2, start == PICTURE)
    assert tuple(phase.latents.shape[-2:]) == (sizes[2] // 8,) * 2
    assert tuple(phase.base.shape[-2:]) == (SIDE, SIDE)


@pytest.mark.parametrize("mask", [{}, MASK])
@pytest.mark.parametrize("side", [96, 128])
def test_a_saved_phase_is_resumed_to_the_same_picture(host, calls, saving, side, mask):
    given, job = picture(side, side), dict(mask, outpath_samples=saving)
    whole = enlarge(host, given, 2.0, SAVE, **job)
    [file] = saving.iterdir()
    rows, calls.rows = calls.rows, 0
    again = enlarge(host, given, 2.0, {"resume": str(file)}, **job)
    assert_equal(again.images[0], whole.images[0])
    assert again.infotexts == whole.infotexts
    assert again.comments == []
    plan = plan_for(host, again.p)
    assert calls.rows == rows - 2 * plan.phases[1].evaluations
    assert calls.rows == 2 * plan.phases[2].evaluations > 0


def test_a_saved_phase_of_another_picture_is_not_resumed(host, calls, saving):
    enlarge(host, picture(), 2.0, SAVE, outpath_samples=saving)
    [file] = saving.iterdir()
    calls.rows = 0
    other = picture(seed=1)
    reply = enlarge(host, other, 2.0, {"resume": str(file)}, outpath_samples=saving)
    assert_equal(reply.images[0], other)
    assert calls.rows == 0
    assert "the saved phase is of another image" in said(host, reply)["DemoFusion incomplete"]


def test_a_saved_phase_of_another_kind_of_job_is_refused(host, calls, tmp_path):
    file = tmp_path / "phase.safetensors"
    for from_picture, line in ((False, "without a picture"), (True, "with a picture")):
        SavedPhase(2, torch.ones(1, 4, 16, 16), torch.ones(1, 4, 8, 8), "WebUI", from_picture=from_picture).write(file)
        if from_picture:
            replies = [enlarge(host, picture(), 3.0, {"resume": str(file), "start_from": RESULT})]
            replies.append(host.generate(True, 3.0, {"resume": str(file)}))
        else:
            replies = [enlarge(host, picture(), 2.0, {"resume": str(file)})]
        for reply in replies:
            assert refusal(reply) == f"the saved phase is of a job {line} to start from"
    assert calls.rows == 0


def test_a_stop_after_a_resumed_phase_gives_that_phase(host, at_call, saving):
    enlarge(host, picture(), 2.0, SAVE, outpath_samples=saving)
    [file] = saving.iterdir()
    at_call(1, host.shared.state.interrupt)
    reply = enlarge(host, picture(), 2.0, {"resume": str(file)}, outpath_samples=saving)
    assert torch.equal(reply.latents[0], read_saved(file, "WebUI").latents)
    assert parameters(host, reply)["DemoFusion scale"] == "1.33333333333"


# ------------------------------------------------------------------------------------------------- passes of other extensions


def within(host, p, **settings):
    """A job of another extension over a finished image, with all that p carries, as ADetailer makes it."""
    inner = host.processing.StableDiffusionProcessingImg2Img(prompt="a face", init_images=[picture(64, 64, 5)], **settings)
    inner.scripts, inner.script_args = p.scripts, p.script_args
    return inner


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("start", [PICTURE, RESULT])
def test_a_pass_over_a_finished_image_is_the_hosts_alone(host, calls, overlays, marked, start):
    inner, made = [], []

    def run(p, pp, *args):
        if inner:
            return
        inner.append(within(host, p, mask=disc(64, 64), inpaint_full_res=False))
        if marked:
            inner[0]._ad_inner = True
        rows = calls.rows
        made.append(fake_webui.process_images(inner[0]))
        made.append(calls.rows - rows)
        pp.image = ImageOps.invert(pp.image)

    given = picture()
    alone = inpaint(host, given, disc(), 2.0, {"start_from": start})
    rows, calls.rows = calls.rows, 0
    add_script(host, "ADetailer").postprocess_image = run
    reply = inpaint(host, given, disc(), 2.0, {"start_from": start})
    assert made[1] == 2 * STEPS
    assert [image.size for image in made[0].images] == [(64, 64)]
    assert not any("DemoFusion" in text for text in made[0].infotexts)
    assert calls.rows == rows + 2 * STEPS
    assert reply.infotexts == alone.infotexts
    assert assert_kept(host, reply, given, overlays) > 5
    assert (reply.p.width, reply.p.height) == (64, 64)


def test_a_pass_that_says_so_is_the_hosts_alone_wherever_it_runs(host, calls):
    p = host.processing_for(True, 2.0, init_images=[picture()])
    p._ad_inner = True
    processed = fake_webui.process_images(p)
    assert [image.size for image in processed.images] == [(64, 64)]
    assert calls.rows == 2 * STEPS
    assert "DemoFusion" not in processed.infotexts[0]


def test_a_pass_of_img2img_within_txt2img_is_the_hosts_alone(host, calls):
    made = []

    def run(p, processed, *args):
        if not hasattr(p, "init_images"):
            made.append(fake_webui.process_images(within(host, p)))

    alone = host.generate(True, 2.0)
    add_script(host, "ADetailer", img2img=False).postprocess = run
    calls.rows = 0
    reply = host.generate(True, 2.0)
    assert [image.size for image in made[0].images] == [(64, 64)]
    assert calls.rows == 2 * STEPS * (1 + VIEWS[2]) + 2 * STEPS
    assert reply.infotexts == alone.infotexts
    assert torch.equal(reply.latents[0], alone.latents[0])


@pytest.mark.parametrize("call", [1, 50])
def test_a_second_process_of_a_copy_does_not_claim_what_was_not_made(host, at_call, call):
    def again(p, pp, *args):
        other = copy.copy(p)
        p.scripts.before_process(other)
        p.scripts.process(other)

    at_call(call, host.shared.state.interrupt)
    alone = inpaint(host, picture(), disc(), settings=PLAIN)
    add_script(host, "ADetailer").postprocess_image = again
    at_call(call, host.shared.state.interrupt)
    reply = inpaint(host, picture(), disc(), settings=PLAIN)
    assert reply.infotexts == alone.infotexts
    assert parameters(host, reply).get("DemoFusion scale") == (None if call == 1 else "1.33333333333")
    assert_equal(reply.images[0], alone.images[0])
    assert reply.comments == alone.comments


def test_a_postprocess_of_a_copy_in_the_midst_changes_nothing(host):
    alone, sizes = inpaint(host, picture(), disc()), []

    def early(p, pp, *args):
        p.scripts.postprocess(copy.copy(p), host.processing.Processed(p, []))
        sizes.append((p.width, p.height))

    add_script(host, "ADetailer").postprocess_image = early
    reply = inpaint(host, picture(), disc(), width=80)
    assert sizes == [(64, 64)]
    assert_equal(reply.images[0], alone.images[0])
    assert reply.p.width == 80


NOTE = "it stood aside, since ADetailer's Skip img2img is on; untick one of the two"


def test_where_adetailer_skips_img2img_ours_stands_aside(host, calls, overlays):
    p = host.processing_for(True, 2.0, init_images=[picture()], **MASK)
    p._ad_skip_img2img = True
    processed = fake_webui.process_images(p)
    assert [image.size for image in processed.images] == [(64, 64)]
    assert calls.rows == 2 * STEPS
    assert list(p.comments) == [f"DemoFusion: {NOTE}"]
    told = host.infotext_utils.parse_generation_parameters(processed.infotexts[0])
    assert {key: value for key, value in told.items() if "DemoFusion" in key} == {"DemoFusion note": NOTE}


@pytest.mark.parametrize("start", [PICTURE, RESULT])
def test_so_it_does_where_adetailer_comes_after_it(host, calls, start):
    def skip(p, *args):
        p._ad_skip_img2img, p.width, p.height, p.steps = True, 48, 40, 1

    add_script(host, "ADetailer").process = skip
    reply = enlarge(host, picture(), 2.0, {"start_from": start}, **MASK)
    assert [image.size for image in reply.images] == [(48, 40)]
    assert calls.rows == 2
    assert job_parameters(host, reply) == {"DemoFusion note": NOTE}


# ---------------------------------------------------------------------------------------------------------------- a batch tab


def batch_tab(host, pictures, masks=None, **settings):
    """The host's loop over files: one p for all of them. Yields p and what came of each."""
    p = host.processing_for(True, 2.0, init_images=[None], **settings)
    host.shared.state.begin("img2img")
    for i, given in enumerate(pictures):
        p.init_images = [given] * p.batch_size
        if masks:
            p.image_mask = masks[i]
        yield p, fake_webui.process_images(p)
    host.shared.state.end()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_batch_of_files_is_made_as_each_by_itself(host, batch_size):
    given = [picture(96, 96), picture(101, 77, 1), picture(64, 120, 2)]
    for own, (p, processed) in zip(given, batch_tab(host, given, width=72, height=56, batch_size=batch_size), strict=True):
        assert (p.width, p.height, p.batch_size) == (72, 56, batch_size)
        alone = enlarge(host, own, width=72, height=56, batch_size=batch_size)
        assert processed.infotexts == alone.infotexts
        for a, b in zip(processed.images, alone.images, strict=True):
            assert_equal(a, b)


def test_files_have_masks_of_their_own(host, overlays):
    given = [picture(96, 96), picture(101, 77, 1)]
    masks = [disc(96, 96), ImageOps.invert(disc(101, 77))]
    for own, (_, processed) in zip(given, batch_tab(host, given, masks, inpaint_full_res=False), strict=True):
        assert_kept(host, processed, own, overlays)


def test_a_file_that_is_refused_or_stopped_does_not_end_the_batch(host, at_call):
    at_call(1, host.shared.state.skip)
    given = [picture(), picture(16, 16), picture(101, 77)]
    sizes, told = [], []
    for p, processed in batch_tab(host, given, width=72, n_iter=2):
        sizes.append([image.size for image in processed.images])
        told.append("DemoFusion refused" in processed.infotexts[-1])
        assert (p.width, p.n_iter) == (72, 2)
    assert sizes == [[(96, 96), (192, 192)], [], [(200, 152)] * 2]
    assert told == [False, True, False]


# ----------------------------------------------------------------------------------------------------------------- infotext


FULL = dict(phase_steps=5, doubling=True, pixel_upsampling=True, stride=0.4, feather=True, hold_flat=7.5, jitter=False)
FULL |= dict(alpha1=2.5, alpha2=1.5, alpha3=0.5, blur_sigma=0.75, view_batch_size=2, hold_steps=12, most_phase_steps=3)
FULL |= dict(phase_sampler="DPM++ 2M", phase_schedule="Karras", phase_cfg_scale=2.5, phase_prompt='a "disc", red:\nhere')
FULL |= dict(phase_negative_prompt="green", phase_checkpoint="Use same checkpoint", upscaler="Doubled")
FULL |= dict(resize_width=0, resize_height=0, unguided_flat=12.5)


def pasted(host, text, img2img=True):
    """The form of a tab when parameters are pasted: by name, None for what stays as it is."""
    script, runner = (host.img2img_script, host.img2img_runner) if img2img else (host.script, host.runner)
    told = host.infotext_utils.parse_generation_parameters(text)
    values = {id(component): function(told) for component, function in runner.infotext_fields}
    return {name: values.get(id(control)) for name, control in zip(host.webui.settings.ARGUMENTS, script.controls)}


@pytest.mark.parametrize(("start", "window"), [(PICTURE, 64), (RESULT, 0)])
def test_pasting_in_img2img_restores_the_form_but_does_not_tick_it(host, start, window):
    settings = {**FULL, "start_from": start, "window": window}
    torch.manual_seed(0)
    reply = enlarge(host, picture(101, 77), 2.25, settings, denoising_strength=0.65)
    form = pasted(host, reply.infotexts[0])
    assert form.pop("enabled") is None
    assert form.pop("save_phases") is None
    expected = {"scale": 2.25, "denoising_strength": 0.65 if start == PICTURE else 1.0, "resume": "", **settings}
    assert form == expected
    assert {name: type(value) for name, value in form.items()} == {name: type(value) for name, value in expected.items()}
    assert host.img2img_script.controls[0] not in [control for control, _ in host.img2img_runner.infotext_fields]
    torch.manual_seed(0)
    again = enlarge(host, picture(101, 77), form.pop("scale"), form, denoising_strength=0.65)
    assert_equal(again.images[0], reply.images[0])
    assert again.infotexts == reply.infotexts


def test_pictures_of_img2img_do_not_change_txt2imgs_form(host):
    for start in (PICTURE, RESULT):
        text = enlarge(host, picture(), 2.0, {"start_from": start}).infotexts[0]
        form = pasted(host, text, img2img=False)
        assert form.pop("enabled") is False
        assert form.pop("resume") == ""
        assert set(form.values()) == {None}


def test_pictures_of_txt2img_do_not_change_img2imgs_form(host):
    text = host.generate(True, 2.0, FULL).infotexts[0]
    form = pasted(host, text)
    assert form.pop("resume") == ""
    assert set(form.values()) == {None}
    assert pasted(host, text, img2img=False)["enabled"] is True


def test_no_key_says_upscale(host):
    """ControlNet reads those that do."""
    replies = [enlarge(host, picture(), 2.0, {**FULL, "window": 64}), enlarge(host, picture(), 2.0, {"start_from": RESULT})]
    replies += [enlarge(host, picture(), 9.0), gallery(host, picture())]
    for reply in replies:
        keys = [key for key in parameters(host, reply) if "DemoFusion" in key]
        assert keys
        assert not any("upscale" in key.lower() for key in keys)


def test_what_cannot_be_read_is_said_in_the_tab_that_reads_it(host):
    text = "a ring\nSteps: 4, DemoFusion scale: 2, DemoFusion jitter: maybe, DemoFusion start: Picture 96x96"
    told = host.infotext_utils.parse_generation_parameters(text)
    for script, runner, visible in ((host.img2img_script, host.img2img_runner, True), (host.script, host.runner, False)):
        unread = script.controls[len(host.webui.settings.ARGUMENTS) + 1]
        [update] = [function(told) for control, function in runner.infotext_fields if control is unread]
        assert update["visible"] is visible
        assert ("jitter cannot be read" in update["value"]) is visible


# ---------------------------------------------------------------------------------------------------------------- the gallery


def request(host, image, infotext="", grid=False):
    """What the button sends; None: no picture is selected."""
    host.infotext_utils.image_from_url_text.__globals__["images_of_the_gallery"]["a picture"] = image
    file = None if image is None else {"name": "a picture", "is_file": True}
    told = {"picture": file, "infotext": infotext, "grid": grid, "click": 1}
    return json.dumps(told)


def gallery(host, image, infotext="", scale=2.0, settings=None, ticked=False, text=None, **job):
    """A job of the button; of txt2img unless it has pictures of its own."""
    asked = request(host, image, infotext) if text is None else text
    args = script_arguments(host.webui, [ticked, scale, settings or {}])
    return host.generate(*args, host.webui.settings.END, "", asked, **job)


def as_picture(sample):
    """An image of txt2img as the host makes a picture of it."""
    return Image.fromarray((255 * ((sample + 1) / 2).clamp(0, 1)).byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize("ticked", [True, False])
@pytest.mark.parametrize("tab", [dict(), dict(batch_size=3, n_iter=2, enable_hr=True)])
def test_the_button_enlarges_the_selected_picture_alone(host, calls, fusions, ticked, tab):
    """Whatever the form says of batches and of Hires. fix."""
    reply = gallery(host, picture(), "a ring\nSteps: 4, Seed: 7", ticked=ticked, **tab)
    assert calls.rows == 2 * STEPS * (VIEWS[2] + VIEWS[3])
    assert len(reply.images) == len(reply.infotexts) == 1
    assert reply.images[0].shape == (3, 192, 192)
    told = parameters(host, reply)
    assert (told["Seed"], told["DemoFusion scale"], told["DemoFusion start"]) == ("7", "2", "Picture 96x96")
    assert reply.comments == []
    assert [fusion.window for fusion in fusions] == [(SIDE, SIDE)] * 2
    own = enlarge(host, picture(), seed=7, denoising_strength=1)
    assert torch.equal(reply.latents[-1], own.latents[-1]), "as img2img makes it"


def test_the_selected_picture_as_gradio_4_has_it(host):
    told = json.loads(request(host, picture(), "a ring\nSteps: 4, Seed: 7"))
    told["picture"] = {"image": {"path": "a picture", "url": "http://host/file=a picture", "mime_type": None}, "caption": None}
    reply, own = gallery(host, picture(), text=json.dumps(told)), gallery(host, picture(), "a ring\nSteps: 4, Seed: 7")
    assert reply.infotexts == own.infotexts
    assert torch.equal(reply.latents[-1], own.latents[-1])


def test_without_an_infotext_the_tabs_seed_counts(host):
    reply = gallery(host, picture(), seed=5)
    assert parameters(host, reply)["Seed"] == "5"
    assert torch.equal(reply.latents[-1], gallery(host, picture(), "x\nSeed: 5").latents[-1])
    assert not torch.equal(reply.latents[-1], gallery(host, picture(), "x\nSeed: 6").latents[-1])


def test_in_txt2img_our_own_denoising_strength_counts(host, calls):
    gallery(host, picture(), settings={"denoising_strength": 0.5}, denoising_strength=0.9)
    assert calls.rows == 2 * 2 * (VIEWS[2] + VIEWS[3])


@pytest.mark.parametrize(("width", "height", "scale"), [(96, 96, 2.0), (80, 56, 2.5), (64, 64, 3.0)])
def test_a_picture_that_was_drawn_at_once_is_txt2imgs_own_base(host, calls, fusions, width, height, scale):
    """Its windows are its own size, whatever the checkpoint was made for."""
    base = host.generate(width=width, height=height)
    rows, calls.rows = calls.rows, 0
    own = host.generate(True, scale, width=width, height=height)
    whole, calls.rows = calls.rows, 0
    planned = [(fusion.window, fusion.stride, fusion.dilation, tuple(fusion.reference.shape)) for fusion in fusions]
    fusions.clear()
    reply = gallery(host, as_picture(base.images[0]), base.infotexts[0], scale)
    assert calls.rows == whole - rows
    assert [(fusion.window, fusion.stride, fusion.dilation, tuple(fusion.reference.shape)) for fusion in fusions] == planned
    assert reply.images[0].shape == own.images[0].shape
    plan = make_plan((height // 8, width // 8), STEPS, DemoFusionConfig(scale=scale))
    assert calls.rows == plan.evaluations - 2 * plan.phases[0].evaluations
    assert parameters(host, reply)["DemoFusion scale"] == f"{scale:g}"


@pytest.mark.parametrize(
    "infotext",
    [
        "x\nSize: 96x96, DemoFusion scale: 2",
        "x\nSize: 96x96, Hires upscale: 2",
        "x\nSize: 96x96, Hires resize-1: 96, Hires resize-2: 96",
        "x\nSize: 48x48",
        "x\nSteps: 3",
        "",
    ],
)
def test_a_picture_that_was_enlarged_has_the_checkpoints_windows(host, fusions, infotext):
    assert gallery(host, picture(), infotext).images
    assert fusions[0].window == (SIDE, SIDE)


def test_a_window_goes_before_the_size_at_which_it_was_drawn(host, fusions):
    gallery(host, picture(), "x\nSize: 96x96", 4.0)
    gallery(host, picture(), "x\nSize: 96x96", 4.0, {"window": 64})
    assert {fusion.window for fusion in fusions} == {(12, 12), (8, 8)}
    assert (fusions[0].window, fusions[-1].window) == ((12, 12), (8, 8))


@pytest.mark.parametrize("img2img", [False, True])
@pytest.mark.parametrize(
    ("told", "line"),
    [
        ({"picture": None}, "no picture is selected in the gallery; click one, and then the button"),
        ({"grid": True}, "the gallery shows the grid; select a single picture, and then click the button"),
        ({"picture": {"name": "gone", "is_file": True}}, "the gallery's picture cannot be read: 'gone'"),
        ({"picture": {"image": {"path": "gone"}, "caption": None}}, "the gallery's picture cannot be read: 'gone'"),
        ({"picture": {}}, """the gallery's picture cannot be told from '{"picture": {}, "infotext": "", "grid": '"""),
        ("junk", "the gallery's picture cannot be told from 'junk'"),
        ("[]", "the gallery's picture cannot be told from '[]'"),
        ("7", "the gallery's picture cannot be told from '7'"),
        ("{}", "the gallery's picture cannot be told from '{}'"),
    ],
)
def test_what_the_button_cannot_have_is_refused_in_one_line(host, calls, encoded, told, line, img2img):
    text = told if isinstance(told, str) else json.dumps({**json.loads(request(host, picture())), **told})
    job = dict(init_images=[picture()]) if img2img else {}
    reply = gallery(host, picture(), text=text, n_iter=2, **job)
    assert refusal(reply) == line
    assert calls.rows == 0
    assert encoded == []
    assert reply.p.n_iter == 2


def test_what_cannot_be_enlarged_is_refused_there_too(host, calls):
    assert "48x48 is no larger than what the checkpoint draws at once" in refusal(gallery(host, picture(24, 24)))
    assert refusal(gallery(host, picture(), scale=0.5)) == "scale must be above 1 and at most 8, got 0.5"
    assert calls.rows == 0


def test_in_img2img_the_selected_picture_takes_the_tabs_place_without_its_mask(host, calls, overlays):
    selected = picture(101, 77, 3)
    tab = dict(MASK, init_images=[picture()], inpaint_full_res=True, denoising_strength=0.5, batch_size=2)
    reply = gallery(host, selected, "x\nSeed: 7", settings={"start_from": RESULT}, **tab)
    assert [image.size for image in reply.images] == [(200, 152)]
    assert calls.rows == plan_for(host, reply.p).evaluations
    assert parameters(host, reply)["DemoFusion start"] == "Picture 101x77"
    assert_equal(reply.images[0], enlarge(host, selected, seed=7, denoising_strength=0.5).images[0])
    assert overlays[0] == (None, None)


def test_in_img2img_it_is_not_enlarged_as_latents(host, encoded):
    given = picture(160, 96)
    reply = gallery(host, given, init_images=[picture(seed=1)], resize_mode=3)
    assert (96, 160) not in encoded
    assert_equal(reply.images[0], enlarge(host, given).images[0])


def test_pictures_enlarged_as_latents_can_be_the_base(host, encoded):
    given = picture(160, 96)
    reply = enlarge(host, given, 2.0, {"start_from": RESULT}, resize_mode=3)
    assert encoded == [(96, 160)]
    assert reply.images[0].size == (128, 128)


def test_in_img2img_no_script_of_the_list_may_be_chosen(host, calls):
    args = script_arguments(host.webui, [False, 2.0])
    asked = [*args, host.webui.settings.END, "", request(host, picture())]
    p, _ = chosen(host, "SD upscale", *asked)
    assert "the script SD upscale is chosen" in p.extra_generation_params["DemoFusion refused"]
    assert calls.rows == 0
    assert chosen(host, "X/Y/Z plot", *asked)[1].images[0].size == (192, 192)


@pytest.mark.parametrize("call", [1, 60])
def test_a_stop_gives_the_selected_picture_back_or_the_finished_phase(host, at_call, call):
    at_call(call, host.shared.state.interrupt)
    given = picture(96, 96)
    reply = gallery(host, given, settings=PLAIN)
    made = as_picture(reply.images[0])
    if call == 1:
        assert_equal(made, given)
    assert made.size == ((96, 96) if call == 1 else (128, 128))
    assert list(said(host, reply)) == ["DemoFusion incomplete"]


def test_the_next_job_knows_nothing_of_the_button(host, calls):
    own = host.generate(True, 2.0)
    gallery(host, picture())
    calls.rows = 0
    assert torch.equal(host.generate(True, 2.0).latents[0], own.latents[0])
    assert torch.equal(host.generate(False).latents[0], host.generate().latents[0])
    assert calls.rows == 2 * STEPS * (1 + VIEWS[2]) + 2 * 2 * STEPS


def test_a_request_of_the_api_cannot_be_taken_for_the_button(host):
    """It counts behind the end of the arguments only."""
    args = script_arguments(host.webui, [False, 2.0])
    assert host.generate(*args, "", "", request(host, picture())).images[0].shape == (3, 64, 64)


# --------------------------------------------------------------------------------------------------------- the form, the plot


def test_img2imgs_form_has_every_control_and_shows_it(host):
    script, names = host.img2img_script, host.webui.settings.ARGUMENTS
    ids = [control.elem_id for control in script.controls]
    assert ids == [f"script_demofusion_img2img_{name}" for name in ("enable", *names[1:], "end", "unread", "asked")]
    assert not set(ids) & {control.elem_id for control in host.script.controls}
    controls = dict(zip(names, script.controls))
    assert all(getattr(control, "visible", True) for control in controls.values())
    assert (controls["start_from"].choices, controls["start_from"].value) == ([PICTURE, RESULT], PICTURE)
    assert controls["enabled"].value is False
    form = host.webui.settings.DemoFusionConfig.preset("Fast", scale=2.0)
    values = [control.value for control in script.controls[: len(names)]]
    shown = [host.webui.settings.shown(name, getattr(form, name)) for name in settings_of(host.webui, names)[1:]]
    assert settings_of(host.webui, values)[1:] == shown
    hidden = dict(zip(names, host.script.controls))["start_from"]
    assert (hidden.visible, hidden.value) == (False, "")


@pytest.mark.parametrize(
    ("tab", "last", "own"),
    [
        ("txt2img", "txt2img_upscale", "script_demofusion_gallery"),
        ("img2img", "img2img_send_to_extras", "script_demofusion_img2img_gallery"),
    ],
)
def test_the_button_stands_last_in_the_gallerys_row_and_is_wired(host, monkeypatch, tab, last, own):
    made, init = [], fake_webui.ToolButton.__init__
    monkeypatch.setattr(
        fake_webui.ToolButton, "__init__", lambda self, *args, **given: (init(self, *args, **given), made.append(self))[0]
    )
    script = type(host.script)()
    script.is_img2img = tab == "img2img"
    assert script.show(script.is_img2img) is host.scripts.AlwaysVisible
    controls = script.ui(script.is_img2img)
    made.clear()  # of the form's own buttons
    page = {}
    for name in (f"{tab}_gallery", f"save_{tab}", last, f"{tab}_another", f"generation_info_{tab}"):
        page[name] = fake_webui.Textbox(elem_id=name)
        for elem_id, callback in script.on_after_component_elem_id:
            if elem_id == name:
                callback(host.scripts.OnComponent(page[name]))
        assert len(made) == (name not in (f"{tab}_gallery", f"save_{tab}")), name
    [button] = made
    assert button.elem_id == own
    [(code, inputs, outputs)] = button._events["click"]
    assert "demofusionSelected(gallery, infos)" in code
    assert inputs == [page[f"{tab}_gallery"], page[f"generation_info_{tab}"]]
    assert outputs == [controls[-1]]
    [(code, inputs, outputs)] = controls[-1]._events["change"]
    assert f"demofusionGenerate('{tab}', asked)" in code
    assert inputs == outputs == [controls[-1]]


@pytest.mark.skipif(not NODE, reason="needs node, to run the form's scripts")
def test_the_request_is_there_until_the_form_has_been_read():
    """Which may be a frame after the click on Generate."""
    script = """async () => {
        const clicked = [], read = [];
        let asked = "a picture";
        globalThis.requestAnimationFrame = (callback) => setTimeout(callback, 10);
        const click = () => requestAnimationFrame(() => read.push(asked));
        globalThis.gradioApp = () => ({getElementById: (id) => clicked.push(id) && {click}});
        asked = await demofusionGenerate("txt2img", asked);
        return {clicked, read, asked, then: await demofusionGenerate("txt2img", asked)};
    }"""
    assert in_node(script) == {"clicked": ["txt2img_generate"], "read": ["a picture"], "asked": "", "then": ""}


@pytest.fixture
def plot(host):
    """The host's X/Y/Z plot, of which our axes are asked: by their labels."""
    module = ModuleType("xyz_grid.py")
    module.axis_options = []

    def axis(kind):
        return lambda label, type, apply, choices=None: SimpleNamespace(
            label=label, type=type, apply=apply, choices=choices, kind=kind
        )

    module.AxisOption, module.AxisOptionImg2Img = axis("both"), axis("img2img")
    module.Script = type("Script", (host.scripts.Script,), {"__module__": "xyz_grid.py"})
    host.scripts.scripts_data.append(host.scripts.ScriptClassData(module.Script, "", "", module))
    host.script_callbacks.before_ui_callback()
    return {option.label: option for option in module.axis_options}


def test_the_plot_has_an_axis_for_the_start_in_img2img(host, plot, calls):
    axis = plot["[DemoFusion] start from"]
    assert axis.kind == "img2img"
    assert {option.kind for label, option in plot.items() if label != axis.label} == {"both"}
    assert axis.choices() == [PICTURE, RESULT]
    starts = []
    for value in axis.choices():
        p = host.processing_for(False, 2.0, init_images=[picture()])
        axis.apply(p, value, axis.choices())
        processed = fake_webui.process_images(p)
        told = host.infotext_utils.parse_generation_parameters(processed.infotexts[0])
        starts.append((told["DemoFusion start"], processed.images[0].size))
    assert starts == [("Picture 96x96", (192, 192)), ("img2img result", (128, 128))]
    p = host.processing_for(False, 2.0, init_images=[picture()])
    axis.apply(p, "the picture", [])
    fake_webui.process_images(p)
    assert "start from must be" in p.extra_generation_params["DemoFusion refused"]
    plot["[DemoFusion] window"].apply(p, 64, [])
    assert p.script_args[host.img2img_script.args_from + host.webui.settings.ARGUMENTS.index("window")] == 64


# ---------------------------------------------------------------------------------------------------------------------
# Progress


@pytest.mark.parametrize("batches", [1, 2])
def test_one_bar_over_the_phases_of_a_picture(host, batches):
    """It begins at 0, since no base is sampled, and goes with what the model has seen."""
    state, shown, rows = host.shared.state, [], []

    def look(module, args):
        own = state.sampling_step / state.sampling_steps if state.sampling_steps else 0
        shown.append((state.job_no + own) / state.job_count)
        rows.append(len(args[0]))

    handle = host.unet.register_forward_pre_hook(look)
    enlarge(host, picture(128, 128), 3.0, n_iter=batches, steps=6)
    handle.remove()
    assert shown[0] == 0
    assert all(after >= before - 1e-9 for before, after in itertools.pairwise(shown)), "the bar goes back"
    done = [sum(rows[:i]) / sum(rows) for i in range(len(rows))]
    assert max(abs(a - b) for a, b in zip(shown, done, strict=True)) < 0.06
    assert state.job_no == batches
