"""A part of the training images, for learning curves: seeded, stratified, and nested: each begins with the smaller."""

import torch
from torch import Tensor

SUBSET_SEED = 20260401  # every run and seed has the same parts, so that two lengths of one curve are comparable


def subset(labels: Tensor, limit: int | float) -> Tensor:
    """Return the positions of a part of the images: the first `limit` of an order of all of them.

    The order depends on the labels alone. Within a class chance decides; the image of rank r of n in its class comes
    at (r + 1/2) / n of the whole, so that every part has each class's share, to within about one image (Webster's
    method).

    Args:
        labels: int64 [N] on the CPU.
        limit: `data.limit`: images, or a share of them as a float.

    Returns:
        int64 [limit] positions, on the CPU.

    Raises:
        ValueError: more images than there are, or a share of less than one.
    """
    total = len(labels)
    count = limit if isinstance(limit, int) else round(limit * total)
    if not 1 <= count <= total:
        raise ValueError(f"data.limit is {limit}; valid: 1 to {total:,} training images, or a share of them up to 1.0")
    generator = torch.Generator().manual_seed(SUBSET_SEED)
    place = torch.empty(total, dtype=torch.float64)
    for label in labels.unique():
        member = torch.nonzero(labels == label).flatten()
        drawn = member[torch.randperm(len(member), generator=generator)]
        place[drawn] = (torch.arange(len(member), dtype=torch.float64) + 0.5) / len(member)
    return torch.argsort(place, stable=True)[:count]  # of equal places the first in the files comes first
