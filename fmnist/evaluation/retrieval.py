"""How often a run's features find images of the same class, for its report, where that takes minutes and not hours."""

from __future__ import annotations

import logging
from typing import Any

import torch

from fmnist.apps.search.retrieval import measure_precision, precision_file, read_precision, write_precision
from fmnist.data.fashion_mnist import load_split
from fmnist.evaluation.outcome import Outcome
from fmnist.trained import load_predictor

logger = logging.getLogger("fmnist")

LIMIT_S = 180.0


def precision_of(outcome: Outcome, device: torch.device, root: str | None = None) -> dict[str, Any] | None:
    """Return retrieval precision of test images among the training images, kept once measured.

    Args:
        outcome: an evaluation with its cost.
        device: where the model and the search run.
        root: folder with the IDX files; none is the run's.

    Returns:
        What `measure_precision` returns. None for an ensemble and for other images than the test images; and, with a
        line on the console, where the measured speed says that it takes more than `LIMIT_S`, or it cannot be measured.
    """
    trained, cost = outcome.trained, outcome.cost
    if trained is None or cost is None or outcome.split != "test":
        return None
    if (known := read_precision(trained, root)) is not None:
        return known
    data = trained.cfg.data
    count = len(outcome.labels) + len(load_split("train", root or data.root, data.val_size)[1])
    seconds = count / cost.timings[-1].images_per_second
    if seconds > LIMIT_S:
        measure = f"python -m fmnist.apps.search evaluate {trained.weights.parent}"
        logger.info(
            "retrieval precision is left out: %s images take about %.0f minutes here; %s measures it for the report",
            f"{count:,}",
            seconds / 60,
            measure,
        )
        return None
    try:
        result = measure_precision(load_predictor(trained, device), root=root)
    except ValueError as error:
        logger.warning("retrieval precision is left out: %s", error)
        return None
    write_precision(result, precision_file(trained))
    return result
