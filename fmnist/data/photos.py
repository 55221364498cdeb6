"""Find and decode pictures from outside: JPEG, PNG and WebP from files, folders and globs."""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP")  # every other decoder of Pillow stays closed to files from outside
WORK_SIZE = 512  # pixels of the longest edge that is worked on: an object of a tenth of it still has 51 for our 28
MAX_FILE_BYTES = 1 << 28


def find_pictures(paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """List the pictures that the user names, each once.

    Args:
        paths: files (of any suffix), folders (their pictures by suffix, sub-folders too, hidden ones not) and globs
            (`**` for any depth).

    Yields:
        The path of a picture and an empty error, or what the user named and why nothing can be read from it.
    """
    seen = set()  # real paths: a link back to a folder above makes `**` find each file many times
    for name in paths:
        # A file may be called "shirt[1].jpg": what exists is not a pattern.
        matches = [name] if os.path.lexists(name) else sorted(glob.glob(name, recursive=True))
        if not matches:
            yield name, "matches no file" if glob.has_magic(name) else "no such file or folder"
        for match in matches:
            number = 0
            for found, error in _expand(match):
                number += 1
                if (real := os.path.realpath(found)) not in seen:
                    seen.add(real)
                    yield found, error
            if not number:
                yield match, f"a folder without pictures ({', '.join(SUFFIXES)})"


def _expand(path: str) -> Iterator[tuple[str, str]]:
    if not os.path.isdir(path):
        yield path, ""
        return
    failed: list[OSError] = []
    for folder, folders, files in os.walk(path, onerror=failed.append):  # links to folders are not followed: no loops
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield os.path.join(folder, name), ""
    for error in failed:
        yield str(error.filename), error.strerror or str(error)


def open_picture(path: Path) -> Image.Image:
    """Decode a picture, upright as its EXIF says, at most WORK_SIZE on a side.

    Args:
        path: a JPEG, PNG or WebP file, whatever its name says.

    Returns:
        An image of mode RGB or, with transparency, RGBA.

    Raises:
        ValueError: an empty or huge file, or no regular one.
        Exception: what Pillow raises on a damaged file or more than its limit of pixels.
    """
    if not path.is_file():
        raise ValueError("no such file" if not path.exists() else "a folder" if path.is_dir() else "not a regular file")
    size = path.stat().st_size
    if not 0 < size <= MAX_FILE_BYTES:
        raise ValueError(f"{size:,} bytes" if size else "an empty file")
    with warnings.catch_warnings(), path.open("rb") as stream:
        warnings.simplefilter("ignore")  # metadata that is odd but harmless
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # Pillow's limit, without its factor of two
        image: Image.Image = Image.open(stream, formats=FORMATS)
        image.draft(None, (2 * WORK_SIZE, 2 * WORK_SIZE))  # a JPEG of 48 megapixels is decoded at an eighth
        image.load()
        try:
            image = ImageOps.exif_transpose(image)
        except Exception:  # broken metadata does not make a broken picture
            image = image.copy()
        return as_rgb(image)


def as_rgb(image: Image.Image) -> Image.Image:
    """Return a copy of mode RGB or, with transparency, RGBA, at most WORK_SIZE on a side."""
    image = _to_rgb(image)
    image.thumbnail((WORK_SIZE, WORK_SIZE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # 16 bits: Pillow's own conversion clips at 255
        deep = np.asarray(image, dtype=np.float32)
        grey = deep / 257 if deep.max() > 255 else deep
        return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        low, _ = image.getchannel("A").getextrema()
        if isinstance(low, int | float) and low < 255:
            return image
    return image.convert("RGB")
