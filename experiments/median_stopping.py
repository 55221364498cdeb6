"""Stop a trial of a search that lags behind the others (median stopping: Golovin et al., "Google Vizier", 2017)."""

import statistics
from collections.abc import Mapping, Sequence

FEWEST = 3  # other trials that have come as far: the median of two is no middle


def lags(trial: Sequence[Mapping[str, float]], others: Sequence[Sequence[Mapping[str, float]]], after: float) -> bool:
    """Say whether the best of a trial so far is below the median of what the others had reached by the same epoch.

    A low learning rate is ahead early on and not at the end: `after` should leave the first half alone.

    Args:
        trial: validations so far, each with `epoch` and `top1`.
        others: those of the other trials, finished, stopped or running; who has not come as far does not count.
        after: epoch before which none is stopped.
    """
    if not trial or (epoch := trial[-1]["epoch"]) < after:
        return False
    so_far = [[point["top1"] for point in other if point["epoch"] <= epoch + 1e-6] for other in others]
    reached = [
        max(top1) for other, top1 in zip(others, so_far, strict=True) if top1 and other[-1]["epoch"] >= epoch - 1e-6
    ]
    return len(reached) >= FEWEST and max(point["top1"] for point in trial) < statistics.median(reached)
