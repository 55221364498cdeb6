"""Figures of an evaluation, as PNG: colour-blind safe, no display needed; the only module that imports matplotlib."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
from scipy.sparse import csr_array

from fmnist.evaluation.misclassified import Confusion, worst_classes
from fmnist.evaluation.numbers import NUM_BINS, ReliabilityBins
from fmnist.runtime.console import MAX_ERROR, one_line
from fmnist.runtime.environment import hidden
from fmnist.runtime.files import write_atomic

# Figures use the object API and matplotlib's defaults: no pyplot state, no display, nothing of the user's settings. A
# notebook's MPLBACKEND would even be an error outside of it.
level = logging.getLogger("matplotlib").level
logging.getLogger("matplotlib").setLevel(logging.ERROR)  # of a matplotlibrc that has no effect anyway
with hidden("MPLBACKEND", "MATPLOTLIBRC"):
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
logging.getLogger("matplotlib").setLevel(level)

__all__ = ["Axes", "Figure"]
P = ParamSpec("P")
T = TypeVar("T")

# Okabe and Ito, "Color Universal Design" (2008): told apart with any common colour blindness.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
DPI = 150
PERCENT = "{x:g} %"  # of an axis from 0 to 100
MOST_CLASSES, WORST_CLASSES = 30, 20  # drawn whole; drawn of more
OTHERS = "others"


def by_default_style(draw: Callable[P, T]) -> Callable[P, T]:
    """Let a function draw with matplotlib's defaults, and leave those of a notebook as they are."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> T:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            return draw(*args, **kwargs)

    return drawn


def shown_classes(confusion: Confusion) -> list[int]:
    """Return the classes of a confusion matrix that can be read: all, or of many those with the most errors."""
    num_classes = csr_array(confusion).shape[0]
    return list(range(num_classes)) if num_classes <= MOST_CLASSES else worst_classes(confusion, WORST_CLASSES)


def shorten(name: str, length: int = 24) -> str:
    """Cut the middle out of a long class name, for a figure: both ends tell names apart. Nothing breaks a line."""
    shown = one_line(name, MAX_ERROR)
    ahead = (length - 2) // 2
    return shown if len(shown) <= length else f"{shown[:ahead]}...{shown[ahead + 3 - length :]}"


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG, whole or not at all."""
    FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # of a class name in a script that the font lacks
        write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=DPI, metadata={"Software": "fmnist"}))


@by_default_style
def plot_confusion_matrix(confusion: Confusion, class_names: Sequence[str], title: str, path: Path) -> None:
    """Draw counts and row percentages, with each class's recall on the right; of many classes those with most errors.

    Args:
        confusion: [C, C] counts; rows true class, columns predicted.
        class_names: C names, in label order.
        title: Heading.
        path: The PNG to write.
    """
    everything = csr_array(confusion)
    shown = shown_classes(confusion)
    counts, totals = everything[shown][:, shown].toarray(), everything.sum(axis=1)[shown]
    names = [shorten(class_names[label]) for label in shown]
    columns = names
    if len(shown) < len(class_names):
        counts = np.column_stack([counts, totals - counts.sum(axis=1)])
        columns = [*names, OTHERS]
        title += f", the {len(shown)} classes with most errors of {len(class_names):,}"
    num_classes = len(shown)
    percent = 100 * counts / np.maximum(totals, 1)[:, None]
    side = float(np.clip(0.9 * num_classes + 2.0, 6.0, 16.0))
    size = 10 * min(1.0, 15 / num_classes)  # points, of the text in a cell
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    # A square root scale: at 93 % top1 a linear one shows a diagonal and nothing else.
    image = axes.imshow(percent, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=100))
    for (row, column), count in np.ndenumerate(counts):
        red, green, blue, _ = image.to_rgba(percent[row, column])
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
        label = f"{count:,}\n{percent[row, column]:.1f} %" if count else "0"
        color = "white" if dark else "black" if count else "#B0B0B0"
        weight = "bold" if row == column else "normal"
        axes.text(column, row, label, ha="center", va="center", color=color, fontsize=size, weight=weight)

    ticks = range(num_classes)
    slanted: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(columns)), columns, fontsize=11, parse_math=False, **slanted)
    axes.set_yticks(ticks, names, fontsize=11, parse_math=False)
    axes.set_xlabel("predicted class", fontsize=12)
    axes.set_ylabel("true class", fontsize=12)
    shares = [f"{100 * hit / n:.1f} %" if n else "-" for hit, n in zip(np.diag(counts), totals, strict=True)]
    right = axes.secondary_yaxis("right")
    right.set_yticks(list(ticks), [shares[tick] for tick in ticks], fontsize=11)
    right.set_ylabel("recall", fontsize=12)
    right.tick_params(length=0)
    axes.set_xticks(np.arange(0.5, len(columns) - 1), minor=True)
    axes.set_yticks(np.arange(0.5, num_classes - 1), minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    top1 = 100 * everything.trace() / max(everything.sum(), 1)
    axes.set_title(f"{title}\ntop1 {top1:.2f} %", fontsize=14, pad=12, parse_math=False)
    save_figure(path, figure)


@by_default_style
def plot_reliability(bins: ReliabilityBins, ece: float, title: str, path: Path) -> None:
    """Draw top1 against confidence in 15 bins, and how many images each bin holds.

    Args:
        bins: images by confidence.
        ece: the calibration error, for the heading.
        title: Heading.
        path: The PNG to write.
    """
    width = 1.0 / NUM_BINS
    figure = Figure(figsize=(6.4, 7.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.bar(bins.center, bins.top1, width=width, color=BLUE, edgecolor="white", label="top1 in the bin")
    upper.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="perfectly calibrated")
    upper.plot(bins.confidence, bins.top1, "o", color=ORANGE, label="at the mean confidence")
    upper.set(xlim=(0, 1), ylim=(0, 1.03), ylabel="top1")
    # Outside: low confidences may have bars of any height, so no corner is always free.
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    lower.bar(bins.center, bins.count, width=width, color=GREY, edgecolor="white")
    # Most images sit in the last bin; a log scale keeps the thin bins, whose bars are noisy, visible.
    lower.set(yscale="log", ylim=(0.7, 2.0 * bins.count.max()), xlabel="confidence", ylabel="images")
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    figure.suptitle(f"{title}\nexpected calibration error {ece:.4f}", fontsize=13, parse_math=False)
    save_figure(path, figure)
