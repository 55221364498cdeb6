"""report.html: one evaluation as one offline page, with its figures and pictures inside."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from fmnist.config.schema import to_yaml
from fmnist.data.fashion_mnist import CLASS_NAMES
from fmnist.evaluation.outcome import Outcome
from fmnist.report.figures import write_file
from fmnist.report.page_figures import learning_curves, picture, reliability
from fmnist.tracking.tracker import METRICS_FILE

# People without fashion expertise, 1,000 test images, majority of three labels: the data set's own benchmark table.
HUMAN_TOP1 = 0.835
NUM_PAIRS, PICTURES_OF_A_PAIR, NUM_ERRORS = 4, 8, 24


@dataclass(frozen=True, kw_only=True)
class Error:
    """A picture that was taken for another class.

    Attributes:
        index: its position in the split.
        label, prediction: class names.
        confidence: probability of the prediction.
        p_label: probability of the label.
    """

    index: int
    label: str
    prediction: str
    confidence: float
    p_label: float

    def row(self, outcome: Outcome) -> dict[str, Any]:
        """Return a row of an error table, with the picture."""
        return {
            "picture": outcome.images[self.index].numpy(),
            "index": self.index,
            "label": self.label,
            "prediction": self.prediction,
            "confidence": self.confidence,
            "p_label": self.p_label,
        }


def confident_errors(outcome: Outcome, limit: int | None = None) -> list[Error]:
    """Return the errors, most confident first.

    Args:
        outcome: of an evaluation.
        limit: how many at most; none is all.
    """
    probabilities = outcome.logits.double().softmax(dim=1)
    confidence, predictions = probabilities.max(dim=1)
    wrong = (predictions != outcome.labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)][:limit]
    return [
        Error(
            index=index,
            label=CLASS_NAMES[outcome.labels[index]],
            prediction=CLASS_NAMES[predictions[index]],
            confidence=float(confidence[index]),
            p_label=float(probabilities[index, outcome.labels[index]]),
        )
        for index in wrong.tolist()
    ]


def confused_pairs(confusion: Sequence[Sequence[int]]) -> list[tuple[int, int, int, int]]:
    """Return pairs of classes that are taken for each other, the most confused first.

    Args:
        confusion: [C, C] counts; rows true class, columns predicted.

    Returns:
        a, b, how many a were taken for b and how many b for a; the first is the larger. Pairs without any are left out.
    """
    counts, pairs = np.asarray(confusion), []
    for low in range(len(counts)):
        for high in range(low + 1, len(counts)):
            a, b = (low, high) if counts[low, high] >= counts[high, low] else (high, low)
            if counts[a, b]:
                pairs.append((a, b, int(counts[a, b]), int(counts[b, a])))
    return sorted(pairs, key=lambda pair: -(pair[2] + pair[3]))


def _pairs(outcome: Outcome, confusion: Sequence[Sequence[int]], errors: list[Error]) -> list[dict[str, Any]]:
    shown = []
    total = max(1, len(errors))
    for a, b, forth, back in confused_pairs(confusion)[:NUM_PAIRS]:
        ways = []
        for label, prediction, count in ((a, b, forth), (b, a, back)):
            names = CLASS_NAMES[label], CLASS_NAMES[prediction]
            of_way = [error for error in errors if (error.label, error.prediction) == names]
            ways.append({"label": names[0], "prediction": names[1], "count": count, "errors": []})
            ways[-1]["errors"] = [_shown(outcome, error) for error in of_way[:PICTURES_OF_A_PAIR]]
        share = (forth + back) / total
        shown.append({"names": (CLASS_NAMES[a], CLASS_NAMES[b]), "count": forth + back, "share": share, "ways": ways})
    return shown


def _shown(outcome: Outcome, error: Error) -> dict[str, Any]:
    return {"error": error, "uri": picture(outcome.images[error.index])}


def _matrix(confusion: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Rows of cells with their colours: blue for right, orange for wrong, by the square root of the share."""
    rows = []
    for i, counts in enumerate(confusion):
        total = max(1, sum(counts))
        cells = []
        for j, count in enumerate(counts):
            share = count / total
            # Half of a class is as dark as it gets for errors: a tenth should be seen at once.
            strength = share if i == j else min(1.0, math.sqrt(2 * share))
            color = "0, 91, 150" if i == j else "213, 94, 0"
            cells.append(
                {
                    "count": count,
                    "style": f"background: rgba({color}, {0.9 * strength:.3f})" if count else "",
                    "light": strength > 0.6,
                    "right": i == j,
                }
            )
        rows.append({"name": CLASS_NAMES[i], "cells": cells, "recall": counts[i] / total})
    return rows


def _strip(top1: float, interval: Sequence[float], human: float | None) -> dict[str, Any]:
    """Positions, in percent of its width, on the scale under the headline."""
    lowest = min([interval[0], *([human] if human else [])])
    start = max(0.0, math.floor(20 * lowest - 0.5) / 20)  # a multiple of 5 %, with room to its right

    def place(value: float) -> float:
        return 100 * (value - start) / (1 - start)

    ticks = [start + (1 - start) * i / 4 for i in range(5)]
    return {
        "ticks": [(place(tick), tick) for tick in ticks],
        "low": place(interval[0]),
        "high": place(interval[1]),
        "top1": place(top1),
        "human": place(human) if human else None,
    }


def _scaled(outcome: Outcome, temperature: float) -> Tensor:
    return outcome.logits.double() / temperature


def context(outcome: Outcome, result: dict[str, Any]) -> dict[str, Any]:
    """Collect what the template shows.

    Args:
        outcome: the evaluation.
        result: what its metrics.json holds.
    """
    errors, trained = confident_errors(outcome), outcome.trained
    metrics = trained.directory / METRICS_FILE if trained else None
    calibration = result.get("calibration")
    return {
        "outcome": outcome,
        "result": result,
        "human": HUMAN_TOP1,
        "strip": _strip(result["top1"], result["top1_interval"], HUMAN_TOP1),
        "num_errors": len(errors),
        "curves": learning_curves(metrics) if metrics is not None and metrics.is_file() else [],
        "matrix": _matrix(result["confusion_matrix"]),
        "class_names": CLASS_NAMES,
        "pairs": _pairs(outcome, result["confusion_matrix"], errors),
        "errors": [_shown(outcome, error) for error in errors[:NUM_ERRORS]],
        "before": reliability(outcome.logits, outcome.labels),
        "after": reliability(_scaled(outcome, calibration["temperature"]), outcome.labels) if calibration else None,
        "retrieval": result.get("retrieval"),
        "config": to_yaml(trained.cfg) if trained else None,
        "summary": trained.summary if trained else {},
        "date": datetime.date.today().isoformat(),
    }


def render(values: dict[str, Any]) -> str:
    """Fill the template; every value is escaped."""
    loader = PackageLoader("fmnist.report", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda value, digits=2: f"{100 * value:.{digits}f}"
    environment.filters["comma"] = lambda value: f"{value:,.0f}"
    environment.filters["ms"] = lambda value: f"{value:.3g}" if value < 100 else f"{value:,.0f}"
    return environment.get_template("report.html").render(values)


def write_html(outcome: Outcome, result: dict[str, Any], path: Path) -> None:
    """Write report.html.

    Args:
        outcome: the evaluation.
        result: what its metrics.json holds.
        path: the file.
    """
    write_file(path, render(context(outcome, result)))
