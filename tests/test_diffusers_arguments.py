"""What `generate` is given from Python: each works, or is refused in one line before anything is computed; nothing is lost."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_pipeline

from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.fusion import Fusion
from lib_demofusion.hosts.diffusers import Incomplete, Result, check_prompt, generate, load_pipeline, plan_for
from lib_demofusion.saved import SavedPhase

SMALL = DemoFusionConfig(scale=1.5)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("sd15")


@pytest.fixture(scope="module")
def plain(pipe):
    return latents(pipe)


def latents(pipe, **settings):
    return generate(pipe, "red fox", **{"config": SMALL, "steps": 2, **settings}).phases[-1][1]


def picture(mode="RGB", size=(64, 64)):
    return Image.radial_gradient("L").resize(size).convert(mode)


SAME = {
    "seed": [np.int64(0), np.uint8(0), np.float32(0), 0.0, [0], (0,), range(1), np.array([0]), torch.tensor([0]), {0}],
    "steps": [np.int32(2), 2.0, np.float64(2)],
    "width": [np.int64(64), 64.0, None],
    "height": [np.uint16(64), np.float32(64), None],
    "cfg_scale": [np.float32(7.5), np.float64(7.5)],
    "negative_prompt": [None, ""],
    "sampler": ["Euler", "EulerDiscreteScheduler", np.str_("Euler")],
    "schedule": ["", "Automatic", np.str_("automatic")],
    "loras": [[], ()],
    "phase_loras": [[]],
    "phase_pipe": [None],
    "progress": [None, lambda phase, views: None],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in SAME.items() for value in values])
def test_numbers_of_any_type_are_the_same_numbers(pipe, plain, name, value):
    assert torch.equal(latents(pipe, **{name: value}), plain)


REFUSED = [
    ("prompt", ["red fox"], "the prompt must be a text, got a list"),
    ("prompt", None, "the prompt must be a text, got a NoneType"),
    ("prompt", b"red fox", "the prompt must be a text, got a bytes"),
    ("prompt", "red \udcff fox", "the prompt is no valid Unicode"),
    ("prompt", "(red:1.2) fox", r"the prompt has '\(red:1.2\)'"),
    ("prompt", "red " * 76, "the prompt is too long: 76 tokens, 75 at most"),
    ("negative_prompt", 5, "the negative prompt must be a text, got a int"),
    ("negative_prompt", ["red"], "the negative prompt must be a text"),
    ("negative_prompt", "<lora:x:1>", "the negative prompt has '<lora:x:1>'"),
    ("controls", None, "controls must be a list of Control, got a NoneType"),
    ("controls", ["canny"], "controls must be a list of Control, got a list"),
    ("config", {"scale": 2.0}, "config must be a DemoFusionConfig, got a dict"),
    ("config", None, "config must be a DemoFusionConfig, got a NoneType"),
    ("config", DemoFusionConfig, "config must be a DemoFusionConfig, got a type"),
    ("height", 0, "height must be at least 1, got 0"),
    ("height", -64, "height must be at least 1, got -64"),
    ("width", 64.5, "width must be a whole number, got 64.5"),
    ("width", "64", "width must be a whole number, got '64'"),
    ("width", float("nan"), "width must be a whole number, got nan"),
    ("width", True, "width must be a whole number, got True"),
    ("width", 100, "width must be divisible by 8, got 100; 96 is near"),
    ("steps", 0, "steps must be at least 1, got 0"),
    ("steps", -1, "steps must be at least 1, got -1"),
    ("steps", 2.5, "steps must be a whole number, got 2.5"),
    ("steps", None, "steps must be a whole number, got a NoneType"),
    ("steps", float("inf"), "steps must be a whole number, got inf"),
    ("steps", np.bool_(True), "steps must be a whole number"),
    ("cfg_scale", float("nan"), "CFG scale must be a number, got nan"),
    ("cfg_scale", "7", "CFG scale must be a number, got '7'"),
    ("cfg_scale", None, "CFG scale must be a number"),
    ("cfg_scale", True, "CFG scale must be a number, got True"),
    ("cfg_scale", 0, "CFG scale must be at least 1, got 0"),
    ("cfg_scale", np.float32("inf"), "CFG scale must be a number"),
    ("sampler", None, "the sampler must be a name, got a NoneType; there are: Euler"),
    ("sampler", 5, "the sampler must be a name, got a int"),
    ("sampler", "euler b", "no sampler called 'euler b'; there are: Euler"),
    ("schedule", "Cosine", "no schedule called 'Cosine'; there are: Automatic, Uniform, Karras"),
    ("schedule", 3, "the schedule must be a name, got a int"),
    ("loras", None, "loras must be a list of Lora, got a NoneType"),
    ("phase_loras", ["x.safetensors"], "phase_loras must be a list of Lora, got a list"),
    ("phase_pipe", "xl", "the phases' checkpoint: str has no UNet"),
    ("seed", [], "there is no seed; give one for each image"),
    ("seed", -1, "seed must be at least 0 and at most 9223372036854775807, got -1"),
    ("seed", 2**63, "seed must be at least 0 and at most"),
    ("seed", [1, -2], "seed must be at least 0"),
    ("seed", True, "seed must be a whole number, got True"),
    ("seed", 1.5, "seed must be a whole number, got 1.5"),
    ("seed", [1.5], "seed must be a whole number, got 1.5"),
    ("seed", [[1]], "seed must be a whole number, got a list"),
    ("seed", None, "the seed must be a whole number or several, got a NoneType"),
    ("seed", "1", "the seed must be a whole number or several, got '1'"),
    ("seed", {"a": 1}, "the seed must be a whole number or several, got a dict"),
    ("seed", np.array([[1, 2]]), "seed must be a whole number, got a ndarray"),
    ("image", np.zeros((64, 64, 3), np.uint8), "the image must be a PIL image, got a ndarray"),
    ("image", torch.zeros(3, 64, 64), "the image must be a PIL image, got a Tensor"),
    ("image", "in.png", "the image must be a PIL image, got a str; Image.open makes one of a file"),
    ("image", picture("RGBA", (64, 64)).crop((0, 0, 72, 64)), "the image has transparency"),
    ("image", Image.new("LA", (64, 64)), "the image has transparency"),
    ("image", Image.new("PA", (64, 64)), "the image has transparency"),
    ("image", Image.new("I;16", (64, 64)), "the image is I;16, more than 8 bits a channel; convert it to plain RGB first"),
    ("image", Image.new("I", (64, 64)), "the image is I, more than 8 bits a channel;"),
    ("image", Image.new("F", (64, 64)), "the image is F, more than 8 bits a channel;"),
    ("image", Image.new("CMYK", (64, 64)), "the image is CMYK;"),
    ("image", Image.new("LAB", (64, 64)), "the image is LAB;"),
    ("image", Image.new("YCbCr", (64, 64)), "the image is YCbCr;"),
    ("image", Image.new("RGB", (0, 0)), "a picture of 0x0 is too small; a latent pixel is 8 pixels"),
    ("image", picture(size=(32, 32)), "48x48 is no larger than what the checkpoint draws at once; scale 2.65 is the smallest"),
    ("size", (128, 128), "a size is of what becomes of an image that is given; without one config.scale says it"),
    ("config", DemoFusionConfig(window=64), "a window is for a picture that is given; without one it is the base's size"),
    ("mask", picture("L"), "a mask is of an image; give the image too"),
    ("mask_blur", -1, "mask blur must be at least 0 and at most 64, got -1"),
    ("mask_blur", 65, "mask blur must be at least 0 and at most 64, got 65"),
    ("mask_blur", 1.5, "mask blur must be a whole number, got 1.5"),
    ("progress", 5, "progress must be a function, got a int"),
    ("cancelled", False, "cancelled must be a function, got a bool"),
    ("finished", "x", "finished must be a function, got a str"),
    ("resume", "out.safetensors", "resume must be a SavedPhase, got a str"),
]


@pytest.mark.parametrize(("name", "value", "says"), REFUSED)
def test_what_cannot_work_is_refused_in_one_line_before_anything_is_computed(pipe, name, value, says, monkeypatch):
    monkeypatch.setattr(pipe.unet, "forward", None)
    monkeypatch.setattr(pipe.text_encoder, "forward", None)
    settings = {"prompt": "red fox", "config": SMALL, "steps": 2, name: value}
    with pytest.raises(ValueError, match=says) as error:
        generate(pipe, settings.pop("prompt"), **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config", "height", "width", "steps", "cfg_scale", "sampler", "image", "controls"])
def test_the_plan_refuses_the_same(pipe, name):
    for value, says in [(value, says) for key, value, says in REFUSED if key == name]:
        settings = {"config": SMALL, name: value}
        with pytest.raises(ValueError, match=says):
            plan_for(pipe, settings.pop("config"), **settings)


def keyed(mode, key):
    image = picture(mode)
    image.info["transparency"] = key
    return image


@pytest.mark.parametrize(
    "image",
    [
        picture("L"),
        picture("P"),
        picture("RGBA"),
        picture("LA"),
        keyed("RGB", (255, 0, 0)),  # a colour that it does not have
    ],
    ids=lambda image: image.mode,
)
def test_images_that_lose_nothing_as_rgb_are_used(pipe, image):
    assert torch.equal(latents(pipe, image=image), latents(pipe, image=picture()))


def test_a_bilevel_image_is_used(pipe):
    image = picture("1")
    assert torch.equal(latents(pipe, image=image), latents(pipe, image=image.convert("RGB")))


def test_a_transparent_colour_that_an_image_has_is_refused(pipe):
    for mode in ("RGB", "L", "P"):
        image = keyed(mode, picture(mode).getpixel((5, 5)))
        with pytest.raises(ValueError, match="has transparency"):
            plan_for(pipe, SMALL, steps=2, image=image)


def test_a_file_that_is_cut_off_is_refused(pipe, tmp_path):
    picture().resize((256, 256)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    with Image.open(tmp_path / "cut.png") as image, pytest.raises(ValueError, match="the image cannot be read: "):
        generate(pipe, "", config=SMALL, steps=2, image=image)


# --- an image, its mask and its size


def white(size=(64, 64), mode="L"):
    return Image.new("L", size, 255).convert(mode)


SIZED = [
    (dict(height=64), "height and width are of a base made from the prompt; with an image use size or config.scale"),
    (dict(width=64), "height and width are of a base"),
    (dict(size=(120, 100)), "size must be divisible by 8, got 100x120; 96x120 is near"),
    (dict(size=(128, 96)), "96x128 has not the aspect of the picture, 64x64; 112x112 is near"),
    (dict(size=(64, 64)), "64x64 is not larger than the picture, 64x64; choose a larger size"),
    (dict(size=(56, 64)), "64x56 is not larger than the picture"),
    (dict(size=(520, 520)), "520x520 is more than 8 times the picture's sides; 512x512 is the largest"),
    (dict(size=(72, 72)), "72x72 is no larger than what the checkpoint draws at once; scale 1.35 is the smallest that works"),
    (dict(size=128), "size must be height and width, got 128"),
    (dict(size=(128,)), "size must be height and width, got a tuple"),
    (dict(size="128x128"), "size must be height and width, got '128x128'"),
    (dict(size=(128, 128.5)), "the result's width must be a whole number, got 128.5"),
    (dict(size=(0, 128)), "the result's height must be at least 1, got 0"),
]
MASKED = [
    (white((64, 72)), "the mask is 64x72 and the image 64x64; they must be of one size"),
    (white().point(lambda x: 0), "nothing of the mask is white, so nothing would change"),
    (white().point(lambda x: 127), "nothing of the mask is white"),
    (white(mode="CMYK"), "the mask is CMYK; convert it to plain RGB first"),
    (Image.new("LA", (64, 64)), "the mask has transparency; put it on a background first"),
    (Image.new("I;16", (64, 64)), "the mask is I;16, more than 8 bits a channel"),
    ("mask.png", "the mask must be a PIL image, got a str; Image.open makes one of a file"),
]


@pytest.mark.parametrize(("settings", "says"), [*SIZED, *((dict(mask=mask), says) for mask, says in MASKED)])
def test_what_an_image_cannot_have_is_refused_in_one_line_before_anything_is_computed(pipe, settings, says, monkeypatch):
    for network in (pipe.unet, pipe.text_encoder, pipe.vae):
        monkeypatch.setattr(network, "forward", None)
    monkeypatch.setattr(pipe.vae, "encode", None)
    for call in (lambda **more: generate(pipe, "red fox", config=SMALL, **more), lambda **more: plan_for(pipe, SMALL, **more)):
        with pytest.raises(ValueError, match=f"^{says}[^\n]*$"):
            call(steps=2, image=picture(), **settings)


def test_white_that_is_too_small_to_draw_in_is_refused(pipe):
    mask = Image.new("L", (64, 64))
    mask.putpixel((20, 20), 255)
    assert plan_for(pipe, DemoFusionConfig(scale=8.0), image=picture(), mask=mask, mask_blur=0)
    with pytest.raises(ValueError, match="^the mask's white areas are too small to be drawn in; make them larger, or blur"):
        plan_for(pipe, DemoFusionConfig(scale=8.0), image=picture(), mask=mask)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_a_mask_may_be_of_any_plain_kind(pipe, mode):
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    assert torch.equal(latents(pipe, image=picture(), mask=mask.convert(mode)), latents(pipe, image=picture(), mask=mask))


def test_the_size_may_be_stretched_by_two_parts_in_a_hundred(pipe):
    image = picture(size=(800, 400))
    for size, final in [((800, 1600), (100, 200)), ((800, 1576), (100, 197)), ([816, 1600], (102, 200))]:
        assert plan_for(pipe, SMALL, image=image, size=size).phases[-1].size == final
    with pytest.raises(ValueError, match="1560x800 has not the aspect of the picture, 800x400; 1576x792 is near"):
        plan_for(pipe, SMALL, image=image, size=(800, 1560))
    assert plan_for(pipe, SMALL, image=picture(size=(20, 200)), size=(400, 40)).phases[-1].size == (50, 5)


def test_a_checkpoint_that_does_not_say_its_size_is_told_it():
    pipe = tiny_pipeline("sd15")
    told = plan_for(pipe, SMALL, image=picture())
    pipe.unet.register_to_config(sample_size=[4, 16])
    assert plan_for(pipe, SMALL, image=picture()) == told, "sides of 8 on average"
    pipe.unet.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match="^this checkpoint does not say its own size; give window, the side in pixels"):
        plan_for(pipe, SMALL, image=picture())
    assert plan_for(pipe, DemoFusionConfig(scale=1.5, window=64), image=picture()) == told


# --- a saved phase


@pytest.fixture(scope="module")
def saved(pipe):
    phases = {}
    settings = dict(config=DemoFusionConfig(scale=3.0), steps=2, seed=[1, 2])
    generate(pipe, "a", **settings, finished=lambda result, phase: phases.setdefault(phase.number, phase))
    return phases


def go_on(pipe, phase, **changed):
    return generate(pipe, "a", config=DemoFusionConfig(scale=3.0), steps=2, seed=[1, 2], resume=replace(phase, **changed))


def nan(x):
    return torch.full_like(x, torch.nan)


@pytest.mark.parametrize(
    ("number", "change", "says"),
    [
        (2, lambda p: dict(number=0), "the phase must be a whole number from 1 to 8, got 0"),
        (2, lambda p: dict(number=-1), "the phase must be a whole number from 1 to 8, got -1"),
        (2, lambda p: dict(number=1), "no phase 1 makes latents of"),
        (2, lambda p: dict(number=3), "no phase 3 makes latents of"),
        (2, lambda p: dict(number="2"), "the phase must be a whole number from 1 to 8, got '2'"),
        (2, lambda p: dict(number=None), "the phase must be a whole number"),
        (2, lambda p: dict(latents=p.latents[:1]), "must agree in images and channels"),
        (2, lambda p: dict(latents=p.latents[:, :3]), "must agree in images and channels"),
        (2, lambda p: dict(latents=p.latents[:, :3], base=p.base[:, :3]), "of other sizes"),
        (2, lambda p: dict(latents=p.latents[:1], base=p.base[:1], generators=p.generators[:1]), "of other sizes"),
        (2, lambda p: dict(latents=p.latents[..., 1:]), "of other sizes"),
        (2, lambda p: dict(latents=p.latents[..., 6:]), "no phase 2 makes latents of"),
        (2, lambda p: dict(base=p.base[:, :3]), "must agree in images and channels"),
        (2, lambda p: dict(base=p.base[0]), "base must have four dimensions"),
        (2, lambda p: dict(base=None), "base must be a tensor, got a NoneType"),
        (2, lambda p: dict(latents=p.latents.tolist()), "latents must be a tensor, got a list"),
        (2, lambda p: dict(latents=nan(p.latents)), "latents must be finite"),
        (2, lambda p: dict(base=p.base / 0), "base must be finite"),
        (2, lambda p: dict(base=p.base.int()), "base must be floating point numbers"),
        (1, lambda p: dict(latents=p.latents + 1), "phase 1 is the base, and latents and base are not the same"),
        (2, lambda p: dict(generators=None), "the generators are missing"),
        (2, lambda p: dict(generators=[1, 2]), "generators must be a tensor, got a list"),
        (2, lambda p: dict(generators=p.generators[:1]), "generators must be bytes, a row for each image"),
        (2, lambda p: dict(generators=p.generators[:, 1:]), "generators must be states of torch's generator"),
        (2, lambda p: dict(generators=p.generators.float()), "generators must be bytes, a row for each image"),
        (2, lambda p: dict(generators=torch.full_like(p.generators, 255)), "generators must be states of torch's generator"),
        (2, lambda p: dict(made_by="WebUI", generators=None), "was saved by WebUI, whose noise cannot be repeated here"),
        (2, lambda p: dict(made_by="another"), "'another' is no host that saves phases"),
        (3, lambda p: {}, "phase 3 is saved, and there is none after it"),
    ],
)
def test_a_saved_phase_that_does_not_belong_is_refused(pipe, saved, number, change, says, monkeypatch):
    monkeypatch.setattr(pipe.unet, "forward", None)
    with pytest.raises(ValueError, match=says) as error:
        go_on(pipe, saved[number], **change(saved[number]))
    assert "\n" not in str(error.value)


def test_phases_saved_in_half_precision_go_on(pipe, saved):
    result = go_on(pipe, saved[2], latents=saved[2].latents.half())
    assert [phase.number for phase, _ in result.phases] == [1, 2, 3]
    assert isinstance(saved[1], SavedPhase)


# --- whatever happens, what is finished is handed out

ERRORS = [KeyError("x"), AttributeError("a"), TypeError("a\nb"), AssertionError(), NotImplementedError(), MemoryError()]
ERRORS += [RuntimeError("r"), OSError("o"), ValueError("v"), StopIteration(), Exception("e"), FloatingPointError("f")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("by", ["the model", "progress", "cancelled", "finished"])
def test_whatever_is_raised_what_is_finished_is_handed_out(pipe, monkeypatch, by, error):
    calls = []

    def fail(*args):
        calls.append(args)
        if by == "finished" or len(calls) > 4:
            raise error

    if by == "the model":
        predict = Fusion.predict
        monkeypatch.setattr(Fusion, "predict", lambda self, *args: fail() or fail() or fail() or predict(self, *args))
    given = {} if by == "the model" else {by: fail}
    with pytest.raises(Incomplete) as stopped:
        generate(pipe, "", config=SMALL, steps=2, **given)
    assert "\n" not in str(stopped.value)
    cause = stopped.value.__cause__
    if not isinstance(error, (MemoryError, StopIteration)):  # the one is met by smaller calls, the other is a generator's own
        assert cause is error
    assert cause is not None
    assert not stopped.value.cancelled
    assert [phase.number for phase, _ in stopped.value.result.phases] == [1]
    assert stopped.value.result.images()[0].size == (64, 64)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_program_hands_it_out_too(pipe, error):
    def stop(result, saved):
        raise error

    with pytest.raises(Incomplete, match="^stopped$") as stopped:
        generate(pipe, "", config=SMALL, steps=2, finished=stop)
    assert stopped.value.cancelled
    assert len(stopped.value.result.phases) == 1


def test_a_phase_that_cannot_be_decoded_does_not_take_the_others_along(pipe):
    result = generate(pipe, "", config=SMALL, steps=2)
    broken = Result(result.plan, pipe, [result.phases[0], (result.phases[1][0], nan(result.phases[1][1]))], result.view_batch)
    with pytest.raises(FloatingPointError):
        broken.images()
    assert broken.images(0)[0].tobytes() == result.images(0)[0].tobytes()


# --- one job at a time


def test_jobs_of_several_threads_on_one_pipeline_do_not_mix():
    pipe = tiny_pipeline("sdxl")
    pipe.vae.register_to_config(force_upcast=True)
    sizes = [(64, 64), (64, 96), (96, 64)]
    config = DemoFusionConfig(scale=1.5, pixel_upsampling=True)

    def job(size, **more):
        return generate(pipe, "red", config=config, steps=2, height=size[0], width=size[1], seed=1, **more).images()[0]

    alone = [job(size) for size in sizes]
    made: dict = {}

    def watched(size):
        made[size] = job(size, progress=lambda phase, views: time.sleep(0.002))  # lets the others run, if they can

    threads = [threading.Thread(target=watched, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for size, image in zip(sizes, alone):
        assert made[size].size == (size[1] * 3 // 2, size[0] * 3 // 2)
        assert made[size].tobytes() == image.tobytes()


def test_a_job_waits_for_the_one_before_it_and_pipelines_of_their_own_do_not():
    pipe, other = tiny_pipeline("sd15"), tiny_pipeline("sd15")
    inside, go_on, order = threading.Event(), threading.Event(), []

    def hold(result, saved):
        inside.set()
        assert go_on.wait(60)
        order.append("first")

    first = threading.Thread(target=lambda: generate(pipe, "", config=SMALL, steps=1, finished=hold))
    first.start()
    assert inside.wait(60)
    second = threading.Thread(target=lambda: order.append(generate(pipe, "", config=SMALL, steps=1) and "second"))
    second.start()
    assert generate(other, "", config=SMALL, steps=1).images()  # while the first one holds its own
    assert not order
    go_on.set()
    first.join()
    second.join()
    assert order[-1] == "second"


def test_a_jobs_own_functions_may_decode(pipe):
    sizes = []
    generate(pipe, "", config=SMALL, steps=1, finished=lambda result, saved: sizes.append(result.images()[0].size))
    assert sizes == [(64, 64), (96, 96)]


def test_prompts_are_counted_by_each_tokenizer(pipe):
    check_prompt(pipe, "red " * 75, "prompt")
    with pytest.raises(ValueError, match="76 tokens, 75 at most"):
        check_prompt(pipe, "red " * 76, "prompt")


def test_nothing_of_torchs_own_randomness_is_used():
    pipe = load_pipeline()
    before = torch.get_rng_state()
    for sampler in ("Euler", "Euler a", "DPM++ 2M", "LCM"):
        generate(pipe, "two red rings", config=SMALL, steps=2, sampler=sampler)
    assert torch.equal(torch.get_rng_state(), before)
