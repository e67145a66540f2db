"""The report's parts: tables in Markdown, plots of quality against evaluations, sheets of pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from evaluation.metrics import Estimate

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
    "seams": None,
    "CLIP": True,
    "FID": False,
    "IS": True,
    "crop FID": False,
    "crop IS": True,
}
PLOTTED = ("count right", "texture right", "strays", "crop FID")
OURS = ("DemoFusion", "Paper", "Fast", "Turbo")  # in another colour, with whatever settings
COLUMNS = 7  # metrics of a table, so that a page is wide enough for it
SIDE = 224  # pixels of a picture on a sheet


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
