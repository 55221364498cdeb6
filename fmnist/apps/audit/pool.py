"""The training images of a data set, as given, and what finished runs make of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fmnist.config.schema import DataConfig
from fmnist.data.registry import open_source
from fmnist.data.split import Split
from fmnist.evaluation.features import features_of
from fmnist.runtime.console import counted
from fmnist.trained import Trained

logger = logging.getLogger("fmnist")
OTHER_FILE = 1 << 40  # added to positions of validation images that lie in a file of their own


@dataclass(frozen=True, kw_only=True)
class Pool:
    """N images of train and val with the labels that the data set gives them, in its own order, and predictions.

    Attributes:
        images: uint8 [N, H, W] or [N, C, H, W].
        labels: int64 [N].
        splits: train or val, as the first run divides them; train for all that are dealt to folds.
        indices: N positions in the data set's own file.
        probabilities: float64 [N, num_classes], the mean over runs of logarithms, as probabilities.
        known: bool [N], images that a run gives probabilities for.
        held_out: no run was trained on the images that it gives probabilities for.
        features: float16 [N, D], penultimate ones of the first run.
        test: the test images.
        own_val: a position among the validation images is none among the training images.
        title: of the data set.
        class_names: in label order.
    """

    images: Tensor
    labels: Tensor
    splits: list[str]
    indices: list[int]
    probabilities: Tensor
    known: Tensor
    held_out: bool
    features: Tensor
    test: Split
    own_val: bool
    title: str
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, position: int) -> str:
        """Name an image as search does: train:17."""
        return f"{self.splits[position]}:{self.indices[position]}"

    def key(self, split: str, index: int) -> tuple[str, int]:
        """Return what one image has alone: another run may call train what this one calls val."""
        return split if self.own_val or split == "test" else "train", index


@dataclass(frozen=True, kw_only=True)
class _View:
    """The images of train and val as one run divides them, sorted as the data set has them."""

    images: Tensor
    labels: Tensor
    keys: Tensor
    in_val: Tensor
    order: Tensor  # of train and val, one behind the other
    parts: tuple[Tensor, Tensor]  # images of train and of val
    test: Split
    own_val: bool
    title: str


def _view(data: DataConfig) -> _View:
    source = open_source(replace(data, corrections=None))
    train, val, test = (Split.load(name, source) for name in ("train", "val", "test"))
    assert train.published is not None and val.published is not None
    in_val = torch.arange(len(train) + len(val)) >= len(train)
    keys = torch.cat((train.published, val.published)) + OTHER_FILE * (in_val & source.own_val)
    order = keys.argsort()
    images = torch.cat((train.images, val.images)) if len(val) else train.images
    return _View(
        images=images[order],
        labels=torch.cat((train.labels, val.labels))[order],
        keys=keys[order],
        in_val=in_val[order],
        order=order,
        parts=(train.images, val.images),
        test=test,
        own_val=source.own_val and data.folds is None,
        title=train.title(),
    )


def check_folds(runs: Sequence[Trained]) -> bool:
    """Say whether the runs are folds, each predicting what it held out.

    Raises:
        ValueError: some are and others are not, or they were dealt otherwise; one line.
    """
    counts = {trained.cfg.data.folds for trained in runs}
    if len(counts) > 1:
        said = ", ".join(f"{trained.name}: {trained.cfg.data.folds or 'none'}" for trained in runs)
        raise ValueError(f"the runs have different data.folds ({said}); valid: the folds of one deal, or no folds")
    return counts != {None}


def gather(runs: Sequence[Trained], root: str | None) -> Pool:
    """Run the models over the images, or read what was kept.

    Args:
        runs: one or more; folds, or runs of the same images.
        root: where the data set lies; None takes each run's.

    Raises:
        ValueError: data that cannot be read, or runs that do not belong together; one line.
    """
    folds, first = check_folds(runs), runs[0]
    view = _view(first.data(root))
    total = torch.zeros(len(view.labels), len(first.class_names), dtype=torch.float64)
    counts = torch.zeros(len(view.labels), dtype=torch.int64)
    features = torch.zeros(0)
    for trained in runs:
        mine = view if trained is first else _view(trained.data(root))
        _check_same(first, trained, view, mine)
        names = ("train", "val") if trained is first or not folds else ("val",)
        found = {
            name: features_of(trained, name, images)
            for name, images in zip(("train", "val"), mine.parts, strict=True)
            if name in names and len(images)
        }
        if trained is first:
            features = torch.cat([part.features for part in found.values()])[view.order]
        used = mine.in_val if folds else torch.ones_like(mine.in_val)
        logits = torch.cat([part.logits for name, part in found.items() if name == "val" or not folds])
        # in val alone the order is that of `mine`; in both it has to be sorted
        logits = logits if folds else logits[mine.order]
        total[used] += trained.probabilities(logits).clamp(min=1e-30).log()
        counts[used] += 1
    known = counts > 0
    if not known.all():
        logger.warning(
            "%s of %s training images are in no fold that was given: they are not ranked",
            f"{int((~known).sum()):,}",
            f"{len(known):,}",
        )
    return Pool(
        images=view.images,
        labels=view.labels,
        splits=["val" if held and not folds else "train" for held in view.in_val.tolist()],
        indices=(view.keys % OTHER_FILE).tolist(),
        probabilities=(total / counts.clamp(min=1)[:, None]).softmax(dim=1),
        known=known,
        held_out=folds,
        features=features,
        test=view.test,
        own_val=view.own_val,
        title=view.title,
        class_names=first.class_names,
    )


def _check_same(first: Trained, other: Trained, view: _View, mine: _View) -> None:
    if first.class_names != other.class_names or not (
        torch.equal(view.keys, mine.keys)
        and torch.equal(view.labels, mine.labels)
        and (view is mine or torch.equal(view.images, mine.images))
    ):
        raise ValueError(f"{first.name} and {other.name} were trained on different data sets")
    folds = first.cfg.data.folds
    if folds is None and not torch.equal(view.in_val, mine.in_val):
        raise ValueError(
            f"{first.name} and {other.name} hold out other validation images; valid: the same data.val_size"
        )


def describe(runs: Sequence[Trained], pool: Pool) -> str:
    """Say what the ranking rests on."""
    names = ", ".join(trained.name for trained in runs)
    if pool.held_out:
        given = counted(len({trained.cfg.data.fold for trained in runs}), "fold")
        return f"{given} of {runs[0].cfg.data.folds} ({names}), each judging the images that it was not trained on"
    models = "one run" if len(runs) == 1 else f"{len(runs)} runs, averaged"
    return f"{models} ({names}), which learnt these very labels: folds find more"
