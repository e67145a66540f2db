"""The embedded tile ControlNet: small, of the embedded UNet's shapes, followed; and the same under LDM's names."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from lib_demofusion.hosts.diffusers import load_pipeline
from training import export_webui, train
from training.scenes import Scene, crops, render, shrink
from training.tile import CONTROLNET, blurred, new_controlnet, worn


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline()


@pytest.fixture(scope="module")
def controlnet():
    return ControlNetModel.from_pretrained(CONTROLNET)


def inputs(unet, rows=2):
    """Latents, timesteps, texts and hints."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, 4, 16, 16), (rows, 77, unet.config.cross_attention_dim)]
    latents, text = (torch.randn(shape, generator=generator) for shape in shapes)
    return latents, torch.tensor([30, 700][:rows]), text, torch.rand(rows, 3, 128, 128, generator=generator)


def test_it_is_at_most_3_mb_of_half_precision_safetensors():
    files = {path.name: path for path in CONTROLNET.iterdir()}
    assert files.keys() == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert sum(path.stat().st_size for path in files.values()) <= 3_000_000
    assert "_name_or_path" not in json.loads(files["config.json"].read_text())
    with safe_open(files["diffusion_pytorch_model.safetensors"], "pt") as file:
        assert all(file.get_tensor(key).dtype == torch.float16 for key in file.keys())  # noqa: SIM118


def test_every_weight_in_its_file_is_read_and_no_other_is_made_up(controlnet):
    kept, used = load_file(CONTROLNET / "diffusion_pytorch_model.safetensors"), controlnet.state_dict()
    assert used.keys() == kept.keys()
    assert all(torch.equal(value, kept[name].float()) for name, value in used.items())


@torch.inference_mode()
def test_it_is_of_the_embedded_unets_shapes(pipe, controlnet):
    seen = []
    for block in pipe.unet.down_blocks:
        block.register_forward_hook(lambda module, args, result: seen.extend(x.shape for x in result[1]))
    latents, t, text, hint = inputs(pipe.unet)
    pipe.unet(latents, t, text)
    down, mid = controlnet(latents, t, text, hint, return_dict=False)
    assert [x.shape for x in down[1:]] == seen, "and one for the first convolution"
    assert down[0].shape == (2, pipe.unet.config.block_out_channels[0], 16, 16)
    assert mid.shape == seen[-1]


@torch.inference_mode()
def test_a_new_one_has_the_unets_weights_and_changes_nothing(pipe):
    new, theirs = new_controlnet(pipe.unet, seed=3), pipe.unet.state_dict()
    own = {name: value for name, value in new.state_dict().items() if not name.startswith("controlnet_")}
    assert all(torch.equal(value, theirs[name]) for name, value in own.items())
    down, mid = new(*inputs(pipe.unet), return_dict=False)
    assert not any(x.any() for x in (*down, mid))


def scenes(count, seed):
    """Scenes that nothing was trained on, each as a whole and as a crop of 4x: uint8 [2 * count, 128, 128, 3]."""
    out, captions = [], []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        scene = Scene.draw(rng)
        out.extend(crops(render(scene, rng), rng)[[0, 3]])
        captions.extend([scene.caption] * 2)
    return np.stack(out), captions


def test_a_hint_is_the_picture_with_less_and_less_detail():
    pictures, _ = scenes(2, seed=11)
    same = blurred(pictures, np.ones(4))
    assert torch.equal(same, torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255)
    lost = [float((blurred(pictures, np.full(4, factor)) - same).square().mean()) for factor in (1.5, 2, 4, 8)]
    assert 0 < lost[0] < lost[1] < lost[2] < lost[3] < 0.05


def test_a_worn_hint_is_what_the_autoencoder_makes_of_half_the_size_with_noise(pipe):
    pictures, _ = scenes(4, seed=11)

    def made(wear):
        return worn(pipe.vae, pictures, np.full(len(pictures), wear), torch.Generator().manual_seed(0)).astype(float)

    clean, noisy, noisier = (made(wear) for wear in (0.0, 0.2, 0.4))
    assert clean.shape == pictures.shape
    assert np.abs(clean - pictures).mean() < 0.2 * np.abs(clean[::-1] - pictures).mean(), "the picture, but for its detail"
    off = [np.square(x - clean).mean() for x in (noisy, noisier)]
    assert 1 < off[0] < 0.7 * off[1]


@torch.inference_mode()
@pytest.mark.parametrize("t", [950, 600])
def test_with_a_hint_the_unet_predicts_the_noise_better(pipe, controlnet, t):
    """Of wholes and of close-ups; at high noise most, where a caption does not say what is where."""
    pictures, captions = scenes(8, seed=12)
    hint = blurred(pictures, np.full(len(pictures), 4.0))
    latents = pipe.vae.encode(train.to_unit(pictures)).latent_dist.mode() * pipe.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    signal = float(pipe.scheduler.alphas_cumprod[t])
    noisy = math.sqrt(signal) * latents + math.sqrt(1 - signal) * noise
    ids = pipe.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    text = pipe.text_encoder(ids).last_hidden_state
    down, mid = controlnet(noisy, t, text, hint, return_dict=False)
    alone = pipe.unet(noisy, t, text).sample
    told = pipe.unet(noisy, t, text, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
    for view in (0, 1):
        errors = [(x - noise)[view::2].square().mean() for x in (told, alone)]
        assert errors[0] < 0.7 * errors[1]


def test_pictures_follow_the_hint(pipe, controlnet):
    """At the strength of guidance that is usual; the hint is of a scene, and the prompt of it too."""
    pictures, captions = scenes(3, seed=13)
    wholes, prompts = pictures[::2], captions[::2]
    hint = blurred(wholes, np.full(3, 4.0))
    controlled = StableDiffusionControlNetPipeline(**pipe.components, controlnet=controlnet, requires_safety_checker=False)
    off = []
    for scale in (1.0, 0.0):
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        settings = dict(num_inference_steps=12, guidance_scale=7.5, output_type="np", generator=generators)
        images = controlled(prompts, image=hint, controlnet_conditioning_scale=scale, **settings).images
        coarse = [shrink((255 * x).astype(np.float32), 8) - shrink(y.astype(np.float32), 8) for x, y in zip(images, wholes)]
        off.append(np.sqrt(np.square(coarse).mean()))
    assert off[0] < 0.4 * off[1]


def ldm_controlnet(weights, latents, t, hint, groups):
    """What sd-webui-controlnet's class ControlNet makes of the weights, for the embedded UNet's blocks."""
    w = {name.removeprefix("control_model."): value.float() for name, value in weights.items()}
    used = set()

    def apply(function, name, *args, **settings):
        used.update((f"{name}.weight", f"{name}.bias"))
        return function(*args, w[f"{name}.weight"], w[f"{name}.bias"], **settings)

    def norm(name, x, eps=1e-5):
        used.update((f"{name}.weight", f"{name}.bias"))
        return F.group_norm(x, groups, w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def residual(name, x):
        h = apply(F.conv2d, f"{name}.in_layers.2", F.silu(norm(f"{name}.in_layers.0", x)), padding=1)
        h = h + apply(F.linear, f"{name}.emb_layers.1", F.silu(emb))[..., None, None]
        h = apply(F.conv2d, f"{name}.out_layers.3", F.silu(norm(f"{name}.out_layers.0", h)), padding=1)
        return h + (apply(F.conv2d, f"{name}.skip_connection", x) if f"{name}.skip_connection.weight" in w else x)

    half = w["time_embed.0.weight"].shape[1] // 2
    angles = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(half) / half)
    emb = apply(F.linear, "time_embed.0", torch.cat([angles.cos(), angles.sin()], 1))
    emb = apply(F.linear, "time_embed.2", F.silu(emb))
    for layer in range(8):
        name, stride = f"input_hint_block.{2 * layer}", 2 if layer in (2, 4, 6) else 1
        hint = apply(F.conv2d, name, F.silu(hint) if layer else hint, padding=1, stride=stride)
    h = apply(F.conv2d, "input_blocks.0.0", latents, padding=1) + hint
    out = [apply(F.conv2d, "zero_convs.0.0", h)]
    for block in range(1, 6):
        down = f"input_blocks.{block}.0.op"
        shrinks = f"{down}.weight" in w
        h = apply(F.conv2d, down, h, padding=1, stride=2) if shrinks else residual(f"input_blocks.{block}.0", h)
        out.append(apply(F.conv2d, f"zero_convs.{block}.0", h))
    h = residual("middle_block.0", h)
    inner = apply(F.conv2d, "middle_block.1.proj_in", norm("middle_block.1.norm", h, 1e-6))
    h = residual("middle_block.2", h + apply(F.conv2d, "middle_block.1.proj_out", inner))
    out.append(apply(F.conv2d, "middle_block_out.0", h))
    assert used == w.keys(), "all of the file is the network's"
    return out


@torch.inference_mode()
def test_it_is_the_same_under_the_names_of_the_webuis_extension(pipe, controlnet, tmp_path):
    path = export_webui.export_controlnet(tmp_path)
    weights = load_file(path)
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    hint = [3, *export_webui.HINT_CHANNELS, 64]  # as wide as the extension builds it
    assert [shapes[f"control_model.input_hint_block.{2 * i}.weight"] for i in range(8)] == [
        (made, given, 3, 3) for given, made in zip(hint, hint[1:])
    ]
    latents, t, text, picture = inputs(pipe.unet)
    down, mid = controlnet(latents, t, text, picture, return_dict=False)
    got = ldm_controlnet(weights, latents, t, picture, pipe.unet.config.norm_num_groups)
    for own, want in zip(got, [*down, mid], strict=True):
        assert (own - want).abs().max() < 1e-4 * want.std()


def test_a_stage_that_the_recipe_lacks_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["train", "--recipe", "tile", "--build", str(tmp_path / "build"), "vae"])
    with pytest.raises(SystemExit):
        train.main()
    assert "no such stage: vae; the recipe has scenes, latents, worn, controlnet, export" in capsys.readouterr().err
    assert not (tmp_path / "build").exists()
