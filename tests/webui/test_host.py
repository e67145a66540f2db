"""What the extension does to the real host: nothing that stays, and what users know of Hires. fix goes on working."""

import json
import math
import random
import re
import sys

import numpy as np
import pytest
import torch
from arguments import settings_of
from webui_host import same_but_for_rounding

STEPS, SCALE = 4, 3
BASE_CALLS = STEPS
CALLS = STEPS * (1 + 4 + 9)  # view batches of 4: 13 views and 34 views


def snapshot(host):
    """Whatever of ours could stay behind: callbacks, patches on classes and on the model, settings, the job's state."""
    model = host.shared.sd_model
    classes = [
        host.sd_samplers_cfg_denoiser.CFGDenoiser,
        host.sd_samplers_common.Sampler,
        host.sd_samplers_kdiffusion.KDiffusionSampler,
        host.sd_samplers_kdiffusion.CFGDenoiserKDiffusion,
        host.sd_samplers_timesteps.CompVisSampler,
        host.processing.StableDiffusionProcessing,
        host.processing.StableDiffusionProcessingTxt2Img,
        type(model),
    ]
    state = host.shared.state
    modules = [host.devices, host.processing, host.sd_samplers, host.sd_samplers_common, host.rng, host.shared]
    ignored = {"cached_c", "cached_uc", "cached_hr_c", "cached_hr_uc"}  # the host's caches of prompts
    ignored |= {"__slotnames__"}  # Python's, of a class whose objects have been copied
    return flat(
        {
            "callbacks": {k: [id(c.callback) for c in v] for k, v in host.script_callbacks.callback_map.items()},
            "classes": {c.__name__: {k: id(v) for k, v in vars(c).items() if k not in ignored} for c in classes},
            "modules": {m.__name__: {k: id(v) for k, v in vars(m).items() if callable(v)} for m in modules},
            "model": {
                name: (
                    len(m._forward_hooks),
                    len(m._forward_pre_hooks),
                    "forward" in vars(m),
                    getattr(m, "padding_mode", None),
                    sorted(k for k in vars(m) if "demofusion" in k),
                )
                for name, m in host.networks.items()
            },
            "options": dict(host.shared.opts.data),
            "state": (state.job, state.job_count, type(state.job_no), state.textinfo),
            "wraps around": host.wraps_around,
            "own": host.own_state,
        }
    )


def flat(values, path=""):
    """What is in dictionaries within dictionaries, by its path, so that pytest shows what differs."""
    if not isinstance(values, dict):
        return {path: values}
    return {name: value for key, inner in values.items() for name, value in flat(inner, f"{path}/{key}").items()}


@pytest.fixture
def at_call(host):
    """at_call(n, action): runs action when the UNet is called for the n-th time from now."""
    unet = host.unet
    handles = []

    def arrange(n, action):
        seen = [0]

        def count(module, args):
            seen[0] += 1
            if seen[0] == n:
                action()

        handles.append(unet.register_forward_pre_hook(count))

    def clear():
        while handles:
            handles.pop().remove()

    arrange.clear = clear
    yield arrange
    clear()


SIZES = {1: (64, 64), 2: (128, 128), 3: (192, 192)}


def phase_done_at(call):
    """The last phase that is finished when the UNet is called for the call-th time."""
    return 1 if call <= STEPS * 5 else 2


def test_the_host_is_as_before(host):
    before = snapshot(host)
    host.generate(True, SCALE, steps=STEPS)
    assert snapshot(host) == before


def test_what_the_phases_change_on_p_is_put_back(host, monkeypatch):
    kept = []
    post_sample = host.scripts.ScriptRunner.post_sample

    def look(runner, p, ps):
        names = [name for name in vars(p) if name not in ("extra_generation_params", "comments")]
        before = {name: getattr(p, name) for name in names}
        post_sample(runner, p, ps)
        kept.append([name for name in vars(p) if name in names and getattr(p, name) is not before[name]])
        kept.append([name for name in vars(p) if name not in before and name not in ("extra_generation_params", "comments")])

    monkeypatch.setattr(host.scripts.ScriptRunner, "post_sample", look)
    host.generate(True, 2, {"phase_steps": 2}, prompt="one [red:blue:0.5] ring")
    changed, new = kept
    # Set anew by the host's own functions that the phases call, to what they were or to what the host sets before each use.
    assert set(changed) <= {"cached_c", "cached_uc", "is_using_inpainting_conditioning", "firstpass_steps", "hr_c", "hr_uc"}
    assert not new


def said(host, reply, picture=0):
    """What a picture's parameters say of DemoFusion besides its settings."""
    parameters = host.infotext_utils.parse_generation_parameters(reply.infotexts[picture])
    return {key: value for key, value in parameters.items() if key.split()[1:] in (["incomplete"], ["note"], ["refused"])}


@pytest.mark.parametrize("seed", range(20))
def test_interrupt(host, at_call, seed):
    call = random.Random(seed).randint(BASE_CALLS + 1, CALLS)
    clean = host.latents(True, 2, steps=STEPS)
    before = snapshot(host)
    at_call(call, host.shared.state.interrupt)
    reply = host.generate(True, SCALE, steps=STEPS, save_images=True)
    at_call.clear()
    reached = phase_done_at(call)
    assert [image.size for image in reply.images] == [SIZES[reached]]
    assert ("DemoFusion scale: 2" in reply.infotexts[0]) == (reached == 2)
    assert "DemoFusion scale: 3" not in reply.infotexts[0]
    line = f"phase {reached} of 3 is the last one finished, because the next was stopped"
    assert said(host, reply) == {"DemoFusion incomplete": line}
    assert reply.info["extra_generation_params"]["DemoFusion incomplete"] == line
    assert len(host.comments) == 1
    assert f"phase {reached} of 3" in host.comments[0]
    assert snapshot(host) == before
    assert torch.equal(host.latents(True, 2, steps=STEPS), clean)


@pytest.mark.parametrize("seed", range(20))
def test_an_exception_from_the_model(host, at_call, seed):
    call = random.Random(100 + seed).randint(BASE_CALLS + 1, CALLS)
    clean = host.latents(True, 2, steps=STEPS)
    before = snapshot(host)

    def fail():
        raise RuntimeError("the model broke\nsecond line")

    at_call(call, fail)
    reply = host.generate(True, SCALE, steps=STEPS)
    at_call.clear()
    assert [image.size for image in reply.images] == [SIZES[phase_done_at(call)]]
    assert "the model broke" in host.comments[0]
    assert said(host, reply)["DemoFusion incomplete"].endswith(" finished, because the next failed: the model broke")
    assert "\n" not in host.comments[0]
    assert snapshot(host) == before
    assert torch.equal(host.latents(True, 2, steps=STEPS), clean)


@pytest.mark.parametrize("since", [5, 12, 13, 24, 32])  # with 8 views a call: 4 in the base, then 4 * 2 and 4 * 5
@pytest.mark.parametrize("most", [7, 3, 1, 0])
def test_a_card_that_is_too_small(host, most, since):
    """From the since-th call on more than `most` views run out of memory: smaller calls, or the last finished phase."""
    eight = [True, SCALE, {"view_batch_size": 8}]
    reached = 3 if most else 1 if since <= 12 else 2
    expected = host.latents(*[[], [True, 2], eight][reached - 1], steps=STEPS)
    before, seen = snapshot(host), [0]

    def small(module, args):
        seen[0] += 1
        if seen[0] >= since and len(args[0]) > 2 * most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    handle = host.unet.register_forward_pre_hook(small)
    latents = host.latents(*eight, steps=STEPS)
    handle.remove()
    assert same_but_for_rounding(latents, expected)
    if not most:
        assert f"phase {reached} of 3" in host.comments[-1]
        assert "out of memory with one view at a time; a smaller base image" in host.comments[-1]
    assert snapshot(host) == before


def test_a_picture_that_memory_cannot_hold_is_refused(host, monkeypatch):
    monkeypatch.setattr(sys.modules["lib_demofusion.memory"], "free_memory", lambda device: 2**22)
    reply = host.generate(True, 8, steps=STEPS)
    assert reply.images == []
    line = "the pictures of 512x512 take 12 MiB of main memory, and 4 MiB are free; scale 4.55 fits"
    assert host.comments == [f"DemoFusion: {line}"]
    assert host.generate(True, 4.55, steps=STEPS).images[0].size == (288, 288)


def test_large_pictures_are_decoded_in_tiles(host, monkeypatch):
    whole = np.asarray(host.generate(True, SCALE, steps=STEPS).images[0], np.int16)
    before, seen = snapshot(host), []
    handle = host.autoencoder.decoder.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape))
    monkeypatch.setattr(host.webui.decoding.tiles, "tile_for", lambda network, device, base: 20)
    tiled = np.asarray(host.generate(True, SCALE, steps=STEPS).images[0], np.int16)
    handle.remove()
    assert seen.count((1, 4, 24, 24)) == 1  # up to the latents' resolution
    assert seen.count((1, 4, 2, 2)) >= 2 * (4 + 1)  # two passes or more, of four tiles and a sample
    assert abs(tiled - whole).max() <= 3
    assert snapshot(host) == before


@pytest.mark.parametrize("reached", [1, 2])
def test_the_last_phase_that_can_be_decoded_is_not_lost(host, monkeypatch, reached):
    expected = host.generate(*([True, 2] if reached == 2 else []), steps=STEPS).images[0]
    before = snapshot(host)
    # Forge tiles by itself what it cannot decode at once, and asks for more memory than a tile needs; so it is not asked.
    owner, name = (host.autoencoder, "decode") if host.is_forge else (host.shared.sd_model, "decode_first_stage")
    decode = getattr(owner, name)

    def small(z):
        if z.shape[-1] > 8 * reached:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return decode(z)

    setattr(owner, name, small)
    try:
        reply = host.generate(True, SCALE, steps=STEPS)
        assert getattr(owner, name) is small
    finally:
        delattr(owner, name)
    assert np.array_equal(np.asarray(reply.images[0]), np.asarray(expected))
    assert ("DemoFusion scale: 2" in reply.infotexts[0]) == (reached == 2)
    assert "phase 3 of 3, 192x192, cannot be decoded: out of memory in the autoencoder" in host.comments[0]
    assert host.comments[-1].endswith(f"phase {reached} of 3, {64 * reached}x{64 * reached}, is what you get.")
    assert snapshot(host) == before


def test_interrupted_images_are_saved(host, at_call):
    at_call(STEPS * 5 + 2, host.shared.state.interrupt)
    host.generate(True, SCALE, steps=STEPS, seed=4242, save_images=True)
    assert len(list(host.outputs.rglob("*4242*.png"))) == 1


def test_interrupt_stops_the_batches_after_it(host, at_call):
    at_call(BASE_CALLS + 2, host.shared.state.interrupt)
    reply = host.generate(True, 2, steps=STEPS, n_iter=3)
    assert [image.size for image in reply.images] == [(64, 64)]


def test_skip_goes_on_with_the_next_batch(host, at_call):
    at_call(BASE_CALLS + 2, host.shared.state.skip)
    reply = host.generate(True, 2, steps=STEPS, n_iter=2)
    assert [image.size for image in reply.images[-2:]] == [(64, 64), (128, 128)]
    assert "DemoFusion scale" not in reply.infotexts[-2]
    assert "DemoFusion scale: 2" in reply.infotexts[-1]
    assert ["incomplete" in text for text in reply.infotexts[-2:]] == [True, False]


def test_interrupt_during_the_base_is_as_without_us_and_told(host, at_call):
    at_call(2, host.shared.state.interrupt)
    reply = host.generate(True, 2, steps=STEPS)
    assert [image.size for image in reply.images] == [(64, 64)]
    assert "DemoFusion scale" not in reply.infotexts[0]
    line = "phase 1 of 2, 64x64, is not finished, because it was stopped"
    assert host.comments == [f"DemoFusion: {line}"]
    assert said(host, reply) == {"DemoFusion incomplete": line}


def test_stopping_after_the_current_image_finishes_it(host, at_call):
    at_call(BASE_CALLS + 2, host.shared.state.stop_generating)
    reply = host.generate(True, 2, steps=STEPS, n_iter=3)
    assert [image.size for image in reply.images] == [(128, 128)]


def test_nan_keeps_the_last_good_phase(host, monkeypatch):
    unet, calls = host.unet, [0]

    def spoil(module, args, out):
        calls[0] += 1
        return out * float("nan") if calls[0] > STEPS * 5 else out

    handle = unet.register_forward_hook(spoil)
    try:
        reply = host.generate(True, SCALE, steps=STEPS)
    finally:
        handle.remove()
    assert [image.size for image in reply.images] == [(128, 128)]
    assert "NaN" in host.comments[0]


# ------------------------------------------------------------------------------------------------- settings and infotext


FULL = [True, 2.5, 3, 0.65, True, True, 0.4, True, 7.5, False, 2.5, 1.5, 0.5, 0.75, 2, False, "", 12, "", 0]
FULL += [5, "DPM++ 2M", "Karras", 2.5, 'a disc: "red",\nstriped', '"blue"', "Use same checkpoint", "None", 160, 160, 12.5]


@pytest.fixture
def api_that_pastes(host):
    """Skips where the host's own API fails at parameters that are pasted, of whatever picture."""
    try:
        host.generate(infotext=host.generate().infotexts[0])
    except TypeError:
        pytest.skip("this host's API fails at pasted parameters, also at those of a picture without DemoFusion")


@pytest.mark.usefixtures("api_that_pastes")
def test_the_infotext_makes_the_same_picture_again(host):
    first = host.generate(*FULL)
    again = host.generate(infotext=first.infotexts[0])
    assert again.infotexts == first.infotexts
    assert np.array_equal(np.asarray(first.images[0]), np.asarray(again.images[0]))


def pasted(host, text):
    parameters = host.infotext_utils.parse_generation_parameters(text)
    fields = [f for f in host.scripts.scripts_txt2img.infotext_fields if getattr(f, "component", f[0]) in host.script.controls]
    return {f[0]: f[1](parameters) for f in fields}


def test_pasting_restores_the_form_exactly(host):
    values = pasted(host, host.generate(*FULL).infotexts[0])
    values = settings_of(host.webui, [values.get(control) for control in host.script.controls])
    assert values == settings_of(host.webui, FULL)
    assert list(map(type, values)) == list(map(type, settings_of(host.webui, FULL)))


def test_pasting_resets_what_is_the_papers(host):
    values = pasted(host, host.generate(True, 2).infotexts[0])
    values = settings_of(host.webui, [values.get(control) for control in host.script.controls])
    settings = host.webui.settings
    shown = [
        settings.shown(name, getattr(settings.DemoFusionConfig(), name))
        for name in settings_of(host.webui, settings.ARGUMENTS)[2:]
    ]
    assert values == [True, 2.0, *shown]


def test_an_image_made_without_unticks_it(host):
    values = pasted(host, host.generate().infotexts[0])
    assert values[host.script.controls[0]] is False
    named = dict(zip(host.script.controls, host.webui.settings.ARGUMENTS))
    told = [named[control] for control, value in values.items() if value is not None and control in named]
    assert told == ["enabled", "resume"]
    assert len(values) == len(host.webui.settings.ARGUMENTS) - 2 + 1, "all but two, and why there are none"
    *_, unread = values.values()
    assert unread["value"] == ""


def test_script_info_shows_names_and_ranges(host):
    info = next(s for s in host.client.get("/sdapi/v1/script-info").json() if s["name"] == "demofusion upscale")
    args = {a["label"]: a for a in info["args"]}
    assert [*args][:2] == ["DemoFusion", "Scale"]
    assert (args["Scale"]["minimum"], args["Scale"]["maximum"], args["Scale"]["value"]) == (1.05, 8, 2.0)
    assert len(info["args"]) == len(host.webui.settings.ARGUMENTS) + 3  # which nobody sends


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ([True, 9], "scale must be above 1 and at most 8, got 9"),
        ([True, "4"], "scale must be a number, got '4'"),
        ([True, None], "scale must be a number, got None"),
        ([True, 2, 1.5], "phase steps must be a whole number, got 1.5"),
        ([True, 2, {"stride": 99}], "stride must be above 0 and at most 1, got 99"),
        ([True, 2, {"jitter": "no"}], "jitter must be true or false, got 'no'"),
        (["yes", 2], "enabled must be true or false, got 'yes'"),
    ],
)
def test_a_wrong_value_gets_one_line_and_no_image(host, calls, args, line):
    reply = host.generate(*args)
    assert reply.images == []
    assert calls.calls == 0
    assert line in host.comments[0]
    assert line in reply.info["extra_generation_params"]["DemoFusion refused"]
    assert host.generate(True, 2).images[0].size == (128, 128)


HIRES = dict(enable_hr=True, hr_scale=2, hr_upscaler="None", denoising_strength=0.7)


def refusal(host, reply, calls):
    """The line with which a request was refused, as the form and the reply have it, and nothing was computed."""
    assert reply.images == []
    assert calls.calls == 0
    line = reply.info["extra_generation_params"]["DemoFusion refused"]
    assert said(host, reply) == {"DemoFusion refused": line}
    assert host.comments == [f"DemoFusion: {line}"]
    return line


def test_hires_fix_beside_it_is_refused(host, calls):
    line = "Hires. fix is on too, and only one of the two can enlarge the image; untick one of them"
    assert refusal(host, host.generate(True, 2, **HIRES), calls) == line
    assert host.generate(False, 2, **HIRES).images[0].size == (128, 128)


def test_the_gallerys_button_goes_before(host, monkeypatch):
    """It runs Hires. fix on a finished picture, with the form as it is."""
    finished = host.generate(True, 2).images[0]
    Job = host.processing.StableDiffusionProcessingTxt2Img
    init = Job.init

    def with_picture(p, *args):
        p.txt2img_upscale, p.firstpass_image = True, finished
        return init(p, *args)

    process = host.scripts.ScriptRunner.process

    def as_the_button(runner, p):
        p.txt2img_upscale = True
        return process(runner, p)

    monkeypatch.setattr(Job, "init", with_picture)
    monkeypatch.setattr(host.scripts.ScriptRunner, "process", as_the_button)
    reply = host.generate(True, 2, **HIRES)
    line = "it stood aside, since a finished picture was enlarged, by Hires. fix"
    assert reply.images[0].size == (128, 128)
    assert said(host, reply) == {"DemoFusion note": line}
    assert host.comments == [f"DemoFusion: {line}"]


# -------------------------------------------------------------------------------- never another picture without a word


def test_the_form_can_run_here(host):
    """On the host that the tests run on: nothing private or younger than that is needed."""
    assert host.script.process.__globals__["problem"] is None
    assert len(host.script.controls) == len(host.webui.settings.ARGUMENTS) + 3
    names = {getattr(control, "elem_id", "") for control in host.script.controls}
    assert "script_demofusion_scale" in names
    assert host.script.title() == "DemoFusion Upscale"


@pytest.fixture
def unable(host, monkeypatch):
    """The script where DemoFusion cannot run, with the form that it then has."""
    import gradio

    def arrange(problem):
        space = host.script.process.__globals__
        monkeypatch.setitem(space, "problem", problem)
        with gradio.Blocks():
            [enabled] = host.script.ui(False)
        monkeypatch.setattr(host.script, "args_to", host.script.args_from + 1)  # as the host counts them then
        return enabled

    return arrange


@pytest.mark.parametrize("args", [[True], [True, 2], ["yes", 2], [True, *[None] * 30]])
def test_a_host_that_cannot_run_it_refuses_and_says_what_to_do(host, calls, unable, args):
    assert unable("it has no Script.post_sample; update the WebUI to version 1.10, which has").value is False
    line = refusal(host, host.generate(*args), calls)
    assert line == "it cannot run here: it has no Script.post_sample; update the WebUI to version 1.10, which has"
    assert host.generate().images[0].size == (64, 64)
    assert host.generate(False, 2).images[0].size == (64, 64)


def test_a_name_that_the_host_does_not_know_is_an_error(host):
    for name in ("DemoFusion", "DemoFusion Upscaler"):
        assert host.post(alwayson_scripts={name: {"args": [True, 2]}}).status_code == 422


@pytest.mark.parametrize("surplus", ["", 0, None, [1]])
def test_a_list_of_another_version_is_refused(host, calls, surplus):
    whole = [True, *(control.value for control in host.script.controls[1 : len(host.webui.settings.ARGUMENTS)])]
    line = f"it has 31 arguments, of which unguided flat is the last; got one more, {surplus!r}"
    assert refusal(host, host.generate(*whole, surplus), calls) == line
    assert host.generate(*whole).images[0].size == (128, 128)
    assert host.generate(*whole[:5]).images[0].size == (128, 128)


@pytest.mark.parametrize("what", ["check_fits", "plan_for"])
def test_whatever_fails_before_the_base_refuses(host, calls, monkeypatch, what):
    def fail(*args):
        raise KeyError("a surprise")

    monkeypatch.setattr(host.webui.checks, what, fail)
    line = "it failed before it began (KeyError: 'a surprise'); the console says more"
    assert refusal(host, host.generate(True, 2), calls) == line


@pytest.mark.parametrize("what", ["Phases", "may_use_tiles", "_restored"])
def test_whatever_fails_after_the_base_is_told(host, monkeypatch, what):
    def fail(*args, **kwargs):
        raise KeyError("a surprise")

    monkeypatch.setattr(host.webui.loop, what, fail)
    reply = host.generate(True, 2)
    assert reply.images[0].size == (64, 64)
    assert said(host, reply)["DemoFusion incomplete"].endswith("because the next failed: 'a surprise'")


@pytest.mark.usefixtures("api_that_pastes")
def test_pasted_junk_is_refused(host, calls):
    """By the API's own way to paste."""
    text = host.generate(True, 2).infotexts[0].replace("DemoFusion scale: 2", "DemoFusion scale: abc")
    calls.calls = 0
    assert refusal(host, host.generate(infotext=text), calls).startswith("of what was pasted: scale cannot be read from 'abc'")


@pytest.mark.parametrize(
    ("sampler", "scheduler", "steps", "line"),
    [
        ("DPM++ 3M SDE", "Automatic", 3, "DPM++ 3M SDE cannot do with the 1 of 3 steps that the denoising strength leaves"),
        ("DPM++ 2M SDE", "Automatic", 1, "DPM++ 2M SDE cannot do with 1 step; it needs 2 at least"),
        ("DPM++ 2M SDE Heun", "Karras", 3, "DPM++ 2M SDE Heun cannot do with the 1 of 3"),
        ("DPM fast", "Automatic", 3, "DPM fast cannot do with the 1 of 3 steps"),
        ("DPM adaptive", "Automatic", 3, "DPM adaptive cannot do with the 1 of 3 steps"),
        ("UniPC", "Automatic", 5, "UniPC cannot do with the 2 of 5 steps that the denoising strength leaves; it needs 3"),
        ("UniPC", "Automatic", 2, "UniPC cannot do with 2 steps; it needs 3 at least"),
        ("DDIM", "Automatic", 3, "DDIM cannot do with the 1 of 3 steps"),
    ],
)
def test_steps_with_which_the_hosts_sampler_fails_are_refused(host, calls, sampler, scheduler, steps, line):
    job = dict(sampler_name=sampler, scheduler=scheduler, steps=steps)
    assert refusal(host, host.generate(True, **job), calls).startswith(line)


FEWEST = [
    *(("phase", sampler, "Automatic", 2) for sampler in ("DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 3M SDE", "DPM fast")),
    *(("phase", sampler, "Automatic", 1) for sampler in ("Euler", "Euler a", "DPM++ 2M", "DPM++ SDE", "DPM++ 2S a", "LMS")),
    *(("phase", sampler, "Automatic", 1) for sampler in ("Heun", "DPM2", "DPM2 a", "Restart", "PLMS", "LCM")),
    *(("phase", sampler, "KL Optimal", 1) for sampler in ("DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 3M SDE")),
    ("phase", "DPM adaptive", "Automatic", 2),
    ("phase", "UniPC", "Automatic", 3),
    ("phase", "DDIM", "Automatic", 2),
    ("phase", "DDIM CFG++", "Automatic", 2),
    *(("base", sampler, "Automatic", 1) for sampler in ("Euler", "DPM++ SDE", "DPM fast", "PLMS", "DPM++ 2S a", "DPM2")),
    ("base", "UniPC", "Automatic", 3),
]


@pytest.mark.parametrize(("what", "sampler", "scheduler", "steps"), FEWEST)
def test_the_fewest_steps_that_are_not_refused_are_enough(host, what, sampler, scheduler, steps):
    run = {"phase_steps": 5, "denoising_strength": steps / 5} if what == "phase" else {"phase_steps": steps}
    job = dict(sampler_name=sampler, scheduler=scheduler, steps=5 if what == "phase" else steps)
    reply = host.generate(True, 2, run, **job)
    assert host.comments == []
    assert reply.images[0].size == (128, 128)
    assert said(host, reply) == {}


def test_the_reply_is_serialisable(host):
    assert json.dumps(host.generate(True, 2).info)


# --------------------------------------------------------------------------------------------------- progress and preview


@pytest.mark.parametrize(("sampler", "batches"), [("Euler", 1), ("Heun", 1), ("Euler a", 2)])
def test_one_bar_over_phases_and_batches(host, sampler, batches):
    seen, jobs = [], []
    unet, state = host.unet, host.shared.state

    def look(module, args):
        request = host.progress.ProgressRequest(id_task=host.progress.current_task, live_preview=False)
        seen.append((len(args[0]), host.progress.progressapi(request).progress))
        jobs.append((state.job, state.textinfo))

    handle = unet.register_forward_pre_hook(look)
    try:
        host.generate(True, SCALE, sampler_name=sampler, n_iter=batches, steps=8)
    finally:
        handle.remove()
    rows, shown = map(np.array, zip(*seen))
    assert np.all(np.diff(shown) >= -1e-9), "the bar goes back"
    share = (np.cumsum(rows) - rows) / rows.sum()
    assert np.abs(shown - share).max() < 0.06
    for number in (2, 3):
        name = f"DemoFusion phase {number} of 3"
        texts = {text for job, text in jobs if job == name}
        assert texts
        assert all(re.fullmatch(rf"{name} \(about \d+:\d\d\)", text) for text in texts)
    assert state.textinfo is None
    assert isinstance(state.job_no, int)


@pytest.mark.parametrize("kind", ["Full", "Approx cheap"])
@pytest.mark.parametrize("content", ["Combined", "Prompt", "Negative prompt"])
@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_previews_have_the_pictures_proportions(host, options, kind, content, sampler):
    options(show_progress_type=kind, live_preview_content=content, show_progress_every_n_steps=1)
    sizes = []
    unet, state = host.unet, host.shared.state

    def look(module, args):
        state.set_current_image()  # as the host does when the browser asks
        if state.current_image is not None:
            sizes.append(state.current_image.size)

    handle = unet.register_forward_pre_hook(look)
    try:
        host.generate(True, 2, width=128, height=64, sampler_name=sampler)
    finally:
        handle.remove()
    assert {w / h for w, h in sizes} == {2.0}
    # Forge makes "Full" by a small network, which enlarges twice.
    assert sorted(set(sizes)) in ([(128, 64), (256, 128)], [(16, 8), (32, 16)], [(32, 16), (64, 32)])


FAST = dict(denoising_strength=0.4, doubling=True, stride=0.625, feather=True, view_batch_size=1)


@pytest.mark.parametrize("kind", ["Full", "Approx cheap"])
@pytest.mark.parametrize("every", [3, 10, 32])
def test_phases_of_few_steps_show_themselves_at_no_more_cost_than_the_base(host, options, monkeypatch, kind, every):
    """A page that asks at every call of the model. The phases have 8 steps."""
    options(show_progress_type=kind, show_progress_every_n_steps=every, live_previews_enable=True, show_progress_grid=True)
    state, made, views = host.shared.state, [], [0]
    decode = host.sd_samplers_common.samples_to_images_tensor

    def count(sample, approximation=None, model=None):
        if approximation is None:  # the finished picture is decoded with one
            made.append((views[0], tuple(sample.shape[-2:])))
        return decode(sample, approximation, model)

    def look(module, args):
        views[0] += len(args[0]) // 2
        state.set_current_image()

    monkeypatch.setattr(host.sd_samplers_common, "samples_to_images_tensor", count)
    handle = host.unet.register_forward_pre_hook(look)
    try:
        reply = host.generate(True, 4, FAST, steps=20)
    finally:
        handle.remove()
    assert reply.images[0].size == (256, 256)
    sizes = [size for _, size in made]
    per_preview = min(every, 10)
    assert sizes.count((16, 16)) >= 2
    assert sizes.count((32, 32)) >= 2
    phases = [(at, math.prod(size)) for at, size in made if at > 20]
    assert per_preview * sum(pixels for _, pixels in phases[1:]) <= 64 * (views[0] - 20)


# ------------------------------------------------------------------------------------------------------- other scripts


def test_xyz_plot_over_our_settings(host, calls):
    script = host.scripts.scripts_txt2img.script("x/y/z plot")
    labels = [option.label for option in script.current_axis_options]
    assert sum(label.startswith("[DemoFusion]") for label in labels) == 28
    args = plot(host, "[DemoFusion] scale", "2,3", "[DemoFusion] jitter", "True,False")
    reply = host.generate(script_name="x/y/z plot", script_args=args)
    sizes = [image.size for image in reply.images[1:]]
    assert sizes == [(128, 128), (192, 192)] * 2
    assert ["DemoFusion jitter: False" in text for text in reply.infotexts[1:]] == [False, False, True, True]


def plot(host, x, x_values, y, y_values):
    script = host.scripts.scripts_txt2img.script("x/y/z plot")
    labels = [option.label for option in script.current_axis_options]
    x, y = labels.index(x), labels.index(y)
    axes = [x, x_values, x_values.split(","), y, y_values, y_values.split(","), 0, "", []]
    wanted = {"draw legend": False, "include sub images": True}
    rest = host.arguments_of(host.scripts.scripts_txt2img, "x/y/z plot", **wanted)[len(axes) :]
    return [*axes, *rest]


@pytest.mark.parametrize("order", ["2,9", "9,2"])
def test_a_refused_cell_of_a_plot_leaves_the_others_and_says_why(host, order):
    args = plot(host, "[DemoFusion] scale", order, "[DemoFusion] jitter", "True,False")
    reply = host.generate(script_name="x/y/z plot", script_args=args)
    cells = reply.images[1:]
    bad = order.split(",").index("9")
    assert [image.size for image in cells[1 - bad :: 2]] == [(128, 128)] * 2
    assert ["scale must be above 1 and at most 8, got 9" in text for text in reply.infotexts[1:]] == [bad == 0, bad == 1] * 2
    assert ["DemoFusion scale: 2" in text for text in reply.infotexts[1:]] == [bad == 1, bad == 0] * 2
    assert all(len(image.getcolors(65536) or "many") > 1 for image in cells), "a cell is empty"


def test_a_preset_that_is_none_is_a_cell_that_says_so(host):
    args = plot(host, "[DemoFusion] preset", "Turbo,Tubro", "Steps", "4,8")
    reply = host.generate(script_name="x/y/z plot", script_args=args)
    says = "no preset called 'Tubro'; there are: Paper, Fast, Faithful, Turbo"
    assert [says in text for text in reply.infotexts[1:]] == [False, True] * 2


def test_a_refused_line_of_a_list_leaves_the_others(host):
    lines = "--prompt one --steps 4\n--prompt two --sampler_name DDIM --steps 1\n--prompt three --steps 4"
    title = "prompts from file or textbox"
    args = host.arguments_of(host.scripts.scripts_txt2img, title, **{"list of prompt inputs": lines})
    reply = host.generate(True, 2, script_name=title, script_args=args)
    assert len(reply.images) == len(reply.infotexts) == 3
    assert ["DDIM cannot do with 1 step" in text for text in reply.infotexts] == [False, True, False]
    assert ["DemoFusion scale: 2" in text for text in reply.infotexts] == [True, False, True]


def test_a_refused_prompt_matrix_says_so(host):
    args = [False, False, "positive", "comma", 0]
    reply = host.generate(True, 9, prompt="one ring|on snow|red", script_name="prompt matrix", script_args=args)
    assert len(reply.images) == 1 + 4
    assert all("scale must be above 1 and at most 8, got 9" in text for text in reply.infotexts)


def test_prompt_matrix(host):
    args = [False, False, "positive", "comma", 0]
    reply = host.generate(True, 2, prompt="one red ring|on snow", script_name="prompt matrix", script_args=args)
    assert [image.size for image in reply.images[1:]] == [(128, 128)] * 2


def test_lora_and_textual_inversion(host):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    layer = "lora_unet_middle_block_1_proj_in"
    folder = host.data / "models" / "Lora"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"{layer}.lora_up.weight": torch.randn(88, 4, 1, 1), f"{layer}.lora_down.weight": torch.randn(4, 88, 1, 1)},
        folder / "warp.safetensors",  # a name of its own: Forge reads no file twice
    )
    embeddings = host.data / "embeddings"
    embeddings.mkdir(exist_ok=True)
    save_file({"emb_params": torch.randn(2, 64)}, embeddings / "thing.safetensors")
    import networks

    networks.list_available_networks()
    host.load("demofusion-embedded.safetensors")  # with which Forge looks for embeddings
    plain = host.latents(True, 2, prompt="one red ring")
    for prompt in ("one red ring <lora:warp:1>", "one red ring thing"):
        base, large = host.latents(prompt=prompt), host.latents(True, 2, prompt=prompt)
        assert large.shape == plain.shape
        assert not torch.allclose(large, plain, atol=0.05)
        assert not torch.allclose(base, host.latents(prompt="one red ring"), atol=0.05)
    assert torch.equal(host.latents(True, 2, prompt="one red ring"), plain)


def test_reloading_scripts_leaves_one_of_each_callback(host):
    def ours():
        entries = host.script_callbacks.callback_map
        return {name: sum("demofusion" in c.script for c in entries[name]) for name in entries}

    once = ours()
    assert once["callbacks_cfg_denoiser"] == 1
    assert once["callbacks_before_ui"] == 1
    modules = {name: module for name, module in sys.modules.items() if name.startswith("lib_demofusion")}
    data, runner = list(host.scripts.scripts_data), host.scripts.scripts_txt2img
    post, img2img = list(host.scripts.postprocessing_scripts_data), host.scripts.scripts_img2img
    callbacks = {k: list(v) for k, v in host.script_callbacks.callback_map.items()}
    try:
        host.scripts.load_scripts()
        host.scripts.load_scripts()
        assert ours() == once
    finally:
        sys.modules.update(modules)
        host.scripts.scripts_data[:] = data
        host.scripts.postprocessing_scripts_data[:] = post
        host.scripts.scripts_txt2img, host.scripts.scripts_img2img = runner, img2img
        host.script_callbacks.callback_map.update(callbacks)
        host.script_callbacks.ordered_callbacks_map.clear()


def test_start_up_costs_little(host):
    from modules import timer

    spent = timer.startup_timer.dump()["records"]
    ours = [seconds for name, seconds in spent.items() if name.endswith("demofusion.py")]
    assert ours, spent
    print(f"loading the extension took {1000 * sum(ours):.0f} ms")
