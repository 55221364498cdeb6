"""All that is computed of one evaluation, for report/ to write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fmnist.evaluation.calibration import calibrate
from fmnist.evaluation.lookalikes import Lookalike, lookalikes
from fmnist.evaluation.misclassified import Misclassified, confident_errors, confused_pairs
from fmnist.evaluation.near_copies import NearCopies
from fmnist.evaluation.numbers import ReliabilityBins, reliability_bins, subset_accuracies, summarize
from fmnist.evaluation.outcome import Outcome

NUM_SHOWN = 24  # of the most confident errors, on the page


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The numbers of one evaluation.

    Attributes:
        outcome: the model's logits on the images, and where the files go.
        metrics: what metrics.json holds.
        bins: images by confidence.
        scaled_bins: the same after temperature scaling; None where no temperature was fitted.
        errors: all misclassified images, the most confident first.
        pairs: classes taken for each other, the most confused first; see `confused_pairs`.
        nearest: for the first of the errors, the training images most like it; empty where they are not at hand.
        complete: accuracy on subsets and calibration are among the metrics, as report.html shows them.
    """

    outcome: Outcome
    metrics: dict[str, Any]
    bins: ReliabilityBins
    scaled_bins: ReliabilityBins | None
    errors: list[Misclassified]
    pairs: list[tuple[int, int, int, int]]
    nearest: list[list[Lookalike]]
    complete: bool


def findings(
    outcome: Outcome,
    copies: NearCopies | None = None,
    retrieval: dict[str, Any] | None = None,
    root: str | None = None,
    *,
    quick: bool = False,
) -> Findings:
    """Compute every number of one evaluation.

    Args:
        outcome: the model's logits on at least one image.
        copies: the near copies among its images; None for training images.
        retrieval: precision of its features' neighbours; None where it was not measured.
        root: folder with the training images; None takes the run's.
        quick: leave out accuracy on subsets, calibration and the training images most like its errors.

    Raises:
        ValueError: logits that are not finite.
    """
    metrics = summarize(outcome.logits, outcome.labels, outcome.class_names)
    metrics["data"] = {"name": outcome.data, "sha256": outcome.data_sha256}
    scaled_bins = None
    if not quick:
        calibration = None
        if outcome.validation is not None:
            same_images = outcome.split == "val"
            calibration = calibrate(outcome.logits, outcome.labels, outcome.validation, same_images=same_images)
            scaled = (outcome.logits.double() / calibration.temperature).softmax(dim=1)
            scaled_bins = reliability_bins(scaled, outcome.labels)
        metrics |= {
            "subsets": subset_accuracies(outcome.by_tta, outcome.labels, copies),
            "calibration": calibration and calibration.as_dict(),
            "cost": outcome.cost and outcome.cost.as_dict(),
            "retrieval": retrieval,
        }
    errors = confident_errors(outcome)
    shown = [] if quick else [error.position for error in errors[:NUM_SHOWN]]
    return Findings(
        outcome=outcome,
        metrics=metrics,
        bins=reliability_bins(outcome.logits.double().softmax(dim=1), outcome.labels),
        scaled_bins=scaled_bins,
        errors=errors,
        pairs=confused_pairs(metrics["confusion_matrix"]),
        nearest=lookalikes(outcome, shown, root),
        complete=not quick,
    )
