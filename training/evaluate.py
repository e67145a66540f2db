"""How often the embedded checkpoint draws the right number of objects at 1x: `python -m training.evaluate`.

Scenes and seeds are fixed and were not trained on; the counter is the contact sheet's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lib_demofusion.hosts.diffusers import EMBEDDED_CHECKPOINT, load_pipeline
from training.scenes import Scene, count_objects


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_CHECKPOINT)
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--cfg-scale", type=float, default=7.5)
    parser.add_argument("--output", type=Path, help="also write the pictures as a sheet, ten in a row")
    args = parser.parse_args()

    rng = np.random.default_rng(999)
    scenes = [Scene.draw(rng) for _ in range(args.scenes)]
    pipe = load_pipeline(args.model)
    images = []
    for start in range(0, len(scenes), 20):
        batch = scenes[start : start + 20]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
        prompts = [scene.caption for scene in batch]
        images += [
            *pipe(
                prompts, num_inference_steps=args.steps, guidance_scale=args.cfg_scale, generator=generators, output_type="np"
            ).images
        ]
    images = [(image * 255).round().astype(np.uint8) for image in images]
    for count in (1, 2, 3):
        found = [count_objects(image, scene) for image, scene in zip(images, scenes) if scene.count == count]
        print(f"{count} asked for: {sum(n == count for n in found)} of {len(found)} right; seen: {sorted(found)}")
    if args.output:
        rows = [np.concatenate(images[i : i + 10], 1) for i in range(0, len(images) // 10 * 10, 10)]
        Image.fromarray(np.concatenate(rows)).save(args.output)


if __name__ == "__main__":
    main()
