"""Compare evaluations of the same images: one table, one figure, and what may be chance."""

import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fmnist.evaluation.outcome import Outcome
from fmnist.evaluation.seeds import repeated_seeds, seed_rows, unequal_lengths
from fmnist.report.comparison_figure import plot_comparison
from fmnist.runtime.files import write_atomic, write_json

# The costs against which a row may lie on the Pareto front, in a word each.
FRONTS = {"flops_per_image": "FLOPs", "latency_ms_1": "ms"}
# Table columns: key, heading, how a value is written. Names to the left, numbers to the right.
Columns = Mapping[str, tuple[str, Callable[[Any], str]]]
COLUMNS: Columns = {
    "run": ("run", str),
    "model": ("model", str),
    "parameters": ("parameters", "{:,}".format),
    "flops_per_image": ("MFLOPs/image", lambda value: f"{value / 1e6:,.2f}"),
    "val_top1": ("val top1", lambda value: f"{100 * value:.2f} %"),
    "chosen": ("chosen", lambda _: "by validation"),
    "top1": ("top1", lambda value: f"{100 * value:.2f} %"),
    "top1_spread": ("+-", lambda value: f"{100 * value:.2f}"),
    "top1_interval": ("95 % interval", lambda value: f"{100 * value[0]:.2f}-{100 * value[1]:.2f}"),
    "macro_f1": ("macro F1", lambda value: f"{100 * value:.2f} %"),
    "balanced_accuracy": ("balanced", lambda value: f"{100 * value:.2f} %"),
    "top5": ("top5", lambda value: f"{100 * value:.2f} %"),
    "loss": ("loss", "{:.4f}".format),
    "ece": ("ece", "{:.4f}".format),
    "latency_ms_1": ("ms at 1", "{:,.2f}".format),
    "images_per_second_1": ("images/s at 1", "{:,.0f}".format),
    "latency_ms_256": ("ms at 256", "{:,.1f}".format),
    "images_per_second_256": ("images/s at 256", "{:,.0f}".format),
    "mcnemar": ("against the next", lambda value: f"{value[0]}:{value[1]}, p {value[2]:.2g}"),
    "front": ("front", lambda costs: ", ".join(FRONTS[cost] for cost in costs)),
}


def options_that_differ(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the options of each run that another one has otherwise, with values as YAML has them, a run a paragraph."""
    lines = []
    for row in rows:
        pairs = (row.get("options") or {}).items()
        values = [f"{key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in pairs]
        lines += textwrap.wrap(f"  {row['run']}: {', '.join(values)}", 120, subsequent_indent="    ") if values else []
    return ["Options that differ:", *lines] if lines else []


def text_table(rows: Sequence[Mapping[str, Any]], columns: Columns, left: Sequence[str]) -> str:
    """Lay rows out as a fixed-width text table, in the order given.

    Args:
        rows: What is missing or None shows as "-", and a column that no row has is left out, but for the first.
        columns: By key of a row, as COLUMNS.
        left: Keys of the columns that hold names.

    Returns:
        A header, a rule and one line per row, without a last newline.
    """
    first = next(iter(columns))
    keys = [key for key in columns if key == first or any(row.get(key) is not None for row in rows)]
    heads = [columns[key][0] for key in keys]
    body = [["-" if row.get(key) is None else columns[key][1](row[key]) for key in keys] for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *body, strict=True)]

    def line(cells: Sequence[str]) -> str:
        # Names to the left, numbers to the right, so that digits stand under digits.
        triples = zip(keys, cells, widths, strict=True)
        return "  ".join(cell.ljust(width) if key in left else cell.rjust(width) for key, cell, width in triples)

    return "\n".join([line(heads), "  ".join("-" * width for width in widths), *map(line, body)])


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay several evaluations out as a text table: one mapping per run with the keys of COLUMNS."""
    return text_table(rows, COLUMNS, ("run", "model", "chosen", "front"))


def write_comparison(
    rows: Sequence[Mapping[str, Any]], outcomes: Sequence[Outcome], results: Sequence[Mapping[str, Any]], folder: Path
) -> str:
    """Write comparison.txt, comparison.json and comparison.png.

    Args:
        rows: from `comparison_rows`.
        outcomes: two and more, of the same images.
        results: what their metrics.json hold.
        folder: made if absent.

    Returns:
        The text of comparison.txt.
    """
    seeds = seed_rows(rows, outcomes, results)
    lines = [comparison_table([*rows, *seeds]), ""]
    if seeds:
        lines.append("+-: the standard deviation over seeds.")
    lines += repeated_seeds(outcomes) + unequal_lengths(outcomes)
    lines.append(
        f"{rows[0]['num_images']:,} {outcomes[0].split} images, most accurate first. Against the next: images that "
        "only this row gets right : only the next row, McNemar's exact p."
    )
    lines += options_that_differ(rows)
    if (cost := outcomes[0].cost) is not None:
        lines.append(
            f"Time of one forward at batch 1 and 256, median, on {cost.device}, {cost.precision}, torch {cost.torch}; "
            "a multiply-add is two FLOPs. Front: no other row is as cheap and as accurate."
        )
        if any(outcome.members for outcome in outcomes):
            lines.append("What an ensemble costs is the sum of its members.")
    text = "\n".join(lines) + "\n"
    write_atomic(folder / "comparison.txt", text)
    write_json(folder / "comparison.json", {"rows": rows, "seeds": seeds})
    plot_comparison(rows, folder / "comparison.png")
    return text
