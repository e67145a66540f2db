"""Fixtures, which conftest.py hands to pytest, and looks at the host, for the tests on the fake host of fake_webui.py."""

import itertools
from types import SimpleNamespace

import fake_webui
import pytest
import torch


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
            name: (len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m)))
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
