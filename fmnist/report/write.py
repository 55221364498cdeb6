"""Turn an evaluation into files: numbers, tables, one JSON summary. Runs no model, knows no ranks."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest
from sklearn.metrics import classification_report, confusion_matrix, precision_recall_fscore_support
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from fmnist.report.figures import NUM_BINS, plot_confusion_matrix, plot_reliability, write_file


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
        probabilities: float [N, C], CPU.
        labels: int64 [N], CPU, in 0..C-1.

    Source:
        Guo et al. 2017.
    """
    # torchmetrics puts a confidence of exactly 1 in a 16th bin of its own, and takes a row that rounding left
    # above 1 for logits. One float32 step below 1 keeps the 15 bins that the definition asks for.
    clamped = probabilities.float().clamp(max=1.0 - 2.0**-24)
    return float(multiclass_calibration_error(clamped, labels, probabilities.shape[1], NUM_BINS, norm="l1"))


def summarize(logits: Tensor, labels: Tensor, class_names: Sequence[str]) -> dict[str, Any]:
    """Compute every number of an evaluation.

    Args:
        logits: float32 [N, C], CPU, finite, N >= 1.
        labels: int64 [N], CPU, in 0..C-1.
        class_names: C different names, in label order.

    Returns:
        A JSON-ready dict: `top1` (fraction), `top1_interval` (95 %, Wilson), `loss` (mean cross-entropy, nats),
        `ece` (top-label, 15 equal-width bins), `num_images`, `confusion_matrix` (rows true, columns predicted),
        `per_class` (name -> precision, recall, f1, support; 0 where a ratio is 0/0).

    Raises:
        ValueError: If a shape, a label or a logit is outside the ranges above.

    Source:
        Guo et al. 2017 (calibration error); Wilson 1927 (interval).
    """
    _check(logits, labels, class_names)
    classes = range(len(class_names))
    logits64 = logits.double()  # so that the sum over images is exact to more digits than anyone prints
    predictions = logits.argmax(dim=1)
    num_images, correct = len(labels), int((predictions == labels).sum())
    # Labels are stated: a class that a small split lacks keeps its row.
    pair = labels.numpy(), predictions.numpy()
    columns = precision_recall_fscore_support(*pair, labels=classes, zero_division=0.0)
    return {
        "top1": correct / num_images,
        "top1_interval": wilson_interval(correct, num_images),
        "loss": float(F.cross_entropy(logits64, labels, reduction="sum")) / num_images,
        "ece": calibration_error(logits64.softmax(dim=1), labels),
        "num_images": num_images,
        "confusion_matrix": confusion_matrix(*pair, labels=classes).tolist(),
        "per_class": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f1), "support": int(support)}
            for name, p, r, f1, support in zip(class_names, *columns, strict=True)
        },
    }


def write_evaluation(
    directory: Path,
    logits: Tensor,
    labels: Tensor,
    indices: Tensor,
    class_names: Sequence[str],
    *,
    title: str,
    more: Mapping[str, Any] | None = None,
    notes: str = "",
) -> dict[str, Any]:
    """Write metrics.json, report.txt, predictions.csv, confusion_matrix.png and reliability.png.

    Args:
        directory: Where the files go; made if absent, files of the same names are replaced.
        logits: float32 [N, C], CPU, finite, N >= 1.
        labels: int64 [N], CPU, in 0..C-1.
        indices: int64 [N], CPU; the position of each image in its source split.
        class_names: C different names, in label order.
        title: Heading of the report and the figures.
        more: Further entries of metrics.json, JSON-ready.
        notes: Further lines at the end of report.txt.

    Returns:
        What `summarize` returns and `more`, which is also what metrics.json holds.

    Raises:
        ValueError: As `summarize`, or if indices are not [N].
    """
    summary = summarize(logits, labels, class_names) | dict(more or {})
    if indices.shape != labels.shape:
        raise ValueError(f"indices must be {list(labels.shape)} (one per image), got {list(indices.shape)}")
    low, high = summary["top1_interval"]
    headline = (
        f"{title}: top1 {100 * summary['top1']:.2f} % (95 % interval {100 * low:.2f} to {100 * high:.2f}), "
        f"loss {summary['loss']:.4f}, ECE {summary['ece']:.4f}, {summary['num_images']:,} images"
    )
    predictions = logits.argmax(dim=1)
    pair, names = (labels.numpy(), predictions.numpy()), list(class_names)
    options = {"labels": range(len(names)), "target_names": names, "zero_division": 0.0}
    table = classification_report(*pair, digits=4, **options)
    write_file(directory / "report.txt", f"{headline}\n\n{table}" + (f"\n{notes}\n" if notes else ""))

    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(["index", "label", "prediction", "confidence", *(f"p_{name}" for name in class_names)])
    probabilities = logits.double().softmax(dim=1).float()
    columns = (indices.tolist(), labels.tolist(), predictions.tolist(), probabilities.tolist())
    for index, label, prediction, row in zip(*columns, strict=True):
        cells = [f"{p:.9g}" for p in row]  # nine digits give a float32 back unchanged
        writer.writerow([index, label, prediction, cells[prediction], *cells])
    write_file(directory / "predictions.csv", rows.getvalue())

    plot_confusion_matrix(summary["confusion_matrix"], class_names, title, directory / "confusion_matrix.png")
    plot_reliability(logits, labels, summary["ece"], title, directory / "reliability.png")
    # Last, so that a directory with a metrics.json is a complete one.
    write_file(directory / "metrics.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return summary
