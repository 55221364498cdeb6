"""Files written whole or not at all, whatever stops the process or the power; and their hashes."""

import hashlib
import os
from pathlib import Path


def sync_path(path: Path) -> None:
    """Force a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: its content is on the disk before its name is, and then its name.

    Raises:
        OSError: the disk is full or not writable; the file is as it was.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(data)
        sync_path(part)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)  # half a file would only take what room is left
        raise
    sync_path(path.parent)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
