"""Files written whole or not at all, whatever stops the process or the power; JSON and CSV; hashes."""

import csv
import glob
import hashlib
import io
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from fmnist.runtime.console import one_line

MAX_JSON_BYTES = 1 << 26
CHUNK_BYTES = 1 << 20  # read at once from a file or server whose length is not known
LEFTOVER_AGE_S = 3600.0  # a temporary file this old is no longer being written
# A spreadsheet runs a cell that begins with one of these.
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def sync_path(path: Path) -> None:
    """Force a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes | str | Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all: its content is on the disk before its name is, and then its name.

    No link is followed: one of that name is replaced. The mode follows the umask.

    Args:
        path: its folder is made if absent.
        content: bytes, text (UTF-8), or a function that fills the open file.

    Raises:
        OSError: the disk is full or not writable; the file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    # A random name of its own: two processes, in two containers too, may write the same file.
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
        sync_path(part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)  # half a file would only take what room is left
        raise
    sync_path(path.parent)


def _remove_leftovers(path: Path) -> None:
    """Remove what a write of this file left that was killed long ago."""
    for name in glob.iglob(f".{glob.escape(path.name)}.*part", root_dir=path.parent, include_hidden=True):
        leftover = path.parent / name
        try:
            if time.time() - leftover.lstat().st_mtime > LEFTOVER_AGE_S:
                leftover.unlink()
        except OSError:  # another process was faster, or it is not ours
            continue


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ValueError: one line: no regular file, larger than MAX_JSON_BYTES, no JSON, or no object.
    """
    try:
        if not path.is_file():
            raise ValueError("no such file" if not path.exists() else "not a regular file")
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise ValueError(f"{size:,} bytes, expected at most {MAX_JSON_BYTES:,}")
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {one_line(error, 120)}") from None
    return content


def read_at_most(stream: io.BufferedIOBase, limit: int) -> bytes:
    """Read `limit` bytes, plus one if the stream is longer, so that the caller can tell.

    Reads in pieces, because a single read of `limit` bytes allocates them all before any arrives. Reading to the end
    also makes gzip check its CRC.
    """
    pieces, left = [], limit + 1
    while left > 0 and (piece := stream.read(min(left, CHUNK_BYTES))):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def csv_bytes(header: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    """Return a CSV file, UTF-8: no cell begins a formula, and no name breaks a line.

    Args:
        header: names of the columns.
        rows: cells; control characters and bytes that are no UTF-8, as file names may hold them, are escaped.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow([_safe(cell) if isinstance(cell, str) else cell for cell in row])
    return text.getvalue().encode(errors="backslashreplace")


def _safe(cell: str) -> str:
    if cell.startswith(FORMULA) and not _is_number(cell):
        cell = f"'{cell}"
    return "".join(c if c >= " " and c != "\x7f" else repr(c)[1:-1] for c in cell)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
