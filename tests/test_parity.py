"""The authors' pipeline, state by state. Its vectors: see data/parity/README.md."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import conv2d

from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.fusion import Fusion
from lib_demofusion.phases import make_plan, upscale

DATA = Path(__file__).parent / "data" / "parity"
CASES = json.loads((DATA / "cases.json").read_text())


def run_case(case, arrays):
    """One case through the public core, with Euler as the host's sampler. Yields (phase number, what, tensor)."""
    a = {name: torch.from_numpy(array) for name, array in arrays.items()}
    sigmas, timesteps = a["sigmas"].tolist(), a["timesteps"].tolist()
    config = DemoFusionConfig(
        scale=float(case["scale"]),
        stride=case["stride"] / case["window"],
        jitter=case["jitter"],
        hold_steps=0,
        **dict(zip(("alpha1", "alpha2", "alpha3"), case["alpha"])),
        blur_sigma=case["blur_sigma"],
        blur_sigma_end=case["blur_sigma"] / 100,
    )
    plan = make_plan((case["window"],) * 2, case["steps"], config)
    states, evaluations = [], [2 * case["steps"]]

    def denoise(phase, reference, noise, areas):
        views = dict(window=plan.window, stride=plan.stride, dilation=phase.dilation)
        fusion = Fusion(reference, noise, **views, config=config, blur_taps=2 * phase.number - 1)
        x = fusion.noised_reference(sigmas[0])
        for i, (t, sigma) in enumerate(zip(timesteps, sigmas)):

            def toy(crops, views, sigma=sigma):
                evaluations[0] += 2 * len(crops)
                uncond = torch.tanh(conv2d(crops / math.sqrt(sigma**2 + 1), a["conv_weight"], padding=1) + a["ramp"])
                return uncond + case["cfg_scale"] * (1.2 * uncond - uncond)

            fusion.skip_residual_(x, t, sigma)
            x = x + (sigmas[i + 1] - sigma) * fusion.predict(x, t, toy)
            states.append((phase.number, f"state {i}", x.clone()))  # the skip residual writes to x
        return x

    for phase, latents in upscale(plan, a["phase1_latents"], lambda phase: a[f"phase{phase.number}_noise"], denoise):
        yield from states
        states.clear()
        yield phase.number, "latents", latents
    assert evaluations[0] == plan.evaluations == case["evaluations"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_every_state_of_the_authors_pipeline_is_reproduced(case):
    arrays = dict(np.load(DATA / f"{case['name']}.npz"))
    seen = 0
    for number, what, got in run_case(case, arrays):
        name = f"phase{number}_latents" if what == "latents" else f"phase{number}_states"
        want = torch.from_numpy(arrays[name] if what == "latents" else arrays[name][int(what.split()[1])])
        error = float((got - want).abs().max() / want.std())
        assert error < 1e-5, f"{case['name']}, phase {number}, {what}: off by {error:.1e} of its std"
        seen += 1
    assert seen == (case["scale"] - 1) * (case["steps"] + 1)
