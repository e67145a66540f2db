"""The report, made of scores: tables in Markdown, plots of quality against evaluations; and sheets of pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from evaluation.drawing import TABLES, label
from evaluation.judges import PhotoJudge, SceneJudge
from evaluation.metrics import Estimate
from evaluation.scores import BASE, Refused, Scores
from training.scenes import Scene

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
repeated object adds to it; inside the objects; and inside those that are where the base has its own, or within 4 of its
pixels, so that copies elsewhere do not count. Seams: steps across the borders of windows over those elsewhere.
CLIP, FID, IS and, of close-ups, crop FID and crop IS: by that network in the roles of CLIP and Inception.

What each picture scored is kept in `{folder}/scores-*.npz`, of which `make evaluate EVALUATE=--from-scores` makes this
report.
"""

# Metric -> whether more is better; None: 1 is best.
BETTER = {
    "count right": True,
    "count kept": True,
    "caption right": True,
    "texture right": True,
    "strays": False,
    "off the base": False,
    "detail": None,
    "object detail": None,
    "base object detail": None,
    "seams": None,
    "CLIP": True,
    "FID": False,
    "IS": True,
    "crop FID": False,
    "crop IS": True,
}
PLOTTED = ("count right", "texture right", "strays", "crop FID")
OURS = ("DemoFusion", "Paper", "Fast", "Faithful", "Turbo", "Few-step")  # in another colour, with whatever settings
COLUMNS = 8  # metrics of a table, so that a page is wide enough for it
SHOWN = 6  # rows of a sheet
SIDE = 224  # pixels of a picture on a sheet


Judge = SceneJudge | PhotoJudge
Sheet = Callable[[str, str, list[int], Path], None]  # of a table at a size, of some prompts' pictures, into a file


def write(
    scores: dict[str, Scores], judges: Mapping[str, Judge], subjects: Sequence[Scene | str], out: Path, sheet: Sheet
) -> None:
    """The report of what pictures scored at each size, and its plots and sheets in a folder beside it.

    subjects: what each prompt is to show. Refused where the scores are not of one checkpoint.
    """
    one_checkpoint(scores)
    titles = [title for title in TABLES if any(title in own.tables for own in scores.values())]
    sections = [
        (title, size, prompts)
        for title in titles
        for size in TABLES[title].sizes
        if size in scores and title in scores[size].tables and (prompts := _complete(title, size, scores[size]))
    ]
    against = " or ".join(dict.fromkeys(name for title in titles for name in TABLES[title].references))
    first = next(iter(scores.values()))
    seen = f"the checkpoint `{first.model}`" if first.model else "the embedded checkpoint"
    layout = first.about.get("layout", "anywhere")
    if layout != "anywhere":
        seen += f", which was trained on scenes in a {layout}"
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    text = [INTRODUCTION.format(model=seen, against=against)]
    if subjects and isinstance(subjects[0], Scene):
        text[0] += SCENES_INTRODUCTION.format(folder=folder.name)
    for title, size, prompts in sections:
        text += _section(title, size, prompts, scores[size], judges[size], subjects, folder)
        sheet(title, size, prompts[:SHOWN], folder / f"{stem(title, size)}.jpg")
    out.write_text("\n".join(text))


def one_checkpoint(scores: dict[str, Scores]) -> None:
    """Refused where a report would be of several, or of several judges."""
    for name in ("checkpoint", "layout", "judge", "reader", "networks"):
        found = {own.about.get(name): size for size, own in scores.items()}
        if len(found) > 1:
            told = " and ".join(f"{value} ({size})" for value, size in found.items())
            raise Refused(f"the scores of one report are of one {name}, these of {told}: name another report with -o")


def _complete(title: str, size: str, scores: Scores) -> list[int]:
    """The prompts that every method of a table has a picture of; says so where there are none."""
    labels = {name: label(name) for name in TABLES[title].methods}
    prompts = scores.prompts(list(labels.values()))
    if not prompts:
        without = [name for name, own in labels.items() if not scores.prompts([own])]
        print(f"{title}, {size}: no prompt has pictures by all methods{', none by ' * bool(without)}{', '.join(without)}")
    return prompts


def stem(title: str, size: str) -> str:
    """Of the names of a table's files."""
    return f"{title}-{size.split(',')[0]}".lower().replace(" ", "-")


def _section(
    title: str,
    size: str,
    prompts: list[int],
    scores: Scores,
    judge: Judge,
    subjects: Sequence[Scene | str],
    folder: Path,
) -> Iterator[str]:
    """The report's lines on one table at one size, and its plot."""
    table, about, rows = TABLES[title], scores.about, {}
    bases = scores.of(BASE, prompts)
    for name in tqdm(table.methods, f"{title}, {size}", dynamic_ncols=True):
        made = scores.of(label(name), prompts)
        statistics = judge.statistics([subjects[prompt] for prompt in prompts], made, bases, scores.real)
        measured = {key: Estimate.of(statistics[key], len(prompts), judge.draws) for key in table.metrics or statistics}
        evaluations, time = made["evaluations"].mean(dtype=float), np.median(made["seconds"] / made["base seconds"])
        rows[name] = Row(float(evaluations), float(time), measured)
    own = stem(title, size)
    plot(rows, folder / f"{own}.svg")
    yield (
        f"## {title}, {size}\n\n{table.about} {len(prompts)} prompts, {about['steps']} steps, "
        f"the UNet in {about['arithmetic']}.\n"
    )
    yield from (lines + "\n" for lines in tables(rows, table.against, table.apart))
    yield f"![Quality against evaluations]({folder.name}/{own}.svg)\n\n![Pictures]({folder.name}/{own}.jpg)\n"


@dataclass(frozen=True)
class Row:
    """What is known of one method: evaluations of the model and time over the base's, and the metrics."""

    evaluations: float
    time: float
    metrics: dict[str, Estimate]


def loss(metric: str, value: float | np.ndarray) -> float | np.ndarray:
    """The same on a scale where less is better."""
    more = BETTER[metric]
    return abs(value - 1) if more is None else -value if more else value


def verdicts(rows: dict[str, Row], against: str, apart: Mapping[str, str] = {}) -> dict[str, dict[str, str]]:
    """method -> metric -> "worse", "better" or "": whether the interval of the difference from `against` leaves 0 out.

    The pictures are paired: the same captions, seeds and bases. apart: methods that are judged by another one.
    """
    found: dict[str, dict[str, str]] = {}
    for name, row in rows.items():
        found[name] = {}
        for metric, own in row.metrics.items():
            other = rows[apart.get(name, against)].metrics[metric]
            difference = [loss(metric, a) - loss(metric, b) for a, b in zip((own.value, own.drawn), (other.value, other.drawn))]
            low, high = Estimate(*difference).interval
            found[name][metric] = "worse" if low > 0 else "better" if high < 0 else ""
    return found


def digits(value: float) -> str:
    """Two decimals below 10, one below 100, none above."""
    decimals = 2 - sum(abs(value) >= limit for limit in (9.995, 99.95))
    return f"{round(value, decimals) + 0.0:.{decimals}f}"  # without a minus before a zero


def tables(rows: dict[str, Row], against: str, apart: Mapping[str, str] = {}) -> Iterator[str]:
    """A line for each method: its costs, and a few metrics with their intervals; against, apart: as for `verdicts`."""
    metrics, said = list(next(iter(rows.values())).metrics), verdicts(rows, against, apart)
    arrow = {True: " ↑", False: " ↓", None: " → 1"}
    for first in range(0, len(metrics), COLUMNS):
        shown = metrics[first : first + COLUMNS]
        lines = ["| | evaluations | time | " + " | ".join(metric + arrow[BETTER[metric]] for metric in shown) + " |"]
        lines.append("|---|" + "---|" * (len(shown) + 2))
        for name, row in rows.items():
            cells = []
            for metric in shown:
                text = "{} ({} to {})".format(*map(digits, (row.metrics[metric].value, *row.metrics[metric].interval)))
                cells.append(f"{text} **{said[name][metric]}**" if said[name][metric] else text)
            lines.append(f"| {name} | {row.evaluations:,.0f} | {row.time:.1f}x | " + " | ".join(cells) + " |")
        yield "\n".join(lines)


def plot(rows: dict[str, Row], path: Path) -> None:
    """Quality against evaluations, one panel for each of PLOTTED that there is."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "the same plot, the same file"
    from matplotlib import pyplot

    metrics = [metric for metric in PLOTTED if metric in next(iter(rows.values())).metrics]
    figure, axes = pyplot.subplots(1, len(metrics), figsize=(4.6 * len(metrics), 4.2), layout="constrained", squeeze=False)
    for axis, metric in zip(axes[0], metrics):
        for name, row in rows.items():
            value, (low, high) = row.metrics[metric].value, row.metrics[metric].interval
            x = max(row.evaluations, 30)  # those that ask the model nothing stand at the left edge
            error = [[max(value - low, 0)], [max(high - value, 0)]]
            axis.errorbar(x, value, error, fmt="o", capsize=2, color="tab:red" if name.startswith(OURS) else "tab:blue")
            axis.annotate(name, (x, value), xytext=(4, 4), textcoords="offset points", fontsize=7)
        axis.set_xscale("log")
        axis.set_xlabel("model evaluations")
        axis.set_title(f"{metric} ({'higher' if BETTER[metric] else 'lower'} is better)", fontsize=10)
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def sheet(columns: dict[str, Sequence[np.ndarray]], captions: Sequence[str]) -> Image.Image:
    """A row for each caption, a column for each method."""
    shape = next(iter(columns.values()))[0].shape
    width, height = SIDE, round(SIDE * shape[0] / shape[1])
    page = Image.new("RGB", (width * len(columns), (height + 16) * len(captions) + 16), "white")
    draw = ImageDraw.Draw(page)
    for column, (name, images) in enumerate(columns.items()):
        draw.text((column * width + 4, 2), name, fill="black")
        for row, (image, caption) in enumerate(zip(images, captions)):
            small = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)
            page.paste(small, (column * width, 16 + row * (height + 16)))
            if column == 0:
                draw.text((4, 16 + row * (height + 16) + height + 1), caption, fill="black")
    return page
