"""What the model sees of a picture from outside, or why it sees nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from fmnist.apps.cutout import Cutout, Invert, cut_out
from fmnist.data.fashion_mnist import IMAGE_SIZE
from fmnist.data.photos import as_rgb, on_white, open_picture, why_unreadable

CHUNK = 64  # pictures in memory at a time, and as many that are being read


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A picture as read and prepared, or why not.

    Attributes:
        name: its path as found.
        image: RGB, at most WORK_SIZE on a side, upright; None where it could not be read.
        cutout: what the model sees; None where there is an error.
        error: one line; empty where all is well.
    """

    name: str
    image: Image.Image | None = None
    cutout: Cutout | None = None
    error: str = ""


def read_photo(name: str, *, invert: Invert = "auto", crop: bool = True) -> Photo:
    """Read one picture and prepare it for the model.

    Args:
        name: the file.
        invert: see `cut_out`.
        crop: see `cut_out`.

    Returns:
        The photo; where anything about the file is wrong, one with its error.
    """
    try:
        image = open_picture(Path(name))
    except Exception as error:
        return Photo(name=name, error=why_unreadable(error))
    try:
        cutout = cut_out(image, invert=invert, crop=crop)
    except ValueError as error:
        return Photo(name=name, image=on_white(image), error=str(error))
    return Photo(name=name, image=on_white(image), cutout=cutout)


def read_photos(
    found: Iterable[tuple[str, str]], *, invert: Invert = "auto", crop: bool = True
) -> Iterator[list[Photo]]:
    """Read pictures in threads, CHUNK at a time; the next are read while the caller works on these.

    Args:
        found: what `find_pictures` yields.
        invert: see `cut_out`.
        crop: see `cut_out`.

    Yields:
        The photos in the order given; what cannot be found or read has its error.
    """

    def read(item: tuple[str, str]) -> Photo:
        name, error = item
        return Photo(name=name, error=error) if error else read_photo(name, invert=invert, crop=crop)

    items, num_threads = iter(found), torch.get_num_threads()
    try:
        # The model has half of the cores meanwhile: torch's threads wait for each other by spinning, and on two cores
        # that doubled the time of a picture. Pillow and numpy let other threads run.
        torch.set_num_threads(max(1, num_threads // 2))
        with ThreadPoolExecutor(num_threads) as pool:
            waiting = [pool.submit(read, item) for item in islice(items, CHUNK)]
            while waiting:
                ahead = [pool.submit(read, item) for item in islice(items, CHUNK)]
                yield [future.result() for future in waiting]
                waiting = ahead
    finally:
        torch.set_num_threads(num_threads)


def count_kinds(kinds: Counter[str]) -> str:
    """Say how many files there are of each kind, e.g. "3 .txt, 1 .csv"."""
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())


def stack_views(photos: Iterable[Photo]) -> Tensor:
    """Return what the model sees of those that it sees: uint8 [N, 28, 28] on the CPU."""
    views = [torch.from_numpy(photo.cutout.view) for photo in photos if photo.cutout]
    return torch.stack(views) if views else torch.zeros(0, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)


def read_view(name: str) -> Tensor:
    """Read one picture as the model sees it.

    Returns:
        uint8 [28, 28] on the CPU.

    Raises:
        ValueError: one line with the file's name and what is wrong with it.
    """
    photo = read_photo(name)
    if photo.cutout is None:
        raise ValueError(f"{name}: {photo.error}")
    return torch.from_numpy(photo.cutout.view)


def view_of(image: Image.Image) -> Tensor:
    """Return a decoded picture as the model sees it: uint8 [28, 28] on the CPU.

    Raises:
        ValueError: there is no object in it.
    """
    return torch.from_numpy(cut_out(as_rgb(image)).view)
