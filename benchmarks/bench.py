"""What the method costs beside the model: `make bench`. Ratios, measured side by side in one run.

The UNet is random and large enough that its time is an honest yardstick; random weights cost what trained ones do.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from benchmarks.measure import Clock, base_alone, now, peak, reset_peak
from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.hosts.diffusers import EMBEDDED_CHECKPOINT, default_device, generate

BASE = 32  # latent pixels per side
BATCHES = (1, 4, 16, 0)


def pipeline(device: str) -> StableDiffusionPipeline:
    """The embedded checkpoint's text encoder and autoencoder with a UNet of 40 million parameters."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=BASE,
        block_out_channels=(96, 192, 384),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=64,
    )
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(EMBEDDED_CHECKPOINT, subfolder="vae"),
        text_encoder=CLIPTextModel.from_pretrained(EMBEDDED_CHECKPOINT, subfolder="text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(EMBEDDED_CHECKPOINT, subfolder="tokenizer"),
        unet=unet,
        scheduler=EulerDiscreteScheduler.from_pretrained(EMBEDDED_CHECKPOINT, subfolder="scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, torch.float32)


def time_shares(device: str, steps: int) -> None:
    pipe = pipeline(device)
    size = sum(p.numel() for p in pipe.unet.parameters()) / 1e6
    print(f"UNet: {size:.0f} million parameters, base latent {BASE}x{BASE}, {steps} step(s) a phase, {device}")
    generate(pipe, "", config=DemoFusionConfig(scale=2.0), steps=1)  # warm
    print("scale  evaluations  of the plan's  outside the UNet")
    clock = Clock(pipe.unet, device)
    for scale in (2.0, 3.0, 4.0):
        clock.reset()
        start = now(device)
        result = generate(pipe, "", config=DemoFusionConfig(scale=scale), steps=steps)
        whole = now(device) - start
        print(
            f"{scale:4.0f}x  {clock.rows:11,}  {clock.rows / result.plan.evaluations:13.3f}  "
            f"{(whole - clock.seconds) / whole:15.2%}",
            flush=True,
        )


def print_peak(device: str, scale: float, batch: int) -> None:
    """Prints the MiB at the peak of one run in this process, model included; scale 1 samples the base alone."""
    pipe = pipeline(device)
    reset_peak(device)  # what loading took does not count
    config = DemoFusionConfig(scale=max(scale, 2.0), view_batch_size=batch)
    if scale == 1:
        base_alone(pipe, config=config)
    else:
        generate(pipe, "", config=config, steps=1)
    print(peak(device) / 2**20)


def memory(device: str) -> None:
    """Each run in a process of its own, since a peak is a process's."""

    def measure(scale: float, batch: int) -> float:
        command = [sys.executable, "-m", "benchmarks.bench", "--device", device, "--peak", f"{scale}", f"{batch}"]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    print("peak, with the model and the process\nview batch size        1x        4x  4x over 1x")
    for batch in BATCHES:
        at_1x, at_4x = measure(1, batch), measure(4, batch)
        print(f"{batch or 'all':>15}  {at_1x:4.0f} MiB  {at_4x:4.0f} MiB  {at_4x / at_1x:10.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--peak", nargs=2, type=float, metavar=("SCALE", "BATCH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print_peak(args.device, args.peak[0], int(args.peak[1]))
    else:
        time_shares(args.device, args.steps)
        memory(args.device)


if __name__ == "__main__":
    main()
