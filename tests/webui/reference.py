"""Phases by the command's host, on diffusers, for test_same_as_command.py.

python reference.py OUT.npz SCALE HEIGHT WIDTH SETTINGS CONTROL. SETTINGS: as JSON. HEIGHT and WIDTH are the base's, in
latent pixels. CONTROL: the path of an image for the embedded ControlNet, or nothing. Everything random comes from one
generator here and goes along.
"""

import json
import sys

import numpy as np
import torch
from PIL import Image

from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.hosts import diffusers, diffusers_run
from lib_demofusion.saved import SavedPhase

PROMPT, NEGATIVE, STEPS, CFG = "two red striped rings on grass", "blue", 5, 5.0


def main(out, scale, h, w, settings, control):
    pipe = diffusers.load_pipeline()
    controls = ()
    if control:
        controlnet = diffusers.load_controlnet(diffusers.EMBEDDED_CHECKPOINT / "controlnet", pipe)
        controls = [diffusers.Control(controlnet, Image.open(control).convert("RGB"))]
    config = DemoFusionConfig(scale=scale, jitter=False, view_batch_size=3, **settings)
    plan = diffusers.plan_for(pipe, config, height=8 * h, width=8 * w, steps=STEPS, cfg_scale=CFG)
    generator = torch.Generator().manual_seed(7)
    base = torch.randn(1, 4, h, w, generator=generator)
    base[..., : w // 2] = 0  # a plain half
    noises = {p.number: torch.randn(1, 4, *p.size, generator=generator) for p in plan.phases[1:]}
    arrays = {"base": base}

    def noise(run, phase):
        arrays["sigmas"] = run.phase_schedule.sigmas
        return noises[phase.number]

    diffusers_run.Run.noise = noise
    job = dict(config=config, height=8 * h, width=8 * w, steps=STEPS, cfg_scale=CFG, controls=controls)
    saved = SavedPhase(1, base, base, "command", torch.Generator().get_state()[None])
    result = diffusers.generate(pipe, PROMPT, negative_prompt=NEGATIVE, resume=saved, **job)
    for phase, latents in result.phases[1:]:
        arrays[f"noise{phase.number}"] = noises[phase.number]
        arrays[f"latents{phase.number}"] = latents
    np.savez(out, **{name: array.numpy() for name, array in arrays.items()})


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), json.loads(sys.argv[5]), sys.argv[6])
