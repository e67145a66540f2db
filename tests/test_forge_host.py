"""The extension on a host of Forge's kind, which fake_forge.py stands in for: the same pictures as on AUTOMATIC1111's."""

from contextlib import contextmanager
from types import SimpleNamespace

import fake_forge
import fake_webui
import pytest
import torch
from PIL import Image
from webui_fixtures import assert_same, refusal, said, watch_calls

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


def heun(model, x, sigmas, extra_args, callback):
    for i, (sigma, after) in enumerate(zip(sigmas, sigmas[1:])):
        d = (x - model(x, sigma * x.new_ones(len(x)), **extra_args)) / sigma
        callback({"i": i, "x": x})
        if after > 0:
            tried = x + (after - sigma) * d
            d = (d + (tried - model(tried, after * x.new_ones(len(x)), **extra_args)) / after) / 2
        x = x + (after - sigma) * d
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

# ------------------------------------------------------------------------------------------------------------- the same pictures


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
    "picture": ((True, 2), dict(init_images=[drawing()], denoising_strength=0.6)),
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
    with more_samplers(), fake_forge.installed() as host:
        yield host
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
    assert_same(reply.latents[-1], expected.latents[-1], 1e-5)
    assert reply.infotexts == expected.infotexts
    assert len(reply.images) == len(expected.images)
