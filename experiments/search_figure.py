"""The figure of a search over a grid: validation top1 by each of its options."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.queue_entries import Entry
from experiments.queue_results import read_results
from fmnist.report.figures import BLUE, ORANGE, PERCENT, Axes, Figure, by_default_style, save_figure


def draw_slice(axes: Axes, option: str, trials: Sequence[tuple[Any, float, bool]]) -> None:
    """Draw validation top1 against one option of a grid; hollow where a trial was stopped, a line through the best.

    Args:
        axes: the panel.
        option: its name.
        trials: value of the option, top1 in percent, whether the trial was stopped.
    """
    values = list(dict.fromkeys(value for value, _, _ in trials))
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    values = sorted(values) if numeric else values
    for stopped, fill in ((False, BLUE), (True, "none")):
        part = [(values.index(value), top1) for value, top1, ended in trials if ended == stopped]
        if part:
            x, y = zip(*part, strict=True)
            axes.plot(x, y, "o", color=BLUE, markerfacecolor=fill, label="stopped early" if stopped else "finished")
    best = [max(top1 for other, top1, _ in trials if other == value) for value in values]
    axes.plot(range(len(values)), best, "-", color=ORANGE, linewidth=1.2, zorder=0, label="best")
    axes.set_xticks(range(len(values)), [str(value) for value in values])
    axes.margins(x=0.15)
    axes.set_xlabel(option)
    axes.yaxis.set_major_formatter(PERCENT)
    axes.grid(alpha=0.25)


@by_default_style
def plot_slices(trials: Sequence[Entry], results: Path, path: Path) -> None:
    """Draw a search over a grid: a panel an option, in each every trial that has a result."""
    found = [(trial.varied, result) for trial in trials for result in read_results(trial, results)]
    options = list(trials[0].varied)
    figure = Figure(figsize=(4.6 * len(options), 4.4), layout="constrained")
    panels = figure.subplots(1, len(options), sharey=True, squeeze=False)[0]
    for axes, option in zip(panels, options, strict=True):
        draw_slice(
            axes,
            option,
            [(own[option], 100 * result["val.top1"], "stopped_at_epoch" in result) for own, result in found],
        )
    panels[0].set_ylabel("validation top1, best epoch")
    panels[0].legend(loc="best", fontsize=9)
    save_figure(path, figure)


def draw_searches(entries: Sequence[Entry], results: Path, folder: Path) -> list[Path]:
    """Draw FOLDER/NAME.png of each search over a grid that has results; of a tuned entry's too."""
    drawn = []
    searched = [entry for entry in entries if entry.search and entry.varied]
    for (group, label), same in itertools.groupby(searched, key=lambda entry: (entry.group, entry.label)):
        trials = list(same)
        if any(read_results(trial, results) for trial in trials):
            drawn.append(folder / f"{group}_{label}.png" if label else folder / f"{group}.png")
            plot_slices(trials, results, drawn[-1])
    return drawn
