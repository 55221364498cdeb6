"""Accuracy against cost: which models no other beats, and the figure of a comparison."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fmnist.report.figures import BLUE, GREEN, GREY, ORANGE, PERCENT, Axes, Figure, by_default_style, save_figure


@by_default_style
def plot_comparison(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw top1 with its 95 % interval, and against FLOPs and latency with the Pareto front where costs are known.

    Args:
        rows: As for `comparison_table`; rows without `top1` are left out.
        path: The PNG to write.

    Raises:
        ValueError: If no row has a `top1`.
    """
    known = sorted((row for row in rows if row.get("top1") is not None), key=lambda row: row["top1"])
    if not known:
        raise ValueError(f"rows must hold a 'top1' at least once, got none in {len(rows)} rows")
    costs = {"flops_per_image": "FLOPs per image", "latency_ms_1": "latency at batch 1 (ms)"}
    costs = {key: label for key, label in costs.items() if all(row.get(key) for row in known)}
    height = max(4.2 if costs else 0.0, 1.8 + 0.5 * len(known))
    figure = Figure(figsize=(9.0 if not costs else 4.4 * (1 + len(costs)), height), layout="constrained")
    panels = figure.subplots(1, 1 + len(costs), squeeze=False)[0]
    _draw_intervals(panels[0], known)
    for axes, (key, label) in zip(panels[1:], costs.items(), strict=True):
        _draw_front(axes, known, key)
        axes.set_xlabel(label)
    save_figure(path, figure)


def _shorten(name: str) -> str:
    # The end of a long path tells runs apart better than its start.
    return name if len(name) <= 40 else f"...{name[-37:]}"


def _draw_intervals(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    for position, row in enumerate(rows):
        top1 = 100 * row["top1"]
        low, high = (100 * bound for bound in row.get("top1_interval") or (row["top1"], row["top1"]))
        axes.plot([low, high], [position, position], color=GREY, linewidth=2.5, marker="|", markersize=10)
        axes.plot(top1, position, "o", color=BLUE, markersize=8)
        axes.annotate(f"{top1:.2f}", (top1, position), (0, 8), textcoords="offset points", ha="center")
    axes.set_yticks(
        range(len(rows)), [_shorten(str(row.get("run", "-"))) for row in rows], fontsize=11, parse_math=False
    )
    axes.set_ylim(-0.6, len(rows) - 0.3)
    axes.margins(x=0.08)
    axes.xaxis.set_major_formatter(PERCENT)
    axes.set_xlabel("top1, with its 95 % interval")
    axes.grid(axis="x", alpha=0.25)


def _draw_front(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str) -> None:
    costs, scores = [row[key] for row in rows], [100 * row["top1"] for row in rows]
    front = sorted((i for i, row in enumerate(rows) if key in row.get("front", ())), key=lambda i: costs[i])
    # A staircase: up to the next model of the front, paying more buys nothing.
    left, right = min(costs) / 2, max(costs) * 2
    steps = [*(costs[i] for i in front), right]
    levels = [*(scores[i] for i in front), scores[front[-1]]]
    axes.plot(steps, levels, drawstyle="steps-post", color=GREEN, linewidth=1.5, label="Pareto front", zorder=1)
    for i, row in enumerate(rows):
        low, high = (100 * bound for bound in row.get("top1_interval") or (row["top1"], row["top1"]))
        axes.plot([costs[i]] * 2, [low, high], color=GREY, linewidth=2, zorder=2)
        axes.plot(costs[i], scores[i], "o", color=BLUE if i in front else ORANGE, markersize=8, zorder=3)
        # Towards the middle of the panel, so that no name leaves it.
        to_left = math.log(costs[i] / left) > 0.6 * math.log(right / left)
        offset, side = (-9, "right") if to_left else (9, "left")
        name = _shorten(str(row.get("run", "-")))
        shade = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0}
        axes.annotate(
            name,
            (costs[i], scores[i]),
            (offset, 0),
            textcoords="offset points",
            ha=side,
            va="center",
            bbox=shade,
            parse_math=False,
        )
    axes.set(xscale="log", xlim=(left, right), ylabel="top1")
    axes.yaxis.set_major_formatter(PERCENT)
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)  # above, where no name can be
