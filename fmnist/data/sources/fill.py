"""Decode a folder of pictures into its cache: what it takes, which files are bad, and the writing."""

import logging
from collections.abc import Callable, Sequence
from math import prod
from typing import BinaryIO

from fmnist.data.sources.cache import Cache, npy_header
from fmnist.data.sources.decode import Fit, Header, Picture, in_threads, read_header, read_picture, stored_shape
from fmnist.data.sources.facts import Kept, facts_of
from fmnist.data.sources.layout import Found
from fmnist.runtime.console import counted, one_line

logger = logging.getLogger("fmnist")
SHOWN = 3  # bad files in a message
SIZE_STEP = 32  # pixels between the sizes that a message proposes


class Decoding:
    """The first reading of a folder: all headers, then all pixels.

    Args:
        cache: of the folder.
        found: its pictures.
        stored_size, fit, bad_files: see `read_folder`.
    """

    def __init__(self, cache: Cache, found: list[Found], *, stored_size: int | None, fit: Fit, bad_files: str) -> None:
        self._cache, self._found = cache, found
        self._stored_size, self._fit, self._bad_files = stored_size, fit, bad_files
        self._headers: dict[Found, Header] = {}  # of those that can be read, as far as is known
        self._bad: dict[str, str] = {}
        self._kept: list[Kept] = []

    def fill_cache(self, holdout: float, fits: Callable[[int], str] | None) -> None:
        """Do it all.

        Args:
            holdout, fits: see `read_folder`.

        Raises:
            ValueError: bad files that are refused, too many images for memory or disk; one line.
        """
        for file, header in zip(self._found, in_threads(self._header, self._found, "reading headers"), strict=True):
            if isinstance(header, str):
                self._bad[file.name] = header
            else:
                self._headers[file] = header
        self._check_bad("skip")  # something to decode is left; the bad files are refused when all are known
        shape = (len(self._headers), *self._shape())
        check_fits(shape, fits)
        _check_room(self._cache, shape)
        what = f"decoding {counted(shape[0], 'picture')} of {self._cache.root} into {self._cache.folder}"
        logger.info("%s", one_line(what, 1000))
        self._cache.write(lambda stream: self._write(stream, fits), lambda: self._facts(holdout))

    def _header(self, file: Found) -> Header:
        if file.error:
            raise ValueError(file.error)
        return read_header(self._cache.root / file.name)

    def _shape(self) -> tuple[int, int, int]:
        return stored_shape(list(self._headers.values()), self._stored_size, self._fit)

    def _facts(self, holdout: float) -> dict[str, object]:
        facts = facts_of(self._cache.array, self._kept, self._shape(), holdout)
        return facts | {"skipped": sorted(self._bad.items())}

    def _write(self, stream: BinaryIO, fits: Callable[[int], str] | None) -> None:
        """Write the .npy file; again where a picture that turned out bad had decided the shape of all."""
        shape = None
        while shape != (shape := self._shape()):
            check_fits((len(self._headers), *shape), fits)
            self._decode(stream, shape)

    def _decode(self, stream: BinaryIO, shape: tuple[int, int, int]) -> None:
        def read(file: Found) -> Picture:
            return read_picture(self._cache.root / file.name, file.version, shape, self._fit)

        files = list(self._headers)
        stream.seek(0)
        stream.truncate()
        self._kept.clear()
        header = npy_header((len(files), *shape))
        stream.write(header)
        for file, picture in zip(files, in_threads(read, files, "decoding"), strict=True):
            if isinstance(picture, str):
                self._bad[file.name] = picture
                del self._headers[file]
            else:
                stream.write(picture.pixels.data)
                self._kept.append(Kept(file, *picture[1:]))
        self._check_bad(self._bad_files)
        stream.seek(0)
        written = npy_header((len(self._kept), *shape))
        assert len(written) == len(header)  # numpy leaves room for another number
        stream.write(written)

    def _check_bad(self, rule: str) -> None:
        root, bad = self._cache.root, examples_of(list(self._bad.items()), len(self._found))
        if self._bad and rule == "refuse":
            raise ValueError(f"{root}: {bad}; repair or remove them, or leave them out: --data.bad_files skip")
        left = {file.label for file in self._headers if file.part in ("", "train")}
        for file in self._found:
            if file.label not in left:
                raise ValueError(f"{root}: no picture of class {file.label} to train on can be read; {bad}")


def examples_of(bad: Sequence[tuple[str, str]], total: int) -> str:
    """Count the files that cannot be read, and name the first."""
    shown = ", ".join(f"{one_line(name, 80)} ({reason})" for name, reason in bad[:SHOWN])
    more = f" and {len(bad) - SHOWN:,} more" if len(bad) > SHOWN else ""
    return f"{len(bad):,} of {counted(total, 'picture')} that cannot be read: {shown}{more}"


def check_fits(shape: tuple[int, ...], fits: Callable[[int], str] | None) -> None:
    """Refuse images [N, C, H, W] that are too many, and name the largest size that would do."""
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
