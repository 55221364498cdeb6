"""The expected answers of an export, and the measured figures that its card states."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fmnist.data.info import SplitName
from fmnist.runtime.files import read_json
from fmnist.trained import Trained, open_trained

NUM_IMAGES = 1000


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A run and its answers.

    Attributes:
        trained: the run in float32 on the CPU.
        images: uint8 [NUM_IMAGES, H, W] or [NUM_IMAGES, 3, H, W], the first of the split.
        logits: float32 [NUM_IMAGES, num_classes], without flip averaging.
        split: test; val, or else train, where the data set has no such images.
    """

    trained: Trained
    images: Tensor
    logits: Tensor
    split: SplitName = "test"


def open_expected(path: Path, root: str | None = None, batch_size: int | None = None) -> Expected:
    """Open a run and run it over the images.

    Args:
        path: a run directory or a checkpoint.
        root: folder of the data set; None takes the run's.
        batch_size: images of one forward; None takes the run's.

    Raises:
        ValueError: one line, for a path that is neither, weights that do not fit, or images that cannot be had.
    """
    # However it was trained, what is written is float32 in torch's usual memory format.
    trained = open_trained(path, "cpu", batch_size, precision="fp32", channels_last=False, compile=False)
    split = trained.splits[-1]
    images = trained.split(split, root).images[:NUM_IMAGES]
    logits, _ = trained(images)
    return Expected(trained=trained, images=images, logits=logits, split=split)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """An evaluation on the test images, or those in their place, that is known to be of these weights.

    Attributes:
        metrics: what metrics.json holds.
        flip: each image was averaged with its mirror.
        split: see `Expected`.
    """

    metrics: dict[str, Any]
    flip: bool
    split: SplitName = "test"


def read_measured(expected: Expected) -> Measured:
    """Read the run's own test metrics, which name the weights that they are of.

    Args:
        expected: the run and its answers.

    Raises:
        ValueError: one line: there is no evaluation of those images, or it is of other weights, or names none.
    """
    trained = expected.trained
    folder = trained.folder("evaluation", expected.split)
    path, again = folder / "metrics.json", f"run: fmnist evaluate {trained.weights.parent}"
    if not path.exists():
        raise ValueError(f"a model card states measured figures, and there is no {path}; {again}")
    try:
        metrics = read_json(path)
        _check_metrics(metrics)
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder} does not hold a whole evaluation; {again}") from None
    if not (weights := metrics.get("weights_sha256")):
        raise ValueError(f"{folder} does not say which weights it is of, as of an older version; {again}")
    if weights != trained.digest:
        raise ValueError(f"{folder} was evaluated with other weights; {again}")
    return Measured(metrics=metrics, flip=metrics.get("tta") == "flip", split=expected.split)


def _check_metrics(metrics: dict[str, Any]) -> None:
    """Refuse a metrics.json that a card could not be made of."""
    numbers = [metrics.get(key) for key in ("top1", "loss", "ece", "num_images")]
    rows = metrics.get("per_class")
    if not isinstance(rows, dict) or not rows:
        raise ValueError("per_class is missing")
    numbers += [row["support"] for row in rows.values()]
    ratios = [row[key] for row in rows.values() for key in ("precision", "recall", "f1")]
    numbers += [ratio for ratio in ratios if ratio is not None]  # as of a class without an image
    low, high = metrics["top1_interval"]
    if not all(isinstance(value, int | float) for value in (*numbers, low, high)):
        raise ValueError("a number is missing")
