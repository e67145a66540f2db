"""Peaks of memory, measured and foreseen, and times foreseen: `make bench-memory`.

Memory: models of Stable Diffusion 1.5's shape and size, base 512x512, on the CPU, counted in tensors. Numbers that change
no peak are not computed: attention in the decoder, and what follows the first call of the UNet and the first tiles of a
decoding, all of which take the same memory again. Each job's last phase is measured; the ones before it take less.

Time: a UNet of 40 million parameters, 3x; what the pace of one phase says of the next ones, and how long they took.
"""

from __future__ import annotations

import contextlib
import math
import time
from unittest.mock import patch

import torch
import torch.nn.functional as F

from benchmarks import bench, performance
from benchmarks.measure import base_alone
from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.hosts.diffusers import decode_latents, generate, needs, plan_for
from lib_demofusion.memory import Meter, ViewBatch, picture_bytes
from lib_demofusion.phases import Pace
from lib_demofusion.saved import SavedPhase

SCALES = (2.0, 3.0, 4.0, 8.0)
CALLS, TILES = 1, 3  # that are computed


class Enough(Exception):
    """The peak has been seen."""


def sampling_peak(pipe, scale: float, batch: int) -> int:
    """Of the last phase at this scale; of the base image at scale 1."""
    config = DemoFusionConfig(scale=max(scale, 2.0), view_batch_size=batch)
    plan = plan_for(pipe, config, steps=1)
    forward, calls = pipe.unet.forward, []

    def first_calls(x, *args, **kwargs):
        calls.append(len(x))
        return forward(x, *args, **kwargs) if len(calls) <= CALLS else (torch.zeros_like(x),)

    with patch.object(pipe.unet, "forward", first_calls), Meter() as meter:
        if scale == 1:
            base_alone(pipe, config=config)
        else:
            last = plan.phases[-2]
            state = torch.Generator().get_state()[None]
            base = torch.randn(1, 4, *plan.window)
            latents = base if last.number == 1 else torch.randn(1, 4, *last.size)
            before = SavedPhase(last.number, latents, base, "command", state)
            generate(pipe, "", config=config, steps=1, resume=before)
    return meter.peak


def decoding_peak(pipe, size: tuple[int, int], window: tuple[int, int]) -> int:
    tiles = []

    def count(module, args, output):
        tiles.append(1)
        if len(tiles) == TILES and size != window:
            raise Enough

    handle = pipe.vae.decoder.conv_out.register_forward_hook(count)
    attention = patch.object(F, "scaled_dot_product_attention", lambda query, *rest, **more: torch.zeros_like(query))
    with attention, Meter() as meter, contextlib.suppress(Enough):
        decode_latents(pipe, torch.randn(1, 4, *size), window)
    handle.remove()
    return meter.peak


def memory() -> None:
    pipe = performance.pipeline("sd15", "cpu")
    plan = plan_for(pipe, DemoFusionConfig(), steps=1)
    window, weights = plan.window, needs(pipe, plan).weights
    base = weights + max(sampling_peak(pipe, 1, 1), decoding_peak(pipe, window, window))
    mib = 2**20
    print(f"weights {weights / mib:.0f} MiB; the base image with them {base / mib:.0f} MiB at its peak")
    print("scale  views a call  sampling  foreseen  decoding  foreseen     whole  over the base   error  latents  picture")
    for scale in SCALES:
        decoding = None
        for batch in (1, 0):
            plan = plan_for(pipe, DemoFusionConfig(scale=scale, view_batch_size=batch), steps=1)
            need = needs(pipe, plan, ViewBatch(batch, pipe.device).size)
            size = plan.phases[-1].size
            sampling = sampling_peak(pipe, scale, batch)
            decoding = decoding or decoding_peak(pipe, size, window)
            job, foreseen = weights + max(sampling, decoding), need.peak(torch.device("cpu"))
            row = [f"{x / mib:8.0f}" for x in (sampling, need.sampling, decoding, need.decoding + need.picture, job)]
            copies = [f"{x / mib:7.1f}" for x in (math.prod(size) * 16, picture_bytes(size))]
            cells = [
                f"{scale:4.0f}x",
                f"{batch or 'automatic':>12}",
                *row,
                f"{job / base:13.3f}",
                f"{foreseen / job - 1:+6.1%}",
            ]
            print("  ".join(cells + copies), flush=True)


def pace(steps: int = 6) -> None:
    pipe = bench.pipeline("cpu")
    generate(pipe, "", config=DemoFusionConfig(scale=2.0), steps=1)  # warm
    config = DemoFusionConfig(scale=3.0)
    plan = plan_for(pipe, config, steps=steps)
    clock, foreseen, ends = Pace(plan), {}, [time.monotonic()]

    def finished(result, saved):
        ends.append(time.monotonic())
        for phase in plan.phases[saved.number :]:
            foreseen[saved.number, phase.number] = clock.seconds(phase.number)

    generate(
        pipe, "", config=config, steps=steps, progress=lambda phase, views: clock.count(phase.number, views), finished=finished
    )
    print("after phase  of phase  foreseen  took  error")
    for (after, of), seconds in foreseen.items():
        took = ends[of] - ends[of - 1]
        print(f"{after:11}  {of:8}  {seconds:6.1f} s  {took:4.1f}  {seconds / took - 1:+5.1%}")
    both, rest = foreseen[1, 2] + foreseen[1, 3], ends[3] - ends[1]
    print(f"{1:11}  {'rest':>8}  {both:6.1f} s  {rest:4.1f}  {both / rest - 1:+5.1%}")


def main() -> None:
    torch.manual_seed(0)
    memory()
    pace()


if __name__ == "__main__":
    main()
