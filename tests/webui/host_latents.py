"""The latents of a fixed list of jobs on the host in WEBUI_DIR, for test_same_on_every_host.py to compare.

    python host_latents.py CHECKPOINTS DATA OUT.safetensors NAME...

In a host of its own. OUT has of each job the base, as "NAME.base", and what becomes of it, as "NAME.final". Jobs with a
ControlNet are left out where the host has none.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

SAMPLERS = [
    "DPM++ 2M", "DPM++ SDE", "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 2S a", "DPM++ 3M SDE", "Euler a", "Euler", "LMS",
    "Heun", "DPM2", "DPM2 a", "DPM fast", "DPM adaptive", "Restart", "DDIM", "DDIM CFG++", "PLMS", "UniPC", "LCM",
]  # fmt: skip

# Name: the tab, DemoFusion's arguments, the request; `control` are the fields of a ControlNet's unit, and of how many steps
# it is.
JOBS = {f"2x, {sampler}": ("txt2img", (True, 2), dict(sampler_name=sampler)) for sampler in SAMPLERS}
JOBS |= {
    "3x": ("txt2img", (True, 3), {}),
    "2.5x, flat areas held": ("txt2img", (True, 2.5, {"hold_flat": 20.0}), {}),
    "2x, late": ("txt2img", (True, 2, {"denoising_strength": 0.5, "stride": 0.75, "feather": True}), {}),
    "2x, enlarged as an image": ("txt2img", (True, 2, {"pixel_upsampling": True, "denoising_strength": 0.5}), {}),
    "2x, not guided where flat": ("txt2img", (True, 2, {"unguided_flat": 20.0}), {}),
    "2x, CFG scale 1": ("txt2img", (True, 2), dict(cfg_scale=1, negative_prompt="blue")),
    "2x, AND": ("txt2img", (True, 2), dict(prompt="one red ring :1.2 AND one blue disc :0.7")),
    "2x, a prompt that changes": ("txt2img", (True, 2), dict(prompt="one [red:blue:0.5] ring")),
    "2x, two images": ("txt2img", (True, 2), dict(batch_size=2)),
    "2x, zero terminal SNR": ("txt2img", (True, 2), dict(override_settings={"sd_noise_schedule": "Zero Terminal SNR"})),
    "2x, a picture": ("img2img", (True, 2), {}),
    "2x, the result of img2img": ("img2img", (True, 2, {"start_from": "img2img result"}), dict(width=128, height=96)),
    "2x, a ControlNet": ("txt2img", (True, 2), dict(control={})),
    "2.5x, a ControlNet for edges": ("txt2img", (True, 2.5), dict(control={"module": "canny", "pixel_perfect": True})),
    "2x, a ControlNet that ends": ("txt2img", (True, 2), dict(control={"weight": 0.6, "steps": 4})),
    "2x, a picture, a ControlNet": ("img2img", (True, 2), dict(control={"weight": 0.6})),
    "2x, a picture for a ControlNet": ("img2img", (True, 2), dict(control={"image": None}, resize_mode=1)),
}
SETTINGS = {"enable_quantization": True}  # whole timesteps, which not all hosts have otherwise


def picture():
    """A smooth one, the same everywhere."""
    from PIL import Image

    rows, columns = np.mgrid[:96, :128] / 16
    waves = [np.sin(rows + columns), np.cos(rows - columns), np.sin(rows * 0.7)]
    return Image.fromarray((127 + 100 * np.stack(waves, -1)).astype(np.uint8))


def hint():
    """Shades of several sizes, larger than any phase and of another aspect, so that it is shrunk and cut."""
    from PIL import Image

    rows, columns = np.mgrid[:240, :320] / 240
    rings = np.sin(40 * np.hypot(rows - 0.4, columns - 0.6))
    squares = np.where((np.floor(rows * 5) + np.floor(columns * 5)) % 2, 60, -60)
    return Image.fromarray((127 + 60 * np.stack([rings, rows, -rings], -1) + squares[..., None]).astype(np.uint8))


def latents_of(host, name, base=None):
    """The base's latents and the last phase's of a job. base: in place of its own."""
    tab, args, payload = JOBS[name]
    payload = {"steps": 6, **payload}
    if "control" in payload:
        import host_controls

        fields = {"image": hint(), **payload.pop("control")}
        if "steps" in fields:
            fields["guidance_end"] = host_controls.end_after(fields.pop("steps"), payload["steps"])
        payload["alwayson_scripts"] = host_controls.scripts(host_controls.model_of(host), **fields)
    kept, loop = [], host.webui.loop
    post_sample = loop.post_sample

    def look(p, ps, *rest):
        if base is not None:
            ps.samples = base.clone()
        kept.append(ps.samples.clone())
        post_sample(p, ps, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "post_sample", look)
        patch.setattr(host.shared.opts, "data", {**host.shared.opts.data, **SETTINGS})
        pictures = {"pictures": [picture()]} if tab == "img2img" else {}
        final = host.latents(*args, **pictures, **payload)
    assert host.comments == []
    return kept[0], final


def main(checkpoints, data, out, *names):
    sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
    import host_controls
    import webui_host
    from safetensors.torch import save_file

    host_controls.add_extension(Path(data))
    host = webui_host.start(Path(checkpoints), Path(data))
    host.shared.opts.data.update(live_previews_enable=False)
    there = {known.name for known in host.sd_samplers.all_samplers}
    tensors = {}
    for name in names:
        payload = JOBS[name][2]
        if payload.get("sampler_name", "Euler") in there and ("control" not in payload or host_controls.model_of(host)):
            base, final = latents_of(host, name)
            tensors |= {f"{name}.base": base.contiguous(), f"{name}.final": final.contiguous()}
    save_file(tensors, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
