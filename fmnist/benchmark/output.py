"""The benchmark's tables on the terminal and its JSON file."""

import datetime
import importlib.metadata
import json
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fmnist.runtime.compute import Compute
from fmnist.runtime.files import write_atomic
from fmnist.runtime.provenance import git_revision, processor, versions

CLOCKS = ("name", "driver_version", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def gpu_clocks() -> list[dict[str, str]]:
    """Return what nvidia-smi says of each GPU now: clocks in MHz, power in W, degrees C; empty without it."""
    command = ["nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    return [dict(zip(CLOCKS, (value.strip() for value in line.split(",")), strict=False)) for line in lines]


def all_versions() -> dict[str, str]:
    """Return the versions of everything raced."""
    found = versions()
    for name in ("torchvision", "kornia", "triton", "pillow", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found | {"cuda_toolkit": torch.version.cuda or "none"}


def describe(compute: Compute, argv: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a result depends on: command, date, hardware, versions, commit, options."""
    return {
        "name": "benchmark",
        "command": shlex.join(["python", "-m", "fmnist.benchmark", *argv]),
        "date": datetime.date.today().isoformat(),
        "hardware": {
            "device": compute.device_name,
            "processor": processor(),
            "cpu_cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "clocks_before": gpu_clocks(),
        },
        "versions": all_versions(),
        "git_revision": git_revision(),
        "world_size": compute.world_size,
        "precision": compute.precision,
        "options": {key: value.name if isinstance(value, Path) else value for key, value in options.items()},
    }


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write the JSON file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(result, indent=2) + "\n").encode())


def scaled(value: float | None, unit: str) -> str:
    """Return a number with three digits and k, M, G or T, e.g. 4.31 TB/s; a dash for none."""
    if value is None:
        return "-"
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def percent(value: float | None) -> str:
    """Return a share in percent; a dash for none."""
    return "-" if value is None else f"{100 * value:.1f} %"


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    rate, ratio = row["images_per_second"], row.get("ratio")
    return {
        "loader": row["description"],
        "images/s": f"{rate['median']:,.0f}",
        "best": f"{rate['max']:,.0f}",
        "spread": percent(rate["spread"]),
        "ratio": "-" if ratio is None else f"{ratio:.3f}" if ratio < 2 else f"{ratio:.1f}",
        "bytes/image": scaled(row.get("bytes_per_image"), "B"),
        "bytes/s": scaled(row.get("bytes_per_second"), "B/s"),
        "of copy": percent(row.get("share_of_copy_ceiling")),
        "MFU": percent(row.get("mfu")),
        "peak memory": scaled(row.get("peak_memory_bytes"), "B"),
        "efficiency": percent(row.get("efficiency")),
    }


def render_table(table: Mapping[str, Any]) -> str:
    """Return a table of one race as text; columns that hold nothing are left out."""
    rows = [_cells(row) for row in table["rows"]]
    names = [name for name in (rows[0] if rows else {}) if any(row[name] != "-" for row in rows)]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}

    def line(cells: Mapping[str, str]) -> str:
        return "  ".join(
            cells[name].ljust(widths[name]) if name == "loader" else cells[name].rjust(widths[name]) for name in names
        ).rstrip()

    head = f"\n{table['title']} ({table['dtype']}" + (f"; ratios to {table['ratio_to']})" if table["ratio_to"] else ")")
    return "\n".join([head, line({name: name for name in names}), *(line(row) for row in rows)])
