"""Several evaluations of the same images side by side: what may be chance, which none beats."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from scipy.stats import binomtest
from torch import Tensor

from fmnist.config.same_run import recipe
from fmnist.config.schema import Config
from fmnist.data.info import SplitName
from fmnist.evaluation.numbers import SCORES
from fmnist.evaluation.outcome import Outcome, check_same_images
from fmnist.runtime.console import one_line
from fmnist.trained import Trained

logger = logging.getLogger("fmnist")


def split_to_use(opened: Sequence[Trained], asked: SplitName | None) -> SplitName:
    """Return the split to evaluate on: the one asked for, else test, or val where a data set has no test images."""
    if asked is not None:
        return asked
    if without := [trained for trained in opened if "test" not in trained.splits]:
        logger.info("%s has no test images: its validation images are used", without[0].info.title)
        return "val"
    return "test"


def check_comparable(opened: Sequence[Trained], split: str) -> None:
    """Refuse runs whose classes, or images of a split, differ.

    Raises:
        ValueError: one line with what differs.
    """
    classes = {trained.class_names: trained for trained in opened}
    if len(classes) > 1:
        listed = ", ".join(f"{one.name}: {one.info.title}, {len(names)} classes" for names, one in classes.items())
        raise ValueError(f"the runs are of different data sets ({listed}): compare runs of one")
    held_out = {trained.info.num_val for trained in opened}  # by whichever option, or in a file of their own
    if split != "test" and len(held_out) > 1:
        listed = " and ".join(f"{count:,}" for count in sorted(held_out))
        raise ValueError(f"the runs have different {split} images ({listed} held out): compare with --split test")


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


def comparison_rows(outcomes: Sequence[Outcome], results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lay outcomes out as rows, the most accurate first, each tested against the next.

    Args:
        outcomes: two and more, of the same images.
        results: what their metrics.json hold.

    Raises:
        ValueError: the images differ.
    """
    check_same_images(outcomes)
    order = sorted(range(len(outcomes)), key=lambda i: -results[i]["top1"])
    own = own_options([outcome.trained.cfg if outcome.trained else None for outcome in outcomes])
    val = [_validated(outcome, "top1") for outcome in outcomes]
    # The choice is by the number that chose each run's epoch; runs that differ in it are compared by accuracy.
    kept = {outcome.trained.cfg.evaluation.best for outcome in outcomes if outcome.trained}
    by = kept.pop() if len(kept) == 1 else "top1"
    chosen = [_validated(outcome, by) for outcome in outcomes]
    best = (min if by == "loss" else max)((value for value in chosen if value is not None), default=None)
    rows = []
    for rank, i in enumerate(order):
        outcome, result = outcomes[i], results[i]
        row: dict[str, Any] = {
            "run": outcome.name,
            "model": outcome.model,
            "options": own[i] or None,
            "val_top1": val[i],
        }
        if best is not None and chosen[i] == best:
            row["chosen"] = True
        numbers = (*SCORES, "top1_interval", "loss", "ece", "num_images")
        row |= {key: result[key] for key in numbers if key in result}
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


def _validated(outcome: Outcome, name: str) -> float | None:
    """Return a validation number of the weights; summary.json has those of the run's own, not of its checkpoints."""
    trained = outcome.trained
    return None if trained is None or trained.checkpoint else trained.summary.get(f"val.{name}")


def told_apart(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Give runs of one name, in different folders, their path below the folder that they have in common."""
    places: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.trained is not None:
            places.setdefault(outcome.name, []).append(os.path.realpath(outcome.trained.directory))

    def name(outcome: Outcome) -> str:
        if outcome.trained is None or len(alike := places[outcome.name]) == 1:
            return outcome.name
        below = os.path.relpath(os.path.realpath(outcome.trained.directory.parent), os.path.commonpath(alike))
        return one_line(os.path.join(below, outcome.name))

    return [replace(outcome, name=name(outcome)) for outcome in outcomes]


def own_options(configs: Sequence[Config | None]) -> list[dict[str, Any]]:
    """Return for each config the options that differ between any two of them, with its own values.

    Args:
        configs: None stands for what has none, an ensemble.
    """
    recipes = [{} if cfg is None else recipe(cfg) for cfg in configs]
    known = [each for each in recipes if each]
    differ = [key for key in (known or [{}])[0] if any(each[key] != known[0][key] for each in known)]
    return [{key: each[key] for key in differ if each} for each in recipes]


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
