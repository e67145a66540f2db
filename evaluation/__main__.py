"""Methods against each other on the embedded checkpoint: `make evaluate` writes docs/evaluation.md.

Pictures are kept in the build folder, so that a run that was cut short goes on. `--quick` is for development: few
prompts and few steps, whose intervals are wide.
"""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from evaluation import metrics, readers
from evaluation.methods import ABLATION, METHODS, Method, Picture, make, make_job
from lib_demofusion.hosts.diffusers import EMBEDDED_CHECKPOINT, load_pipeline
from training.scenes import CROP, Scene, shrink
from training.train import to_unit

SCENES_SEED, REAL_SEED = 4242, 4243
STRIDE = CROP // 2  # pixels between DemoFusion's windows before their jitter
SIDE = 256  # pixels of a picture on the sheet


def pictures(
    pipe, methods: dict[str, Method], scenes: list[Scene], scale: int, steps: int, build: Path
) -> dict[str, list[Picture]]:
    """Every method's picture of every scene, made now or in an earlier run; under "base" the base images."""
    kept = build / f"{scale}x-{steps}-{zlib.crc32(str(pipe.config.get('_name_or_path')).encode()):08x}"
    made: dict[str, list[Picture]] = {name: [] for name in ("base", *methods)}
    for index, scene in enumerate(tqdm(scenes, "pictures", dynamic_ncols=True)):
        folder = kept / f"{index:04}"
        folder.mkdir(parents=True, exist_ok=True)
        job = None
        for name in made:
            file = folder / f"{name}.png"
            if not file.with_suffix(".json").exists():
                job = job or make_job(pipe, scene.caption, index, scale, steps)
                base = Picture(np.asarray(job.base), 2 * steps, job.seconds)
                picture = base if name == "base" else make(methods[name], job)
                Image.fromarray(picture.image).save(file)
                file.with_suffix(".json").write_text(json.dumps([picture.evaluations, picture.seconds]))
            made[name].append(Picture(np.asarray(Image.open(file)), *json.loads(file.with_suffix(".json").read_text())))
    return made


class Judge:
    """All metrics of a set of pictures; the true renders that they are compared with are of the same size."""

    def __init__(self, reader: readers.Reader, scenes: list[Scene], scale: int, real: int):
        self.reader, self.scenes = reader, scenes
        self.classes = torch.tensor([readers.labels(scene) for scene in scenes])
        true = [readers.true_render(REAL_SEED, index) for index in tqdm(range(real), "true renders", dynamic_ncols=True)]
        true = [(scene, shrink(image.astype(np.float32), 4 // scale).round().astype(np.uint8)) for scene, image in true]
        self.whole, self.close = self.read(*zip(*true))
        self.detail = np.mean([metrics.detail(image) for _, image in true])

    @torch.no_grad()
    def read(self, scenes: list[Scene], images: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of the whole images and of close-ups of them."""
        crops = [readers.close_up(x, s, np.random.default_rng(i)) for i, (s, x) in enumerate(zip(scenes, images))]
        return tuple(self.reader(to_unit(np.stack(x))) for x in ([readers.small(x) for x in images], crops))

    @torch.no_grad()
    def __call__(self, made: list[Picture], bases: list[Picture]) -> dict[str, tuple[float, float, float]]:
        """Metric -> its value and the ends of its interval."""
        images = [picture.image for picture in made]
        features, near = self.read(self.scenes, images)
        chances, near_chances = self.reader.chances(features), self.reader.chances(near)
        names = list(readers.CLASSES)
        right = [(chances[name].argmax(-1) == self.classes[:, names.index(name)]).float().numpy() for name in readers.WHOLE]
        texture = (near_chances["texture"].argmax(-1) == self.classes[:, names.index("texture")]).float().numpy()
        cosine = (torch.nn.functional.normalize(features, dim=-1) * self.reader.captions(self.classes)).sum(-1).numpy()
        means = {
            "count right": [metrics.count_is_right(x, s) for x, s in zip(images, self.scenes)],
            "caption right": np.mean(right, 0),
            "texture right": texture,
            "strays": [metrics.strays(x, s) for x, s in zip(images, self.scenes)],
            "off the base": [metrics.difference_from_base(x, b.image) for x, b in zip(images, bases)],
            "detail": [metrics.detail(x) / self.detail for x in images],
            "seams": [metrics.seams(x, STRIDE) for x in images],
            "CLIP": cosine,
        }
        rows = {name: (float(np.mean(v)), *metrics.interval(np.asarray(v, float))) for name, v in means.items()}
        for prefix, own, real, seen in (("", features, self.whole, chances), ("crop ", near, self.close, near_chances)):
            names = readers.WHOLE if not prefix else readers.CLOSE
            fid = lambda x, real=real: metrics.frechet_distance(x, real.numpy())  # noqa: E731
            rows[f"{prefix}FID"] = (fid(own.numpy()), *metrics.interval(own.numpy(), fid, 200))
            joint = [seen[name].numpy() for name in names]
            score = lambda index, joint=joint: float(np.prod([metrics.inception_score(c[index]) for c in joint]))  # noqa: E731
            everyone = np.arange(len(made))
            rows[f"{prefix}IS"] = (score(everyone), *metrics.interval(everyone, score, 200))
        return rows


def table(rows: dict[str, dict], costs: dict[str, tuple[float, float]]) -> str:
    """rows: method -> metric -> value and interval; costs: method -> evaluations, and time over the base's."""
    names = list(next(iter(rows.values())))
    lines = ["| method | evaluations | time | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 3)]
    for method, row in rows.items():
        cells = [f"{value:.3g} ({low:.3g}-{high:.3g})" for value, low, high in row.values()]
        evaluations, seconds = costs[method]
        lines.append(f"| {method} | {evaluations:,.0f} | {seconds:.1f}x | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sheet(made: dict[str, list[Picture]], scenes: list[Scene], count: int) -> Image.Image:
    """A row for each of the first scenes, a column for each method."""
    page = Image.new("RGB", (SIDE * len(made), (SIDE + 16) * min(count, len(scenes)) + 16), "white")
    draw = ImageDraw.Draw(page)
    for column, (name, own) in enumerate(made.items()):
        draw.text((column * SIDE + 4, 2), name, fill="black")
        for row, (picture, scene) in enumerate(zip(own[:count], scenes)):
            image = Image.fromarray(picture.image).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            page.paste(image, (column * SIDE, 16 + row * (SIDE + 16)))
            if column == 0:
                draw.text((4, 16 + row * (SIDE + 16) + SIDE + 1), scene.caption, fill="black")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="12 prompts, 12 steps")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--scale", type=int, choices=(2, 4), default=4)
    parser.add_argument("--ablation", action="store_true", help="the parts of DemoFusion instead of the methods")
    parser.add_argument("--model", default=EMBEDDED_CHECKPOINT)
    parser.add_argument("--build", type=Path, default=Path("build/evaluation"))
    parser.add_argument("-o", type=Path, default=Path("docs/evaluation.md"))
    args = parser.parse_args()
    prompts, steps = (12, 12) if args.quick else (args.prompts, args.steps)

    rng = np.random.default_rng(SCENES_SEED)
    scenes = [Scene.draw(rng) for _ in range(prompts)]
    reader = readers.load()
    methods = ABLATION if args.ablation else METHODS
    made = pictures(load_pipeline(args.model), methods, scenes, args.scale, steps, args.build)
    judge = Judge(reader, scenes, args.scale, 200 if args.quick else 1000)
    bases = made["base"]
    rows = {name: judge(own, bases) for name, own in made.items() if name != "base"}
    base_seconds = np.mean([picture.seconds for picture in bases])
    costs = {
        name: (np.mean([p.evaluations for p in own]), np.mean([p.seconds for p in own]) / base_seconds)
        for name, own in made.items()
    }
    title = "parts of DemoFusion" if args.ablation else "methods"
    text = f"# Evaluation: {title}, {args.scale}x, {prompts} prompts, {steps} steps\n\n{table(rows, costs)}\n"
    args.o.write_text(text)
    sheet(made, scenes, 8).save(args.o.with_suffix(".jpg"), quality=88)
    print(text)


if __name__ == "__main__":
    main()
