"""The arrays of a .npz file, of which large ones may stay in it."""

import zipfile
import zlib
from collections.abc import Collection
from math import prod

import numpy as np
from numpy.typing import NDArray

LOCAL_HEADER = 30  # bytes of what stands before a member, and before its name
PIECE = 1 << 22  # bytes read at a time


def read_arrays(path: str, names: Collection[str], *, in_place: bool) -> tuple[dict[str, NDArray], list[str]]:
    """Read arrays of a .npz file, and say what others are there, which may be of any size.

    Args:
        path: the file.
        names: of the arrays, those that are there.
        in_place: leave those of uint8 that are not compressed in the file, mapped, after a look at their checksum.

    Raises:
        Exception: what NumPy, zipfile and the system raise where it is none, or is damaged.
    """
    with np.load(path, allow_pickle=False) as file:
        known = [name for name in file.files if name in names]
        mapped = {name: _mapped(file.zip, f"{name}.npy") for name in known} if in_place else {}
        arrays = {name: file[name] if (array := mapped.get(name)) is None else array for name in known}
        if strange := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
            raise ValueError(f"{strange[0]} is not an array")
        return arrays, [name for name in file.files if name not in names]


def _mapped(archive: zipfile.ZipFile, name: str) -> NDArray[np.uint8] | None:
    """Return an array in its place; None where it has to be read, and NumPy says what is wrong with it."""
    info, file = archive.NameToInfo.get(name), archive.fp
    if info is None or info.compress_type != zipfile.ZIP_STORED or file is None:
        return None
    archive.open(info).close()  # compares what stands before it
    file.seek(info.header_offset)
    header = file.read(LOCAL_HEADER)
    begin = info.header_offset + LOCAL_HEADER + sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    file.seek(begin)
    try:
        version = np.lib.format.read_magic(file)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception:  # NumPy's parser raises more than ValueError
        return None
    at = file.tell()
    size = prod(shape)
    whole = at - begin + size == info.file_size == info.compress_size
    if version != (1, 0) or dtype != np.uint8 or fortran_order or not size or not whole:
        return None
    file.seek(begin)
    left, checksum = info.file_size, 0
    while left and (piece := file.read(min(PIECE, left))):
        left, checksum = left - len(piece), zlib.crc32(piece, checksum)
    if left or checksum != info.CRC:
        return None
    return np.memmap(file, np.uint8, "c", at, shape)  # private pages: what writes into it does not reach the file
