"""How unlike the training images a picture is, with a threshold calibrated on the run's validation images."""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from fmnist.data.fashion_mnist import load_split
from fmnist.runtime.files import sha256_of
from fmnist.trained import Predictor, classifier

logger = logging.getLogger("fmnist")
FILE = "reference.safetensors"
FORMAT = "1"
NUM_IMAGES = 5000  # of each kind: seconds on a CPU; ten thousand change the error rates by less than a point
NEIGHBOURS = 10
FLAGGED = 0.05  # of the validation images, which are all clothes
SEED = 20171


@dataclass(frozen=True)
class Reference:
    """What a trained model makes of images it should know.

    Attributes:
        train: float16 [M, D], penultimate features of training images, each of length 1.
        val: float16 [V, D], likewise of validation images, which the model was not trained on.
        val_logits: float32 [V, num_classes].
    """

    train: Tensor
    val: Tensor
    val_logits: Tensor

    @cached_property
    def bank(self) -> Tensor:
        """The training features as float32: a CPU multiplies those faster."""
        return self.train.float()

    @cached_property
    def threshold(self) -> float:
        """The score that FLAGGED of the validation images are above."""
        return float(torch.quantile(self.score(self.val), 1 - FLAGGED))

    def score(self, features: Tensor) -> Tensor:
        """Return how unlike the training images each picture is: 1 - cosine to the tenth nearest of them.

        Energy, Mahalanobis and euclidean distances were tried beside it: each of them takes noise or digits for
        clothes with one of the two models it was tried on (docs/photos.md).

        Args:
            features: float [N, D], penultimate.

        Returns:
            float32 [N], 0 to 2.

        Source: Sun et al. 2022, Out-of-distribution Detection with Deep Nearest Neighbors.
        """
        nearest = min(NEIGHBOURS, len(self.bank))
        parts = unit(features).split(1000)  # bounds the table of all pairs
        scores = [1 - (part @ self.bank.T).topk(nearest, dim=1).values[:, -1] for part in parts]
        return torch.cat(scores) if scores else torch.zeros(0)


def unit(features: Tensor) -> Tensor:
    """Scale each row to length 1, in float32."""
    return F.normalize(features.float(), dim=1)


def open_reference(predictor: Predictor, root: str | None = None) -> Reference:
    """Read the reference of these weights from the run's directory; where it is not there, compute and keep it.

    Args:
        predictor: the trained run.
        root: folder of Fashion-MNIST; none is the run's.

    Raises:
        ValueError: the images are missing and cannot be fetched.
    """
    path = predictor.trained.output / FILE
    weights = predictor.trained.weights
    data = predictor.trained.cfg.data
    key = {
        "format": FORMAT,
        "weights": sha256_of(weights),
        "val_size": str(data.val_size),
        "size": str(predictor.size),
        "root": str(root or data.root),
    }
    if (kept := _read(path, key, classifier(predictor.model).in_features)) is not None:
        return kept
    logger.info("calibrating on %s training and validation images, once for these weights", f"{NUM_IMAGES:,}")
    reference = compute_reference(predictor, root)
    _write(path, reference, key)
    return reference


def compute_reference(predictor: Predictor, root: str | None = None) -> Reference:
    """Run the model over at most NUM_IMAGES training and as many validation images, drawn with a fixed seed.

    Where the run kept no validation images, other training images stand in for them.
    """
    data = predictor.trained.cfg.data
    train = load_split("train", root or data.root, data.val_size)[0]
    generator = torch.Generator().manual_seed(SEED)
    order = torch.randperm(len(train), generator=generator)
    count = NUM_IMAGES if data.val_size else min(NUM_IMAGES, len(train) // 2)
    chosen = train[order[:count]]
    if data.val_size:
        val = load_split("val", root or data.root, data.val_size)[0]
        val = val[torch.randperm(len(val), generator=generator)[:NUM_IMAGES]]
    else:
        logger.warning("the run has no validation images: calibrated on training images, so more will be flagged")
        val = train[order[count : 2 * count]]
        if not count:
            raise ValueError(f"{len(train):,} training image and no validation images: too few to calibrate on")
    _, train_features = predictor(chosen)
    val_logits, val_features = predictor(val)
    return Reference(unit(train_features).half(), unit(val_features).half(), val_logits)


def _read(path: Path, key: dict[str, str], width: int) -> Reference | None:
    """Return what is kept if it is of this key and sound."""
    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata() != key:
                return None
            # Copied: a mapped file that shrinks would end the process.
            reference = Reference(*(file.get_tensor(name).clone() for name in ("train", "val", "val_logits")))
    except (OSError, SafetensorError, ValueError):
        return None
    shapes = reference.train.ndim == reference.val.ndim == reference.val_logits.ndim == 2
    sound = shapes and reference.train.shape[1] == reference.val.shape[1] == width
    sound = sound and len(reference.val) == len(reference.val_logits) > 0 < len(reference.train)
    tensors = (reference.train, reference.val, reference.val_logits)
    return reference if sound and all(bool(tensor.isfinite().all()) for tensor in tensors) else None


def _write(path: Path, reference: Reference, key: dict[str, str]) -> None:
    """Keep a reference whole or not at all; a run that may not be written to is used without."""
    tensors = {"train": reference.train, "val": reference.val, "val_logits": reference.val_logits}
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: two commands may calibrate the same run at once.
        descriptor, part = tempfile.mkstemp(prefix=f".{FILE}.", dir=path.parent)
        os.close(descriptor)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata=key)
        os.chmod(part, 0o644)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        logger.warning("%s: not kept (%s); calibrated again next time", path, " ".join(str(error).split()))
        if part is not None:
            Path(part).unlink(missing_ok=True)
