"""docs/settings.jpg: what each setting does, at 2x from one base image: `make settings-sheet`."""

from __future__ import annotations

import argparse
import functools
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw

from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.hosts.diffusers import generate, load_pipeline

PROMPT, SEED, STEPS = "two blue striped rings on sand", 3, 20
ROWS = {  # setting -> values, the paper's among them
    "alpha1": (1.0, 3.0, 8.0),
    "hold_steps": (0, 50, 200),
    "alpha2": (0.3, 1.0, 5.0),
    "alpha3": (0.3, 1.0, 5.0),
    "blur_sigma": (0.3, 1.0, 3.0),
    "stride": (0.25, 0.5, 1.0),
    "denoising_strength": (0.3, 0.6, 1.0),
    "hold_flat": (0.0, 6.0, 20.0),
    "unguided_flat": (0.0, 25.0, 50.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", type=Path, default=Path("docs/settings.jpg"))
    out = parser.parse_args().o
    pipe = load_pipeline()
    paper = DemoFusionConfig(scale=2.0, view_batch_size=13)
    made = functools.cache(lambda config: generate(pipe, PROMPT, config=config, steps=STEPS, seed=SEED))
    side, gap = 256, 20
    sheet = Image.new("RGB", (4 * side, len(ROWS) * (side + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, values) in enumerate(ROWS.items()):
        y = row * (side + gap)
        for column, value in enumerate(values):
            result = made(replace(paper, **{name: value}))
            if column == 0:
                draw.text((4, y + 4), "the base image, enlarged", fill="black")
                base = result.images(0)[0].resize((side, side), Image.Resampling.LANCZOS)
                sheet.paste(base, (0, y + gap))
            draw.text(((column + 1) * side + 4, y + 4), f"{name} {value:g}", fill="black")
            sheet.paste(result.images()[0], ((column + 1) * side, y + gap))
    sheet.save(out, quality=90)
    print(out)


if __name__ == "__main__":
    main()
