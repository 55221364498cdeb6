"""Every number of an evaluation, from logits and labels: accuracy with its interval, calibration, per class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.stats import binomtest
from sklearn.metrics import precision_recall_fscore_support
from torch import Tensor

from fmnist.evaluation.near_copies import NEAR_COPY, SIMILAR, NearCopies
from fmnist.metrics import score

NUM_BINS = 15
SCORES = ("top1", "macro_f1", "balanced_accuracy", "top5")  # of all images; the last from 20 classes on
MOST_DENSE = 1000  # classes of a confusion matrix that metrics.json holds whole; of more, the cells that hold images
RATIOS = ("precision", "recall", "f1")


def _check(logits: Tensor, labels: Tensor, class_names: Sequence[str]) -> None:
    num_images, num_classes = len(labels), len(class_names)
    if num_images == 0 or logits.shape != (num_images, num_classes):
        expected = f"[{num_images}, {num_classes}] (labels, class_names)"
        raise ValueError(f"logits must be {expected} with at least one image, got {list(logits.shape)}")
    if labels.min() < 0 or labels.max() >= num_classes:
        bounds = f"{int(labels.min())}..{int(labels.max())}"
        raise ValueError(f"labels must lie in 0..{num_classes - 1}, got {bounds}")
    if not torch.isfinite(logits).all():
        raise ValueError(f"logits must be finite, got {int((~logits.isfinite()).sum())} that are not")
    if len(set(class_names)) != num_classes:
        raise ValueError(f"class_names must differ from each other, got {list(class_names)}")


def wilson_interval(correct: int, num_images: int) -> list[float]:
    """Return the 95 % interval of a fraction, low then high; Wilson 1927."""
    interval = binomtest(correct, num_images).proportion_ci(confidence_level=0.95, method="wilson")
    return [float(interval.low), float(interval.high)]


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Compute the top-label calibration error in 15 equal-width bins.

    Args:
        probabilities: float [N, C], CPU, N >= 1.
        labels: int64 [N], CPU, in 0..C-1.

    Source:
        Guo et al. 2017.
    """
    bins = reliability_bins(probabilities, labels)
    return float((bins.count * np.abs(bins.top1 - bins.confidence)).sum() / len(labels))


def summarize(logits: Tensor, labels: Tensor, class_names: Sequence[str]) -> dict[str, Any]:
    """Compute every number of an evaluation.

    Args:
        logits: float32 [N, C], CPU, finite, N >= 1.
        labels: int64 [N], CPU, in 0..C-1.
        class_names: C different names, in label order.

    Returns:
        A JSON-ready dict: what `metrics.score` returns (`top1`, `macro_f1`, `balanced_accuracy`, `top5` from 20 classes
        on, `loss`), `top1_interval` (95 %, Wilson), `ece` (top-label, 15 equal-width bins), `num_images`,
        `confusion_matrix` (rows true, columns predicted; of more than MOST_DENSE classes `confusion_cells`, each
        `[true, predicted, count]` that is not zero), `per_class` (name -> precision, recall, f1, support; None
        where the class has no images, else 0 where a ratio is 0/0), `macro_avg` (their means over the classes with
        images, whose number is `num_classes`).

    Raises:
        ValueError: If a shape, a label or a logit is outside the ranges above.

    Source:
        Guo et al. 2017 (calibration error); Wilson 1927 (interval).
    """
    _check(logits, labels, class_names)
    classes = range(len(class_names))
    predictions, num_images = logits.argmax(dim=1), len(labels)
    # Labels are stated: a class that a small split lacks keeps its row.
    pair = labels.numpy(), predictions.numpy()
    columns = precision_recall_fscore_support(*pair, labels=classes, zero_division=0.0)
    rows = [(*map(float, row[:3]), int(row[3])) for row in zip(*columns, strict=True)]
    present = np.array([row[:3] for row in rows if row[3]])  # a class without images has no recall to average
    return {
        **{key: float(value) for key, value in score(logits, labels).items()},
        "top1_interval": wilson_interval(int((predictions == labels).sum()), num_images),
        "ece": calibration_error(logits.double().softmax(dim=1), labels),
        "num_images": num_images,
        **_confusion(labels, predictions, len(class_names)),
        "per_class": {
            name: dict(zip(RATIOS, row[:3] if row[3] else [None] * 3, strict=True)) | {"support": row[3]}
            for name, row in zip(class_names, rows, strict=True)
        },
        "macro_avg": dict(zip(RATIOS, present.mean(0).tolist(), strict=True)) | {"num_classes": len(present)},
    }


def _confusion(labels: Tensor, predictions: Tensor, num_classes: int) -> dict[str, list[list[int]]]:
    ones = np.ones(len(labels), dtype=np.int64)
    matrix = csr_array((ones, (labels.numpy(), predictions.numpy())), shape=(num_classes, num_classes))
    matrix.sum_duplicates()
    if num_classes <= MOST_DENSE:
        return {"confusion_matrix": matrix.toarray().tolist()}
    cells = matrix.tocoo()
    return {"confusion_cells": np.stack([cells.row, cells.col, cells.data], axis=1).tolist()}


def confusion_of(metrics: Mapping[str, Any]) -> csr_array:
    """Return the confusion matrix in what metrics.json holds, int64 [C, C]: rows true class, columns predicted."""
    if "confusion_matrix" in metrics:
        return csr_array(np.array(metrics["confusion_matrix"], dtype=np.int64))
    true, predicted, counts = np.array(metrics["confusion_cells"], dtype=np.int64).T
    return csr_array((counts, (true, predicted)), shape=(len(metrics["per_class"]),) * 2)


@dataclass(frozen=True, kw_only=True)
class ReliabilityBins:
    """Images sorted by confidence into 15 equal-width bins; one entry for each bin that holds an image.

    Attributes:
        center: float64 [B], the middle of the bin.
        count: int64 [B], its images.
        top1: float64 [B], the share that is right.
        confidence: float64 [B], their mean confidence.
    """

    center: np.ndarray
    count: np.ndarray
    top1: np.ndarray
    confidence: np.ndarray


def reliability_bins(probabilities: Tensor, labels: Tensor) -> ReliabilityBins:
    """Sort images into 15 equal-width bins of confidence.

    Args:
        probabilities: float [N, C], CPU, N >= 1.
        labels: int64 [N], CPU, in 0..C-1.
    """
    confidence, predictions = probabilities.double().max(dim=1)
    confidences = confidence.clamp(max=1.0).numpy()  # rounding can leave one just above
    correct = (predictions == labels).double().numpy()
    edges = np.linspace(0.0, 1.0, NUM_BINS + 1)
    counts = np.histogram(confidences, edges)[0]
    filled = counts > 0
    top1, mean = (np.histogram(confidences, edges, weights=values)[0][filled] for values in (correct, confidences))
    return ReliabilityBins(
        center=((edges[:-1] + edges[1:]) / 2)[filled],
        count=counts[filled],
        top1=top1 / counts[filled],
        confidence=mean / counts[filled],
    )


def accuracy(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return `top1`, its `top1_interval` (95 %, Wilson) and `num_images`."""
    correct, num_images = int((logits.argmax(dim=1) == labels).sum()), len(labels)
    return {
        "top1": correct / num_images,
        "top1_interval": wilson_interval(correct, num_images),
        "num_images": num_images,
    }


def subset_accuracies(
    by_tta: Mapping[str, Tensor], labels: Tensor, copies: NearCopies | None
) -> dict[str, dict[str, Any]]:
    """Compute accuracy on all images, with flip averaging, and without those that resemble a training image.

    Args:
        by_tta: float32 [N, C] logits without (none) and with (flip) flip averaging.
        labels: int64 [N].
        copies: the near copies among its images; none for training images.

    Returns:
        `all`, `flip_averaging`, `without_near_copies` and `without_similar`, the last two (and the first) without
        flip averaging and with `correlation` and `removed`.
    """
    plain = by_tta["none"]
    sets = {"all": accuracy(plain, labels), "flip_averaging": accuracy(by_tta["flip"], labels)}
    if copies is None:
        return sets
    for key, correlation in (("without_near_copies", NEAR_COPY), ("without_similar", SIMILAR)):
        removed = copies.above(correlation)
        kept = torch.ones(len(labels), dtype=torch.bool)
        kept[removed] = False
        if kept.any():
            about = {"correlation": correlation, "removed": len(removed)}
            sets[key] = accuracy(plain[kept], labels[kept]) | about
    return sets
