"""The phases after the base with settings of their own, on the diffusers host: sampler, schedule, guidance, prompts, model."""

import copy
import functools
import math

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import KINDS, photo, spot, tiny_controlnet, tiny_pipeline

from lib_demofusion.config import PRESETS, DemoFusionConfig
from lib_demofusion.hosts.diffusers import (
    SAMPLERS,
    SCHEDULES,
    Control,
    Incomplete,
    generate,
    needs,
    plan_for,
    schedule_named,
)
from lib_demofusion.hosts.diffusers_schedules import check_schedule, make_schedule, sigma_at

TWICE = DemoFusionConfig(scale=2.0)
KEPT = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2, 0)
SIGMAS = ((1 - KEPT) / KEPT).sqrt().numpy()  # of the training timesteps


@pytest.fixture(scope="module")
def pipes():
    return {kind: tiny_pipeline(kind) for kind in KINDS}


@pytest.fixture
def sd15(pipes):
    return pipes["sd15"]


def other_pipeline(pipe):
    """A pipeline of the same kind with weights of its own."""
    other = copy.deepcopy(pipe)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for part in (other.unet, other.text_encoder, other.vae):
            for x in part.parameters():
                x.add_(0.1 * x.std().nan_to_num(0) * torch.randn(x.shape, generator=draw))
    other.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    other.set_progress_bar_config(disable=True)
    return other


def saved_base(pipe, prompt, **settings):
    """The result of a job, and its base as a saved phase."""
    saved = []
    return generate(pipe, prompt, finished=lambda _, phase: saved.append(phase), **settings), saved[0]


def same_phases(a, b):
    return [torch.equal(x, y) for (_, x), (_, y) in zip(a.phases, b.phases)]


# ------------------------------------------------------------------------------------------------------------- schedules


def webuis(schedule, n):
    """The noise levels of a schedule, by the definitions that the WebUI has from k-diffusion and ComfyUI."""

    def at(t):
        return np.exp(np.interp(t, np.arange(1000), np.log(SIGMAS)))

    low, high = SIGMAS[0], SIGMAS[-1]
    if schedule in ("Uniform", "Normal"):
        return at(np.linspace(999, 0, n))
    if schedule == "SGM Uniform":
        return at(np.linspace(999, 0, n + 1)[:-1])
    if schedule == "Simple":
        return np.array([SIGMAS[-(1 + int(step * 1000 / n))] for step in range(n)])
    if schedule == "Karras":
        return (high ** (1 / 7) + np.linspace(0, 1, n) * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    if schedule == "Exponential":
        return np.exp(np.linspace(math.log(high), math.log(low), n))
    from scipy.stats import beta

    return np.array([low + beta.ppf(1 - x, 0.6, 0.6) * (high - low) for x in np.linspace(0, 1, n)])


def possible(sampler, schedule):
    try:
        check_schedule(sampler, schedule)
    except ValueError:
        return False
    return True


THERE = [(sampler, schedule) for sampler in SAMPLERS for schedule in SCHEDULES if schedule and possible(sampler, schedule)]


@pytest.mark.parametrize("steps", [1, 4, 7, 20])
@pytest.mark.parametrize(("sampler", "schedule"), THERE)
def test_noise_levels_are_those_of_the_webuis_schedule_of_that_name(sd15, sampler, schedule, steps):
    made = make_schedule(sd15.scheduler, SAMPLERS[sampler], steps, schedule=schedule)
    levels = [sigma_at(made, index) for index in range(len(made.timesteps))]
    levels = [levels[0], *levels[1::2]] if sampler == "Heun" else levels  # which has all but the first twice
    np.testing.assert_allclose(levels, webuis(schedule, steps), rtol=0.015, err_msg="more than two timesteps away")
    if len(levels) > 1 and schedule not in ("SGM Uniform", "Simple"):
        assert levels[-1] < 0.03


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_which_schedules_a_sampler_has(sampler):
    there = {schedule for schedule in SCHEDULES if possible(sampler, schedule)}
    assert {"", "SGM Uniform", "Simple"} <= there
    assert ({"Uniform", "Normal"} <= there) == (sampler != "UniPC")
    assert ("Karras" in there) == (
        sampler in ("Euler", "DPM++ 2M", "Heun", "UniPC") or sampler == "Euler a" and "Karras" in there
    )


def test_what_a_checkpoint_says_of_its_own_noise_levels_is_for_automatic_alone(sd15):
    """Its scheduler has Karras' levels; another schedule must not have them too."""
    pipe = copy.deepcopy(sd15)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(sd15.scheduler.config, use_karras_sigmas=True)
    for sampler in ("Euler", "DPM++ 2M"):
        automatic, uniform = (
            [sigma_at(make_schedule(pipe.scheduler, SAMPLERS[sampler], 6, schedule=name), step) for step in range(6)]
            for name in ("", "Uniform")
        )
        np.testing.assert_allclose(uniform, webuis("Uniform", 6), rtol=0.01)
        assert abs(np.log(automatic) - np.log(uniform)).max() > 0.3


@pytest.mark.parametrize("schedule", ["", "SGM Uniform", "Simple", "Uniform"])
@pytest.mark.parametrize("steps", range(2, 9))
def test_lcms_few_steps_are_spread_over_all_noise_levels_and_start_late(sd15, schedule, steps, caplog):
    made = make_schedule(sd15.scheduler, SAMPLERS["LCM"], steps, schedule=schedule)
    times = made.timesteps.tolist()
    gap = 999 / (steps - 1 if schedule == "Uniform" else steps)
    assert max(abs(t - (999 - step * gap)) for step, t in enumerate(times)) <= (21 if schedule == "" else 1)
    assert not caplog.records, "as LCMScheduler warns of timesteps that are none of its own"
    config = DemoFusionConfig(
        scale=2.0, denoising_strength=0.4, phase_sampler="LCM", phase_schedule=schedule, phase_steps=steps
    )
    seen, forward = [], sd15.unet.forward
    sd15.unet.forward = lambda x, t, **more: seen.append(float(t)) or forward(x, t, **more)
    try:
        result = generate(sd15, "", config=config, steps=2, cfg_scale=1, sampler="DDIM")
    finally:
        sd15.unet.forward = forward
    run = max(round(0.4 * steps), 1)
    assert list(dict.fromkeys(seen[2:])) == times[-run:]
    assert torch.isfinite(result.phases[-1][1]).all()
    assert result.evaluations == result.plan.evaluations


@pytest.mark.parametrize(
    ("name", "known"),
    [("", ""), ("Automatic", ""), ("automatic", ""), ("karras", "Karras"), ("SGM uniform", "SGM Uniform"), ("Beta", "Beta")],
)
def test_schedules_go_by_the_webuis_names_whatever_their_case(name, known):
    assert schedule_named(name) == known


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (dict(schedule="Cosine"), r"no schedule called 'Cosine'; there are: Automatic, Uniform, Karras"),
        (dict(schedule=None), "the schedule must be a name, got a NoneType; there are: Automatic"),
        (dict(config=DemoFusionConfig(phase_schedule="Cosine")), "no schedule called 'Cosine'"),
        (dict(config=DemoFusionConfig(phase_sampler="Euler b")), "no sampler called 'Euler b'; there are: Euler"),
        (
            dict(sampler="LCM", schedule="Karras"),
            r"LCM of diffusers [\d.]+ has no schedule Karras; it has: Automatic, Uniform",
        ),
        (dict(schedule="Karras", config=DemoFusionConfig(phase_sampler="LCM")), "LCM of diffusers .* has no schedule Karras"),
        (dict(config=DemoFusionConfig(phase_sampler="UniPC", phase_schedule="Uniform")), "UniPC .* has no schedule Uniform"),
        (dict(config=DemoFusionConfig(phase_sampler="LCM"), steps=60), "LCM cannot make 60 steps .*; 50 works"),
        (dict(config=DemoFusionConfig(phase_prompt="(red:1.2)")), r"the phase prompt has '\(red:1.2\)'"),
        (dict(config=DemoFusionConfig(phase_prompt="<lora:x:1>")), "the phase prompt has '<lora:x:1>'"),
        (dict(config=DemoFusionConfig(phase_negative_prompt="a AND b")), "the phase negative prompt has 'AND'"),
        (dict(config=DemoFusionConfig(phase_prompt="red " * 76)), "the phase prompt is too long: 76 tokens, 75 at most"),
        (dict(config=DemoFusionConfig(phase_checkpoint="xl")), "the phase checkpoint is a name alone; give what load_pipeline"),
        (dict(config=DemoFusionConfig(upscaler="ESRGAN")), "no upscaler called 'ESRGAN'; there are: Latent, "),
        (dict(config=DemoFusionConfig(upscaler="/nowhere/x.pth")), "no such upscaler: /nowhere/x.pth"),
        (dict(config=DemoFusionConfig(resize_width=64, resize_height=100)), "64x100 has not the aspect of 64x64"),
        (
            dict(config=DemoFusionConfig(resize_width=400), image=photo(), size=(272, 400)),
            "give size, or resize width and",
        ),
        (dict(phase_pipe="xl"), "the phases' checkpoint: str has no UNet"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_before_anything_is_computed(sd15, more, says, monkeypatch):
    for network in (sd15.unet, sd15.text_encoder):
        monkeypatch.setattr(network, "forward", None)
    with pytest.raises(ValueError, match=says) as error:
        generate(sd15, "red", **{"steps": 4, **more})
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------- each setting is that of the phases alone


OWN = {  # settings of the phases, and how a job has them that goes on from the same base
    "sampler": (dict(phase_sampler="LCM"), dict(sampler="LCM")),
    "schedule": (dict(phase_schedule="SGM Uniform"), dict(schedule="SGM Uniform")),
    "both": (dict(phase_sampler="DPM++ 2M", phase_schedule="Karras"), dict(sampler="DPM++ 2M", schedule="Karras")),
    "guidance": (dict(phase_cfg_scale=3.0), dict(cfg_scale=3.0)),
    "none": (dict(phase_cfg_scale=1.0), dict(cfg_scale=1.0)),
    "prompt": (dict(phase_prompt="three blue stars"), dict(prompt="three blue stars")),
    "negative": (dict(phase_negative_prompt="plain grass"), dict(negative_prompt="plain grass")),
}


@pytest.fixture(scope="module")
def job(pipes):
    """By kind of pipeline, and whether there is a ControlNet: a job's settings, its result, and its base as a saved phase."""

    @functools.cache
    def job(kind, controlled):
        made = dict(steps=4, seed=[1, 2], negative_prompt="star")
        if controlled:
            made["controls"] = [Control(tiny_controlnet(pipes[kind]), photo((64, 64)), scale=2.0)]
        return made, *saved_base(pipes[kind], "one red ring", config=TWICE, **made)

    return job


# Each setting on a kind with a ControlNet, and on another kind without; each kind has jobs with and without.
OWN_JOBS = [(KINDS[(j + i) % 3], name, i == 1) for j, name in enumerate(OWN) for i in (0, 1)]


@pytest.mark.parametrize(("kind", "name", "controlled"), OWN_JOBS)
def test_phases_with_a_setting_of_their_own_are_those_of_a_job_with_it(pipes, job, kind, name, controlled):
    """The base is to the bit the one without it; what follows is what a job with that setting makes of this base."""
    pipe, (own, plain) = pipes[kind], OWN[name]
    made, without, saved = job(kind, controlled)
    result = generate(pipe, "one red ring", config=DemoFusionConfig(scale=2.0, **own), **made)
    expected = generate(pipe, **{"prompt": "one red ring", **made, **plain}, config=TWICE, resume=saved)
    assert same_phases(result, without) == [True, False]
    assert same_phases(result, expected) == [True, True]
    assert result.evaluations == result.plan.evaluations


@pytest.mark.parametrize("kind", KINDS)
def test_settings_that_say_what_the_base_has_change_no_bit(pipes, kind):
    pipe, made = pipes[kind], dict(steps=3, seed=[1, 2], sampler="Euler a", negative_prompt="star", cfg_scale=5)
    own = dict(phase_sampler="Euler a", phase_schedule="Automatic", phase_cfg_scale=5.0, phase_prompt="one red ring")
    a = generate(pipe, "one red ring", config=TWICE, **made)
    b = generate(
        pipe, "one red ring", config=DemoFusionConfig(scale=2.0, phase_negative_prompt="star", **own), phase_pipe=pipe, **made
    )
    assert same_phases(a, b) == [True, True]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_without_guidance_the_phases_ask_for_exactly_half(sd15, sampler):
    plans = [plan_for(sd15, DemoFusionConfig(scale=3.0, phase_cfg_scale=cfg), steps=5, sampler=sampler) for cfg in (0.0, 1.0)]
    halves = [[p.branches * p.evaluations for p in plan.phases] for plan in plans]
    assert halves[0][0] == halves[1][0]
    assert [2 * half for half in halves[1][1:]] == halves[0][1:]
    rows, forward = [], sd15.unet.forward
    sd15.unet.forward = lambda x, t, **more: rows.append(len(x)) or forward(x, t, **more)
    try:
        result = generate(sd15, "", config=DemoFusionConfig(scale=3.0, phase_cfg_scale=1.0), steps=5, sampler=sampler)
    finally:
        sd15.unet.forward = forward
    assert sum(rows) == result.evaluations == plans[1].evaluations


def test_guidance_in_the_phases_alone(sd15):
    plan = plan_for(sd15, DemoFusionConfig(scale=2.0, phase_cfg_scale=4.0), steps=3, cfg_scale=1)
    assert [phase.branches for phase in plan.phases] == [1, 2]
    result = generate(sd15, "red", config=DemoFusionConfig(scale=2.0, phase_cfg_scale=4.0), steps=3, cfg_scale=1)
    assert result.evaluations == plan.evaluations == 3 + 2 * 3 * 13


@pytest.mark.parametrize("phases", SAMPLERS)
@pytest.mark.parametrize("base", ["Euler", "Heun"])
def test_the_plan_counts_each_samplers_own_calls(sd15, base, phases):
    config = DemoFusionConfig(scale=2.0, phase_sampler=phases, denoising_strength=0.5)
    result = generate(sd15, "", config=config, steps=6, sampler=base, cfg_scale=1)
    assert result.evaluations == result.plan.evaluations == SAMPLERS[base].calls(6, 0) + 13 * SAMPLERS[phases].calls(6, 3)


def test_the_phases_can_be_automatic_where_the_base_is_not(sd15):
    made = dict(steps=4, seed=1, sampler="Heun", schedule="Karras")
    _, saved = saved_base(sd15, "red", config=TWICE, **made)
    results = [
        generate(sd15, "red", config=DemoFusionConfig(scale=2.0, phase_schedule=name), **made) for name in ("", "Automatic")
    ]
    expected = [generate(sd15, "red", config=TWICE, resume=saved, **{**made, "schedule": name}) for name in ("Karras", "")]
    assert [same_phases(a, b) for a, b in zip(results, expected)] == [[True, True]] * 2
    assert same_phases(*results) == [True, False]


@pytest.mark.parametrize("sampler", ["Euler", "LCM"])
def test_a_given_picture_has_the_settings_of_the_phases(sd15, sampler):
    """All that is made of it are phases after the base: the base's own settings count only where these are silent."""
    made = dict(image=photo((120, 80)), mask=spot((120, 80), (36, 24, 84, 58)), seed=3, steps=4)
    own = dict(phase_sampler=sampler, phase_cfg_scale=2.0, phase_prompt="red", phase_schedule="Uniform")
    a = generate(sd15, "blue", config=DemoFusionConfig(scale=2.0, **own), cfg_scale=9, sampler="Heun", **made)
    b = generate(sd15, "red", config=TWICE, cfg_scale=2, sampler=sampler, schedule="Uniform", **made)
    assert all(same_phases(a, b))


def test_a_job_with_settings_of_the_phases_goes_on_from_each_phase(sd15):
    own = dict(phase_sampler="LCM", phase_cfg_scale=1.0, phase_prompt="three blue stars", phase_steps=4)
    made = dict(config=DemoFusionConfig(scale=3.0, **own), steps=3, seed=[1, 2], sampler="Euler a")
    saved = []
    whole = generate(sd15, "red", finished=lambda _, phase: saved.append(phase), **made)
    for phase in saved[:-1]:
        result = generate(sd15, "red", resume=phase, **made)
        assert torch.equal(result.phases[-1][1], whole.phases[-1][1])
        assert result.evaluations == whole.evaluations


@settings(max_examples=25)
@given(
    steps=st.integers(1, 60),
    sampler=st.sampled_from(["", *SAMPLERS]),
    base=st.sampled_from(sorted(SAMPLERS)),
    cfg=st.sampled_from([1.0, 7.5]),
    phase_cfg=st.sampled_from([0.0, 1.0, 4.0]),
    scale=st.sampled_from([1.5, 2.0, 4.0]),
)
def test_each_preset_asks_the_model_no_more_often_than_the_one_before(pipes, steps, sampler, base, cfg, phase_cfg, scale):
    own = dict(scale=scale, phase_sampler=sampler, phase_cfg_scale=phase_cfg)
    try:
        calls = [
            plan_for(pipes["sd15"], DemoFusionConfig.preset(name, **own), steps=steps, sampler=base, cfg_scale=cfg).evaluations
            for name in ("Turbo", "Faithful", "Fast", "Paper")
        ]
    except ValueError as error:
        assume("cannot make" not in str(error))
        raise
    assert calls == sorted(calls)
    assert {"Turbo", "Faithful", "Fast", "Paper"} == set(PRESETS) - {"Few-step"}


# ---------------------------------------------------------------------------------------- a pipeline of the phases' own


@pytest.mark.parametrize("kind", KINDS)
def test_another_pipeline_makes_the_phases_of_the_same_base(pipes, kind):
    pipe, other = pipes[kind], other_pipeline(pipes[kind])
    made = dict(steps=4, seed=[1, 2], negative_prompt="star")
    without, saved = saved_base(pipe, "one red ring", config=TWICE, **made)
    config = DemoFusionConfig(scale=2.0, phase_prompt="three blue stars", phase_checkpoint="other")
    result = generate(pipe, "one red ring", config=config, phase_pipe=other, **made)
    expected = generate(other, "three blue stars", config=TWICE, resume=saved, **made)
    assert same_phases(result, without) == [True, False]
    assert same_phases(result, expected) == [True, True]
    assert result.images()[0].tobytes() == expected.images()[0].tobytes(), "decoded by the phases' autoencoder"
    assert result.images(0)[0].tobytes() == without.images(0)[0].tobytes(), "decoded by the base's own"
    assert result.images(0)[0].tobytes() != expected.images(0)[0].tobytes()


def test_between_two_pipelines_the_base_is_decoded_by_its_own_autoencoder_and_encoded_by_the_phases(sd15, monkeypatch):
    other, seen = other_pipeline(sd15), []
    for name, pipe in (("base", sd15), ("phases", other)):
        for way in ("decode", "encode"):
            call = getattr(pipe.vae, way)
            monkeypatch.setattr(
                pipe.vae,
                way,
                lambda x, *a, name=name, way=way, call=call, **more: seen.append((name, way)) or call(x, *a, **more),
            )
    config = DemoFusionConfig(scale=3.0, pixel_upsampling=True)
    generate(sd15, "red", config=config, phase_pipe=other, steps=1, cfg_scale=1)
    assert seen == [("base", "decode"), ("phases", "encode"), ("phases", "decode"), ("phases", "encode")]


def test_a_given_picture_is_the_phases_pipelines_alone(sd15, monkeypatch):
    other = other_pipeline(sd15)
    made = dict(config=TWICE, image=photo(), steps=2, seed=3)
    expected = generate(other, "red", **made)
    for network in (sd15.unet, sd15.text_encoder):
        monkeypatch.setattr(network, "forward", None)
    result = generate(sd15, "red", phase_pipe=other, **made)
    assert all(same_phases(result, expected))
    assert result.images()[0].tobytes() == expected.images()[0].tobytes()


def test_a_controlnet_stays_with_both_pipelines_and_must_fit_both(sd15, pipes):
    other, net = other_pipeline(sd15), tiny_controlnet(sd15)
    made = dict(steps=3, seed=1, controls=[Control(net, photo((64, 64)), scale=2.0)])
    _, saved = saved_base(sd15, "red", config=TWICE, **made)
    result = generate(sd15, "red", config=TWICE, phase_pipe=other, **made)
    assert all(same_phases(result, generate(other, "red", config=TWICE, resume=saved, **made)))
    other.unet = diffusers.UNet2DConditionModel.from_config({**sd15.unet.config, "block_out_channels": (16, 16)})
    with pytest.raises(ValueError, match="the phases' checkpoint: the ControlNet does not fit the checkpoint: channels of its"):
        plan_for(sd15, TWICE, steps=2, phase_pipe=other, controls=made["controls"])


def changed(pipe, part, **config):
    pipe = copy.deepcopy(pipe)
    getattr(pipe, part).register_to_config(**config)
    return pipe


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (lambda pipes: pipes["sdxl"], "its UNet's addition_embed_type is text_time instead of None"),
        (lambda pipes: changed(pipes["sd15"], "vae", scaling_factor=0.13025), "its scaling_factor of the latents is 0.13025"),
        (lambda pipes: changed(pipes["sd15"], "vae", latents_mean=[0.0] * 4, latents_std=[1.0] * 4), "latents_mean"),
        (lambda pipes: tiny_pipeline("sd15", sample_size=16), None),
        (lambda pipes: pipes["sd2"], None),
    ],
)
def test_latents_of_another_kind_are_refused(pipes, other, says):
    if says is None:
        assert plan_for(pipes["sd15"], TWICE, steps=2, phase_pipe=other(pipes)) == plan_for(pipes["sd15"], TWICE, steps=2)
        return
    with pytest.raises(ValueError, match=says) as error:
        generate(pipes["sd15"], "red", config=TWICE, steps=2, phase_pipe=other(pipes))
    assert "\n" not in str(error.value)


def test_both_pipelines_count_for_the_memory(sd15):
    plan, other = plan_for(sd15, TWICE, steps=2), other_pipeline(sd15)
    alone, both = needs(sd15, plan), needs(sd15, plan, phase_pipe=other)
    assert both.weights == 2 * alone.weights
    assert (both.sampling, both.decoding, both.picture) == (alone.sampling, alone.decoding, alone.picture)
    shared = copy.copy(other)
    shared.register_modules(text_encoder=sd15.text_encoder)
    encoder = sum(x.nbytes for x in (*sd15.text_encoder.parameters(), *sd15.text_encoder.buffers()))
    assert needs(sd15, plan, phase_pipe=shared).weights == both.weights - encoder
    assert needs(sd15, plan, phase_pipe=sd15) == alone


def test_phases_without_guidance_need_less_where_they_are_all_there_is(sd15):
    configs = [DemoFusionConfig(scale=2.0, phase_cfg_scale=cfg) for cfg in (0.0, 1.0)]
    guided, plain = (needs(sd15, plan_for(sd15, config, steps=2, image=photo()), 4).sampling for config in configs)
    assert plain < guided
    guided, plain = (needs(sd15, plan_for(sd15, config, steps=2), 4).sampling for config in configs)
    assert plain == guided, "the base is guided"


def test_stopped_between_two_pipelines_what_is_finished_is_decoded_by_its_own(sd15):
    other, calls = other_pipeline(sd15), []
    job = dict(
        config=DemoFusionConfig(scale=3.0), steps=2, phase_pipe=other, progress=lambda phase, _: calls.append(phase.number)
    )
    whole = generate(sd15, "red", **job)
    for number in (2, 3):
        calls.clear()
        with pytest.raises(Incomplete) as stop:
            generate(sd15, "red", cancelled=lambda number=number: number in calls, **job)
        result = stop.value.result
        assert result.images()[0].tobytes() == whole.images(number - 2)[0].tobytes()


# -------------------------------------------------------------------------------------------------- the result's own size


def test_a_size_in_the_settings_is_the_results(sd15):
    config = DemoFusionConfig(resize_width=160)
    result = generate(sd15, "", config=config, steps=1, cfg_scale=1)
    assert result.images()[0].size == (160, 160)
    assert [phase.scale for phase in result.plan.phases] == [1, 2, 2.5]


def test_an_images_size_in_the_settings(sd15):
    result = generate(sd15, "", config=DemoFusionConfig(resize_height=272), image=photo(), steps=1, cfg_scale=1)
    assert result.images()[0].size == (400, 272)
    assert isinstance(result.images()[0], Image.Image)
