"""The training images of a data set, as given, and what finished runs make of them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fmnist.config.schema import DataConfig
from fmnist.data.folds import fold_of
from fmnist.data.registry import open_source
from fmnist.data.split import Split
from fmnist.evaluation.features import compute_features, features_of
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
        probabilities: float64 [N, num_classes]; the mean of the runs.
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
class _Given:
    """The images of train and val with their labels as given, sorted as the data set has them."""

    images: Tensor
    labels: Tensor
    keys: Tensor
    in_val: Tensor
    test: Split
    own_val: bool
    title: str


def _read(data: DataConfig) -> _Given:
    """Read them; of folds all that were dealt, though `data.limit` let each train on a part."""
    source = open_source(replace(data, corrections=None, limit=data.limit if data.folds is None else None))
    train, val, test = (Split.load(name, source) for name in ("train", "val", "test"))
    assert train.published is not None and val.published is not None
    own_val = source.own_val and data.folds is None  # whose place the folds take
    in_val = torch.arange(len(train) + len(val)) >= len(train)
    keys = torch.cat((train.published, val.published)) + OTHER_FILE * (in_val & own_val)
    order = keys.argsort()
    return _Given(
        images=torch.cat((train.images, val.images))[order],
        labels=torch.cat((train.labels, val.labels))[order],
        keys=keys[order],
        in_val=in_val[order],
        test=test,
        own_val=own_val,
        title=train.title(),
    )


def gather(runs: Sequence[Trained], root: str | None) -> Pool:
    """Run the models over the images, or read what was kept.

    Args:
        runs: one or more; folds, or runs of the same images.
        root: where the data set lies; None takes each run's.

    Raises:
        ValueError: data that cannot be read, or runs that do not belong together; one line.
    """
    first, folds = runs[0], _same_folds(runs)
    given = _read(first.data(root))
    total = torch.zeros(len(given.labels), len(first.class_names), dtype=torch.float64)
    counts = torch.zeros(len(given.labels), dtype=torch.int64)
    features = torch.zeros(0)
    for trained in runs:
        in_val = _division(trained, first, given, root)
        for name, mask in (("train", ~in_val), ("val", in_val)):
            if not mask.any() or (folds and name == "train" and trained is not first):
                continue
            found = features_of(trained, name, given.images[mask])
            if trained is first:
                features = (
                    found.features.new_zeros(len(mask), found.features.shape[1]) if not len(features) else features
                )
                features[mask] = found.features
            if name == "val" or not folds:
                total[mask] += _probabilities(trained, found.logits, given.images[mask])
                counts[mask] += 1
    known = counts > 0
    if not known.all():
        absent = counted(int((~known).sum()), "training image")
        logger.warning("%s of %s in no fold that was given: not ranked", absent, f"{len(known):,}")
    return Pool(
        images=given.images,
        labels=given.labels,
        splits=["val" if held and not folds else "train" for held in given.in_val.tolist()],
        indices=(given.keys % OTHER_FILE).tolist(),
        probabilities=total / counts.clamp(min=1)[:, None],
        known=known,
        held_out=folds,
        features=features,
        test=given.test,
        own_val=given.own_val,
        title=given.title,
        class_names=first.class_names,
    )


def _probabilities(trained: Trained, logits: Tensor, images: Tensor) -> Tensor:
    """Average with the mirror images, where the run was trained on them: that finds a little more."""
    found = trained.probabilities(logits)
    if trained.cfg.augment.flip:
        found = (found + trained.probabilities(compute_features(trained, images.flip(-1)).logits)) / 2
    return found


def _same_folds(runs: Sequence[Trained]) -> bool:
    """Say whether the runs are folds, each judging what it held out."""
    counts = {trained.cfg.data.folds for trained in runs}
    if len(counts) > 1:
        said = ", ".join(f"{trained.name}: {trained.cfg.data.folds or 'none'}" for trained in runs)
        raise ValueError(
            f"the runs have different data.folds ({said}); valid: folds of one deal, or runs without folds"
        )
    return counts != {None}


def _division(trained: Trained, first: Trained, given: _Given, root: str | None) -> Tensor:
    """Return which of the images a run held out, bool [N], after making sure that they are its images."""
    mine, theirs = (replace(run.data(root), corrections=None, fold=None) for run in (trained, first))
    if mine.folds is not None:
        mine, theirs = replace(mine, limit=None), replace(theirs, limit=None)
    if mine == theirs and mine.folds is not None:
        in_val = fold_of(given.labels, mine.folds).eq(trained.cfg.data.fold or 0)
    elif mine == theirs:
        in_val = given.in_val
    else:
        other = _read(trained.data(root))
        if not all(torch.equal(getattr(given, name), getattr(other, name)) for name in ("keys", "labels", "images")):
            raise ValueError(f"{first.name} and {trained.name} were trained on different data sets")
        in_val = other.in_val
    if mine.folds is None and not torch.equal(in_val, given.in_val):
        raise ValueError(f"{first.name} and {trained.name} held out different images; valid: the same data options")
    held = Split(images=given.images[in_val], labels=given.labels[in_val], info=trained.info)
    if trained.images_sha256("val") not in (None, held.digest):
        said = f"{trained.name} was trained on other images or labels than those that are there now"
        if mine.folds is not None:
            raise ValueError(f"{said}: it may have been trained on what it held out")
        logger.warning("%s; used anyway", said)
    return in_val


def describe(runs: Sequence[Trained], pool: Pool) -> str:
    """Say what the ranking rests on."""
    names = ", ".join(trained.name for trained in runs)
    if pool.held_out:
        given = counted(len({trained.cfg.data.fold for trained in runs}), "fold")
        return f"{given} of {runs[0].cfg.data.folds} ({names}), each judging the images that it was not trained on"
    models = "one run" if len(runs) == 1 else f"{len(runs)} runs, averaged"
    but = ", but for the validation images" if runs[0].info.num_val else ""
    return f"{models} ({names}), trained on these very labels{but}"
