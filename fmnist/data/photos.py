"""Find and decode pictures from outside, from files, folders and globs."""

import glob
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError

from fmnist.runtime.console import one_line
from fmnist.runtime.ownership import MARKS, bears

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # every other decoder stays closed to files from outside
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# Pictures too, though of formats that are not read: errors, where a text file in the same folder is passed over.
OTHER_SUFFIXES = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw")
WORK_SIZE = 512  # pixels of the longest edge that is worked on: an object of a tenth of it still has 51 for our 28
DARKEST = 4096  # of what the largest value of 16 bits has to reach
MAX_FILE_BYTES = 1 << 28
MAX_JPEG_PIXELS = 300_000_000  # before it is decoded smaller: a phone's 200 megapixels, and no bomb
MISSING = "no such file or folder", "matches no file"  # what is said of a path that the user names, and of a pattern
TABLES = ("predictions.csv", "search.csv", "comparison.txt")  # beside which our commands draw a .png
DRAWN = {  # what our commands and runs draw, by name; each file bears a mark
    *("predictions.png", "search.png", "comparison.png", "samples.png", "augmented.png", "train_batch.png"),
    *("learning_curves.png", "confusion_matrix.png", "reliability.png"),
}
# Metadata that is odd but harmless. Not for each picture: that is not safe among threads.
warnings.filterwarnings("ignore", module=r"PIL\.")
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # 64 MB: some editors keep megabytes beside a picture


def find_pictures(paths: Iterable[str], left_out: Counter[str] | None = None) -> Iterator[tuple[str, str]]:
    """List the pictures that the user names, each once.

    Args:
        paths: files (of any suffix), folders (their pictures by suffix, sub-folders too, hidden ones not) and globs
            (`**` for any depth).
        left_out: counts what folders hold beside pictures, by suffix, and what this project made ("made by fmnist"):
            sheets and figures, and whole run directories.

    Yields:
        The path of a picture and an empty error, or what the user named and why nothing can be read from it.
    """
    left_out = Counter() if left_out is None else left_out
    seen = set()  # real paths: a link back to a folder above makes `**` find each file many times
    for name in paths:
        # A file may be called "shirt[1].jpg": what exists is not a pattern.
        named = os.path.lexists(name)
        matches = [name] if named else sorted(glob.glob(name, recursive=True))
        if not matches:
            yield name, MISSING[glob.has_magic(name)]
        for match in matches:
            number = 0
            for found, error in [(match, "")] if named and not os.path.isdir(match) else _expand(match, left_out):
                number += 1
                if (real := os.path.realpath(found)) not in seen:
                    seen.add(real)
                    yield found, error
            if not number and os.path.isdir(match):
                yield match, f"a folder without pictures ({', '.join(SUFFIXES)})"


def _expand(path: str, left_out: Counter[str]) -> Iterator[tuple[str, str]]:
    """List what a folder holds, or one file that a glob found."""
    if not os.path.isdir(path):
        if is_ours(path):
            left_out["made by fmnist"] += 1
        else:
            yield path, ""
        return
    failed: list[OSError] = []
    for folder, folders, files in os.walk(path, onerror=failed.append):  # links to folders are not followed: no loops
        if is_run_directory({*files, *folders}):
            left_out["made by fmnist"] += len(files)
            folders[:] = []
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in files if not name.startswith(".")):
            if is_ours(os.path.join(folder, name)):
                left_out["made by fmnist"] += 1
            elif name.lower().endswith((*SUFFIXES, *OTHER_SUFFIXES)):
                yield os.path.join(folder, name), ""
            else:
                left_out[os.path.splitext(name)[1].lower() or "no suffix"] += 1
    for error in failed:
        yield str(error.filename), error.strerror or str(error)


def is_run_directory(names: Container[str]) -> bool:
    """Tell a run directory by the names in it; its figures are no pictures from outside."""
    return "config.yaml" in names and ("metrics.jsonl" in names or "checkpoints" in names)


def is_ours(path: str) -> bool:
    """Tell a picture that a command of ours drew, by its name and mark, or the table beside one."""
    name = os.path.basename(path)
    if name in TABLES:
        path = f"{os.path.splitext(path)[0]}.png"
    return (name in DRAWN or name in TABLES) and bears(Path(path), MARKS[".png"])


def check_size(size: int) -> None:
    """Refuse an empty file, and one of more bytes than a picture has."""
    if not 0 < size <= MAX_FILE_BYTES:
        raise ValueError(f"{size:,} bytes" if size else "an empty file")


def open_header(stream: BinaryIO) -> Image.Image:
    """Read what stands before a picture's pixels: its format, size and mode, by one of FORMATS' decoders.

    Raises:
        Exception: what Pillow raises on something else.
    """
    head = stream.read(3)
    stream.seek(0)
    if head != b"\xff\xd8\xff":
        return Image.open(stream, formats=FORMATS)
    try:
        # Not Image.open, which refuses by size what `decode` reads at an eighth of its size.
        return JpegImagePlugin.JpegImageFile(stream)
    except SyntaxError as error:
        raise UnidentifiedImageError from error


def decode(image: Image.Image, shorter: int | None) -> Image.Image:
    """Decode the pixels behind a header, and turn them upright as EXIF says.

    Args:
        image: what `open_header` returned, its file still open.
        shorter: pixels of the shorter side that are enough: a JPEG is decoded at the smallest of 1, 1/2, 1/4 and 1/8
            of its size that has them. None: at its full size.

    Raises:
        Exception: what Pillow raises on a damaged file or more than its limit of pixels.
    """
    if shorter and isinstance(image, JpegImagePlugin.JpegImageFile) and math.prod(image.size) <= MAX_JPEG_PIXELS:
        image.draft(None, (shorter, shorter))
    if math.prod(image.size) > (Image.MAX_IMAGE_PIXELS or MAX_JPEG_PIXELS):  # Pillow itself doubles its limit
        raise Image.DecompressionBombError
    image.load()
    with suppress(Exception):  # broken metadata does not make a broken picture
        ImageOps.exif_transpose(image, in_place=True)
    return image


def decode_rgb(stream: BinaryIO) -> Image.Image:
    """Decode an open picture as `as_rgb` has it, a JPEG at no less than twice that size."""
    return as_rgb(decode(open_header(stream), 2 * WORK_SIZE))


def open_picture(path: Path, read: Callable[[BinaryIO], Image.Image] = decode_rgb) -> Image.Image:
    """Decode a picture, upright as its EXIF says, at most WORK_SIZE on a side; of an animation, its first.

    Args:
        path: a file of one of FORMATS, whatever its name says.
        read: decodes the open file.

    Returns:
        An image of mode RGB or, with transparency, RGBA; or what `read` returns.

    Raises:
        ValueError: an empty or huge file, or no regular one.
        Exception: what Pillow raises on a damaged file or more than its limit of pixels.
    """
    if not path.is_file():
        raise ValueError("no such file" if not path.exists() else "a folder" if path.is_dir() else "not a regular file")
    check_size(path.stat().st_size)
    with path.open("rb") as stream:
        return read(stream)


def why_unreadable(error: Exception) -> str:
    """Say in a few words why a picture could not be opened or decoded."""
    if isinstance(error, UnidentifiedImageError):
        return f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} picture"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    # Decoders raise what they like on a damaged file: struct.error, SyntaxError, KeyError.
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return one_line(text) or type(error).__name__


def as_rgb(image: Image.Image) -> Image.Image:
    """Return a copy of mode RGB or, with transparency, RGBA, at most WORK_SIZE on a side."""
    image = to_rgb(image)
    image.thumbnail((WORK_SIZE, WORK_SIZE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a picture in 8 bits, RGB or, with transparency, RGBA.

    Raises:
        ValueError: values that are not finite, a little above 1, or of 10 or 12 bits in 16: next to nothing would be
            left of them.
    """
    if image.mode.startswith(("I", "F")):  # 16 bits: Pillow's own conversion clips at 255
        deep = np.asarray(image, dtype=np.float32)
        if not np.isfinite(deep).all():
            raise ValueError("holds values that are not finite")
        top = float(deep.max(initial=0))
        # the range that the largest value fits into: 0 to 1 of floats, 8 bits, 16 bits, or its own
        white = 1.0 if image.mode.startswith("F") and top <= 1 else 255.0 if top <= 255 else max(65535.0, top)
        if image.mode.startswith("F") and 1 < top < 16:
            raise ValueError(f"its values end at {top:g}, neither at 1 nor at 255: rescale them")
        if 255 < top < DARKEST:
            raise ValueError(f"its values end at {top:g} of 65,535, which 8 bits would show as black: stretch them")
        grey = deep * np.float32(255 / white)
        return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        low, _ = image.getchannel("A").getextrema()
        if isinstance(low, int | float) and low < 255:
            return image
    return image.convert("RGB")


def on_white(image: Image.Image) -> Image.Image:
    """Lay a picture of mode RGBA on white; return one of mode RGB as it is."""
    if image.mode == "RGB":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
