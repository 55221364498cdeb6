"""Retrieval precision as a file that is kept, a table, and one line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fmnist.runtime.files import read_json, write_atomic

RETRIEVAL_FILE = "retrieval.json"


def write_precision(result: Mapping[str, Any], path: Path) -> None:
    """Keep what `measure_precision` returned."""
    write_atomic(path, json.dumps(result, indent=2, allow_nan=False) + "\n")


def read_precision(path: Path, key: Mapping[str, str]) -> dict[str, Any] | None:
    """Return what was kept for this key, the weights and images; None where it was not measured for them."""
    try:
        result = read_json(path)
    except ValueError:
        return None
    return result if {name: result.get(name) for name in key} == key else None


def precision_table(result: dict[str, Any]) -> str:
    """Lay the figures of `measure_precision` out as text, one class a line, without a last newline."""
    features, pixels = result["features"], result["pixels"]
    width = max(12, *map(len, features["per_class"]))
    lines = [f"{'':>{width}}  {'features':>9}  {'raw pixels':>10}"]
    rows = [(name, features["per_class"][name], pixels["per_class"][name]) for name in features["per_class"]]
    for name, *values in [*rows, ("mean", features["mean"], pixels["mean"])]:
        cells = ["-" if value is None else f"{100 * value:.2f} %" for value in values]
        lines.append(f"{name:>{width}}  {cells[0]:>9}  {cells[1]:>10}")
    return "\n".join([f"{result['run']}: {precision_line(result)}", "", *lines])


def precision_line(result: dict[str, Any]) -> str:
    """Say the mean precision of `measure_precision` in one line."""
    low, high = (100 * bound for bound in result["features"]["interval"])
    counts = f"{result['num_queries']:,} {result['split']} images among {result['num_items']:,} training images"
    mean = f"{100 * result['features']['mean']:.2f} % (95 % interval {low:.2f} to {high:.2f})"
    return f"precision at {result['k']}, {counts}: {mean}; by raw pixels {100 * result['pixels']['mean']:.2f} %"
