"""Fixtures, which conftest.py hands to pytest, and looks at the host, for the tests on the fake host of fake_webui.py."""

import itertools
import math
from types import SimpleNamespace

import fake_webui
import pytest
import torch

from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.phases import fusion_for, make_plan, upscale


@pytest.fixture(scope="module")
def loaded():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with tensors of this size, more only cost
    with fake_webui.installed() as host:
        yield host
    torch.set_num_threads(threads)


@pytest.fixture
def host(loaded):
    loaded.reset()
    return loaded


@pytest.fixture
def calls(host):
    """What the UNet of the loaded model is asked: calls.inputs; calls.rows counts the latents in it."""
    seen = SimpleNamespace(rows=0, inputs=[])

    def look(module, args, kwargs):
        seen.rows += len(args[0])
        seen.inputs.append((args, kwargs))

    host.unet.register_forward_pre_hook(look, with_kwargs=True)
    return seen


def watch_calls(host, action):
    """action(number, rows) at each call of the UNet from now on: the how manieth it is, and the latents in it."""
    numbers = itertools.count(1)
    return host.unet.register_forward_pre_hook(lambda module, args: action(next(numbers), len(args[0])))


@pytest.fixture
def at_call(host):
    """at_call(n, action): runs the action when the UNet is called for the n-th time from now."""
    return lambda n, action: watch_calls(host, lambda number, rows: action() if number == n else None)


def snapshot(host):
    """Whatever of ours could stay behind on the host."""
    state = host.shared.state
    classes = [
        host.sd_samplers_cfg_denoiser.CFGDenoiser,
        host.sd_samplers_kdiffusion.CFGDenoiserKDiffusion,
        host.sd_samplers_kdiffusion.KDiffusionSampler,
        host.sd_samplers_common.Sampler,
        host.processing.StableDiffusionProcessingTxt2Img,
        host.processing.StableDiffusionProcessingImg2Img,
    ]
    return {
        "model": {
            name: (len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m)), getattr(m, "padding_mode", None))
            for name, m in host.shared.sd_model.named_modules()
        },
        "weights": {name: value.clone() for name, value in host.shared.sd_model.state_dict().items()},
        "classes": [dict(vars(c)) for c in classes],
        "options": dict(vars(host.shared.opts)),
        "state": (state.job, state.job_count, type(state.job_no), state.textinfo, state.interrupted, state.skipped),
        "circular": host.sd_hijack.model_hijack.circular_enabled,
    }


def assert_as_before(host, before):
    after = snapshot(host)
    torch.testing.assert_close(after.pop("weights"), before["weights"], rtol=0, atol=0)
    assert after == {name: value for name, value in before.items() if name != "weights"}


def refusal(reply):
    """The line with which a job was refused, as the API's reply and the form have it."""
    line = reply.p.extra_generation_params["DemoFusion refused"]
    assert reply.comments == [f"DemoFusion: {line}"]
    assert reply.images == reply.latents == []
    assert "\n" not in line
    return line


def said(host, reply, picture=0):
    """What a picture's parameters say of DemoFusion besides its settings."""
    parameters = host.infotext_utils.parse_generation_parameters(reply.infotexts[picture])
    return {key: value for key, value in parameters.items() if key.split()[1:] in (["incomplete"], ["note"], ["refused"])}


def direct_run(models, base, sampler, scale, steps, cfg, seeds, jitter=True, prompts=("a ring", "blue")):
    """The phases by the core, with a sampler written here. models: the one to ask at each step."""
    kept = models[0].alphas_cumprod.double()
    text, negative = (models[0].get_learned_conditioning([prompt]) for prompt in prompts)
    if sampler == "Euler":
        ts = torch.linspace(999, 0, steps).tolist()
        noises = [math.sqrt((1 - kept[int(t)]) / kept[int(t)]) for t in ts] + [0.0]
        signals = [1.0] * (steps + 1)
    else:
        ts = [min(t + 1, 999) for t in range(0, 1000, 1000 // steps)][::-1]
        noises = [math.sqrt(1 - kept[t]) for t in ts]
        signals = [math.sqrt(kept[t]) for t in ts]

    def denoise(phase, reference, noise, areas):
        fusion = fusion_for(plan, phase, plan_config, reference, noise)
        x = fusion.noised_reference(noises[0], signals[0])
        for i, ((n, s), (n2, s2)) in enumerate(itertools.pairwise(zip(noises, signals))):
            fusion.skip_residual_(x, ts[i], n, s)
            scaled = 1 / math.sqrt(1 + n**2) if sampler == "Euler" else 1

            def ask(prompt, i=i, scaled=scaled):
                def answer(crops, views):
                    unet = models[i].model.diffusion_model
                    return unet(crops * scaled, torch.full((len(crops),), float(ts[i])), prompt.expand(len(crops), -1, -1))

                return answer

            with_prompt, without = (fusion.predict(x, ts[i], ask(prompt)) for prompt in (text, negative))
            eps = without + cfg * (with_prompt - without)
            x = s2 * (x - n * eps) / s + n2 * eps
        return x

    def noise(phase):
        return torch.stack([torch.randn(4, *phase.size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    plan_config = DemoFusionConfig(scale=float(scale), jitter=jitter)
    plan = make_plan(tuple(base.shape[-2:]), steps, plan_config)
    return [latents for _, latents in upscale(plan, base, noise, denoise)][-1]


def assert_same(a, b, tolerance=1e-4):
    assert a.shape == b.shape
    assert ((a - b).abs().max() / b.std()).item() < tolerance


def heun(model, x, sigmas, extra_args, callback):
    """A sampler of second order, as the stand-ins take one."""
    for i, (sigma, after) in enumerate(zip(sigmas, sigmas[1:])):
        clean = model(x, sigma * x.new_ones(len(x)), **extra_args)
        callback({"i": i, "x": x})
        d = (x - clean) / sigma
        if after > 0:
            tried = x + (after - sigma) * d
            d = (d + (tried - model(tried, after * x.new_ones(len(x)), **extra_args)) / after) / 2
        x = x + (after - sigma) * d
    return x
