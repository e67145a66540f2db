"""Memory and time on models of real size: `make performance` writes docs/performance.md.

Random weights cost what trained ones do. Each row is one step of each phase, with a share of time spent outside the UNet,
and beside it the yardstick: plain calls of the same UNet on as many views, in batches of the base image's own size.
On a GPU the models are those of Stable Diffusion 1.5 and XL in half precision; `--small` is for machines without one.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from benchmarks.measure import Clock, base_alone, now, peak, reset_peak
from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.hosts.diffusers import EMBEDDED_CHECKPOINT, Incomplete, default_device, generate, unet_inputs
from lib_demofusion.memory import is_out_of_memory

SIZES = {"xl": [(2048, 2048), (2048, 4096), (3072, 3072), (4096, 4096), (8192, 8192)], "sd15": [(2048, 2048), (4096, 4096)]}
SMALL_SIZES = {"small": [(512, 512), (512, 1024), (768, 768)]}
CAPS = (None, 24, 12, 8)  # GiB


def unet(kind: str) -> UNet2DConditionModel:
    """The UNet of Stable Diffusion 1.5, of XL, or one that a CPU can run."""
    if kind == "xl":
        return UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    if kind == "sd15":
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    return UNet2DConditionModel(sample_size=32, block_out_channels=(96, 192, 384, 384), cross_attention_dim=64)


def text_encoder(width: int, projected: bool = False) -> torch.nn.Module:
    """One layer of the right width: the prompt is encoded once, so it costs nothing that counts here."""
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED_CHECKPOINT, subfolder="tokenizer")
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def pipeline(kind: str, device: str):
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED_CHECKPOINT, subfolder="tokenizer")
    channels = (32, 64, 128, 128) if kind == "small" else (128, 256, 512, 512)
    with torch.device(device):
        parts = dict(
            unet=unet(kind),
            vae=AutoencoderKL(
                block_out_channels=channels,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=4,
            ),
            tokenizer=tokenizer,
            scheduler=EulerDiscreteScheduler.from_pretrained(EMBEDDED_CHECKPOINT, subfolder="scheduler"),
        )
        if kind == "xl":
            parts |= dict(text_encoder=text_encoder(768), text_encoder_2=text_encoder(1280, True), tokenizer_2=tokenizer)
            pipe = StableDiffusionXLPipeline(**parts, add_watermarker=False)
        else:
            none = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
            pipe = StableDiffusionPipeline(**parts, text_encoder=text_encoder(768 if kind == "sd15" else 64), **none)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, torch.float16 if device == "cuda" else torch.float32)


def measure(kind: str, device: str, height: int, width: int, cap: float | None) -> list[str]:
    """One row of the table, in a process of its own."""
    if cap is not None:
        torch.cuda.set_per_process_memory_fraction(cap * 2**30 / torch.cuda.mem_get_info()[1])
    pipe = pipeline(kind, device)
    native = pipe.unet.config.sample_size * 8
    # The long side is a whole multiple; the base has the picture's proportions.
    scale = min(height, width) / native
    base = dict(height=round(height / scale), width=round(width / scale))
    config = DemoFusionConfig(scale=max(scale, 2.0))
    clock = Clock(pipe.unet, device)
    reset_peak(device)
    base_alone(pipe, config=config, steps=3, **base).images(0)
    at_base = peak(device) / 2**30
    reset_peak(device)
    clock.reset()
    ends, began = [], now(device)
    try:
        result = generate(pipe, "", config=config, steps=1, **base, finished=lambda *_: ends.append(now(device)))
    except Incomplete as error:
        return [*label(kind, width, height, cap), f"{at_base:.1f}", str(error), *[""] * 5]
    sampled, inside = now(device) - began, clock.seconds
    result.images()
    decoding, at_most = now(device) - began - sampled, peak(device) / 2**30
    phases = " / ".join(f"{b - a:.1f}" for a, b in zip(ends, ends[1:]))
    plain = yardstick(pipe, device, result.plan)
    return [
        *label(kind, width, height, cap),
        f"{at_base:.1f}",
        f"{at_most:.1f} ({at_most / at_base:.2f})",
        phases,
        f"{decoding:.1f}",
        f"{(sampled - inside) / sampled:.1%}",
        f"{(ends[-1] - ends[0]) / plain:.2f}",
        f"{result.view_batch.fitted}",
    ]


def label(kind: str, width: int, height: int, cap: float | None) -> list[str]:
    return [kind, f"{width}x{height}", f"{cap} GiB" if cap else "none"]


def yardstick(pipe, device: str, plan) -> float:
    """Seconds of plain UNet calls, in batches of the base image's size, on as many views as the phases look at."""
    unet = pipe.unet
    x, conditions = unet_inputs(unet, plan.branches, plan.window, device)
    calls = sum(phase.views for phase in plan.phases[1:])
    timed = min(calls, 20)
    with torch.inference_mode():
        unet(x, 500, **conditions)
        began = now(device)
        for _ in range(timed):
            unet(x, 500, **conditions)
        return (now(device) - began) * calls / timed


HEAD = ["model", "size", "memory cap", "base, GiB", "whole job, GiB (over the base)", "seconds a step, by phase", "decoding, s"]
HEAD += ["outside the UNet", "time over plain calls", "view batch"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small model and small sizes, for a CPU")
    parser.add_argument("-o", type=Path, default=Path("docs/performance.md"))
    parser.add_argument("--row", nargs=4, help=argparse.SUPPRESS)  # kind, height, width, cap
    args = parser.parse_args()
    device = default_device()
    if args.row:
        kind, height, width, cap = args.row
        try:
            row = measure(kind, device, int(height), int(width), float(cap) if float(cap) else None)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            row = [*label(kind, int(width), int(height), float(cap)), "does not fit", *[""] * 6]
        print("| " + " | ".join(row) + " |")
        return
    if device != "cuda" and not args.small:
        sys.exit("models of real size need a GPU; --small runs small ones on the CPU")
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or platform.machine()} CPU"
    rows = []
    for kind, sizes in (SMALL_SIZES if args.small else SIZES).items():
        for height, width in sizes:
            for cap in CAPS if device == "cuda" else (None,):
                row = [kind, str(height), str(width), str(cap or 0)]
                run = subprocess.run(
                    [sys.executable, "-m", __spec__.name, "--row", *row], check=True, capture_output=True, text=True
                )
                rows.append(run.stdout.strip().splitlines()[-1])
                print(rows[-1], flush=True)
    args.o.write_text(page(name, rows, device))


def page(name: str, rows: list[str], device: str) -> str:
    missing = "" if device == "cuda" else "\n**Figures of a GPU are missing**: none was at hand when this was written.\n"
    table = "\n".join(["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD), *rows])
    return f"""# Memory and time

Written by `make performance` on: {name}, torch {torch.__version__}. Random weights, guidance on, Euler, the paper's settings.
{missing}
{table}

- *base*: the peak of the base image alone, decoded. *whole job*: the peak up to the finished picture. On a GPU it is the
  GPU's memory, on a CPU the process's.
- *time over plain calls*: the phases' time over that of plain UNet calls on as many views, one view of both branches at a
  time, in the same process. Below 1 is what larger view batches gain.
- *seconds a step, by phase*: from phase 2 on. A job of 50 steps takes 50 times as long.
"""


if __name__ == "__main__":
    main()
