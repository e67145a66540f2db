"""The embedded LCM-LoRA: small, read by diffusers, consistent; the same under LDM's names; and its training."""

import copy
import dataclasses
import re

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from evaluation import readers
from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.hosts.diffusers import generate, load_pipeline
from training import export_webui, lcm, train
from training.lcm import LORA, Teacher, consistency, guided_step, make_lora
from training.scenes import Scene, count_objects, crops, render
from training.tile import worn


@pytest.fixture(scope="module")
def pipe():
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def layers(unet):
    """All that a LoRA can change, by name."""
    return {name: x for name, x in unet.named_modules() if isinstance(x, (torch.nn.Linear, torch.nn.Conv2d))}


def delta(down, up):
    """What is added to a weight: [out, into] or, of a convolution, [out, into, height, width]."""
    return (up.flatten(1).float() @ down.flatten(1).float()).view(len(up), *down.shape[1:])


@pytest.fixture(scope="module")
def deltas():
    """What the file adds to the layers' weights, by their name in diffusers."""
    kept = load_file(LORA)
    names = [name.removeprefix("unet.").removesuffix(".lora_A.weight") for name in kept if name.endswith("lora_A.weight")]
    return {name: delta(*(kept[f"unet.{name}.lora_{part}.weight"] for part in "AB")) for name in names}


@pytest.fixture(scope="module")
def few_step_unet(pipe, deltas):
    """The UNet with the LoRA in its weights."""
    unet = copy.deepcopy(pipe.unet)
    for name, layer in layers(unet).items():
        layer.weight.data += deltas[name]
    return unet


def encode(pipe, texts):
    ids = pipe.tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipe.text_encoder(ids).last_hidden_state


def inputs(pipe, t=(259, 699)):
    """Latents, timesteps, texts and the empty text."""
    latents = torch.randn(len(t), 4, 16, 16, generator=torch.Generator().manual_seed(0))
    texts = ["two blue dotted stars on sand", "one red plain disc on snow"]
    return latents, torch.tensor(t), encode(pipe, texts), encode(pipe, ["", ""])


def test_it_is_at_most_2_mb_of_half_precision_for_every_layer_of_the_unet(pipe):
    assert LORA.stat().st_size <= 2_000_000
    want = {f"unet.{name}.lora_{part}.weight" for name in layers(pipe.unet) for part in "AB"}
    with safe_open(LORA, "pt") as file:
        assert set(file.keys()) == want
        assert all(file.get_tensor(key).dtype == torch.float16 for key in want)


@torch.inference_mode()
def test_diffusers_reads_it(few_step_unet):
    pytest.importorskip("peft", reason="diffusers needs the package peft for LoRAs")
    pipe = load_pipeline()
    pipe.load_lora_weights(LORA.parent, weight_name=LORA.name)
    latents, t, text, _ = inputs(pipe)
    want, got = few_step_unet(latents, t, text).sample, pipe.unet(latents, t, text).sample
    assert (got - want).abs().max() < 1e-4 * want.std()


@torch.inference_mode()
def test_the_training_steps_are_the_samplers(pipe):
    """The teacher's is DDIM's of 50 steps, the student's picture LCM's."""
    latents, _, text, empty = inputs(pipe)
    signal = pipe.scheduler.alphas_cumprod
    ddim, lcm = (kind(**train.SCHEDULE, clip_sample=False) for kind in (DDIMScheduler, LCMScheduler))
    ddim.set_timesteps(50)
    for t in (40, 700):
        both = torch.full([2], t)
        given, without = (pipe.unet(latents, t, x).sample for x in (text, empty))
        want = ddim.step(without + 7.5 * (given - without), t, latents).prev_sample
        got = guided_step(pipe.unet, latents, both, both - 20, text, empty, signal)
        assert (got - want).abs().max() < 1e-4 * want.std()
    lcm.set_timesteps(4)
    for t in lcm.timesteps[:3]:
        want = lcm.step(pipe.unet(latents, t, text).sample, t, latents).denoised
        got = consistency(pipe.unet, latents, t.expand(2), text, signal)
        assert (got - want).abs().max() < 1e-4 * want.std()
    assert torch.equal(consistency(pipe.unet, latents, torch.zeros(2).long(), text, signal), latents)


@torch.inference_mode()
@pytest.mark.parametrize(("t", "are_worn", "share"), [(199, False, 0.8), (199, True, 0.8), (399, True, 0.8)])
def test_one_step_is_nearer_to_the_end_of_the_guided_models_path_than_without_it(pipe, few_step_unet, t, are_worn, share):
    """From noisy wholes and close-ups that nothing was trained on, and from worn ones, as a phase has them."""
    pictures, captions = [], []
    for index in range(4):
        rng = np.random.default_rng([21, index])
        scene = Scene.draw(rng)
        pictures.extend(crops(render(scene, rng), rng)[[0, 3]])
        captions.extend([scene.caption] * 2)
    pictures = np.stack(pictures)
    if are_worn:
        pictures = worn(pipe.vae, pictures, np.full(len(pictures), 0.2), torch.Generator().manual_seed(1))
    signal = pipe.scheduler.alphas_cumprod
    latents = pipe.vae.encode(train.to_unit(pictures)).latent_dist.mode() * pipe.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    path = noisy = signal[t].sqrt() * latents + (1 - signal[t]).sqrt() * noise
    text, empty = encode(pipe, captions), encode(pipe, [""] * len(captions))
    all_at = [torch.full([len(captions)], x) for x in (*range(t, 0, -20), 0)]
    for here, before in zip(all_at, all_at[1:]):
        path = guided_step(pipe.unet, path, here, before, text, empty, signal)
    with_it, without = (consistency(x, noisy, all_at[0], text, signal) for x in (few_step_unet, pipe.unet))
    errors = [(x - path).square().mean() for x in (with_it, without)]
    assert errors[0] < share * errors[1]


def test_four_steps_without_guidance_draw_what_was_asked_for(few_step_unet):
    """Without the LoRA such pictures are pale, and objects are missing."""
    rng = np.random.default_rng(999)
    scenes = [Scene.draw(rng) for _ in range(10)]
    pipe = load_pipeline()
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    contrast, seen = [], []
    for unet in (few_step_unet, pipe.unet):
        pipe.unet = unet
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(scenes))]
        settings = dict(num_inference_steps=4, guidance_scale=1.0, generator=generators, output_type="np")
        images = pipe([scene.caption for scene in scenes], **settings).images
        contrast.append(images.std((1, 2)).mean())
        seen.append([count_objects((image * 255).round().astype(np.uint8), scene) for image, scene in zip(images, scenes)])
    assert contrast[0] > 1.4 * contrast[1]
    assert all(seen[0])


@torch.inference_mode()
@pytest.mark.parametrize(
    ("scene", "seed"),
    [(Scene(1, "yellow", "striped", "square", "sand"), 214), (Scene(1, "yellow", "striped", "star", "night"), 297)],
)
def test_phases_with_it_draw_stripes_that_the_base_lacks(pipe, few_step_unet, scene, seed):
    """Of clean and worn pictures alone it had learnt to leave such objects plain."""
    phase_pipe = load_pipeline()
    phase_pipe.unet = few_step_unet
    config = DemoFusionConfig.preset("Few-step", scale=4.0, view_batch_size=16)
    result = generate(pipe, scene.caption, config=config, seed=seed, steps=20, phase_pipe=phase_pipe)
    crop = readers.close_up(np.asarray(result.images()[0]), scene, np.random.default_rng(seed))
    reader = readers.load()
    chances = reader.chances(reader(train.to_unit(crop[None])))["texture"][0]
    assert chances[readers.CLASSES["texture"].index("striped")] > 0.8


@torch.inference_mode()
def test_webui_reads_the_same_changes_of_the_same_layers(pipe, deltas, tmp_path):
    """Layers are told by their weights in the checkpoint as the WebUI reads it, not by our names for them."""
    path = export_webui.export_lora(tmp_path)
    weights = load_file(path)
    names = {name.split(".")[0] for name in weights}
    assert weights.keys() == {f"{name}.{part}" for name in names for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    translated = r"lora_unet_(conv|time_embedding|(down|up|mid)_block)"  # by the WebUI, for another number of layers
    assert not [name for name in names if re.match(translated, name)]
    base, prefix = export_webui.state_dict(), "model.diffusion_model."
    base = {
        "lora_unet_" + name.removeprefix(prefix).removesuffix(".weight").replace(".", "_"): value.float()
        for name, value in base.items()
        if name.startswith(prefix) and name.endswith(".weight") and value.ndim > 1
    }
    assert names == base.keys()
    for name, layer in layers(pipe.unet).items():
        (there,) = [k for k, value in base.items() if value.shape == layer.weight.shape and torch.equal(value, layer.weight)]
        down, up, alpha = (weights[f"{there}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        assert torch.equal(float(alpha) / len(down) * delta(down, up), deltas[name]), name
    with safe_open(path, "pt") as file:
        assert "embedded checkpoint" in file.metadata()["modelspec.description"]


RECIPE = train.Recipe(5, "anywhere", (64, 96, 88), 3, ((2, 1e-3, 1, False), (2, 1e-3, 1, True)), scenes=4)


def build_folder(folder):
    """With the latents of four scenes of noise."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for name in ("latents.pt", "worn.pt"):
        torch.save(torch.randn(4, 4, 4, 16, 16, generator=generator).half(), folder / name)
    return folder


@torch.inference_mode()
@pytest.mark.parametrize(("t", "steps"), [(299, 6), (101, 3), (50, 1), (1, 1)])
def test_a_path_is_followed_to_its_end_in_steps_of_at_most_50(monkeypatch, t, steps):
    teacher, told, made = Teacher(), [], []

    def one_step(unet, noisy, here, before, *others):
        told.append((here.unique().item(), before.unique().item()))
        assert not made or noisy is made[-1]
        made.append(guided_step(unet, noisy, here, before, *others))
        return made[-1]

    monkeypatch.setattr("training.lcm.guided_step", one_step)
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    text = teacher.encode(["two blue dotted stars on sand", "one red plain disc on snow"])
    end = teacher.end(latents, t, text)
    assert len(told) == steps
    assert (told[0][0], told[-1][1]) == (t, 0)
    assert all(0 < here - before <= 50 for here, before in told)
    assert [before for _, before in told[:-1]] == [here for here, _ in told[1:]]
    assert torch.equal(end, made[-1])


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    """A build folder with a LoRA, and a few views that the UNet has seen in phases with it."""
    build = build_folder(tmp_path_factory.mktemp("views") / "build")
    save_file({name: value.float() for name, value in load_file(LORA).items()}, build / "lora.safetensors")
    few = dict(PICTURES=2, VIEWS=4, SHAPES=((16, 16), (8, 16)), BASE_STEPS=10, VIEWS_STAGE=(3, 1e-3, 1))
    with pytest.MonkeyPatch.context() as patched:
        for name, value in few.items():
            patched.setattr(lcm, name, value)
        lcm.make_views(build, RECIPE)
        yield build


def test_views_are_what_the_unet_sees_in_phases_and_where_the_guided_model_goes_from_there(views, pipe):
    seen, signal = torch.load(views / "views.pt"), pipe.scheduler.alphas_cumprod
    assert {shape: own["scene"].unique().tolist() for shape, own in seen.items()} == {(16, 16): [0], (8, 16): [1]}
    for shape, own in seen.items():
        t, noisy, end = own["t"], own["noisy"].float(), own["end"].float()
        assert t.tolist() == [99] * 4 + [199] * 4 + [299] * 4
        assert noisy.shape == end.shape == (12, 4, *shape)
        share = signal[t].view(-1, 1, 1, 1)
        noise, others = (((noisy - share.sqrt() * x) / (1 - share).sqrt()).std((1, 2, 3)) for x in (end, end.roll(1, 0)))
        assert ((noise > 0.8) & (noise < 1.5)).all()
        assert (noise < others).all()


def test_training_on_views_is_seeded_and_goes_on_from_the_lora(views, tmp_path):
    lcm.make_phase_lora(views, RECIPE)
    once = load_file(views / "phase_lora.safetensors")
    for file in ("phase_lora.safetensors", "phase_lora_checkpoint.pt"):
        (views / file).unlink()
    torch.manual_seed(99)
    lcm.make_phase_lora(views, RECIPE)
    again, before = (load_file(views / name) for name in ("phase_lora.safetensors", "lora.safetensors"))
    assert all(torch.equal(value, again[name]) for name, value in once.items())
    moved = torch.stack([(once[name] - value).abs().max() for name, value in before.items()])
    assert (moved > 0).all()
    assert moved.max() < 0.01
    lcm.export(views, tmp_path / "out.safetensors")
    assert all(torch.equal(value, once[name].half()) for name, value in load_file(tmp_path / "out.safetensors").items())


def test_training_is_seeded_and_goes_on_from_its_checkpoint_as_if_it_had_never_stopped(tmp_path):
    whole, parts = (build_folder(tmp_path / name) for name in ("whole", "parts"))
    make_lora(whole, RECIPE)
    make_lora(parts, dataclasses.replace(RECIPE, stages=RECIPE.stages[:1]))
    half = load_file(parts / "lora.safetensors")
    torch.manual_seed(99)
    make_lora(parts, RECIPE)
    whole, parts = (load_file(build / "lora.safetensors") for build in (whole, parts))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert not all(torch.equal(value, half[name]) for name, value in whole.items())
