"""What comes out of the real host: pictures, the same ones for the same settings, with everything users combine."""

import re
from types import SimpleNamespace

import forge_host
import numpy as np
import pytest
import torch
import webui_host
from readout import NODE, readouts
from webui_host import make_sdxl, same_but_for_rounding

SAMPLERS = [
    "DPM++ 2M", "DPM++ SDE", "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 2S a", "DPM++ 3M SDE", "Euler a", "Euler", "LMS",
    "Heun", "DPM2", "DPM2 a", "DPM fast", "Restart", "DDIM", "DDIM CFG++", "PLMS", "UniPC", "LCM",
]  # fmt: skip


def same(a, b):
    return a.size == b.size and np.array_equal(np.asarray(a), np.asarray(b))


def test_off_is_a_host_without_the_extension(host):
    off = host.latents(False, sampler_name="Euler a", batch_size=2)
    runner, callbacks = host.scripts.scripts_txt2img, host.script_callbacks.callback_map
    script, before = host.script, {name: list(entries) for name, entries in callbacks.items()}
    runner.alwayson_scripts.remove(script)
    runner.callback_map.clear()
    for name, entries in callbacks.items():
        callbacks[name] = [entry for entry in entries if "demofusion" not in entry.script]
    host.script_callbacks.ordered_callbacks_map.clear()
    try:
        without = host.latents(sampler_name="Euler a", batch_size=2)
    finally:
        runner.alwayson_scripts.append(script)
        callbacks.update(before)
        runner.callback_map.clear()
        host.script_callbacks.ordered_callbacks_map.clear()
    assert torch.equal(off, without)


@pytest.mark.parametrize(("scale", "size"), [(2, (128, 128)), (3, (192, 192)), (2.5, (160, 160)), (1.5, (96, 96))])
def test_sizes(host, scale, size):
    assert host.generate(True, scale).images[0].size == size


def test_a_base_that_is_not_square(host):
    assert host.generate(True, 2, width=128, height=64).images[0].size == (256, 128)


def test_every_sampler_of_the_host_is_known(host):
    webui = host.webui

    there = {sampler.name for sampler in host.sd_samplers.all_samplers}
    others = {"HeunPP2", "IPNDM", "IPNDM_V", "DEIS", "DDPM"}  # which hosts of Forge's kind have, too
    assert others <= set(webui.samplers.SAMPLERS)
    if not host.is_forge or "--adv-samplers" not in forge_host.flags(webui_host.WEBUI_DIR):  # with which Neo has the rest
        assert there | others == set(webui.samplers.SAMPLERS) | others
    for name in there - set(webui.samplers.SAMPLERS):
        reply = host.generate(True, 2, sampler_name=name)
        assert reply.images == []
        assert host.comments[0].startswith(f"DemoFusion: the sampler {name} is not one that it knows")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers(host, calls, sampler):
    webui = host.webui

    latents = host.latents(True, 2, sampler_name=sampler, steps=5)
    assert latents.shape == (1, 4, 16, 16)
    assert torch.isfinite(latents).all()
    predictions = webui.samplers.model_calls(sampler, None, 5)
    assert calls.rows == 2 * predictions * (1 + 9 + 4)


def test_the_adaptive_sampler(host):
    assert host.latents(True, 2, sampler_name="DPM adaptive").shape == (1, 4, 16, 16)


@pytest.fixture
def levels(host, monkeypatch):
    """The noise levels at which the phases' samplers ask for a prediction."""
    seen, hooks = [], host.webui.step.PhaseHooks
    step = hooks.before_step

    def look(self, denoiser, args):
        seen.append(float(args[1][0]))
        return step(self, denoiser, args)

    monkeypatch.setattr(hooks, "before_step", look)
    return seen


@pytest.mark.parametrize("sampler", [*SAMPLERS, "DPM adaptive"])
def test_a_phase_entered_late_runs_the_last_steps_of_its_schedule(host, levels, sampler):
    host.generate(True, 2, sampler_name=sampler, steps=6)
    whole, levels[:] = levels[:], []
    latents = host.latents(True, 2, {"denoising_strength": 0.5}, sampler_name=sampler, steps=6)
    assert torch.isfinite(latents).all()
    assert max(levels) < 0.7 * max(whole)
    if sampler not in ("DPM adaptive", "DPM fast", "UniPC"):  # these space the levels anew between their ends
        late = sorted(set(levels))
        assert late == pytest.approx(sorted(set(whole))[: len(late)], rel=1e-5)


@pytest.mark.parametrize("scheduler", ["Automatic", "DDIM", "KL Optimal"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_calls_of_a_late_phase_are_the_plans(host, calls, sampler, scheduler):
    """The schedule DDIM has more steps than are asked for."""
    host.generate(True, 2, {"denoising_strength": 0.5}, sampler_name=sampler, scheduler=scheduler, steps=7)
    full, late = (host.webui.samplers.model_calls(sampler, scheduler, 7, skipped) for skipped in (0, 3))
    assert calls.rows == 2 * (full + 13 * late)


def test_prompts_that_change_do_so_at_the_same_noise(host, monkeypatch):
    """What decides is the count of steps that the host has; a phase of 40 % begins at the 7th of 10."""
    steps, parser = [], host.sd_samplers_cfg_denoiser.prompt_parser
    reconstruct = parser.reconstruct_multicond_batch
    monkeypatch.setattr(parser, "reconstruct_multicond_batch", lambda cond, step: steps.append(step) or reconstruct(cond, step))
    host.generate(True, 2, {"denoising_strength": 0.4}, prompt="one [red:blue:0.5] ring", steps=10)
    assert steps == [*range(10), 6, 7, 8, 9]


def test_phases_enlarged_as_images(host, monkeypatch):
    """One image or two at once, from the same bases, which a host may round in another way."""
    settings, bases, loop = {"pixel_upsampling": True}, [], host.webui.loop
    post_sample = loop.post_sample

    def one_base(p, ps, *rest):
        ps.samples = bases.pop(0) if bases else ps.samples
        return post_sample(p, ps, *rest)

    def keep(p, ps, *rest):
        bases.extend(ps.samples.clone().split(1))
        return post_sample(p, ps, *rest)

    monkeypatch.setattr(loop, "post_sample", keep)
    batch = host.latents(True, 3, settings, batch_size=2)
    monkeypatch.setattr(loop, "post_sample", one_base)
    singles = [host.latents(True, 3, settings, seed=seed) for seed in (1, 2)]
    assert not bases
    assert same_but_for_rounding(batch, torch.cat(singles))
    one = host.latents(True, 3, settings, seed=2)
    assert torch.equal(host.latents(True, 3, settings, seed=2), one)
    assert not torch.allclose(host.latents(True, 3, seed=2), singles[1], atol=1e-2)


def test_flat_areas_are_held(host):
    settings = {"hold_flat": 20.0}
    batch = host.latents(True, 3, settings, batch_size=2, sampler_name="DDIM")
    singles = [host.latents(True, 3, settings, seed=seed, sampler_name="DDIM") for seed in (1, 2)]
    assert same_but_for_rounding(batch, torch.cat(singles))
    assert not torch.allclose(host.latents(True, 3, seed=2, sampler_name="DDIM"), singles[1], atol=1e-2)


def test_large_phases_are_encoded_in_tiles(host, monkeypatch):
    settings, job = {"pixel_upsampling": True}, dict(width=128, height=128, steps=2)
    whole = host.latents(True, 3, settings, **job)
    sizes, encoder = [], host.autoencoder.encoder
    handle = encoder.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[-1]))
    monkeypatch.setattr(host.webui.decoding.tiles, "tile_for", lambda network, device, base: 32)
    tiled = host.latents(True, 3, settings, **job)
    handle.remove()
    assert max(sizes) == 8 * 32
    assert (tiled - whole).std() < 0.05 * whole.std()
    assert "encode_first_stage" not in vars(host.shared.sd_model)


@pytest.mark.parametrize("preset", ["Fast", "Faithful", "Turbo"])
def test_presets(host, calls, preset):
    """Fast is what the API makes of a scale alone."""
    webui = host.webui
    config = webui.settings.DemoFusionConfig.preset(preset, scale=3.0)
    named = {f: getattr(config, f) for f in webui.settings.PRESET_SETTINGS}
    reply = host.generate(*([True, 3.0, named] if preset != "Fast" else [True, 3.0, 0]), steps=8)
    p = SimpleNamespace(sampler_name="Euler", scheduler="Automatic", width=64, height=64, steps=8, cfg_scale=7.0)
    assert calls.rows == webui.checks.plan_for(p, config).evaluations
    assert reply.images[0].size == (192, 192)
    written = host.infotext_utils.parse_generation_parameters(reply.infotexts[0])
    assert webui.settings.DemoFusionConfig.from_infotext(written) == config


@pytest.mark.parametrize("sampler", ["Euler", "Heun"])
def test_schedulers(host, calls, sampler):
    webui = host.webui

    for scheduler in host.sd_schedulers.schedulers:
        calls.rows = 0
        latents = host.latents(True, 2, sampler_name=sampler, scheduler=scheduler.label, steps=6)
        assert torch.isfinite(latents).all(), scheduler.label
        assert calls.rows == 2 * 14 * webui.samplers.model_calls(sampler, scheduler.label, 6), scheduler.label


@pytest.mark.skipif(not NODE, reason="needs node, to run javascript/demofusion.js")
@pytest.mark.parametrize("cfg", [7, 1])
@pytest.mark.parametrize("scale", [2, 3, 4, 2.5])
def test_the_calls_are_the_number_in_the_form(host, calls, scale, cfg):
    form = dict(width=64, height=96, steps=4, cfg=cfg, sampler="Euler", scheduler="Automatic", hires=False, scale=scale)
    form |= dict(stride=0.5, phaseSteps=0, doubling=False, strength=1, batchSize=1, batchCount=1, uniPcOrder=3)
    [line] = readouts([form | dict(table=host.webui.readout.readout_table(), facts={}, start="", window=0)])
    host.generate(True, scale, width=64, height=96, cfg_scale=cfg)
    assert re.search(r", ([\d,]+) model calls\b", line)[1] == f"{calls.rows:,}"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_samplers_own_state_is_blended(host, monkeypatch, sampler):
    """With the skip residual at full weight, wherever a step starts from, it is the reference noised to that level.

    A model that always errs the same way then moves the result by its last steps only.
    """
    webui = host.webui

    seen = []
    step = webui.step.PhaseHooks.before_step

    def look(self, denoiser, args):
        result = step(self, denoiser, args)
        x, level = args[0], float(args[1][0])
        _, noise, signal = self.levels(level)
        seen.append((x, (x - self.fusion.noised_reference(noise, signal)).abs().max().item()))
        return result

    monkeypatch.setattr(webui.step.PhaseHooks, "before_step", look)
    host.generate(True, 2, {"alpha1": 0}, sampler_name=sampler, steps=5)  # alpha1 = 0: c1 is 1 at every t
    assert seen
    assert all(error < 1e-3 for _, error in seen)


@pytest.fixture
def blends(host, monkeypatch):
    """(t, since) of each blend of a phase."""
    calls, blend = [], host.webui.step.Fusion.skip_residual_

    def look(self, x, t, sigma, signal, since):
        calls.append((t, since))
        return blend(self, x, t, sigma, signal, since)

    monkeypatch.setattr(host.webui.step.Fusion, "skip_residual_", look)
    return calls


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_state_is_held_since_where_its_step_began(host, blends, sampler):
    """Also where a sampler tries out states on the way, which are held since there too, and are no beginning of a step."""
    host.generate(True, 2, sampler_name=sampler, steps=5)
    second = host.webui.samplers.SAMPLERS[sampler].counts == "second"
    tried = {"PLMS": {1}, "DPM fast": {1, 2, 4}}.get(sampler, set(range(1, len(blends), 2)) if second else set())
    assert len(blends) == host.webui.samplers.model_calls(sampler, None, 5)
    began = None
    for index, (t, since) in enumerate(blends):
        assert since == began, f"call {index} at {t}"
        began = began if index in tried else t


@pytest.mark.parametrize("steps", [22, 40])
def test_where_the_sampler_goes_back_up_a_state_is_held_for_as_far_as_that(host, blends, steps):
    host.generate(True, 2, sampler_name="Restart", steps=steps)
    real = [t for t, _ in blends[::2]]
    assert any(t > before for before, t in zip(real, real[1:])), "it never went back up"
    assert [since for _, since in blends[2::2]] == real[:-1]


def test_same_seed_same_picture(host):
    assert same(host.generate(True, 2).images[0], host.generate(True, 2).images[0])


@pytest.mark.parametrize("sampler", ["Euler", "Euler a", "DPM++ SDE", "DDIM", "LCM", "Restart"])
def test_a_batch_is_its_singles(host, sampler):
    batch = host.latents(True, 2, sampler_name=sampler, batch_size=2, steps=4)
    singles = [host.latents(True, 2, sampler_name=sampler, seed=seed, steps=4) for seed in (1, 2)]
    assert same_but_for_rounding(batch, torch.cat(singles))


def test_batch_count(host):
    reply = host.generate(True, 2, n_iter=2, sampler_name="Euler a")
    both = reply.images[-2:]
    assert [image.size for image in both] == [(128, 128)] * 2
    assert same(both[1], host.generate(True, 2, seed=2, sampler_name="Euler a").images[0])


@pytest.mark.parametrize(
    "extra",
    [
        dict(subseed=5, subseed_strength=0.5),
        dict(seed_resize_from_w=128, seed_resize_from_h=128),
        dict(override_settings={"eta_noise_seed_delta": 31337}, sampler_name="Euler a"),
        dict(prompt="one [red:blue:0.5] ring"),
        dict(prompt="one red ring :1.2 AND one blue disc :0.7"),
        dict(prompt="one red ring BREAK on snow"),
        dict(prompt="(one:1.3) red ring " + "on grass " * 40),
        dict(negative_prompt="blue " * 90),
        dict(negative_prompt="blue", cfg_scale=1),
        dict(override_settings={"CLIP_stop_at_last_layers": 2}),
        dict(override_settings={"upcast_attn": True}),
        dict(override_settings={"s_min_uncond_all": True}, s_min_uncond=5),
        dict(override_settings={"token_merging_ratio": 0.3}),
        dict(override_settings={"sd_noise_schedule": "Zero Terminal SNR"}),
        dict(override_settings={"sgm_noise_multiplier": True}),
        dict(override_settings={"img2img_extra_noise": 0.2}),
        dict(override_settings={"randn_source": "NV"}),
        dict(override_settings={"s_churn": 2.0}, s_churn=2.0),
    ],
    ids=lambda extra: ",".join(str(value)[:24] for value in extra.values()),
)
def test_what_users_combine(host, extra):
    extra = {"width": 128, "height": 128, "steps": 10, **extra}
    plain = host.latents(**extra)
    assert plain.shape == (1, 4, 16, 16)
    large = host.latents(True, 2, **extra)
    assert large.shape == (1, 4, 32, 32)
    small = torch.nn.functional.interpolate(large, size=(16, 16), mode="area")
    others = [host.latents(**extra, seed=seed) for seed in (2, 3)]
    own, *other = [(small - base).square().mean().sqrt() for base in (plain, *others)]
    assert own < min(other), "nearer to another seed's base than to its own"


@pytest.mark.parametrize("extra", [{}, dict(prompt="one red ring " * 30), dict(prompt="one ring AND two discs :0.5")])
def test_cond_and_uncond_in_separate_calls(host, extra):
    together = host.latents(True, 2, **extra, override_settings={"batch_cond_uncond": True})
    apart = host.latents(True, 2, **extra, override_settings={"batch_cond_uncond": False})
    assert same_but_for_rounding(together, apart)


@pytest.mark.parametrize("batched", [True, False])
def test_without_guidance_the_negative_prompt_costs_nothing_in_the_phases(host, calls, batched):
    settings = {"batch_cond_uncond": batched}
    latents = host.latents(True, 2, cfg_scale=1, negative_prompt="blue", override_settings=settings)
    assert calls.rows == host.steps_rows(4, cfg_scale=1) + 4 * 13
    nearly = host.latents(True, 2, cfg_scale=1.000001, negative_prompt="blue", override_settings=settings)
    assert torch.allclose(latents, nearly, atol=1e-3)


def test_views_do_not_depend_on_the_view_batch_size(host):
    one, many = (host.latents(True, 2, {"view_batch_size": n}) for n in (1, 64))
    assert same_but_for_rounding(one, many)


def test_steps_of_their_own_for_the_phases(host, calls):
    host.generate(True, 2, {"phase_steps": 2}, prompt="one [red:blue:0.5] ring")
    assert calls.rows == 2 * (4 + 2 * 13)


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_v_prediction(host, checkpoint, sampler):
    model = checkpoint("v-prediction.safetensors")
    predictor = model.forge_objects.unet.model.predictor if host.is_forge else None
    assert (predictor.prediction_type if host.is_forge else model.parameterization) in ("v", "v_prediction")
    assert torch.isfinite(host.latents(True, 2, sampler_name=sampler)).all()


def test_inpainting_checkpoints_get_their_condition_cropped_like_x(host, checkpoint, monkeypatch):
    checkpoint("inpainting.safetensors")
    made = []
    condition = host.processing.txt2img_image_conditioning

    def ramp(sd_model, x, width, height):
        value = condition(sd_model, x, width, height)
        value[:] = torch.arange(value.shape[-1]) + 100 * torch.arange(value.shape[-2])[:, None]
        made.append(value)
        return value

    monkeypatch.setattr(host.processing, "txt2img_image_conditioning", ramp)
    seen = []
    handle = host.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, 4:]))
    try:
        host.generate(True, 2, {"jitter": False, "view_batch_size": 1})
    finally:
        handle.remove()
    assert made[1].shape[-2:] == (16, 16)
    phase = seen[4:]
    assert all(rows.shape[-2:] == (8, 8) for rows in phase)
    corners = [int(rows[0, 0, 0, 0]) for rows in phase[:13]]
    assert corners == [100 * y + x for y in (0, 4, 8) for x in (0, 4, 8)] + [0, 1, 100, 101]
    assert int(phase[12][0, 0, 0, 1]) - int(phase[12][0, 0, 0, 0]) == 2  # a dilated view takes every second pixel


def test_refiner_in_every_phase(host, options):
    host.needs_refiner()
    before = host.shared.sd_model.sd_checkpoint_info.name
    with host.recorded_loads() as loads:
        reply = host.generate(True, 3, refiner_checkpoint="refiner.safetensors", refiner_switch_at=0.5)
    assert "Refiner: refiner" in reply.infotexts[0]
    assert reply.images[0].size == (192, 192)
    assert loads == ["refiner", "demofusion-embedded"] * 2 + ["refiner"]
    host.load("demofusion-embedded.safetensors")
    assert host.shared.sd_model.sd_checkpoint_info.name == before


def seam(image):
    x = np.asarray(image, dtype=float)
    return np.abs(x[:, 0] - x[:, -1]).mean() / np.abs(np.diff(x, axis=1)).mean()


@pytest.fixture
def host_tiles(host):
    """Skips where the host's own setting for tiling does nothing."""
    if same(host.generate(tiling=True).images[0], host.generate().images[0]):
        pytest.skip("this host's own setting for tiling changes nothing")


@pytest.mark.usefixtures("host_tiles")
def test_tiling_repeats_without_a_seam(host):
    kwargs = dict(width=128, height=128, steps=12, prompt="two red striped rings on grass")
    tiled, plain = (host.generate(True, 2, {"hold_steps": 0}, tiling=tiling, **kwargs).images[0] for tiling in (True, False))
    assert not host.wraps_around
    assert seam(tiled) < 0.5 * seam(plain)


@pytest.mark.usefixtures("host_tiles")
@pytest.mark.parametrize("preset", ["Paper", "Fast"])
def test_tiling_repeats_without_a_seam_where_the_phase_before_holds(host, preset):
    """On the mean of four pictures: what one shows may end at its border by itself."""
    config = host.webui.settings.DemoFusionConfig.preset(preset)
    settings = {name: getattr(config, name) for name in host.webui.settings.PRESET_SETTINGS}

    def seams(tiling):
        kwargs = dict(width=128, height=128, steps=12, prompt="two red striped rings on grass", tiling=tiling)
        return [seam(host.generate(True, 2, settings, seed=seed, **kwargs).images[0]) for seed in range(1, 5)]

    assert np.mean(seams(True)) < 1.2
    assert min(seams(False)) > 1.4


def test_intermediate_phases_are_saved_beside_the_output(host):
    from PIL import Image

    host.generate(True, 3, {"save_phases": True}, save_images=True, seed=77)
    files = sorted(host.outputs.rglob("*77*.png"))
    sizes = {}
    for path in files:
        with Image.open(path) as image:
            sizes[path.stem.split("-demofusion-")[-1] if "-demofusion-" in path.stem else "last"] = (
                image.size,
                image.info["parameters"],
            )
    assert {key: size for key, (size, _) in sizes.items()} == {
        "phase1": (64, 64), "phase2": (128, 128), "last": (192, 192),
    }  # fmt: skip
    assert "DemoFusion" not in sizes["phase1"][1]
    assert "DemoFusion scale: 2" in sizes["phase2"][1]
    assert "DemoFusion scale: 3" in sizes["last"][1]


@pytest.mark.parametrize("sampler", ["Euler a", "DPM++ 2M"])
def test_a_saved_phase_is_resumed(host, calls, sampler):
    job = dict(sampler_name=sampler, seed=88)
    whole = host.latents(True, 3, {"save_phases": True}, save_images=True, **job)
    [saved] = host.outputs.rglob("*88-demofusion-phase2.safetensors")
    calls.rows = 0
    assert torch.equal(host.latents(True, 3, {"resume": str(saved)}, **job), whole)
    assert calls.rows == 2 * 4 * (1 + 25 + 9)
    saved.unlink()


def test_other_scripts_hear_of_every_phase(host, monkeypatch):
    heard = []
    runner = host.scripts.scripts_txt2img
    call = runner.process_before_every_sampling
    monkeypatch.setattr(
        runner, "process_before_every_sampling", lambda p, **kw: (heard.append(tuple(kw["x"].shape)), call(p, **kw))
    )
    host.generate(True, 3)
    assert heard == [(1, 4, 8, 8), (1, 4, 16, 16), (1, 4, 24, 24)]


@pytest.fixture
def sdxl(checkpoint, checkpoints):
    return checkpoint(make_sdxl(checkpoints))


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_sdxl_views_carry_their_size_and_crop(host, sdxl, options, sampler):
    options(sdxl_crop_top=3, sdxl_crop_left=5, show_progress_type="Approx cheap")  # the usual preview is a download
    assert sdxl.is_sdxl
    seen = []
    sizes = lambda y: y[:, -6 * 256 :]  # noqa: E731  behind the pooled text, where there is one
    handle = host.unet.register_forward_pre_hook(lambda m, a, k: seen.append(sizes(k["y"])), with_kwargs=True)
    try:
        plain = {"jitter": False, "view_batch_size": 1}
        latents = host.latents(True, 2, plain, width=128, height=64, steps=2, sampler_name=sampler)
    finally:
        handle.remove()
    assert latents.shape == (1, 4, 16, 32)

    if host.is_forge:
        embed = sdxl.embedder
    else:
        embed = next(e for e in sdxl.conditioner.embedders if getattr(e, "input_key", "") == "crop_coords_top_left")

    def ids(*numbers):
        return torch.cat([embed(torch.tensor([number], dtype=torch.float32)).flatten() for number in numbers])

    steps = 2 if sampler == "Euler" else 1
    base, phase = seen[:steps], seen[steps : steps + 13]
    assert torch.allclose(base[0][0], torch.cat([ids(64, 128), ids(3, 5), ids(64, 128)]), atol=1e-5)
    corners = [(y, x) for y in (0, 32, 64) for x in (0, 64, 128)] + [(0, 0)] * 4
    for rows, (y, x) in zip(phase, corners, strict=True):
        expected = torch.cat([ids(128, 256), ids(3 + y, 5 + x), ids(128, 256)])
        assert torch.allclose(rows, expected.expand_as(rows), atol=1e-4)
