"""What the model sees of a picture from outside, or why it sees nothing."""

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image
from torch import Tensor

from fmnist.apps.cutout import Cutout, Invert, cut_out
from fmnist.data.info import DataInfo
from fmnist.data.photos import as_rgb, decode_rgb, on_white, open_picture, why_unreadable
from fmnist.data.sources.decode import into_shape, open_for
from fmnist.runtime.console import one_line
from fmnist.runtime.hardware import keep_freed_memory

NAMED = 5  # broken pictures that are named on the terminal; a CSV file holds all
CHUNK = 64  # pictures in memory at a time, and as many that are being read


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A picture as read and prepared, or why not.

    Attributes:
        name: its path as found.
        image: RGB, at most WORK_SIZE on a side, upright; None where it could not be read.
        cutout: what the model sees of it; None where there is an error.
        error: one line; empty where all is well.
    """

    name: str
    image: Image.Image | None = None
    cutout: Cutout | None = None
    error: str = ""


def view_of(image: Image.Image, info: DataInfo, *, invert: Invert = "auto", crop: bool = True) -> Cutout:
    """Return what a model sees of a picture: cut out for Fashion-MNIST, else brought into its images' shape.

    Args:
        image: upright; for Fashion-MNIST of mode RGB or RGBA, see `as_rgb`, else of any mode.
        info: the model's data set.
        invert: see `cut_out`.
        crop: see `cut_out`.

    Raises:
        ValueError: there is no object to cut out.
    """
    if info.is_fashion_mnist:
        return cut_out(image, invert=invert, crop=crop)
    pixels, box = into_shape(image, info.shape, "pad" if info.fit == "pad" else "crop")
    return Cutout(view=pixels if len(pixels) > 1 else pixels[0], box=box, inverted=False)


def decode_for(stream: BinaryIO, info: DataInfo) -> Image.Image:
    """Decode a picture upright, no larger than a model of this data set needs it: what `view_of` takes.

    Raises:
        Exception: what Pillow raises on a damaged file or more than its limit of pixels.
    """
    if info.is_fashion_mnist:
        return decode_rgb(stream)
    return open_for(stream, info.shape, "pad" if info.fit == "pad" else "crop")


def check_cutting(info: DataInfo, *, invert: Invert, crop: bool) -> None:
    """Refuse options of the cut-out where nothing is cut out.

    Raises:
        ValueError: one line.
    """
    if not info.is_fashion_mnist and (invert != "auto" or not crop):
        option = f"--invert {invert}" if invert != "auto" else "--no-crop"
        raise ValueError(f"{option} has no effect: pictures for {info.title} are taken as they are, not cut out")


def read_photo(name: str, info: DataInfo, *, invert: Invert = "auto", crop: bool = True) -> Photo:
    """Read one picture and prepare it for the model.

    Args:
        name: the file.
        info: the model's data set.
        invert: see `cut_out`.
        crop: see `cut_out`.

    Returns:
        The photo; where anything about the file is wrong, one with its error.
    """
    try:
        image = open_picture(Path(name), lambda stream: decode_for(stream, info))
        shown = on_white(image if info.is_fashion_mnist else as_rgb(image))
    except Exception as error:
        return Photo(name=name, error=why_unreadable(error))
    try:
        cutout = view_of(image, info, invert=invert, crop=crop)
    except ValueError as error:
        return Photo(name=name, image=shown, error=str(error))
    if cutout.box is not None and shown.size != image.size:  # the picture that is shown is a smaller one
        left, top, right, bottom = (round(edge * shown.width / image.width) for edge in cutout.box)
        cutout = replace(cutout, box=(left, top, right, bottom))
    return Photo(name=name, image=shown, cutout=cutout)


def read_photos(
    found: Iterable[tuple[str, str]], info: DataInfo, *, invert: Invert = "auto", crop: bool = True
) -> Iterator[list[Photo]]:
    """Read pictures in threads, CHUNK at a time; the next are read while the caller works on these.

    Args:
        found: what `find_pictures` yields.
        info: the model's data set.
        invert: see `cut_out`.
        crop: see `cut_out`.

    Yields:
        The photos in the order given; what cannot be found or read has its error.
    """

    def read(item: tuple[str, str]) -> Photo:
        name, error = item
        return Photo(name=name, error=error) if error else read_photo(name, info, invert=invert, crop=crop)

    items, num_threads = iter(found), torch.get_num_threads()
    try:
        # The model has half of the cores meanwhile: torch's threads wait for each other by spinning, and on two cores
        # that doubled the time of a picture. Pillow and numpy let other threads run.
        torch.set_num_threads(max(1, num_threads // 2))
        keep_freed_memory()  # the kernel clears a new array in more time than it takes to use it
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
    return ", ".join(f"{count:,} {one_line(kind, 40)}" for kind, count in kinds.most_common())


def stack_views(photos: Iterable[Photo], info: DataInfo) -> Tensor:
    """Return what the model sees of those that it sees: uint8 [N, H, W] or [N, 3, H, W] on the CPU."""
    views = [torch.from_numpy(photo.cutout.view) for photo in photos if photo.cutout]
    return torch.stack(views) if views else torch.zeros(0, *info.image_shape, dtype=torch.uint8)


def read_view(name: str, info: DataInfo) -> Tensor:
    """Read one picture as the model sees it.

    Returns:
        uint8 [H, W] or [3, H, W] on the CPU.

    Raises:
        ValueError: one line with the file's name and what is wrong with it.
    """
    photo = read_photo(name, info)
    if photo.cutout is None:
        raise ValueError(f"{name}: {photo.error}")
    return torch.from_numpy(photo.cutout.view)
