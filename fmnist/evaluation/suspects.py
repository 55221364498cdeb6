"""Rank labels by how likely they are wrong, and count which classes are taken for each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOWEST = 1e-30  # of a probability, whose logarithm is taken


@dataclass(frozen=True, kw_only=True)
class Suspects:
    """All labels, ranked; on the CPU.

    Attributes:
        order: int64 [N], positions, the most suspect first.
        own: float64 [N], probability of each image's own label.
        suggested: int64 [N], the likeliest other class.
        confidence: float64 [N], its probability.
    """

    order: Tensor
    own: Tensor
    suggested: Tensor
    confidence: Tensor


def rank_labels(probabilities: Tensor, labels: Tensor) -> Suspects:
    """Rank labels by the logarithm of their own probability minus that of the likeliest other class, lowest first.

    It found more planted errors than the own probability alone and than confident learning's margin corrected by
    class, from one run and from folds: experiments/label_audit.py.

    Args:
        probabilities: float64 [N, num_classes], two classes or more.
        labels: int64 [N].
    """
    own = probabilities.gather(1, labels[:, None])[:, 0]
    confidence, suggested = probabilities.scatter(1, labels[:, None], -1.0).max(dim=1)
    score = own.clamp(min=LOWEST).log() - confidence.clamp(min=LOWEST).log()
    return Suspects(order=score.argsort(stable=True), own=own, suggested=suggested, confidence=confidence)


def confident_joint(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Count labels by the class that they seem to be.

    An image counts for a class that is at least as likely as it is, on average, for the images labelled so; for the
    likeliest of several such classes, and for none where there is none.

    Args:
        probabilities: float64 [N, num_classes].
        labels: int64 [N].

    Returns:
        int64 [num_classes, num_classes]: given label by likely class.

    Source:
        Northcutt, Jiang and Chuang, "Confident learning: estimating uncertainty in dataset labels", 2021,
        arXiv:1911.00068, section 3.1.
    """
    num_classes = probabilities.shape[1]
    present = torch.bincount(labels, minlength=num_classes)
    own = probabilities.gather(1, labels[:, None])[:, 0]
    threshold = torch.zeros(num_classes, dtype=own.dtype).index_add(0, labels, own) / present.clamp(min=1)
    threshold[present == 0] = torch.inf
    confident = torch.where(probabilities >= threshold, probabilities, -1.0)
    value, likely = confident.max(dim=1)
    counted = value >= 0
    cells = labels[counted] * num_classes + likely[counted]
    return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)
