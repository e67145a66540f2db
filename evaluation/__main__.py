"""DemoFusion against other ways to a large picture, its presets and its parts: `make evaluate` writes docs/evaluation.md.

Pictures are kept in the build folder, so that a run that was cut short goes on. `--quick` is for development: few
prompts and few steps, whose intervals are wide. With --inception, --clip, --captions and --real, and a real checkpoint
as --model, the metrics are those of the paper's table 1, by the networks that it uses.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from evaluation import readers, report
from evaluation.drawing import SIZES, TABLES, Task, draw, methods_at, read, start
from evaluation.judges import PhotoJudge, SceneJudge, Set
from evaluation.metrics import Estimate
from lib_demofusion.hosts.diffusers import EMBEDDED_CHECKPOINT
from training.scenes import LAYOUTS, Scene

SCENES_SEED = 4242
SHOWN = 6  # rows of a sheet
TRUE_RENDERS = 1000  # that pictures are compared with


def section(title: str, size: str, tasks: list[Task], judge, out: Path, arithmetic: str) -> Iterator[str]:
    """The report's lines on one table at one size, and its plot and sheet beside it. arithmetic: the UNet's."""
    table, count = TABLES[title], len(tasks)
    bases = [read(task, "base") for task in tasks]
    rows, shown = {}, {"base": [picture.image for picture in bases[:SHOWN]]}
    window = tasks[0].size.window(bases[0].image.shape[:2])
    for name, method in tqdm(table.methods.items(), f"{title}, {size}", dynamic_ncols=True):
        made = [read(task, name) for task in tasks]
        subjects = [task.subject for task in tasks]
        statistics = judge(Set(subjects, [p.image for p in made], [p.image for p in bases], method.stride, window))
        time = np.median([picture.seconds / base.seconds for picture, base in zip(made, bases)])
        measured = {key: Estimate.of(statistics[key], count, judge.draws) for key in table.metrics or statistics}
        rows[name] = report.Row(np.mean([picture.evaluations for picture in made]), time, measured)
        shown[name] = [picture.image for picture in made[:SHOWN]]
    stem = f"{title}-{size.split(',')[0]}".lower().replace(" ", "-")
    report.sheet(shown, [task.caption for task in tasks[:SHOWN]]).save(out / f"{stem}.jpg", quality=85)
    report.plot(rows, out / f"{stem}.svg")
    yield f"## {title}, {size}\n\n{table.about} {count} prompts, {tasks[0].steps} steps, the UNet in {arithmetic}.\n"
    yield from (lines + "\n" for lines in report.tables(rows, table.against, table.apart))
    yield f"![Quality against evaluations]({out.name}/{stem}.svg)\n\n![Pictures]({out.name}/{stem}.jpg)\n"


INTRODUCTION = """# Evaluation

Written by `make evaluate`, of {model}. Captions, seeds and bases are the same for all methods.
Evaluations of the model are counted at the base image's size (a pass at k times the area counts as k), beside those of
the base, which is the same for all (the WebUI's form, the guide and `--plan` count it too: its steps, twice with guidance).
Time is over the base's, the median of the prompts, on the machine that drew them. In brackets: 95 % intervals by
bootstrap over the prompts. **worse** and **better**: the interval of the paired difference from the reference,
{against}, leaves zero out.
"""
SCENES_INTRODUCTION = """
Shares of pictures with as many objects as were asked for, and as the base has; of captions and textures that a network
reads off them. Strays: small repeated objects on the background. Off the base: RMS difference, averaged down, in 0..255.
Detail: energy that the next smaller image cannot hold, over that of true renders, of the whole image, where each
repeated object adds to it, and inside the objects. Seams: steps across the borders of windows over those elsewhere.
CLIP, FID, IS and, of close-ups, crop FID and crop IS: by that network in the roles of CLIP and Inception.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="methods and presets at 16x, 12 prompts, 12 steps, into the build folder")
    add("--prompts", type=int, default=200, help="of each table (default: %(default)s)")
    add("--steps", type=int, default=50, help="of the base and of each phase (default: %(default)s)")
    add("--sizes", nargs="+", choices=SIZES, help="default: all")
    add("--tables", nargs="+", choices=TABLES, help="default: all")
    add("--no-draw", action="store_true", help="report on the pictures that are there, however many prompts they are of")
    add("--model", help="folder, file or hub name, as of the command (default: the embedded checkpoint)")
    add("--layout", choices=LAYOUTS, default="anywhere", help="of the scenes that it was trained on (default: %(default)s)")
    add("--device", default="cpu")
    add("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    add("--openvino", action="store_true", help="the UNet by OpenVINO, in bfloat16 (pip install openvino); on a CPU")
    add("--workers", type=int, default=0, help="default: one for each CPU core; one on a GPU")
    add("--build", type=Path, default=Path("build/evaluation"))
    add("-o", type=Path, default=Path("docs/evaluation.md"))
    photo = parser.add_argument_group("the paper's own metrics", "all four, together with a real checkpoint as --model")
    photo.add_argument("--inception", type=Path, help="Inception v3 in TorchScript: inception-2015-12-05.pt")
    photo.add_argument("--clip", type=Path, help="folder of a CLIP model, as transformers saves it")
    photo.add_argument("--captions", type=Path, help="text file, a caption a line; the paper: 1,000 of LAION-5B")
    photo.add_argument("--real", type=Path, help="folder of real images")
    args = parser.parse_args()
    given = [args.inception, args.clip, args.captions, args.real]
    if any(given) and not all(given):
        parser.error("--inception, --clip, --captions and --real belong together")
    if args.model and any(TABLES[title].embedded for title in args.tables or ()):
        parser.error("the table Control is of the embedded checkpoint, which its ControlNet is for; leave --model out")
    if args.openvino and (args.device, args.dtype) != ("cpu", "float32"):
        parser.error("--openvino is for a CPU, and has a dtype of its own; leave --device and --dtype out")
    run(args)


def run(args: argparse.Namespace) -> None:
    prompts, steps, out = args.prompts, args.steps, args.o
    titles = args.tables or [title for title, table in TABLES.items() if not (args.model and table.embedded)]
    sizes = args.sizes or list(SIZES)
    if args.quick:
        prompts, steps, out = 12, 12, args.build / "quick.md"
        titles, sizes = args.tables or ["Methods", "Presets"], args.sizes or ["16x"]
    rng = np.random.default_rng(SCENES_SEED)
    subjects = [Scene.draw(rng) for _ in range(prompts)]
    if args.captions:
        subjects = args.captions.read_text().splitlines()[:prompts]
        sizes = [size for size in sizes if not SIZES[size].given]  # of what there is no true render

    model = args.model or str(EMBEDDED_CHECKPOINT)
    name = f"{Path(model).name}-{zlib.crc32(model.encode()):08x}" if args.model else "embedded"
    arithmetic = "bfloat16, by OpenVINO" if args.openvino else args.dtype
    suffix = "-openvino" if args.openvino else "" if args.dtype == "float32" else f"-{args.dtype}"
    kept = args.build / f"{name}-{steps}{suffix}"
    tasks = {
        size: [Task(kept / size, i, subject, SIZES[size], steps, methods, args.layout) for i, subject in enumerate(subjects)]
        for size in sizes
        if (methods := methods_at(size, titles))
    }
    if not args.no_draw:
        todo = [task for row in zip(*tasks.values()) for task in row if task.missing(task.methods)]
        workers = args.workers or (os.cpu_count() or 1 if args.device == "cpu" else 1)
        starting = partial(start, model, args.device, args.dtype, args.openvino)
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), starting) as pool:
            list(tqdm(pool.map(draw, todo), "pictures", len(todo), dynamic_ncols=True))

    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    against = " or ".join(dict.fromkeys(name for title in titles for name in TABLES[title].references))
    seen = f"the checkpoint `{Path(model).name}`" if args.model else "the embedded checkpoint"
    if args.layout != "anywhere":
        seen += f", which was trained on scenes in a {args.layout}"
    text = [INTRODUCTION.format(model=seen, against=against) + ("" if args.captions else SCENES_INTRODUCTION)]
    judges, jobs = {}, [(title, size) for title in titles for size in TABLES[title].sizes if size in tasks]
    for title, size in jobs:
        own = [task for task in tasks[size] if not task.missing(TABLES[title].methods)]
        if not own:
            continue
        picture, base = (read(own[0], name).image for name in (TABLES[title].against, "base"))
        if size not in judges:
            if args.inception:
                judges[size] = PhotoJudge(args.inception, args.clip, args.real, base.shape[:2], args.device)
            else:
                few = args.quick or SIZES[size].given  # where there is no FID
                real = min(TRUE_RENDERS, 200) if few else TRUE_RENDERS
                judges[size] = SceneJudge(readers.load(), picture.shape[:2], real, args.layout)
        text += section(title, size, own, judges[size], folder, arithmetic)
    out.write_text("\n".join(text))
    print(out)


if __name__ == "__main__":
    main()
