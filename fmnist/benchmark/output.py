"""What a result depends on; its tables as text and as a chart."""

import importlib.metadata
import math
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fmnist.benchmark.command_line import PROGRAM
from fmnist.report.comparison import Columns, text_table
from fmnist.report.figures import BLUE, GREEN, GREY, ORANGE, Axes, Figure, by_default_style, save_figure
from fmnist.runtime.compute import Compute
from fmnist.runtime.hardware import available_cores
from fmnist.runtime.provenance import measured_now

CLOCKS = ("name", "driver_version", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def gpu_clocks() -> list[dict[str, str]]:
    """Return what nvidia-smi says of each GPU now: clocks in MHz, power in W, degrees C; empty without it."""
    command = ["nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    return [dict(zip(CLOCKS, line.split(", "), strict=False)) for line in lines]


def describe(compute: Compute, argv: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a result depends on: command, date, hardware, versions, commit, options."""
    installed = {item.name.lower(): item.version for item in importlib.metadata.distributions()}
    hardware = {"device": compute.device_name, "cpu_cores": available_cores(), "threads": torch.get_num_threads()}
    about = measured_now(**hardware, clocks_before=gpu_clocks())
    libraries = {name: installed.get(name, "absent") for name in ("torchvision", "kornia", "triton", "pillow", "numpy")}
    return {
        "name": "benchmark",
        "command": shlex.join([*PROGRAM.split(), *argv]),
        **about,
        "versions": about["versions"] | libraries | {"cuda_toolkit": torch.version.cuda or "none"},
        "world_size": compute.world_size,
        "precision": compute.precision,
        "options": {key: value.name if isinstance(value, Path) else value for key, value in options.items()},
    }


def scaled(value: float, unit: str = "") -> str:
    """Return a positive number with three digits and k, M, G or T, e.g. 4.31 TB/s."""
    power = max(0, min(4, int(math.log10(value) // 3)))
    return f"{value / 1000**power:.3g} {('', 'k', 'M', 'G', 'T')[power]}{unit}".rstrip()


NOT_TIMED = dict.fromkeys(("min", "median", "max"), math.nan)
COLUMNS: Columns = {
    "description": ("loader", str),
    "median": ("images/s", "{:,.0f}".format),
    "max": ("best", "{:,.0f}".format),
    "spread": ("spread", "{:.1%}".format),
    "ratio": ("ratio", "{:.3g}".format),
    "bytes_per_image": ("bytes/image", lambda value: scaled(value, "B")),
    "bytes_per_second": ("bytes/s", lambda value: scaled(value, "B/s")),
    "share_of_copy_ceiling": ("of copy", "{:.1%}".format),
    "mfu": ("MFU", "{:.1%}".format),
    "peak_memory_bytes": ("peak memory", lambda value: scaled(value, "B")),
    "efficiency": ("efficiency", "{:.1%}".format),
    "recompilations": ("recompiled", str),  # while the clock ran
    "failed": ("failed", str),
}


def render_table(table: Mapping[str, Any]) -> str:
    """Return the table of one race as text; empty columns are left out."""
    against = f"; ratios to {table['ratio_to']}" if table["ratio_to"] else ""
    rows = [row | row.get("images_per_second", {}) for row in table["rows"]]
    return f"\n{table['title']} ({table['dtype']}{against})\n{text_table(rows, COLUMNS, ['description', 'failed'])}"


def render_profile(table: Mapping[str, Any]) -> str:
    """Return milliseconds of a step by class of operators as text; empty where nothing was profiled."""
    profiled = [row for row in table["rows"] if "profile" in row]
    if not profiled:
        return ""
    kinds = dict.fromkeys(kind for row in profiled for kind in row["profile"]["ms_per_step"])
    columns: Columns = {
        "description": ("ms of a step by class", str),
        **{kind: (kind, "{:.3f}".format) for kind in kinds},
    }
    columns = {**columns, "idle_share": ("idle", "{:.1%}".format)}
    rows = [row | row["profile"] | row["profile"]["ms_per_step"] for row in profiled]
    return f"\n\n{text_table(rows, columns, ['description'])}"


def add_ratios(table: dict[str, Any], name: str, baseline: Mapping[str, Any] | None, world_size: int) -> None:
    """Add to each row its ratio to one loader, and its efficiency against the same command's JSON on one process."""
    title, medians = table["title"], _medians(table)
    single = {other["title"]: _medians(other) for other in baseline["tables"]} if baseline else {title: {}}
    if title not in single or baseline and baseline["world_size"] != 1:
        raise ValueError(f"--baseline: {title!r} was not measured on one process; run the same command on one")
    table["ratio_to"] = name if name in medians else None
    for row in (row for row in table["rows"] if row["name"] in medians):
        median = medians[row["name"]]
        row["ratio"] = median / medians[name] if name in medians else None
        if row["name"] in single[title]:
            row["efficiency"] = median / (world_size * single[title][row["name"]])


def _medians(table: Mapping[str, Any]) -> dict[str, float]:
    return {row["name"]: row["images_per_second"]["median"] for row in table["rows"] if "failed" not in row}


@by_default_style
def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw the tables of a result as a PNG of horizontal bars: the median, and a line from slowest to fastest round.

    Orange is the roofline, what the measured copy (loaders alone) or matrix product (training) would allow.
    """
    tables = [table for table in result.get("tables", []) if _medians(table)]
    if not tables:
        raise ValueError("this result holds no table to draw")
    heights = [1.5 + 0.42 * len(table["rows"]) for table in tables]  # inches
    figure = Figure(figsize=(9, sum(heights) + 0.8), layout="constrained")
    panels = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, table in zip(panels, tables, strict=True):
        _draw_table(axes, table)
    machine = f"{result['hardware']['device']}, {result['hardware']['cpu_cores']} CPU cores"
    machine += f", {result['world_size']} processes" * (result["world_size"] > 1)
    figure.suptitle(f"{machine}, torch {result['versions']['torch']}, {result['date']}", fontsize=11)
    save_figure(path, figure)


def _draw_table(axes: Axes, table: Mapping[str, Any]) -> None:
    rows, places, alone = table["rows"], np.arange(len(table["rows"])), table["mode"] == "data"
    rates = [row.get("images_per_second", NOT_TIMED) for row in rows]
    low, median, high = (np.array([rate[key] for rate in rates]) for key in NOT_TIMED)
    roofs = np.array([row.get("roofline_images_per_second") or np.nan for row in rows])
    bars = [{"ours": BLUE, "synthetic": GREEN}.get(row["name"].partition("-")[0], GREY) for row in rows]
    axes.barh(places, median, height=0.68, color=bars, xerr=(median - low, high - median), error_kw={"linewidth": 1.4})
    axes.vlines(roofs, places - 0.4, places + 0.4, color=ORANGE, linewidth=2.5)
    label = f"images/s ({table['dtype']}" + (f"; x: against {table['ratio_to']})" if table["ratio_to"] else ")")
    ends = high
    if alone:  # loaders lie orders of magnitude apart, and far from their roofline, whose mark no text should cross
        axes.set_xscale("log")
        axes.set_xlim(np.nanmin(low) / 3, 6 * np.nanmax([high, roofs]))
        ends = np.where((high < roofs) & (roofs < 6 * high), roofs, high)
        label += "; orange: measured copy / bytes per image"
    else:
        axes.set_xlim(0, 1.3 * np.nanmax(high))
        label += f"; the measured matrix product allows {scaled(np.nanmax(roofs))}" if (roofs > 0).any() else ""
    for place, row in enumerate(rows):
        ratio = "" if row.get("ratio") is None else f"  ({row['ratio']:.3g}x)"
        if "failed" in row:
            axes.text(0, place, " failed", va="center", transform=axes.get_yaxis_transform())
        else:
            axes.text(ends[place], place, f" {scaled(median[place])}{ratio}", va="center")
    axes.set_yticks(places, [row["description"].replace(", ", ",\n", 1) for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel(label, loc="right")
    axes.set_title(table["title"], fontsize=11.5, fontweight="bold", loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
