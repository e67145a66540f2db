"""A contact sheet of the embedded checkpoint: `make sheet`.

For each prompt the 1x picture, enlarged; the model sampled directly at 4x; and DemoFusion at 4x. Prints how many
objects each shows.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from evaluation.methods import Job, direct
from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.hosts.diffusers import generate, load_pipeline
from training.scenes import Scene, count_objects

PROMPTS = [
    Scene(3, "red", "striped", "ring", "grass"),
    Scene(2, "blue", "dotted", "star", "sand"),
    Scene(1, "yellow", "checkered", "square", "night"),
    Scene(3, "purple", "plain", "heart", "snow"),
    Scene(1, "green", "striped", "disc", "sand"),
    Scene(2, "orange", "checkered", "triangle", "sky"),
    Scene(1, "red", "dotted", "heart", "snow"),
    Scene(3, "blue", "plain", "square", "grass"),
    Scene(2, "purple", "striped", "disc", "snow"),
    Scene(1, "orange", "dotted", "ring", "night"),
    Scene(2, "yellow", "dotted", "disc", "night"),
    Scene(3, "green", "checkered", "disc", "snow"),
    Scene(1, "blue", "striped", "star", "snow"),
    Scene(2, "red", "checkered", "square", "sand"),
    Scene(3, "orange", "striped", "star", "sky"),
    Scene(1, "purple", "checkered", "triangle", "grass"),
]
SIDE = 256  # pixels of one picture on the sheet
METHODS = ("1x", "direct 4x", "DemoFusion 4x")


def pictures(pipe, scene: Scene, seed: int, steps: int) -> list[Image.Image]:
    """The three pictures of a scene, each as the method made it."""
    result = generate(pipe, scene.caption, config=DemoFusionConfig(scale=4.0, view_batch_size=16), seed=seed, steps=steps)
    base = result.images(0)[0]
    job = Job(pipe, scene.caption, seed, 4, steps, base, result.phases[0][1], seconds=0.0)
    return [base, direct(job)[0], result.images()[0]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/contact-sheet.jpg"))
    parser.add_argument("--seed", type=int, default=1, help="of every prompt (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=15, help="of each phase (default: %(default)s)")
    args = parser.parse_args()

    pipe = load_pipeline()
    band, gap = 22, 12
    cell = (3 * SIDE + gap, SIDE + band)
    sheet = Image.new("RGB", (2 * cell[0] - gap, len(PROMPTS) // 2 * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    rows = []
    for index, scene in enumerate(tqdm(PROMPTS, unit="prompt")):
        images = pictures(pipe, scene, args.seed, args.steps)
        counts = [count_objects(np.asarray(image), scene) for image in images]
        rows.append((scene, counts))
        x, y = index % 2 * cell[0], index // 2 * cell[1]
        draw.text((x + 4, y + 5), f"{scene.caption}: {' | '.join(METHODS)}", "black")
        for column, image in enumerate(images):
            sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x + column * SIDE, y + band))
        args.output.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(args.output, quality=90)

    print(f"{'prompt':44}  {'1x':>3}  {'direct 4x':>9}  {'DemoFusion 4x':>13}")
    for scene, counts in rows:
        print(f"{scene.caption:44}  {counts[0]:3}  {counts[1]:9}  {counts[2]:13}")
    right = [sum(counts[i] == scene.count for scene, counts in rows) for i in range(3)]
    print(f"{'right count, of ' + str(len(rows)):44}  {right[0]:3}  {right[1]:9}  {right[2]:13}")


if __name__ == "__main__":
    main()
