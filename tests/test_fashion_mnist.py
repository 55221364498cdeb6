"""Find, fetch, verify, parse and split Fashion-MNIST: real data, bad files, bad networks, four processes."""

from __future__ import annotations

import gzip
import http.server
import logging
import math
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fmnist.data import fashion_mnist, fetch, idx
from fmnist.data.fashion_mnist import load, load_split, locate, parse_idx, stratified_split

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = NAMES = tuple(fetch.PUBLISHED)
REPOSITORY = Path(__file__).parents[1]


# ---- helpers


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No test sees the caller's data folder, $FMNIST_DATA or proxy, or leaves 55 MB behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FMNIST_DATA", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield
    monkeypatch.undo()
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="session")
def real_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real data, wherever this machine has it; fetched where it has none."""
    here = Path.cwd()
    os.chdir(REPOSITORY)
    try:
        return locate()
    finally:
        os.chdir(here)


@pytest.fixture(scope="session")
def packed(real_folder: Path) -> dict[str, bytes]:
    """The four real files as .gz."""
    result = {}
    for name in NAMES:
        path = fetch.find_file(real_folder, name)
        assert path is not None
        data = path.read_bytes()
        result[name] = data if path.suffix == ".gz" else gzip.compress(data, compresslevel=1)
    return result


@pytest.fixture(scope="session")
def train(real_folder: Path) -> tuple[Tensor, Tensor]:
    return load("train", str(real_folder))


def to_idx(shape: tuple[int, ...], content: bytes) -> bytes:
    return bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape) + content


def write_small(folder: Path, num_train: int = 20, num_test: int = 10, size: int = 28) -> Path:
    """Write a small, correct data set: image i holds the value i, label i is i modulo 10."""
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in (("train", num_train), ("t10k", num_test)):
        pixels = b"".join(bytes([i % 256]) * size * size for i in range(count))
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(to_idx((count, size, size), pixels))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(to_idx((count,), bytes(i % 10 for i in range(count))))
    return folder


class Mirror(http.server.ThreadingHTTPServer):
    """A mirror on this machine; `answer` says what a path gets, `requests` is what was asked for."""

    daemon_threads = True

    def __init__(self, answer: Callable[[str, http.server.BaseHTTPRequestHandler], None]) -> None:
        self.requests: list[str] = []
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.requests.append(self.path.strip("/"))
                answer(self.path.strip("/").removesuffix(".gz"), self)

            def log_message(self, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def handle_error(self, *args: object) -> None:
        """A client that was killed or gave up is what these tests are about."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


def send(handler: http.server.BaseHTTPRequestHandler, body: bytes, length: int | None = None) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture
def start_mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Mirror]]:
    """Make a mirror the only source of a fetch."""
    mirrors: list[Mirror] = []

    def start(answer: Callable[[str, http.server.BaseHTTPRequestHandler], None]) -> Mirror:
        mirrors.append(Mirror(answer))
        only_mirrors(monkeypatch, [mirrors[-1].url])
        return mirrors[-1]

    yield start
    for mirror in mirrors:
        mirror.shutdown()
        mirror.server_close()


def no_package(staging: Path) -> None:
    raise ValueError("no package in this test")


def only_mirrors(monkeypatch: pytest.MonkeyPatch, urls: list[str]) -> None:
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", urls)
    monkeypatch.setattr(fetch, "_from_debian", no_package)


CHILD = """
import os, sys
from torchvision.datasets import FashionMNIST
from fmnist.data import fetch
from fmnist.data.fashion_mnist import locate
def no_package(staging): raise ValueError("no package in this test")
FashionMNIST.mirrors, fetch._from_debian = [sys.argv[1]], no_package
others = []
for _ in range(int(sys.argv[3]) - 1):
    others.append(os.fork())
    if others[-1] == 0:
        break
os.write(1, f"{locate(sys.argv[2])}\\n".encode())  # one write: lines of four processes must not mix
if 0 not in others:
    sys.exit(any(os.waitpid(other, 0)[1] for other in others))
"""


def start_child(url: str, root: Path, processes: int) -> subprocess.Popen[str]:
    """Start processes that locate the data; forked from one, because the imports cost seconds."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, url, str(root), str(processes)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def assert_one_line(error: pytest.ExceptionInfo[ValueError], *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text and len(text) < 2000
    for word in words:
        assert word in text


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


# ---- the real data


def test_real_data_are_the_published_ones(real_folder: Path, train: tuple[Tensor, Tensor]) -> None:
    images, labels = train
    test_images, test_labels = load("test", str(real_folder))
    assert images.shape == (60_000, 28, 28) and images.dtype == torch.uint8
    assert test_images.shape == (10_000, 28, 28) and test_images.dtype == torch.uint8
    assert labels.dtype == test_labels.dtype == torch.int64
    assert images.device.type == labels.device.type == "cpu"
    # 60,000 / 10 classes and 10,000 / 10 classes
    assert labels.bincount().tolist() == [6_000] * 10 and test_labels.bincount().tolist() == [1_000] * 10
    assert labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]  # as printed in many tutorials
    assert len(fashion_mnist.CLASS_NAMES) == fashion_mnist.NUM_CLASSES == 10
    assert fashion_mnist.CLASS_NAMES[labels[0]] == "Ankle boot"


def test_mean_and_std_are_those_of_the_training_pixels(train: tuple[Tensor, Tensor]) -> None:
    counts = train[0].flatten().bincount(minlength=256).tolist()
    num_pixels = 60_000 * 28 * 28
    assert sum(counts) == num_pixels == 47_040_000
    # integers up to the division: E[v] and E[v^2] - E[v]^2 of the 47,040,000 values v; then 0..255 to 0..1
    first = sum(value * count for value, count in enumerate(counts))
    second = sum(value * value * count for value, count in enumerate(counts))
    mean = first / num_pixels / 255
    std = math.sqrt(second / num_pixels - (first / num_pixels) ** 2) / 255
    assert round(mean, 4) == fashion_mnist.MEAN == 0.2860
    assert round(std, 4) == fashion_mnist.STD == 0.3530


def test_loading_published_data_warns_of_nothing(real_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="fmnist"):
        load("test", str(real_folder))
    assert caplog.records == []


# ---- the split


def test_split_of_the_60000(train: tuple[Tensor, Tensor]) -> None:
    images, labels = train
    train_indices, val_indices = stratified_split(labels, 5_000)
    # 5,000 x 6,000 / 60,000 = 500 of each class; 6,000 - 500 = 5,500 are left
    assert labels[val_indices].bincount().tolist() == [500] * 10
    assert labels[train_indices].bincount().tolist() == [5_500] * 10
    assert torch.equal(torch.cat([train_indices, val_indices]).sort().values, torch.arange(60_000))
    for indices in (train_indices, val_indices):
        assert indices.dtype == torch.int64 and torch.equal(indices, indices.sort().values)
    # 0 exact copies across the two
    rows = [image.tobytes() for image in images.numpy()]
    assert not {rows[i] for i in train_indices.tolist()} & {rows[i] for i in val_indices.tolist()}


def test_split_is_a_constant_of_the_data(train: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(1)
    first = stratified_split(train[1], 5_000)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    torch.rand(7)
    second = stratified_split(train[1], 5_000)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "the global generator must not move"
    # The split that every run so far had: a change here makes old validation numbers incomparable.
    assert first[1][:8].tolist() == [5, 22, 25, 56, 66, 70, 73, 75]
    assert int(first[1].sum()) == 149855323


@pytest.mark.parametrize(
    ("class_sizes", "val_size", "expected"),
    [
        ([6] * 10, 0, [0] * 10),
        ([6] * 10, 59, [6] * 9 + [5]),  # 59 x 6 / 60 = 5.9 each: 5 each, the 9 left over to classes 0 to 8
        ([6] * 10, 13, [2] * 3 + [1] * 7),  # 13 x 6 / 60 = 1.3 each: 1 each, 3 left over
        ([10, 30, 60], 5, [1, 1, 3]),  # 0.5, 1.5, 3.0: 0, 1, 3 and 1 left over; 0.5 = 0.5, so the lower class
        ([1, 99], 1, [0, 1]),  # 0.01, 0.99: 0, 0 and 1 left over to the larger remainder
        ([3, 0, 3], 2, [1, 0, 1]),  # an absent class takes none
    ],
)
def test_split_shares(class_sizes: list[int], val_size: int, expected: list[int]) -> None:
    labels = torch.cat([torch.full((size,), label) for label, size in enumerate(class_sizes)])
    train_indices, val_indices = stratified_split(labels, val_size)
    assert labels[val_indices].bincount(minlength=len(expected)).tolist() == expected
    assert len(train_indices) == sum(class_sizes) - val_size


@pytest.mark.parametrize("val_size", [-1, 60, 61])
def test_split_refuses_sizes_out_of_range(val_size: int) -> None:
    with pytest.raises(ValueError) as error:
        stratified_split(torch.arange(60) % 10, val_size)
    assert_one_line(error, "data.val_size", str(val_size), "0 to 59")


def test_load_split(tmp_path: Path) -> None:
    root = str(write_small(tmp_path / "small"))
    images, labels = load_split("val", root, 10)
    assert images.shape == (10, 28, 28) and labels.tolist() == sorted(labels.tolist(), key=labels.tolist().index)
    assert labels.bincount().tolist() == [1] * 10  # 10 x 2 / 20
    assert (images[:, 0, 0] % 10 == labels).all(), "images and labels must stay together"
    assert len(load_split("train", root, 10)[0]) == 10
    assert load_split("val", root, 0)[0].shape == (0, 28, 28)
    assert len(load_split("train", root, 0)[0]) == 20
    assert len(load_split("test", root, 10)[0]) == 10
    with pytest.raises(ValueError, match="train, val or test"):
        load_split("dev", root, 10)  # type: ignore[arg-type]


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
        idx.read_idx(tmp_path / "liar")
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
    "too many dimensions": (
        replace(TRAIN_IMAGES, to_idx((20, 1, 28, 28), PIXELS)),
        "4 dimensions, expected 3",
    ),
    "zero images": (replace(TRAIN_IMAGES, to_idx((0, 28, 28), b"")), "0 x 28 x 28"),
    "huge dimensions": (replace(TRAIN_IMAGES, to_idx((2**32 - 1,) * 3, PIXELS)), "4294967295 x 4294967295"),
    "header cut": (replace(TRAIN_IMAGES, to_idx((20, 28, 28), b"")[:10]), "expected a header of 16"),
    # 16 + 20 x 784 = 15,696
    "one byte short": (
        replace(TRAIN_IMAGES, to_idx((20, 28, 28), PIXELS[1:])),
        "15,695 bytes, expected 15,696",
    ),
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
    "gzip bomb": (
        replace(TRAIN_IMAGES, gzip.compress(BOMB, compresslevel=1), ".gz"),
        "more, expected 15,696",
    ),
    "label 10": (
        replace(TRAIN_LABELS, to_idx((20,), bytes(13) + b"\x0a" + bytes(6))),
        "label 10 at position 13",
    ),
    "counts differ": (replace(TRAIN_LABELS, to_idx((19,), bytes(19))), "20 images, but"),
    "images and labels swapped": (swap(TRAIN_IMAGES, TRAIN_LABELS), "1 dimensions, expected 3"),
    "train and test swapped": (swap(TRAIN_IMAGES, TEST_IMAGES), "10 images, but"),
    "missing": (lambda folder: (folder / TRAIN_IMAGES).unlink(), "lacks train-images-idx3-ubyte"),
    "dangling link": (replace(TRAIN_IMAGES, b"", ".gone"), "lacks train-images-idx3-ubyte"),
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


# ---- where it looks


def test_search_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    debian = write_small(tmp_path / "debian")
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", debian)
    assert locate() == debian
    data = write_small(tmp_path / "data")
    assert locate() == data
    raw = write_small(tmp_path / "data" / "FashionMNIST" / "raw")
    assert locate() == raw
    named = write_small(tmp_path / "named")
    monkeypatch.setenv("FMNIST_DATA", str(named))
    assert locate() == named
    torchvision_raw = write_small(tmp_path / "torchvision" / "FashionMNIST" / "raw")
    assert locate(str(tmp_path / "torchvision")) == torchvision_raw
    assert locate(str(torchvision_raw)) == torchvision_raw
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/named") == named


def test_each_file_may_be_plain_or_gz(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "mixed")
    expected = load("train", str(folder))
    for name in (TRAIN_IMAGES, TEST_LABELS):
        replace(name, gzip.compress((folder / name).read_bytes()), ".gz")(folder)
    assert all(torch.equal(a, b) for a, b in zip(load("train", str(folder)), expected, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("source", ["data.root", "$FMNIST_DATA"])
def test_partial_folder_is_an_error(name: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_small(tmp_path / "partial")
    (folder / name).unlink()
    monkeypatch.setenv("FMNIST_DATA", str(folder))
    with pytest.raises(ValueError) as error:
        locate(str(folder) if source == "data.root" else None)
    assert_one_line(error, source, str(folder), f"lacks {name} ")
    assert len(names_in(folder)) == 3, "a user's folder is left as it was"


def test_root_that_cannot_be_filled(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    for root, words in (
        (tmp_path / "file", "is not a folder"),
        (tmp_path / "file" / "below", "cannot be put there"),
    ):
        with pytest.raises(ValueError) as error:
            locate(str(root))
        assert_one_line(error, "data.root", str(root), words if root.name == "file" else "nor can it be put there")
    with pytest.raises(ValueError) as error:
        load("dev", str(tmp_path))  # type: ignore[arg-type]
    assert_one_line(error, "dev", "train or test")


# ---- fetch


def test_mirror_fills_a_given_root(
    tmp_path: Path, packed: dict[str, bytes], start_mirror: Callable[..., Mirror]
) -> None:
    mirror = start_mirror(lambda name, handler: send(handler, packed[name]))
    folder = locate(str(tmp_path / "new"))
    assert folder == tmp_path / "new" / "FashionMNIST" / "raw"
    assert names_in(folder) == set(NAMES), "plain files, as torchvision leaves them, and nothing else"
    assert mirror.requests == [f"{name}.gz" for name in NAMES]
    assert locate(str(tmp_path / "new")) == folder and len(mirror.requests) == 4, "found, not fetched again"
    # torchvision reads what was put there.
    assert len(torchvision.datasets.FashionMNIST(str(tmp_path / "new"), train=False, download=False)) == 10_000


def test_without_a_root_the_data_folder_is_filled(
    tmp_path: Path,
    packed: dict[str, bytes],
    start_mirror: Callable[..., Mirror],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "absent")
    start_mirror(lambda name, handler: send(handler, packed[name]))
    assert locate() == tmp_path / "data" / "FashionMNIST" / "raw"


def not_http(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"SSH-2.0-x\r\n")


def redirect(handler: http.server.BaseHTTPRequestHandler, to: str) -> None:
    handler.send_response(302)
    handler.send_header("Location", to)
    handler.send_header("Content-Length", "0")
    handler.end_headers()


BAD_ANSWERS: dict[str, tuple[Callable[[bytes, http.server.BaseHTTPRequestHandler], None], str]] = {
    "404": (lambda data, handler: handler.send_error(404), "404"),
    "HTML": (lambda data, handler: send(handler, HTML), "Not a gzipped file"),
    "cut": (lambda data, handler: send(handler, data[: len(data) // 2], len(data)), "end-of-stream"),
    "nothing": (lambda data, handler: send(handler, b""), "not the published file"),
    "other bytes": (
        lambda data, handler: send(handler, gzip.compress(bytes(47_040_016), 1)),
        "not the published",
    ),
    "endless": (lambda data, handler: send(handler, bytes(60 << 20)), "more than 47,040,016 bytes"),
    "elsewhere: a local file": (lambda data, handler: redirect(handler, "file:///etc/hostname"), "is not allowed"),
    "elsewhere: in a circle": (lambda data, handler: redirect(handler, handler.path), "redirect"),
    "not http": (lambda data, handler: not_http(handler), "SSH-2.0"),
}


@pytest.mark.parametrize("kind", BAD_ANSWERS)
def test_bad_answer_leaves_no_file(
    kind: str, tmp_path: Path, packed: dict[str, bytes], start_mirror: Callable[..., Mirror]
) -> None:
    answer, word = BAD_ANSWERS[kind]
    mirror = start_mirror(lambda name, handler: answer(packed[name], handler))
    with pytest.raises(ValueError) as error:
        locate(str(tmp_path / "new"))
    ways_out = ("--data.root FOLDER", "apt-get install dataset-fashion-mnist")
    assert_one_line(error, word, mirror.url, "no package in this test", *ways_out)
    assert names_in(tmp_path / "new" / "FashionMNIST" / "raw") == set()


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_unreachable_mirror_costs_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://127.0.0.1:{closed_port()}/"
    only_mirrors(monkeypatch, [url])
    start = time.monotonic()
    with pytest.raises(ValueError) as error:
        locate(str(tmp_path / "new"))
    assert time.monotonic() - start < 3
    assert_one_line(error, url, "refused")


def trickle(name: str, handler: http.server.BaseHTTPRequestHandler) -> None:
    """One byte at a time, so that no single read ever waits for long."""
    send(handler, b"", 1_000_000)
    for _ in range(200):
        handler.wfile.write(b"\x1f")
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("answer", "word"),
    [(lambda name, handler: time.sleep(4), "no answer within 0.5 s|timed out"), (trickle, "slower than")],
    ids=["silent", "trickle"],
)
def test_slow_mirror_is_given_up(
    answer: Callable[..., None],
    word: str,
    tmp_path: Path,
    start_mirror: Callable[..., Mirror],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fetch, "PROBE_S", 0.5)
    start_mirror(answer)
    start = time.monotonic()
    with pytest.raises(ValueError, match=word):
        locate(str(tmp_path / "new"))
    assert time.monotonic() - start < 3


def test_name_lookup_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "PROBE_S", 0.3)
    only_mirrors(monkeypatch, ["http://mirror.invalid/"])
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(5))
    start = time.monotonic()
    with pytest.raises(ValueError, match="no answer within 0.3 s"):
        locate(str(tmp_path / "new"))
    assert time.monotonic() - start < 3


def test_second_mirror_serves_when_the_first_does_not(
    tmp_path: Path,
    packed: dict[str, bytes],
    start_mirror: Callable[..., Mirror],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mirror = start_mirror(lambda name, handler: send(handler, packed[name]))
    only_mirrors(monkeypatch, [f"http://127.0.0.1:{closed_port()}/", mirror.url])
    assert names_in(locate(str(tmp_path / "new"))) == set(NAMES)


def test_four_processes_fetch_once(tmp_path: Path, packed: dict[str, bytes]) -> None:
    def answer(name: str, handler: http.server.BaseHTTPRequestHandler) -> None:
        time.sleep(0.3)  # long enough for all four to be there
        send(handler, packed[name])

    mirror = Mirror(answer)
    child = start_child(mirror.url, tmp_path / "new", processes=4)
    output, errors = child.communicate(timeout=120)
    folder = tmp_path / "new" / "FashionMNIST" / "raw"
    assert child.returncode == 0, errors
    assert output.split() == [str(folder)] * 4
    assert sorted(mirror.requests) == sorted(f"{name}.gz" for name in NAMES), "one process fetched, three found"
    assert names_in(folder) == set(NAMES)
    mirror.shutdown()
    mirror.server_close()


def test_killed_in_the_middle_of_a_download(
    tmp_path: Path, packed: dict[str, bytes], start_mirror: Callable[..., Mirror]
) -> None:
    half_sent = threading.Event()

    def stall_once(name: str, handler: http.server.BaseHTTPRequestHandler) -> None:
        if name != TEST_IMAGES or half_sent.is_set():
            return send(handler, packed[name])
        send(handler, packed[name][:2_000_000], len(packed[name]))
        half_sent.set()
        time.sleep(5)

    mirror = start_mirror(stall_once)
    child = start_child(mirror.url, tmp_path / "new", processes=1)
    assert half_sent.wait(60)
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=10)
    folder = tmp_path / "new" / "FashionMNIST" / "raw"
    # Two files were complete and verified; they are not visible before all four are.
    assert names_in(folder) == {fetch.STAGING}
    assert locate(str(tmp_path / "new")) == folder
    assert names_in(folder) == set(NAMES)


def test_killed_between_two_renames(
    tmp_path: Path,
    packed: dict[str, bytes],
    start_mirror: Callable[..., Mirror],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start_mirror(lambda name, handler: send(handler, packed[name]))
    replace_file = os.replace
    done: list[Path] = []

    def interrupted(source: Path, target: Path) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(target)
        replace_file(source, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", interrupted)
        locate(str(tmp_path / "new"))
    folder = tmp_path / "new" / "FashionMNIST" / "raw"
    assert names_in(folder) == {*NAMES[:2], fetch.STAGING}
    # Named as the folder of the files this time: the gap is the fetch's own, so it is filled and no error.
    assert locate(str(folder)) == folder
    assert names_in(folder) == set(NAMES)


# ---- the distribution


def test_real_package_is_downloaded_and_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        pytest.skip("no apt-get here: not a Debian")
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [f"http://127.0.0.1:{closed_port()}/"])
    monkeypatch.setattr(fetch, "DEBIAN_FOLDER", tmp_path / "not-installed")
    folder = locate(str(tmp_path / "new"))
    assert names_in(folder) == set(NAMES)
    assert load("test", str(tmp_path / "new"))[0].shape == (10_000, 28, 28)


def test_installed_package_fills_a_given_root(
    tmp_path: Path, packed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "installed"
    installed.mkdir()
    for name, data in packed.items():
        (installed / f"{name}.gz").write_bytes(data)
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [])
    monkeypatch.setattr(fetch, "DEBIAN_FOLDER", installed)
    monkeypatch.setenv("PATH", str(tmp_path))  # no apt-get
    assert names_in(locate(str(tmp_path / "new"))) == set(NAMES)


APT_GET = """#!/bin/sh
echo "$*" >> "{log}"
case "$*" in
*update) : > "{log}.lists" ;;
*download*)
    [ -e "{log}.lists" ] || {{ echo "E: Unable to locate package it" >&2; exit 100; }}
    cp "{package}" . ;;
esac
"""


@pytest.mark.parametrize("is_root", [True, False])
def test_package_lists_are_fetched_once_and_only_by_root(
    is_root: bool, tmp_path: Path, packed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("dpkg-deb") is None:
        pytest.skip("no dpkg-deb here: not a Debian")
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: it\nVersion: 1\nArchitecture: all\nMaintainer: n\nDescription: d\n"
    )
    (tree / fetch.DEBIAN_FILES).mkdir(parents=True)
    for name, data in packed.items():
        (tree / fetch.DEBIAN_FILES / f"{name}.gz").write_bytes(data)
    package, log = tmp_path / "it.deb", tmp_path / "log"
    subprocess.run(["dpkg-deb", "-Znone", "--build", tree, package], check=True, capture_output=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "apt-get").write_text(APT_GET.format(log=log, package=package))
    (tmp_path / "bin" / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [])
    monkeypatch.setattr(fetch, "DEBIAN_FOLDER", tmp_path / "not-installed")
    monkeypatch.setattr(os, "geteuid", lambda: 0 if is_root else 1000)
    if is_root:
        assert names_in(locate(str(tmp_path / "new"))) == set(NAMES)
    else:
        with pytest.raises(ValueError) as error:
            locate(str(tmp_path / "new"))
        assert_one_line(error, "Unable to locate package", "--data.root FOLDER")
    calls = [line.split()[-2:] for line in log.read_text().splitlines()]
    assert [call[-1] for call in calls] == [fetch.DEBIAN_PACKAGE, "update", fetch.DEBIAN_PACKAGE][: 3 if is_root else 1]


def test_nothing_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = [f"http://127.0.0.1:{closed_port()}/", f"http://127.0.0.1:{closed_port()}/"]
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", urls)
    monkeypatch.setattr(fetch, "DEBIAN_FOLDER", tmp_path / "not-installed")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError) as error:
        locate(str(tmp_path / "new"))
    ways_out = ("--data.root FOLDER", "apt-get install dataset-fashion-mnist")
    assert_one_line(error, *urls, "apt-get is not installed", *ways_out)
