"""The benchmark as one picture: a bar per loader, a panel per race, the roofline drawn in."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fmnist.benchmark.output import scaled
from fmnist.report.figures import BLUE, GREEN, GREY, ORANGE, save_figure

WIDEST = 4.5  # a roofline farther off, in highest bars, is only told
ROW_INCHES, HEAD_INCHES, WIDTH_INCHES = 0.42, 1.5, 7.6


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw all tables of a result as horizontal bars.

    The bar is the median, the whisker the slowest and fastest round, the orange mark the roofline: what the measured
    copy (loaders alone) or matrix product (training) would allow.

    Args:
        result: the benchmark's JSON.
        path: the PNG to write.

    Raises:
        ValueError: the result holds no table.
    """
    tables = result.get("tables") or []
    if not tables:
        raise ValueError("this result holds no table to draw")
    columns = min(2, len(tables))
    lines = [tables[i : i + columns] for i in range(0, len(tables), columns)]
    heights = [HEAD_INCHES + ROW_INCHES * max(len(table["rows"]) for table in line) for line in lines]
    figure = Figure(figsize=(WIDTH_INCHES * columns, sum(heights) + 0.8), layout="constrained")
    grid = figure.subplots(len(lines), columns, squeeze=False, height_ratios=heights)
    for i, axes in enumerate(grid.flat):
        if i < len(tables):
            _draw_table(axes, tables[i])
        else:
            axes.axis("off")
    hardware, versions = result["hardware"], result["versions"]
    processes = f", {result['world_size']} processes" if result["world_size"] > 1 else ""
    machine = f"{hardware['device']}{processes}, {hardware['cpu_cores']} CPU cores"
    figure.suptitle(f"{machine}, torch {versions['torch']}, {result['date']}", fontsize=11)
    save_figure(path, figure)


def _draw_table(axes: Axes, table: Mapping[str, Any]) -> None:
    rows = table["rows"]
    medians = [row["images_per_second"]["median"] for row in rows]
    roofs = [row.get("roofline_images_per_second") for row in rows]
    logarithmic = table["mode"] == "data"  # loaders lie orders of magnitude apart, and far from their roofline
    for place, (row, median, roof) in enumerate(zip(rows, medians, roofs, strict=True)):
        rate = row["images_per_second"]
        axes.barh(place, median, height=0.68, color=_color(row["name"]), zorder=2)
        axes.plot([rate["min"], rate["max"]], [place, place], color="black", linewidth=1.4, zorder=4)
        if roof and logarithmic:
            axes.plot([roof, roof], [place - 0.4, place + 0.4], color=ORANGE, linewidth=2.5, zorder=3)
        ratio = row.get("ratio")
        label = f" {scaled(median, '').rstrip()}" + (f"  ({ratio:.3g}x)" if ratio is not None else "")
        axes.text(max(rate["max"], median), place, label, va="center", ha="left", fontsize=9.5, zorder=5, **_halo())
    axes.set_yticks(range(len(rows)), [_wrapped(row["description"]) for row in rows], fontsize=9.5)
    axes.invert_yaxis()
    known = [roof for roof in roofs if roof]
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(10 ** math.floor(math.log10(min(medians) / 1.5)), 6 * max([*medians, *known]))
    else:
        roof_in_sight = bool(known) and known[0] <= WIDEST * max(medians)
        axes.set_xlim(0, max(1.3 * max(medians), 1.08 * known[0] if roof_in_sight else 0))
    _legend(axes, known, logarithmic, max(medians))
    axes.set_title(table["title"], fontsize=11.5, fontweight="bold", loc="left")
    axes.set_xlabel(
        f"images/s ({table['dtype']}" + (f"; x: against {table['ratio_to']})" if table["ratio_to"] else ")")
    )
    axes.grid(axis="x", alpha=0.3, zorder=0)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _legend(axes: Axes, roofs: list[float], logarithmic: bool, highest: float) -> None:
    if not roofs:
        return
    if logarithmic:
        text = "roofline: measured copy bandwidth / bytes per image"
        axes.plot([], [], color=ORANGE, linewidth=2.5, label=text)
    elif roofs[0] <= WIDEST * highest:
        axes.axvline(roofs[0], color=ORANGE, linewidth=2, label="roofline: measured matrix product / FLOPs per image")
    else:  # drawn to scale it would press the bars together
        text = f"roofline, to the right: {scaled(roofs[0], '').rstrip()} images/s (measured matrix product)"
        axes.plot([], [], color=ORANGE, linewidth=2, label=text)
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.4, -0.16 - 0.5 / len(axes.get_yticks())), fontsize=9, frameon=False
    )


def _color(name: str) -> str:
    return BLUE if name.startswith("ours") else GREEN if name == "synthetic" else GREY


def _wrapped(text: str) -> str:
    head, _, tail = text.partition(", ")
    return f"{head},\n{tail}" if len(text) > 34 and tail else text


def _halo() -> dict[str, Any]:
    return {"bbox": {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6}}
