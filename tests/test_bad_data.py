"""Bad data files beyond those of test_parse_idx.py: 2,000 damaged files against a second parser, and processes."""

import gzip
import math
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import warm_train as train
from hypothesis import given, settings
from hypothesis import strategies as st

from fmnist.data.fetch import PUBLISHED
from fmnist.data.find import locate
from fmnist.data.idx import read_idx

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = tuple(PUBLISHED)


def second_parser(data: bytes) -> np.ndarray | None:
    """IDX of unsigned bytes as its description has it, in numpy; None where the bytes are not exactly that."""
    if len(data) < 4 or data[:3] != b"\0\0\x08" or not 1 <= data[3] <= 8:
        return None
    header = 4 + 4 * data[3]
    if len(data) < header:
        return None
    shape = np.frombuffer(data, ">u4", data[3], 4).tolist()
    if not 1 <= math.prod(shape) <= 1 << 30 or len(data) != header + math.prod(shape):
        return None
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def unpack(data: bytes) -> bytes | None:
    """The content of a .gz by the standard library, None where it is damaged."""
    try:
        return gzip.decompress(data)
    except Exception:
        return None


@st.composite
def files(draw: st.DrawFn) -> tuple[bytes, str]:
    """(bytes, suffix) of a right file, a slightly or a thoroughly wrong one, plain or packed, damaged again or not."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    content = draw(st.binary(min_size=math.prod(shape), max_size=math.prod(shape)))
    if draw(st.integers(0, 4)) == 0:
        shape[draw(st.integers(0, len(shape) - 1))] = draw(st.sampled_from([0, 1, 2, 28, 60_000, 2**31, 2**32 - 1]))
    kind = draw(st.sampled_from([8] * 8 + [9, 0x0D]))
    data = bytes((0, 0, kind, len(shape))) + struct.pack(f">{len(shape)}I", *shape) + content
    if draw(st.integers(0, 9)) == 0:
        data = draw(st.binary(max_size=80))
    data = damage(draw, data)
    if draw(st.booleans()):
        return data, ""
    packed = gzip.compress(data, mtime=0)
    if draw(st.integers(0, 3)) == 0:
        packed += gzip.compress(draw(st.binary(max_size=4)), mtime=0)  # two members are one stream
    return damage(draw, packed), ".gz"


def damage(draw: st.DrawFn, data: bytes) -> bytes:
    how = draw(st.sampled_from(["not", "not", "not", "cut", "longer", "bit", "byte", "gone"]))
    if how == "cut":
        return data[: draw(st.integers(0, len(data)))]
    if how == "longer":
        return data + draw(st.binary(max_size=8))
    if how in ("bit", "byte", "gone") and data:
        at = draw(st.integers(0, len(data) - 1))
        new = (
            bytes([data[at] ^ 1 << draw(st.integers(0, 7))])
            if how == "bit"
            else draw(st.binary(min_size=1, max_size=1))
        )
        return data[:at] + (b"" if how == "gone" else new) + data[at + 1 :]
    return data


def check_file(case: tuple[bytes, str]) -> None:
    """Exactly the second parser's array, or one line that names the file; nothing else, and at once."""
    data, suffix = case
    plain = unpack(data) if suffix else data
    expected = None if plain is None else second_parser(plain)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file{suffix}"
        path.write_bytes(data)
        try:
            tensor, _ = read_idx(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            assert expected is None, error
            return
    assert expected is not None
    assert tensor.dtype == torch.uint8
    np.testing.assert_array_equal(tensor.numpy(), expected)


@settings(max_examples=200, deadline=5_000)
@given(files())
def test_any_file_is_read_exactly_or_refused(case: tuple[bytes, str]) -> None:
    check_file(case)


@pytest.mark.slow
@settings(max_examples=2_000, deadline=5_000)
@given(files())
def test_2000_files_are_read_exactly_or_refused(case: tuple[bytes, str]) -> None:
    check_file(case)


def test_the_cases_hold_right_files_and_wrong_ones() -> None:
    found = {True: 0, False: 0}

    @settings(max_examples=200, deadline=None, database=None, derandomize=True)
    @given(files())
    def count(case: tuple[bytes, str]) -> None:
        plain = unpack(case[0]) if case[1] else case[0]
        found[plain is not None and second_parser(plain) is not None] += 1

    count()
    assert min(found.values()) >= 40, found


def loop(folder: Path) -> None:
    (folder / TEST_IMAGES).symlink_to(TEST_IMAGES)


def bomb(folder: Path) -> None:
    header = b"\0\0\x08\x03" + struct.pack(">3I", 10_000, 28, 28)
    (folder / f"{TEST_IMAGES}.gz").write_bytes(gzip.compress(header + bytes(256 << 20), 1))


def html(folder: Path) -> None:
    (folder / f"{TEST_IMAGES}.gz").write_bytes(b"<!DOCTYPE html><title>Sign in</title>")


def fifo(folder: Path) -> None:
    os.mkfifo(folder / TEST_IMAGES)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(loop, f"lacks {TEST_IMAGES}", marks=pytest.mark.slow),
        (bomb, "more, expected 7,840,016 bytes"),
        pytest.param(html, "Not a gzipped file", marks=pytest.mark.slow),
        pytest.param(fifo, f"lacks {TEST_IMAGES}", marks=pytest.mark.slow),
    ],
)
def test_a_bad_test_file_is_told_before_the_training(
    change: Callable[[Path], None], expected: str, tmp_path: Path, small_config: Path
) -> None:
    """The 10,000 are read at the end, but a run that could not be finished is refused at its start."""
    folder = tmp_path / "data"
    folder.mkdir()
    source = locate()
    for name in PUBLISHED:
        if name != TEST_IMAGES:
            path = source / name if (source / name).exists() else source / f"{name}.gz"
            shutil.copy(path, folder)
    change(folder)
    start = time.monotonic()
    done = train("--config", small_config, "--output_dir", tmp_path / "run", "--data.root", folder, check=False)
    assert time.monotonic() - start < 120
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert expected in done.stderr and TEST_IMAGES in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["circle", "device", "below a file", "too long"])
def test_a_root_that_is_none(kind: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    if kind == "circle":
        root.symlink_to(root)
    elif kind == "device":
        root = Path("/dev/null")
    elif kind == "below a file":
        root.write_text("a file")
        root = root / "below"
    else:
        root = tmp_path / ("x" * 300)
    with pytest.raises(ValueError, match="data.root") as error:
        locate(str(root))
    assert "\n" not in str(error.value)
