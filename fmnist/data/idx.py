"""Read IDX, the format of the MNIST family: a header with the dimensions, then the values."""

import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from fmnist.runtime.console import one_line
from fmnist.runtime.files import read_at_most

MAX_FILE_BYTES = 1 << 30  # a header that announces more is refused before its content is read
MAX_DIMENSIONS = 8
TYPE_UINT8 = 0x08


def parse_idx(data: bytes, name: str) -> Tensor:
    """Parse the bytes of one IDX file of unsigned bytes.

    Args:
        data: The whole file, decompressed.
        name: The file's name in error messages.

    Returns:
        uint8 tensor on the CPU with the header's dimensions.

    Raises:
        ValueError: If the magic number, type, dimensions or length are invalid; one line.

    Source: the description of IDX on Y. LeCun's MNIST page.
    """
    shape, header_bytes = _parse_header(data, name)
    expected = header_bytes + math.prod(shape)
    if len(data) != expected:
        found = "more" if len(data) > expected else f"{len(data):,} bytes"
        raise ValueError(f"{name}: {found}, expected {expected:,} bytes: a header of {header_bytes} + {_times(shape)}")
    # bytearray: torch requires writable memory
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=header_bytes).view(shape)


def read_idx(path: Path) -> tuple[Tensor, str]:
    """Read one IDX file, and decompress it if its name ends in .gz.

    Args:
        path: The file.

    Returns:
        The tensor (see `parse_idx`) and the sha256 of the decompressed bytes.

    Raises:
        ValueError: If the file cannot be read or is not a valid IDX file; one line that names it.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as stream:
            # The header first: it bounds how much is read, which stops a decompression bomb.
            data = stream.read(4 + 4 * MAX_DIMENSIONS)
            shape, header_bytes = _parse_header(data, str(path))
            data += read_at_most(stream, max(0, header_bytes + math.prod(shape) - len(data)))
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {one_line(error)}") from error
    return parse_idx(data, str(path)), hashlib.sha256(data).hexdigest()


def _parse_header(data: bytes, name: str) -> tuple[tuple[int, ...], int]:
    """Return the shape, whose product is in 1..MAX_FILE_BYTES, and the length of the header."""
    if len(data) < 4:
        raise ValueError(f"{name}: {len(data)} bytes, an IDX file starts with a magic number of 4 bytes")
    if data[:3] != bytes((0, 0, TYPE_UINT8)) or not 1 <= data[3] <= MAX_DIMENSIONS:
        hint = " (gzip: its name should end in .gz)" if data[:2] == b"\x1f\x8b" else ""
        raise ValueError(
            f"{name}: magic number 0x{data[:4].hex()}{hint}, expected 0x000008 (IDX, unsigned bytes) and 01 "
            f"to {MAX_DIMENSIONS:02} dimensions"
        )
    header_bytes = 4 + 4 * data[3]
    if len(data) < header_bytes:
        raise ValueError(f"{name}: {len(data)} bytes, expected a header of {header_bytes} for {data[3]} dimensions")
    shape = struct.unpack(f">{data[3]}I", data[4:header_bytes])
    if not 1 <= math.prod(shape) <= MAX_FILE_BYTES:
        raise ValueError(f"{name}: dimensions {_times(shape)}, expected 1 to {MAX_FILE_BYTES:,} bytes in all")
    return shape, header_bytes


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
