"""Compare evaluations of the same images: one table, one figure, and what may be chance."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor

from fmnist.config.same_run import differences
from fmnist.evaluation.outcome import Outcome
from fmnist.network import Trained
from fmnist.report.comparison_figure import pareto_front, plot_comparison
from fmnist.report.figures import write_file

# Table columns: key, heading, how a value is written. Names to the left, numbers to the right.
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "run": ("run", str),
    "model": ("model", str),
    "parameters": ("parameters", "{:,}".format),
    "flops_per_image": ("MFLOPs/image", lambda value: f"{value / 1e6:,.2f}"),
    "top1": ("top1", lambda value: f"{100 * value:.2f} %"),
    "top1_interval": ("95 % interval", lambda value: f"{100 * value[0]:.2f}-{100 * value[1]:.2f}"),
    "loss": ("loss", "{:.4f}".format),
    "ece": ("ece", "{:.4f}".format),
    "latency_ms_1": ("ms at 1", "{:,.2f}".format),
    "images_per_second_1": ("images/s at 1", "{:,.0f}".format),
    "latency_ms_256": ("ms at 256", "{:,.1f}".format),
    "images_per_second_256": ("images/s at 256", "{:,.0f}".format),
    "mcnemar": ("against the next", lambda value: f"{value[0]}:{value[1]}, p {value[2]:.2g}"),
    "front": ("front", str),
}


def check_comparable(opened: Sequence[Trained], split: str) -> None:
    """Refuse runs whose images of a split differ.

    Raises:
        ValueError: one line with the sizes.
    """
    sizes = {trained.cfg.data.val_size for trained in opened}
    if split != "test" and len(sizes) > 1:
        listed = ", ".join(map(str, sorted(sizes)))
        raise ValueError(f"the runs have different {split} images (data.val_size {listed}): compare with --split test")


def mcnemar(first: Tensor, second: Tensor) -> tuple[int, int, float]:
    """Test whether two models are equally often right: exact, two-sided.

    Args:
        first, second: bool [N], which of the same images each gets right.

    Returns:
        How many only the first gets right, how many only the second, and the probability of a split at least as
        uneven if both were equally good.

    Source:
        McNemar 1947; Dietterich 1998.
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    num_discordant = only_first + only_second
    p = float(binomtest(only_first, num_discordant, 0.5).pvalue) if num_discordant else 1.0
    return only_first, only_second, p


def seed_groups(outcomes: Sequence[Outcome]) -> list[list[int]]:
    """Return the positions of runs that differ by the seed only, for groups of two and more."""
    groups: list[list[int]] = []
    for i, outcome in enumerate(outcomes):
        if outcome.trained is None:
            continue
        for group in groups:
            other = outcomes[group[0]]
            assert other.trained is not None
            changed = differences(other.trained.cfg, outcome.trained.cfg)
            if outcome.tta == other.tta and all(line.startswith("seed was ") for line in changed):
                group.append(i)
                break
        else:
            groups.append([i])
    seeds = [[outcomes[i].trained.cfg.seed for i in group] for group in groups]  # type: ignore[union-attr]
    # The same seed twice is two checkpoints of a run, or a copy: not a sample of seeds.
    return [group for group, drawn in zip(groups, seeds, strict=True) if len(group) > 1 and len({*drawn}) == len(drawn)]


def comparison_rows(outcomes: Sequence[Outcome], results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lay outcomes out as rows, the most accurate first, each tested against the next.

    Args:
        outcomes: two and more, of the same images.
        results: what their metrics.json hold.

    Raises:
        ValueError: the images differ.
    """
    if any(not torch.equal(outcome.labels, outcomes[0].labels) for outcome in outcomes):
        raise ValueError("the runs were evaluated on different images: give one --data.root for all")
    order = sorted(range(len(outcomes)), key=lambda i: -results[i]["top1"])
    rows = []
    for rank, i in enumerate(order):
        outcome, result = outcomes[i], results[i]
        row: dict[str, Any] = {"run": outcome.name, "model": outcome.model}
        row |= {key: result[key] for key in ("top1", "top1_interval", "loss", "ece", "num_images")}
        if (cost := outcome.cost) is not None:
            row |= {"parameters": cost.parameters, "flops_per_image": cost.flops_per_image}
            for timing in cost.timings:
                row[f"latency_ms_{timing.batch_size}"] = timing.median_ms
                row[f"images_per_second_{timing.batch_size}"] = timing.images_per_second
        if rank + 1 < len(order):
            row["mcnemar"] = mcnemar(outcome.correct, outcomes[order[rank + 1]].correct)
        rows.append(row)
    for key, word in (("flops_per_image", "FLOPs"), ("latency_ms_1", "ms")):
        if all(key in row for row in rows):
            for i in pareto_front([row[key] for row in rows], [row["top1"] for row in rows]):
                rows[i]["front"] = ", ".join(filter(None, [rows[i].get("front"), word]))
    return rows


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay several evaluations out as a fixed-width text table, in the order given.

    Args:
        rows: One mapping per run with the keys of COLUMNS; what is missing or None shows as "-", and a column
            that no row has is left out, but for `run`.

    Returns:
        A header, a rule and one line per run, without a last newline.
    """
    keys = [key for key in COLUMNS if key == "run" or any(row.get(key) is not None for row in rows)]
    heads = [COLUMNS[key][0] for key in keys]
    body = [["-" if row.get(key) is None else COLUMNS[key][1](row[key]) for key in keys] for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *body, strict=True)]

    def line(cells: Sequence[str]) -> str:
        # Names to the left, numbers to the right, so that digits stand under digits.
        triples = zip(keys, cells, widths, strict=True)
        left = ("run", "model", "front")
        return "  ".join(cell.ljust(width) if key in left else cell.rjust(width) for key, cell, width in triples)

    return "\n".join([line(heads), "  ".join("-" * width for width in widths), *map(line, body)])


def seed_lines(outcomes: Sequence[Outcome], results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say mean and spread of each group of runs that differ by the seed only."""
    lines = []
    for group in seed_groups(outcomes):
        top1 = [100 * results[i]["top1"] for i in group]
        names = ", ".join(outcomes[i].name for i in group)
        lines.append(
            f"{len(group)} seeds ({names}): top1 mean {statistics.mean(top1):.2f} %, "
            f"standard deviation {statistics.stdev(top1):.2f}, {min(top1):.2f} to {max(top1):.2f}"
        )
    return lines


def write_comparison(outcomes: Sequence[Outcome], results: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """Write comparison.txt, comparison.json and comparison.png.

    Args:
        outcomes: two and more, of the same images.
        results: what their metrics.json hold.
        folder: made if absent.

    Returns:
        The text of comparison.txt.

    Raises:
        ValueError: the images differ.
    """
    rows = comparison_rows(outcomes, results)
    seeds = seed_lines(outcomes, results)
    lines = [comparison_table(rows), "", *seeds]
    lines.append(
        f"{rows[0]['num_images']:,} {outcomes[0].split} images, most accurate first. Against the next: images that "
        "only this row gets right : only the next row, McNemar's exact p."
    )
    if (cost := outcomes[0].cost) is not None:
        lines.append(
            f"Time of one forward at batch 1 and 256, median, on {cost.device}, {cost.precision}, torch {cost.torch}; "
            "a multiply-add is two FLOPs. Front: no other row is as cheap and as accurate."
        )
        if any(outcome.members for outcome in outcomes):
            lines.append("What an ensemble costs is the sum of its members.")
    text = "\n".join(lines) + "\n"
    write_file(folder / "comparison.txt", text)
    write_file(folder / "comparison.json", json.dumps({"rows": rows, "seeds": seeds}, indent=2) + "\n")
    plot_comparison(rows, folder / "comparison.png")
    return text
