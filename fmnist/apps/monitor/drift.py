"""Whether a batch of pictures looks like the training data: four signals, tested together by a bootstrap."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fmnist.apps.novelty import NoveltyReference
from fmnist.evaluation.features import unit

SIGNALS = ("class mix", "confidence", "unfamiliar", "drift")
REPLICATES = 2000
MIN_PICTURES = 5
SEED = 20172


class BatchSums:
    """Sums of a batch that the signals need: the memory does not grow with the pictures."""

    def __init__(self, reference: NoveltyReference) -> None:
        self.reference = reference
        self.num_images = 0
        self._sums: Tensor | None = None

    def add(self, logits: Tensor, features: Tensor) -> None:
        """Count in some pictures: float32 [N, num_classes] logits and [N, D] penultimate features."""
        sums = describe(self.reference, logits, features).sum(0)
        self._sums = sums if self._sums is None else self._sums + sums
        self.num_images += len(logits)

    @property
    def mean(self) -> NDArray[np.float64]:
        """The mean of each column of `describe`; there must be a picture."""
        assert self._sums is not None
        return np.asarray(self._sums / self.num_images)


def describe(reference: NoveltyReference, logits: Tensor, features: Tensor) -> Tensor:
    """Return one row per picture whose means make the signals.

    Returns:
        float64 [N, num_classes + 2 + D]: the predicted class one-hot, the confidence, whether the picture is flagged
        as unfamiliar, the features at length 1.
    """
    predicted = F.one_hot(logits.argmax(1), logits.shape[1])
    confidence = (logits.double() / reference.temperature).softmax(1).amax(1, keepdim=True)
    flagged = reference.score(features)[:, None] > reference.threshold
    return torch.cat([predicted, confidence, flagged, unit(features)], dim=1).double()


def signals(batch: NDArray[np.float64], usual: NDArray[np.float64], num_classes: int) -> NDArray[np.float64]:
    """Measure how far means of `describe` are from the usual ones.

    Args:
        batch: float64 [..., columns].
        usual: the same shape.
        num_classes: length of the first part.

    Returns:
        float64 [..., 4], each 0 and more, in the order of SIGNALS: the chi-square distance of the class mixes per
        picture, the difference of the mean confidences, the surplus of flagged pictures, the squared distance of the
        mean features (the maximum mean discrepancy of a linear kernel).
    """
    difference = batch - usual
    confidence, flagged = np.moveaxis(difference[..., num_classes:][..., :2], -1, 0)
    chi_square = by_class(difference, usual, num_classes).sum(-1)
    drift = (difference[..., num_classes + 2 :] ** 2).sum(-1)
    return np.stack([chi_square, np.abs(confidence), np.maximum(flagged, 0.0), drift], axis=-1)


def by_class(difference: NDArray[np.float64], usual: NDArray[np.float64], num_classes: int) -> NDArray[np.float64]:
    """Return what each class adds to the chi-square distance, [..., num_classes].

    A class that is never predicted has an expected share of 0: a thousandth keeps one such picture from infinity.
    """
    return difference[..., :num_classes] ** 2 / (usual[..., :num_classes] + 1e-3)


@dataclass(frozen=True, kw_only=True)
class DriftTest:
    """The signals of a batch, and which of them are alarms.

    Attributes:
        values: float64 [4], see `signals`.
        limits: float64 [4], the largest values that raise no alarm.
        p: float64 [4], the share of usual batches of this size with as large a value.
        joint_p: the share of usual batches with as small a p in any of the four.
        alarms: bool [4].
        usual: the means of `describe` over the validation images.
    """

    values: NDArray[np.float64]
    limits: NDArray[np.float64]
    p: NDArray[np.float64]
    joint_p: float
    alarms: NDArray[np.bool_]
    usual: NDArray[np.float64]


def drift_test(batch: BatchSums, rate: float) -> DriftTest:
    """Compare a batch with batches of its size drawn from the validation images.

    The limits are set so that a batch that is like the validation images raises any alarm at all with probability
    `rate`: the smallest of the four p-values is compared with its own distribution. The validation images are drawn
    anew for each comparison, too, because they are a sample themselves.

    Args:
        batch: at least MIN_PICTURES pictures.
        rate: false alarms per usual batch, 0.005 to 0.5.

    Source: Westfall and Young 1993, Resampling-Based Multiple Testing (the smallest p-value); Gretton et al. 2012, A
        Kernel Two-Sample Test.
    """
    reference, num_classes = batch.reference, batch.reference.val_logits.shape[1]
    rows = np.asarray(describe(reference, reference.val_logits, reference.val), dtype=np.float32)
    rng = np.random.default_rng(SEED)
    usual, total = np.asarray(rows.mean(0), dtype=np.float64), len(rows)
    drawn, again = (_resampled_means(rng, rows, size) for size in (batch.num_images, total))
    null = signals(drawn, again, num_classes)
    values = signals(batch.mean, usual, num_classes)
    # Each replicate's p-values among the replicates, ties counted as at least as large.
    ordered = np.sort(null, axis=0)
    columns = range(len(SIGNALS))
    ranks = np.stack([REPLICATES - np.searchsorted(ordered[:, c], null[:, c], "left") for c in columns], axis=1)
    limit = np.quantile(ranks.min(axis=1), rate, method="lower")
    larger = (null >= values - 1e-12).sum(axis=0)
    return DriftTest(
        values=values,
        limits=ordered[REPLICATES - int(limit)],
        p=(larger + 1) / (REPLICATES + 1),
        joint_p=float(((ranks.min(axis=1) <= larger.min()).sum() + 1) / (REPLICATES + 1)),
        alarms=larger < limit,
        usual=usual,
    )


def _resampled_means(rng: np.random.Generator, rows: NDArray[np.float32], size: int) -> NDArray[np.float64]:
    """Return the means of REPLICATES batches of `size` rows, drawn with replacement."""
    means = []
    for _ in range(0, REPLICATES, 250):  # bounds the table of counts
        counts = rng.multinomial(size, np.full(len(rows), 1 / len(rows)), size=250)
        means.append((counts.astype(np.float32) @ rows).astype(np.float64) / size)
    return np.concatenate(means)
