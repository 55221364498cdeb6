"""A folder of pictures by class as tensors: decoded once, kept in a cache, and read in place from there."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fmnist.data.photos import why_unreadable
from fmnist.data.sources.cache import Cache
from fmnist.data.sources.decode import Fit, Header, Picture, in_threads, read_header, read_picture, stored_shape
from fmnist.data.sources.facts import Kept, facts_of
from fmnist.data.sources.layout import Found, list_pictures
from fmnist.runtime.console import counted, one_line

logger = logging.getLogger("fmnist")
SHOWN = 3  # bad files in a message
SIZE_STEP = 32  # pixels between the sizes that a message proposes


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """A folder of pictures by class.

    Attributes:
        images: uint8 [N, C, H, W] on the CPU, in place in the cache's file; C is 1 where every file is grey, else 3.
        labels: int64 [N].
        class_names: in label order.
        files: relative to the root, in the order of the images.
        parts: "train", and "val" and "test" where they are there: int64 positions into the above, ascending.
        mean, std: per channel, in [0, 1], of the train part, rounded to four digits; a channel of one value has std 1.
        copies: pairs of files in two parts whose stored pixels are the same.
        skipped: files that could not be read, and why.
        digests: of each part, as `Split.digest`.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    files: tuple[str, ...]
    parts: dict[str, Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    copies: tuple[tuple[str, str], ...]
    skipped: tuple[tuple[str, str], ...]
    digests: dict[str, str]


def read_folder(
    root: Path,
    *,
    stored_size: int | None,
    fit: Fit,
    bad_files: Literal["refuse", "skip"],
    holdout: float,
    fits: Callable[[int], str] | None = None,
) -> Decoded:
    """Read ROOT/CLASS/* or ROOT/{train,val,test}/CLASS/*; see `list_pictures`.

    The first time decodes into the cache folder (`cache_folder`); later ones, and other processes of this machine, read
    that, for as long as names, sizes and times of the files are the same. Nothing is written elsewhere.

    Args:
        root: the folder.
        stored_size: see `stored_shape`.
        fit: see `in_shape`.
        bad_files: refuse: an error names them; skip: they are left out.
        holdout: share of each class that goes to val, and as much to test, in [0, 0.5), where the folder has no parts;
            see `split_by_content`.
        fits: says of a number of bytes, of all images, why they are too many; an empty text where they fit.

    Raises:
        ValueError: a folder, files or a cache folder that cannot be used, or too many images; one line.
    """
    try:
        root = Path(os.path.abspath(os.path.expanduser(root)))
        found, left_out = list_pictures(root)
        if left_out:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in left_out.most_common())
            logger.info("%s", one_line(f"{root}: left out what are no pictures: {kinds}", 1000))
        options = {"stored_size": stored_size, "fit": fit, "bad_files": bad_files, "holdout": holdout}
        cache = Cache(root, options, found)
        kept = cache.read()  # without a lock, which a cache that somebody else made may not allow
        if kept is None:
            with cache.locked():
                kept = cache.read()  # another process may have been faster
                if kept is None:
                    _fill(cache, found, stored_size, fit, bad_files, holdout, fits)
                    kept = cache.read()
        if kept is None:
            raise ValueError(f"{cache.array} was removed while it was read")
        decoded = _decoded(*kept)
        _check_fits(tuple(decoded.images.shape), fits)
    except ValueError as error:
        raise ValueError(one_line(error, 1500)) from None
    if decoded.skipped:
        logger.warning("%s", one_line(f"{root}: skipped {_examples(decoded.skipped, len(found))}", 1000))
    return decoded


def _decoded(images: NDArray[np.uint8], facts: dict[str, Any]) -> Decoded:
    return Decoded(
        images=torch.from_numpy(images),
        labels=torch.tensor(facts["labels"], dtype=torch.int64),
        class_names=tuple(facts["class_names"]),
        files=tuple(facts["files"]),
        parts={name: torch.tensor(positions, dtype=torch.int64) for name, positions in facts["parts"].items()},
        mean=tuple(facts["mean"]),
        std=tuple(facts["std"]),
        copies=tuple((first, second) for first, second in facts["copies"]),
        skipped=tuple((name, reason) for name, reason in facts["skipped"]),
        digests=facts["digests"],
    )


def _fill(
    cache: Cache,
    found: list[Found],
    stored_size: int | None,
    fit: Fit,
    bad_files: str,
    holdout: float,
    fits: Callable[[int], str] | None,
) -> None:
    """Decode the folder into the cache."""
    root = cache.root

    def header_of(file: Found) -> Header | str:
        try:
            return file.error or read_header(root / file.name)
        except Exception as error:
            return why_unreadable(error)

    def picture_of(file: Found) -> Picture | str:
        try:
            return read_picture(root / file.name, file.version, shape, fit)
        except Exception as error:
            return why_unreadable(error)

    headers = list(zip(found, in_threads(header_of, found, "reading headers"), strict=True))
    bad = {file.name: header for file, header in headers if isinstance(header, str)}
    good = [file for file, header in headers if not isinstance(header, str)]
    _check_bad(root, found, bad, bad_files)
    shape = stored_shape([header for _, header in headers if isinstance(header, Header)], stored_size)
    _check_fits((len(good), *shape), fits)
    _check_room(cache, (len(good), *shape))
    logger.info("decoding %s of %s into %s", counted(len(good), "picture"), one_line(str(root)), cache.folder)
    kept: list[Kept] = []

    def write(stream: BinaryIO) -> None:
        _write_header(stream, (len(good), *shape))
        start = stream.tell()
        for file, picture in zip(good, in_threads(picture_of, good, "decoding"), strict=True):
            if isinstance(picture, str):
                bad[file.name] = picture
            else:
                stream.write(picture.pixels.data)
                kept.append(Kept(file, *picture[1:]))
        _check_bad(root, found, bad, bad_files)
        stream.seek(0)
        _write_header(stream, (len(kept), *shape))  # numpy leaves room for another number
        assert stream.tell() == start

    cache.write(write, lambda: facts_of(cache.array, kept, shape, holdout) | {"skipped": sorted(bad.items())})


def _write_header(stream: BinaryIO, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _check_bad(root: Path, found: list[Found], bad: dict[str, str], bad_files: str) -> None:
    if bad and bad_files == "refuse":
        raise ValueError(
            f"{root}: {_examples(list(bad.items()), len(found))}; repair or remove them, or leave them out: "
            "--data.bad_files skip"
        )
    left = {file.label for file in found if file.name not in bad and file.part in ("", "train")}
    for file in found:
        if file.label not in left:
            some = _examples(list(bad.items()), len(found))
            raise ValueError(f"{root}: no picture of class {file.label} to train on can be read; {some}")


def _examples(bad: Sequence[tuple[str, str]], total: int) -> str:
    """Count the files that cannot be read, and name the first."""
    shown = ", ".join(f"{one_line(name, 80)} ({reason})" for name, reason in bad[:SHOWN])
    more = f" and {len(bad) - SHOWN:,} more" if len(bad) > SHOWN else ""
    return f"{len(bad):,} of {counted(total, 'picture')} that cannot be read: {shown}{more}"


def _check_fits(shape: tuple[int, ...], fits: Callable[[int], str] | None) -> None:
    if fits and (why := fits(prod(shape))):
        raise ValueError(f"{_described(shape)} do not fit: {why}; {_smaller(shape, lambda size: not fits(size))}")


def _check_room(cache: Cache, shape: tuple[int, ...]) -> None:
    room = cache.room()
    if prod(shape) > room:
        raise ValueError(
            f"{cache.folder} has {room / 1e9:,.1f} GB free, too few for {_described(shape)}: set FMNIST_CACHE to a "
            f"folder on another disk; {_smaller(shape, lambda size: size <= room)}"
        )


def _described(shape: tuple[int, ...]) -> str:
    number, channels, height, width = shape
    return f"{number:,} images of {channels} x {height} x {width} bytes ({prod(shape) / 1e9:,.1f} GB)"


def _smaller(shape: tuple[int, ...], fit: Callable[[int], bool]) -> str:
    """Name the largest size that fits."""
    number, channels, height, width = shape
    sizes = range((min(height, width) - 1) // SIZE_STEP * SIZE_STEP, 0, -SIZE_STEP)
    largest = next((size for size in sizes if fit(number * channels * size * size)), None)
    return f"the largest that fits is --data.stored_size {largest}" if largest else "nor would a smaller size"
