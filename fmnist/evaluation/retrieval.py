"""How often a run's features find images of the same class."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from fmnist.evaluation.features import features_of, images_sha256
from fmnist.evaluation.neighbours import Neighbours, precision_at_k
from fmnist.evaluation.outcome import Outcome
from fmnist.runtime.processes import ALONE, Processes
from fmnist.trained import Trained

logger = logging.getLogger("fmnist")

LIMIT_S = 180.0
PIXELS = 3072  # numbers of an image compared by its pixels: 12 GB would be needed for 20,000 of 224 px in colour
SMALL = 32  # pixels per side of larger ones


def query_split(trained: Trained) -> Literal["test", "val"]:
    """Return the split whose images are looked for among the training images: test, where there is one."""
    return "test" if "test" in trained.splits else "val"


def _pixels(images: Tensor) -> Tensor:
    """Return float16 [N, PIXELS and fewer] from images uint8 [N, H, W] or [N, 3, H, W]."""
    if images[:1].numel() <= PIXELS:
        return images.flatten(1).half()  # 0 to 255 are exact in float16
    small = [adaptive_avg_pool2d(part.float(), SMALL).half() for part in images.split(256)]
    return torch.cat(small).flatten(1)


def retrieval_of(
    trained: Trained, outcome: Outcome | None, root: str | None = None, processes: Processes = ALONE
) -> dict[str, Any] | None:
    """Measure retrieval precision of test images among the training images, where that takes minutes and not hours.

    Args:
        trained: the run.
        outcome: its evaluation with its cost; on the main process.
        root: where the data set lies; None takes the run's.
        processes: share the work.

    Returns:
        What `measure_precision` returns. None for other images than `query_split`'s; and, with a line on the console,
        where the measured speed says that it takes more than `LIMIT_S`, or it cannot be measured.
    """
    if not any(processes.gather(outcome is not None and _is_quick(trained, outcome))):
        return None
    try:
        return measure_precision(trained, root=root, processes=processes)
    except ValueError as error:
        logger.warning("retrieval precision is left out: %s", error)
        return None


def _is_quick(trained: Trained, outcome: Outcome) -> bool:
    cost = outcome.cost
    if cost is None or outcome.split != query_split(trained):
        return False
    count = len(outcome.labels) + trained.info.num_train
    seconds = count / cost.timings[-1].images_per_second
    if seconds > LIMIT_S:
        logger.info(
            "retrieval precision is left out: %s images take about %.0f minutes here; `fmnist search evaluate %s` "
            "measures it for the report",
            f"{count:,}",
            seconds / 60,
            trained.weights.parent,
        )
    return seconds <= LIMIT_S


def measure_precision(
    trained: Trained, *, k: int = 10, root: str | None = None, processes: Processes = ALONE
) -> dict[str, Any]:
    """Search the training images for every image of `query_split`, by the run's features and by raw pixels.

    Args:
        trained: the run.
        k: nearest items counted.
        root: where the data set lies; None takes the run's.
        processes: share the work; the numbers are the same for any count of them.

    Returns:
        A JSON-ready dict: `k`, `num_queries`, `num_items`, `run`, the hashes of `retrieval_key`, and under `features`
        and `pixels` (cosine of the pixels, the baseline) what `summarize_precision` returns.

    Raises:
        ValueError: k is out of range, the images cannot be had, or the features are not finite.
    """
    queried = query_split(trained)
    (items, item_labels), (images, labels) = processes.together(
        lambda: [trained.split(name, root).tensors for name in ("train", queried)]
    )
    catalogue, queries = (
        features_of(trained, name, of, processes).features for name, of in (("train", items), (queried, images))
    )
    spaces = {
        "features": (Neighbours(catalogue, trained.device, processes), queries),
        "pixels": (Neighbours(items, trained.device, processes, made_by=_pixels), _pixels(images)),
    }
    result: dict[str, Any] = {
        "k": k,
        "split": queried,
        "num_queries": len(labels),
        "num_items": len(items),
        "run": trained.name,
        **_key(trained, {"train": items, queried: images}),
    }
    for space, (neighbours, queries) in spaces.items():
        precision = precision_at_k(neighbours, item_labels, queries, labels, k)
        result[space] = summarize_precision(precision, labels, trained.class_names)
    return result


def retrieval_key(trained: Trained, root: str | None) -> dict[str, str]:
    """Return what a measured precision belongs to: the weights, the images searched in, and the queries."""
    return _key(trained, {name: trained.split(name, root).images for name in ("train", query_split(trained))})


def _key(trained: Trained, images: Mapping[str, Tensor]) -> dict[str, str]:
    return {"weights_sha256": trained.digest} | {f"{name}_sha256": images_sha256(of) for name, of in images.items()}


def summarize_precision(precision: Tensor, labels: Tensor, class_names: Sequence[str]) -> dict[str, Any]:
    """Return the mean over queries with a 95 % interval (normal approximation) and the mean of each class.

    Args:
        precision: float64 [Q].
        labels: int [Q], classes of the queries.
        class_names: in label order; a class without a query is None.
    """
    half = 1.96 * float(precision.std()) / math.sqrt(len(precision)) if len(precision) > 1 else 0.0
    mean = float(precision.mean())
    per_class = {name: precision[labels == label] for label, name in enumerate(class_names)}
    return {
        "mean": mean,
        "interval": [max(0.0, mean - half), min(1.0, mean + half)],
        "per_class": {name: float(values.mean()) if len(values) else None for name, values in per_class.items()},
    }
