"""Prediction sets: the classes that may be right, with the coverage asked for in every class."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from scipy.stats import betabinom
from torch import Tensor

COVERAGES = (0.9, 0.95, 0.99)  # of the report


def _num_below(num_images: int, coverage: float) -> int:
    """Return how many of a class's validation images may lie below its threshold; -1 where there are too few images."""
    return num_images - math.ceil(coverage * (num_images + 1) - 1e-9)  # 0.55 * 100 is 55.00000000000001


def class_thresholds(probabilities: Tensor, labels: Tensor, coverage: float) -> Tensor:
    """Find, for each class, the probability from which on it belongs to a prediction set.

    Split conformal prediction by class, with the score 1 - probability of the true class: of n validation images of a
    class, the threshold lets ceil((n + 1) coverage) in. A new image of that class then has it in its set with a chance
    of at least `coverage`, whatever the model.

    Args:
        probabilities: float64 [N, C], CPU, of validation images.
        labels: int64 [N], CPU.
        coverage: above 0, below 1.

    Returns:
        float64 [C]; 0, so that the class is in every set, where it has fewer than coverage / (1 - coverage) images.

    Source:
        Vovk 2012, Conditional validity of inductive conformal predictors; Sadinle et al. 2019 for the score.
    """
    thresholds = torch.zeros(probabilities.shape[1], dtype=torch.float64)
    for label in range(len(thresholds)):
        own = probabilities[labels == label, label].double().sort().values
        if (below := _num_below(len(own), coverage)) >= 0:
            thresholds[label] = own[below]
    return thresholds


def least_images(coverage: float) -> int:
    """Return how many validation images a class needs for a coverage, so that some sets can do without it."""
    return math.ceil(coverage / (1 - coverage) - 1e-6)  # of 0.9999: 9998.999999998899, and 9999


def prediction_sets(probabilities: Tensor, thresholds: Tensor) -> Tensor:
    """Return which classes may be right: bool [N, C]; the likeliest always, so that no set is empty.

    Args:
        probabilities: float64 [N, C].
        thresholds: float64 [C], see `class_thresholds`.
    """
    sets = probabilities >= thresholds
    return sets.scatter(1, probabilities.argmax(dim=1, keepdim=True), value=True)


@functools.cache  # classes often have as many images as others
def expected_coverage(num_validation: int, num_images: int, coverage: float, chance: float) -> tuple[float, float]:
    """Return where a class's coverage on other images falls by chance, thresholds being made of so few images.

    Args:
        num_validation: of the class, at least `least_images`.
        num_images: of the class, on which the coverage is counted.
        coverage: asked for.
        chance: of being outside, 0 to 1.

    Returns:
        Low and high, without the likeliest class that `prediction_sets` adds.
    """
    below = _num_below(num_validation, coverage)
    counts = betabinom(num_images, num_validation - below, below + 1)
    return float(counts.ppf(chance / 2) / num_images), float(counts.ppf(1 - chance / 2) / num_images)


def set_coverage(
    validation: tuple[Tensor, Tensor], evaluated: tuple[Tensor, Tensor], coverage: float, class_names: Sequence[str]
) -> dict[str, Any]:
    """Count how often the sets hold the true class, overall and by class.

    Args:
        validation: float64 [M, C] probabilities and int64 [M] labels that set the thresholds.
        evaluated: the same of the N images that are counted.
        coverage: asked for.
        class_names: C names.

    Returns:
        JSON-ready: `asked`, `coverage`, `mean_size` (classes a set), `worst_class` and its `worst_coverage`, of the
        classes that have images; `in_every_set`, classes with too few validation images; `per_class`, each with
        `threshold`, `coverage`, and `expected`, where it falls by chance in 95 % of cases in all classes together; and
        `below`, those that lie under it.
    """
    thresholds = class_thresholds(*validation, coverage)
    probabilities, labels = evaluated
    sets = prediction_sets(probabilities, thresholds)
    hit = sets[torch.arange(len(labels)), labels]
    known = validation[1].bincount(minlength=len(class_names)).tolist()
    support = labels.bincount(minlength=len(class_names)).tolist()
    few, present = least_images(coverage), sum(count > 0 for count in support)
    covered = [float(hit[labels == label].double().mean()) if count else None for label, count in enumerate(support)]
    worst = min((label for label in range(len(covered)) if support[label]), key=lambda label: covered[label] or 0.0)
    rows = zip(thresholds.tolist(), covered, known, support, strict=True)
    per_class = [
        {
            "threshold": threshold,
            "coverage": share,
            "expected": expected_coverage(calibrated, count, coverage, 0.05 / present)
            if count and calibrated >= few
            else None,
        }
        for threshold, share, calibrated, count in rows
    ]
    return {
        "asked": coverage,
        "coverage": float(hit.double().mean()),
        "mean_size": float(sets.sum(dim=1).double().mean()),
        "worst_class": class_names[worst],
        "worst_coverage": covered[worst],
        "below": [
            name
            for name, row in zip(class_names, per_class, strict=True)
            if row["expected"] and row["coverage"] is not None and row["coverage"] < row["expected"][0]
        ],
        "in_every_set": [name for name, count in zip(class_names, known, strict=True) if count < few],
        "per_class": dict(zip(class_names, per_class, strict=True)),
    }
