"""Files written whole or not at all, whatever stops the process or the power; JSON and CSV; hashes."""

import csv
import errno
import glob
import hashlib
import io
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from fmnist.runtime.console import one_line

try:
    import fcntl
except ImportError:  # Windows has no flock: leftovers there go by their age
    fcntl = None  # type: ignore[assignment]

NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # what FUSE and CIFS answer where they sync no directory
MAX_JSON_BYTES = MAX_CSV_BYTES = 1 << 26
CHUNK_BYTES = 1 << 20  # read at once from a file or server whose length is not known
LEFTOVER_AGE_S = 3600.0  # without flock, a temporary file this old is taken for one that nobody writes any more
# A spreadsheet runs a cell that begins with one of these.
FORMULA = ("=", "+", "-", "@", "\t", "\r")


class Unreadable(ValueError):
    """A file that is there, perhaps whole, and that this user may not read."""


def sync_path(path: Path) -> None:
    """Force a file or directory to the disk; some file systems take no directory, and write it by themselves."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC or not path.is_dir():
            raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes | str | Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all: its content is on the disk before its name is, and then its name.

    No link is followed: one of that name is replaced. The mode follows the umask. What an earlier write of this file
    left that was killed is removed.

    Args:
        path: its folder is made if absent.
        content: bytes, text (UTF-8), or a function that fills the open file.

    Raises:
        OSError: the disk is full or not writable; the file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    part = _part(path)
    try:
        with part.open("xb") as file:
            _lock(file.fileno())
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()  # a full disk is found before the old file goes; and what is held back would not be synced
            sync_path(part)
            if fcntl is not None:
                part.replace(path)  # while it is locked: nobody takes it for a leftover
        if fcntl is None:
            part.replace(path)  # Windows renames no open file
    except BaseException as error:
        part.unlink(missing_ok=True)  # half a file would only take what room is left
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from None  # a full disk names no file
        raise
    sync_path(path.parent)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Make a folder beside `path` to build its content in; it goes at the end, or with the next one after a kill."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    part = _part(path)
    part.mkdir()
    descriptor = os.open(part, os.O_RDONLY)
    try:
        _lock(descriptor)
        yield part
    finally:
        os.close(descriptor)
        shutil.rmtree(part, ignore_errors=True)


def _part(path: Path) -> Path:
    """A random name: two processes, in two containers too, may write the same file."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def _lock(descriptor: int) -> None:
    """Hold a temporary file for as long as this process writes it; the kernel lets go of it when that is killed."""
    if fcntl is not None:
        with suppress(OSError):  # a file system without flock
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_leftovers(path: Path) -> None:
    """Remove what writes of this file left that were killed; what is being written stays."""
    pattern = f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.part"
    for name in glob.iglob(pattern, root_dir=path.parent, include_hidden=True):
        leftover = path.parent / name
        try:
            descriptor = os.open(leftover, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        except OSError:  # another process was faster, or it is a link and so not ours
            continue
        try:
            if _abandoned(descriptor):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        except OSError:
            continue
        finally:
            os.close(descriptor)


def _abandoned(descriptor: int) -> bool:
    age = abs(time.time() - os.fstat(descriptor).st_mtime)  # clocks may be set back
    if fcntl is None:
        return age > LEFTOVER_AGE_S
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return age > LEFTOVER_AGE_S
    return age > 1.0  # one that was made this instant may not be locked yet


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file to read; a pipe is no wait without end, and a folder or device no content.

    Raises:
        OSError: there is none, it may not be read, or it is something else.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(descriptor, "rb")


def reason(error: OSError) -> str:
    """Return what the system says, to stand inside a sentence: permission denied."""
    said = error.strerror or type(error).__name__
    return said[0].lower() + said[1:]


def cannot_read(path: Path, error: OSError) -> ValueError:
    """Return the error for a file that the system does not give: Unreadable where it may well be whole."""
    kind = Unreadable if isinstance(error, PermissionError) else ValueError
    return kind(f"{path} cannot be read: {reason(error)}")


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON file that holds an object, of at most `limit` bytes.

    Raises:
        ValueError: one line: no regular file, larger than that, no JSON, or no object; Unreadable where
            this user may not read it.
    """
    try:
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > limit:
                raise ValueError(f"{size:,} bytes, expected at most {limit:,}")
            content = json.loads(file.read())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except OSError as error:
        raise cannot_read(path, error) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {one_line(error, 120)}") from None
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write what `read_json` reads, whole or not at all.

    Raises:
        OSError: see `write_atomic`.
    """
    write_atomic(path, json.dumps(content, indent=2) + "\n")


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
        header: names of the columns, written like cells.
        rows: cells; control characters and bytes that are no UTF-8, as file names may hold them, are escaped.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in chain([header], rows):
        writer.writerow([csv_cell(cell) if isinstance(cell, str) else cell for cell in row])
    return text.getvalue().encode(errors="backslashreplace")


def csv_cell(cell: str) -> str:
    """Return a text as `csv_bytes` writes it."""
    if cell.startswith(FORMULA) and not _is_number(cell):
        cell = f"'{cell}"
    return "".join(c if c >= " " and c != "\x7f" else repr(c)[1:-1] for c in cell)


def read_csv(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Read a CSV file with a header, as we or a spreadsheet wrote it: commas or semicolons, a byte order mark.

    Args:
        path: the file, UTF-8.
        columns: that it has to have, in any order; others are passed on too.

    Yields:
        Each row that is not empty: its line, and its cells by column.

    Raises:
        ValueError: one line: it cannot be read, is larger than MAX_CSV_BYTES, no text, lacks a column, or a row does
            not fit the header.
    """
    try:
        with open_regular(path) as file:
            content = read_at_most(file, MAX_CSV_BYTES)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise cannot_read(path, error) from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no CSV file in UTF-8") from None
    if len(content) > MAX_CSV_BYTES:
        raise ValueError(f"{path} is larger than {MAX_CSV_BYTES:,} bytes")
    first = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=";" if first.count(";") > first.count(",") else ",")
    try:
        header = [name.strip() for name in next(reader, [])]
        if missing := [name for name in columns if header.count(name) != 1]:
            raise ValueError(f"{path} has no column {missing[0]}; expected {', '.join(columns)}")
        for cells in reader:
            if len(cells) != len(header) and any(cells):
                raise ValueError(f"{path} line {reader.line_num}: {len(cells)} cells, expected {len(header)}")
            if any(cells):
                yield reader.line_num, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path} line {reader.line_num}: {error}") from None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
