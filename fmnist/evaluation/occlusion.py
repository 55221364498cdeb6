"""Why an answer: how much its probability drops when a part of the image is covered."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from fmnist.evaluation.outcome import Outcome
from fmnist.trained import Trained

PATCH = 4  # a patch is a quarter of the image high and wide: 7 pixels of 28
PLACES = 14  # on each side: a step of 2 pixels of 28
LIMIT_S = 20.0  # for the maps of a report


def occlusion_map(trained: Trained, image: Tensor, label: int, *, calibrate: bool = True) -> Tensor:
    """Cover an image patch by patch with the data set's mean, and return how far the probability of a class drops.

    The patch takes PLACES x PLACES places, those at the border partly outside. It needs nothing of the model but its
    probabilities, so it is the same for every one.

    Args:
        trained: the run.
        image: uint8 [H, W] or [3, H, W], CPU, as `trained` takes it.
        label: the class.
        calibrate: see `Trained.probabilities`.

    Returns:
        float32 [H, W], -1 to 1: the mean drop over the patches that cover a pixel; above 0 where it speaks for the
        class, below where it speaks against it.

    Source:
        Zeiler and Fergus 2014, Visualizing and Understanding Convolutional Networks.
    """
    rows, columns = (_places(side) for side in image.shape[-2:])
    covered = (rows[:, None, :, None] & columns[None, :, None, :]).flatten(0, 1)  # [PLACES**2, H, W]
    mean = torch.tensor([round(255 * value) for value in trained.info.mean], dtype=torch.uint8)
    if image.ndim == 3:
        covered, mean = covered[:, None], mean[:, None, None]
    logits, _ = trained(torch.cat((image[None], torch.where(covered, mean, image))))
    probabilities = trained.probabilities(logits, calibrate=calibrate)[:, label]
    drops = (probabilities[0] - probabilities[1:]).view(PLACES, PLACES)
    rows, columns = rows.double(), columns.double()
    return (rows.T @ drops @ columns / torch.outer(rows.sum(0), columns.sum(0))).float()


def _places(side: int) -> Tensor:
    """Return which pixels of a side each place of the patch covers: bool [PLACES, side]."""
    patch = max(1, round(side / PATCH))
    starts = torch.tensor([(2 * place + 1) * side // (2 * PLACES) - patch // 2 for place in range(PLACES)])
    pixels = torch.arange(side)
    return (pixels >= starts[:, None]) & (pixels < starts[:, None] + patch)


def explain_errors(outcome: Outcome, positions: Sequence[int]) -> tuple[list[Tensor], float]:
    """Make the maps of some images for the classes that they were taken for, as many as LIMIT_S allows.

    Args:
        outcome: of an evaluation.
        positions: of images in its split.

    Returns:
        Maps, float32 [H, W], of the first of them, none for an ensemble; and the seconds that one took.
    """
    maps: list[Tensor] = []
    start, spent, trained = time.perf_counter(), 0.0, outcome.trained
    if trained is None:
        return maps, spent
    for position in positions:
        if spent + spent / max(1, len(maps)) > LIMIT_S:
            break
        prediction = int(outcome.logits[position].argmax())
        maps.append(occlusion_map(trained, outcome.images[position], prediction, calibrate=False))
        spent = time.perf_counter() - start
    return maps, spent / max(1, len(maps))
