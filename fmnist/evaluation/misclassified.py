"""The images that a model gets wrong, and the classes that it takes for each other."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor

from fmnist.evaluation.outcome import Outcome

Confusion: TypeAlias = Sequence[Sequence[int]] | csr_array  # [C, C] counts; rows true class, columns predicted


@dataclass(frozen=True, kw_only=True)
class Misclassified:
    """An image that was taken for another class.

    Attributes:
        index: its position in the data set's own file.
        position: that in the split.
        file: of a folder of pictures; empty for others.
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
    file: str = ""

    def row(self, outcome: Outcome) -> dict[str, Any]:
        """Return a row of an error table, with the picture."""
        return {
            "picture": channels_last(outcome.images[self.position]),
            "index": self.index,
            "label": self.label,
            "prediction": self.prediction,
            "confidence": self.confidence,
            "p_label": self.p_label,
        } | ({"file": self.file} if self.file else {})


def channels_last(image: Tensor) -> NDArray[np.uint8]:
    """Return an image [H, W] or [3, H, W] as libraries that draw take it: [H, W] or [H, W, 3]."""
    return np.asarray(image if image.ndim == 2 else image.movedim(0, -1).contiguous())


def confident_errors(outcome: Outcome) -> list[Misclassified]:
    """Return the errors of an evaluation, most confident first."""
    probabilities = outcome.logits.double().softmax(dim=1)
    confidence, predictions = probabilities.max(dim=1)
    wrong = (predictions != outcome.labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)]
    indices = outcome.indices
    return [
        Misclassified(
            index=indices[position],
            position=position,
            label=outcome.class_names[outcome.labels[position]],
            prediction=outcome.class_names[predictions[position]],
            confidence=float(confidence[position]),
            p_label=float(probabilities[position, outcome.labels[position]]),
            file=outcome.files[position] if outcome.files else "",
        )
        for position in wrong.tolist()
    ]


def worst_by_f1(per_class: Mapping[str, Mapping[str, Any]], limit: int = 30) -> dict[str, Mapping[str, Any]]:
    """Return the rows of the classes with the lowest F1, the lowest first; a class without images has none."""
    known = [(name, row) for name, row in per_class.items() if row["f1"] is not None]
    return dict(sorted(known, key=lambda pair: pair[1]["f1"])[:limit])


def worst_classes(confusion: Confusion, limit: int) -> list[int]:
    """Return the classes with the most errors, as true and as predicted class; in label order.

    Args:
        confusion: [C, C] counts; rows true class, columns predicted.
        limit: how many at most.
    """
    counts = csr_array(confusion)
    errors = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
    return sorted(np.argsort(-errors, kind="stable")[:limit].tolist())


def confused_pairs(confusion: Confusion) -> list[tuple[int, int, int, int]]:
    """Return pairs of classes that are taken for each other, the most confused first.

    Args:
        confusion: [C, C] counts; rows true class, columns predicted.

    Returns:
        a, b, how many a were taken for b and how many b for a; the first is the larger. Pairs without any are left out.
    """
    cells = csr_array(confusion).tocoo()
    counts = Counter(
        dict(zip(zip(cells.row.tolist(), cells.col.tolist(), strict=True), cells.data.tolist(), strict=True))
    )
    pairs = []
    for low, high in sorted({(min(cell), max(cell)) for cell in counts if cell[0] != cell[1]}):
        a, b = (low, high) if counts[low, high] >= counts[high, low] else (high, low)
        pairs.append((a, b, counts[a, b], counts[b, a]))
    return sorted(pairs, key=lambda pair: -(pair[2] + pair[3]))
