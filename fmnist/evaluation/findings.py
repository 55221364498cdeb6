"""All that is computed of one evaluation, for report/ to write."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fmnist.evaluation.calibration import calibrate
from fmnist.evaluation.exact_copies import ExactCopies
from fmnist.evaluation.lookalikes import Lookalike, lookalikes
from fmnist.evaluation.misclassified import Misclassified, confident_errors, confused_pairs
from fmnist.evaluation.near_copies import NearCopies
from fmnist.evaluation.numbers import (
    ReliabilityBins,
    accuracy,
    confusion_of,
    reliability_bins,
    subset_accuracies,
    summarize,
)
from fmnist.evaluation.occlusion import explain_errors
from fmnist.evaluation.outcome import Outcome
from fmnist.evaluation.risk_coverage import RiskCoverage, risk_coverage, trust

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
        maps: occlusion maps of the first of the errors, float32 [H, W]; see `occlusion_map`.
        map_seconds: that one of them took.
        risk: errors among its most confident answers; None where quick.
        complete: accuracy on subsets and calibration are among the metrics, as report.html shows them.
    """

    outcome: Outcome
    metrics: dict[str, Any]
    bins: ReliabilityBins
    scaled_bins: ReliabilityBins | None
    errors: list[Misclassified]
    pairs: list[tuple[int, int, int, int]]
    nearest: list[list[Lookalike]]
    maps: list[Tensor]
    map_seconds: float
    risk: RiskCoverage | None
    complete: bool


def findings(
    outcome: Outcome,
    copies: NearCopies | None = None,
    retrieval: dict[str, Any] | None = None,
    exact: Sequence[ExactCopies] = (),
    root: str | None = None,
    *,
    quick: bool = False,
) -> Findings:
    """Compute every number of one evaluation.

    Args:
        outcome: the model's logits on at least one image.
        copies: the near copies among its images; None for training images, and where they were not searched.
        retrieval: precision of its features' neighbours; None where it was not measured.
        exact: the images that stand in two splits of its data set.
        root: where the training images lie; None takes the run's place.
        quick: leave out accuracy on subsets, calibration, what can be automated, and what explains its errors.

    Raises:
        ValueError: logits that are not finite.
    """
    metrics = summarize(outcome.logits, outcome.labels, outcome.class_names)
    metrics["data"] = {"name": outcome.data, "sha256": outcome.data_sha256}
    metrics |= {"weights_sha256": outcome.weights_sha256, "tta": outcome.tta}
    scaled_bins = risk = None
    if not quick:
        calibration, temperature = None, 1.0
        if outcome.validation is not None:
            same_images = outcome.split == "val"
            calibration = calibrate(outcome.logits, outcome.labels, outcome.validation, same_images=same_images)
            scaled = (outcome.logits.double() / calibration.temperature).softmax(dim=1)
            scaled_bins = None if calibration.why_not else reliability_bins(scaled, outcome.labels)
            # as `predict` has it, so that its thresholds are those of the report
            temperature = outcome.trained.temperature if outcome.trained else calibration.temperature
        confidence, predictions = (outcome.logits.double() / temperature).softmax(dim=1).max(dim=1)
        risk = risk_coverage(confidence, predictions == outcome.labels)
        metrics |= {
            "subsets": subset_accuracies(outcome.by_tta, outcome.labels, copies) | _without_copies(outcome, exact),
            "calibration": calibration and asdict(calibration),
            "trust": trust(outcome, temperature),
            "cost": outcome.cost and asdict(outcome.cost),
            "retrieval": retrieval,
            "duplicates": [pair.as_dict() for pair in exact],
        }
    errors = confident_errors(outcome)
    shown = [] if quick else [error.position for error in errors[:NUM_SHOWN]]
    maps, map_seconds = explain_errors(outcome, shown)
    return Findings(
        outcome=outcome,
        metrics=metrics,
        bins=reliability_bins(outcome.logits.double().softmax(dim=1), outcome.labels),
        scaled_bins=scaled_bins,
        errors=errors,
        pairs=confused_pairs(confusion_of(metrics)),
        nearest=lookalikes(outcome, shown, root),
        maps=maps,
        map_seconds=map_seconds,
        risk=risk,
        complete=not quick,
    )


def _without_copies(outcome: Outcome, exact: Sequence[ExactCopies]) -> dict[str, Any]:
    """Return accuracy without the images that are in the training images too; empty where there are none, or all."""
    removed = [
        index for pair in exact if (pair.split, pair.other) == (outcome.split, "train") for index in pair.indices
    ]
    if not removed or len(removed) == len(outcome.labels):
        return {}
    kept = torch.ones(len(outcome.labels), dtype=torch.bool)
    kept[removed] = False
    of_kept = accuracy(outcome.by_tta["none"][kept], outcome.labels[kept])
    return {"without_exact_copies": of_kept | {"removed": len(removed)}}
