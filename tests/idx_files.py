"""IDX files for the tests of the data: small, correct ones, and what an error about them must look like."""

import struct
from pathlib import Path

import pytest

from fmnist.data.fetch import PUBLISHED

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = NAMES = tuple(PUBLISHED)


def to_idx(shape: tuple[int, ...], content: bytes) -> bytes:
    """Return an IDX file of unsigned bytes; the header says `shape`, whatever the content."""
    return bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape) + content


def write_small(folder: Path, num_train: int = 20, num_test: int = 10, size: int = 28) -> Path:
    """Write a small, correct data set: image i holds the value i, label i is i modulo 10."""
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in (("train", num_train), ("t10k", num_test)):
        pixels = b"".join(bytes([i % 256]) * size * size for i in range(count))
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(to_idx((count, size, size), pixels))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(to_idx((count,), bytes(i % 10 for i in range(count))))
    return folder


def assert_one_line(error: pytest.ExceptionInfo[ValueError], *words: str) -> None:
    """Hold an error to one line of less than 2,000 characters that has all these words."""
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 2000
    for word in words:
        assert word in text
