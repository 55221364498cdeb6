"""Which pictures are unfamiliar: far from the training images, by a threshold calibrated on validation images."""

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from fmnist.evaluation.features import Features, features_of, kept_features
from fmnist.trained import Trained

logger = logging.getLogger("fmnist")
NUM_IMAGES = 5000  # of each kind: seconds on a CPU; ten thousand change the error rates by less than a point
NEIGHBOURS = 10
MIN_CALIBRATION = 100  # images: the share of FLAGGED of them is that of 5, give or take 2
FLAGGED = 0.05  # of the validation images, all of them of the known classes
SEED = 20171


@dataclass(frozen=True)
class NoveltyReference:
    """Features of images that a trained model should know, and how far from them is too far.

    Attributes:
        train: float32 [M, D], penultimate features of training images.
        val: float32 [V, D], likewise of validation images, which the model was not trained on.
        val_logits: float32 [V, num_classes].
        temperature: what logits are divided by, see `Trained.temperature`.
        threshold: the score that FLAGGED of the validation images are above.
    """

    threshold: ClassVar[float] = 1.0

    train: Tensor
    val: Tensor
    val_logits: Tensor
    temperature: float = 1.0

    @cached_property
    def limits(self) -> Tensor:
        """What the distances are divided by, float32 [2], so that FLAGGED of the validation images score above 1."""
        far = self._distances(self.val)
        # below these a distance is rounding: of images that are all alike
        rounding = torch.stack([torch.tensor(1e-6), 1e-4 * self.train.norm(dim=1).mean().clamp_min(1e-8)])
        usual = torch.quantile(far, 1 - FLAGGED, dim=0).maximum(rounding)
        return (usual * torch.quantile((far / usual).amax(1), 1 - FLAGGED)).maximum(rounding)

    def score(self, features: Tensor) -> Tensor:
        """Return how far each picture is from the training images, by direction or by place, whichever is farther.

        Each alone takes noise or digits for clothes with one model or another, as energy and Mahalanobis' distance do
        (docs/photos.md).

        Args:
            features: float [N, D], penultimate.

        Returns:
            float32 [N], from 0; 1 is the distance that FLAGGED of the validation images are beyond.

        Source: Sun et al. 2022, Out-of-distribution Detection with Deep Nearest Neighbors, which has the first.
        """
        return (self._distances(features) / self.limits).amax(1)

    def _distances(self, features: Tensor) -> Tensor:
        """Return 1 - cosine and the Euclidean distance to the tenth nearest training image by each, float32 [N, 2]."""
        nearest, lengths = min(NEIGHBOURS, len(self.train)), self.train.norm(dim=1)
        found = []
        for part in features.float().split(1000):  # bounds the table of all pairs
            length, products = part.norm(dim=1, keepdim=True), part @ self.train.T
            cosines = products / (length * lengths).clamp_min(1e-12)
            squares = length.square() + lengths.square() - 2 * products
            tenth = squares.topk(nearest, largest=False).values[:, -1]
            found.append(torch.stack([1 - cosines.topk(nearest).values[:, -1], tenth.clamp_min(0).sqrt()], dim=1))
        return torch.cat(found) if found else torch.zeros(0, 2)


def open_reference(trained: Trained, root: str | None = None, *, own: bool = False) -> NoveltyReference:
    """Return the features of at most NUM_IMAGES training and as many validation images.

    Which images those are is drawn with a fixed seed; their features are kept beside the run. Where the run kept no
    validation images, other training images stand in for them.

    Args:
        trained: the run.
        root: where the data set lies; None takes the run's.
        own: refuse other images than the run was made with where they say what is usual.

    Raises:
        ValueError: the images are missing and cannot be fetched, or too few; or see `own`.
    """
    generator = torch.Generator().manual_seed(SEED)
    has_val = bool(trained.info.num_val)
    images = trained.split("train", root, own=own and not has_val).images
    order = torch.randperm(len(images), generator=generator)
    count = NUM_IMAGES if has_val else min(NUM_IMAGES, len(images) // 2)
    if not count:
        raise ValueError(f"{len(images):,} training image and no validation images: too few to calibrate on")
    train = _features(trained, "train", images, order[:count])
    if has_val:
        images = trained.split("val", root, own=own).images
        val = _features(trained, "val", images, torch.randperm(len(images), generator=generator)[:NUM_IMAGES])
    else:
        logger.warning("the run has no validation images: calibrated on training images, so more will be flagged")
        val = _features(trained, "train_held_out", images, order[count : 2 * count])
    if len(val) < MIN_CALIBRATION:
        logger.warning("the flag for unfamiliar pictures is calibrated on only %d images: do not rely on it", len(val))
    return NoveltyReference(train.unscaled, val.unscaled, val.logits, trained.temperature)


def _features(trained: Trained, name: str, images: Tensor, chosen: Tensor) -> Features:
    """Return the features of some images of a split: out of the whole split's where those are kept."""
    if (whole := kept_features(trained, name, images)) is not None:
        return whole[chosen]
    return features_of(trained, f"{name}_sample", images[chosen])
