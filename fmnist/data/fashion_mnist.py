"""Fashion-MNIST as tensors: find the four IDX files (or have them fetched), verify, parse, split."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fmnist.data.fetch import DEBIAN_FOLDER, PUBLISHED, STAGING, fetch, find_file, missing_files, one_line
from fmnist.data.idx import parse_idx as parse_idx
from fmnist.data.idx import read_idx

logger = logging.getLogger("fmnist")

CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
NUM_CLASSES = 10
IMAGE_SIZE = 28
MEAN = 0.2860  # of all pixels of the 60,000 training images, in 0..1
STD = 0.3530

SPLIT_SEED = 20170825  # one split for every run, seed and process count: validation numbers can be compared


def locate(root: str | None = None) -> Path:
    """Find the folder that holds the four files, each plain or .gz; fetch them where there is none.

    A given root is `root`, else `$FMNIST_DATA`: the folder of the files or torchvision's root above it; where
    it has none of them, its `FashionMNIST/raw` is filled. Without one: `data/FashionMNIST/raw`, which is
    torchvision's layout, `data/`, Debian's folder; else the first of these is filled.

    Args:
        root: `data.root` of the config.

    Returns:
        The folder. What the files hold is not looked at.

    Raises:
        ValueError: If a folder holds some but not all of the files, or they cannot be fetched; one line.
    """
    given = root or os.environ.get("FMNIST_DATA")
    origin = "data.root" if root else "$FMNIST_DATA" if given else "data folder"
    home = Path(os.path.expanduser(given)) if given else Path.cwd() / "data"
    target = home / "FashionMNIST" / "raw"
    try:
        if home.exists() and not home.is_dir():
            raise ValueError(f"{origin}: {home} is not a folder")
        for folder in (target, home) if given else (target, home, DEBIAN_FOLDER):
            if not missing_files(folder):
                return folder
        for folder in (target, home):
            if not 0 < len(missing_files(folder)) < len(PUBLISHED):
                continue
            if (folder / STAGING).is_dir():
                target = folder  # a fetch is under way there, or was killed between two renames
                break
            # Looked at again: the fetch of another process may have ended since.
            if missing := missing_files(folder):
                names = ", ".join(missing)
                raise ValueError(f"{origin}: {folder} lacks {names} (plain or .gz), but holds the rest")
            return folder
        fetch(target)
    except OSError as error:
        line = one_line(error)
        raise ValueError(f"{origin}: no Fashion-MNIST in {home}, nor can it be put there: {line}") from error
    return target


def load(split: Literal["train", "test"], root: str | None = None) -> tuple[Tensor, Tensor]:
    """Load the 60,000 images (train) or the 10,000 (test) with their labels.

    Data in the same format that is not the published Fashion-MNIST is used, with one warning.

    Args:
        split: "train" or "test".
        root: See `locate`.

    Returns:
        Images, uint8 [N, H, W] (28 x 28 in the published files), and labels, int64 [N] in 0..9, on the CPU.

    Raises:
        ValueError: If a file is missing, unreadable or wrong, or the two do not fit; one line, with the file.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split {split!r}: expected train or test")
    prefix = "train" if split == "train" else "t10k"
    folder = locate(root)
    images, images_path, images_known = _load_file(folder, f"{prefix}-images-idx3-ubyte", "images", 3)
    labels, labels_path, labels_known = _load_file(folder, f"{prefix}-labels-idx1-ubyte", "labels", 1)
    if len(images) != len(labels):
        raise ValueError(f"{images_path}: {len(images):,} images, but {labels_path.name} has {len(labels):,} labels")
    if (wrong := torch.nonzero(labels >= NUM_CLASSES)).numel():
        position = int(wrong[0])
        raise ValueError(f"{labels_path}: label {int(labels[position])} at position {position}, expected 0 to 9")
    if not (images_known and labels_known):
        path = labels_path if images_known else images_path
        logger.warning("%s: not the published Fashion-MNIST (its sha256 differs); used as it is", path)
    return images, labels.long()


def _load_file(folder: Path, name: str, kind: str, dimensions: int) -> tuple[Tensor, Path, bool]:
    """Return the tensor, the path and whether the bytes are the published ones."""
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


def stratified_split(labels: Tensor, val_size: int) -> tuple[Tensor, Tensor]:
    """Split positions into train and validation, with the same share of each class in both.

    The split depends on `labels` and `val_size` alone, not on the run's seed. What the rounded-down shares
    leave over goes to the classes with the largest remainders, the lower class first.

    Args:
        labels: int64 [N] on the CPU, in 0..9.
        val_size: Number of validation images, 0 to N - 1.

    Returns:
        Sorted int64 positions on the CPU: train [N - val_size] and validation [val_size].

    Raises:
        ValueError: If `val_size` is out of range.
    """
    total = len(labels)
    if not 0 <= val_size < total:
        raise ValueError(f"data.val_size={val_size}: expected 0 to {total - 1}, of {total:,} training images")
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    members = [torch.nonzero(labels == label).flatten() for label in range(NUM_CLASSES)]
    takes = [val_size * len(member) // total for member in members]
    remainders = [val_size * len(member) % total for member in members]
    by_remainder = sorted(range(NUM_CLASSES), key=lambda label: -remainders[label])  # stable: ties by class
    for label in by_remainder[: val_size - sum(takes)]:
        takes[label] += 1

    in_val = torch.zeros(total, dtype=torch.bool)
    for member, take in zip(members, takes, strict=True):
        in_val[member[torch.randperm(len(member), generator=generator)[:take]]] = True
    return torch.nonzero(~in_val).flatten(), torch.nonzero(in_val).flatten()


def load_split(name: Literal["train", "val", "test"], root: str | None, val_size: int) -> tuple[Tensor, Tensor]:
    """Load one of the three splits; train and val are the two parts of the 60,000.

    Args:
        name: "train", "val" or "test".
        root: See `locate`.
        val_size: See `stratified_split`.

    Returns:
        Images, uint8 [N, H, W], and labels, int64 [N], on the CPU, in the order of the files.

    Raises:
        ValueError: See `load` and `stratified_split`.
    """
    if name not in ("train", "val", "test"):
        raise ValueError(f"split {name!r}: expected train, val or test")
    if name == "test":
        return load("test", root)
    images, labels = load("train", root)
    train, val = stratified_split(labels, val_size)
    indices = train if name == "train" else val
    return images[indices], labels[indices]
