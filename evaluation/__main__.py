"""DemoFusion against other ways to a large picture, its presets and its parts: `make evaluate` writes docs/evaluation.md.

Each picture is kept in the build folder, with what it scored, so that a run that was cut short goes on. What all of them
scored is kept beside the report, a small file a size (docs/evaluation/scores-16x.npz), and the report is made of these files
alone: what they hold is not drawn again, other prompts, methods and sizes add to it, and --from-scores makes the report
without any picture. `--quick` is for development: few prompts and few steps, whose intervals are wide. With --inception,
--clip, --captions and --real, and a real checkpoint as --model, the metrics are those of the paper's table 1, by the networks
that it uses; what pictures scored is then kept in the build folder alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import zlib
from collections.abc import Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from evaluation import report
from evaluation.drawing import SIZES, TABLES, Task, draw, judge_drawn, label, methods_at, read, start
from evaluation.judges import PhotoJudge, SceneJudge, real_images
from evaluation.scores import BASE, Refused, Scores
from lib_demofusion.hosts.diffusers import EMBEDDED_CHECKPOINT
from training.scenes import LAYOUTS, Scene

SCENES_SEED = 4242
TRUE_RENDERS = 1000  # that pictures are compared with
DRAWING = ("quick", "prompts", "steps", "sizes", "tables", "no_draw", "model", "openvino", "inception")  # options of a run


def prompt_range(text: str) -> range:
    """ "200": the first 200; "100:200": those from number 100 on, up to number 199."""
    first, colon, last = text.rpartition(":")
    try:
        found = range(int(first or 0), int(last))
    except ValueError:
        found = range(0)
    if not found or found.start < 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number of prompts, as 200, nor a range of them, as 100:200")
    return found


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="methods and presets at 16x, 12 prompts, 12 steps, into the build folder")
    add("--prompts", type=prompt_range, help="of each table: the first so many, or a range, as 100:200 (default: 200)")
    add("--steps", type=int, help="of the base and of each phase (default: 50)")
    add("--sizes", nargs="+", choices=SIZES, help="default: all")
    add("--tables", nargs="+", choices=TABLES, help="default: all")
    add("--no-draw", action="store_true", help="report on the pictures that are there, however many prompts they are of")
    add(
        "--from-scores",
        nargs="*",
        type=Path,
        metavar="FOLDER",
        help="draw and score nothing: the report of the scores beside it, and of those in these folders, which are added",
    )
    add("--anew", action="store_true", help="leave aside the scores beside the report; they are written over")
    add("--model", help="folder, file or hub name, as of the command (default: the embedded checkpoint)")
    add("--layout", choices=LAYOUTS, default="anywhere", help="of the scenes that it was trained on (default: %(default)s)")
    add("--device", default="cpu")
    add("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    add("--openvino", action="store_true", help="the UNet by OpenVINO, in bfloat16 (pip install openvino); on a CPU")
    add("--workers", type=int, default=0, help="default: one for each CPU core; one on a GPU")
    add("--build", type=Path, default=Path("build/evaluation"))
    add("-o", type=Path, help="default: docs/evaluation.md; with --quick, quick.md in the build folder")
    photo = parser.add_argument_group("the paper's own metrics", "all four, together with a real checkpoint as --model")
    photo.add_argument("--inception", type=Path, help="Inception v3 in TorchScript: inception-2015-12-05.pt")
    photo.add_argument("--clip", type=Path, help="folder of a CLIP model, as transformers saves it")
    photo.add_argument("--captions", type=Path, help="text file, a caption a line; the paper: 1,000 of LAION-5B")
    photo.add_argument("--real", type=Path, help="folder of real images")
    return parser


class Run:
    """What is asked for, what of it is there, and the drawing, scoring and reporting of it."""

    def __init__(self, args: argparse.Namespace, out: Path):
        """Refused where there are scores beside the report that pictures as are asked for do not add to."""
        self.args, self.out, self.prompts = args, out, args.prompts or range(12 if args.quick else 200)
        steps = args.steps or (12 if args.quick else 50)
        self.titles = args.tables or [title for title, table in TABLES.items() if not (args.model and table.embedded)]
        sizes = args.sizes or list(SIZES)
        if args.quick:
            self.titles, sizes = args.tables or ["Methods", "Presets"], args.sizes or ["16x"]
        self.subjects: Sequence[Scene | str] = scenes(self.prompts.stop)
        if args.captions:
            for path in (args.inception, args.clip, args.captions):
                if not path.exists():
                    raise Refused(f"there is no {path}")
            real_images(args.real)
            self.subjects = args.captions.read_text().splitlines()[: self.prompts.stop]
            sizes = [size for size in sizes if not SIZES[size].given]  # of what there is no true render
        if len(self.subjects) <= self.prompts.start:
            raise Refused(f"there are {len(self.subjects)} captions in {args.captions}, and --prompts begins after them")
        self.prompts = self.prompts[: len(self.subjects) - self.prompts.start]
        self.methods = {size: names for size in sizes if (names := methods_at(size, self.titles))}
        if not self.methods:
            why = "of given pictures, which captions have none of" if args.captions else f"not of {' or '.join(sizes)}"
            raise Refused(f"there is nothing to draw: {', '.join(self.titles)} is {why}")

        self.model = args.model or str(EMBEDDED_CHECKPOINT)
        name = f"{Path(self.model).name}-{zlib.crc32(self.model.encode()):08x}" if args.model else "embedded"
        suffix = "-openvino" if args.openvino else "" if args.dtype == "float32" else f"-{args.dtype}"
        self.kept = args.build / f"{name}-{steps}{suffix}"
        self.judge = None if args.inception else SceneJudge(args.layout)
        self.scores = self._none_yet(steps)
        self.add_those_there()
        self.tasks = {size: [self.task(size, index, steps) for index in self.prompts] for size in self.methods}

    def _none_yet(self, steps: int) -> dict[str, Scores]:
        """At each size, what all pictures are to have in common."""
        args = self.args
        arithmetic = "bfloat16, by OpenVINO" if args.openvino else args.dtype
        drawn = {"checkpoint": fingerprint(self.model), "steps": steps, "arithmetic": arithmetic}
        scores = {}
        for size in self.methods:
            about = {"size": size, **drawn}
            if self.judge:
                few = args.quick or SIZES[size].given  # where there is no FID
                about |= {**self.judge.about, "true renders": min(TRUE_RENDERS, 200) if few else TRUE_RENDERS}
            scores[size] = Scores(about, model=Path(args.model).name if args.model else "")
        return scores

    def add_those_there(self) -> None:
        """The scores that are beside the report, where they are to be added to."""
        folder = self.out.with_suffix("")
        if self.judge:
            for size, there in read_scores(folder, self.methods if self.args.anew else ()).items():
                self.scores.setdefault(size, Scores(there.about)).add(there, scores_file(folder, size))
        report.one_checkpoint(self.scores)

    def task(self, size: str, index: int, steps: int) -> Task:
        names, there = self.methods[size], self.scores[size].records
        known = frozenset(name for name in (BASE, *names) if (label(name), index) in there)
        judge = self.judge.tag if self.judge else ""
        return Task(self.kept / size, index, self.subjects[index], SIZES[size], steps, names, self.args.layout, judge, known)

    def draw(self) -> None:
        """And score, in worker processes; with --no-draw only score."""
        args, row_by_row = self.args, [task for row in zip(*self.tasks.values()) for task in row]
        known, here = (sum(map(len, own)) for own in zip(*((task.known, task.here()) for task in row_by_row)))
        if known:
            print(f"{known} pictures' scores are beside the report: they are not drawn (--anew leaves these scores aside)")
        if here:
            print(f"{here} pictures are there that this version's judge has not scored: they are scored, not drawn again")
        todo = [task for task in row_by_row if (task.here() if args.no_draw else task.missing())]
        workers = args.workers or (os.cpu_count() or 1 if args.device == "cpu" else 1)
        starting = partial(start, self.model, args.device, args.dtype, args.openvino, self.judge)
        if todo:
            with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), starting) as pool:
                work = pool.map(judge_drawn if args.no_draw else draw, todo)
                list(tqdm(work, "pictures", len(todo), dynamic_ncols=True))

    def photo_judge(self, size: str) -> PhotoJudge:
        """After it has scored the pictures at a size that are there."""
        args, tasks = self.args, [task for task in self.tasks[size] if task.drawn(BASE)]
        judge = PhotoJudge(args.inception, args.clip, args.real, read(tasks[0], BASE).image.shape[:2], args.device)
        self.tasks[size] = [replace(task, judge=judge.tag) for task in tasks]
        for task in tqdm(self.tasks[size], f"scores, {size}", dynamic_ncols=True):
            judge_drawn(task, judge)
        return judge

    def report(self) -> None:
        """Also on what others have added beside it meanwhile."""
        self.add_those_there()
        judges = {}
        for size, tasks in self.tasks.items():
            if any(task.drawn(BASE) for task in tasks) and not self.judge:
                judges[size] = self.photo_judge(size)
            found = Scores(self.scores[size].about, [title for title in self.titles if size in TABLES[title].sizes])
            for task in self.tasks[size]:
                found.records |= task.records()
            self.scores[size].add(found, self.kept / size)
        scores = {size: own for size, own in self.scores.items() if own.records}
        if not scores:
            raise Refused(f"there are no pictures in {self.kept}, and no scores beside {self.out}")
        for size, own in scores.items():
            if not own.real:
                pictures = next(record["size"] for (name, _), record in own.records.items() if name == BASE)
                judge, count = self.judge or judges[size], own.about.get("true renders", 0)
                own.real = judge.of_true(count, tuple(pictures.tolist()))
        if self.judge:
            write_report(scores, self.out, self.sheet)
        else:
            report.write(scores, judges, self.subjects, self.out, self.sheet)

    def sheet(self, title: str, size: str, prompts: list[int], file: Path) -> None:
        """Of the pictures, where they are here; one that is there stays."""
        names, own = (BASE, *TABLES[title].methods), self.tasks.get(size)
        subjects = self.subjects if self.args.captions else scenes(prompts[-1] + 1)
        shown = [replace(own[0], index=index, subject=subjects[index]) for index in prompts] if own else []
        if shown and all(task.drawn(name) for task in shown for name in names):
            columns = {name: [read(task, name).image for task in shown] for name in names}
            report.sheet(columns, [task.caption for task in shown]).save(file, quality=85)
        elif not file.exists():
            print(f"{file}: the first prompts' pictures are not here, so that there is no sheet of them")


def scores_file(folder: Path, size: str) -> Path:
    """Where the scores at a size are, beside a report whose plots are in this folder."""
    return folder / f"{report.stem('scores', size)}.npz"


def read_scores(folder: Path, leave: Collection[str] = ()) -> dict[str, Scores]:
    """Of each size that there are any of, but for some. Refused where others than this version's judge scored them."""
    files = {size: file for size in SIZES if size not in leave and (file := scores_file(folder, size)).exists()}
    found = {size: Scores.read(file) for size, file in files.items()}
    for size, scores in found.items():
        own = SceneJudge(scores.about["layout"]).about
        for name in ("judge", "reader"):
            if scores.about[name] != own[name]:
                raise Refused(
                    f"{files[size]} is by {name} {scores.about[name]}, this version's is {own[name]}: score the pictures "
                    "again with --anew and the options that they were drawn with, or remove the file"
                )
    return found


def write_report(scores: dict[str, Scores], out: Path, sheet: report.Sheet) -> None:
    """Keep the scores beside the report, and make it of what is kept."""
    report.one_checkpoint(scores)
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for size, own in scores.items():
        own.write(scores_file(folder, size))
    found = read_scores(folder)
    judges = {size: SceneJudge(own.about["layout"]) for size, own in found.items()}
    last = max(prompt for own in found.values() for _, prompt in own.records)
    report.write(found, judges, scenes(last + 1), out, sheet)


def from_scores(folders: Sequence[Path], out: Path, anew: bool) -> None:
    """The report of the scores beside it and of those in these folders, added up. Refused where they do not."""
    own = out.with_suffix("")
    parts = {folder: read_scores(folder) for folder in folders}
    if empty := [folder for folder, scores in parts.items() if not scores]:
        raise Refused(f"there are no scores in {empty[0]}: scores-16x.npz and the like lie beside a report's plots")
    parts = {own: read_scores(own, {size for part in parts.values() for size in part} if anew else ()), **parts}
    scores: dict[str, Scores] = {}
    for folder, part in parts.items():
        for size, found in part.items():
            scores.setdefault(size, Scores(found.about)).add(found, scores_file(folder, size))
    if not scores:
        raise Refused(f"there are no scores in {own}: draw pictures first, without --from-scores")

    def sheet(title: str, size: str, prompts: list[int], file: Path) -> None:
        """That of the folder with scores of these prompts."""
        labels = [label(name) for name in TABLES[title].methods]
        with_them = [folder for folder in parts if {*prompts} <= {*parts[folder].get(size, Scores({})).prompts(labels)}]
        there = [folder / file.name for folder in with_them if (folder / file.name).exists()]
        if not there:
            print(f"{file}: the first prompts' pictures are not here, so that there is no sheet of them")
        elif there[0] != file:
            shutil.copy(there[0], file)

    write_report(scores, out, sheet)


def scenes(count: int) -> list[Scene]:
    rng = np.random.default_rng(SCENES_SEED)
    return [Scene.draw(rng) for _ in range(count)]


def fingerprint(model: str) -> str:
    """Of a checkpoint's weights: of the beginning and the end of each file, or of its name on the hub."""
    path, crc = Path(model), 0
    parts = [path / part for part in ("unet", "vae", "text_encoder", "text_encoder_2")]
    files = [path] if path.is_file() else sorted(file for part in parts if part.is_dir() for file in part.iterdir())
    for file in files:
        with open(file, "rb") as weights:
            for begin in (0, max(file.stat().st_size - 2**20, 0)):
                weights.seek(begin)
                crc = zlib.crc32(weights.read(2**20), crc)
    return f"{crc if files else zlib.crc32(model.encode()):08x}"


def main() -> None:
    asked = parser()
    args = asked.parse_args()
    given = [args.inception, args.clip, args.captions, args.real]
    if any(given) and not all(given):
        asked.error("--inception, --clip, --captions and --real belong together")
    embedded = [title for title in args.tables or () if TABLES[title].embedded]
    if args.model and embedded:
        asked.error(f"the table {embedded[0]} is of the embedded checkpoint and what was trained for it; leave --model out")
    if args.openvino and (args.device, args.dtype) != ("cpu", "float32"):
        asked.error("--openvino is for a CPU, and has a dtype of its own; leave --device and --dtype out")
    told = [name for name in DRAWING if getattr(args, name)]
    if args.from_scores is not None and told:
        option = f"--{told[0].replace('_', '-')}"
        asked.error(f"--from-scores draws nothing, and reports on all that there are scores of; leave {option} out")
    out = args.o or (args.build / "quick.md" if args.quick else Path("docs/evaluation.md"))
    try:
        if args.from_scores is not None:
            from_scores(args.from_scores, out, args.anew)
        else:
            run = Run(args, out)
            run.draw()
            run.report()
    except Refused as error:
        asked.exit(2, f"evaluation: {error}\n")
    print(out)


if __name__ == "__main__":
    main()
