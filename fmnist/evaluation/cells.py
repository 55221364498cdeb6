"""The images in each cell of a confusion matrix, in the order in which to look at them."""

from dataclasses import dataclass

import torch

from fmnist.evaluation.outcome import Outcome


@dataclass(frozen=True, kw_only=True)
class MatrixCell:
    """The images of one class that were taken for one class.

    Attributes:
        positions: of its images in the split, the worst first: of errors the most confident, of right ones the least.
        confidences: their predictions' probabilities, 0 to 1.
    """

    positions: list[int]
    confidences: list[float]


def matrix_cells(outcome: Outcome) -> dict[tuple[int, int], MatrixCell]:
    """Return each cell that holds images, by label and prediction, in the order of the matrix."""
    confidence, predictions = outcome.logits.double().softmax(dim=1).max(dim=1)
    place = outcome.labels * outcome.logits.shape[1] + predictions
    order = torch.where(outcome.correct, confidence, -confidence).argsort(stable=True)
    order = order[place[order].argsort(stable=True)]
    places, counts = place[order].unique_consecutive(return_counts=True)
    return {
        divmod(at, outcome.logits.shape[1]): MatrixCell(positions=part.tolist(), confidences=confidence[part].tolist())
        for at, part in zip(places.tolist(), order.split(counts.tolist()), strict=True)
    }
