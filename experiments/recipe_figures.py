"""The figures of docs/recipes.md, from the JSON results of the queue; each draws what is there."""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from experiments.recipe_numbers import (
    ABLATED,
    ALL_IMAGES,
    AMOUNT,
    AMOUNTS,
    FINAL,
    Accuracy,
    Curve,
    Effect,
    Queued,
    amounts,
    drawn_models,
    effects,
    learning_curve,
    timed,
)
from experiments.recipe_tables import drawable, factor_name, figure_path
from experiments.search_figure import plot_slices
from fmnist.report.figures import BLUE, GREEN, GREY, ORANGE, PERCENT, Axes, Figure, by_default_style, save_figure

# Of Okabe and Ito too. Each series has its own marker and line as well: a print may be grey.
PURPLE, SKY, BLACK = "#CC79A7", "#56B4E9", "#000000"
STYLES = tuple(
    {"color": color, "marker": marker, "linestyle": line, "markersize": 5}
    for color, marker, line in (
        *((BLUE, "o", "-"), (ORANGE, "s", "--"), (GREEN, "^", "-."), (BLACK, "D", ":")),
        *((PURPLE, "v", "-"), (SKY, "P", "--"), (GREY, "X", "-."), (BLUE, "d", ":")),
    )
)


def log_ticks(axes: Axes) -> None:
    """Make the x axis logarithmic, with ticks at 1, 2, 5 and their multiples of ten, as one writes them."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    factors = range(1, 10) if high < 10 * low else (1, 2, 5)  # less than a decade would show one of three
    ticks = [factor * 10**power for power in range(-3, 6) for factor in factors]
    axes.set_xticks(shown := [tick for tick in ticks if low <= tick <= high], [f"{tick:g}" for tick in shown])
    axes.minorticks_off()


def draw_ablation(axes: Axes, added: Mapping[str, Effect], taken: Mapping[str, Effect]) -> None:
    """Draw what each factor is worth in points, the most useful beside the others at the top; right of 0 it helps."""
    labels = sorted(
        dict.fromkeys([*added, *taken]), key=lambda label: (taken or added).get(label, Effect(0, None, 0)).points
    )
    axes.axvline(0, color="black", linewidth=1)
    for shift, found, name, color, marker in (
        (0.16, added, "added to nothing", BLUE, "o"),
        (-0.16, taken, "beside all others", ORANGE, "s"),
    ):
        known = [(row, found[label]) for row, label in enumerate(labels) if label in found]
        if known:
            axes.errorbar(
                [effect.points for _, effect in known],
                [row + shift for row, _ in known],
                xerr=[effect.half or 0.0 for _, effect in known],
                linestyle="none", marker=marker, color=color, markersize=7, capsize=3, label=name,
            )  # fmt: skip
    for row in range(0, len(labels), 2):
        axes.axhspan(row - 0.5, row + 0.5, color=GREY, alpha=0.12, linewidth=0)
    axes.set_yticks(range(len(labels)), [factor_name(label) for label in labels])
    axes.set_ylim(-0.5, len(labels) - 0.5)
    axes.set_xlabel("points of validation top1; right of 0 it helps")
    axes.grid(axis="x", alpha=0.25)


@by_default_style
def plot_ablation(queue: Queued, path: Path) -> None:
    """Draw the ablations of each model that has any."""
    found = {
        model: (effects(queue, f"{prefix}_added", taken=False), effects(queue, f"{prefix}_taken", taken=True))
        for model, prefix in ABLATED.items()
    }
    shown = {model: pair for model, pair in found.items() if any(pair)}
    figure = Figure(figsize=(6.2 * len(shown), 5.6), layout="constrained")
    for axes, (model, (added, taken)) in zip(
        figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True
    ):
        draw_ablation(axes, added, taken)
        seeds = {effect.seeds for effect in (*added.values(), *taken.values())}
        axes.set_title(f"{model}, seeds: {min(seeds)}" + (f" to {max(seeds)}" if len(seeds) > 1 else ""))
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False)
    save_figure(path, figure)


def draw_amounts(axes: Axes, found: Mapping[str, Mapping[int, Accuracy]]) -> None:
    """Draw test top1 against images a class, a line a model; a bar holds the 95 % intervals of all seeds.

    A line ends where the next amount is not measured: what lies between is not known.
    """
    ticks = [count // 10 for count in (*AMOUNTS, ALL_IMAGES)]
    unknown = Accuracy(mean=np.nan, low=np.nan, high=np.nan, top1=[], lr=np.nan)
    for (model, points), style in zip(found.items(), STYLES[: len(found)], strict=True):
        if points:
            shown = [points.get(count, unknown) for count in ticks]
            bars = [[each.mean - each.low for each in shown], [each.high - each.mean for each in shown]]
            axes.errorbar(ticks, [each.mean for each in shown], yerr=bars, capsize=3, label=model, **style)
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{count:,}" for count in ticks])
    axes.minorticks_off()
    axes.set(xlabel="training images a class", ylabel="test top1, by its error on a logarithmic scale")
    # From 92 to 94 % is as far as from 84 to 88 %: a quarter of the errors.
    axes.set_yscale("function", functions=(lambda top1: -np.log(100 - top1), lambda place: 100 - np.exp(-place)))
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in (*range(10, 80, 10), *range(80, 90, 5), *range(90, 100)) if low <= tick <= high])
    axes.yaxis.set_major_formatter(PERCENT)
    axes.grid(alpha=0.25)


@by_default_style
def plot_amounts(queue: Queued, path: Path) -> None:
    """Draw accuracy against the amount of data."""
    figure = Figure(figsize=(7.5, 6), layout="constrained")
    draw_amounts(figure.add_subplot(), {model: amounts(queue, model) for model in AMOUNT})
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    save_figure(path, figure)


def draw_curves(axes: Axes, found: Mapping[str, Curve | None], unit: str) -> None:
    """Draw validation top1 against epochs or minutes, a line a model, shaded from its lowest seed to its highest."""
    for (model, curve), style in zip(found.items(), STYLES[: len(found)], strict=True):
        if curve is not None and (x := getattr(curve, unit)) is not None:
            axes.plot(x, curve.mean, label=model, markevery=max(1, len(x) // 12), **style)
            axes.fill_between(x, curve.low, curve.high, color=style["color"], alpha=0.15, linewidth=0)
    axes.set_xlabel({"epochs": "epochs", "minutes": "processor minutes, one thread"}[unit])
    axes.yaxis.set_major_formatter(PERCENT)
    axes.grid(alpha=0.25)


@by_default_style
def plot_curves(queue: Queued, path: Path) -> None:
    """Draw the learning curves of all recipes against epochs and against processor time."""
    found = {model: learning_curve(queue.of(FINAL[model])) for model in drawn_models()}
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, unit in zip(panels, ("epochs", "minutes"), strict=True):
        draw_curves(axes, found, unit)
        log_ticks(axes)
    panels[0].set_ylabel("validation top1")
    best = max(max(curve.high) for curve in found.values() if curve is not None)
    panels[0].set_ylim(max(best - 8, 0), best + 0.4)  # the first epochs would press the rest together
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    save_figure(path, figure)


def draw_costs(axes: Axes, found: Mapping[str, tuple[float, Accuracy]]) -> None:
    """Draw test top1 against processor minutes, with the best that each cost buys."""
    middle = np.sqrt(np.prod([f(minutes for minutes, _ in found.values()) for f in (min, max)]))
    for (model, (minutes, top1)), style in zip(found.items(), STYLES[: len(found)], strict=True):
        bar = [[top1.mean - top1.low], [top1.high - top1.mean]]
        own = style | {"markersize": 8, "linestyle": "none", "label": model}
        axes.errorbar([minutes], [top1.mean], yerr=bar, capsize=3, **own)
        side = {"xytext": (-9, 5), "ha": "right"} if minutes > middle else {"xytext": (9, 5)}
        axes.annotate(model, (minutes, top1.mean), textcoords="offset points", fontsize="small", **side)
    points = sorted((minutes, top1.mean) for minutes, top1 in found.values())
    best = list(itertools.accumulate((top1 for _, top1 in points), max))
    axes.plot([minutes for minutes, _ in points], best, drawstyle="steps-post", color=GREY, zorder=0)
    log_ticks(axes)
    axes.set(xlabel="processor minutes of a whole run, one thread", ylabel="test top1")
    axes.yaxis.set_major_formatter(PERCENT)
    axes.grid(alpha=0.25)


@by_default_style
def plot_costs(queue: Queued, path: Path) -> None:
    """Draw accuracy against the time it takes."""
    figure = Figure(figsize=(7.5, 5.6), layout="constrained")
    draw_costs(figure.add_subplot(), timed(queue))
    save_figure(path, figure)


PLOTS: dict[str, Callable[[Queued, Path], None]] = {
    "ablation": plot_ablation,
    "amount": plot_amounts,
    "curves": plot_curves,
    "cost": plot_costs,
    "search_mlp": lambda queue, path: plot_slices(queue.members("search_mlp"), queue.results, path),
}


def draw_figures(queue: Queued, folder: Path) -> list[Path]:
    """Draw FOLDER/recipes_NAME.png of everything that has results, and return what was drawn."""
    drawn = [figure_path(folder, name) for name in drawable(queue)]
    for name, path in zip(drawable(queue), drawn, strict=True):
        PLOTS[name](queue, path)
    return drawn
