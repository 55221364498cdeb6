"""The images that a model gets wrong, and the classes that it takes for each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmnist.evaluation.outcome import Outcome


@dataclass(frozen=True, kw_only=True)
class Misclassified:
    """An image that was taken for another class.

    Attributes:
        index: its position in the data set's own file.
        position: that in the split.
        label, prediction: class names.
        confidence: probability of the prediction.
        p_label: probability of the label.
    """

    index: int
    position: int
    label: str
    prediction: str
    confidence: float
    p_label: float

    def row(self, outcome: Outcome) -> dict[str, Any]:
        """Return a row of an error table, with the picture."""
        return {
            "picture": outcome.images[self.position].numpy(),
            "index": self.index,
            "label": self.label,
            "prediction": self.prediction,
            "confidence": self.confidence,
            "p_label": self.p_label,
        }


def confident_errors(outcome: Outcome, limit: int | None = None) -> list[Misclassified]:
    """Return the errors, most confident first.

    Args:
        outcome: of an evaluation.
        limit: how many at most; none is all.
    """
    probabilities = outcome.logits.double().softmax(dim=1)
    confidence, predictions = probabilities.max(dim=1)
    wrong = (predictions != outcome.labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)][:limit]
    indices = outcome.indices
    return [
        Misclassified(
            index=indices[position],
            position=position,
            label=outcome.class_names[outcome.labels[position]],
            prediction=outcome.class_names[predictions[position]],
            confidence=float(confidence[position]),
            p_label=float(probabilities[position, outcome.labels[position]]),
        )
        for position in wrong.tolist()
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
