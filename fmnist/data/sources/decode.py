"""Picture files as arrays of one shape: headers first, then the pixels, in threads."""

import hashlib
import io
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from fmnist.data.photos import check_size, decode, on_white, open_header, to_rgb, why_unreadable
from fmnist.runtime.files import open_regular
from fmnist.runtime.hardware import available_cores

DEFAULT_SIZE = 256  # of pictures of several sizes
LARGEST_KEPT = 512  # pixels of either side up to which pictures of one size are kept as they are
AHEAD = 4  # pictures a thread that wait to be written: what is in memory at a time
BAR_AFTER_S = 5.0
GREY = ("1", "L", "La", "LA", "I", "F")  # and I;16, ...
ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and its values that swap width and height

Shape = tuple[int, int, int]  # channels, height, width
Box = tuple[int, int, int, int]  # left, top, right, bottom
Fit = Literal["crop", "pad"]
Item = TypeVar("Item")
Result = TypeVar("Result")


class Header(NamedTuple):
    """What a file says of its picture: upright size in pixels, and whether it has no colours."""

    width: int
    height: int
    grey: bool


class Picture(NamedTuple):
    """A decoded picture.

    Attributes:
        pixels: uint8 [C, H, W].
        content: sha256 of the file.
        sums: sum, and sum of squares, of each channel.
    """

    pixels: NDArray[np.uint8]
    content: str
    sums: tuple[tuple[int, int], ...]


def read_header(path: Path) -> Header:
    """Read a picture's size and kind, and none of its pixels.

    Raises:
        Exception: what Pillow and the system raise on a file that is none.
    """
    with open_regular(path) as stream:
        check_size(os.fstat(stream.fileno()).st_size)
        image = open_header(stream)
        width, height = image.size
        turned = image.format != "TIFF" and _orientation(image) in SIDEWAYS  # a TIFF's size is upright
        return Header(*((height, width) if turned else (width, height)), _is_grey(image))


def _orientation(image: Image.Image) -> int | None:
    try:
        # Not a PNG's own method: where the header has no EXIF, that decodes the picture to look behind it.
        return Image.Image.getexif(image).get(ORIENTATION)
    except Exception:  # broken metadata does not make a broken picture
        return None


def _is_grey(image: Image.Image) -> bool:
    if image.mode == "P":
        palette = np.frombuffer(bytes(image.getpalette("RGB") or (0, 0, 0)), dtype=np.uint8).reshape(-1, 3)
        return bool((palette == palette[:, :1]).all())
    return image.mode in GREY or image.mode.startswith("I;")


def stored_shape(headers: Sequence[Header], stored_size: int | None, fit: Fit) -> Shape:
    """Return the shape in which pictures are kept.

    Args:
        headers: of all of them.
        stored_size: pixels per side. None: their own size, where they have one and it is at most LARGEST_KEPT; else
            DEFAULT_SIZE.
        fit: pad: their own size is made square by its longer side.
    """
    channels = 1 if all(header.grey for header in headers) else 3
    width, height, _ = headers[0]
    same = all(header[:2] == (width, height) for header in headers)
    longer = max(width, height)
    if stored_size is None and same and longer <= LARGEST_KEPT:
        return (channels, longer, longer) if fit == "pad" else (channels, height, width)
    side = stored_size or DEFAULT_SIZE
    return channels, side, side


def read_picture(path: Path, version: tuple[int, int, int], shape: Shape, fit: Fit) -> Picture:
    """Read a picture file and bring it into a shape.

    Args:
        path: the file.
        version: what `Found` says of it.
        shape: see `stored_shape`.
        fit: see `in_shape`.

    Raises:
        Exception: what Pillow and the system raise; ValueError where the file is another one by now.
    """
    with open_regular(path) as stream:
        status = os.fstat(stream.fileno())
        check_size(status.st_size)
        if (status.st_size, status.st_mtime_ns) != version[:2]:
            raise ValueError("changed while the folder was read")
        data = stream.read()
    pixels = in_shape(io.BytesIO(data), shape, fit)
    flat = pixels.reshape(len(pixels), -1)
    totals = flat.sum(1, dtype=np.int64).tolist()
    squares = np.square(flat, dtype=np.uint32).sum(1, dtype=np.int64).tolist()
    sums = tuple(zip(totals, squares, strict=True))
    return Picture(pixels, hashlib.sha256(data).hexdigest(), sums)


def in_shape(stream: BinaryIO, shape: Shape, fit: Fit) -> NDArray[np.uint8]:
    """Decode a picture of a data set and bring it into a shape, uint8 [C, H, W]; see `open_for` and `into_shape`.

    Raises:
        Exception: see `decode`; ValueError where the picture has not the size that its header says.
    """
    image, (_, height, width) = open_for(stream, shape, fit), shape
    if height != width and image.size != (width, height):
        raise ValueError(f"{image.width} x {image.height} pixels, unlike its header")
    return into_shape(image, shape, fit)[0]


def open_for(stream: BinaryIO, shape: Shape, fit: Fit) -> Image.Image:
    """Decode a picture upright, a JPEG at no less than twice the size that a shape asks for.

    Raises:
        Exception: see `decode`.
    """
    _, height, width = shape
    image = open_header(stream)
    if height == width != min(image.size):
        shorter = height if fit == "crop" else -(-height * min(image.size) // max(image.size))
        return decode(image, 2 * max(1, shorter))
    return decode(image, None)


def into_shape(image: Image.Image, shape: Shape, fit: Fit) -> tuple[NDArray[np.uint8], Box | None]:
    """Bring a picture into a shape, on white where it is transparent.

    One of that size is not resampled. Otherwise Lanczos with its kernel widened to the scale, so that every pixel has
    its share.

    Args:
        image: of any mode, upright.
        shape: channels, height, width.
        fit: crop: the middle is kept, as much as has the shape's proportions. pad: all is, and the picture stands in
            the middle of the mean colour of its border.

    Returns:
        uint8 [C, H, W], and the box that was kept, in pixels of the picture; None for all of it.
    """
    channels, height, width = shape
    if image.mode != "L" or image.has_transparency_data or channels == 3:
        image = on_white(to_rgb(image))
        image = image.convert("L") if channels == 1 else image
    box = None
    if image.size != (width, height) and fit == "crop":
        image, box = _cropped(image, width, height)
    elif image.size != (width, height):
        image = _padded(image, width, height)
    pixels = np.array(image)
    return np.ascontiguousarray(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)), box


def _cropped(image: Image.Image, width: int, height: int) -> tuple[Image.Image, Box | None]:
    wide = max(1, min(image.width, round(image.height * width / height)))
    tall = max(1, min(image.height, round(image.width * height / width)))
    left, top = (image.width - wide) // 2, (image.height - tall) // 2
    box = (left, top, left + wide, top + tall)
    kept = None if (wide, tall) == image.size else box
    if (wide, tall) == (width, height):
        return image.crop(box), kept
    # Only the box is resampled: a strip of 1 x 5000 pixels would have 256 x 1,280,000.
    return image.resize((width, height), Image.Resampling.LANCZOS, box, reducing_gap=3.0), kept


def _padded(image: Image.Image, width: int, height: int) -> Image.Image:
    scale = min(width / image.width, height / image.height)
    wide, tall = (max(1, round(side * scale)) for side in image.size)
    if (wide, tall) != image.size:
        image = image.resize((wide, tall), Image.Resampling.LANCZOS, reducing_gap=3.0)
    pixels = np.asarray(image).reshape(tall, wide, -1)
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    colour = tuple(np.rint(border.mean(0)).astype(int).tolist())
    canvas = Image.new(image.mode, (width, height), colour if len(colour) > 1 else colour[0])
    canvas.paste(image, ((width - wide + 1) // 2, (height - tall + 1) // 2))  # an odd row is above, as in `fit`
    return canvas


def in_threads(work: Callable[[Item], Result], items: Sequence[Item], what: str) -> Iterator[Result | str]:
    """Map in threads (Pillow and hashlib let others run), in order, with few results waiting, and a bar if it is long.

    Args:
        work: of one item; what it raises becomes a text, by `why_unreadable`.
        items: what it is done to.
        what: names it in the bar.
    """

    def try_one(item: Item) -> Result | str:
        try:
            return work(item)
        except Exception as error:
            return why_unreadable(error)

    threads = available_cores()
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[Result | str]] = deque()
    try:
        for item in tqdm(items, desc=what, unit="image", disable=None, leave=False, delay=BAR_AFTER_S):
            waiting.append(pool.submit(try_one, item))
            if len(waiting) > AHEAD * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
