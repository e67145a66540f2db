"""The command's phases beside the extension's on the host, from the same base and noise."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import torch
from webui_host import ROOT, command_python

REFERENCE = Path(__file__).with_name("reference.py")


def assert_same(host, options, monkeypatch, tmp_path, scale, h, w, settings, control="", **payload):
    """That both make the same latents at every phase of a base of h x w latent pixels.

    settings: of the method. control: the path of an image that the embedded ControlNet holds the command's picture to.
    payload: what the host's request has besides.
    """
    out = tmp_path / "reference.npz"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    given = [out, str(scale), str(h), str(w), json.dumps(settings), str(control)]
    subprocess.run([command_python(), REFERENCE, *given], check=True, env=env)
    expected = {name: torch.from_numpy(array) for name, array in np.load(out).items()}
    webui, results = host.webui, {}
    post_sample, upscale = webui.loop.post_sample, webui.loop.upscale

    def start_from_the_same(p, ps, *args):
        ps.samples = expected["base"]
        p.sampler_noise_scheduler_override = lambda steps: expected["sigmas"]
        post_sample(p, ps, *args)

    def keep(*args):
        for phase, latents in upscale(*args):
            results[phase.number] = latents.clone()
            yield phase, latents

    options(enable_quantization=True)  # whole timesteps, as diffusers has them
    monkeypatch.setattr(webui.loop, "post_sample", start_from_the_same)
    monkeypatch.setattr(webui.loop, "upscale", keep)
    monkeypatch.setattr(webui.phases.Phases, "noise", lambda self, phase: expected[f"noise{phase.number}"])
    host.generate(
        True, scale, {"jitter": False, **settings},
        prompt="two red striped rings on grass", negative_prompt="blue", steps=5, cfg_scale=5, width=8 * w, height=8 * h,
        **payload,
    )  # fmt: skip
    assert host.comments == []
    assert set(results) == {int(name[7:]) for name in expected if name.startswith("latents")}
    for number, latents in results.items():
        want = expected[f"latents{number}"]
        off = (latents - want) / want.std()
        rms, most = off.square().mean().sqrt().item(), off.abs().max().item()
        print(f"{scale}x of {w}x{h}, phase {number}: differs by {rms:.1e} of the std (RMS), {most:.1e} at most")
        assert rms < 1e-4
        assert most < 5e-4  # two implementations of attention in float32, amplified by guidance step after step
