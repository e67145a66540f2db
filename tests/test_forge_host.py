"""The extension on a host of Forge's kind, which fake_forge.py stands in for: the same pictures as on AUTOMATIC1111's."""

import itertools
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import fake_forge
import fake_webui
import numpy as np
import pytest
import torch
from PIL import Image
from webui_fixtures import assert_same, heun, refusal, said, watch_calls

STEPS = 4
VIEWS = {2: 9 + 4, 3: 25 + 9}
PLAIN = {"jitter": False, "view_batch_size": 1}
CORNERS = [(y, x) for y in (0, 4, 8) for x in (0, 4, 8)]  # of 2x, in latent pixels


# ------------------------------------------------------------------------------------------------------ samplers for both hosts


def euler_a(model, x, sigmas, extra_args, callback):
    for i, (sigma, after) in enumerate(zip(sigmas, sigmas[1:])):
        clean = model(x, sigma * x.new_ones(len(x)), **extra_args)
        callback({"i": i, "x": x, "sigma": sigma, "denoised": clean})
        up = min(after, (after**2 * (sigma**2 - after**2) / sigma**2) ** 0.5)
        x = x + ((after**2 - up**2) ** 0.5 - sigma) * (x - clean) / sigma
        x = x + up * torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
    return x


def dpmpp_2m(model, x, sigmas, extra_args, callback):
    before = None
    for i, (sigma, after) in enumerate(zip(sigmas, sigmas[1:])):
        clean = model(x, sigma * x.new_ones(len(x)), **extra_args)
        callback({"i": i, "x": x})
        aim = clean
        if before is not None and after > 0:
            r = (sigmas[i - 1] / sigma).log() / (sigma / after).log()
            aim = clean + (clean - before) / (2 * r)
        x, before = after / sigma * x + (1 - after / sigma) * aim, clean
    return x


def made_by(function):
    def make(model):
        sampler = fake_webui.KDiffusionSampler("sample_euler", model)
        sampler.func = function
        return sampler

    return make


MORE_SAMPLERS = [
    fake_webui.SamplerData("Euler a", made_by(euler_a), [], {}),
    fake_webui.SamplerData("Heun", made_by(heun), [], {}),
    fake_webui.SamplerData("DPM++ 2M", made_by(dpmpp_2m), [], {"scheduler": "karras"}),
]

# ------------------------------------------------------------------------------------------------------------ the same pictures


def drawing(width=96, height=64):
    """A picture with flat parts and an edge."""
    picture = Image.new("RGB", (width, height), (200, 60, 40))
    picture.paste((20, 40, 220), (0, 0, width // 2, height // 3))
    return picture


AND = "a ring AND a disc :0.7"
JOBS = {  # name: the extension's arguments, and the host's
    **{f"{sampler} {scale}x": ((True, scale), dict(sampler_name=sampler)) for sampler in ("Euler", "DDIM") for scale in (2, 3)},
    **{f"{data.name} {scale}x": ((True, scale), dict(sampler_name=data.name)) for data in MORE_SAMPLERS for scale in (2, 3)},
    "LCM": ((True, 2), dict(sampler_name="LCM")),
    "a scale between": ((True, 2.5), {}),
    "more steps": ((True, 2, {"phase_steps": 7}), {}),
    "CFG 1": ((True, 2), dict(cfg_scale=1, batch_size=2)),
    "CFG 1 by DDIM": ((True, 2), dict(cfg_scale=1, sampler_name="DDIM")),
    "CFG 1 in the phases": ((True, 2, {"phase_cfg_scale": 1.0}), {}),
    "CFG 1 in the base": ((True, 2, {"phase_cfg_scale": 5.0}), dict(cfg_scale=1)),
    "AND": ((True, 2), dict(prompt=AND, batch_size=2)),
    "AND by DDIM": ((True, 2), dict(prompt="a ring :1.2 AND a disc :-0.3 AND grass", sampler_name="DDIM")),
    "one weight": ((True, 2), dict(prompt="a ring :0.6")),
    "batch": ((True, 3), dict(batch_size=2)),
    "not square": ((True, 2), dict(height=48, width=80)),
    "not square, batch": ((True, 3, {"view_batch_size": 3}), dict(height=80, width=48, batch_size=2)),
    "one view at a time": ((True, 2, {"view_batch_size": 1}), dict(batch_size=2)),
    "four views at a time": ((True, 2, {"view_batch_size": 4}), dict(batch_size=2)),
    "all views at once": ((True, 2, {"view_batch_size": 64}), dict(prompt=AND)),
    "flat areas": ((True, 2, {"hold_flat": 50.0, "unguided_flat": 50.0}), dict(batch_size=2)),
    "flat areas, AND": ((True, 2, {"unguided_flat": 50.0}), dict(prompt=AND)),
    "flat areas, CFG 1": ((True, 2, {"unguided_flat": 50.0}), dict(cfg_scale=1)),
    "flat areas by DDIM": ((True, 2, {"hold_flat": 20.0, "unguided_flat": 20.0}), dict(sampler_name="DDIM")),
    "pixel upsampling": ((True, 3, {"pixel_upsampling": True}), dict(batch_size=2)),
    "upscaler": ((True, 2, {"upscaler": "Doubled"}), {}),
    "doubling": ((True, 4, {"doubling": True}), {}),
    "entered late": ((True, 2, {"denoising_strength": 0.5}), dict(steps=6)),
    "entered late by DDIM": ((True, 2, {"denoising_strength": 0.5}), dict(steps=6, sampler_name="DDIM")),
    "other sampler": ((True, 2, {"phase_sampler": "DDIM", "phase_cfg_scale": 3.0}), {}),
    "other prompts": ((True, 2, {"phase_prompt": "a disc <lora:two:0.5>", "phase_negative_prompt": "red"}), {}),
    "LoRA": ((True, 2), dict(prompt="a ring <lora:one>")),
    "refiner": ((True, 3), dict(refiner_checkpoint="refiner", refiner_switch_at=0.5)),
    "refiner by DDIM": ((True, 2), dict(sampler_name="DDIM", refiner_checkpoint="refiner", refiner_switch_at=0.5)),
    "other checkpoint": ((True, 2, {"phase_checkpoint": "refiner"}), {}),
    "picture": ((True, 2, {"window": 64}), dict(init_images=[drawing()], denoising_strength=0.6)),
    "img2img": ((True, 2, {"start_from": "img2img result"}), dict(init_images=[drawing()], width=96)),
}


@contextmanager
def more_samplers():
    """Meanwhile the hosts have samplers of the kinds that fake_webui has not."""
    before = list(fake_webui.all_samplers)
    fake_webui.all_samplers[:] = [data for data in before if data.name != "DPM++ 2M"] + MORE_SAMPLERS
    try:
        yield
    finally:
        fake_webui.all_samplers[:] = before


def prepare(host, model, folder):
    """Beside the loaded checkpoint another one, and two LoRAs; A1111's levels are whole timesteps, as Forge's are always."""
    host.shared.opts.enable_quantization = True
    for name in ("one", "two"):
        fake_webui.add_lora(name)
    file = folder / "refiner.ckpt"
    file.touch()
    fake_webui.add_model(model("refiner", seed=1)).sd_checkpoint_info.filename = str(file)


def run(host, name):
    args, settings = JOBS[name]
    torch.manual_seed(0)  # with whose noise the host encodes what img2img is given
    return host.generate(*args, **settings)


@pytest.fixture(scope="module")
def on_a1111(tmp_path_factory):
    """What came of the jobs on the other host, by name."""
    made, folder = {}, tmp_path_factory.mktemp("models")
    with more_samplers(), fake_webui.installed() as host:
        for name in JOBS:
            host.reset()
            prepare(host, fake_webui.ToyModel, folder)
            made[name] = run(host, name)
    return made


@pytest.fixture(scope="module")
def loaded(on_a1111):
    """In place of webui_fixtures' own: the tests below run on this host."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before = dict(sys.modules)
    with more_samplers(), fake_forge.installed() as host:
        assert "backend.patcher.unet" in sys.modules
        yield host
    for name in {*before, *sys.modules}:
        if name.startswith(("modules", "backend", "gradio", "lib_demofusion")):
            assert sys.modules.get(name) is before.get(name), "nothing of the fake stays"
    with fake_webui.installed() as host:
        assert host.webui.host.host.__name__.endswith(".a1111")
        assert host.generate(True, 2).sizes == [(16, 16)]
    torch.set_num_threads(threads)


def parts(host):
    """What of the loaded checkpoint a job could leave changed."""
    model = host.shared.sd_model
    stages = {name: getattr(model, name) for name in ("forge_objects", "forge_objects_original")}
    stages["after networks"] = model.forge_objects_after_applying_lora
    unet, vae = model.forge_objects.unet, model.forge_objects.vae
    modules = [*unet.model.named_modules(), *vae.first_stage_model.named_modules()]
    return {
        "model": (model, sorted(set(vars(model)) - {"alphas_cumprod"})),  # which the host puts there for DDIM
        "objects": stages,
        "patchers": [vars(objects).copy() for objects in stages.values()],
        "options": [frozen(patcher.model_options) for o in stages.values() for patcher in (o.unet, o.vae.patcher)],
        "own": [sorted(vars(patcher)) for o in stages.values() for patcher in (o.unet, o.vae, o.vae.patcher)],
        "nets": [(net, frozen(vars(net))) for net in unet.list_controlnets()],
        "modules": [(name, sorted(vars(m)), len(m._forward_hooks), getattr(m, "padding_mode", None)) for name, m in modules],
        "sigmas": id(unet.model.predictor.sigmas),
        "tiling": model.tiling_enabled,
        "chosen": frozen(host.sd_models.model_data.forge_loading_parameters),
        "options of the host": dict(vars(host.shared.opts)),
    }


def frozen(value):
    """A copy that stays as it is of what dicts and lists hold; of the rest, which thing it is."""
    if isinstance(value, dict):
        return {key: frozen(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [frozen(own) for own in value]
    return id(value) if isinstance(value, torch.Tensor) else value


class Watcher(fake_webui.Script):
    """A script in front of ours, or behind it: what there is when the base is there, and when the phases have ended."""

    def __init__(self, seen, host):
        self.seen, self.host = seen, host

    def title(self):
        return "Watcher"

    def ui(self, is_img2img):
        return []

    def post_sample(self, p, ps, *args):
        self.seen.append(parts(self.host))


@pytest.fixture(autouse=True)
def all_as_before(request):
    """Whatever a test does: after the phases the checkpoint's parts and their options are those of before them."""
    if "host" not in request.fixturenames:
        yield
        return
    host, seen = request.getfixturevalue("host"), []
    for runner in (host.runner, host.img2img_runner):
        for place in (0, len(runner.alwayson_scripts)):
            watcher = Watcher(seen, host)
            runner.create_script_ui(watcher)
            runner.alwayson_scripts.insert(place, watcher)
    yield
    for before, after in zip(seen[::2], seen[1::2], strict=True):
        if "refiner" in fake_webui.loads:  # a base that ends with another model than the phases do
            before, after = ({key: own[key] for key in ("chosen", "options of the host")} for own in (before, after))
        assert after == before


@pytest.mark.parametrize("name", JOBS)
def test_the_same_picture_as_on_the_other_host(host, on_a1111, tmp_path, name):
    prepare(host, fake_forge.Engine, tmp_path)
    reply, expected = run(host, name), on_a1111[name]
    assert reply.comments == expected.comments == []
    assert_same(reply.latents[-1], expected.latents[-1])
    error = (reply.latents[-1] - expected.latents[-1]).square().mean().sqrt()
    assert error < 1e-5 * expected.latents[-1].std()
    assert reply.infotexts == expected.infotexts
    assert len(reply.images) == len(expected.images)


@pytest.mark.parametrize("name", ["Euler 2x", "DDIM 2x", "AND", "batch", "flat areas", "CFG 1"])
def test_prompts_may_be_asked_one_by_one(host, on_a1111, monkeypatch, calls, name):
    """Where the host says that memory does not hold the whole latents twice."""
    monkeypatch.setattr(host.memory_management, "get_free_memory", lambda device: 0)
    assert_same(run(host, name).latents[-1], on_a1111[name].latents[-1])
    rows = {len(args[0]) for args, _ in calls.inputs}
    assert max(rows) == JOBS[name][1].get("batch_size", 1) * 4  # as many views in a call on the CPU


# ------------------------------------------------------------------------------------------------------- the host's own parts


def test_supported(host):
    assert host.webui.host.host.__name__.endswith(".forge")
    assert host.webui.host.host.unsupported() is None


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
@pytest.mark.parametrize(("cfg", "branches"), [(5.0, 2), (1.0, 1)])
def test_the_model_sees_as_many_rows_as_planned(host, calls, sampler, cfg, branches):
    p = host.generate(True, 3, sampler_name=sampler, cfg_scale=cfg, batch_size=2).p
    predictions = host.webui.samplers.model_calls(sampler, None, STEPS)
    assert calls.rows == 2 * branches * predictions * (1 + VIEWS[2] + VIEWS[3])
    plan = host.webui.checks.plan_for(p, host.webui.settings.DemoFusionConfig(scale=3.0))
    assert calls.rows == 2 * plan.evaluations


@pytest.mark.parametrize("settings", [{}, dict(batch_size=3), dict(prompt=AND), dict(sampler_name="DDIM")])
def test_the_pace_is_of_all_that_the_model_saw(host, calls, monkeypatch, settings):
    seconds = itertools.count()
    monkeypatch.setattr(host.webui.progress, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    monkeypatch.setattr(host.webui.readout, "paces", {})
    host.generate(True, 3, **settings)
    assert host.webui.readout.paces == {"main": {64: 1 / calls.rows}}


@pytest.mark.parametrize("views", [1, 4])
@pytest.mark.parametrize("settings", [{}, dict(batch_size=3), dict(sampler_name="DDIM"), dict(refiner_checkpoint="refiner")])
def test_memory_is_asked_for_one_batch_of_views(host, views, settings):
    fake_webui.add_model(fake_forge.Engine("refiner", seed=1))
    fake_forge.asked.clear()
    host.generate(True, 3, {"view_batch_size": views}, refiner_switch_at=0.5, **settings)
    asked = [need for [thing], need in fake_forge.asked if isinstance(thing, fake_forge.UnetPatcher)]
    rows = 2 * settings.get("batch_size", 1)
    twice = 2 if "refiner_checkpoint" in settings else 1
    before_its_hook = 1000 * rows * 64  # of the base; a refiner in a phase is loaded before anything hangs on it
    phases = asked[twice:]
    assert asked[:twice] == [before_its_hook] * twice
    assert phases[::twice] == [1000 * rows * views * 64] * 2
    assert len(phases) == 2 * twice


def test_tokens_are_merged_in_the_phases_too(host):
    seen = []
    host.unet.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["transformer_options"].get("merged")), with_kwargs=True
    )
    host.shared.opts.token_merging_ratio = 0.5
    host.generate(True, 2)
    assert len(seen) == STEPS * (1 + 4)
    assert set(seen) == {0.5}


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_levels_that_end_without_signal(host, sampler):
    host.shared.opts.sd_noise_schedule = "Zero Terminal SNR"
    predictor, levels = host.shared.sd_model.forge_objects.unet.model.predictor, []
    before, values = predictor.sigmas, predictor.sigmas.clone()
    host.unet.register_forward_pre_hook(lambda module, args: levels.append(predictor.sigmas[-1].item()))
    reply = host.generate(True, 2, sampler_name=sampler)
    assert reply.comments == []
    assert min(levels) > 1000 > values[-1]
    assert len(set(levels)) == 1
    assert torch.isfinite(reply.latents[0]).all()
    assert predictor.sigmas is before
    assert torch.equal(predictor.sigmas, values)


def test_each_views_part_of_what_the_model_is_told(host):
    """transformer_options, by rows."""
    seen = []

    def look(module, args, given):
        seen.append((args[0], given["transformer_options"]))

    host.unet.register_forward_pre_hook(look, with_kwargs=True)
    host.generate(True, 2, {"view_batch_size": 3}, prompt=AND, batch_size=2)
    for x, options in seen:
        kinds, marks = options["cond_or_uncond"], options["cond_mark"].tolist()
        assert kinds == [1, 0, 0] * (len(kinds) // 3)
        assert marks == [float(kind) for kind in kinds for _ in range(2)]
        assert len(marks) == len(x)
        assert options["cond_indices"] == [row for row, mark in enumerate(marks) if mark == 0]
        assert options["uncond_indices"] == [row for row, mark in enumerate(marks) if mark == 1]


# ------------------------------------------------------------------------------------------------------------------ conditions


@pytest.mark.parametrize("sizes", [6, 5])
@pytest.mark.parametrize("views", [1, 5])
def test_sdxl_views_carry_their_size_and_crop(host, sizes, views):
    model = fake_webui.add_model(fake_forge.Engine(sdxl=sizes))
    host.shared.opts.sdxl_crop_top, host.shared.opts.sdxl_crop_left = 3, 5
    seen = []
    host.unet.register_forward_pre_hook(lambda module, args, given: seen.append(given["y"].clone()), with_kwargs=True)
    host.generate(True, 2, {**PLAIN, "view_batch_size": views}, batch_size=2)

    def ids(size, crop):
        numbers = [*size, *crop, *(size if sizes == 6 else [6.0])]
        return model.embedder(torch.tensor(numbers).float()).flatten()

    pooled = seen[0][:, : fake_forge.POOLED]
    base, phases = torch.cat(seen[:STEPS]), torch.cat(seen[STEPS:])
    torch.testing.assert_close(base[:, fake_forge.POOLED :], ids((64, 64), (3, 5)).expand(len(base), -1))
    rows = iter(phases.split(4))
    for y, x in (CORNERS + [(0, 0)] * 4) * STEPS:
        own = next(rows)
        torch.testing.assert_close(own[:, fake_forge.POOLED :], ids((128, 128), (3 + 8 * y, 5 + 8 * x)).expand(4, -1))
        torch.testing.assert_close(own[:, : fake_forge.POOLED], pooled)
    assert next(rows, None) is None


@pytest.mark.parametrize("views", [1, 5])
def test_conditions_of_the_images_size_are_cropped_like_x(host, views):
    fake_webui.add_model(fake_forge.Engine(inpainting=True))
    seen = []
    host.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, 4:].clone()))
    host.generate(True, 2, {**PLAIN, "view_batch_size": views}, steps=1)
    ramp = 100 * torch.arange(8)[:, None] + torch.arange(8)
    expected = [ramp] * 1 + [ramp + 100 * y + x for y, x in CORNERS] + [2 * ramp + corner for corner in (0, 1, 100, 101)]
    rows = torch.cat(seen).split(2)
    for own, wanted in zip(rows, expected, strict=True):
        assert torch.equal(own, wanted.expand(2, 5, -1, -1).float())


# -------------------------------------------------------------------------------------------------------------------- refiner


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_a_model_that_changes_between_steps_is_fused_too(host, calls, sampler):
    refiner, rows = fake_webui.add_model(fake_forge.Engine("refiner", seed=1)), []
    refiner.forge_objects.unet.model.diffusion_model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    before = fake_webui.loads.copy()
    host.generate(True, 3, sampler_name=sampler, steps=5, refiner_checkpoint="refiner", refiner_switch_at=0.4)
    predictions = host.webui.samplers.model_calls(sampler, None, 5)
    assert calls.rows == 2 * 2 * (1 + VIEWS[2] + VIEWS[3])
    assert sum(rows) == 2 * (predictions - 2) * (1 + VIEWS[2] + VIEWS[3])
    assert fake_webui.loads[len(before) :] == ["refiner", "main", "refiner", "main", "refiner"]
    assert host.sd_models.model_data.forge_loading_parameters["checkpoint_info"].name == "main"
    assert_clean(refiner)
    host.generate()
    assert fake_webui.loads[-1] == "main"
    assert_clean(host.shared.sd_model)


def assert_clean(model):
    """Nothing hangs on a checkpoint's patchers."""
    for objects in (model.forge_objects, model.forge_objects_original, model.forge_objects_after_applying_lora):
        assert objects.unet.model_options == {"transformer_options": {}}
        assert not {"memory_required"} & set(vars(objects.unet))


@pytest.mark.parametrize("by_name", [False, True])
def test_a_refiner_where_the_host_tells_tiling_by_names(monkeypatch, by_name):
    """One of the family wants one of its words there, and nothing of the kind on a checkpoint that was just loaded."""

    def tile(model, tiling_enabled="None" if by_name else False):
        assert isinstance(tiling_enabled, str if by_name else bool)
        model.tiling_enabled = tiling_enabled

    begin = fake_forge.Engine._begin

    def fresh(model):
        begin(model)
        vars(model).pop("tiling_enabled", None) if by_name else setattr(model, "tiling_enabled", False)

    monkeypatch.setattr(fake_forge.Engine, "_begin", fresh)
    monkeypatch.setitem(fake_forge.MODULES["modules_forge.utils"], "apply_circular_forge", tile)
    with fake_forge.installed() as host:
        fake_webui.add_model(fake_forge.Engine("refiner", seed=1))
        job = dict(refiner_checkpoint="refiner", refiner_switch_at=0.5, tiling="None" if by_name else False)
        assert host.generate(True, 3, **job).sizes == [(24, 24)]


# ------------------------------------------------------------------------------------------------------ other people's patches


def patched(host, patch):
    """patch(unet): what another script does before every sampling, to a clone that it makes."""
    script = fake_webui.Script()
    script.title, script.ui = lambda: "other", lambda is_img2img: []

    def before(p, *args, **given):
        p.sd_model.forge_objects.unet = p.sd_model.forge_objects.unet.clone()
        patch(p.sd_model.forge_objects.unet)

    script.process_before_every_sampling = before
    host.runner.create_script_ui(script)
    host.runner.alwayson_scripts.append(script)


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_another_ones_wrapper_sees_every_call(host, calls, sampler):
    plain = host.generate(True, 2, {"view_batch_size": 3}, sampler_name=sampler).latents[0]
    seen = []

    def wrapper(apply_model, args):
        assert set(args) == {"input", "timestep", "c", "cond_or_uncond"}
        assert len(args["input"]) == len(args["timestep"]) == len(args["c"]["c_crossattn"])
        assert args["c"]["transformer_options"]["cond_or_uncond"] == args["cond_or_uncond"]
        seen.append(tuple(args["input"].shape[-2:]))
        return apply_model(args["input"], args["timestep"], **args["c"])

    patched(host, lambda unet: unet.set_model_unet_function_wrapper(wrapper))
    calls.inputs.clear()
    assert torch.equal(host.generate(True, 2, {"view_batch_size": 3}, sampler_name=sampler).latents[0], plain)
    assert len(seen) == len(calls.inputs)
    assert set(seen) == {(8, 8)}


@pytest.mark.parametrize("post", [False, True])
def test_another_ones_guidance_is_of_the_whole_latents(host, post):
    plain, sizes = host.generate(True, 2).latents[0], []

    def after(args):
        sizes.append(tuple(args["denoised"].shape[-2:]))
        assert {"denoised", "cond", "uncond", "model", "uncond_denoised", "cond_denoised", "sigma", "input"} < set(args)
        return args["denoised"]

    def combine(args):
        sizes.append(tuple(args["input"].shape[-2:]))
        return args["uncond"] + (args["cond"] - args["uncond"]) * args["cond_scale"]

    patched(
        host,
        lambda unet: unet.set_model_sampler_post_cfg_function(after) if post else unet.set_model_sampler_cfg_function(combine),
    )
    assert_same(host.generate(True, 2).latents[0], plain)
    assert sizes == [(8, 8)] * STEPS + [(16, 16)] * STEPS


def test_areas_without_guidance_come_before_another_ones_last_word(host):
    plain = host.generate(True, 2, {"unguided_flat": 50.0}).latents[0]
    patched(host, lambda unet: unet.set_model_sampler_post_cfg_function(lambda args: args["denoised"] / 2))
    halved = host.generate(True, 2, {"unguided_flat": 50.0}).latents[0]
    assert not torch.allclose(halved, plain, atol=0.1)


def test_another_ones_conditions_are_changed_before_the_views(host):
    """A modifier of the conditions: the negative prompt in the prompt's place is as no guidance."""

    def same(model, x, timestep, uncond, cond, cond_scale, options, seed):
        for part in cond:
            part["model_conds"] = uncond[0]["model_conds"]
        return model, x, timestep, uncond, cond, cond_scale, options, seed

    expected = host.generate(True, 2, prompt="blue").latents[0]
    patched(host, lambda unet: unet.add_conditioning_modifier(same))
    assert_same(host.generate(True, 2).latents[0], expected)


# ------------------------------------------------------------------------------------------------------------------ ControlNet


def ramp(height, width):
    """Each pixel says how far down and how far right its middle lies, in 0..1."""
    rows, columns = ((torch.arange(side) + 0.5) / side for side in (height, width))
    return torch.stack([rows[:, None].expand(height, width), columns.expand(height, width), torch.zeros(height, width)])[None]


def control(host, hint, mask=None, strength=1.0):
    """A net, whose image is given by another script; the first in the chain comes last."""
    net = fake_forge.ControlNet(SimpleNamespace(dtype=torch.float32))
    apply = fake_forge.apply_controlnet_advanced

    def patch(unet):
        unet.controlnet_linked_list = apply(
            unet, net, hint, strength, 0.0, 1.0, advanced_mask_weighting=mask
        ).controlnet_linked_list

    patched(host, patch)
    return net


def middles(images):
    """How far down and how far right the middle of each image lies."""
    return [tuple(image[:2].mean((1, 2)).tolist()) for image in images]


PLACES = [((y + 4) / 16, (x + 4) / 16) for y, x in CORNERS]
PLACES += [((y + 7.5) / 16, (x + 7.5) / 16) for y in (0, 1) for x in (0, 1)]  # of dilated views


@pytest.mark.parametrize(("side", "views"), [(128, 1), (128, 4), (64, 1), (200, 13)])
@pytest.mark.parametrize("settings", [{}, dict(batch_size=2), dict(cfg_scale=1), dict(prompt=AND, batch_size=2)])
def test_each_call_is_steered_by_its_views_own_parts(host, calls, side, views, settings):
    hint = ramp(side, side)
    net = control(host, hint)
    reply = host.generate(True, 2, {**PLAIN, "view_batch_size": views}, **settings)
    assert reply.comments == []
    batch = settings.get("batch_size", 1)
    rows = batch * (1 if settings.get("cfg_scale") == 1 else 2 + ("prompt" in settings))
    assert len(net.hints) == len(calls.inputs) == STEPS * (1 + -(-13 // views)), "once a call, and not for the whole latents"
    phase = net.hints[STEPS:]
    assert sum(map(len, phase)) == STEPS * 13 * rows
    seen = iter(torch.cat(phase).split(rows))
    for number, (own, place) in enumerate(zip(seen, PLACES * STEPS, strict=True)):
        assert all(torch.equal(row, own[0]) for row in own)
        assert own.shape[-2:] == (64, 64)
        assert middles(own[:1])[0] == pytest.approx(place, abs=1 / 128)
        if side == 128 and number % 13 < 9:
            y, x = (round(128 * start) - 32 for start in place)
            assert torch.equal(own[:1], hint[:, :, y : y + 64, x : x + 64])


def test_each_image_of_a_batch_has_its_own(host):
    hint = torch.cat([ramp(128, 128), 1 - ramp(128, 128)])
    net = control(host, hint)
    host.generate(True, 2, {**PLAIN, "view_batch_size": 4}, batch_size=2)
    seen = torch.cat(net.hints[STEPS:]).split(4)
    for own, (down, right) in zip(seen, PLACES * STEPS, strict=True):
        for row, middle in enumerate(middles(own)):
            expected = (down, right) if row % 2 == 0 else (1 - down, 1 - right)
            assert middle == pytest.approx(expected, abs=1 / 128)


def test_steered_views_do_not_depend_on_how_many_are_made_at_once(host):
    plain = host.generate(True, 2, batch_size=2).latents[0]
    control(host, torch.cat([ramp(128, 128), 1 - ramp(128, 128)]), mask=torch.cat([ramp(16, 16), ramp(16, 16)])[:, :1])
    one, many = (host.generate(True, 2, {"view_batch_size": n}, batch_size=2).latents[0] for n in (1, 5))
    assert_same(one, many)
    assert not torch.allclose(one, plain, atol=0.05)


@pytest.mark.parametrize("images", [1, 2])
def test_masks_are_of_the_whole_picture(host, images):
    mask = ramp(128, 128)[:, 1:2]
    mask = mask if images == 1 else torch.cat([mask, 1 - mask])
    net = control(host, torch.ones(1, 3, 128, 128), mask)
    host.generate(True, 2, {**PLAIN, "view_batch_size": 5}, batch_size=2)
    assert all(torch.equal(own, mask) for own in net.masks[:STEPS])
    seen = torch.cat(net.masks[STEPS:]).split(4)
    for own, (_, right) in zip(seen, PLACES * STEPS, strict=True):
        expected = [right if images == 1 or row % 2 == 0 else 1 - right for row in range(4)]
        assert own.mean((1, 2, 3)).tolist() == pytest.approx(expected, abs=1 / 128)


def test_two_nets_add_up(host):
    first, second = control(host, ramp(128, 128)), control(host, 1 - ramp(128, 128))
    both = host.generate(True, 2, PLAIN).latents[0]
    assert len(first.hints) == len(second.hints) == STEPS * 14
    for one, other in zip(first.hints, second.hints):
        assert torch.allclose(one + other, torch.ones_like(one) - torch.tensor([0.0, 0.0, 0.0])[:, None, None], atol=1e-6)
    host.reset()
    control(host, torch.ones(1, 3, 128, 128))
    assert_same(host.generate(True, 2, PLAIN).latents[0], both)


def test_prompts_one_by_one_are_steered_too(host, monkeypatch):
    net = control(host, ramp(128, 128))
    together = host.generate(True, 2, PLAIN).latents[0]
    monkeypatch.setattr(host.memory_management, "get_free_memory", lambda device: 0)
    net.hints.clear()
    assert_same(host.generate(True, 2, PLAIN).latents[0], together)
    assert len(net.hints) == 2 * STEPS * 14


def unit(image, **more):
    net = fake_forge.ControlNet(SimpleNamespace(dtype=torch.float32))
    fields = {"enabled": True, "image": image, "mask": None, "net": net, "module": "none"}
    return SimpleNamespace(**{**fields, "pixel_perfect": False, "processor_res": 512, **more})


@pytest.mark.parametrize("batch", [1, 2])
def test_units_have_images_of_the_phases_size(host, batch):
    """Made as the host makes them, of what it was given; dilated views see the base's."""
    first, second = unit(ramp(512, 512)), unit(1 - ramp(512, 512), enabled=False)
    script = host.add_control(first, second)
    told = []
    script.post_sample = lambda p, ps, *args: told.append((p.width, dict(script.current_params), p.extra_result_images))
    reply = host.generate(True, 2, PLAIN, batch_size=batch)
    assert reply.comments == []
    assert second.net.hints == []
    [(width, params, pictures)] = told
    assert width == 64
    assert [params[number].control_cond.shape[-1] for number in params] == [64], "the base's again"
    assert len(pictures) == 1
    seen = torch.cat(first.net.hints[STEPS:]).split(2 * batch)
    whole = torch.nn.functional.interpolate(first.image, size=(128, 128), mode="nearest-exact")
    for number, (own, place) in enumerate(zip(seen, PLACES * STEPS, strict=True)):
        assert middles(own[:1])[0] == pytest.approx(place, abs=1 / 100)
        if number % 13 < 9:
            y, x = (round(128 * start) - 32 for start in place)
            assert torch.equal(own[:1], whole[:, :, y : y + 64, x : x + 64])


@pytest.mark.parametrize("pixel_perfect", [False, True])
@pytest.mark.parametrize("api", [False, True])
def test_preprocessors_have_the_resolution_that_they_had_for_the_base(host, api, pixel_perfect):
    """The API's units are new ones each time, and say nothing of it until they are asked to."""
    given = unit(ramp(512, 512), pixel_perfect=pixel_perfect, processor_res=-1)
    script = host.add_control(vars(given) if api else given)
    assert host.generate(True, 3, PLAIN).comments == []
    assert {asked[0] for asked in script.asked} == {(64, 64), (128, 128), (192, 192)}
    assert {asked[-1] for asked in script.asked} == {64 if pixel_perfect else 512}
    assert given.net.hints[-1].shape[-2:] == (64, 64)


@pytest.mark.parametrize("masked", [False, True])
def test_dilated_views_see_an_image_resized_by_the_host(host, monkeypatch, masked):
    """Between whole scales, where the base's has not as many pixels as they show. What is masked has values below 0."""
    asked = []

    def grey(detected_map, resize_mode, h, w):
        asked.append((detected_map.shape, h, w))
        return np.full((h, w, 3), 51, np.uint8)

    monkeypatch.setattr(fake_forge, "crop_and_resize_image", grey)
    given = unit(ramp(64, 64) - float(masked))
    host.add_control(given)
    assert host.generate(True, 2.5, PLAIN).comments == []
    phases = [given.net.hints[STEPS : STEPS + 13 * STEPS], given.net.hints[STEPS + 13 * STEPS :]]
    first, last = (torch.cat(hints) for hints in phases)
    assert asked == ([] if masked else [((64, 64, 3), 53, 53)])  # 20 latent pixels, every third of them
    whole = (last == 0.2).flatten(1).all(1)
    assert whole.sum() == (0 if masked else 2 * 9 * STEPS)
    assert not (first == 0.2).flatten(1).all(1).any()


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_a_unit_without_an_image_shows_the_picture(host, mode):
    """All of it, stretched to the phase's size, as what is drawn begins with it."""
    given = unit(None)
    script = host.add_control(given, img2img=True)
    picture = drawing(100, 64)
    assert host.generate(True, 2, {**PLAIN, "window": 64}, init_images=[picture], resize_mode=mode).comments == []
    phases = [asked for asked in script.asked if asked[0] != script.asked[0][0]]
    assert phases
    assert {asked[1:3] for asked in phases} == {((64, 100), 0)}


def test_a_kind_of_unit_that_is_not_known_is_refused(host, calls, monkeypatch):
    class FooocusInpaintPatcher(fake_forge.ControlNetPatcher):
        pass

    monkeypatch.setattr(fake_forge, "ControlNetPatcher", FooocusInpaintPatcher)
    host.add_control(unit(ramp(64, 64)))
    line = refusal(host.generate(True, 2))
    assert "ControlNet's FooocusInpaintPatcher goes by the whole image" in line
    assert calls.rows == 0


def test_control_after_an_interrupt_is_as_before(host, at_call):
    control(host, ramp(128, 128))
    clean = host.generate(True, 2).latents[0]
    handle = at_call(STEPS + 2, host.shared.state.interrupt)
    assert host.generate(True, 2).sizes == [(8, 8)]
    handle.remove()
    assert torch.equal(host.generate(True, 2).latents[0], clean)


# ------------------------------------------------------------------------------------------------------- trouble in a view


@pytest.mark.parametrize("kind", ["interrupt", "skip", "error", "memory"])
@pytest.mark.parametrize("call", [STEPS + 1, STEPS + 3, 5 * STEPS + 2])
@pytest.mark.parametrize("levels", ["Default", "Zero Terminal SNR"])
def test_whatever_happens_in_a_view(host, at_call, kind, call, levels):
    host.shared.opts.sd_noise_schedule = levels
    clean = host.generate(True, 2).latents[0]
    state = host.shared.state

    def fail():
        raise {"error": RuntimeError("the model broke"), "memory": torch.cuda.OutOfMemoryError("CUDA out of memory")}[kind]

    handle = at_call(call, {"interrupt": state.interrupt, "skip": state.skip}.get(kind, fail))
    before = parts(host)["sigmas"]
    reply = host.generate(True, 3)
    handle.remove()
    reached = 3 if kind == "memory" else 1 if call < 5 * STEPS else 2
    assert reply.sizes == [(8 * reached, 8 * reached)]
    assert ("DemoFusion incomplete" in said(host, reply)) == (kind != "memory")
    assert parts(host)["sigmas"] == before
    assert torch.equal(host.generate(True, 2).latents[0], clean)


def test_a_card_on_which_not_one_view_fits(host):
    def look(number, rows):
        if number > STEPS:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    handle = watch_calls(host, look)
    reply = host.generate(True, 2)
    handle.remove()
    assert reply.sizes == [(8, 8)]
    assert "out of memory with one view at a time" in reply.comments[-1]


@pytest.mark.parametrize("where", ["script", "load_models_gpu", "sampling_cleanup"])
def test_a_phase_that_does_not_begin_or_end(host, monkeypatch, where):
    def in_a_phase(*args, **given):
        if host.shared.state.job.startswith("DemoFusion"):
            raise RuntimeError("it broke")

    if where == "script":
        patched(host, in_a_phase)
    elif where == "load_models_gpu":
        monkeypatch.setattr(host.memory_management, "load_models_gpu", in_a_phase)
    else:
        monkeypatch.setattr(fake_forge, "sampling_cleanup", in_a_phase)
    reply = host.generate(True, 2)
    assert reply.sizes == [(8, 8)]
    assert "failed: it broke" in reply.comments[0]


# ---------------------------------------------------------------------------------------------------------------- autoencoder


@pytest.fixture
def decoder(host, monkeypatch):
    """The loaded decoder, in tiles of 24 latent pixels; decoder.sizes: what it is given."""
    monkeypatch.setattr(host.webui.decoding.tiles, "tile_for", lambda network, device, base: 24)
    network, sizes = host.shared.sd_model.forge_objects.vae.first_stage_model.decoder, []
    handle = network.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape[-2:])))
    yield SimpleNamespace(network=network, sizes=sizes)
    handle.remove()


def test_large_pictures_are_decoded_in_tiles(host, decoder):
    """4x is 32 latent pixels; memory is asked for the base's, though."""
    fake_forge.asked.clear()
    reply = host.generate(True, 4, batch_size=2)
    assert decoder.sizes.count((2, 2)) > 8
    asked = [need for [thing], need in fake_forge.asked if not isinstance(thing, fake_forge.UnetPatcher)]
    assert asked == [100 * 8 * 8]
    for image, latents in zip(reply.images, reply.latents[0], strict=True):
        whole = host.shared.sd_model.decode_first_stage(latents[None])[0]
        assert (image - whole).square().mean().sqrt() < 1e-2 * whole.std()


@pytest.mark.parametrize("other", ["always in tiles", "a wrapper"])
def test_another_way_of_decoding_is_left_alone(host, decoder, monkeypatch, other):
    seen, vae = [], host.shared.sd_model.forge_objects.vae
    if other == "a wrapper":
        vae.patcher.model_options["model_vae_decode_wrapper"] = lambda decode, z: seen.append(tuple(z.shape[-2:])) or decode(z)
    else:
        monkeypatch.setattr(host.memory_management, "VAE_ALWAYS_TILED", True)
    host.generate(True, 4)
    assert decoder.sizes == [(32, 32)]
    assert seen == ([(32, 32)] if other == "a wrapper" else [])


@pytest.mark.parametrize("reached", [1, 2])
def test_the_last_phase_that_can_be_decoded_is_not_lost(host, decoder, reached):
    expected = host.generate(*([True, 2] if reached == 2 else [])).images[0]

    def small(module, args):
        if args[0].shape[-1] > 8 * reached:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    handle = decoder.network.register_forward_pre_hook(small)
    reply = host.generate(True, 3)
    handle.remove()
    torch.testing.assert_close(reply.images[0], expected, rtol=0, atol=1e-6)
    assert reply.comments[0].startswith(
        "DemoFusion: phase 3 of 3, 192x192, cannot be decoded: out of memory in the autoencoder"
    )
    assert len(reply.comments) == 3 - reached


def test_large_phases_are_encoded_in_tiles(host, decoder):
    sizes, encoder = [], host.shared.sd_model.forge_objects.vae.first_stage_model.encoder
    handle = encoder.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape[-2:])))
    host.generate(True, 4, {"pixel_upsampling": True})
    handle.remove()
    assert sizes[:2] == [(128, 128), (192, 192)]
    assert max(sizes[2:]) <= (192, 192)


# --------------------------------------------------------------------------------------------------------------------- tiling


@pytest.mark.parametrize(
    ("tiling", "works", "rolls"),
    [(True, True, True), (True, False, False), (False, True, False), ("XY", None, True), ("None", None, False)],
)
def test_tiling(monkeypatch, tiling, works, rolls):
    """As a setting alone, as one that works, and by names."""
    circular, seen = [], []

    def by_name(model, tiling_enabled="None"):
        model.tiling_enabled = tiling_enabled

    function = {True: fake_forge.wrapping, False: fake_forge.apply_circular_forge, None: by_name}[works]
    monkeypatch.setitem(fake_forge.MODULES["modules_forge.utils"], "apply_circular_forge", function)
    with fake_forge.installed() as host:
        monkeypatch.setattr(
            host.webui.step.sampling,
            "rolled",
            lambda x, shifts: seen.append(any(shifts)) or torch.roll(x, tuple(shifts), (-2, -1)),
        )
        model = host.shared.sd_model
        host.unet.register_forward_pre_hook(
            lambda module, args: circular.append((model.tiling_enabled, module.conv.padding_mode))
        )
        assert host.generate(True, 2, tiling=tiling).sizes == [(16, 16)]
        assert any(seen) == rolls
        off = "None" if works is None else False
        assert {setting for setting, _ in circular[:STEPS]} == {tiling}
        assert {setting for setting, _ in circular[STEPS:]} == {off}
        assert {mode for _, mode in circular[STEPS:]} == {"zeros"}
        assert model.tiling_enabled == tiling
        assert (host.unet.conv.padding_mode == "circular") == bool(works and tiling is True)


@pytest.mark.parametrize("tiling", ["X", "Y"])
def test_tiling_along_one_side_is_refused(host, calls, tiling):
    assert refusal(host.generate(True, 2, tiling=tiling)) == f"the image is to tile along {tiling} alone; choose XY, or None"
    assert calls.rows == 0


# ------------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("kind", ["const", "no blocks"])
def test_a_checkpoint_of_another_kind_is_refused(host, calls, monkeypatch, kind):
    if kind == "const":
        host.shared.sd_model.forge_objects.unet.model.predictor.prediction_type = "const"
    else:
        monkeypatch.delattr(fake_forge.UNet, "input_blocks")
    line = refusal(host.generate(True, 2))
    assert line.startswith("this checkpoint has no UNet of Stable Diffusion, or was trained for rectified flow; a Stable")
    assert calls.rows == 0
    assert host.generate().sizes == [(8, 8)]


@pytest.mark.parametrize(
    ("module", "name", "line"),
    [
        ("modules.sd_models", "forge_model_reload", "it has no modules.sd_models.forge_model_reload; update this extension"),
        ("backend.memory_management", "load_models_gpu", "it has no backend.memory_management.load_models_gpu; update"),
        ("backend.patcher.unet", "UnetPatcher", "it could not be loaded (ImportError: cannot import name 'UnetPatcher'"),
        ("modules_forge.utils", "apply_circular_forge", "it could not be loaded (ImportError: cannot import name 'apply_c"),
        ("backend.modules.k_prediction", "rescale_zero_terminal_snr_sigmas", "it could not be loaded (ImportError: cannot"),
        ("UnetPatcher", "add_conditioning_modifier", "it has no UnetPatcher.add_conditioning_modifier; update this extension"),
        ("ModelPatcher", "set_model_unet_function_wrapper", "it has no UnetPatcher.set_model_unet_function_wrapper; update"),
        ("Script", "process_before_every_sampling", "it has no Script.process_before_every_sampling; update this extension"),
    ],
)
def test_a_host_that_lacks_something_says_so(monkeypatch, module, name, line):
    shown = []
    monkeypatch.setattr(fake_webui.HTML, "__init__", lambda self, value="", **given: shown.append(value))
    if module in fake_forge.MODULES:
        monkeypatch.delitem(fake_forge.MODULES[module], name)
    elif module == "Script":
        monkeypatch.delattr(fake_webui.Script, name)
        monkeypatch.setattr(fake_webui.ScriptRunner, name, lambda self, p, **given: None)
    else:
        monkeypatch.delattr(getattr(fake_forge, module), name)
    with fake_forge.installed() as host:
        assert len(shown) == 2, "in both tabs"
        assert all(text.startswith("DemoFusion cannot run here: it ") for text in shown)
        assert [control.value for control in host.script.controls] == [False]
        assert refusal(host.generate(True)).startswith(f"it cannot run here: {line}")


def test_two_samplers_of_another_kind_than_on_the_first_of_the_family(monkeypatch):
    names = [("LCM", "sample_lcm", [], {}), ("UniPC", "sample_unipc", [], {})]
    monkeypatch.setitem(fake_forge.MODULES["modules.sd_samplers_kdiffusion"], "samplers_k_diffusion", names)
    with fake_forge.installed() as host:
        assert host.webui.samplers.SAMPLERS["LCM"].levels == 1000
        assert "UniPC" not in host.webui.samplers.SAMPLERS
        assert "the sampler UniPC is not one that it knows" in refusal(host.generate(True, 2, sampler_name="UniPC"))
