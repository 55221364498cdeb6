"""Several evaluations of the same images side by side: what may be chance, what seeds change, which none beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor

from fmnist.config.same_run import differences
from fmnist.evaluation.outcome import Outcome
from fmnist.trained import Trained


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
    for key in ("flops_per_image", "latency_ms_1"):
        if all(key in row for row in rows):
            for i in pareto_front([row[key] for row in rows], [row["top1"] for row in rows]):
                rows[i]["front"] = [*rows[i].get("front", ()), key]
    return rows


def pareto_front(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Return the positions that no other beats: none is as cheap and as good, and better in one of the two.

    Args:
        costs: less is better.
        scores: more is better.

    Returns:
        Positions, cheapest first.
    """
    points = list(zip(costs, scores, strict=True))

    def beaten(cost: float, score: float) -> bool:
        return any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points)

    kept = [i for i, point in enumerate(points) if not beaten(*point)]
    return sorted(kept, key=lambda i: points[i])
