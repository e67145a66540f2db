"""The phases' own settings on the fake host: sampler, guidance, prompts, LoRAs, checkpoint, upscaler and size."""

import contextlib
import json
import random
from types import SimpleNamespace

import fake_webui
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from webui_fixtures import assert_as_before, assert_same, direct_run, refusal, said, snapshot

from lib_demofusion.config import PRESETS, DemoFusionConfig
from lib_demofusion.phases import Pace, make_plan
from lib_demofusion.saved import read_saved

STEPS = 4
VIEWS = {2: 9 + 4, 3: 25 + 9}
STEM = "model.diffusion_model.input_blocks.0.0.weight"
# What p has of the base, and gets back.
NAMES = ("sampler_name", "scheduler", "cfg_scale", "prompts", "negative_prompts", "extra_network_data", "steps", "c", "uc")
NAMES += ("rng", "sampler", "step_multiplier", "lora_hashes", "styles", "all_prompts")


@pytest.fixture
def loras(host):
    """LoRAs in the host's folder."""
    for name, alias in (("sharp", None), ("file-1", "Fast LCM"), ("old", "other")):
        fake_webui.add_lora(name, alias)
    return fake_webui.networks


def write_checkpoint(path, inputs=4, **more):
    save_file({STEM: torch.zeros(8, inputs, 3, 3), **more}, path)
    return str(path)


@pytest.fixture
def second(host, tmp_path):
    """Another checkpoint, of other weights, "second"; as a model of the fake."""
    model = fake_webui.ToyModel(write_checkpoint(tmp_path / "second.safetensors"), seed=5)
    fake_webui.add_model(model)
    fake_webui.loads.clear()
    return model


@pytest.fixture
def bases(host, monkeypatch):
    """The base's latents of each batch from now on, as the host has sampled them."""
    seen, post_sample = [], host.script.post_sample
    monkeypatch.setattr(
        host.script, "post_sample", lambda p, ps, *args: (seen.append(ps.samples.clone()), post_sample(p, ps, *args))[1]
    )
    return seen


@pytest.fixture
def kept(host, monkeypatch):
    """What of p is another object after the phases than before, or was not there: names, of each batch."""
    seen, post_sample = [], host.script.post_sample

    def look(p, ps, *args):
        before = {name: getattr(p, name) for name in vars(p)}
        post_sample(p, ps, *args)
        seen.append({name for name, value in vars(p).items() if before.get(name, p) is not value} | before.keys() - vars(p))

    monkeypatch.setattr(host.script, "post_sample", look)
    return seen


@contextlib.contextmanager
def looking(host, look):
    """look(p) at every call of the UNets of all models."""
    jobs, begin = [], host.webui.loop.before_sampling

    def remember(p, *args):
        jobs.append(p)
        return begin(p, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host.webui.loop, "before_sampling", remember)
        handles = [
            model.model.diffusion_model.register_forward_pre_hook(lambda module, args: look(jobs[-1]))
            for model in fake_webui._models.values()
        ]
        yield
        for handle in handles:
            handle.remove()


def seen_by_model(host, what, *args, **settings):
    """what(p) at each call of the model, without repetitions of the call before; and the reply."""
    found = []

    def look(p):
        value = what(p)
        if not found or found[-1] != value:
            found.append(value)

    with looking(host, look):
        reply = host.generate(*args, **settings)
    return found, reply


def parameters(host, reply, picture=0):
    return host.infotext_utils.parse_generation_parameters(reply.infotexts[picture])


def active():
    """The LoRAs that are active, with their strengths."""
    return [(lora.name, lora.strength) for lora in fake_webui.networks.loaded_networks]


# ------------------------------------------------------------------------------------------------- sampler and guidance


@pytest.mark.parametrize(("base", "own", "cfg"), [("Euler", "DDIM", 5.0), ("DDIM", "Euler", 1.5), ("Euler", "Euler", 1.0)])
def test_the_phases_are_the_cores_with_the_phases_own_sampler_and_guidance(host, base, own, cfg):
    made = host.generate(sampler_name=base).latents[0]
    settings = {"phase_sampler": own, "phase_cfg_scale": cfg}
    latents = host.generate(True, 2, settings, sampler_name=base).latents[0]
    assert_same(latents, direct_run([host.shared.sd_model] * STEPS, made, own, 2, STEPS, cfg, seeds=[1]))


SAME = {
    "phase_sampler": "Euler",
    "phase_schedule": "Automatic",
    "phase_cfg_scale": 5.0,
    "phase_prompt": "a ring",
    "phase_negative_prompt": "blue",
    "phase_checkpoint": "main",
}


@pytest.mark.parametrize("name", [*SAME, None])
def test_the_bases_own_settings_change_nothing(host, name):
    settings = SAME if name is None else {name: SAME[name]}
    plain = host.generate(True, 2, {"pixel_upsampling": True}).latents[-1]
    assert torch.equal(host.generate(True, 2, {"pixel_upsampling": True, **settings}).latents[-1], plain)
    assert fake_webui.loads == ["main"], "once, when the host began"


OTHER = {
    "phase_sampler": "DDIM",
    "phase_schedule": "Karras",
    "phase_cfg_scale": 2.0,
    "phase_prompt": "a disc <lora:sharp:0.5>",
    "phase_negative_prompt": "green",
    "phase_checkpoint": "second",
    "upscaler": "Doubled",
    "resize_width": 128,
}


@pytest.mark.parametrize("name", [*OTHER, None])
def test_each_of_them_changes_the_picture_and_neither_the_base_nor_what_comes_after(host, second, loras, bases, kept, name):
    plain, two = host.generate(n_iter=2), host.generate(True, 2, n_iter=2)
    settings = OTHER if name is None else {name: OTHER[name]}
    before, _ = snapshot(host), [bases.clear(), kept.clear()]
    reply = host.generate(True, 3 if name == "resize_width" else 2, settings, n_iter=2)
    assert [torch.equal(a, b) for a, b in zip(bases, plain.latents)] == [True, True]
    assert kept == [set(), set()], "post_sample left something of p changed"
    equal = [torch.equal(a, b) for a, b in zip(reply.images, two.images)]
    assert equal == [name == "resize_width"] * 2, "128 is twice the base"
    assert_as_before(host, before)
    assert active() == []
    again = host.generate(n_iter=2)
    assert all(torch.equal(a, b) for a, b in zip(again.latents, plain.latents))
    assert all(torch.equal(a, b) for a, b in zip(host.generate(True, 2, n_iter=2).images, two.images))
    written = {key for key in parameters(host, reply) if not key.startswith("DemoFusion ")}
    assert written - {"Lora hashes"} == {key for key in parameters(host, two) if not key.startswith("DemoFusion ")}


def test_what_the_model_sees_is_of_the_phases(host, second, loras):
    def what(p):
        texts = (p.prompts, p.negative_prompts, active(), host.shared.sd_model.sd_checkpoint_info.short_title)
        return (p.sampler_name, p.scheduler, p.cfg_scale, *texts)

    found, _ = seen_by_model(host, what, True, 2, OTHER, batch_size=2, prompt="a ring <lora:old:2>")
    assert found == [
        ("Euler", "Automatic", 5.0, ["a ring "] * 2, ["blue"] * 2, [("old", 2.0)], "main"),
        ("DDIM", "Karras", 2.0, ["a disc "] * 2, ["green"] * 2, [("sharp", 0.5)], "second"),
    ]


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(("cfg", "own"), [(5.0, 1.0), (1.0, 5.0), (1.0, 0.0), (5.0, 0.0)])
def test_at_cfg_1_the_phases_leave_the_negative_prompt_out_and_the_plan_says_so(host, calls, batched, cfg, own):
    host.shared.opts.batch_cond_uncond = batched
    reply = host.generate(True, 3, {"phase_cfg_scale": own}, cfg_scale=cfg, batch_size=2)
    branches = 1 if (own or cfg) == 1 else 2
    assert calls.rows == 2 * STEPS * (2 + branches * (VIEWS[2] + VIEWS[3]))
    config = DemoFusionConfig(scale=3.0, phase_cfg_scale=own)
    assert calls.rows == 2 * host.webui.checks.plan_for(reply.p, config).evaluations


def test_the_plan_counts_each_samplers_calls(host, calls):
    settings = {"phase_sampler": "DDIM", "phase_steps": 7}
    reply = host.generate(True, 2, settings)
    of = host.webui.samplers.model_calls
    assert calls.rows == 2 * (of("Euler", None, STEPS) + of("DDIM", None, 7) * VIEWS[2])
    assert calls.rows == host.webui.checks.plan_for(reply.p, DemoFusionConfig(scale=2.0, **settings)).evaluations


def test_the_bar_counts_what_the_branches_take(host, monkeypatch):
    shown, show = [], host.webui.progress.Progress.show

    def look(progress, done):
        show(progress, done)
        shown.append(host.shared.state.job_no + (host.shared.state.sampling_step / (host.shared.state.sampling_steps or 1)))

    monkeypatch.setattr(host.webui.progress.Progress, "show", look)
    host.generate(True, 2, {"phase_cfg_scale": 1.0})
    assert shown == sorted(shown)
    assert shown[-1] == 1
    assert max(value for value in shown if value < 0.14) == pytest.approx(2 / (2 + VIEWS[2]))
    bar = host.shared.total_tqdm
    assert bar._done == bar._total == STEPS * (1 + VIEWS[2])


def test_the_time_of_a_phase_goes_by_its_branches():
    now = [0.0]
    config = DemoFusionConfig(scale=3.0)
    pace = Pace(make_plan((8, 8), STEPS, config, branches=(2, 1)), now=lambda: now[0])
    for _ in range(3):  # a second a step, of one view in both branches
        pace.count(1, 1)
        now[0] += 1
    assert pace.seconds(2) == pytest.approx(STEPS * VIEWS[2] / 2)
    pace = Pace(make_plan((8, 8), STEPS, config), now=lambda: now[0])
    for _ in range(3):
        pace.count(1, 1)
        now[0] += 1
    assert pace.seconds(2) == pytest.approx(STEPS * VIEWS[2])


@pytest.mark.parametrize(
    ("sampler", "schedule", "expected"),
    [
        ("ddim", "", ("DDIM", "Automatic")),
        ("k_lcm", "sgm_uniform", ("LCM", "SGM Uniform")),
        (" LCM ", "SGMUniform", ("LCM", "SGM Uniform")),
        ("DPM++ 2M Karras", "", ("DPM++ 2M", "Karras")),
        ("dpm++ 2m karras", "karras", ("DPM++ 2M", "Karras")),
        ("DPM++ 2M", "automatic", ("DPM++ 2M", "Automatic")),
        ("Use same sampler", "Use same scheduler", ("Euler", "Automatic")),
        ("", "Karras", ("Euler", "Karras")),
    ],
)
def test_samplers_and_schedules_go_by_the_hosts_names_and_aliases(host, sampler, schedule, expected):
    settings = {"phase_sampler": sampler, "phase_schedule": schedule}
    found, reply = seen_by_model(host, lambda p: (p.sampler_name, p.scheduler), True, 2, settings)
    assert found[-1] == expected
    written = parameters(host, reply)
    assert written.get("DemoFusion phase sampler", "Euler") == expected[0], "as the host writes it"
    assert (written["Sampler"], written["Schedule type"]) == ("Euler", "Automatic")


def test_the_schedule_of_the_base_is_the_phases_unless_they_have_their_own(host):
    settings = {"phase_sampler": "DPM++ 2M"}
    found, reply = seen_by_model(host, lambda p: p.scheduler, True, 2, settings, scheduler="SGM Uniform")
    assert found == ["SGM Uniform"]
    assert parameters(host, reply)["Schedule type"] == "SGM Uniform"
    _, reply = seen_by_model(host, lambda p: p.scheduler, True, 2, settings)
    assert parameters(host, reply)["Schedule type"] == "Automatic", "and not Karras, which is the phases' sampler's"


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"phase_sampler": "Elder"}, "there is no sampler 'Elder'; there are: Euler, DDIM, UniPC, DPM++ 2M, LCM"),
        (
            {"phase_sampler": "Euler Karras", "phase_schedule": "SGM Uniform"},
            "there is no sampler 'Euler Karras'; there are: Euler, DDIM, UniPC, DPM++ 2M, LCM",
        ),
        ({"phase_schedule": "Carras"}, "there is no schedule type 'Carras'; there are: Automatic, Karras, SGM Uniform"),
        ({"upscaler": "8x"}, "there is no upscaler '8x'; there are: Latent, Latent (nearest-exact), None, Doubled"),
        ({"phase_checkpoint": "third"}, "there is no checkpoint 'third'; there are: main"),
        ({"phase_cfg_scale": 0.5}, "phase CFG scale must be 0, as the base's, or at least 1, got 0.5"),
        ({"phase_prompt": "<lora:none:1>"}, "there is no LoRA 'none', which the phase prompt names; there are: none"),
        (
            {"phase_sampler": "UniPC", "denoising_strength": 0.4},
            "UniPC cannot do with the 2 of 4 steps that the denoising strength leaves; it needs 3 at least",
        ),
        ({"phase_sampler": "UniPC", "phase_steps": 2}, "UniPC cannot do with 2 steps; it needs 3 at least"),
        ({"resize_width": 96, "resize_height": 64}, "96x64 has not the aspect of 64x64; resize to 64x64 or 96x96, or"),
        ({"resize_width": 64}, "64x64 is 1 times 64x64; resize to more than once and at most 8 times that"),
        ({"resize_height": 1024}, "1024x1024 is 16 times 64x64; resize to more than once and at most 8 times that"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_before_anything_is_sampled(host, calls, settings, line):
    assert refusal(host.generate(True, 2, settings)).startswith(line)
    assert calls.rows == 0


def test_a_sampler_that_only_the_host_knows_is_refused(host, calls):
    config = fake_webui.SamplerData("Better", fake_webui.all_samplers[0].constructor, [], {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fake_webui.samplers_map, "better", config.name)
        line = refusal(host.generate(True, 2, {"phase_sampler": "Better"}))
    assert line == "the sampler Better is not one that it knows; Euler works"
    assert calls.rows == 0


# ---------------------------------------------------------------------------------------------------------------- prompts


def test_a_prompt_of_the_phases_is_for_all_images_and_with_the_styles(host, loras):
    settings = {"phase_prompt": "discs <lora:sharp:2>", "phase_negative_prompt": "red"}
    what = (lambda p: (p.prompts, p.negative_prompts, active()),)
    found, reply = seen_by_model(host, *what, True, 2, settings, batch_size=2, styles=["snowy"])
    assert found == [
        (["a ring on snow"] * 2, ["blue grass"] * 2, []),
        (["discs  on snow"] * 2, ["red grass"] * 2, [("sharp", 2.0)]),
    ]
    assert [text.splitlines()[0] for text in reply.infotexts] == ["a ring on snow"] * 2
    assert parameters(host, reply)["DemoFusion phase prompt"] == "discs <lora:sharp:2>", "as it was typed"


def test_the_images_of_a_batch_may_have_prompts_of_their_own(host, loras, monkeypatch):
    """As another script gives them."""
    before = host.script.before_process_batch

    def script(p, *args, **kwargs):
        p.prompts[:] = ["a ring", "a square"]
        return before(p, *args, **kwargs)

    monkeypatch.setattr(host.script, "before_process_batch", script)
    for prompt, own in (
        ("<lora:sharp:1>", ["a ring", "a square"]),
        ("discs", ["discs", "discs"]),
        ("", ["a ring", "a square"]),
    ):
        found, _ = seen_by_model(host, lambda p: list(p.prompts), True, 2, {"phase_prompt": prompt}, batch_size=2)
        assert found[-1] == own
        assert found[0] == ["a ring", "a square"]


@pytest.mark.parametrize("typed", ["<lora:sharp:0.5>", "  <lora:sharp:0.5> \n"])
def test_loras_alone_come_to_the_bases_prompt_and_its_own(host, loras, typed):
    with_old = dict(prompt="a ring <lora:old:1>", styles=["snowy"])
    found, reply = seen_by_model(host, lambda p: (p.prompts, active()), True, 3, {"phase_prompt": typed}, **with_old)
    assert found == [(["a ring  on snow"], [("old", 1.0)]), (["a ring  on snow"], [("old", 1.0), ("sharp", 0.5)])]
    assert fake_webui.activations[-3:] == [[["old", "1"]], [["old", "1"], ["sharp", "0.5"]], [["old", "1"]]]
    assert parameters(host, reply)["Lora hashes"] == "old: hash of old, sharp: hash of sharp"
    assert reply.p.lora_hashes == {"old": "hash of old"}


def test_a_prompt_with_a_text_replaces_the_bases_loras(host, loras):
    found, reply = seen_by_model(host, lambda p: active(), True, 2, {"phase_prompt": "a disc"}, prompt="a ring <lora:old:1>")
    assert found == [[("old", 1.0)], []]
    assert active() == [("old", 1.0)], "as the host leaves it"
    assert parameters(host, reply)["Lora hashes"] == "old: hash of old"


def test_without_loras_of_their_own_the_phases_activate_none(host, loras):
    host.generate(True, 3, {"phase_sampler": "DDIM", "phase_prompt": "a disc <lora:old:1>"}, prompt="a ring <lora:old:1>")
    assert fake_webui.activations == [[], [["old", "1"]]], "the host's own: of the model, and of the base"


def test_hashes_are_of_what_had_a_part_in_the_picture(host, loras, at_call, bases):
    settings = {"phase_prompt": "<lora:sharp:1>"}
    handle = at_call(STEPS + 2, host.shared.state.skip)
    reply = host.generate(True, 2, settings, n_iter=2)
    handle.remove()
    assert [parameters(host, reply, i).get("Lora hashes") for i in (0, 1)] == [None, "sharp: hash of sharp"]
    handle = at_call(STEPS * 6 + 2, host.shared.state.skip)  # in the second batch
    reply = host.generate(True, 2, {**settings, "view_batch_size": 4}, n_iter=2)
    handle.remove()
    assert [parameters(host, reply, i).get("DemoFusion scale") for i in (0, 1)] == ["2", None]
    assert [parameters(host, reply, i).get("Lora hashes") for i in (0, 1)] == ["sharp: hash of sharp", None]


def test_a_lora_is_found_by_its_alias_and_by_a_file_that_is_new(host, loras):
    found, _ = seen_by_model(host, lambda p: active(), True, 2, {"phase_prompt": "<lora:Fast LCM:1>"})
    assert found == [[], [("file-1", 1.0)]]
    loras.files.append(fake_webui.Network("new"))  # the host has not looked yet
    found, _ = seen_by_model(host, lambda p: active(), True, 2, {"phase_prompt": "<lora:new:1>"})
    assert found == [[], [("new", 1.0)]]


def test_a_lora_that_cannot_be_loaded_ends_the_phases_and_keeps_the_base(host, loras):
    loras.files[0].fits = False
    base = host.generate().latents[0]
    before = snapshot(host)
    reply = host.generate(True, 2, {"phase_prompt": "<lora:sharp:1>"})
    assert torch.equal(reply.latents[0], base)
    assert "failed: the LoRA sharp could not be loaded, as the console says; take another" in reply.comments[1]
    assert "phase 1 of 2, 64x64, is the last one finished" in reply.comments[1]
    assert_as_before(host, before)
    assert active() == []


def test_another_extension_may_have_the_loras(host):
    """Then nobody but it knows their names."""
    found = []

    class Other:
        def activate(self, p, params_list):
            found.append([params.positional for params in params_list])

        def deactivate(self, p):
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fake_webui.extra_network_registry, "lora", Other())
        reply = host.generate(True, 2, {"phase_prompt": "<lora:unheard of:1>"})
    assert reply.sizes[-1] == (16, 16)
    assert found == [[], [["unheard of", "1"]], []]


def test_who_wants_no_extra_networks_gets_none_in_the_phases(host, loras):
    plain = host.generate(True, 2).latents[-1]
    reply = host.generate(True, 2, {"phase_prompt": "<lora:sharp:1>"}, disable_extra_networks=True)
    assert torch.equal(reply.latents[-1], plain)


@pytest.mark.parametrize(("base", "own"), [("a ring", "a ring AND a disc :0.5"), ("a ring AND a disc :0.5", "a square")])
def test_either_may_have_prompts_that_are_joined(host, calls, base, own):
    host.generate(True, 2, {"phase_prompt": own}, prompt=base)
    assert calls.rows == STEPS * ((2 + base.count("AND")) + (2 + own.count("AND")) * VIEWS[2])


def test_prompts_that_change_go_by_the_phases_steps_and_are_set_up_once(host, monkeypatch):
    made, setup = [], fake_webui.StableDiffusionProcessing.setup_conds
    monkeypatch.setattr(
        fake_webui.StableDiffusionProcessing, "setup_conds", lambda p: (made.append((p.prompts[0], p.steps)), setup(p))[1]
    )
    host.generate(True, 3, {"phase_prompt": "a disc", "phase_steps": 7})
    assert made == [("a ring", STEPS), ("a disc", 7)]


# ------------------------------------------------------------------------------------------------------------- checkpoint


def drawn(host, *args, **settings):
    return host.generate(*args, **settings).images


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "settings", [{}, {"pixel_upsampling": True}, {"hold_flat": 20.0, "unguided_flat": 9.0}, {"upscaler": "Doubled"}]
)
@pytest.mark.parametrize("tiling", [False, True])
def test_a_copy_of_the_checkpoint_changes_nothing(host, tmp_path, settings, batch, tiling):
    """So that all that is decoded, enlarged and encoded is what it is without."""
    fake_webui.add_model(fake_webui.ToyModel(write_checkpoint(tmp_path / "copy.safetensors")))
    job = dict(batch_size=batch, tiling=tiling)
    plain = drawn(host, True, 3, settings, **job)
    fake_webui.loads.clear()
    made = drawn(host, True, 3, {**settings, "phase_checkpoint": "copy"}, **job)
    assert fake_webui.loads == ["copy.safetensors", "main"]
    assert all(torch.equal(a, b) for a, b in zip(made, plain, strict=True))


def coded(host, second):
    """Which model decodes and encodes images of which width, from now on."""
    seen = []
    for name, model in (("main", host.shared.sd_model), ("second", second)):
        for kind in ("decoder", "encoder"):
            factor = 8 if kind == "decoder" else 1
            getattr(model.first_stage_model, kind).register_forward_pre_hook(
                lambda module, args, *more, name=name, kind=kind, factor=factor: seen.append(
                    (name, kind, factor * args[0].shape[-1])
                )
            )
    return seen


def test_the_base_is_decoded_by_its_own_model_and_all_else_by_the_phases(host, second):
    seen = coded(host, second)
    reply = host.generate(True, 3, {"phase_checkpoint": "second", "pixel_upsampling": True}, batch_size=2)
    assert seen == [
        *[("main", "decoder", 64)] * 2,
        *[("second", "encoder", 128)] * 2,
        *[("second", "decoder", 128), ("second", "encoder", 192)] * 2,
        *[("second", "decoder", 192)] * 2,
    ]
    assert fake_webui.loads == ["second.safetensors", "main"]
    assert parameters(host, reply)["Model"] == "main"
    assert parameters(host, reply)["DemoFusion phase checkpoint"] == "second"
    seen.clear()
    host.generate(True, 2, {"phase_checkpoint": "second"})
    assert seen == [("second", "decoder", 128)], "latents need no detour"


def test_options_are_as_before_and_the_model_is_merged_as_the_base_is(host, second):
    ratios = []
    host.shared.opts.token_merging_ratio = 0.5
    before = dict(host.shared.opts.data)
    with looking(host, lambda p: ratios.append((p.sd_model.sd_checkpoint_info.name, p.sd_model.applied_token_merged_ratio))):
        host.generate(True, 2, {"phase_checkpoint": "second"})
    assert set(ratios) == {("main", 0.5), ("second.safetensors", 0.5)}
    assert [model.applied_token_merged_ratio for model in fake_webui._models.values()] == [0, 0]
    assert dict(host.shared.opts.data) == before
    assert host.shared.sd_model.sd_checkpoint_info.name == "main"


def test_loras_of_the_base_stay_active_with_another_checkpoint(host, second, loras):
    what = (lambda p: (p.sd_model.sd_checkpoint_info.name, active()),)
    found, _ = seen_by_model(host, *what, True, 3, {"phase_checkpoint": "second"}, prompt="a ring <lora:old:1>", n_iter=2)
    assert found == [("main", [("old", 1.0)]), ("second.safetensors", [("old", 1.0)])] * 2


@pytest.mark.parametrize("settings", [{}, {"phase_checkpoint": "second"}, {"phase_checkpoint": "refiner"}])
def test_the_refiner_switches_in_every_phase(host, second, tmp_path, settings):
    refiner = fake_webui.ToyModel("refiner", seed=1)
    refiner.sd_checkpoint_info.filename = write_checkpoint(tmp_path / "refiner.safetensors")
    fake_webui.add_model(refiner)
    what = (lambda p: p.sd_model.sd_checkpoint_info.short_title,)
    job = dict(refiner_checkpoint="refiner", refiner_switch_at=0.5)
    found, reply = seen_by_model(host, *what, True, 3, settings, **job)
    own = settings.get("phase_checkpoint", "main")
    assert found == (["main", "refiner"] if own == "refiner" else ["main", "refiner", own, "refiner", own, "refiner"])
    assert reply.images[0].shape[-1] == 192
    plain = host.generate(**job).latents[0]
    host.generate(True, 2, settings, **job)
    assert torch.equal(host.generate(**job).latents[0], plain)


@pytest.mark.parametrize("since", [2, 3])
def test_saved_phases_are_the_bases_in_what_they_say_and_can_be_resumed(host, second, loras, tmp_path, since):
    host.shared.opts.samples_save = True
    settings = {**OTHER, "upscaler": "", "resize_width": 0, "phase_steps": 5, "pixel_upsampling": True}
    job = dict(seed=5, outpath_samples=str(tmp_path))
    whole = host.generate(True, 4, {**settings, "save_phases": True}, **job)
    texts = [host.infotext_utils.parse_generation_parameters(image["info"]) for image in host.saved]
    for text in texts:
        base = {"Steps": "4", "Sampler": "Euler", "Schedule type": "Automatic", "CFG scale": "5.0", "Model": "main"}
        assert base.items() <= text.items()
    assert [text.get("Lora hashes") for text in texts] == [None, *["sharp: hash of sharp"] * 2]
    assert [image["info"].splitlines()[0] for image in host.saved] == ["a ring"] * 3
    file = tmp_path / f"0000{since - 1}-5-demofusion-phase{since}.safetensors"
    assert read_saved(file, "WebUI").number == since
    again = host.generate(True, 4, {**settings, "resume": str(file)}, **job)
    assert torch.equal(again.images[0], whole.images[0])
    assert again.infotexts == whole.infotexts
    assert again.comments == []


def test_a_saved_base_is_resumed_with_a_checkpoint_of_the_phases(host, second, tmp_path):
    host.shared.opts.samples_save = True
    job = dict(seed=5, outpath_samples=str(tmp_path))
    settings = {"phase_checkpoint": "second", "pixel_upsampling": True}
    whole = host.generate(True, 2, {**settings, "save_phases": True}, **job)
    again = host.generate(True, 2, {**settings, "resume": str(tmp_path / "00000-5-demofusion-phase1.safetensors")}, **job)
    assert torch.equal(again.images[0], whole.images[0])


def kind_of_file(folder, name):
    """A checkpoint's file of another kind."""
    path = folder / f"{name}.safetensors"
    more = {"conditioner.embedders.1.model.ln_final.weight": torch.zeros(1280)}
    if name == "garbage":
        path.write_bytes(b"\xff" * 100)
    elif name == "text":
        path.write_bytes((5).to_bytes(8, "little") + b"{nope")
    elif name == "unet":
        save_file({"conv_in.weight": torch.zeros(1)}, path)
    elif name == "sd3":
        save_file({"model.diffusion_model.x_embedder.proj.weight": torch.zeros(1)}, path)
    elif name != "gone":
        write_checkpoint(path, {"inpainting": 9, "edit": 8, "depth": 5}.get(name, 4), **(more if name == "sdxl" else {}))
    return str(path)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("sdxl", "the checkpoint sdxl is SDXL, and the base's is Stable Diffusion 1 or 2; choose one of its kind"),
        ("sd3", "the checkpoint sd3 is Stable Diffusion 3, and the base's is Stable Diffusion 1 or 2; choose one of its kind"),
        ("inpainting", "inpainting is an inpainting checkpoint, and the base's is none; choose a text-to-image checkpoint"),
        ("edit", "edit is an instruct-pix2pix checkpoint, and the base's is none; choose a text-to-image checkpoint"),
        ("depth", "depth wants 5 channels and not 4 or the base's; choose a text-to-image checkpoint"),
        ("unet", "unet is no checkpoint with a UNet of Stable Diffusion; choose another"),
        ("garbage", "the checkpoint garbage cannot be read; choose another"),
        ("text", "the checkpoint text cannot be read; choose another"),
        ("gone", "the file of the checkpoint gone is not there; refresh the list of checkpoints"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused_before_anything_is_sampled(host, calls, tmp_path, name, line):
    fake_webui.add_model(fake_webui.ToyModel(kind_of_file(tmp_path, name)))
    fake_webui.loads.clear()
    assert refusal(host.generate(True, 2, {"phase_checkpoint": name})) == line
    assert calls.rows == 0
    assert fake_webui.loads == []


@pytest.mark.parametrize("inputs", [4, 9])
def test_to_an_inpainting_checkpoint_either_kind_may_follow(host, tmp_path, inputs):
    fake_webui.add_model(fake_webui.ToyModel(inpainting=True))
    own = fake_webui.ToyModel(write_checkpoint(tmp_path / "own.safetensors", inputs), inpainting=inputs == 9, seed=4)
    fake_webui.add_model(own)
    rows = []
    own.model.diffusion_model.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    assert host.generate(True, 2, {"phase_checkpoint": "own"}).images[0].shape[-1] == 128
    assert set(rows) == {inputs}


def test_sdxl_may_follow_sdxl(host, tmp_path):
    keys = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
    fake_webui.add_model(fake_webui.ToyModel(sdxl=keys))
    fake_webui.add_model(fake_webui.ToyModel(kind_of_file(tmp_path, "sdxl"), sdxl=keys, seed=4))
    assert host.generate(True, 2, {"phase_checkpoint": "sdxl"}).images[0].shape[-1] == 128
    fake_webui.add_model(fake_webui.ToyModel(write_checkpoint(tmp_path / "sd1.safetensors")))
    assert refusal(host.generate(True, 2, {"phase_checkpoint": "sd1"})).startswith(
        "the checkpoint sd1 is Stable Diffusion 1 or"
    )


def test_what_is_only_known_of_it_once_it_is_loaded_keeps_the_base(host, tmp_path):
    """A .ckpt says nothing before."""
    (tmp_path / "old.ckpt").write_bytes(b"pickled")
    fake_webui.add_model(fake_webui.ToyModel(str(tmp_path / "old.ckpt"), inpainting=True))
    base, before = host.generate(), snapshot(host)
    reply = host.generate(True, 2, {"phase_checkpoint": "old"})
    assert torch.equal(reply.images[0], base.images[0])
    line = "failed: old is an inpainting checkpoint, and the base's is none; choose a text-to-image checkpoint"
    assert reply.comments[0].startswith(f"DemoFusion: {line}; phase 1 of 2, 64x64, is the last one finished")
    assert_as_before(host, before)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("broken file\nsecond line"), "failed: second could not be loaded: broken file"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "out of memory in loading second; a smaller one needs less"),
    ],
)
def test_a_checkpoint_that_cannot_be_loaded_keeps_the_base(host, second, monkeypatch, error, line):
    base, before, reload = host.generate(), snapshot(host), fake_webui.reload_model_weights

    def broken(sd_model=None, info=None, forced_reload=False):
        if info is not None and info.short_title == "second":
            host.shared.sd_model = fake_webui.model_data.sd_model = None  # as the host, where it has no room for two
            raise error
        return reload(sd_model, info, forced_reload)

    monkeypatch.setattr(host.sd_models, "reload_model_weights", broken)
    reply = host.generate(True, 2, {"phase_checkpoint": "second", "pixel_upsampling": True}, n_iter=2)
    assert torch.equal(reply.images[0], base.images[0])
    assert len(reply.images) == 2
    assert reply.comments[0].startswith(f"DemoFusion: {line}")
    assert_as_before(host, before)


def test_where_the_first_cannot_be_loaded_again_the_picture_is_there_and_it_is_told(host, second, monkeypatch):
    expected, reload = host.generate(True, 2, {"phase_checkpoint": "second"}), fake_webui.reload_model_weights

    def broken(sd_model=None, info=None, forced_reload=False):
        if info is not None and info.short_title == "main":
            raise RuntimeError("gone")
        return reload(sd_model, info, forced_reload)

    monkeypatch.setattr(host.sd_models, "reload_model_weights", broken)
    reply = host.generate(True, 2, {"phase_checkpoint": "second"})
    assert torch.equal(reply.images[0], expected.images[0])
    assert said(host, reply) == {"DemoFusion note": "main could not be loaded again: gone; choose it once more"}


def test_a_phase_that_the_phases_model_cannot_decode_leaves_the_one_before(host, second, monkeypatch):
    before, decode = snapshot(host), fake_webui.ToyModel.decode_first_stage

    def small(model, z):
        if z.shape[-1] > (16 if most == 2 else 8):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return decode(model, z)

    for most in (2, 1):
        expected = host.generate(*([True, 2, {"phase_checkpoint": "second"}] if most == 2 else [])).images[0]
        with monkeypatch.context() as patch:
            patch.setattr(fake_webui.ToyModel, "decode_first_stage", small)
            reply = host.generate(True, 3, {"phase_checkpoint": "second"})
        assert torch.equal(reply.images[0], expected)
        assert len(reply.comments) == 3 - most
        assert_as_before(host, before)


def test_no_pace_is_kept_of_a_job_with_two_checkpoints(host, second):
    host.webui.readout.paces.clear()
    host.generate(True, 2, {"phase_checkpoint": "second"})
    assert host.webui.readout.paces == {}
    host.generate(True, 2)
    assert host.webui.readout.paces.keys() == {"main"}


def test_controlnet_and_a_checkpoint_of_the_phases_are_refused(host, second, calls):
    host.add_script("ControlNet", SimpleNamespace(enabled=True, module="canny"))
    line = "ControlNet hangs on one checkpoint, and the phases have another; choose none for them, or switch the unit off"
    assert refusal(host.generate(True, 2, {"phase_checkpoint": "second"})) == line
    assert calls.rows == 0


# ----------------------------------------------------------------------------------------------------- trouble at any call


def fail():
    raise RuntimeError("the model broke\nsecond line")


@pytest.mark.parametrize("kind", ["interrupt", "skip", "error"])
@pytest.mark.parametrize("call", random.Random(1).sample(range(1, STEPS * 14), 6))
def test_whatever_happens_in_the_phases_all_is_as_before(host, second, loras, bases, kept, kind, call):
    settings = {**OTHER, "view_batch_size": 4, "resize_width": 0}
    job = dict(prompt="a ring <lora:old:1>", n_iter=2)
    plain = host.generate(**job)
    before = snapshot(host)
    bases.clear(), kept.clear()
    made, count = [], [0]

    def act(p):
        count[0] += 1
        if count[0] == STEPS + call:
            made.append((p.sampler_name, p.sd_model.sd_checkpoint_info.short_title, active()))
            {"interrupt": host.shared.state.interrupt, "skip": host.shared.state.skip, "error": fail}[kind]()

    with looking(host, act):
        reply = host.generate(True, 3, settings, **job)
    assert made == [("DDIM", "second", [("sharp", 0.5)])] or made == [("Euler", "main", [("old", 1.0)])]
    assert kept == [set()] * len(bases)
    assert len(reply.images) == len(bases)
    assert all(torch.equal(a, b) for a, b in zip(bases, plain.latents)) or made[0][0] == "Euler"
    assert_as_before(host, before)
    assert active() == [("old", 1.0)]
    assert host.shared.sd_model.sd_checkpoint_info.name == "main"
    again = host.generate(**job)
    assert all(torch.equal(a, b) for a, b in zip(again.images, plain.images, strict=True))


# --------------------------------------------------------------------------------------------------------------- upscaler


def references(host, *args, **settings):
    """The references of the phases, in their order."""
    seen, make = [], host.webui.phases.fusion_for

    def look(plan, phase, config, reference, noise, **more):
        seen.append(reference.clone())
        return make(plan, phase, config, reference, noise, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host.webui.phases, "fusion_for", look)
        host.generate(*args, **settings)
    return seen


@pytest.mark.parametrize(("name", "mode"), [("Latent", "bilinear"), ("latent (Nearest-exact)", "nearest-exact")])
@pytest.mark.parametrize("pixels", [True, False])
def test_latents_are_enlarged_by_the_hosts_modes(host, name, mode, pixels):
    """Whatever the settings say of pixels."""
    base = host.generate().latents[0]
    [made] = references(host, True, 2, {"upscaler": name, "pixel_upsampling": pixels})
    assert torch.equal(made, torch.nn.functional.interpolate(base, size=(16, 16), mode=mode, antialias=False))


@pytest.mark.parametrize(("name", "how"), [("Doubled", fake_webui.doubled), ("none", None)])
@pytest.mark.parametrize("batch", [1, 2])
def test_images_are_enlarged_by_the_hosts_upscaler_one_after_the_other(host, name, how, batch):
    model, given = host.shared.sd_model, []
    upscaler = next(known for known in host.shared.sd_upscalers if known.name == "Doubled").scaler
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upscaler, "model", lambda image: given.append(image.size) or fake_webui.doubled(image))
        [made] = references(host, True, 2, {"upscaler": name}, batch_size=batch)
        assert vars(upscaler).keys() == {"model"}, "nothing of ours stays on it"
    assert given == ([(64, 64)] * batch if how else [])
    for row, base in enumerate(host.generate(batch_size=batch).latents[0].split(1)):
        pixels = ((model.decode_first_stage(base)[0] + 1) * 127.5).clamp(0, 255).round().byte().permute(1, 2, 0).numpy()
        image = how(Image.fromarray(pixels)) if how else Image.fromarray(pixels).resize((128, 128), Image.Resampling.LANCZOS)
        expected = torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
        assert (made[row] - model.encode_first_stage(expected)[0]).abs().max() < 0.06, "the noise of the host's encoder"


def test_an_image_that_tiles_is_enlarged_with_what_lies_beyond_its_borders(host):
    given = []
    upscaler = next(known for known in host.shared.sd_upscalers if known.name == "Doubled").scaler
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upscaler, "model", lambda image: given.append(image) or fake_webui.doubled(image))
        host.generate(True, 2, {"upscaler": "Doubled"}, tiling=True)
    assert [image.size for image in given] == [(192, 192)]
    inner = np.asarray(given[0], float)[48:144]
    apart = {shift: np.abs(inner[:, 48:80] - inner[:, 48 + shift : 80 + shift]).mean() for shift in (32, 64)}
    assert apart[64] < 0.2 * apart[32], "a border's other side"


def broken(image):
    raise RuntimeError("no such kernel\nsecond line")


def no_memory(image):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (broken, "failed: the upscaler Doubled says: no such kernel"),
        (no_memory, "out of memory in the upscaler Doubled; another one or a smaller scale needs less"),
        (None, "failed: the upscaler Doubled could not be loaded, as the console says; choose another"),
    ],
)
def test_an_upscaler_that_fails_ends_the_phases_and_keeps_what_is_finished(host, monkeypatch, model, line):
    upscaler = next(known for known in host.shared.sd_upscalers if known.name == "Doubled").scaler
    expected = host.generate(True, 2, {"upscaler": "Doubled"}).latents[-1]
    before, whole = snapshot(host), upscaler.model

    def large_ones_fail(image):
        return whole(image) if image.width < 100 or model is None else model(image)

    monkeypatch.setattr(upscaler, "model", large_ones_fail if model else None)
    reply = host.generate(True, 3, {"upscaler": "Doubled"})
    reached = 2 if model else 1
    assert reply.comments == [
        f"DemoFusion: {line}; phase {reached} of 3, {64 * reached}x{64 * reached}, is the last one finished."
    ]
    assert torch.equal(reply.latents[-1], expected) or reached == 1
    assert_as_before(host, before)


def test_a_stop_in_an_upscaler_keeps_what_is_finished(host, monkeypatch):
    upscaler, stop = next(known for known in host.shared.sd_upscalers if known.name == "Doubled").scaler, host.shared.state
    monkeypatch.setattr(upscaler, "model", lambda image: stop.interrupt() or image)
    base = host.generate().latents[0]
    reply = host.generate(True, 2, {"upscaler": "Doubled"})
    assert reply.comments == ["DemoFusion: stopped; phase 1 of 2, 64x64, is the last one finished."]
    assert torch.equal(reply.latents[-1], base)


# ------------------------------------------------------------------------------------------------------------------ size


@pytest.mark.parametrize(
    ("size", "asked", "made", "scale"),
    [
        ((64, 64), {"resize_width": 160}, (160, 160), 2.5),
        ((64, 64), {"resize_height": 160, "resize_width": 160}, (160, 160), 2.5),
        ((80, 64), {"resize_height": 192}, (240, 192), 3),
        ((80, 64), {"resize_width": 200}, (200, 160), 2.5),
        ((64, 64), {"resize_width": 100}, (96, 96), 1.5),
    ],
)
def test_the_result_has_the_size_that_was_asked_for(host, calls, size, asked, made, scale):
    width, height = size
    reply = host.generate(True, 8, asked, width=width, height=height)
    assert reply.images[0].shape[-2:] == (made[1], made[0])
    plan = host.webui.checks.plan_for(reply.p, DemoFusionConfig(scale=8.0, **asked))
    assert calls.rows == plan.evaluations
    written = parameters(host, reply)
    assert written["DemoFusion scale"] == f"{scale:g}", "what it is"
    names = {f"DemoFusion {name.replace('_', ' ')}": str(value) for name, value in asked.items()}
    assert names.items() <= written.items()
    again = host.webui.settings.read_pasted(written)[0]
    same = host.generate(True, again["scale"], {name: again[name] for name in asked}, width=width, height=height)
    assert torch.equal(same.images[0], reply.images[0])


def test_an_unfinished_phase_does_not_claim_that_size(host, at_call, tmp_path):
    host.shared.opts.samples_save = True
    handle = at_call(STEPS * (1 + 4) + 2, host.shared.state.skip)
    asked = {"resize_width": 160, "view_batch_size": 4, "save_phases": True}
    reply = host.generate(True, 8, asked, outpath_samples=str(tmp_path))
    handle.remove()
    for text in (reply.infotexts[0], host.saved[-1]["info"]):
        written = host.infotext_utils.parse_generation_parameters(text)
        assert written["DemoFusion scale"] == "2"
        assert not any("resize" in key for key in written if key.startswith("DemoFusion"))


# ------------------------------------------------------------------------------------------------------- few-step weights


@pytest.mark.parametrize(
    ("sampler", "cfg", "names", "told"),
    [
        ("LCM", 1.0, ["main"], True),
        ("LCM", 2.9, ["main", "sharp"], True),
        ("LCM", 3.0, ["main"], False),
        ("Euler", 1.0, ["main"], False),
        *[
            ("LCM", 1.0, ["main", name], False)
            for name in (
                "lcm-lora-sdv1-5",
                "SDXL-Lightning-4step",
                "sd_xl_turbo_1.0",
                "Hyper-SD15-8steps",
                "dmd2_sdxl_4step_lora",
                "TCD-SD15",
                "flux1-schnell",
                "pcm_sd15",
                "my 4-step model",
                "distilled",
            )
        ],
        ("LCM", 1.0, ["balcony", "model 1.5", "at 30 steps"], True),
    ],
)
def test_settings_for_few_step_weights_are_told_where_no_name_says_that_there_are_such(host, sampler, cfg, names, told):
    note = host.webui.second_pass.few_step_note(sampler, cfg, names)
    assert (note is not None) == told
    if told:
        assert note.startswith(f"LCM at CFG scale {cfg:g} is for few-step weights")
        assert "\n" not in note


FEW = {"phase_sampler": "LCM", "phase_cfg_scale": 1.0}


@pytest.mark.parametrize(
    ("settings", "job", "told"),
    [
        (FEW, {}, True),
        ({"phase_sampler": "LCM", "phase_cfg_scale": 4.0}, {}, False),
        ({**FEW, "phase_prompt": "<lora:sharp:1>"}, {}, True),
        ({**FEW, "phase_prompt": "<lora:file-1:1>"}, {}, False),  # whose alias says it
        ({**FEW, "phase_prompt": "<lora:plain:1>"}, {}, False),  # whose metadata says it
        ({**FEW, "phase_prompt": "a disc"}, dict(prompt="a ring <lora:file-1:1>"), True),
        (FEW, dict(prompt="a ring <lora:file-1:1>"), False),
        ({**FEW, "phase_checkpoint": "second"}, {}, True),
        ({**FEW, "phase_checkpoint": "second-lightning"}, {}, False),
        (FEW, dict(sampler_name="LCM", cfg_scale=1.0), False),  # whoever draws the base so knows what they have
        ({}, dict(sampler_name="LCM", cfg_scale=1.0), False),
        ({"phase_sampler": "LCM"}, dict(cfg_scale=1.5), True),
    ],
)
def test_the_note_is_of_what_the_phases_really_have(host, second, loras, tmp_path, settings, job, told):
    fake_webui.add_lora("plain", metadata={"modelspec.title": "An LCM-LoRA", "ss_tag_frequency": {"turbo": 1}})
    loras.files[0].metadata = {"ss_tag_frequency": {"turbo": 1}, "ss_comment": "turbo " * 100}
    fake_webui.add_model(fake_webui.ToyModel(write_checkpoint(tmp_path / "second-lightning.safetensors"), seed=5))
    reply = host.generate(True, 2, settings, **job)
    assert reply.images[0].shape[-1] == 128, "never a refusal"
    assert bool(said(host, reply)) == told
    if told:
        assert said(host, reply)["DemoFusion note"].startswith("LCM at CFG scale 1")
        assert reply.comments == [f"DemoFusion: {said(host, reply)['DemoFusion note']}"]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs(host, preset):
    settings = {name: value for name, value in vars(DemoFusionConfig.preset(preset)).items() if name != "scale"}
    assert host.generate(True, 2, settings, steps=8).images[0].shape[-1] == 128


# ------------------------------------------------------------------------------------- img2img, inpaint, and the gallery

SIDE = 8  # of the images that the checkpoint was made for, latent pixels


@pytest.fixture
def img2img(host, second):
    for model in fake_webui._models.values():
        model.image_size = SIDE
    return host


def picture(width=96, height=96):
    """Some coloured spots."""
    coarse = np.random.default_rng(0).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def numbers(image):
    return np.asarray(image.convert("RGB"), np.float32)


def encode(model, image):
    """A PIL image as latents, with the noise that DemoFusion has for it."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        x = torch.from_numpy(numbers(image)).permute(2, 0, 1)[None] / 127.5 - 1
        return model.get_first_stage_encoding(model.encode_first_stage(x))


@pytest.mark.parametrize(("name", "how"), [("Doubled", fake_webui.doubled), ("None", None)])
def test_a_given_picture_is_enlarged_by_the_upscaler(img2img, name, how):
    given = picture()
    first, *_ = references(img2img, True, 2, {"upscaler": name}, init_images=[given])
    large = (how(given) if how else given).resize((128, 128), Image.Resampling.LANCZOS)
    assert torch.allclose(first, encode(img2img.shared.sd_model, large), atol=1e-5)


@pytest.mark.parametrize("size", [(96, 96), (100, 77)])
def test_a_given_picture_is_enlarged_as_latents_by_the_hosts_modes(img2img, size):
    given = picture(*size)
    first, *_ = references(img2img, True, 2, {"upscaler": "Latent (nearest-exact)"}, init_images=[given])
    whole = [8 * round(side / 8) for side in size]
    own = encode(
        img2img.shared.sd_model, given if given.size == tuple(whole) else given.resize(whole, Image.Resampling.LANCZOS)
    )
    want = torch.nn.functional.interpolate(own, size=first.shape[-2:], mode="nearest-exact")
    assert torch.allclose(first, want, atol=1e-5)


def test_what_is_not_masked_is_the_picture_as_the_upscaler_enlarges_it(img2img):
    given, mask = picture(), Image.new("L", (96, 96))
    mask.paste(255, (40, 40, 60, 60))
    job = dict(init_images=[given], mask=mask, inpaint_full_res=False, mask_blur_x=0, mask_blur_y=0)
    count, upscaler = [], next(known for known in img2img.shared.sd_upscalers if known.name == "Doubled").scaler
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upscaler, "model", lambda image: count.append(image.size) or fake_webui.doubled(image))
        reply = img2img.generate(True, 2, {"upscaler": "Doubled"}, **job)
    assert np.array_equal(numbers(reply.images[0])[:70], numbers(fake_webui.doubled(given))[:70])
    assert count.count((96, 96)) == 2, "once for each size"


@pytest.mark.parametrize(("asked", "size", "scale"), [("resize_width", 168, 1.75), ("resize_height", 192, 2)])
def test_a_given_picture_has_the_size_that_was_asked_for(img2img, asked, size, scale):
    job = dict(init_images=[picture()], width=40, height=200)
    reply = img2img.generate(True, 5, {asked: size}, **job)
    assert reply.images[0].size == (size, size), "whatever the tab's own is"
    written = parameters(img2img, reply)
    assert written["DemoFusion scale"] == f"{scale:g}"
    assert written["DemoFusion start"] == "Picture 96x96"
    again = img2img.generate(True, scale, {asked: size}, **job)
    assert np.array_equal(numbers(again.images[0]), numbers(reply.images[0]))


def test_sizes_that_a_given_picture_cannot_have_are_refused(img2img, calls):
    for asked, line in (
        ({"resize_width": 96}, "96x96 is 1 times 96x96; resize to more than once and at most 8 times that"),
        ({"resize_width": 200, "resize_height": 100}, "200x100 has not the aspect of 96x96; resize to 96x96 or 200x200, or"),
    ):
        assert refusal(img2img.generate(True, 2, asked, init_images=[picture()])).startswith(line)
    assert calls.rows == 0


def test_a_stop_after_a_picture_was_given_claims_no_size(img2img, at_call):
    handle = at_call(1, img2img.shared.state.skip)
    reply = img2img.generate(True, 2, {"resize_width": 192}, init_images=[picture()])
    handle.remove()
    assert np.array_equal(numbers(reply.images[0]), numbers(picture()))
    assert not any(key.startswith("DemoFusion r") or key == "DemoFusion scale" for key in parameters(img2img, reply))


def test_from_a_picture_only_the_phases_model_works(img2img, second):
    seen = coded(img2img, second)
    plain = img2img.generate(True, 2, {"phase_checkpoint": "second"}, init_images=[picture()])
    assert {name for name, kind, width in seen} == {"main", "second"}
    first = seen.index(next(entry for entry in seen if entry[0] == "second"))
    assert {name for name, *_ in seen[first:]} == {"second"}
    assert {kind for name, kind, _ in seen[:first]} == {"encoder"}, "by the host, of what it would have sampled from"
    assert fake_webui.loads == ["second.safetensors", "main"]
    img2img.shared.opts.sd_model_checkpoint = "second.safetensors"
    alone = img2img.generate(True, 2, init_images=[picture()])
    assert np.array_equal(numbers(alone.images[0]), numbers(plain.images[0])), "as if it were the only one"


def test_the_gallerys_button_too(img2img, second):
    """There the host encodes nothing by itself."""
    drawn = Image.new("RGB", (64, 64), (200, 100, 0))
    fake_webui.images_of_the_gallery["drawn.png"] = drawn
    told = json.dumps({"picture": {"name": "drawn.png", "is_file": True}, "infotext": "a ring\nSteps: 4, Seed: 3, Size: 64x64"})
    settings = {
        **vars(DemoFusionConfig(scale=5.0)),
        "resize_width": 128,
        "phase_checkpoint": "second",
    }
    values = {"enabled": False, "save_phases": False, "resume": "", "start_from": "", **settings}
    args = [values[name] for name in img2img.webui.settings.ARGUMENTS]
    made = img2img.generate(*args, img2img.webui.settings.END, "", told).images[0]
    assert made.shape[-2:] == (128, 128)
    img2img.shared.opts.sd_model_checkpoint = "second.safetensors"
    args[list(img2img.webui.settings.ARGUMENTS).index("phase_checkpoint")] = ""
    assert torch.equal(made, img2img.generate(*args, img2img.webui.settings.END, "", told).images[0])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("end", [None, 6, 30])
def test_after_a_base_of_img2img_all_is_as_before(img2img, second, loras, at_call, masked, end):
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    job = dict(init_images=[picture(64, 64)], n_iter=2, prompt="a ring <lora:old:1>")
    job |= dict(mask=mask, inpaint_full_res=False) if masked else {}
    torch.manual_seed(0)  # the host encodes with the noise of all programs
    plain = img2img.generate(**job)
    before, sampled = snapshot(img2img), []
    post_sample = img2img.img2img_script.post_sample

    def look(p, ps, *args):
        fields = {name: getattr(p, name) for name in vars(p)}
        sampled.append(ps.samples.clone())
        post_sample(p, ps, *args)
        assert {name for name, value in vars(p).items() if fields.get(name, p) is not value} == set()

    settings = {**OTHER, "start_from": "img2img result", "view_batch_size": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(img2img.img2img_script, "post_sample", look)
        if end:
            counted, action = [0], img2img.shared.state.skip

            def act(module, args):
                counted[0] += 1
                if counted[0] == end:
                    action()

            handles = [m.model.diffusion_model.register_forward_pre_hook(act) for m in fake_webui._models.values()]
        torch.manual_seed(0)
        reply = img2img.generate(True, 2, settings, **job)
    for handle in handles if end else ():
        handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(sampled, plain.latents, strict=True))
    assert reply.images[1].size == (128, 128)
    assert_as_before(img2img, before)
    assert active() == [("old", 1.0)]
    torch.manual_seed(0)
    again = img2img.generate(**job)
    assert all(np.array_equal(numbers(a), numbers(b)) for a, b in zip(again.images, plain.images, strict=True))


def test_an_upscaler_that_fails_gives_the_picture_back(img2img, monkeypatch):
    upscaler = next(known for known in img2img.shared.sd_upscalers if known.name == "Doubled").scaler
    monkeypatch.setattr(upscaler, "model", broken)
    reply = img2img.generate(True, 2, {"upscaler": "Doubled"}, init_images=[picture()])
    assert np.array_equal(numbers(reply.images[0]), numbers(picture()))
    assert reply.comments[0].startswith("DemoFusion: failed: the upscaler Doubled says: no such kernel; the picture as it was")
