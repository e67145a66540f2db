"""Memory and time on models of real size: `make performance` writes docs/performance.md.

Random weights cost what trained ones do. Each row of the first table is a few steps of each phase, with a share of time spent
outside the UNet, and beside it the yardstick: plain calls of the same UNet on as many views. The second table has whole
pictures, with the presets.
On a GPU the models are those of Stable Diffusion 1.5 and XL in half precision; `--small` is for machines without one.
"""

from __future__ import annotations

import argparse
import json
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
from lib_demofusion.config import DemoFusionConfig, first_line
from lib_demofusion.hosts.diffusers import EMBEDDED_CHECKPOINT, Incomplete, default_device, generate, unet_inputs
from lib_demofusion.memory import is_out_of_memory

# Height, width, a cap of the memory, GiB, and how many steps are timed.
ROWS = {
    "xl": [
        (2048, 2048, None, 4),
        (2048, 4096, None, 4),
        *[(4096, 4096, cap, 2) for cap in (None, 8)],
        (8192, 8192, None, 1),
    ],
    "sd15": [(2048, 2048, None, 4), (4096, 4096, None, 2)],
    "small": [(512, 512, None, 1), (512, 1024, None, 1), (768, 768, None, 1)],
}
WHOLE = {"xl": (4096, 4096), "small": (512, 512)}  # the size of the whole pictures
WHOLE_PRESETS = ("Turbo", "Fast")
STEPS = {"xl": 50, "small": 4}  # of the base of a whole picture
ONE_PASS = 4096 * 4096  # pixels; above, one call of the whole takes minutes


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


def base_for(pipe, height: int, width: int) -> tuple[dict, float]:
    """The base's size, pixels, and the scale. The long side is a whole multiple; the base has the picture's proportions."""
    scale = min(height, width) / (pipe.unet.config.sample_size * 8)
    return dict(height=round(height / scale), width=round(width / scale)), max(scale, 2.0)


def measure(pipe, kind: str, device: str, height: int, width: int, cap: float | None, steps: int) -> list[str]:
    """One row of the first table: some steps of each phase."""
    base, scale = base_for(pipe, height, width)
    config = DemoFusionConfig(scale=scale)
    clock = Clock(pipe.unet, device)
    reset_peak(device)
    base_alone(pipe, config=config, steps=3, **base).images(0)
    at_base = peak(device) / 2**30
    reset_peak(device)
    ends: list[float] = []

    def finished(*_) -> None:
        if not ends:
            clock.reset()
        ends.append(now(device))

    try:
        result = generate(pipe, "", config=config, steps=steps, **base, finished=finished)
        sampled, inside = ends[-1] - ends[0], clock.seconds
        decoding = now(device)
        result.images()
    except (Incomplete, RuntimeError) as error:
        return [*label(kind, width, height, cap), f"{at_base:.1f}", first_line(error)]
    finally:
        clock.remove()
    decoding, at_most = now(device) - decoding, peak(device) / 2**30
    fitted, whole = result.view_batch.fitted, None
    views = steps * sum(phase.views for phase in result.plan.phases[1:])
    plain = views * min(yardstick(pipe, device, result.plan.window, batch) for batch in {1, fitted})
    if height * width <= ONE_PASS:
        whole = one_pass(pipe, device, result.plan.phases[-1].size)
    return [
        *label(kind, width, height, cap),
        f"{at_base:.1f}",
        f"{at_most:.1f} ({at_most / at_base:.2f})",
        " / ".join(f"{(b - a) / steps:.2f}" for a, b in zip(ends, ends[1:])),
        f"{decoding:.1f}",
        f"{(sampled - inside) / sampled:.1%}",
        f"{sampled / plain:.2f}",
        f"{fitted}",
        f"{whole:.2f}" if whole else "",
    ]


def label(kind: str, width: int, height: int, cap: float | None) -> list[str]:
    return [kind, f"{width}x{height}", f"{cap} GiB" if cap else "none"]


def seconds_a_call(pipe, device: str, size: tuple[int, int], views: int, calls: int) -> float:
    """Seconds of one plain UNet call on so many crops of (h, w) latent pixels in both branches, the mean of `calls`."""
    x, conditions = unet_inputs(pipe.unet, 2 * views, size, device)
    with torch.inference_mode():
        pipe.unet(x, 500, **conditions)
        began = now(device)
        for _ in range(calls):
            pipe.unet(x, 500, **conditions)
        return (now(device) - began) / calls


def yardstick(pipe, device: str, window: tuple[int, int], batch: int) -> float:
    """Seconds a view of plain UNet calls, `batch` views each."""
    return seconds_a_call(pipe, device, window, batch, calls=max(1, 16 // batch)) / batch


def one_pass(pipe, device: str, size: tuple[int, int]) -> float | None:
    """Seconds a step of a single pass over the whole picture, as Hires. fix makes it; None where it does not fit."""
    try:
        return seconds_a_call(pipe, device, size, 1, calls=1)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


def whole_picture(pipe, kind: str, device: str, preset: str) -> list[str]:
    """One row of the second table: a picture from the prompt to its pixels, with a preset."""
    height, width = WHOLE[kind]
    base, scale = base_for(pipe, height, width)
    ends, began = [], now(device)
    config = DemoFusionConfig.preset(preset, scale=scale)
    result = generate(pipe, "", config=config, steps=STEPS[kind], **base, finished=lambda *_: ends.append(now(device)))
    sampled = now(device)
    result.images()
    done = now(device)
    evaluations = sum(phase.branches * phase.evaluations for phase in result.plan.phases[1:])
    at_base, phases, decoding = ends[0] - began, sampled - ends[0], done - sampled
    return [
        preset,
        f"{evaluations:,}",
        *(f"{part:.1f}" for part in (at_base, phases, decoding, done - began)),
        f"{(done - began) / at_base:.1f}",
    ]


HEAD = ["model", "size", "memory cap", "base, GiB", "whole job, GiB (over the base)", "seconds a step, by phase", "decoding, s"]
HEAD += ["outside the UNet", "time over plain calls", "view batch", "a step of one pass over the whole, s"]
WHOLE_HEAD = ["preset", "evaluations after the base", "base, s", "phases, s", "decoding, s", "all, s", "all over the base"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small model and small sizes, for a CPU")
    parser.add_argument("-o", type=Path, default=Path("docs/performance.md"))
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)  # kind and number of a row that has a cap
    args = parser.parse_args()
    device = default_device()
    if args.row:
        kind, row = args.row[0], ROWS[args.row[0]][int(args.row[1])]
        pipe = pipeline(kind, device)  # made in single precision
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(row[2] * 2**30 / torch.cuda.mem_get_info()[1])
        print("\n" + json.dumps(measure(pipe, kind, device, *row)))
        return
    if device != "cuda" and not args.small:
        sys.exit("models of real size need a GPU; --small runs small ones on the CPU")
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or platform.machine()} CPU"
    kinds = ("small",) if args.small else ("xl", "sd15")
    rows: list[list[str]] = []
    wholes: list[list[str]] = []

    def add(to: list[list[str]], row: list[str]) -> None:
        to.append(row)
        print(" | ".join(row), flush=True)
        args.o.write_text(page(name, rows, wholes, kinds, device))  # what is measured is never lost

    for kind in kinds:
        pipe = pipeline(kind, device)
        for preset in WHOLE_PRESETS if kind in WHOLE else ():
            add(wholes, whole_picture(pipe, kind, device, preset))
        for number, row in enumerate(ROWS[kind]):
            if row[2] is None:
                add(rows, measure(pipe, kind, device, *row))
            else:  # in a process of its own, whose memory nothing else has been in
                command = [sys.executable, "-m", __spec__.name, "--row", kind, str(number)]
                run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                add(rows, json.loads(run.stdout.strip().splitlines()[-1]))


def table(head: list[str], rows: list[list[str]]) -> str:
    rows = [[*row, *[""] * (len(head) - len(row))] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def page(name: str, rows: list[list[str]], wholes: list[list[str]], kinds: tuple[str, ...], device: str) -> str:
    missing = "" if device == "cuda" else "\n**Figures of a GPU are missing**: none was at hand when this was written.\n"
    height, width = WHOLE[kinds[0]]
    return f"""# Memory and time

Written by `make performance` on: {name}, torch {torch.__version__}. Random weights, guidance on, Euler.
{missing}
## A step of each phase, the paper's settings

{table(HEAD, rows)}

- *base*: the peak of the base image alone, decoded. *whole job*: the peak up to the finished picture. On a GPU it is the
  GPU's memory, on a CPU the process's.
- *seconds a step, by phase*: from phase 2 on. A job of 50 steps takes 50 times as long.
- *time over plain calls*: the phases' time over that of plain UNet calls on as many views, in batches of one view or of as
  many as the job chose, whichever is faster, in the same process.
- *a step of one pass over the whole*: a plain UNet call on the latents of the whole picture, which is what Hires. fix does
  at each of its steps. Empty: out of memory, or not tried above 4096x4096.

## Whole pictures, {width}x{height}, a base of {STEPS[kinds[0]]} steps

{table(WHOLE_HEAD, wholes)}
"""


if __name__ == "__main__":
    main()
