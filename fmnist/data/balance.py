"""Classes of different size: weights of the loss, and an epoch's order that draws all classes equally often."""

from typing import Literal

import torch
from torch import Tensor


def class_weights(wish: Literal["none", "balanced"] | list[float], labels: Tensor, num_classes: int) -> Tensor | None:
    """Return the weight of each class in the loss.

    Args:
        wish: `optim.class_weights`; balanced: n / (k * count), n images of k classes that have any, as scikit-learn's
            compute_class_weight. A class without images has weight 0.
        labels: int64 [N], those trained on.
        num_classes: C.

    Returns:
        float32 [C] on the labels' device; None where all classes weigh the same.

    Raises:
        ValueError: a list of another length.
    """
    if wish == "none":
        return None
    if wish == "balanced":
        counts = torch.bincount(labels.cpu(), minlength=num_classes).double()  # MPS has no float64
        weights = len(labels) / ((counts > 0).sum() * counts)
        weights[counts == 0] = 0.0
    else:
        if len(wish) != num_classes:
            raise ValueError(
                f"optim.class_weights has {len(wish)} numbers, but there are {num_classes} classes; valid: none, "
                f"balanced, or {num_classes} numbers in the order of the classes"
            )
        weights = torch.tensor(wish, dtype=torch.float64)
    if bool((weights == weights[0]).all()):
        return None
    return weights.float().to(labels.device)


def class_members(labels: Tensor) -> list[Tensor]:
    """Return the positions of each class that has images, int64, on the CPU."""
    labels = labels.cpu()
    return [torch.nonzero(labels == label).flatten() for label in labels.unique()]


def balanced_order(members: list[Tensor], generator: torch.Generator) -> Tensor:
    """Draw as many images as there are, equally many of each class.

    Where the number is not divisible, chance decides which classes get one more. Within a class every image is taken
    before one is taken again: those of a large class are drawn without replacement, those of a small one repeated.

    Args:
        members: of `class_members`, N positions together.
        generator: on the CPU.

    Returns:
        int64 [N] positions, shuffled, on the CPU.
    """
    share, rest = divmod(sum(map(len, members)), len(members))
    takes = torch.full((len(members),), share)
    takes[torch.randperm(len(members), generator=generator)[:rest]] += 1
    drawn = []
    for member, take in zip(members, takes.tolist(), strict=True):
        whole, part = divmod(take, len(member))
        drawn += [member] * whole + [member[torch.randperm(len(member), generator=generator)[:part]]]
    order = torch.cat(drawn)
    return order[torch.randperm(len(order), generator=generator)]


def own_draws(order: Tensor) -> Tensor:
    """Give each draw of an epoch augmentation parameters of its own: an image that is drawn again borrows another's.

    Args:
        order: int64 [N], positions of N images, some of them several times and others not at all.

    Returns:
        int64 [N], each position once: an image's own where it is drawn first, then those of images that are not drawn.
    """
    draws, (values, places) = order.clone(), order.sort(stable=True)
    again = places[1:][values[1:] == values[:-1]]
    draws[again] = torch.nonzero(torch.bincount(order, minlength=len(order)) == 0).flatten()
    return draws
