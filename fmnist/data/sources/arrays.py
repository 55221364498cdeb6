"""Data sets that are arrays already: a .npz file, and those that torchvision reads."""

import functools
import logging
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from fmnist.data.info import DataInfo, mean_and_std
from fmnist.data.mapped import CHUNK, Mapped
from fmnist.data.sources.npz_file import read_arrays
from fmnist.runtime.console import one_line
from fmnist.runtime.files import cannot_read
from fmnist.runtime.processes import ALONE, Processes

logger = logging.getLogger("fmnist")
# Under train, val, test: images uint8 [N, H, W] or [N, 3, H, W], and labels int64 [N].
Parts = dict[str, tuple[Tensor | Mapped, Tensor]]

# data.name: torchvision's class, its arguments for the two parts, its title, licence.
TRAIN_OR_NOT: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
SPLITS: dict[str, dict[str, Any]] = {"train": {"split": "train"}, "test": {"split": "test"}}
EMNIST = {name: given | {"split": "balanced"} for name, given in TRAIN_OR_NOT.items()}
TORCHVISION: dict[str, tuple[str, dict[str, dict[str, Any]], str, str]] = {
    "mnist": ("MNIST", TRAIN_OR_NOT, "MNIST", "CC BY-SA 3.0"),
    "kmnist": ("KMNIST", TRAIN_OR_NOT, "Kuzushiji-MNIST", "CC BY-SA 4.0"),
    "emnist": ("EMNIST", EMNIST, "EMNIST balanced", ""),
    "cifar10": ("CIFAR10", TRAIN_OR_NOT, "CIFAR-10", ""),
    "cifar100": ("CIFAR100", TRAIN_OR_NOT, "CIFAR-100", ""),
    "svhn": ("SVHN", SPLITS, "SVHN", ""),
    "stl10": ("STL10", SPLITS, "STL-10", ""),
    "usps": ("USPS", TRAIN_OR_NOT, "USPS", ""),
}


def read_torchvision(
    name: str, root: str | None, *, fetch: bool, processes: Processes | None = None
) -> tuple[DataInfo, Parts]:
    """Read a data set with torchvision, which checks the digests of what it downloads.

    Args:
        name: a key of TORCHVISION.
        root: the folder that torchvision calls root; None is data/ in the working directory.
        fetch: let torchvision download it from its mirrors, where no root is given.
        processes: see `open_source`.

    Raises:
        ValueError: it is not there, is damaged, or cannot be fetched; one line.
    """
    from torchvision import datasets

    kind, arguments, title, licence = TORCHVISION[name]
    folder = Path(root or "data").expanduser()
    download = fetch and root is None
    try:
        if download:
            folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{name}.lock") if download else nullcontext():  # one process of a machine fetches
            make = functools.partial(getattr(datasets, kind), folder, download=download)
            read = {part: make(**given) for part, given in arguments.items()}
    except Exception as error:  # of the network, of a damaged archive, of a missing file: whatever torchvision meets
        remedy = "" if download else "; leave data.root out and train.py fetches it into data/"
        reason = f"torchvision cannot read it in {folder}: {one_line(error, 300)}{remedy}"
        raise ValueError(f"data.name {name}: {reason}") from None
    parts: Parts = {part: _tensors(data, transposed=name == "emnist") for part, data in read.items()}
    classes = getattr(read["train"], "classes", None) or [str(label) for label in range(10)]
    about = {"source": f"torchvision.datasets.{kind}", "licence": licence}
    return describe(parts, name, title, tuple(map(str, classes)), processes=processes or ALONE, **about), parts


def _tensors(data: Any, *, transposed: bool) -> tuple[Tensor, Tensor]:
    images = torch.as_tensor(np.asarray(data.data))
    if images.ndim == 4 and images.shape[1] != 3:
        images = images.movedim(-1, 1)
    labels = data.targets if hasattr(data, "targets") else data.labels
    # EMNIST's files hold each image with rows and columns exchanged
    return (images.mT if transposed else images).contiguous(), torch.as_tensor(np.asarray(labels)).long()


def read_npz(path: str, processes: Processes | None = None) -> tuple[DataInfo, Parts]:
    """Read the arrays train_images, train_labels and perhaps val_ and test_ ones, as MedMNIST ships them.

    Images are uint8 [N, H, W] or [N, H, W, 3], labels whole numbers [N] or [N, 1] from 0; an array class_names of texts
    names the classes.

    Args:
        path: the file.
        processes: see `open_source`.

    Raises:
        ValueError: no such file, or an array that is missing or of another kind; one line.
    """
    expected = [f"{part}_{kind}" for part in ("train", "val", "test") for kind in ("images", "labels")]
    try:
        arrays, unread = read_arrays(path, (*expected, "class_names"), in_place=processes is not None)
    except OSError as error:
        raise cannot_read(Path(path), error) from None
    except Exception as error:  # of NumPy, of its header's parser, of zipfile
        raise ValueError(f"data.root: {path} is no .npz file of plain arrays: {one_line(error, 200)}") from None
    others = [one_line(name, 40) for name in unread]
    if others:
        logger.info("%s: ignored arrays: %s", path, ", ".join(others[:10]))
    parts = {part: _checked(arrays, part, path) for part in ("train", "val", "test") if f"{part}_images" in arrays}
    if alone := [part for part in ("val", "test") if f"{part}_labels" in arrays and part not in parts]:
        raise ValueError(f"data.root: {path} has {alone[0]}_labels, but no {alone[0]}_images")
    parts = {part: found for part, found in parts.items() if part == "train" or len(found[1])}
    about = {"source": Path(path).name}
    if not parts.get("train"):
        raise ValueError(
            f"data.root: {path} holds {', '.join((*arrays, *others)) or 'nothing'}; expected train_images, train_labels"
        )
    shapes = {part: tuple(images.shape[1:]) for part, (images, _) in parts.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"data.root: {path} holds images of different shapes: {shapes}")
    num_classes = max((int(labels.max()) for _, labels in parts.values() if len(labels)), default=-1) + 1
    names = _class_names(arrays.get("class_names", np.arange(num_classes)), num_classes, path)
    return describe(parts, "npz", Path(path).stem, names, processes=processes or ALONE, **about), parts


def _class_names(found: np.ndarray, num_classes: int, path: str) -> tuple[str, ...]:
    with suppress(UnicodeDecodeError):
        found = np.char.decode(found, "utf-8") if found.dtype.kind == "S" else found
    names = tuple(map(str, found)) if found.ndim == 1 and found.dtype.kind in "Uiu" else ()
    if len(names) < num_classes or len(set(names)) < len(names):
        raise ValueError(
            f"data.root: {path}: class_names needs {num_classes} different names, as texts [{num_classes}]"
        )
    if bad := [name for name in names if not name.isprintable() or not name.strip()]:
        raise ValueError(f"data.root: {path}: class_names holds {ascii(bad[0]):.80}; expected printable texts")
    return names


def _checked(arrays: Mapping[str, np.ndarray], part: str, path: str) -> tuple[Tensor | Mapped, Tensor]:
    images, labels = arrays[f"{part}_images"], arrays.get(f"{part}_labels", np.zeros(0, np.float32))
    shape, where = list(images.shape), f"data.root: {path}"
    if (
        images.dtype != np.uint8
        or not (images.ndim == 3 or (images.ndim == 4 and shape[3] in (1, 3)))
        or 0 in shape[1:]
    ):
        raise ValueError(f"{where}: {part}_images is {images.dtype} {shape}; expected uint8 [N, H, W] or [N, H, W, 3]")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(images):
        found = f"{labels.dtype} {list(labels.shape)}" if f"{part}_labels" in arrays else "missing"
        raise ValueError(f"{where}: {part}_labels is {found}; expected {len(images)} whole numbers, a class an image")
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) > 10**6):
        raise ValueError(f"{where}: {part}_labels from {labels.min()} to {labels.max()}; expected classes from 0")
    tensor = torch.from_numpy(images)
    if images.ndim == 4:
        tensor = tensor[..., 0] if shape[3] == 1 else tensor.movedim(-1, 1)
    numbers = torch.from_numpy(labels.astype(np.int64))
    if isinstance(images, np.memmap):
        return Mapped(array=tensor, at=torch.arange(len(numbers)), stays=False), numbers
    return tensor.contiguous(), numbers


def describe(
    parts: Parts,
    name: str,
    title: str,
    class_names: tuple[str, ...],
    source: str,
    licence: str = "",
    processes: Processes = ALONE,
) -> DataInfo:
    """Return what to know of a data set that was read; by all processes, each of which has read it.

    Raises:
        ValueError: it has fewer than two classes, or a class without a training image.
    """
    images, labels = parts["train"]
    counts = torch.bincount(labels, minlength=len(class_names))
    if len(class_names) < 2 or not len(labels):
        raise ValueError(f"{title} has {len(class_names)} class and {len(labels)} training images; needed: two classes")
    if (missing := torch.nonzero(counts == 0).flatten()).numel():
        raise ValueError(f"{title} has no training image of class {class_names[int(missing[0])]!r}")
    mean, std = statistics(images, processes)
    height, width = images.shape[-2:]
    return DataInfo(
        name=name,
        title=title,
        class_names=class_names,
        mean=mean,
        std=std,
        shape=(len(mean), height, width),
        num_train=len(labels),
        source=source,
        licence=licence,
    )


def statistics(images: Tensor | Mapped, processes: Processes = ALONE) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel, in [0, 1], from exact sums, to four digits.

    Args:
        images: uint8 [N, H, W] or [N, C, H, W].
        processes: each looks through its share of the images; sums of whole numbers depend on no order.

    Raises:
        ValueError: all channels are the same everywhere; a single one has std 1. Or the processes see other shapes.
    """

    def count() -> list[list[int]]:
        counts = torch.zeros(images.shape[1] if len(images.shape) == 4 else 1, 256, dtype=torch.int64)
        for start in processes.share(range(0, len(images), CHUNK)):
            rows = range(start, min(start + CHUNK, len(images)))
            part = images.read(rows) if isinstance(images, Mapped) else images[rows.start : rows.stop]
            for channel, pixels in zip(counts, part.unbind(1) if part.ndim == 4 else [part], strict=True):
                channel += torch.bincount(pixels.flatten(), minlength=256)
        return counts.tolist()

    shapes, shares = zip(*processes.gather(([*images.shape], processes.together(count))), strict=True)
    if other := [rank for rank, shape in enumerate(shapes) if shape != shapes[0]]:
        raise ValueError(
            f"rank {other[0]} sees training images {shapes[other[0]]}, rank 0 {shapes[0]}: "
            "all processes have to read the same data"
        )
    channels = [[sum(counts) for counts in zip(*each, strict=True)] for each in zip(*shares, strict=True)]
    if all(sum(map(bool, counts)) == 1 for counts in channels):
        raise ValueError("all training images are one and the same colour")
    sums = ([sum(c * value**power for value, c in enumerate(counts)) for power in (0, 1, 2)] for counts in channels)
    means, stds = zip(*(mean_and_std(*each) for each in sums), strict=True)
    return means, stds
