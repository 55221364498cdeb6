"""Decoded image folders on the disk: an array a folder and its options, and a JSON file that says it is whole."""

import hashlib
import io
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from fmnist.runtime.console import one_line
from fmnist.runtime.environment import ENVIRONMENT
from fmnist.runtime.files import open_regular, read_json, reason, write_atomic

logger = logging.getLogger("fmnist")
FORMAT = 2  # of the files; another one is another cache
MAX_FACTS_BYTES = 1 << 30  # about 100 for each picture
NAME_DIGITS = 32  # hexadecimal, of a sha256
UNUSED_S = 7 * 86_400.0  # a cache of an earlier content of the folder goes after so long without use
SAY_AFTER_S = 5.0


class Cache:
    """What is kept of one folder, read with given options, in its present state.

    Args:
        root: the folder.
        options: what changes the result.
        state: of the files in it, as their names, sizes and times say.

    Raises:
        ValueError: the cache folder lies in the root, where it would be taken for pictures.
    """

    def __init__(self, root: Path, options: Mapping[str, object], state: object) -> None:
        self.root, self.folder = root, cache_folder()
        place = os.path.realpath(root)
        if Path(os.path.realpath(self.folder)).is_relative_to(place):
            raise ValueError(f"the cache folder {self.folder} lies in {root}: set FMNIST_CACHE to a folder elsewhere")
        self._fault = ""
        self._origin = _digest((FORMAT, place, sorted(options.items())))
        name = f"{self._origin}-{_digest(state)}"
        self.array, self.facts = (self.folder / f"{name}.{suffix}" for suffix in ("npy", "json"))

    def read(self) -> tuple[NDArray[np.uint8], dict[str, Any]] | None:
        """Return the images, uint8 [N, C, H, W], mapped, and the facts; None where they are not there whole."""
        if not os.path.exists(self.facts):  # it is written last
            return None
        try:
            kept = read_json(self.facts, MAX_FACTS_BYTES)
            if kept.get("sha256") != _sha256(kept.get("facts")):
                raise ValueError(f"{self.facts} is damaged")
            facts: dict[str, Any] = kept["facts"]
            shape = tuple(facts["shape"])
            header = npy_header(shape)
            with open_regular(self.array) as file:
                if file.read(len(header)) != header or file.seek(0, os.SEEK_END) != len(header) + prod(shape):
                    raise ValueError(f"{self.array} is damaged")
                # Private pages: what writes into a tensor of it does not reach the file.
                images = np.memmap(file, np.uint8, "c", len(header), shape)
        except (OSError, ValueError) as error:
            self._fault = str(error)
            return None
        with suppress(OSError):
            os.utime(self.facts)  # it is in use: see _remove_old
        return images, facts

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep out other processes that read this folder, and wait for one that does.

        Raises:
            ValueError: the cache folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / f"{self._origin}.lock")
            try:
                lock.acquire(timeout=SAY_AFTER_S)
            except Timeout:
                logger.info("waiting for another process that reads %s", self.root)
                lock.acquire()
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            yield
        finally:
            lock.release()

    def room(self) -> int:
        """Return the free bytes of its disk."""
        return shutil.disk_usage(self.folder).free

    def write(self, fill: Callable[[BinaryIO], object], facts: Callable[[], dict[str, Any]]) -> None:
        """Write the array, then the facts; until these have their name nothing is there.

        Args:
            fill: writes the whole .npy file.
            facts: called when that is done.

        Raises:
            ValueError: the cache folder cannot be written, or is full.
        """
        if self._fault:
            logger.warning("%s", one_line(f"{self._fault}; {self.root} is decoded again", 1000))
        try:
            self.facts.unlink(missing_ok=True)
            self._remove_old()
            write_atomic(self.array, fill)
            found = facts()
            write_atomic(self.facts, json.dumps({"facts": found, "sha256": _sha256(found)}))
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> ValueError:
        place, why = one_line(str(self.folder)), reason(error)
        return ValueError(
            f"{place}, where decoded images are kept, cannot be written: {why}; set FMNIST_CACHE to another folder"
        )

    def _remove_old(self) -> None:
        """Remove what killed processes left of this folder, and what is kept of contents that it had before.

        Only under the lock. What is in use elsewhere stays: another machine may have mapped it.
        """
        ours = re.compile(rf"\.?{self._origin}-[0-9a-f]{{{NAME_DIGITS}}}\.(npy|json)(\.[0-9a-f]{{8}}\.part)?")
        for entry in list(os.scandir(self.folder)):
            if not ours.fullmatch(entry.name):
                continue
            path = Path(entry.path)
            with suppress(OSError):
                used = path.with_suffix(".json") if path.suffix == ".npy" else path
                if path.suffix == ".part" or time.time() - (used if used.exists() else path).stat().st_mtime > UNUSED_S:
                    path.unlink()


def cache_folder() -> Path:
    """Return the folder of all caches: FMNIST_CACHE, else fmnist in the user's cache folder; it may not be there."""
    if named := ENVIRONMENT.get("FMNIST_CACHE"):
        return Path(os.path.abspath(os.path.expanduser(named)))
    above = ENVIRONMENT.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(above):  # the standard has no relative ones
        above = os.path.expanduser("~/.cache")
    if not os.path.isabs(above):
        raise ValueError("there is no home folder to keep decoded images in: set FMNIST_CACHE to a folder")
    return Path(above) / "fmnist"


def npy_header(shape: tuple[int, ...]) -> bytes:
    """Return what stands before the values of a .npy file of uint8; as long for any number of images."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _digest(content: object) -> str:
    return hashlib.sha256(ascii(content).encode()).hexdigest()[:NAME_DIGITS]


def _sha256(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
