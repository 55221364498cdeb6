"""Fashion-MNIST as tensors: find the four IDX files, verify and parse them, split off the validation images."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fmnist.data.fetch import PUBLISHED, find_file
from fmnist.data.find import locate
from fmnist.data.idx import read_idx
from fmnist.data.info import DataInfo, SplitName
from fmnist.runtime.console import one_line

logger = logging.getLogger("fmnist")

CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
NUM_CLASSES = 10
IMAGE_SIZE = 28
MEAN = 0.2860  # of all pixels of the 60,000 training images, in 0..1
STD = 0.3530

INFO = DataInfo(
    name="fashion_mnist",
    title="Fashion-MNIST",
    class_names=CLASS_NAMES,
    mean=(MEAN,),
    std=(STD,),
    shape=(1, IMAGE_SIZE, IMAGE_SIZE),
    num_train=60_000,
    num_test=10_000,
    source="Zalando Research, https://github.com/zalandoresearch/fashion-mnist",
    licence="MIT",
)


def published(val_size: int) -> DataInfo:
    """Return what to know of Fashion-MNIST with so many validation images among the 60,000."""
    return replace(INFO, num_train=INFO.num_train - val_size, num_val=val_size)


SPLIT_SEED = 20170825  # every run, seed and process count has the same split, so validation numbers are comparable


def load(split: Literal["train", "test"], root: str | None = None, *, fetch: bool = False) -> tuple[Tensor, Tensor]:
    """Load the 60,000 images (train) or the 10,000 (test) with their labels.

    Other data in the same format is used too, with one warning.

    Args:
        split: "train" or "test".
        root: See `locate`.
        fetch: See `locate`.

    Returns:
        Images, uint8 [N, H, W] (28 x 28 in the published files), and labels, int64 [N] in 0..9, on the CPU.

    Raises:
        ValueError: If a file is missing, unreadable or invalid, or the two do not match; one line that names the file.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split {split!r}: expected train or test")
    prefix = "train" if split == "train" else "t10k"
    folder = locate(root, fetch=fetch)
    images, images_path, images_known = _load_file(folder, f"{prefix}-images-idx3-ubyte", "images", 3)
    labels, labels_path, labels_known = _load_file(folder, f"{prefix}-labels-idx1-ubyte", "labels", 1)
    if len(images) != len(labels):
        raise ValueError(f"{images_path}: {len(images):,} images, but {labels_path.name} has {len(labels):,} labels")
    if (wrong := torch.nonzero(labels >= NUM_CLASSES)).numel():
        position = int(wrong[0])
        raise ValueError(f"{labels_path}: label {int(labels[position])} at position {position}, expected 0 to 9")
    if not (images_known and labels_known):
        path = labels_path if images_known else images_path
        logger.warning("%s: not the published Fashion-MNIST (its sha256 differs); used anyway", path)
    return images, labels.long()


def name_of(split: SplitName, root: str | None) -> str:
    """Name the data set of a split: Fashion-MNIST where its files are the published ones, else its folder.

    Args:
        split: see `load_split`.
        root: see `locate`.
    """
    folder, prefix = locate(root), "t10k" if split == "test" else "train"
    files = (("images", 3), ("labels", 1))
    known = all(_load_file(folder, f"{prefix}-{kind}-idx{n}-ubyte", kind, n)[2] for kind, n in files)
    return "Fashion-MNIST" if known else one_line(folder.resolve().name, 80)


def _load_file(folder: Path, name: str, kind: str, dimensions: int) -> tuple[Tensor, Path, bool]:
    """Return the tensor, its path, and whether its bytes are the published ones."""
    path = find_file(folder, name)
    if path is None:
        raise ValueError(f"{folder / name}: no such file, plain or .gz")
    tensor, sha256 = read_idx(path)
    if tensor.dim() != dimensions:
        raise ValueError(f"{path}: {tensor.dim()} dimensions, expected {dimensions} for {kind}; are files swapped?")
    for other, (_, published) in PUBLISHED.items():
        if sha256 == published and other != name:
            raise ValueError(f"{path}: holds the published {other}; are files swapped?")
    return tensor, path, sha256 == PUBLISHED[name][1]


def stratified_split(labels: Tensor, val_size: int, num_classes: int = NUM_CLASSES) -> tuple[Tensor, Tensor]:
    """Split positions into train and validation, with the same share of each class in both.

    The split depends only on `labels` and `val_size`, not on the run's seed. Each class gets its share rounded down;
    the remaining images come from the classes with the largest remainders, lower classes first.

    Args:
        labels: int64 [N] on the CPU, below num_classes.
        val_size: Number of validation images, 0 to N - 1.
        num_classes: Number of classes.

    Returns:
        Sorted int64 positions on the CPU: train [N - val_size] and validation [val_size].

    Raises:
        ValueError: If `val_size` is out of range.
    """
    total = len(labels)
    if not 0 <= val_size < total:
        raise ValueError(f"data.val_size={val_size}: expected 0 to {total - 1}, of {total:,} training images")
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    members = [torch.nonzero(labels == label).flatten() for label in range(num_classes)]
    takes = [val_size * len(member) // total for member in members]
    remainders = [val_size * len(member) % total for member in members]
    by_remainder = sorted(range(num_classes), key=lambda label: -remainders[label])  # stable: ties by class
    for label in by_remainder[: val_size - sum(takes)]:
        takes[label] += 1

    in_val = torch.zeros(total, dtype=torch.bool)
    for member, take in zip(members, takes, strict=True):
        in_val[member[torch.randperm(len(member), generator=generator)[:take]]] = True
    return torch.nonzero(~in_val).flatten(), torch.nonzero(in_val).flatten()


def load_indexed(name: SplitName, root: str | None, val_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Load one of the three splits; train and val partition the 60,000.

    Args:
        name: "train", "val" or "test".
        root: See `locate`.
        val_size: See `stratified_split`.

    Returns:
        Images, uint8 [N, H, W], labels, int64 [N], and their positions in the data set's own file, int64 [N], by which
        every command names an image; on the CPU, in the order of the files.

    Raises:
        ValueError: See `load` and `stratified_split`.
    """
    if name not in ("train", "val", "test"):
        raise ValueError(f"split {name!r}: expected train, val or test")
    if name == "test":
        images, labels = load("test", root)
        return images, labels, torch.arange(len(labels))
    images, labels = load("train", root)
    train, val = stratified_split(labels, val_size)
    indices = train if name == "train" else val
    return images[indices], labels[indices], indices


def load_split(name: SplitName, root: str | None, val_size: int) -> tuple[Tensor, Tensor]:
    """Load images and labels of a split: `load_indexed` without the positions."""
    return load_indexed(name, root, val_size)[:2]
