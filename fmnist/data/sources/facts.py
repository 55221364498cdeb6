"""What is known of a folder's decoded pictures: classes, parts, mean and deviation, digests."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fmnist.data.info import mean_and_std
from fmnist.data.sources.decode import Shape
from fmnist.data.sources.layout import PARTS, Found

CHUNK_BYTES = 1 << 22  # read at once from the array


class Kept(NamedTuple):
    """A picture that was written: the file, and what `Picture` says of it."""

    file: Found
    content: str
    sums: tuple[tuple[int, int], ...]


def facts_of(path: Path, kept: list[Kept], shape: Shape, holdout: float) -> dict[str, Any]:
    """Return what the cache keeps beside the images.

    Args:
        path: the array's file.
        kept: the pictures in it, in their order, one of every class in train.
        shape: of each.
        holdout: see `split_by_content`.
    """
    class_names = sorted({item.file.label for item in kept})
    numbers = {name: number for number, name in enumerate(class_names)}
    labels = [numbers[item.file.label] for item in kept]
    if kept[0].file.part:
        parts = {name: [at for at, item in enumerate(kept) if item.file.part == name] for name in PARTS}
    else:
        parts = split_by_content(labels, [item.content for item in kept], holdout)
    parts = {name: positions for name, positions in parts.items() if positions}
    of_channels = zip(*(kept[at].sums for at in parts["train"]), strict=True)
    pixels = len(parts["train"]) * shape[1] * shape[2]
    mean, std = zip(*(mean_and_std(pixels, *map(sum, zip(*sums, strict=True))) for sums in of_channels), strict=True)
    return {
        "shape": [len(kept), *shape],
        "class_names": class_names,
        "files": [item.file.name for item in kept],
        "labels": labels,
        "parts": parts,
        "mean": mean,
        "std": std,
        "digests": _digests(path, labels, parts, shape),
    }


def split_by_content(labels: Sequence[int], contents: Sequence[str], holdout: float) -> dict[str, list[int]]:
    """Hold out a share of each class for val and as much for test: a function of the files' content alone.

    Each class is put in the order of its files' sha256; val takes the first and test the last, so a file that is added
    moves few others, and none between the two. Files with the same bytes stay together where that can be.

    Args:
        labels: of N files.
        contents: sha256 of each.
        holdout: share, rounded to whole files; at least one where a class has three or more, and never all.

    Returns:
        Positions under train, val and test, ascending.
    """
    chosen: dict[str, list[int]] = {name: [] for name in PARTS}
    members: dict[int, list[int]] = {}
    for at in sorted(range(len(labels)), key=lambda at: contents[at]):
        members.setdefault(labels[at], []).append(at)
    for files in members.values():
        share = min(max(1, round(holdout * len(files))), (len(files) - 1) // 2) if holdout else 0
        groups = [list(group) for _, group in groupby(files, key=lambda at: contents[at])]
        val, test = _take(groups, share), _take(groups[::-1], share)
        if min(len(val), len(test)) == 0 or set(val) & set(test):  # copies everywhere
            val, test = files[:share], files[len(files) - share :]
        chosen["val"] += val
        chosen["test"] += test
    out = {*chosen["val"], *chosen["test"]}
    chosen["train"] = [at for at in range(len(labels)) if at not in out]
    return {name: sorted(positions) for name, positions in chosen.items()}


def _take(groups: list[list[int]], share: int) -> list[int]:
    taken: list[int] = []
    for group in groups:
        if len(taken) + len(group) <= share:
            taken += group
        if len(taken) == share:
            break
    return taken


def _digests(path: Path, labels: Sequence[int], parts: dict[str, list[int]], shape: Shape) -> dict[str, str]:
    """Return the digest of each part, as `Split.digest`, whose images have no axis for a single channel."""
    numbers = np.array(labels, dtype=np.int64)
    image = list(shape if shape[0] > 1 else shape[1:])
    found = {name: hashlib.sha256(f"torch.uint8 {[len(at), *image]} ".encode()) for name, at in parts.items()}
    member = np.zeros(len(labels), dtype=np.int8)
    for number, positions in enumerate(parts.values()):
        member[positions] = number
    for first, images in _chunks(path, len(labels), shape):
        of = member[first : first + len(images)]
        for number, name in enumerate(parts):
            found[name].update(np.ascontiguousarray(images[of == number]).data)
    for name, positions in parts.items():
        found[name].update(f"torch.int64 {[len(positions)]} ".encode())
        found[name].update(numbers[positions].data)
    return {name: digest.hexdigest() for name, digest in found.items()}


def _chunks(path: Path, number: int, shape: Shape) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Read an array's file in pieces, which unlike a map of it leave no pages in this process' memory."""
    step = max(1, CHUNK_BYTES // prod(shape))
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        for first in range(0, number, step):
            rows = min(step, number - first)
            yield first, np.fromfile(file, dtype=np.uint8, count=rows * prod(shape)).reshape(rows, *shape)
