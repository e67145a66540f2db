"""The phases' own settings on the real host: alone and together, and all as before afterwards."""

import contextlib
import json
import random
import re
import shutil

import forge_host
import numpy as np
import pytest
import torch
import webui_host
from PIL import Image
from safetensors.torch import save_file
from test_host import said, snapshot
from webui_host import IS_FORGE, ROOT, make_sdxl

STEPS = 4
PROMPT = "two red striped rings on grass"
VIEWS = {2: 9 + 4, 3: 25 + 9}
FAST = {"pixel_upsampling": True, "denoising_strength": 0.75}
LORA_LAYERS = ("middle_block_1_transformer_blocks_0_attn1_to_q", "middle_block_1_proj_in", "diffusion_model_out_2")
TEXT_LAYER = "transformer_text_model_encoder_layers_0_self_attn_q_proj"


def tiny_lora(host, scale, text=True):
    """A LoRA of rank 2 for some layers of the UNet, and for one of the text encoder."""
    torch.manual_seed(0)
    layers, out = {}, {}
    for name, module in host.networks.items():
        name = name.replace(".", "_")
        kind = "te" if name.endswith(TEXT_LAYER) and text else "unet" if name.endswith(LORA_LAYERS) else None
        if kind:
            layers[f"lora_{kind}_{re.split('diffusion_model_|transformer_(?=text_model)', name)[-1]}"] = module
    assert len(layers) == len(LORA_LAYERS) + text
    for key, module in layers.items():
        weight = module.weight
        rest = weight.shape[1:]
        down, up = torch.randn(2, *rest), torch.randn(weight.shape[0], 2, *[1] * (len(rest) - 1))
        out |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": scale * up, f"{key}.alpha": torch.tensor(2.0)}
    return out


def lora_module():
    from modules import extra_networks

    return type(extra_networks.extra_network_registry["lora"]).activate.__globals__["networks"]


@pytest.fixture(scope="module")
def loras(host):
    """LoRAs in the host's folder, by their names: "bend" and "twist", and one that is none of this checkpoint's."""
    from pathlib import Path

    folder = Path(host.shared.cmd_opts.lora_dir)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {"bend": tiny_lora(host, 0.05), "twist": tiny_lora(host, -0.05, text=False)}
    for name, tensors in weights.items():
        save_file(tensors, folder / f"{name}.safetensors", {"ss_output_name": f"the {name}"})
    (folder / "broken.safetensors").write_bytes(b"nothing")
    lora_module().list_available_networks()
    yield lora_module()
    for name in ("bend", "twist", "broken"):
        (folder / f"{name}.safetensors").unlink(missing_ok=True)  # Forge takes away what it cannot read
    lora_module().list_available_networks()


def active():
    """The LoRAs that the loaded checkpoint has, with the UNet's weight of each."""
    if IS_FORGE:
        from modules import shared

        return forge_host.loras(shared.sd_model)
    return [(net.name, net.unet_multiplier) for net in lora_module().loaded_networks]


WAYS_TO_LOAD = ["another configuration"] if IS_FORGE else ["another configuration", "one configuration", "two models at once"]


@pytest.fixture(params=WAYS_TO_LOAD)
def second(request, host, checkpoints, options, monkeypatch):
    """The name of another checkpoint, loaded in each way that the host has: into a new model, into the same, or beside it."""
    if request.param == "one configuration":
        from modules import sd_models_config

        monkeypatch.setattr(
            sd_models_config, "find_checkpoint_config", lambda *args: str(checkpoints / "demofusion-embedded.yaml")
        )
    elif request.param == "two models at once":
        options(sd_checkpoints_limit=2)
    host.load("refiner.safetensors")
    host.load("demofusion-embedded.safetensors")
    yield "refiner"
    if not host.is_forge:  # which never holds more than one
        host.sd_models.model_data.loaded_sd_models[:] = [host.shared.sd_model]
    monkeypatch.undo()
    host.load("refiner.safetensors")
    host.load("demofusion-embedded.safetensors")


@contextlib.contextmanager
def looking(host, look):
    """look(p) at every call of the UNet of whatever model is loaded."""
    jobs, kind = [], type(host.unet)
    whole, begin = kind.forward, host.webui.loop.before_sampling

    def remember(p, *args):
        jobs.append(p)
        return begin(p, *args)

    def forward(module, *args, **kwargs):
        look(jobs[-1])
        return whole(module, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host.webui.loop, "before_sampling", remember)
        patch.setattr(kind, "forward", forward)
        yield


def seen_by_model(host, what, *args, **payload):
    """what(p) at each call of the model, without repetitions of the call before; and the reply."""
    found = []

    def look(p):
        value = what(p)
        if not found or found[-1] != value:
            found.append(value)

    with looking(host, look):
        reply = host.generate(*args, **payload)
    return found, reply


@contextlib.contextmanager
def bases(host):
    """The base's latents of each batch, and what of p is another object after the phases than before."""
    seen, post_sample = [], host.scripts.ScriptRunner.post_sample
    ours = {"cached_c", "cached_uc", "is_using_inpainting_conditioning", "hr_c", "hr_uc", "extra_generation_params", "comments"}

    def look(runner, p, ps):
        before, base = {name: getattr(p, name) for name in vars(p)}, ps.samples.clone()
        post_sample(runner, p, ps)
        changed = {name for name, value in vars(p).items() if before.get(name, p) is not value} | before.keys() - vars(p)
        seen.append((base, changed - ours))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host.scripts.ScriptRunner, "post_sample", look)
        yield seen


def parameters(host, reply, picture=0):
    return host.infotext_utils.parse_generation_parameters(reply.infotexts[picture], [])


def pixels(reply, picture=0):
    return webui_host.pixels(reply.images[picture])


def state_of(host):
    model = host.shared.sd_model
    return {
        **snapshot(host),
        "checkpoint": (model.sd_checkpoint_info.name, model.sd_model_hash),
        "active": active(),
        "merged": getattr(model, "applied_token_merged_ratio", 0),
    }


SAME = {
    "phase_sampler": "Euler",
    "phase_schedule": "Automatic",
    "phase_cfg_scale": 7.0,
    "phase_prompt": PROMPT,
    "phase_checkpoint": "demofusion-embedded",
}


@pytest.mark.parametrize("name", [*SAME, None])
def test_the_bases_own_settings_change_nothing(host, name):
    plain = host.latents(True, 2, FAST)
    settings = SAME if name is None else {name: SAME[name]}
    assert torch.equal(host.latents(True, 2, {**FAST, **settings}), plain)
    assert torch.equal(host.latents(True, 2, FAST), plain)


OTHER = {
    "phase_sampler": "DPM++ 2M",
    "phase_schedule": "Exponential",
    "phase_cfg_scale": 2.5,
    "phase_prompt": "one blue disc <lora:bend:1>",
    "phase_negative_prompt": "grass",
    "phase_checkpoint": "refiner",
    "upscaler": "None",
    "resize_height": 160,
}


@pytest.mark.parametrize("name", [*OTHER, "lora", None])
def test_each_changes_the_picture_and_neither_the_base_nor_what_comes_after(host, loras, name):
    settings = OTHER if name is None else {name: OTHER[name]} if name in OTHER else {"phase_prompt": "<lora:twist:1>"}
    job = dict(n_iter=2, negative_prompt="text")
    with bases(host) as plain:
        first = host.generate(True, 2, FAST, **job)
    before = state_of(host)
    with bases(host) as own:
        reply = host.generate(True, 2, {**FAST, **settings}, **job)
    assert [changed for _, changed in own] == [set(), set()]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(own, plain, strict=True)), "the base"
    assert all(reply.images[i].size != first.images[i].size or (pixels(reply, i) != pixels(first, i)).any() for i in (0, 1))
    assert state_of(host) == before
    again = host.generate(True, 2, FAST, **job)
    assert all(np.array_equal(pixels(again, i), pixels(first, i)) for i in (0, 1)), "the next picture"
    for i in (0, 1):
        theirs, ours = parameters(host, first, i), parameters(host, reply, i)
        both = {key: value for key, value in theirs.items() if not key.startswith("DemoFusion ")}
        assert {key: value for key, value in ours.items() if not key.startswith("DemoFusion ")} == both | {
            key: ours[key] for key in ("Lora hashes",) if key in ours
        }


def test_the_infotext_comes_back_as_the_settings(host, loras):
    settings = {**OTHER, "phase_prompt": 'a "disc", red:\nand <lora:the bend:0.5>', "phase_negative_prompt": '"grass"'}
    reply = host.generate(True, 2, {**FAST, **settings})
    assert reply.images[0].size == (160, 160)
    values, unread = host.webui.settings.read_pasted(parameters(host, reply))
    assert unread == ""
    info = host.sd_models.get_closet_checkpoint_match("refiner")
    expected = {**settings, "phase_checkpoint": info.short_title, "scale": 2.5}
    assert {name: values[name] for name in expected} == expected
    written = parameters(host, reply)
    assert ", Model: demofusion-embedded, " in reply.infotexts[0]
    assert (written["Sampler"], written["Schedule type"], written["CFG scale"]) == ("Euler", "Automatic", "7.0")
    again = host.generate(True, values["scale"], {name: values[name] for name in {**FAST, **settings}})
    assert np.array_equal(pixels(again), pixels(reply))
    host.load("demofusion-embedded.safetensors")


def test_the_model_sees_what_is_of_the_phases(host, loras):
    def what(p):
        model = host.shared.sd_model.sd_checkpoint_info.name_for_extra
        return (p.sampler_name, p.scheduler, p.cfg_scale, list(p.prompts), list(p.negative_prompts), active(), model)

    settings = {**OTHER, "resize_height": 0}
    found, reply = seen_by_model(host, what, True, 2, settings, prompt="a ring <lora:twist:0.5>", batch_size=2, n_iter=2)
    one = [
        ("Euler", "Automatic", 7.0, ["a ring "] * 2, [""] * 2, [("twist", 0.5)], "demofusion-embedded"),
        ("DPM++ 2M", "Exponential", 2.5, ["one blue disc "] * 2, ["grass"] * 2, [("bend", 1.0)], "refiner"),
    ]
    assert found == one * 2
    assert active() == [("twist", 0.5)]


AFTER_EULER = [("LCM", ""), ("DDIM", ""), ("UniPC", ""), ("Euler a", "Karras"), ("DPM++ SDE", "")]


@pytest.mark.parametrize(("sampler", "schedule"), AFTER_EULER)
def test_samplers_after_another_make_as_many_calls_as_planned(host, sampler, schedule, calls):
    settings = {**FAST, "denoising_strength": 1.0, "phase_sampler": sampler, "phase_schedule": schedule}
    reply = host.generate(True, 2, settings, steps=5)
    webui = host.webui
    made = webui.samplers.model_calls(sampler, schedule or "Automatic", 5)
    assert calls.rows == 2 * (5 + VIEWS[2] * made)
    assert reply.images[0].size == (128, 128)
    assert said(host, reply) == {}
    assert parameters(host, reply)["Schedule type"] == "Automatic"


def test_at_cfg_1_the_phases_leave_the_negative_prompt_out(host, calls):
    host.generate(True, 2, {"phase_cfg_scale": 1.0})
    assert calls.rows == host.steps_rows(STEPS) + STEPS * VIEWS[2]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"phase_sampler": "Elder"}, "there is no sampler 'Elder'; there are: DPM++ 2M, DPM++ SDE, "),
        ({"phase_schedule": "Carras"}, "there is no schedule type 'Carras'; there are: {schedules}, "),
        ({"phase_checkpoint": "no such"}, "there is no checkpoint 'no such'; there are: "),
        ({"upscaler": "8x"}, "there is no upscaler '8x'; there are: {upscalers}"),
        ({"phase_prompt": "<lora:no such:1>"}, "there is no LoRA 'no such', which the phase prompt names; there are: "),
        ({"phase_sampler": "UniPC", "denoising_strength": 0.4}, "UniPC cannot do with the 2 of 4 steps that the denoising"),
        ({"phase_checkpoint": "inpainting"}, "inpainting is an inpainting checkpoint, and the base's is none; choose"),
        ({"phase_checkpoint": "tiny-sdxl"}, "the checkpoint tiny-sdxl is SDXL, and the base's is Stable Diffusion 1 or 2; "),
        ({"resize_width": 100, "resize_height": 200}, "100x200 has not the aspect of 64x64; resize to "),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_before_anything_is_sampled(host, checkpoints, calls, settings, line):
    if settings.get("phase_sampler") == "UniPC" and "UniPC" not in host.webui.samplers.SAMPLERS:
        pytest.skip("this host's UniPC is another one, which is refused")
    if not (checkpoints / "tiny-sdxl.safetensors").exists():
        make_sdxl(checkpoints)
        host.sd_models.list_models()
    upscalers = [*host.shared.latent_upscale_modes, *(known.name for known in host.shared.sd_upscalers)]
    lists = dict(schedules=[known.label for known in host.sd_schedulers.schedulers], upscalers=upscalers)
    line = line.format(**{name: ", ".join(known[:2]) for name, known in lists.items()})
    reply = host.generate(True, 2, settings)
    assert reply.images == []
    assert said(host, reply)["DemoFusion refused"].startswith(line)
    assert calls.rows == 0


# ------------------------------------------------------------------------------------------------------------------ LoRAs


def test_a_lora_of_the_phases_alone_is_in_no_base_and_no_next_picture(host, loras):
    plain, with_it = host.generate(), host.generate(prompt=f"{PROMPT} <lora:bend:1>")
    assert (pixels(plain) != pixels(with_it)).any()
    with bases(host) as own:
        reply = host.generate(True, 2, {"phase_prompt": "<lora:bend:1>"}, n_iter=2)
    with bases(host) as without:
        two = host.generate(True, 2, n_iter=2)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(own, without, strict=True))
    assert (pixels(reply) != pixels(two)).any()
    assert np.array_equal(pixels(host.generate()), pixels(plain))
    assert np.array_equal(pixels(host.generate(prompt=f"{PROMPT} <lora:bend:1>")), pixels(with_it))
    assert parameters(host, reply)["DemoFusion phase prompt"] == "<lora:bend:1>"


def test_it_is_as_if_it_were_written_in_the_bases_prompt(host, loras, checkpoints):
    """From the same base: alone behind its prompt, or with its text, too."""
    alone = host.generate(True, 2, {**FAST, "phase_prompt": "<lora:bend:0.7>"})
    typed = host.generate(True, 2, {**FAST, "phase_prompt": f"{PROMPT}<lora:bend:0.7>"})
    assert np.array_equal(pixels(alone), pixels(typed))
    both = host.generate(True, 2, {**FAST, "phase_prompt": "<lora:bend:0.7>"}, prompt=f"{PROMPT}<lora:twist:1>")
    other = host.generate(
        True, 2, {**FAST, "phase_prompt": f"{PROMPT}<lora:twist:1><lora:bend:0.7>"}, prompt=f"{PROMPT}<lora:twist:1>"
    )
    assert np.array_equal(pixels(both), pixels(other))


def test_the_hosts_caches_of_prompts_know_which_lora_they_are_of(host, loras):
    """The LoRA changes the text encoder, too, and prompt and steps are the same."""
    texts = []
    setup = host.processing.StableDiffusionProcessingTxt2Img.setup_conds

    def look(p):
        setup(p)
        texts.append((bool(active()), p.c.batch[0][0].schedules[0].cond.clone()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host.processing.StableDiffusionProcessingTxt2Img, "setup_conds", look)
        host.generate(True, 2, {"phase_prompt": "<lora:bend:1>"}, n_iter=2)
        host.generate()
    assert [on for on, _ in texts] == [False, True, False, True, False]
    for on, text in texts:
        assert torch.equal(text, texts[int(on)][1])
    assert not torch.equal(texts[0][1], texts[1][1])


def test_a_lora_that_cannot_be_loaded_ends_the_phases_and_keeps_the_base(host, loras):
    base, before = host.generate(), state_of(host)
    reply = host.generate(True, 2, {"phase_prompt": "<lora:broken:1>"})
    assert np.array_equal(pixels(reply), pixels(base))
    line = "failed: the LoRA broken could not be loaded, as the console says; take another"
    assert any(line in comment for comment in host.comments)
    assert state_of(host) == before


def test_the_network_of_the_settings_does_not_pile_up(host, loras, options):
    """The host writes it into all prompts each time that networks are activated."""
    options(sd_lora="twist")
    reply = host.generate(True, 2, {"phase_prompt": "one disc <lora:bend:1>"}, n_iter=2)
    plain = host.generate(n_iter=2)
    assert [text.splitlines()[0] for text in reply.infotexts] == [text.splitlines()[0] for text in plain.infotexts]


@pytest.mark.parametrize(("base", "own"), [(PROMPT, "one ring AND grass :0.5"), ("one ring AND grass :0.5", "one disc")])
def test_either_may_have_prompts_that_are_joined(host, calls, base, own):
    host.generate(True, 2, {"phase_prompt": own}, prompt=base)
    assert calls.rows == STEPS * ((2 + base.count("AND")) + (2 + own.count("AND")) * VIEWS[2])


def test_styles_are_the_phases_too(host):
    styles = host.shared.prompt_styles
    styles.styles["snowy"] = type(styles.no_style)("snowy", "{prompt} on snow", "grass", None)
    try:
        settings = {"phase_prompt": "one disc", "phase_negative_prompt": "text"}
        found, _ = seen_by_model(
            host, lambda p: (p.prompts, p.negative_prompts), True, 2, settings, prompt="a ring", styles=["snowy"]
        )
    finally:
        del styles.styles["snowy"]
    assert found == [(["a ring on snow"], ["grass"]), (["one disc on snow"], ["text, grass"])]


def test_the_embedded_lcm_lora_in_the_phases(host):
    """Few steps and no guidance, where without it the host tells that this is for such weights."""
    from pathlib import Path

    if not (ROOT / "lib_demofusion" / "checkpoint" / "lcm_lora.safetensors").exists():
        pytest.skip("the checkpoint has no LCM-LoRA")
    import subprocess

    from webui_host import command_python

    folder = Path(host.shared.cmd_opts.lora_dir)
    scratch = folder.parent / "exported"
    command = [command_python(), "-m", "training.export_webui", str(scratch), "--lora", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    shutil.rmtree(scratch)
    lora_module().list_available_networks()
    try:
        settings = {**FAST, "denoising_strength": 0.5, "phase_sampler": "LCM", "phase_cfg_scale": 1.0}
        plain = host.generate(steps=8)
        reply = host.generate(True, 2, {**settings, "phase_prompt": "<lora:demofusion-embedded-lcm:1>"}, steps=8)
        assert said(host, reply) == {}
        assert host.comments == []
        without = host.generate(True, 2, settings, steps=8)
        assert said(host, without)["DemoFusion note"].startswith("LCM at CFG scale 1 is for few-step weights")
        assert (pixels(reply) != pixels(without)).any()
        assert np.array_equal(pixels(host.generate(steps=8)), pixels(plain))
    finally:
        (folder / "demofusion-embedded-lcm.safetensors").unlink()
        lora_module().list_available_networks()


# ------------------------------------------------------------------------------------------------------------- checkpoint


@pytest.fixture
def copied(host, checkpoints):
    """A copy of the checkpoint under another name."""
    for end in ("safetensors", "yaml"):
        shutil.copy(checkpoints / f"demofusion-embedded.{end}", checkpoints / f"copy.{end}")
    host.sd_models.list_models()
    yield "copy"
    for end in ("safetensors", "yaml"):
        (checkpoints / f"copy.{end}").unlink()
    host.load("demofusion-embedded.safetensors")
    host.sd_models.list_models()


@pytest.mark.parametrize("settings", [{}, FAST, {**FAST, "hold_flat": 8.0}])
@pytest.mark.parametrize("job", [{}, dict(batch_size=2, tiling=True, n_iter=2)])
def test_a_copy_of_the_checkpoint_changes_nothing(host, copied, settings, job):
    plain = host.generate(True, 2, settings, **job)
    made = host.generate(True, 2, {**settings, "phase_checkpoint": copied}, **job)
    assert len(made.images) == len(plain.images)
    assert all(np.array_equal(pixels(made, i), pixels(plain, i)) for i in range(len(plain.images)))
    again = host.generate(True, 2, settings, **job)
    assert np.array_equal(pixels(again), pixels(plain))


@pytest.mark.parametrize("job", [dict(n_iter=2), dict(tiling=True, batch_size=2, width=72)])
def test_all_is_as_before_however_the_host_loads_it(host, loras, second, job):
    job = {**job, "prompt": f"{PROMPT} <lora:bend:0.5>"}
    plain, two = host.generate(**job), host.generate(True, 2, FAST, **job)
    before = state_of(host)
    with bases(host) as own:
        reply = host.generate(True, 2, {**FAST, "phase_checkpoint": second, "phase_prompt": "<lora:twist:1>"}, **job)
    assert [changed for _, changed in own] == [set()] * len(own)
    assert (pixels(reply) != pixels(two)).any()
    assert state_of(host) == before
    assert np.array_equal(pixels(host.generate(**job)), pixels(plain))
    assert np.array_equal(pixels(host.generate(True, 2, FAST, **job)), pixels(two))
    untiled = {**job, "tiling": False}
    one = host.generate(**untiled)
    host.load("refiner.safetensors"), host.load("demofusion-embedded.safetensors")
    assert np.array_equal(pixels(host.generate(**untiled)), pixels(one)), "no convolution is left wrapped around"


def test_the_pictures_are_decoded_by_the_models_that_made_them(host, second):
    """The second's decoder answers with another brightness."""
    seen, kind = [], type(host.autoencoder.decoder)
    whole = kind.forward

    def forward(module, z):
        seen.append((host.shared.sd_model.sd_checkpoint_info.name_for_extra, z.shape[-1]))
        return whole(module, z)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", forward)
        host.generate(True, 3, {**FAST, "phase_checkpoint": second}, batch_size=2)
    assert seen == [*[("demofusion-embedded", 8)] * 2, *[(second, 16)] * 2, *[(second, 24)] * 2]


def test_the_checkpoint_of_the_request_is_the_bases(host, second):
    own = {"override_settings": {"sd_model_checkpoint": "v-prediction.safetensors"}}
    before = state_of(host)
    plain = host.generate(**own)
    with bases(host) as made:
        reply = host.generate(True, 2, {"phase_checkpoint": second}, **own)
    with bases(host) as without:
        host.generate(True, 2, **own)
    assert torch.equal(made[0][0], without[0][0])
    assert parameters(host, reply)["Model"] == "v-prediction"
    assert np.array_equal(pixels(host.generate(**own)), pixels(plain))
    host.load("demofusion-embedded.safetensors")
    assert state_of(host) == before


@pytest.mark.parametrize("switch", [0.5, 0.8])
def test_the_refiner_switches_in_every_phase(host, switch):
    host.needs_refiner()
    what = (lambda p: host.shared.sd_model.sd_checkpoint_info.name_for_extra,)
    job = dict(refiner_checkpoint="v-prediction", refiner_switch_at=switch, steps=6)
    plain = host.generate(**job)
    found, reply = seen_by_model(host, *what, True, 3, {"phase_checkpoint": "refiner"}, **job)
    assert found == ["demofusion-embedded", "v-prediction", *["refiner", "v-prediction"] * 2]
    assert reply.images[0].size == (192, 192)
    assert parameters(host, reply)["Refiner"].startswith("v-prediction")
    assert np.array_equal(pixels(host.generate(**job)), pixels(plain))
    host.load("demofusion-embedded.safetensors")


def test_saved_phases_can_be_resumed_with_it(host, loras, options, tmp_path):
    options(outdir_txt2img_samples=str(tmp_path), save_to_dirs=False)
    settings = {**FAST, "phase_checkpoint": "refiner", "phase_prompt": "<lora:bend:1>", "phase_steps": 5}
    job = dict(seed=77, save_images=True)
    whole = host.generate(True, 3, {**settings, "save_phases": True}, **job)
    for number in (1, 2):
        [file] = tmp_path.glob(f"*phase{number}.safetensors")
        image = Image.open(file.with_suffix(".png"))
        written = host.infotext_utils.parse_generation_parameters(image.info["parameters"], [])
        assert (written["Steps"], written["Sampler"]) == ("4", "Euler")
        assert ", Model: demofusion-embedded, " in image.info["parameters"]
        again = host.generate(True, 3, {**settings, "resume": str(file)}, seed=77)
        assert np.array_equal(pixels(again), pixels(whole))
    host.load("demofusion-embedded.safetensors")


def test_a_checkpoint_that_cannot_be_loaded_keeps_the_base(host, checkpoints):
    """Its header is right, and what follows is not there."""
    whole = (checkpoints / "refiner.safetensors").read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    (checkpoints / "cut.safetensors").write_bytes(whole[: length + 1000])
    shutil.copy(checkpoints / "refiner.yaml", checkpoints / "cut.yaml")
    host.sd_models.list_models()
    try:
        base, before = host.generate(), state_of(host)
        reply = host.generate(True, 2, {**FAST, "phase_checkpoint": "cut"})
        assert np.array_equal(pixels(reply), pixels(base))
        assert "cut could not be loaded: " in host.comments[0]
        assert "phase 1 of 2, 64x64, is the last one finished" in host.comments[0]
        assert state_of(host) == before
        assert np.array_equal(pixels(host.generate()), pixels(base))
    finally:
        (checkpoints / "cut.safetensors").unlink()
        (checkpoints / "cut.yaml").unlink()
        host.sd_models.list_models()


# ----------------------------------------------------------------------------------------------------- trouble at any call


@pytest.mark.parametrize("kind", ["interrupt", "error", "memory"])
@pytest.mark.parametrize("call", random.Random(2).sample(range(1, 20), 3))
def test_whatever_happens_in_the_phases_all_is_as_before(host, loras, kind, call):
    """Of 5 calls in the first phase, and 10 in the second."""
    settings = {**OTHER, **FAST, "resize_height": 0, "view_batch_size": 8}
    job = dict(prompt=f"{PROMPT} <lora:twist:0.5>")
    plain, before, made = host.generate(**job), state_of(host), [0]

    def act(p):
        made[0] += 1
        if made[0] == STEPS + call:
            assert p.sampler_name == "DPM++ 2M"
            if kind == "interrupt":
                host.shared.state.interrupt()
            else:
                raise RuntimeError("the model broke") if kind == "error" else torch.cuda.OutOfMemoryError("CUDA out of memory")

    with looking(host, act), bases(host) as own:
        reply = host.generate(True, 3, settings, **job)
    assert made[0] >= STEPS + call
    assert own[0][1] == set()
    assert said(host, reply) or kind == "memory", "which goes on with fewer views"
    assert state_of(host) == before
    assert np.array_equal(pixels(host.generate(**job)), pixels(plain))


# ----------------------------------------------------------------------------------------------------- upscalers and size


def test_every_upscaler_of_the_host_that_needs_no_download(host):
    there = {known.name for known in host.shared.sd_upscalers}
    if not host.shared.latent_upscale_modes and not {"Lanczos", "Nearest"} & there:
        pytest.skip("this host has none but None")
    names = [*host.shared.latent_upscale_modes, "None", "Lanczos", "Nearest"]
    assert set(names) <= {*host.shared.latent_upscale_modes, *there}
    made = {name: host.latents(True, 2, {**FAST, "upscaler": name}) for name in names}
    assert not torch.equal(made["Latent (bicubic)"], made["Latent"])
    plain = host.latents(True, 2, {**FAST, "pixel_upsampling": False})
    assert torch.equal(made["Latent (bicubic)"], plain), "which is what latents are enlarged by anyway"
    assert torch.equal(made["None"], made["Lanczos"]), "as the host has it"
    assert not torch.equal(made["Nearest"], made["Lanczos"])


def test_an_upscaler_that_needs_a_model_which_is_not_there_ends_the_phases(host, monkeypatch):
    """The host itself would go on with Lanczos."""
    from modules import modelloader

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(modelloader, "load_file_from_url", no_network)
    named = [known for known in host.shared.sd_upscalers if str(known.data_path).startswith("http")]
    assert named
    base = host.generate()
    for known in named[:2]:
        reply = host.generate(True, 2, {"upscaler": known.name})
        assert np.array_equal(pixels(reply), pixels(base))
        assert f"failed: the upscaler {known.name} " in host.comments[0]


def test_the_result_has_the_size_that_was_asked_for(host):
    reply = host.generate(True, 2, {"resize_width": 192}, width=128, height=64)
    assert reply.images[0].size == (192, 96)
    assert parameters(host, reply)["DemoFusion resize width"] == "192"
    given = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 14, 3), np.uint8)).resize((120, 100))
    reply = host.from_pictures([given], True, 2, {"resize_height": 160, "window": 64}, width=40, height=40)
    assert reply.images[0].size == (192, 160)
    assert host.webui.settings.read_pasted(parameters(host, reply))[0]["scale"] == 1.6


# ---------------------------------------------------------------------------------------------------------------- img2img


@pytest.mark.parametrize("start", ["Picture", "img2img result"])
@pytest.mark.parametrize("masked", [False, True])
def test_img2img_with_all_of_them(host, loras, start, masked):
    given = Image.fromarray(np.random.default_rng(1).integers(0, 256, (12, 12, 3), np.uint8)).resize((96, 96), Image.BICUBIC)
    mask = Image.new("L", (96, 96))
    mask.paste(255, (30, 30, 66, 66))
    job = dict(width=96, height=96, prompt=f"{PROMPT} <lora:twist:0.5>", **(dict(mask=mask, mask_blur=0) if masked else {}))
    settings = {**OTHER, "resize_height": 168, "start_from": start, "window": 64 if start == "Picture" else 0}
    torch.manual_seed(0)
    plain, before = host.from_pictures([given], **job), state_of(host)
    with bases(host) as own:
        reply = host.from_pictures([given], True, 2, settings, **job)
    assert reply.images[0].size == (168, 168)
    assert own[0][1] == set()
    assert said(host, reply) == {}
    assert state_of(host) == before
    written = parameters(host, reply)
    assert json.dumps(written["DemoFusion phase prompt"]) == json.dumps(OTHER["phase_prompt"])
    if masked:
        around = np.asarray(given.resize((336, 336), Image.NEAREST).resize((168, 168), Image.Resampling.LANCZOS))
        assert reply.images[0].size == around.shape[:2]
    torch.manual_seed(0)
    assert np.array_equal(pixels(host.from_pictures([given], **job)), pixels(plain))
