"""What can be automated: errors among the most confident answers, and the confidence from which on they are few."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binom
from torch import Tensor

from fmnist.evaluation.conformal import COVERAGES, set_coverage
from fmnist.evaluation.numbers import wilson_interval
from fmnist.evaluation.outcome import Outcome

MAX_ERRORS = (0.005, 0.01, 0.02, 0.05)  # of the report
CHANCE = 0.1  # that a threshold lets more errors through than asked for
STARTS, STEP = (0.1, 0.5), 0.01  # shares of the images: where the two searches begin, and their steps
POINTS = 200  # of the curve


@dataclass(frozen=True, kw_only=True)
class RiskCoverage:
    """The share of errors among the most confident answers, by the share of images answered.

    Attributes:
        coverage: float64 [P], rising to 1.
        risk: float64 [P], errors among those answered.
        low, high: float64 [P], the 95 % interval of risk; Wilson 1927.
    """

    coverage: np.ndarray
    risk: np.ndarray
    low: np.ndarray
    high: np.ndarray


def _errors_by_rank(confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    """Return the confidences, highest first, and how many errors there are down to each."""
    order = confidence.argsort(descending=True, stable=True)
    return confidence[order], (~correct[order]).cumsum(0)


def confidence_threshold(confidence: Tensor, correct: Tensor, max_error: float) -> float | None:
    """Find the lowest confidence from which on at most a share of answers is wrong.

    Down from the most confident tenth of the images, and from the most confident half, a step lets more images in as
    long as so few errors among them would be seen in at most one of twenty cases if more than `max_error` were wrong;
    the further of the two counts. So in at most one of ten cases more are wrong on new images, whatever the model.
    Taking the plain share of errors, it would be every second case; taking the lowest confidence that passes the test
    wherever it lies, every third with a model whose errors hardly depend on its confidence (docs/trust.md).

    Args:
        confidence: float64 [N], CPU, of validation images.
        correct: bool [N], CPU, whether each is answered right.
        max_error: above 0, below 1.

    Returns:
        The confidence of an image; None where none is low enough.

    Source:
        Angelopoulos et al. 2021, Learn then Test: fixed sequences of hypotheses, the binomial tail.
    """
    ranked, errors = (each.numpy() for each in _errors_by_rank(confidence, correct))
    num_images, found = len(ranked), []
    for start in STARTS:
        first = max(math.ceil(start * num_images), least_answers(max_error))
        counts = np.arange(first, num_images + 1, max(1, round(STEP * num_images)))
        if len(counts):  # images of one confidence are answered together
            counts = np.searchsorted(-ranked, -ranked[counts - 1], side="right")
            passed = binom.cdf(errors[counts - 1], counts, max_error) <= CHANCE / len(STARTS)
            found += ranked[counts[np.logical_and.accumulate(passed)] - 1].tolist()
    return min(found, default=None)


def least_answers(max_error: float) -> int:
    """Return how many validation images have to be right, without one error, before anything is automatic."""
    return math.ceil(math.log(CHANCE / len(STARTS)) / math.log1p(-max_error))


def risk_coverage(confidence: Tensor, correct: Tensor) -> RiskCoverage:
    """Compute the curve of risk against coverage at POINTS shares of the images, or at each of fewer.

    Args:
        confidence: float64 [N], CPU, N >= 1.
        correct: bool [N], CPU.
    """
    _, errors = _errors_by_rank(confidence, correct)
    num_images = len(errors)
    answered = np.unique(np.ceil(np.linspace(0, 1, POINTS + 1)[1:] * num_images).astype(int))
    wrong = errors.numpy()[answered - 1]
    intervals = np.array([wilson_interval(int(k), int(n)) for k, n in zip(wrong, answered, strict=True)])
    return RiskCoverage(
        coverage=answered / num_images, risk=wrong / answered, low=intervals[:, 0], high=intervals[:, 1]
    )


def automation(
    validation: tuple[Tensor, Tensor], evaluated: tuple[Tensor, Tensor], max_error: float
) -> dict[str, float | int | list[float] | None]:
    """Take a threshold from validation images and count what it gives on others.

    Args:
        validation: float64 [M, C] probabilities and int64 [M] labels.
        evaluated: the same of N images.
        max_error: the share of errors asked for.

    Returns:
        JSON-ready: `max_error`, `threshold` (None: nothing is automatic), `automatic_val` and `automatic` (shares of
        the images), `errors` among the automatic ones with its `interval` (95 %, Wilson); the last two None where no
        image is automatic.
    """
    pairs = [(*p.max(dim=1), labels) for p, labels in (validation, evaluated)]
    (known, guess, truth), (confidence, predictions, labels) = pairs
    threshold = confidence_threshold(known, guess == truth, max_error)
    limit = math.inf if threshold is None else threshold
    chosen = confidence >= limit
    count, wrong = int(chosen.sum()), int((predictions != labels)[chosen].sum())
    return {
        "max_error": max_error,
        "threshold": threshold,
        "automatic_val": float((known >= limit).double().mean()),
        "automatic": count / len(labels),
        "errors": wrong / count if count else None,
        "interval": wilson_interval(wrong, count) if count else None,
    }


def trust(outcome: Outcome, temperature: float) -> dict[str, Any] | None:
    """Compute what metrics.json holds of automation and of prediction sets; None without validation images.

    Args:
        outcome: of an evaluation.
        temperature: that its logits are divided by.
    """
    if outcome.validation is None:
        return None
    validation = (outcome.validation[0].double() / temperature).softmax(dim=1), outcome.validation[1]
    evaluated = (outcome.logits.double() / temperature).softmax(dim=1), outcome.labels
    return {
        "num_validation": len(validation[1]),
        "automation": [automation(validation, evaluated, max_error) for max_error in MAX_ERRORS],
        "sets": [set_coverage(validation, evaluated, coverage, outcome.class_names) for coverage in COVERAGES],
    }
