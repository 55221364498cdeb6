"""Parse IDX: anything at all, right files, damaged ones and lying headers; what load refuses, in one line."""

import gzip
import logging
import math
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from idx_files import TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS, assert_one_line, to_idx, write_small

from fmnist.data.fashion_mnist import load
from fmnist.data.idx import parse_idx, read_idx

pytestmark = pytest.mark.usefixtures("no_data_named")


# ---- the parser


def check_parse(data: bytes) -> None:
    """Either a one-line ValueError, or exactly the tensor that a second reading of the format gives."""
    try:
        tensor = parse_idx(data, "some-file")
    except ValueError as error:
        assert "some-file" in str(error) and "\n" not in str(error)
        return
    assert data[:3] == b"\0\0\x08"
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3])]
    assert tensor.dtype == torch.uint8 and list(tensor.shape) == shape
    assert tensor.numpy().tobytes() == data[4 + 4 * data[3] :]


headers = st.builds(
    lambda zeros, kind, dims, tail: zeros + bytes((kind, len(dims))) + struct.pack(f">{len(dims)}I", *dims) + tail,
    st.sampled_from([b"\0\0", b"\0\1"]),
    st.sampled_from([8, 8, 8, 9, 0x0B, 0x0D]),
    st.lists(st.sampled_from([0, 1, 2, 3, 28, 60_000, 2**16, 2**31, 2**32 - 1]), max_size=12),
    st.binary(max_size=64),
)


@settings(max_examples=200, deadline=2_000)
@given(st.one_of(st.binary(max_size=64), headers))
@example(b"")
@example(b"\0\0\x08\0")
@example(b"\0\0\x08\xff" + b"\xff" * 1020)
def test_parser_on_anything(data: bytes) -> None:
    check_parse(data)


@settings(max_examples=100, deadline=2_000)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_parser_on_right_and_on_damaged_files(shape: list[int], draw: st.DataObject) -> None:
    count = math.prod(shape)
    data = to_idx(tuple(shape), draw.draw(st.binary(min_size=count, max_size=count)))
    assert parse_idx(data, "right").shape == tuple(shape)
    check_parse(data)
    check_parse(data[: draw.draw(st.integers(0, len(data) - 1))])
    check_parse(data + b"\0")
    bit = draw.draw(st.integers(0, 8 * len(data) - 1))
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << (bit % 8)
    check_parse(bytes(damaged))


@pytest.mark.parametrize("dims", [(2**32 - 1,), (2**32 - 1,) * 3, (2**16, 2**14), (60_000, 28, 28)])
def test_lying_header_allocates_nothing(dims: tuple[int, ...], tmp_path: Path) -> None:
    tracemalloc.start()
    with pytest.raises(ValueError) as error:
        parse_idx(to_idx(dims, b"few"), "liar")
    (tmp_path / "liar").write_bytes(to_idx(dims, b"few"))
    with pytest.raises(ValueError):
        read_idx(tmp_path / "liar")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert_one_line(error, "liar")
    # The reading buffer of 1 MiB, and what Python itself needs.
    assert peak < 4 << 20


# ---- bad files


def replace(name: str, data: bytes, suffix: str = "") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / f"{name}{suffix}").write_bytes(data)

    return change


def repack(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Replace the training images by a .gz of them, changed."""

    def apply(folder: Path) -> None:
        data = (folder / TRAIN_IMAGES).read_bytes()
        replace(TRAIN_IMAGES, change(gzip.compress(data)), ".gz")(folder)

    return apply


def swap(one: str, other: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        first, second = (folder / one).read_bytes(), (folder / other).read_bytes()
        (folder / one).write_bytes(second)
        (folder / other).write_bytes(first)

    return change


def unreadable(folder: Path) -> None:
    # A regular file whose reads fail, for root as well: address 0 of no process is mapped.
    (folder / TRAIN_IMAGES).unlink()
    (folder / TRAIN_IMAGES).symlink_to("/proc/self/mem")


def folder_instead(folder: Path) -> None:
    (folder / TRAIN_IMAGES).unlink()
    (folder / TRAIN_IMAGES).mkdir()


def link_loop(folder: Path) -> None:
    (folder / TRAIN_IMAGES).unlink()
    (folder / TRAIN_IMAGES).symlink_to(f"{TRAIN_IMAGES}.gz")
    (folder / f"{TRAIN_IMAGES}.gz").symlink_to(TRAIN_IMAGES)


def device_instead(folder: Path) -> None:
    (folder / TRAIN_IMAGES).unlink()
    (folder / TRAIN_IMAGES).symlink_to("/dev/zero")


def fifo_instead(folder: Path) -> None:
    (folder / TRAIN_IMAGES).unlink()
    os.mkfifo(folder / TRAIN_IMAGES)


PIXELS = bytes(20 * 28 * 28)
HTML = b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n"
BOMB = to_idx((20, 28, 28), bytes(64 << 20))  # 64 MiB where 15,680 bytes are announced
BAD_FILES = {
    "magic": (replace(TRAIN_IMAGES, b"\1" + to_idx((20, 28, 28), PIXELS)[1:]), "magic number 0x01000803"),
    "float type": (replace(TRAIN_IMAGES, b"\0\0\x0d" + to_idx((20, 28, 28), PIXELS)[3:]), "0x00000d03"),
    "no dimensions": (replace(TRAIN_IMAGES, b"\0\0\x08\0"), "0x00000800"),
    "too few dimensions": (replace(TRAIN_IMAGES, to_idx((20, 784), PIXELS)), "2 dimensions, expected 3"),
    "too many dimensions": (replace(TRAIN_IMAGES, to_idx((20, 1, 28, 28), PIXELS)), "4 dimensions, expected 3"),
    "zero images": (replace(TRAIN_IMAGES, to_idx((0, 28, 28), b"")), "0 x 28 x 28"),
    "huge dimensions": (replace(TRAIN_IMAGES, to_idx((2**32 - 1,) * 3, PIXELS)), "4294967295 x 4294967295"),
    "header cut": (replace(TRAIN_IMAGES, to_idx((20, 28, 28), b"")[:10]), "expected a header of 16"),
    # 16 + 20 x 784 = 15,696
    "one byte short": (replace(TRAIN_IMAGES, to_idx((20, 28, 28), PIXELS[1:])), "15,695 bytes, expected 15,696"),
    "one byte long": (replace(TRAIN_IMAGES, to_idx((20, 28, 28), PIXELS + b"\0")), "more, expected 15,696"),
    "labels one short": (replace(TRAIN_LABELS, to_idx((20,), bytes(19))), "27 bytes, expected 28"),
    "empty": (replace(TRAIN_IMAGES, b""), "0 bytes"),
    "empty gzip file": (replace(TRAIN_IMAGES, b"", ".gz"), "0 bytes"),
    "gzip of nothing": (replace(TRAIN_IMAGES, gzip.compress(b""), ".gz"), "0 bytes"),
    "HTML": (replace(TRAIN_IMAGES, HTML), "magic number 0x3c21444f"),  # "<!DO"
    "HTML as gzip": (replace(TRAIN_IMAGES, HTML, ".gz"), "Not a gzipped file"),
    "gzip without .gz": (replace(TRAIN_IMAGES, gzip.compress(PIXELS)), "its name should end in .gz"),
    "gzip cut at half": (repack(lambda data: data[: len(data) // 2]), "end-of-stream"),
    "gzip cut by one": (repack(lambda data: data[:-1]), "end-of-stream"),
    "gzip CRC": (repack(lambda data: data[:-8] + bytes(4) + data[-4:]), "CRC check failed"),
    "gzip length": (repack(lambda data: data[:-4] + bytes(4)), "Incorrect length"),
    "gzip garbage inside": (repack(lambda data: data[:30] + b"\xff" * 9 + data[39:]), "cannot be read"),
    "gzip garbage after": (repack(lambda data: data + b"garbage"), "Not a gzipped file"),
    "gzip bomb": (replace(TRAIN_IMAGES, gzip.compress(BOMB, compresslevel=1), ".gz"), "more, expected 15,696"),
    "label 10": (replace(TRAIN_LABELS, to_idx((20,), bytes(13) + b"\x0a" + bytes(6))), "label 10 at position 13"),
    "counts differ": (replace(TRAIN_LABELS, to_idx((19,), bytes(19))), "20 images, but"),
    "images and labels swapped": (swap(TRAIN_IMAGES, TRAIN_LABELS), "1 dimensions, expected 3"),
    "train and test swapped": (swap(TRAIN_IMAGES, TEST_IMAGES), "10 images, but"),
    "missing": (lambda folder: (folder / TRAIN_IMAGES).unlink(), "lacks train-images-idx3-ubyte"),
    "another name": (replace(TRAIN_IMAGES, b"", ".gone"), "lacks train-images-idx3-ubyte"),
    "a folder": (folder_instead, "lacks train-images-idx3-ubyte"),
    "links in a circle": (link_loop, "lacks train-images-idx3-ubyte"),
    "an endless device": (device_instead, "lacks train-images-idx3-ubyte"),
    "a fifo": (fifo_instead, "lacks train-images-idx3-ubyte"),
    "unreadable": (unreadable, "cannot be read: [Errno 5]"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files(kind: str, tmp_path: Path) -> None:
    folder = write_small(tmp_path / "small")
    change, word = BAD_FILES[kind]
    change(folder)
    tracemalloc.start()
    with pytest.raises(ValueError) as error:
        load("train", str(folder))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert_one_line(
        error, word, str(folder), "train-labels" if "abel" in kind and "swap" not in kind else "train-images"
    )
    assert peak < 8 << 20, "the bomb's 64 MiB must not be unpacked"


def test_published_files_under_the_wrong_names(tmp_path: Path, packed: dict[str, bytes]) -> None:
    folder = write_small(tmp_path / "swapped", num_train=10_000, size=1)
    (folder / TRAIN_LABELS).unlink()
    (folder / f"{TRAIN_LABELS}.gz").write_bytes(packed[TEST_LABELS])  # 10,000 labels, as many as there are images
    with pytest.raises(ValueError) as error:
        load("train", str(folder))
    assert_one_line(error, TRAIN_LABELS, f"holds the published {TEST_LABELS}")


@pytest.mark.parametrize("size", [28, 32])
def test_other_data_in_the_same_format_is_used_with_a_warning(
    size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_small(tmp_path / "mnist", size=size)
    with caplog.at_level(logging.WARNING, logger="fmnist"):
        images, labels = load("train", str(folder))
    assert images.shape == (20, size, size) and labels.tolist() == [*range(10), *range(10)]
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "not the published Fashion-MNIST" in message and str(folder) in message and "\n" not in message
