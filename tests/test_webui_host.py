"""The extension on the fake host of fake_webui.py: whatever can be seen without the WebUI."""

import itertools
import json
import math
import random
import re
import sys
import threading
from dataclasses import fields
from pathlib import Path
from types import ModuleType, SimpleNamespace

import fake_webui
import pytest
import torch
from arguments import settings_of
from readout import NODE, in_node
from webui_fixtures import assert_as_before, assert_same, direct_run, heun, refusal, said, snapshot, watch_calls

from lib_demofusion.areas import Areas, areas_of
from lib_demofusion.config import PRESETS, DemoFusionConfig
from lib_demofusion.saved import SavedPhase, read_saved

STEPS = 4
VIEWS = {2: 9 + 4, 3: 25 + 9}  # of a square base at the default stride: local and dilated ones
PLAIN = {"jitter": False, "view_batch_size": 1}
SIZES = {1: (8, 8), 2: (16, 16), 3: (24, 24)}


# ----------------------------------------------------------------------------------------------------- the fake, and the host


def test_nothing_of_the_fake_stays():
    before = dict(sys.modules)
    with fake_webui.installed(extra=("modules_forge",)):
        assert "modules.shared" in sys.modules
        assert sys.modules["lib_demofusion"] is not before["lib_demofusion"]
    names = [name for name in {*before, *sys.modules} if name.startswith(("modules", "gradio", "lib_demofusion"))]
    assert {name: sys.modules.get(name) for name in names} == {name: before.get(name) for name in names}
    assert "lib_demofusion.config" in names


def test_off_is_the_host_alone(host, calls):
    latents = host.generate(False).latents[0]
    assert latents.shape == (1, 4, 8, 8)
    assert calls.rows == 2 * STEPS
    host.runner.alwayson_scripts.clear()
    assert torch.equal(host.generate().latents[0], latents)


def test_supported(host):
    assert host.webui.a1111.unsupported() is None


@pytest.mark.parametrize(
    ("extra", "line"),
    [("modules_forge", "Forge calls its UNet in a way of its own"), ("modules.processing_diffusers", "SD.Next calls its UNet")],
)
def test_other_hosts_say_so_in_the_form_and_refuse_what_is_asked_for(extra, line, monkeypatch):
    shown = []
    monkeypatch.setattr(fake_webui.HTML, "__init__", lambda self, value="", **given: shown.append(value))
    with fake_webui.installed(extra=(extra,)) as host:
        assert line in host.webui.a1111.unsupported()
        line = f"DemoFusion cannot run here: {host.webui.a1111.unsupported()}.".replace("'", "&#x27;")
        assert shown == [line, line], "in both tabs"
        assert [control.value for control in host.script.controls] == [False]
        assert host.generate().sizes == host.generate(None).sizes == [(8, 8)]
        assert refusal(host.generate(True)) == f"it cannot run here: {host.webui.a1111.unsupported()}"
        assert refusal(host.generate(True, 2)) == refusal(host.generate(True))
        assert not any(fake_webui._callbacks.values())


def test_an_older_host_is_told_what_it_lacks(host, monkeypatch):
    monkeypatch.delattr(host.scripts.Script, "process_before_every_sampling")
    assert "Script.process_before_every_sampling; update the WebUI to version 1.10" in host.webui.a1111.unsupported()
    with fake_webui.installed(without=("modules.rng",)) as older:
        assert older.generate().sizes == [(8, 8)]
        assert refusal(older.generate(True)).startswith(
            "it cannot run here: it could not be loaded (ImportError: cannot import"
        )
    with fake_webui.installed(without=("modules.ui_components",)) as older:
        assert "'modules.ui_components'); update it, and the WebUI to 1.10" in refusal(older.generate(True))


@pytest.mark.parametrize(
    "error",
    [
        ImportError("cannot import name 'tree_leaves'"),
        AttributeError("module 'torch' has no attribute 'young'"),
        SyntaxError("invalid syntax"),
        RuntimeError("two lines\nof text"),
        OSError("a library, broken"),
    ],
)
def test_whatever_fails_at_the_import_is_shown_in_the_console_and_refuses(capsys, error):
    with fake_webui.installed(broken=error) as host:
        assert "Traceback" in capsys.readouterr().err
        line = refusal(host.generate(True))
        assert f"{type(error).__name__}: {' '.join(str(error).split())}" in line
        assert line.endswith("; update it, and the WebUI to 1.10; the console says more")
        assert host.generate().sizes == host.generate(False).sizes == [(8, 8)]
        [(control, function)] = host.runner.infotext_fields
        assert control is host.script.controls[0]
        assert [function(parameters) for parameters in ({}, {"DemoFusion scale": "2"})] == [False, True]


def test_a_form_that_cannot_be_drawn_refuses(capsys):
    with fake_webui.installed() as host, pytest.MonkeyPatch.context() as patch:
        patch.setattr(host.gradio, "Slider", lambda **given: fake_webui.Slider(unheard_of=1, **given)._events["no such"])
        host.reset()
        assert "Traceback" in capsys.readouterr().err
        assert "(KeyError: 'no such')" in refusal(host.generate(True))
        assert host.generate().sizes == [(8, 8)]


# --------------------------------------------------------------------------------------------------- the same as the core alone


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
@pytest.mark.parametrize(("scale", "cfg", "size"), [(2, 5.0, (8, 8)), (3, 5.0, (8, 8)), (2, 1.0, (8, 8)), (2.5, 3.0, (6, 10))])
def test_the_phases_are_the_cores(host, sampler, scale, cfg, size):
    settings = dict(sampler_name=sampler, cfg_scale=cfg, batch_size=2, height=8 * size[0], width=8 * size[1])
    base = host.generate(**settings).latents[0]
    latents = host.generate(True, scale, **settings).latents[0]
    assert_same(latents, direct_run([host.shared.sd_model] * STEPS, base, sampler, scale, STEPS, cfg, seeds=(1, 2)))


def test_phases_may_have_steps_of_their_own(host, calls, monkeypatch):
    made = []
    setup = host.processing.StableDiffusionProcessingTxt2Img.setup_conds
    monkeypatch.setattr(
        host.processing.StableDiffusionProcessingTxt2Img, "setup_conds", lambda p: (made.append(p.steps), setup(p))
    )
    reply = host.generate(True, 2, {"phase_steps": 7})
    assert calls.rows == 2 * (STEPS + 7 * VIEWS[2])
    assert made == [STEPS, 7]  # prompts that change over the steps follow the phase's
    assert reply.p.steps == STEPS


def test_a_batch_is_its_singles(host):
    both = host.generate(True, 2, batch_size=2).latents[0]
    for i in range(2):
        assert_same(host.generate(True, 2, seed=1 + i).latents[0], both[i : i + 1])


def test_batch_count(host):
    reply = host.generate(True, 2, n_iter=2)
    assert reply.sizes == [(16, 16)] * 2
    assert torch.equal(reply.latents[1], host.generate(True, 2, seed=2).latents[0])


def test_the_view_batch_size_changes_nothing(host):
    one, all_at_once = (host.generate(True, 2, {"view_batch_size": n}).latents[0] for n in (1, 64))
    assert_same(one, all_at_once)


# --------------------------------------------------------------------------------------------------------------- model calls


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
@pytest.mark.parametrize(("scale", "settings"), [(2, {}), (3, {}), (2, dict(steps=3)), (2, dict(batch_size=2))])
def test_the_model_sees_as_many_rows_as_planned(host, calls, sampler, scale, settings):
    p = host.generate(True, scale, sampler_name=sampler, **settings).p
    plan = host.webui.checks.plan_for(p, DemoFusionConfig(scale=float(scale)))
    assert calls.rows == plan.evaluations * p.batch_size
    views = sum(VIEWS[s] for s in range(2, scale + 1))
    assert calls.rows == 2 * p.batch_size * host.webui.samplers.model_calls(sampler, None, p.steps) * (1 + views)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_at_cfg_1_the_phases_leave_the_negative_prompt_out(host, calls, batched, sampler):
    host.shared.opts.batch_cond_uncond = batched
    settings = dict(sampler_name=sampler, batch_size=2)
    latents = host.generate(True, 2, cfg_scale=1, **settings).latents[0]
    predictions = host.webui.samplers.model_calls(sampler, None, STEPS)
    assert calls.rows == 2 * predictions * (2 + VIEWS[2])
    calls.rows = 0
    nearly = host.generate(True, 2, cfg_scale=1.000001, **settings).latents[0]
    assert calls.rows == 2 * predictions * (2 + 2 * VIEWS[2])
    assert_same(latents, nearly)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("prompt", ["a ring AND a disc", "a ring AND a disc :0.5", "a ring :0.5"])
def test_at_cfg_1_weighed_prompts_keep_the_negative_prompt(host, calls, batched, prompt):
    host.shared.opts.batch_cond_uncond = batched
    branches = 2 + prompt.count("AND")
    latents = host.generate(True, 2, prompt=prompt, cfg_scale=1).latents[0]
    assert calls.rows == branches * STEPS * (1 + VIEWS[2])
    assert_same(latents, host.generate(True, 2, prompt=prompt, cfg_scale=1.000001).latents[0])
    assert not torch.allclose(latents, host.generate(True, 2, cfg_scale=1).latents[0], atol=1e-2)


@pytest.mark.parametrize(
    ("sampler", "scheduler", "steps", "expected"),
    [
        ("Euler", "Automatic", 20, 20),
        ("Euler", None, 1, 1),
        ("LCM", "Karras", 8, 8),
        ("DPM++ 2M", "DDIM", 20, 20),
        ("DPM++ 2M", "DDIM", 30, 31),  # every 33rd of 999
        ("Heun", "Automatic", 20, 39),
        ("Heun", "Karras", 1, 1),
        ("Heun", "KL Optimal", 20, 40),
        ("Heun", "DDIM", 30, 61),
        ("DPM fast", "DDIM", 30, 30),
        ("DPM adaptive", "Karras", 20, None),
        ("DDIM", "Automatic", 20, 19),
        ("DDIM", "Automatic", 30, 30),  # every 33rd of 1000, but for the last
        ("DDIM CFG++", "Automatic", 7, 7),
        ("PLMS", "Automatic", 20, 20),
        ("UniPC", "Automatic", 30, 31),
    ],
)
def test_model_calls(host, sampler, scheduler, steps, expected):
    assert host.webui.samplers.model_calls(sampler, scheduler, steps) == expected


def test_every_kind_of_counting_is_known(host):
    webui = host.webui
    for name, sampler in webui.samplers.SAMPLERS.items():
        counted = webui.samplers.model_calls(name, "Automatic", 10)
        assert counted is None if sampler.counts == "unknown" else 9 <= counted <= (27 if sampler.counts == "heunpp" else 20)
    assert webui.readout.readout_table()["samplers"].keys() == webui.samplers.SAMPLERS.keys()


@pytest.mark.parametrize("steps", [1, 3, 6, 7, 30, 150])
def test_model_calls_of_ddim_are_its_samplers(host, calls, steps):
    host.generate(False, sampler_name="DDIM", steps=steps)
    assert calls.rows == 2 * host.webui.samplers.model_calls("DDIM", None, steps)


# ------------------------------------------------------------------------------------------------- what the sampler may ask


def test_a_step_that_is_asked_for_twice_is_blended_once(host, calls, monkeypatch):
    def hesitant(model, x, sigmas, extra_args, callback):
        """As a sampler with adaptive steps that throws its first try away."""

        def ask(*args, **kwargs):
            model(*args, **kwargs)
            return model(*args, **kwargs)

        ask.inner_model = model.inner_model
        return fake_webui._euler(ask, x, sigmas, extra_args, callback)

    once = host.generate(True, 2).latents[0]
    rows = calls.rows
    create = host.sd_samplers.create_sampler

    def create_hesitant(name, model):
        sampler = create(name, model)
        sampler.func = hesitant
        return sampler

    monkeypatch.setattr(host.sd_samplers, "create_sampler", create_hesitant)
    twice = host.generate(True, 2).latents[0]
    assert calls.rows - rows == rows + 2 * STEPS * VIEWS[2]  # the base is sampled as ever
    assert torch.equal(once, twice)


def adaptive(model, x, sigmas, extra_args, callback):
    """Asks at the step's start and in its middle, tells at its end, and rejects the second step once."""
    rejected = False
    for i, (sigma, after) in enumerate(zip(sigmas, sigmas[1:])):
        for again in [True, False] if i == 1 else [False]:
            clean = model(x, sigma * x.new_ones(len(x)), **extra_args)
            middle = (sigma + after) / 2
            tried = x + (middle - sigma) * (x - clean) / sigma
            model(tried, middle * x.new_ones(len(x)), **extra_args)
            if again:
                rejected = True
            else:
                x = x + (after - sigma) * (x - clean) / sigma
            callback({"i": i, "x": x})
    assert rejected
    return x


@pytest.mark.parametrize(
    ("function", "real"), [(None, [0, 1, 2]), ("ddim", [0, 1, 2]), (heun, [0, 2, 4]), (adaptive, [0, 2, 5])]
)
def test_a_state_is_held_since_where_its_step_began(host, monkeypatch, function, real):
    """Whether the sampler tells in the midst of a step or at its end; what it only tries out begins none."""
    fusion, seen, create = host.webui.step.Fusion, [], host.sd_samplers.create_sampler
    blend = fusion.skip_residual_

    def look(self, x, t, sigma, signal, since):
        seen.append((t, since))
        return blend(self, x, t, sigma, signal, since)

    def create_own(name, model):
        sampler = create(name, model)
        sampler.func = function if callable(function) else sampler.func
        return sampler

    monkeypatch.setattr(fusion, "skip_residual_", look)
    monkeypatch.setattr(host.sd_samplers, "create_sampler", create_own)
    host.generate(True, 2, sampler_name="DDIM" if function == "ddim" else "Euler", steps=4 if function == "ddim" else 3)
    began = None
    for index, (t, since) in enumerate(seen):
        assert since == began, f"call {index} at {t}"
        began = t if index in real else began
    assert len(seen) == {heun: 5, adaptive: 7}.get(function, 3)  # a step that is tried again is not blended again
    levels = [seen[index][0] for index in real]
    assert levels == sorted(set(levels), reverse=True)


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_a_phase_entered_late_runs_the_last_steps_of_its_schedule(host, calls, monkeypatch, sampler):
    levels, hooks = [], host.webui.step.PhaseHooks
    step = hooks.before_step

    def look(self, denoiser, args):
        levels.append(float(args[1][0]))
        step(self, denoiser, args)

    monkeypatch.setattr(hooks, "before_step", look)
    host.generate(True, 2, sampler_name=sampler, steps=8)
    whole, levels[:], calls.rows = levels[:], [], 0
    reply = host.generate(True, 2, {"denoising_strength": 0.5}, sampler_name=sampler, steps=8)
    assert levels == whole[-host.webui.samplers.model_calls(sampler, None, 8, 4) :]
    assert (
        calls.rows
        == host.webui.checks.plan_for(
            reply.p, host.webui.settings.DemoFusionConfig(scale=2, denoising_strength=0.5)
        ).evaluations
    )
    assert reply.p.denoising_strength == 0.75


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_where_the_skip_residual_is_all_the_skipped_steps_change_nothing(host, sampler):
    whole, late = ({"alpha1": 0, "denoising_strength": share} for share in (1, 0.4))
    pictures = [host.generate(True, 3, settings, sampler_name=sampler, steps=5).latents[0] for settings in (whole, late)]
    assert torch.equal(*pictures)


def test_the_host_counts_the_skipped_steps_too(host, monkeypatch):
    """So that a refiner that takes over at a share of the steps, and a prompt that changes, do so at the same noise."""
    refiner = fake_webui.add_model(fake_webui.ToyModel("refiner", seed=1))
    counts, hooks = [], host.webui.step.PhaseHooks
    on_step = hooks.on_step
    monkeypatch.setattr(
        hooks,
        "on_step",
        lambda self, params: (counts.append((params.denoiser.step, params.denoiser.total_steps)), on_step(self, params)),
    )
    rows = []
    refiner.model.diffusion_model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    settings = {"denoising_strength": 0.4}
    host.generate(True, 2, settings, steps=10, refiner_checkpoint="refiner", refiner_switch_at=0.8)
    assert counts == [(step, 10) for step in (6, 7, 8, 9)]
    assert sum(rows) == 2 * 2 * (1 + VIEWS[2])


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_the_samplers_own_state_is_blended(host, monkeypatch, sampler):
    """With alpha1 = 0 the skip residual is all: each step starts from the noised reference."""
    hooks, errors = host.webui.step.PhaseHooks, []
    step = hooks.before_step

    def look(self, denoiser, args):
        step(self, denoiser, args)
        _, noise, signal = self.levels(float(args[1][0]))
        errors.append((args[0] - self.fusion.noised_reference(noise, signal)).abs().max().item())

    monkeypatch.setattr(hooks, "before_step", look)
    host.generate(True, 2, {"alpha1": 0}, sampler_name=sampler)
    assert len(errors) == host.webui.samplers.model_calls(sampler, None, STEPS)
    assert max(errors) < 1e-4


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_a_model_that_changes_between_steps_is_fused_too(host, calls, sampler):
    refiner, rows = fake_webui.add_model(fake_webui.ToyModel("refiner", seed=1)), []
    refiner.model.diffusion_model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    settings = dict(sampler_name=sampler, steps=5, refiner_checkpoint="refiner", refiner_switch_at=0.4)
    base = host.generate(**settings).latents[0]
    rows.clear()
    calls.rows = 0

    reply = host.generate(True, 3, **settings)
    predictions = host.webui.samplers.model_calls(sampler, None, 5)
    assert calls.rows == 2 * 2 * (1 + VIEWS[2] + VIEWS[3])  # two steps
    assert sum(rows) == 2 * (predictions - 2) * (1 + VIEWS[2] + VIEWS[3])
    main = fake_webui._models["main"]
    models = [main] * 2 + [refiner] * 3
    if sampler == "DDIM":  # at whole timesteps; Euler's 5 levels lie between two of them
        assert_same(reply.latents[0], direct_run(models, base, sampler, 3, 5, 5.0, seeds=(1,)))
    for module in (*main.modules(), *refiner.modules()):
        assert "forward" not in vars(module)


def test_tiling_rolls_the_plane_and_back(host, calls, monkeypatch):
    fake_webui.add_model(fake_webui.ToyModel(kernel=1))
    seen, circular, asked, enlarge = [], [], [], host.webui.phases.enlarge

    def wrapped(*args):
        """Whatever is asked for, so that what is compared differs in nothing else."""
        asked.append(args[6])
        return enlarge(*args[:6], True, *args[7:])

    monkeypatch.setattr(host.webui.phases, "enlarge", wrapped)
    host.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    hijack = host.sd_hijack.model_hijack
    host.unet.register_forward_pre_hook(lambda module, args: circular.append(hijack.circular_enabled))
    args = True, 2, {"blur_sigma": 0.05}  # a blur that keeps every pixel as it is
    plain = host.generate(*args).latents[0]
    rows, seen[:], circular[:] = seen[:], [], []

    tiled = host.generate(*args, tiling=True).latents[0]
    assert asked == [False, True]
    assert (tiled - plain).abs().max() < 1e-5
    assert circular == [True] * STEPS + [False] * (len(circular) - STEPS)
    assert hijack.circular_enabled
    differ = [not torch.allclose(a, b, atol=1e-3) for a, b in zip(rows, seen, strict=True)]
    assert not any(differ[:STEPS])
    assert sum(differ) > 0.9 * (len(differ) - STEPS)


# --------------------------------------------------------------------------------------------------------------- conditions


CORNERS = [(y, x) for y in (0, 4, 8) for x in (0, 4, 8)] + [(0, 0)] * 4  # of 2x, in latent pixels; a dilated view sees all
SDXL = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")


@pytest.mark.parametrize("keys", [SDXL, ("original_size_as_tuple", "crop_coords_top_left", "aesthetic_score")])
@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_sdxl_views_carry_their_size_and_crop(host, keys, sampler):
    model = fake_webui.add_model(fake_webui.ToyModel(sdxl=keys))
    host.shared.opts.sdxl_crop_top, host.shared.opts.sdxl_crop_left = 3, 5
    seen = []
    host.unet.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["y"].clone()), with_kwargs=True)
    host.generate(True, 2, PLAIN, sampler_name=sampler, batch_size=2)
    predictions = host.webui.samplers.model_calls(sampler, None, STEPS)
    assert len(seen) == predictions * (1 + 13)

    def ids(size, crop):
        embedders = list(model.conditioner.embedders)[1:]
        numbers = dict(zip(SDXL, [size, crop, size]), aesthetic_score=[6.0])
        rows = [embedder(torch.tensor([numbers[embedder.input_key]]).float()) for embedder in embedders]
        return torch.cat(rows, 1)

    for vector in seen[:predictions]:
        torch.testing.assert_close(vector[:, 8:], ids((64, 64), (3, 5)).expand(4, -1))
    for vector, (y, x) in zip(seen[predictions:], CORNERS * predictions, strict=True):
        torch.testing.assert_close(vector[:, 8:], ids((128, 128), (3 + 8 * y, 5 + 8 * x)).expand(4, -1))
        torch.testing.assert_close(vector[:, :8], seen[0][:, :8])  # the pooled text, row by row


def test_sdxl_views_in_one_call_each_carry_their_own(host):
    fake_webui.add_model(fake_webui.ToyModel(sdxl=SDXL))
    one, many = (host.generate(True, 2, {**PLAIN, "view_batch_size": n}, batch_size=2).latents[0] for n in (1, 5))
    assert_same(one, many)


@pytest.mark.parametrize("scale", [2, 2.5])
def test_conditions_of_the_images_size_are_cropped_like_x(host, scale):
    fake_webui.add_model(fake_webui.ToyModel(inpainting=True))
    seen = []
    host.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, 4:]))
    host.generate(True, scale, PLAIN, steps=1)
    at_2x = seen[1 : 1 + 13]
    assert all(rows.shape == (2, 5, 8, 8) for rows in seen)
    assert [int(rows[0, 0, 0, 0]) for rows in at_2x] == [100 * y + x for y, x in [*CORNERS[:9], (0, 0), (0, 1), (1, 0), (1, 1)]]
    ramp = 100 * torch.arange(8)[:, None] + torch.arange(8)
    for rows, (y, x) in zip(at_2x[:9], CORNERS):
        assert torch.equal(rows, (ramp + 100 * y + x).expand(2, 5, -1, -1).float())
    for rows, corner in zip(at_2x[9:], (0, 1, 100, 101)):
        assert torch.equal(rows, (2 * ramp + corner).expand(2, 5, -1, -1).float())
    if scale == 2.5:  # 20 pixels a side, grown to 24 by repeating the edges
        first, last = seen[-9], seen[-1]
        edge = torch.arange(0, 24, 3).sub(2)
        grown = 100 * edge.clamp(0, 19)[:, None] + edge.clamp(0, 19)
        assert torch.equal(first[0, 0], grown.float())
        grown = 100 * (edge + 2).clamp(0, 19)[:, None] + (edge + 2).clamp(0, 19)
        assert torch.equal(last[0, 0], grown.float())


# ------------------------------------------------------------------------------------------------- what goes wrong in a phase


def phase_done_at(call):
    """The last finished phase when the UNet is called for the call-th time: 4, 4 * 4 and 4 * 9 calls at 3x."""
    return 1 if call <= STEPS * 5 else 2


def trouble(host, kind):
    """(what happens at a call, what the comment says of it)."""

    def fail(error):
        def action():
            raise error

        return action

    return {
        "interrupt": (host.shared.state.interrupt, "stopped"),
        "skip": (host.shared.state.skip, "stopped"),
        "error": (fail(RuntimeError("the model broke\nsecond line")), "failed: the model broke"),
        "error without text": (fail(RuntimeError()), "failed: RuntimeError()"),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        *itertools.product(
            ["interrupt", "skip", "error"],
            [STEPS + 1, *random.Random(0).sample(range(STEPS + 2, 14 * STEPS), 3), 14 * STEPS],
        ),
        ("error without text", 7),
    ],
)
def test_trouble_keeps_the_last_finished_phase(host, at_call, monkeypatch, kind, call):
    reached = phase_done_at(call)
    expected = host.generate(*([] if reached == 1 else [True, 2])).latents[0]
    before, seen = snapshot(host), []
    names = ("rng", "sampler", "steps", "c", "uc", "step_multiplier", "tiling", "width", "height", "n_iter")
    post_sample = host.script.post_sample

    def look(p, ps, *args):
        values = {name: getattr(p, name) for name in vars(p)}
        post_sample(p, ps, *args)
        seen.append(({name for name, value in vars(p).items() if values.get(name, p) is not value}, set(vars(p)) - set(values)))

    monkeypatch.setattr(host.script, "post_sample", look)
    action, line = trouble(host, kind)
    handle = at_call(call, action)
    reply = host.generate(True, 3)
    handle.remove()

    assert reply.sizes == [SIZES[reached]]
    assert torch.equal(reply.latents[0], expected)
    size = 8 * SIZES[reached][0]
    assert len(reply.comments) == 1
    assert reply.comments[0].startswith(f"DemoFusion: {line}")
    assert reply.comments[0].endswith(f"; phase {reached} of 3, {size}x{size}, is the last one finished.")
    assert "\n" not in reply.comments[0]
    parameters = host.infotext_utils.parse_generation_parameters(reply.infotexts[0])
    assert parameters.get("DemoFusion scale") == (None if reached == 1 else "2")
    assert seen == [(set(), set())], "post_sample left something of p changed"
    assert all(hasattr(reply.p, name) for name in names)
    assert len(host.reports) == (kind not in ("interrupt", "skip"))
    monkeypatch.undo()
    assert_as_before(host, before)
    assert torch.equal(host.generate(True, 2).latents[0], expected) or reached == 1


@pytest.fixture
def small_card(host):
    """small_card(most, since): from the since-th call on, more than `most` views (two rows each) run out of memory."""

    def arrange(most, since):
        def look(number, rows):
            if number >= since and rows > 2 * most:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

        return watch_calls(host, look)

    return arrange


@pytest.mark.parametrize("since", [5, 12, 13, 24, 32])  # with 8 views a call: 4 in the base, then 4 * 2 and 4 * 5
@pytest.mark.parametrize("most", [7, 3, 1, 0])
def test_a_card_that_is_too_small(host, small_card, most, since):
    """The same picture with smaller batches, or the last finished phase."""
    eight = [True, 3, {"view_batch_size": 8}]
    reached = 3 if most else 1 if since <= 12 else 2
    expected = host.generate(*[[], [True, 2], eight][reached - 1]).latents[0]
    before = snapshot(host)
    handle = small_card(most, since)
    reply = host.generate(*eight)
    handle.remove()
    assert reply.sizes == [SIZES[reached]]
    assert_same(reply.latents[0], expected)
    if most:
        told = [text for text in reply.comments if "a view batch size of 8 did not fit" in text]
        assert said(host, reply) == ({"DemoFusion note": told[0].removeprefix("DemoFusion: ")} if told else {})
        assert reply.comments == told
        assert len(told) == 1 or since == 32  # the last call is of two views
    else:
        assert reply.comments[0].endswith("a view batch size of 8 did not fit; 1 did.")
        assert "out of memory with one view at a time; a smaller base image" in reply.comments[1]
    assert_as_before(host, before)


def test_out_of_memory_beside_the_views(host, monkeypatch):
    def fail(fusion, *args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    monkeypatch.setattr(host.webui.step.Fusion, "skip_residual_", fail)
    reply = host.generate(True, 2)
    assert reply.sizes == [SIZES[1]]
    assert reply.comments[0].startswith("DemoFusion: out of memory beside the views; a smaller scale or base image needs less")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, False),
        ({"samples_format": "jpg"}, True),
        ({"samples_format": "jpg", "export_for_4chan": False}, False),
        ({"samples_format": "jpg", "target_side_length": 192}, False),
        ({"samples_format": "jpg", "samples_save": False}, False),
        ({"samples_format": "webp"}, False),
    ],
)
def test_jpegs_that_the_host_would_reduce_are_told(host, tmp_path, settings, told):
    """192 pixels, of 191 that are kept."""
    for name, value in {"samples_save": True, "target_side_length": 191, **settings}.items():
        setattr(host.shared.opts, name, value)
    comments = host.generate(True, 3, outpath_samples=str(tmp_path)).comments
    assert len(comments) == told
    assert not told or comments[0].startswith(
        "DemoFusion: of JPEGs with more than 191 pixels a side the host keeps only a reduced"
    )


# ---------------------------------------------------------------------------------------------------------- pixel upsampling


def test_phases_enlarged_as_images(host, monkeypatch):
    """By way of the host's own decoding and encoding, and the same alone as in a batch."""
    seen, model, predict = [], host.shared.sd_model, host.webui.step.Fusion.predict
    monkeypatch.setattr(
        host.webui.step.Fusion, "predict", lambda self, *args: seen.append(self.reference.clone()) or predict(self, *args)
    )
    before, state = snapshot(host), torch.get_rng_state()
    reply = host.generate(True, 3, {"pixel_upsampling": True}, batch_size=2)
    assert torch.equal(torch.get_rng_state(), state), "the noise of all programs is left alone"
    assert_as_before(host, before)
    for row, base in enumerate(host.generate(batch_size=2).latents[0].split(1)):
        image = model.decode_first_stage(base)
        image = torch.nn.functional.interpolate(image, size=(128, 128), mode="bicubic", align_corners=False)
        expected = model.encode_first_stage(image.clamp(-1, 1))[0]
        assert (seen[0][row] - expected).abs().max() < 0.06, "the noise that the host draws latents with"
    last = reply.latents[-1]
    assert torch.equal(last, host.generate(True, 3, {"pixel_upsampling": True}, batch_size=2).latents[-1])
    assert_same(last[1:], host.generate(True, 3, {"pixel_upsampling": True}, seed=2).latents[-1])


def test_flat_areas_are_held(host, monkeypatch):
    seen, model, blend = [], host.shared.sd_model, host.webui.step.Fusion.skip_residual_
    monkeypatch.setattr(
        host.webui.step.Fusion, "skip_residual_", lambda self, *args: seen.append(self.held) or blend(self, *args)
    )
    before = snapshot(host)
    reply = host.generate(True, 2, {"hold_flat": 50.0}, batch_size=2)
    assert_as_before(host, before)
    assert not torch.equal(reply.latents[-1], host.generate(True, 2, batch_size=2).latents[-1])
    images = torch.cat([model.decode_first_stage(z) for z in host.generate(batch_size=2).latents[0].split(1)])
    want = areas_of(images, DemoFusionConfig(hold_flat=50.0)).at(SIZES[2]).held
    assert 0 < float(want.mean()) < 1
    torch.testing.assert_close(seen[0], want, rtol=0, atol=1e-2)


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
@pytest.mark.parametrize("prompt", ["a ring", "a ring AND a disc :0.7"])
def test_areas_that_are_not_guided_are_drawn_as_at_cfg_1(host, monkeypatch, prompt, sampler):
    """The first image nowhere, the second everywhere: each as alone."""
    job = dict(prompt=prompt, sampler_name=sampler)
    guided, plain = (host.generate(True, 2, settings, **job, batch_size=2) for settings in ({}, {"phase_cfg_scale": 1.0}))
    enlarge, before = host.webui.phases.enlarge, snapshot(host)

    def enlarged(*args):
        reference, areas = enlarge(*args)
        assert areas == (None, None)
        return reference, Areas(unguided=torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(-1, -1, *args[1]))

    monkeypatch.setattr(host.webui.phases, "enlarge", enlarged)
    reply = host.generate(True, 2, **job, batch_size=2)
    assert_as_before(host, before)
    assert "combine_denoised" not in vars(reply.p.sampler.model_wrap_cfg)
    assert torch.equal(reply.latents[0][:1], guided.latents[0][:1])
    assert_same(reply.latents[0][1:], plain.latents[0][1:])
    assert not torch.allclose(guided.latents[0], plain.latents[0], atol=1e-2)


def test_flat_areas_are_not_guided(host):
    before, plain = snapshot(host), host.generate(True, 2, batch_size=2).latents[-1]
    batch = host.generate(True, 2, {"unguided_flat": 50.0}, batch_size=2).latents[-1]
    assert_as_before(host, before)
    assert not torch.allclose(batch, plain, atol=1e-2)
    assert_same(batch[1:], host.generate(True, 2, {"unguided_flat": 50.0}, seed=2).latents[-1])
    at_1 = [{"phase_cfg_scale": 1.0}, {"phase_cfg_scale": 1.0, "unguided_flat": 50.0}]
    assert_same(*(host.generate(True, 2, settings).latents[-1] for settings in at_1))


def test_large_phases_are_encoded_in_tiles(host, decoder):
    """4x is 32 latent pixels, of which a tile holds 24."""
    sizes, encoder = [], host.shared.sd_model.first_stage_model.encoder
    handle = encoder.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape[-2:])))
    host.generate(True, 4, {"pixel_upsampling": True})
    assert sizes[:2] == [(128, 128), (192, 192)]
    assert max(sizes[2:]) <= (192, 192)
    sizes.clear()
    own = encoder.forward
    encoder.forward = lambda x: own(x)  # as Tiled VAE, which has tiles of its own
    host.generate(True, 4, {"pixel_upsampling": True})
    handle.remove()
    assert sizes == [(128, 128), (192, 192), (256, 256)]


def test_a_phase_that_cannot_be_encoded_leaves_the_one_before(host, monkeypatch):
    encode, before = host.shared.sd_model.encode_first_stage, snapshot(host)

    def small(model, x):
        if x.shape[-1] > 128:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return encode(x)

    monkeypatch.setattr(type(host.shared.sd_model), "encode_first_stage", small)
    reply = host.generate(True, 3, {"pixel_upsampling": True})
    assert reply.sizes[-1] == SIZES[2]
    assert [tuple(image.shape[-2:]) for image in reply.images] == [(128, 128)]
    assert "out of memory" in reply.comments[0]
    assert_as_before(host, before)


# ------------------------------------------------------------------------------------------------------------------- decoding


@pytest.fixture
def decoder(host, monkeypatch):
    """The model's decoder. decoder.sizes: what it is given, in tiles of 24 latent pixels."""
    monkeypatch.setattr(host.webui.decoding.tiles, "tile_for", lambda network, device, base: 24)
    decoder, sizes = host.shared.sd_model.first_stage_model.decoder, []
    handle = decoder.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape[-2:])))
    yield SimpleNamespace(network=decoder, sizes=sizes)
    handle.remove()


def test_large_pictures_are_decoded_in_tiles(host, decoder):
    """4x is 32 latent pixels; what is up to tiles of 24 is decoded at once, as the host does."""
    small = host.generate(True, 3)
    assert decoder.sizes == [(24, 24)]
    before = snapshot(host)
    large = host.generate(True, 4, batch_size=2)
    assert decoder.sizes.count((32, 32)) == 2  # once for each image, up to the latents' resolution
    assert decoder.sizes.count((2, 2)) > 8
    assert_as_before(host, before)
    expected = [host.shared.sd_model.decode_first_stage(latents[None])[0] for latents in (*small.latents[0], *large.latents[0])]
    assert torch.equal(small.images[0], expected[0])
    for image, whole in zip(large.images, expected[1:], strict=True):
        assert (image - whole).square().mean().sqrt() < 1e-2 * whole.std()


def test_the_base_is_decoded_by_the_host(host, decoder):
    host.generate(False)
    assert decoder.sizes == [(8, 8)]


def test_another_decoder_is_left_alone(host, decoder, monkeypatch):
    """Tiled VAE puts its own in place of the decoder's forward; afterwards it leaves the bound method there."""
    own, seen = decoder.network.forward, []
    decoder.network.forward = lambda z: seen.append(tuple(z.shape[-2:])) or own(z)
    monkeypatch.setattr(decoder.network, "forward", decoder.network.forward)
    host.generate(True, 4)
    assert seen == [(32, 32)]
    decoder.network.forward = own
    host.generate(True, 4)
    assert decoder.sizes.count((2, 2)) > 8
    decoder.sizes.clear()
    host.shared.opts.sd_vae_decode_method = "TAESD"
    host.generate(True, 4)
    assert decoder.sizes == [(32, 32)]


@pytest.mark.parametrize("kind", ["memory", "nan"])
@pytest.mark.parametrize("reached", [1, 2])
def test_the_last_phase_that_can_be_decoded_is_not_lost(host, decoder, monkeypatch, kind, reached):
    expected = host.generate(*([True, 2] if reached == 2 else [])).images[0]
    before, decode = snapshot(host), host.shared.sd_model.decode_first_stage

    def small(model, z):
        if z.shape[-1] <= SIZES[reached][1]:
            return decode(z)
        if kind == "memory":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return torch.full((1, 3, 8, 8), float("nan"))

    monkeypatch.setattr(type(host.shared.sd_model), "decode_first_stage", small)
    reply = host.generate(True, 3)
    assert torch.equal(reply.images[0], expected)
    why = "out of memory in the autoencoder" if kind == "memory" else "failed: "
    assert reply.comments[0].startswith(f"DemoFusion: phase 3 of 3, 192x192, cannot be decoded: {why}")
    size = 8 * SIZES[reached][0]
    assert reply.comments[-1].endswith(f"; phase {reached} of 3, {size}x{size}, is what you get.")
    assert len(reply.comments) == 3 - reached
    assert said(host, reply) == {
        "DemoFusion incomplete": "; ".join(text.removeprefix("DemoFusion: ") for text in reply.comments)
    }
    parameters = host.infotext_utils.parse_generation_parameters(reply.infotexts[0])
    assert parameters.get("DemoFusion scale") == (None if reached == 1 else "2")
    assert_as_before(host, before)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("call", [5, 20, 21, 56])  # 20 and 56 end a phase: the NaN is in some pixels only
def test_nan_keeps_the_last_finished_phase(host, call, images):
    """NaN in the rows of the batch's last image."""
    seen = [0]

    def spoil(module, args, out):
        seen[0] += 1
        if seen[0] == call:
            out[images - 1 :: images] = float("nan")

    handle = host.unet.register_forward_hook(spoil)
    reply = host.generate(True, 3, batch_size=images)
    handle.remove()
    assert reply.sizes == [SIZES[phase_done_at(call)]]
    assert len(reply.comments) == 1
    assert "NaN" in reply.comments[0]
    assert torch.isfinite(reply.latents[0]).all()


def test_nothing_of_ours_stays_on_the_host(host, monkeypatch):
    host.generate(False)
    before = snapshot(host)
    reply = host.generate(True, 3, {"phase_steps": 6})
    assert reply.sizes == [(24, 24)]
    assert_as_before(host, before)
    assert reply.comments == []


def test_an_interrupt_ends_the_batches_after_it(host, at_call):
    at_call(STEPS + 2, host.shared.state.interrupt)
    assert host.generate(True, 2, n_iter=3).sizes == [(8, 8)]


def test_a_skip_goes_on_with_the_next_batch(host, at_call):
    at_call(STEPS + 2, host.shared.state.skip)
    reply = host.generate(True, 2, n_iter=2)
    assert reply.sizes == [(8, 8), (16, 16)]
    assert ["DemoFusion scale" in text for text in reply.infotexts] == [False, True]
    assert ["DemoFusion incomplete" in text for text in reply.infotexts] == [True, False]


def test_stopping_after_the_image_finishes_it(host, at_call):
    at_call(STEPS + 2, host.shared.state.stop_generating)
    reply = host.generate(True, 2, n_iter=3)
    assert reply.sizes == [(16, 16)]
    assert reply.comments == []


@pytest.mark.parametrize("stop", ["interrupt", "skip"])
def test_a_stop_in_the_base_is_as_without_us_and_told(host, at_call, stop):
    at_call(2, getattr(host.shared.state, stop))
    reply = host.generate(True, 2)
    assert reply.sizes == [(8, 8)]
    assert "DemoFusion scale" not in reply.infotexts[0]
    line = "phase 1 of 2, 64x64, is not finished, because it was stopped"
    assert reply.comments == [f"DemoFusion: {line}"]
    assert said(host, reply) == {"DemoFusion incomplete": line}


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("interrupt", "was stopped"),
        ("skip", "was stopped"),
        ("error", "failed: the model broke"),
        ("error without text", "failed: RuntimeError()"),
    ],
)
@pytest.mark.parametrize("call", [STEPS + 1, 7 * STEPS])
def test_what_is_not_finished_is_said_in_the_reply(host, at_call, kind, why, call):
    action, _ = trouble(host, kind)
    at_call(call, action)
    reply = host.generate(True, 3)
    line = f"phase {phase_done_at(call)} of 3 is the last one finished, because the next {why}"
    assert said(host, reply) == {"DemoFusion incomplete": line}
    assert reply.p.extra_generation_params["DemoFusion incomplete"] == line


def test_what_is_said_of_one_batch_is_not_said_of_the_next(host, at_call):
    def fail():
        raise RuntimeError("the model broke")

    at_call(STEPS + 2, fail)
    reply = host.generate(True, 2, n_iter=3)
    assert reply.sizes == [(8, 8), (16, 16), (16, 16)]
    line = "phase 1 of 2 is the last one finished, because the next failed: the model broke"
    assert [said(host, reply, i) for i in range(3)] == [{"DemoFusion incomplete": line}, {}, {}]
    again = host.generate(True, 2)
    assert said(host, again) == {}


@pytest.mark.parametrize(
    "text", ['a "quoted" thing', "a, b: c", '"', "back\\slash, and", "é ü 漢字, x", "tab\tand\x0bmore", "a=b;c"]
)
def test_whatever_an_error_says_can_be_read_again(host, at_call, text):
    def fail():
        raise RuntimeError(text)

    at_call(STEPS + 2, fail)
    reply = host.generate(True, 2)
    why = " ".join(text.splitlines()[0].split())
    line = f"phase 1 of 2 is the last one finished, because the next failed: {why}"
    assert said(host, reply) == {"DemoFusion incomplete": line}
    assert pasted(host, reply.infotexts[0])[0] is False


@pytest.mark.parametrize(
    ("what", "size"),
    [("Phases", (8, 8)), ("_restored", (8, 8)), ("Progress.pause", (8, 8)), ("_keep_what_is_finished", (8, 8)),
     ("may_use_tiles", (8, 8)), ("_Job.called", (8, 8))],
)  # fmt: skip
def test_whatever_else_fails_the_base_stays_and_the_reply_says_so(host, at_call, monkeypatch, what, size):
    def fail(*args, **kwargs):
        raise KeyError("a surprise")

    if what in ("_keep_what_is_finished", "_Job.called"):
        at_call(STEPS + 2, host.shared.state.skip)
    owner, _, name = what.rpartition(".")
    loop = host.webui.loop
    monkeypatch.setattr(getattr(loop, owner) if owner else loop, name, fail)
    reply = host.generate(True, 2)
    assert reply.sizes == [size]
    assert "is the last one finished, because the next failed: 'a surprise'" in said(host, reply)["DemoFusion incomplete"]
    assert len(host.reports) == 1


def test_a_base_of_another_size_than_asked_for_is_told(host, monkeypatch):
    sample = host.processing.StableDiffusionProcessingTxt2Img.sample
    smaller = lambda p, *args: sample(p, *args)[..., :6, :6]  # noqa: E731
    monkeypatch.setattr(host.processing.StableDiffusionProcessingTxt2Img, "sample", smaller)
    reply = host.generate(True, 2)
    assert reply.sizes == [(6, 6)]
    line = "the base is what you get, because another extension has made the base 48x48, and not 64x64; switch it off"
    assert said(host, reply) == {"DemoFusion incomplete": line}
    assert reply.comments == [f"DemoFusion: {line}"]


def test_pictures_that_are_there_already_are_told(host):
    p = host.processing_for(True, 2)
    ps = host.scripts.PostSampleArgs(host.processing.DecodedSamples([1]))
    host.script.post_sample(p, ps, True, 2)
    assert ps.samples == [1]
    assert "something else has made pictures of it already" in p.extra_generation_params["DemoFusion incomplete"]


# ----------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ([True, 1], "scale must be above 1 and at most 8, got 1"),
        ([True, 9], "scale must be above 1 and at most 8, got 9"),
        ([True, "4"], "scale must be a number, got '4'"),
        ([True, None], "scale must be a number, got None"),
        ([True, 1.05], "scale 1.05 adds no latent pixel to a base of 8x8; choose a larger one"),
        ([True, 2, {"resize_width": 67}], "the size to resize to adds no latent pixel to a base of 8x8; choose a larger one"),
        ([True, 2, 1.5], "phase steps must be a whole number, got 1.5"),
        ([True, 2, {"denoising_strength": 0}], "denoising strength must be above 0 and at most 1, got 0"),
        ([True, 2, {"stride": 99}], "stride must be above 0 and at most 1, got 99"),
        ([True, 2, {"jitter": "no"}], "jitter must be true or false, got 'no'"),
        ([True, 2, {"alpha1": -1}], "alpha1 must be from 0 to 20, got -1"),
        ([True, 2, {"blur_sigma": 0}], "blur sigma must be above 0 and at most 10, got 0"),
        ([True, 2, {"save_phases": "yes"}], "save phases must be true or false, got 'yes'"),
        (["yes", 2], "enabled must be true or false, got 'yes'"),
    ],
)
def test_a_wrong_value_makes_no_image(host, calls, args, line):
    assert_refused(host, calls, line, *args)
    assert host.generate(True, 2).sizes == [(16, 16)]


def assert_refused(host, calls, line, *args, **settings):
    reply = host.generate(*args, n_iter=2, **settings)
    assert reply.images == []
    assert calls.rows == 0
    assert (reply.p.n_iter, reply.p.do_not_save_grid) == (2, False), "as they were, for jobs that go on with p"
    assert reply.comments == [f"DemoFusion: {line}"]
    parameters = host.infotext_utils.parse_generation_parameters(reply.infotexts[0])
    assert {key: value for key, value in parameters.items() if "DemoFusion" in key} == {"DemoFusion refused": line}
    assert host.reports == []


def test_whole_numbers_may_come_with_a_point(host):
    whole, point = ({"phase_steps": kind(6), "view_batch_size": kind(3)} for kind in (int, float))
    assert torch.equal(host.generate(True, 2, point).latents[0], host.generate(True, 2.0, whole).latents[0])


def test_a_picture_that_memory_cannot_hold_is_refused(host, calls, monkeypatch):
    """The host has four copies of each picture at the end; a batch has two of them."""
    monkeypatch.setattr("lib_demofusion.memory.free_memory", lambda device: 2**22)
    line = "the pictures of 512x512 take 24 MiB of main memory, and 4 MiB are free; scale 3.3 fits"
    assert_refused(host, calls, line, True, 8, batch_size=2)
    assert host.generate(True, 3.3, batch_size=2).sizes == [(26, 26)]


def test_unknown_samplers_are_refused(host, calls, monkeypatch):
    line = "the sampler Euler of tomorrow is not one that it knows; Euler works"
    assert_refused(host, calls, line, True, 2, sampler_name="Euler of tomorrow")


# (steps, of which so many are skipped) -> the line's end; None: the host can do with them. As tried on the real host.
FEW_STEPS = {
    ("DDIM", "Automatic"): {(1, 0): "1 step; it needs 2 at least", (2, 0): None, (5, 4): "the 1 of 5 steps", (5, 3): None},
    **{
        (name, scheduler): {(1, 0): "1 step; it needs 2 at least", (2, 0): None, (5, 4): "the 1 of 5 steps", (5, 3): None}
        for name in ("DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 3M SDE")
        for scheduler in ("Automatic", "Karras")
    },
    ("DPM++ 3M SDE", "KL Optimal"): {(1, 0): None, (5, 4): None},
    ("DPM fast", "Automatic"): {(1, 0): None, (5, 4): "the 1 of 5 steps", (5, 3): None},
    ("DPM adaptive", "Automatic"): {(1, 0): None, (5, 4): "the 1 of 5 steps", (5, 3): None},
    ("UniPC", "Automatic"): {
        (1, 0): "1 step; it needs 3 at least",
        (2, 0): "2 steps; it needs 3 at least",
        (3, 0): None,
        (5, 3): "the 2 of 5 steps that the denoising strength leaves; it needs 3 at least",
        (5, 2): None,
    },
    **{
        (name, "Automatic"): {(1, 0): None, (5, 4): None}
        for name in ("Euler", "Heun", "DPM2 a", "Restart", "LCM", "PLMS", "LMS")
    },
}


@pytest.mark.parametrize(("sampler", "scheduler"), FEW_STEPS)
def test_steps_with_which_the_hosts_sampler_fails_are_refused(host, sampler, scheduler):
    for (steps, skipped), line in FEW_STEPS[sampler, scheduler].items():
        config = DemoFusionConfig(scale=2.0, phase_steps=steps, denoising_strength=(steps - skipped) / steps)
        p = host.processing_for(sampler_name=sampler, scheduler=scheduler, steps=1 if skipped == 0 else 20)
        if skipped == 0:
            p.steps = steps
        if line is None:
            assert host.webui.checks.plan_for(p, config)
            continue
        with pytest.raises(ValueError, match="at least") as told:
            host.webui.checks.plan_for(p, config)
        assert str(told.value).startswith(f"{sampler} cannot do with {line}")


def test_they_are_refused_before_the_base(host, calls):
    line = "DDIM cannot do with the 1 of 3 steps that the denoising strength leaves; it needs 2 at least"
    assert_refused(host, calls, line, True, 2, {"denoising_strength": 0.4}, sampler_name="DDIM", steps=3)
    assert_refused(host, calls, "DDIM cannot do with 1 step; it needs 2 at least", True, 2, sampler_name="DDIM", steps=1)


def test_stable_diffusion_3_is_refused(host, calls):
    host.shared.sd_model.is_sd3 = True
    assert_refused(host, calls, "Stable Diffusion 3 has no UNet; a Stable Diffusion 1.x, 2.x or XL checkpoint works", True, 2)


def test_edit_models_are_refused(host, calls):
    host.shared.sd_model.cond_stage_key = "edit"
    line = "an instruct-pix2pix checkpoint edits a given image; a text-to-image checkpoint works"
    assert_refused(host, calls, line, True, 2)


def test_a_refusal_holds_where_another_script_asks_for_images_after_it(host, calls):
    host.add_script("Another")
    host.runner.alwayson_scripts[-1].process = lambda p, *args: setattr(p, "n_iter", 2)
    reply = host.generate(True, 0.5, n_iter=2)
    assert (reply.p.n_iter, reply.images, calls.rows) == (2, [], 0)
    assert "DemoFusion refused: " in reply.infotexts[0]
    assert len(host.generate(False, n_iter=2).images) == 2


@pytest.mark.parametrize("unit", [SimpleNamespace(enabled=False), {"enabled": False}, None, False])
def test_controlnet_that_is_off_does_not_matter(host, unit):
    host.add_script("ControlNet", unit)
    host.add_script("Another", SimpleNamespace(enabled=True))
    assert host.generate(True, 2).sizes == [(16, 16)]


@pytest.mark.parametrize("args", [(True, 2), (True, 2, {"save_phases": True})])
def test_hires_fix_beside_it_is_refused(host, calls, args):
    line = "Hires. fix is on too, and only one of the two can enlarge the image; untick one of them"
    assert_refused(host, calls, line, *args, enable_hr=True)
    assert host.generate(False, enable_hr=True).sizes == [(8, 8)]


@pytest.mark.parametrize("how", ["firstpass_image", "txt2img_upscale"])
def test_the_gallerys_own_button_goes_before(host, monkeypatch, how):
    """It runs Hires. fix on a finished picture, whatever the form says."""
    monkeypatch.setattr(host.processing.StableDiffusionProcessingTxt2Img, "txt2img_upscale", True, raising=False)
    picture = {"firstpass_image": object()} if how == "firstpass_image" else {}
    if picture:
        monkeypatch.undo()
    reply = host.generate(True, 2, enable_hr=True, **picture)
    line = "it stood aside, since a finished picture was enlarged, by Hires. fix"
    assert reply.comments == [f"DemoFusion: {line}"]
    assert said(host, reply) == {"DemoFusion note": line}
    assert "DemoFusion scale" not in reply.infotexts[0]
    assert torch.equal(reply.latents[0], host.generate(enable_hr=True, **picture).latents[0])


# -------------------------------------------------------------------------------------------------- what a request may be


def test_fewer_arguments_have_the_forms_values(host):
    whole = [True, *(control.value for control in host.script.controls[1:])]
    latents = host.generate(*whole).latents[0]
    for count in (1, 4, 9, 17, 18):
        assert torch.equal(host.generate(*whole[:count]).latents[0], latents)


@pytest.mark.parametrize("surplus", ["", 0, False, None, "more", [1], {}])
@pytest.mark.parametrize("more", [1, 2, 5])
def test_one_argument_too_many_is_refused(host, calls, surplus, more):
    args = [True, *(control.value for control in host.script.controls[1 : len(host.webui.settings.ARGUMENTS)])]
    line = f"it has 31 arguments, of which unguided flat is the last; got one more, {surplus!r}"
    assert_refused(host, calls, line, *args, *[surplus] * more)
    assert host.generate(False, *args[1:], surplus).sizes == [(8, 8)]


@pytest.mark.parametrize("position", range(1, 20))
@pytest.mark.parametrize("value", [None, "", [2], {"a": 1}, "two", float("nan"), float("inf"), 10**400, -1, b"x"])
def test_an_argument_of_another_kind_is_refused(host, calls, position, value):
    args = [True, 2, *(control.value for control in host.script.controls[2 : len(host.webui.settings.ARGUMENTS)])]
    if position == 16 and isinstance(value, str) or position in (16, 18) and value in ("", None):
        return  # a path; nothing, which gradio 4 says by None
    args[position] = value
    line = refusal(host.generate(*args))
    assert calls.rows == 0
    names = {"save_phases": "save phases", "resume": "resume", "start_from": "start from"}
    label = (
        names.get(host.webui.settings.ARGUMENTS[position])
        or host.webui.settings.CONFIG_FIELDS[host.webui.settings.ARGUMENTS[position]].metadata["label"]
    )
    assert line.startswith(label) or value == 10**400
    assert host.generate(True, 2, steps=1).sizes == [(16, 16)]


@pytest.mark.parametrize("enabled", [1, "true", "", 0, None, [], 2.0])
def test_enabled_must_be_said_clearly(host, calls, enabled):
    assert refusal(host.generate(enabled, 2)) == f"enabled must be true or false, got {enabled!r}"


def test_arguments_that_nobody_filled_ask_for_nothing(host):
    p = host.processing_for()
    p.script_args = [None] * len(p.script_args)
    assert fake_webui.process_images(p).images[0].shape[-1] == 64
    p = host.processing_for()
    host.script.args_from, host.script.args_to, before = 0, 0, (host.script.args_from, host.script.args_to)
    assert fake_webui.process_images(p).images[0].shape[-1] == 64
    host.script.args_from, host.script.args_to = before


@pytest.mark.parametrize("where", ["check_fits", "plan_for", "read_settings", "describe"])
@pytest.mark.parametrize("error", [KeyError("what"), RuntimeError("CUDA error"), MemoryError(), OSError(28, "No space left")])
def test_whatever_fails_before_the_base_refuses(host, calls, monkeypatch, capsys, where, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(host.webui.checks, where, fail)
    line = refusal(host.generate(True, 2))
    assert line == f"it failed before it began ({type(error).__name__}: {error}); the console says more"
    assert "Traceback" in capsys.readouterr().err
    assert calls.rows == 0


def test_what_was_refused_once_is_not_said_of_the_next_job(host):
    """The host's plots make their jobs as copies, which share what is said of them."""
    p = host.processing_for(True, 9)
    fake_webui.process_images(p)
    for args in ([True, 2], [False]):
        other = host.processing_for(*args)
        other.extra_generation_params = p.extra_generation_params
        text = fake_webui.process_images(other).infotexts[0]
        assert "DemoFusion refused" not in text
        assert ("DemoFusion scale: 2" in text) == args[0]


@pytest.mark.parametrize("first", [True, False])
def test_two_scripts_of_one_name_refuse(host, first):
    """The API gives what is meant for either to the first."""
    host.add_script("DemoFusion Upscale", False, 7)
    twin = host.runner.alwayson_scripts[-1]
    twin.filename = "another/scripts/demofusion.py"
    line = "another script is called DemoFusion Upscale as well (another/scripts/demofusion.py); remove one of the two"
    assert refusal(host.generate(True, 2)) == line
    assert host.generate().sizes == [(8, 8)]
    p = host.processing_for()
    p.script_args[twin.args_from] = True  # where a request for DemoFusion may have gone
    assert len(fake_webui.process_images(p).images) == 1, "the form shows whose they are"
    p.is_api = True
    assert fake_webui.process_images(p).images == []
    assert p.extra_generation_params["DemoFusion refused"] == line


@pytest.mark.parametrize("chosen", [None, 0, "None", "X/Y/Z plot"])
def test_a_refused_job_of_no_other_script_has_no_picture(host, chosen):
    p = host.processing_for(True, 9)
    p.script_args[0] = chosen
    assert fake_webui.process_images(p).images == []


def test_a_refused_job_of_another_script_becomes_a_picture_of_the_refusal(host):
    """A plot's cell, say: without a picture the host shows a black one, or fails."""
    p = host.processing_for(True, 9, n_iter=2, batch_size=2)
    p.script_args[0] = 3
    processed = fake_webui.process_images(p)
    assert len(processed.images) == len(processed.infotexts) == 4
    for image, text in zip(processed.images, processed.infotexts):
        assert image.size == (256, 256)
        assert len(set(image.getdata())) > 1, "nothing is written there"
        parameters = host.infotext_utils.parse_generation_parameters(text)
        assert parameters["DemoFusion refused"] == "scale must be above 1 and at most 8, got 9"


# ----------------------------------------------------------------------------------------------------------------- progress


@pytest.mark.parametrize(
    ("sampler", "batches", "args"), [("Euler", 1, (3,)), ("Euler", 3, (2, {"phase_steps": 9})), ("DDIM", 2, (2,))]
)
def test_one_bar_over_phases_and_batches(host, monkeypatch, sampler, batches, args):
    state, shown, rows, jobs, ends = host.shared.state, [], [], [], []
    post_sample = host.script.post_sample

    def look(module, args):
        own = state.sampling_step / state.sampling_steps if state.sampling_steps else 0
        shown.append((state.job_no + own) / state.job_count)
        rows.append(len(args[0]))
        jobs.append((state.job, state.textinfo))

    def end(p, ps, *args):
        post_sample(p, ps, *args)
        ends.append(state.job_no)

    host.unet.register_forward_pre_hook(look)
    monkeypatch.setattr(host.script, "post_sample", end)
    host.generate(True, *args, sampler_name=sampler, n_iter=batches, steps=8)
    assert all(after >= before - 1e-9 for before, after in itertools.pairwise(shown)), "the bar goes back"
    done = torch.tensor(rows).cumsum(0) - torch.tensor(rows)
    assert (torch.tensor(shown) - done / sum(rows)).abs().max() < 0.06
    assert ends == list(range(batches))
    assert all(type(number) is int for number in ends)
    assert state.job_no == batches
    assert {f"DemoFusion phase 2 of {1 + (args[0] == 3) + 1}"} <= {job for job, _ in jobs}
    assert all(text in (None, job) or re.fullmatch(re.escape(job) + r" \(about \d+:\d\d\)", text) for job, text in jobs)
    assert any(text and "about" in text for _, text in jobs)
    assert state.textinfo is None


def test_the_bar_does_not_run_ahead_between_phases(host, monkeypatch, tmp_path):
    """Images of finished phases are decoded while the host's own step is the last phase's."""
    host.shared.opts.samples_save = True
    state, shown = host.shared.state, []
    decode = host.processing.decode_latent_batch

    def look(*args, **kwargs):
        own = state.sampling_step / state.sampling_steps
        shown.append((state.job_no + own) / state.job_count)
        return decode(*args, **kwargs)

    monkeypatch.setattr(host.processing, "decode_latent_batch", look)
    host.generate(*saving(3), outpath_samples=str(tmp_path))
    total = 1 + VIEWS[2] + VIEWS[3]
    assert shown == pytest.approx([1 / total, (1 + VIEWS[2]) / total, 1])


@pytest.mark.parametrize("batches", [1, 2])
def test_the_consoles_bar_comes_to_its_end(host, batches):
    host.generate(True, 3, n_iter=batches)
    bar = host.shared.total_tqdm
    assert bar._done == bar._total == batches * STEPS * (1 + VIEWS[2] + VIEWS[3])


# ----------------------------------------------------------------------------------------------------------------- previews


@pytest.fixture
def page(host, calls):
    """A page that asks for a preview at every call of the model. page.made: (views so far, latents' sides) of each preview."""
    seen, state = SimpleNamespace(made=[]), host.shared.state

    def ask(module, args):
        before = state.id_live_preview
        state.set_current_image()
        if state.id_live_preview != before:
            seen.made.append((calls.rows // 2, tuple(state.current_latent.shape[-2:])))

    host.unet.register_forward_pre_hook(ask)
    return seen


FAST = dict(denoising_strength=0.4, doubling=True, pixel_upsampling=True, stride=0.625, feather=True, view_batch_size=1)
LARGE = {**FAST, "view_batch_size": 8}  # for 8x, whose steps have 233 views


@pytest.mark.parametrize("every", [1, 2, 5, 10, 20, 32])
@pytest.mark.parametrize(("scale", "steps"), [(2, 20), (4, 20), (8, 10), (4, 3)])
def test_phases_show_themselves_at_no_more_cost_than_the_base(host, page, calls, every, scale, steps):
    host.shared.opts.show_progress_every_n_steps = every
    settings = LARGE if scale == 8 else FAST
    reply = host.generate(True, scale, settings, steps=steps)
    plan = host.webui.checks.plan_for(reply.p, DemoFusionConfig(scale=float(scale), **settings))
    every = min(every, host.webui.progress.PREVIEW_STEPS)
    views = [sum(phase.evaluations for phase in plan.phases[:n]) for n in range(len(plan.phases) + 1)]
    for phase, first, last in zip(plan.phases[1:], views[1:], views[2:]):
        made = [views for views, size in page.made if size == phase.size and first < views <= last]
        step, share = phase.views, every * phase.scale**2  # so many views for each preview in the base
        # All but the first step, whose result is there when the second begins, and the wait for the one before.
        assert len(made) >= (last - first - 2 * step - every * (phase.scale / 2) ** 2) // max(share, step)
        assert len(made) <= (last - first) / share + 1
    ours = [(views, size) for views, size in page.made if views > steps + 1]
    decoded = sum(math.prod(size) for _, size in ours[1:])
    if every > 1:
        assert every * decoded <= 64 * (ours[-1][0] - steps), "more pixels than in the base, for what the model sees"
    assert len({views for views, _ in page.made}) == len(page.made)


@pytest.mark.parametrize("settings", [{}, {"phase_cfg_scale": 1.0}])
def test_without_guidance_previews_are_as_dear_and_as_many_by_the_work(host, page, calls, settings):
    host.generate(True, 4, {**FAST, **settings}, steps=20)
    begun = min(views for views, size in page.made if size == (32, 32))
    made = [views for views, size in page.made if size == (32, 32)]
    assert len(made) == pytest.approx((calls.rows // 2 - begun) / (10 * 16), abs=1), "of what the model sees of both branches"


def test_a_long_first_step_shows_the_phase_before(host, page):
    """At 8x a step is 233 views; the phase of 4x is due after 160."""
    host.generate(True, 8, LARGE, steps=10)
    assert (16, 16) in [size for _, size in page.made]
    assert (32, 32) in [size for _, size in page.made]
    assert (64, 64) in [size for _, size in page.made]


@pytest.mark.parametrize(("setting", "value"), [("show_progress_every_n_steps", -1), ("live_previews_enable", False)])
def test_who_wants_no_previews_gets_none(host, page, setting, value):
    setattr(host.shared.opts, setting, value)
    host.generate(True, 4, FAST, steps=20)
    assert page.made == []


def test_where_the_page_may_not_decode_the_phase_does(host, calls, monkeypatch):
    """With --medvram the host makes previews between steps, and only where its own count of them is due."""
    host.shared.parallel_processing_allowed = False
    made, show = [], host.sd_samplers_common.sample_to_image
    monkeypatch.setattr(
        host.sd_samplers_common, "sample_to_image", lambda latents: made.append(tuple(latents.shape[-2:])) or show(latents)
    )
    host.generate(True, 4, FAST, steps=20)
    assert 2 <= made.count((16, 16)) <= 4
    assert 2 <= made.count((32, 32)) <= 4


def test_a_preview_that_fails_ends_nothing(host, monkeypatch):
    host.shared.parallel_processing_allowed = False

    def fail(latents):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    expected = host.generate(True, 2, FAST, steps=20).latents[-1]
    monkeypatch.setattr(host.sd_samplers_common, "sample_to_image", fail)
    reply = host.generate(True, 2, FAST, steps=20)
    assert torch.equal(reply.latents[-1], expected)
    assert reply.comments == []


@pytest.mark.parametrize(("kind", "largest"), [("Full", 24), ("Approx NN", 64), ("TAESD", 64)])
def test_previews_by_the_whole_decoder_are_no_larger_than_a_tile(host, page, decoder, kind, largest):
    host.shared.opts.show_progress_type = kind
    host.generate(True, 8, {**LARGE, "pixel_upsampling": False}, steps=10)
    sides = {size[0] for _, size in page.made}
    assert max(sides) == largest
    assert 16 in sides


def test_while_we_decode_in_tiles_nobody_else_decodes(host, decoder, monkeypatch):
    """Tiles change the decoder for as long; a preview at the same time would spoil both."""
    free, begun, state = [], [], host.shared.state

    def look(network, args):
        def other():
            got = host.webui.decoding._coding.acquire(blocking=False)
            free.append(got)
            if got:
                host.webui.decoding._coding.release()

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        begun.append(state.current_latent is not None)

    handle = decoder.network.register_forward_pre_hook(look)
    host.generate(True, 4)
    handle.remove()
    assert len(free) > 8
    assert not any(free)
    assert not any(begun)
    assert state.current_latent is not None


def test_a_preview_waits_until_the_decoder_is_whole_again(host, monkeypatch):
    """The page's own call of the model, on its thread, takes its turn with ours."""
    model, turns = host.shared.sd_model, []
    before = dict(vars(model))
    with host.webui.decoding.in_turns(model):
        with host.webui.decoding._coding:
            thread = threading.Thread(target=lambda: turns.append(model.decode_first_stage(torch.zeros(1, 4, 8, 8)).shape))
            thread.start()
            turns.append("ours")
        thread.join()
    assert turns == ["ours", (1, 3, 64, 64)]
    assert vars(model).keys() == before.keys()


# ---------------------------------------------------------------------------------------------------- the form and the infotext


FULL = [True, 2.5, 3, 0.65, True, True, 0.4, True, 7.5, False, 2.5, 1.5, 0.5, 0.75, 2, False, "", 12, "", 0]
FULL += [5, "DPM++ 2M", "Karras", 2.5, 'a disc: "red",\nstriped', '"blue"', "Use same checkpoint", "Doubled", 160, 160, 12.5]


def pasted(host, text):
    parameters = host.infotext_utils.parse_generation_parameters(text)
    values = {id(component): function(parameters) for component, function in host.runner.infotext_fields}
    return [values.get(id(control)) for control in host.script.controls[: len(host.webui.settings.ARGUMENTS)]]


def test_the_form_has_every_argument_at_its_default(host):
    names = [control.elem_id.removeprefix("script_demofusion_") for control in host.script.controls]
    assert names == ["enable", *host.webui.settings.ARGUMENTS[1:], "end", "unread", "asked"]
    form = host.webui.settings.DemoFusionConfig.preset("Fast", scale=2.0)
    others = {"enabled": False, "save_phases": False, "resume": "", "start_from": ""}
    shown = host.webui.settings.shown
    values = {
        name: others[name] if name in others else shown(name, getattr(form, name)) for name in host.webui.settings.ARGUMENTS
    }
    assert [control.value for control in host.script.controls] == [*values.values(), host.webui.settings.END, "", ""]
    assert [control.visible for control in host.script.controls[-3:]] == [False, False, False]
    assert host.gradio.Radio._made.value == "Fast"
    assert host.webui.settings.read_settings([True]) == host.webui.settings.Settings(form)
    assert pasted(host, "Steps: 4, DemoFusion scale: 4")[1] == 4, "a picture says its scale, whatever the form starts at"


@pytest.fixture
def clock(host, monkeypatch):
    """A clock that goes on by a second at every look."""
    seconds = iter(range(10**6))
    monkeypatch.setattr(host.webui.progress, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    monkeypatch.setattr(host.webui.readout, "paces", {})


JOBS = {
    "plain": dict(),
    "a batch": dict(batch_size=3),
    "without guidance": dict(cfg_scale=1),
    "two prompts": dict(prompt="a ring AND a disc"),
    "one call for each prompt": dict(batch_cond_uncond=False),
    "another sampler": dict(sampler_name="DDIM"),
}


@pytest.mark.parametrize("job", JOBS)
def test_the_pace_of_the_last_job_is_all_its_time_by_all_that_the_model_saw(host, calls, clock, job):
    settings = dict(JOBS[job])
    host.shared.opts.batch_cond_uncond = settings.pop("batch_cond_uncond", True)
    host.generate(True, 3, height=64, width=80, **settings)
    assert host.webui.readout.paces == {"main": {80: 1 / calls.rows}}
    assert host.webui.readout.facts()["paces"] == {"80": 1 / calls.rows}
    host.shared.opts.sd_model_checkpoint = "another"
    assert host.webui.readout.facts()["paces"] == {}


def test_a_job_that_was_stopped_has_a_pace_and_one_that_made_nothing_has_none(host, calls, at_call, clock):
    host.generate(True, 1.05)
    host.generate()
    assert host.webui.readout.paces == {}
    calls.rows = 0
    at_call(STEPS + 2, host.shared.state.interrupt)
    host.generate(True, 3)
    assert host.webui.readout.paces == {"main": {64: 1 / calls.rows}}


def test_the_browser_is_told_what_the_server_knows(host, at_call, clock):
    routes = {}
    app = SimpleNamespace(add_api_route=lambda path, endpoint, methods: routes.update({path: (endpoint, methods)}))
    host.script_callbacks.app_started_callback(None, app)
    [(path, (facts, methods))] = routes.items()
    assert (path, methods) == ("/internal/demofusion", ["GET"])
    host.generate(True, 3)
    told = facts()
    assert json.loads(json.dumps(told)) == told
    assert (told["checkpoint"], told["device"], list(told["paces"])) == ("main", "cpu", ["64"])
    assert told["memory"]["main"][1] > 0
    during = []
    at_call(1, lambda: during.append(facts()))
    host.generate()
    assert during[0]["memory"] is None, "what is free while a job runs says nothing of the next one"
    assert facts()["memory"]


def shown_under(host, preset):
    """What the form's controls that presets set show under one of them."""
    settings = host.webui.settings
    config = settings.DemoFusionConfig.preset(preset)
    return [settings.shown(name, getattr(config, name)) for name in settings.PRESET_SETTINGS]


@pytest.mark.skipif(not NODE, reason="needs node, to run the form's scripts")
def test_choosing_a_preset_sets_the_controls_and_they_say_which_it_is(host):
    controls = dict(zip(host.webui.settings.ARGUMENTS, host.script.controls))
    shown = [controls[name] for name in host.webui.settings.PRESET_SETTINGS]
    radio = host.gradio.Radio._made
    [(script, inputs, outputs)] = radio._events["input"]
    assert (inputs, outputs) == ([radio], shown)
    for name in host.webui.settings.PRESETS:
        assert in_node(script, name) == shown_under(host, name)
    for control in shown:
        [(script, inputs, outputs)] = control._events["change"]
        assert (inputs, outputs) == (shown, [radio])
        values = [shown_under(host, name) for name in host.webui.settings.PRESETS]
        values.append([*values[-1][:-1], 5.5])
        each = f"(...all) => all.map((values) => ({script})(...values))"
        assert in_node(each, *values) == [*host.webui.settings.PRESETS, None]


def test_pasting_restores_the_form_exactly(host):
    reply = host.generate(*FULL)
    values = pasted(host, reply.infotexts[0])
    assert settings_of(host.webui, values) == settings_of(host.webui, FULL)
    assert list(map(type, settings_of(host.webui, values))) == list(map(type, settings_of(host.webui, FULL)))
    values[15], values[18] = False, ""
    assert torch.equal(host.generate(*values).latents[0], reply.latents[0])


def test_pasting_resets_what_is_the_papers(host):
    values = settings_of(host.webui, pasted(host, host.generate(True, 2).infotexts[0]))
    assert values == [
        True,
        2.0,
        *(
            host.webui.settings.shown(name, getattr(DemoFusionConfig(), name))
            for name in settings_of(host.webui, host.webui.settings.ARGUMENTS)[2:]
        ),
    ]


def test_a_picture_from_before_there_were_hold_steps_keeps_its_look_when_it_is_pasted(host):
    text = host.generate(True, 2, {"hold_steps": 0}).infotexts[0]
    assert "hold steps" not in text
    values = pasted(host, text)
    assert values[host.webui.settings.ARGUMENTS.index("hold_steps")] == 0
    assert "DemoFusion hold steps: 50" in host.generate(True, 2).infotexts[0]


def test_pasting_from_an_image_without_it_only_unticks(host):
    after = len(host.webui.settings.ARGUMENTS) - 17
    assert pasted(host, host.generate().infotexts[0]) == [False, *[None] * 15, "", *[None] * after]


JUNK = ["abc", "", "nan", "inf", "1e9", "-1", "1e999", "2x2", "2, 3", '"', "None", "0x10", "1" + "0" * 400, "\u0663\u0664e"]


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("name", [f.name for f in fields(DemoFusionConfig) if not isinstance(f.default, str)])
def test_what_a_picture_says_and_nobody_can_read_is_refused_in_one_line(host, calls, name, junk):
    label = host.webui.settings.CONFIG_FIELDS[name].metadata["label"]
    parameters = {"DemoFusion scale": "2", f"DemoFusion {label}": junk}
    if junk == "2x2":  # as the host hands it over
        del parameters[f"DemoFusion {label}"]
        parameters |= {f"DemoFusion {label}-1": "2", f"DemoFusion {label}-2": "2"}
    values = {id(control): function(parameters) for control, function in host.runner.infotext_fields}
    *args, end, unread, asked = (values.get(id(control), control.value) for control in host.script.controls)
    assert args[0] is True
    default = DemoFusionConfig(scale=4.0 if name == "scale" else 2.0, hold_steps=0)
    assert settings_of(host.webui, args) == [
        True,
        *(
            host.webui.settings.shown(name, getattr(default, name))
            for name in settings_of(host.webui, host.webui.settings.ARGUMENTS)[1:]
        ),
    ]
    line = unread["value"]
    assert unread["visible"] is True
    assert line.startswith(f"of what was pasted: {label} ")
    assert line.endswith("; set in the form what you want, and empty this field")
    assert_refused(host, calls, line, *args, end, line)
    assert host.generate(*args, end, "", steps=1).images


def test_pasted_settings_that_can_be_read_show_no_line(host):
    for text in (host.generate(*FULL).infotexts[0], host.generate().infotexts[0], "Steps: 4, DemoFusion jitter: maybe"):
        parameters = host.infotext_utils.parse_generation_parameters(text)
        [(_, function)] = [field for field in host.runner.infotext_fields if field[0] is host.script.controls[-2]]
        assert function(parameters) == {"__type__": "generic_update", "value": "", "visible": False}


def saving(scale, resume=""):
    return [True, scale, {"save_phases": True, "resume": resume}]


def test_phases_are_saved_beside_the_output(host, tmp_path):
    host.shared.opts.samples_save = True
    reply = host.generate(*saving(3), batch_size=2, width=80, outpath_samples=str(tmp_path))
    assert [(image["suffix"], image["size"]) for image in host.saved] == [
        *[("-demofusion-phase1", (80, 64))] * 2,
        *[("-demofusion-phase2", (160, 128))] * 2,
    ]
    scales = [host.infotext_utils.parse_generation_parameters(i["info"]).get("DemoFusion scale") for i in host.saved]
    assert scales == [None, None, "2", "2"]
    assert "DemoFusion scale: 3" in reply.infotexts[0]
    files = [Path(image["path"]).with_suffix(".safetensors") for image in host.saved]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert [tuple(read_saved(file, "WebUI").latents.shape) for file in files] == [(1, 4, 8, 10)] * 2 + [(1, 4, 16, 20)] * 2
    host.saved.clear()
    host.generate(*saving(2), do_not_save_samples=True)
    assert host.saved == []


@pytest.fixture
def phase_2(host, tmp_path):
    """The file of phase 2 of a job at 3x, seed 5."""
    host.shared.opts.samples_save = True
    host.generate(*saving(3), seed=5, outpath_samples=str(tmp_path))
    return str(tmp_path / "00001-5-demofusion-phase2.safetensors")


@pytest.mark.parametrize("scale", [3, 4])
def test_a_saved_phase_is_resumed(host, calls, phase_2, scale):
    """To the picture of a job that was not interrupted, at the same scale or at a larger one."""
    job = dict(seed=5, do_not_save_samples=True)
    whole = host.generate(*saving(scale), **job)
    calls.rows = 0
    again = host.generate(*saving(scale, f' "{phase_2}" '), **job)
    plan = host.webui.checks.plan_for(again.p, DemoFusionConfig(scale=float(scale)))
    assert calls.rows == plan.evaluations - 2 * STEPS * VIEWS[2]
    assert torch.equal(again.latents[0], whole.latents[0])
    assert again.infotexts == whole.infotexts
    assert again.comments == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(batch_size=2), "a saved phase belongs to one image; set batch size and batch count to 1"),
        (dict(n_iter=2), "a saved phase belongs to one image"),
        (dict(scale=2), "phase 2 is saved, and this scale has none after it; choose a larger one"),
        (dict(width=80), "the saved phase is of other sizes than these settings make"),
        (dict(file="/nowhere/phase.safetensors"), "no such file to resume from: /nowhere/phase.safetensors"),
        (dict(file=3), "resume must be the path of a file, got 3"),
    ],
)
def test_what_cannot_be_resumed_is_refused(host, calls, phase_2, change, says):
    args = saving(change.pop("scale", 3), change.pop("file", phase_2))
    calls.rows = 0
    reply = host.generate(*args, seed=5, do_not_save_samples=True, **change)
    assert calls.rows == 0
    assert says in reply.comments[0]


@pytest.mark.parametrize(
    ("latents", "base", "says"),
    [
        (
            torch.zeros(1, 16, 16, 16),
            torch.zeros(1, 16, 8, 8),
            "the saved phase has 16 channels, and latents of this checkpoint 4",
        ),
        (torch.zeros(2, 4, 16, 16), torch.zeros(2, 4, 8, 8), "the saved phase is of 2 images"),
        (torch.zeros(1, 4, 20, 20), torch.zeros(1, 4, 10, 10), "the saved phase is of other sizes than these settings make"),
        (torch.zeros(1, 4, 15, 15), torch.zeros(1, 4, 8, 8), "the saved phase is of other sizes than these settings make"),
    ],
)
def test_another_jobs_phase_is_refused(host, calls, tmp_path, latents, base, says):
    """What only the host can know of a file that is a saved phase."""
    file = tmp_path / "phase.safetensors"
    SavedPhase(2, latents, base, "WebUI").write(file)
    assert refusal(host.generate(*saving(3, str(file)))).startswith(says)
    assert calls.rows == 0


@pytest.mark.parametrize("name", ["", "a" * 300, "no\nsuch", "nul\0", "\ud800", "."])
def test_a_file_that_cannot_be_is_refused_in_one_line(host, calls, tmp_path, name):
    assert refusal(host.generate(*saving(3, f"{tmp_path}/{name}")))
    assert calls.rows == 0


def test_a_phase_that_cannot_be_saved_ends_nothing(host):
    host.shared.opts.samples_save = True
    reply = host.generate(*saving(3), outpath_samples="/nowhere")
    assert reply.sizes[-1] == SIZES[3]
    [[key, note]] = said(host, reply).items()
    assert key == "DemoFusion note"
    assert note.count(" was not saved: ") == 2
    assert [text.split(":")[1] for text in reply.comments] == [" phase 1 was not saved", " phase 2 was not saved"]


def test_another_images_phase_is_not_resumed(host, phase_2):
    reply = host.generate(*saving(3, phase_2), seed=6, do_not_save_samples=True)
    assert reply.sizes == [SIZES[1]]
    assert "the saved phase is of another image; take prompt, seed and settings from its image's PNG Info" in reply.comments[0]


def test_xyz_plot_gets_an_axis_for_each_setting(host):
    Axis = type("AxisOption", (SimpleNamespace,), {})
    plot = ModuleType("xyz_grid.py")
    plot.axis_options = []

    def axis(label, type, apply, choices=None):
        return Axis(label=label, type=type, apply=apply, choices=choices)

    plot.AxisOption, plot.AxisOptionImg2Img = axis, axis
    plot.Script = type("Script", (host.scripts.Script,), {"__module__": "xyz_grid.py"})
    host.script_callbacks.before_ui_callback()  # without the plot there is nothing to do
    host.scripts.scripts_data.append(host.scripts.ScriptClassData(plot.Script, "", "", plot))
    host.script_callbacks.before_ui_callback()
    assert len(plot.axis_options) == 29
    axes = {axis.label: axis for axis in plot.axis_options}

    p = host.processing_for()
    axes["[DemoFusion] scale"].apply(p, axes["[DemoFusion] scale"].type("2"), [])
    axes["[DemoFusion] jitter"].apply(p, "False", [])
    axes["[DemoFusion] phase steps"].apply(p, axes["[DemoFusion] phase steps"].type("3"), [])
    assert axes["[DemoFusion] jitter"].choices() == ["True", "False"]
    values = dict(zip(host.webui.settings.ARGUMENTS, p.script_args[host.script.args_from :]))
    assert (values["enabled"], values["scale"], values["phase_steps"], values["jitter"]) == (True, 2.0, 3, False)

    axes["[DemoFusion] preset"].apply(p, "Turbo", [])
    assert axes["[DemoFusion] preset"].choices() == list(PRESETS)
    settings = host.webui.settings.read_settings(p.script_args[host.script.args_from : host.script.args_to])
    assert settings.config == host.webui.settings.DemoFusionConfig.preset("Turbo", scale=2.0)

    axes["[DemoFusion] preset"].apply(p, "Tubro", [])
    fake_webui.process_images(p)
    assert p.extra_generation_params["DemoFusion refused"] == f"no preset called 'Tubro'; there are: {', '.join(PRESETS)}"


def test_the_plot_finds_our_script_by_what_it_is(host):
    """Another one, from another file of the same name, may have any title."""
    host.add_script("demofusion", False, 3)
    other = host.runner.alwayson_scripts.pop()
    host.runner.alwayson_scripts.insert(0, other)
    p = host.processing_for()
    host.webui.plot._set_argument(type(host.script), "scale", p, 3.0, [])
    assert p.script_args[other.args_from : other.args_to] == [False, 3]
    assert p.script_args[host.script.args_from :][:2] == [True, 3.0]
    assert host.generate(True, 2).sizes == [(16, 16)]


def test_other_scripts_hear_of_every_phase(host, monkeypatch):
    heard = []
    host.add_script("Another")
    another = host.runner.alwayson_scripts[-1]
    another.process_before_every_sampling = lambda p, *args, **kwargs: heard.append(tuple(kwargs["x"].shape))
    host.generate(True, 3)
    assert heard == [(1, 4, 8, 8), (1, 4, 16, 16), (1, 4, 24, 24)]
