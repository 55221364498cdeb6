"""The training images that a model takes for most like an image: where a wrong label, or a wrong habit, comes from."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fmnist.data.split import Split
from fmnist.evaluation.features import kept_features
from fmnist.evaluation.neighbours import Neighbours
from fmnist.evaluation.outcome import Outcome

logger = logging.getLogger("fmnist")
NUM_LOOKALIKES = 3


@dataclass(frozen=True, kw_only=True)
class Lookalike:
    """A training image near another one.

    Attributes:
        index: its position in the data set's own file.
        label: class name.
        distance: 1 - cosine of the penultimate features, 0 to 2.
        image: uint8, as the split holds it, on the CPU.
    """

    index: int
    label: str
    distance: float
    image: Tensor


def lookalikes(outcome: Outcome, positions: Sequence[int], root: str | None = None) -> list[list[Lookalike]]:
    """Find the nearest training images of some images, by the training images' features that are kept beside the run.

    Args:
        outcome: an evaluation.
        positions: of images in its split.
        root: folder with the data set; None takes the run's.

    Returns:
        For each, its three nearest, the nearest first. Empty for an ensemble, and, with a line on the console, where
        the features are not kept or the training images are not those of the run.
    """
    trained = outcome.trained
    if trained is None or not positions:
        return []
    training = Split.load("train", trained.data(root), torch.device("cpu"))
    own = trained.images_sha256("train") in (None, training.digest)
    features = kept_features(trained, "train", training.images) if own else None
    if features is None:
        kept = f"its features of them are not kept; `fmnist search evaluate {trained.weights.parent}` makes them"
        why = kept if own else "the run was trained on others"
        logger.info("the nearest training images of its errors are left out: %s", why)
        return []
    itself = torch.tensor(positions) if outcome.split == "train" else None
    k = min(NUM_LOOKALIKES, len(training) - (itself is not None))
    _, queries = trained(outcome.images[list(positions)])
    cosines, nearest = Neighbours(features.features, trained.device)(queries, k, itself)
    published = training.published
    return [
        [
            Lookalike(
                index=place if published is None else int(published[place]),
                label=training.class_names[training.labels[place]],
                distance=max(0.0, 1.0 - cosine),
                image=training.images[place],
            )
            for cosine, place in zip(*row, strict=True)
        ]
        for row in zip(cosines.tolist(), nearest.tolist(), strict=True)
    ]
