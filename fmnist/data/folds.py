"""Hold one fold of a data set's training images out, in place of its validation images."""

from collections.abc import Callable

import torch
from torch import Tensor

from fmnist.data.fashion_mnist import SPLIT_SEED
from fmnist.data.info import SplitName
from fmnist.data.mapped import Part, joined


def fold_of(labels: Tensor, folds: int) -> Tensor:
    """Deal training images to folds, each class evenly: a function of the labels alone, not of the run's seed.

    Args:
        labels: int64 [N] on the CPU, as the data set gives them.
        folds: how many, 2 to N.

    Returns:
        int64 [N], the fold of each image, 0 to folds - 1; the sizes of two folds differ by at most one.
    """
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]  # dealt like cards: on from class to class
    found = torch.empty_like(labels)
    found[by_class] = torch.arange(len(labels)) % folds
    return found


def hold_fold_out(
    read: Callable[[SplitName], Part], folds: int, fold: int, *, own_val: bool
) -> Callable[[SplitName], Part]:
    """Return what reads a data set's splits with a fold of the training images as val, and the others as train.

    Args:
        read: reads the data set's own splits.
        folds: how many there are.
        fold: the one to hold out.
        own_val: its validation images lie in a file of their own, which is left aside; else they are dealt too.

    Raises:
        ValueError: there are fewer training images than folds.
    """

    def read_split(name: SplitName) -> Part:
        if name == "test":
            return read(name)
        images, labels, published = read("train")
        if not own_val:
            more, *others = read("val")
            images = joined(images, more)
            labels, published = (torch.cat(both) for both in zip((labels, published), others, strict=True))
        if len(labels) < folds:
            raise ValueError(f"data.folds is {folds}; valid: at most the {len(labels):,} training images")
        order = published.argsort()
        held = fold_of(labels[order], folds) == fold
        chosen = order[held if name == "val" else ~held]
        return images[chosen], labels[chosen], published[chosen]

    return read_split
