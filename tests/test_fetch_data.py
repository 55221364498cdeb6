"""Fetch Fashion-MNIST: bad servers, slow ones, kills, four processes at once, and the distribution's package."""

import gzip
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torchvision
from conftest import ROOT
from idx_files import NAMES, TEST_IMAGES, assert_one_line, write_small
from mirror import Handler, Mirror, send

from fmnist.data import fetch, find
from fmnist.data.fashion_mnist import load
from fmnist.data.fetch import fetch_files
from fmnist.data.find import locate

pytestmark = pytest.mark.usefixtures("no_data_named")
WAYS_OUT = ("--data.root FOLDER", "apt-get install dataset-fashion-mnist")


@pytest.fixture(autouse=True)
def no_package_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "DEBIAN_FOLDER", tmp_path / "absent")


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[str, Handler], None]], Mirror]]:
    """Start a mirror that is the only one, and stop it after the test."""
    mirrors: list[Mirror] = []

    def start(answer: Callable[[str, Handler], None]) -> Mirror:
        mirrors.append(Mirror(answer))
        monkeypatch.setattr(fetch, "MIRRORS", (mirrors[-1].url,))
        return mirrors[-1]

    yield start
    for mirror in mirrors:
        mirror.shutdown()
        mirror.server_close()


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Publish 300 images instead of the 70,000: the four files as .gz, by name."""
    contents = {name: (write_small(tmp_path / "published", 200, 100) / name).read_bytes() for name in NAMES}
    for name, data in contents.items():
        monkeypatch.setitem(fetch.PUBLISHED, name, (len(data), hashlib.sha256(data).hexdigest()))
    return {name: gzip.compress(data) for name, data in contents.items()}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/"


def test_the_mirrors_are_those_of_torchvision() -> None:
    assert list(fetch.MIRRORS) == torchvision.datasets.FashionMNIST.mirrors


def test_without_a_named_folder_the_data_folder_is_filled(tmp_path: Path, packed: dict[str, bytes], serve) -> None:
    mirror = serve(lambda name, handler: send(handler, packed[name]))
    images, labels = load("test", fetch=True)
    folder = tmp_path / "data" / "FashionMNIST" / "raw"
    assert names_in(folder) == set(NAMES), "plain files, as torchvision leaves them, and nothing else"
    assert mirror.requests == [f"{name}.gz" for name in NAMES]
    assert locate() == locate(fetch=True) == locate(str(tmp_path / "data")) == folder
    assert len(mirror.requests) == 4, "found, not fetched again"
    # torchvision reads what was put there.
    theirs = torchvision.datasets.FashionMNIST(str(tmp_path / "data"), train=False, download=False)
    assert theirs.data.equal(images)
    assert theirs.targets.equal(labels)


def test_a_second_mirror_serves_if_the_first_does_not(tmp_path: Path, small: dict[str, bytes], serve) -> None:
    mirror = serve(lambda name, handler: send(handler, small[name]))
    fetch_files(tmp_path / "new", mirrors=[closed_port(), mirror.url])
    assert names_in(tmp_path / "new") == set(NAMES)
    for name in NAMES:
        assert (tmp_path / "new" / name).read_bytes() == gzip.decompress(small[name])


# ---- bad ones


def redirect(handler: Handler, to: str) -> None:
    handler.send_response(302)
    handler.send_header("Location", to)
    handler.send_header("Content-Length", "0")
    handler.end_headers()


HTML = b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n"
# The first file that is asked for: 16 + 200 x 784 = 156,816 bytes
BAD_ANSWERS: dict[str, tuple[Callable[[bytes, Handler], None], str]] = {
    "404": (lambda data, handler: handler.send_error(404), "404"),
    "HTML": (lambda data, handler: send(handler, HTML), "Not a gzipped file"),
    "cut": (lambda data, handler: send(handler, data[: len(data) // 2], len(data)), "end-of-stream"),
    "nothing": (lambda data, handler: send(handler, b""), "is not the published file of 156,816 bytes"),
    "other bytes": (lambda data, handler: send(handler, gzip.compress(bytes(156_816))), "is not the published file"),
    "bomb": (lambda data, handler: send(handler, gzip.compress(bytes(8 << 20))), "is not the published file"),
    "endless": (lambda data, handler: send(handler, bytes(1 << 20)), "more than 156,816 bytes"),
    "elsewhere: a local file": (lambda data, handler: redirect(handler, "file:///etc/hostname"), "is not allowed"),
    "elsewhere: in a circle": (lambda data, handler: redirect(handler, handler.path), "redirect"),
    "not http": (lambda data, handler: handler.wfile.write(b"SSH-2.0-x\r\n"), "SSH-2.0"),
}


@pytest.mark.parametrize("kind", BAD_ANSWERS)
def test_a_bad_answer_leaves_no_file(kind: str, tmp_path: Path, small: dict[str, bytes], serve) -> None:
    answer, word = BAD_ANSWERS[kind]
    mirror = serve(lambda name, handler: answer(small[name], handler))
    with pytest.raises(ValueError) as error:
        fetch_files(tmp_path / "new", debian=False)
    assert_one_line(error, word, mirror.url, *WAYS_OUT)
    assert names_in(tmp_path / "new") == set()


def trickle(name: str, handler: Handler) -> None:
    """One byte at a time, so that no single read ever waits for long."""
    send(handler, b"", 1_000_000)
    for _ in range(200):
        handler.wfile.write(b"\x1f")
        time.sleep(0.05)


def trickling_headers(name: str, handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(80):
        handler.wfile.write(f"X-{number}: 0\r\n".encode())
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (lambda name, handler: time.sleep(4), "no answer within 0.5 s|timed out"),
        (trickling_headers, "no answer within 0.5 s"),
        (trickle, "slower than 10,000 bytes per second"),
    ],
    ids=["silent", "headers that trickle", "content that trickles"],
)
def test_a_slow_mirror_is_abandoned(answer, word: str, tmp_path: Path, serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "PROBE_S", 0.5)
    serve(answer)
    start = time.monotonic()
    with pytest.raises(ValueError, match=word):
        fetch_files(tmp_path / "new", debian=False)
    assert time.monotonic() - start < 3


def test_a_name_look_up_that_hangs_is_abandoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "PROBE_S", 0.3)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(5))
    start = time.monotonic()
    with pytest.raises(ValueError, match="no answer within 0.3 s"):
        fetch_files(tmp_path / "new", mirrors=["http://mirror.invalid/"], debian=False)
    assert time.monotonic() - start < 3


def test_if_nothing_works_the_line_names_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    urls = (closed_port(), closed_port())
    monkeypatch.setattr(fetch, "MIRRORS", urls)
    start = time.monotonic()
    with pytest.raises(ValueError) as error:
        locate(fetch=True)
    assert time.monotonic() - start < 3
    assert_one_line(error, *urls, "refused", "apt-get is not installed", *WAYS_OUT)


def test_a_data_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(ValueError) as error:
        locate(fetch=True)
    folder = tmp_path / "data" / "FashionMNIST" / "raw"
    assert_one_line(error, f"Fashion-MNIST cannot be fetched into {folder}", "Not a directory")


# ---- kills, and several processes

CHILD = """
import os, sys
from pathlib import Path
from fmnist.data import fetch, find
fetch.MIRRORS, find.DEBIAN_FOLDER = (sys.argv[1],), Path("absent")
others = []
for _ in range(int(sys.argv[2]) - 1):
    others.append(os.fork())
    if others[-1] == 0:
        break
os.write(1, f"{find.locate(fetch=True)}\\n".encode())  # one write: lines of four processes must not mix
if 0 not in others:
    sys.exit(any(os.waitpid(other, 0)[1] for other in others))
"""


def start_child(url: str, processes: int) -> subprocess.Popen[str]:
    """Start processes that fetch into the working directory; forked from one, so that they start together."""
    command = [sys.executable, "-c", CHILD, url, str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_four_processes_fetch_once(tmp_path: Path, packed: dict[str, bytes], serve) -> None:
    def answer(name: str, handler: Handler) -> None:
        time.sleep(0.3)  # long enough for all four to be there
        send(handler, packed[name])

    mirror = serve(answer)
    child = start_child(mirror.url, processes=4)
    output, errors = child.communicate(timeout=120)
    folder = tmp_path / "data" / "FashionMNIST" / "raw"
    assert child.returncode == 0, errors
    assert output.split() == [str(folder)] * 4
    assert mirror.requests == [f"{name}.gz" for name in NAMES], "one process fetched, three found"
    assert names_in(folder) == set(NAMES)


def test_killed_in_the_middle_of_a_download(tmp_path: Path, packed: dict[str, bytes], serve) -> None:
    half_sent = threading.Event()

    def stall_once(name: str, handler: Handler) -> None:
        if name != TEST_IMAGES or half_sent.is_set():
            return send(handler, packed[name])
        send(handler, packed[name][:2_000_000], len(packed[name]))
        half_sent.set()
        time.sleep(5)

    mirror = serve(stall_once)
    child = start_child(mirror.url, processes=1)
    assert half_sent.wait(60)
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=10)
    folder = tmp_path / "data" / "FashionMNIST" / "raw"
    # Two files were complete and verified; they are not visible before all four are.
    assert names_in(folder) == {fetch.STAGING}
    assert locate(fetch=True) == folder
    assert names_in(folder) == set(NAMES)


def test_killed_between_two_renames(
    tmp_path: Path, small: dict[str, bytes], serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(lambda name, handler: send(handler, small[name]))
    replace_file = os.replace
    done: list[Path] = []

    def interrupted(source: Path, target: Path) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(target)
        replace_file(source, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", interrupted)
        locate(fetch=True)
    folder = tmp_path / "data" / "FashionMNIST" / "raw"
    assert names_in(folder) == {*NAMES[:2], fetch.STAGING}
    with pytest.raises(ValueError, match="only train.py fetches it"):
        locate()
    with pytest.raises(ValueError, match=f"data.root: {folder} lacks {NAMES[2]}, {NAMES[3]} "):
        locate(str(folder), fetch=True)  # named: read, never filled
    # Not named: the gap is the fetch's own, so it is filled and no error.
    assert locate(fetch=True) == folder
    assert names_in(folder) == set(NAMES)


# ---- the distribution's package


def test_the_real_package_is_downloaded_and_unpacked(tmp_path: Path) -> None:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        pytest.skip("no apt-get here: not a Debian")
    try:
        fetch_files(tmp_path / "new", mirrors=[closed_port()])
    except ValueError:
        here = subprocess.run(["apt-get", "download", fetch.DEBIAN_PACKAGE], cwd=tmp_path, capture_output=True)
        if here.returncode:
            pytest.skip("the distribution's mirror does not answer")
        raise
    assert names_in(tmp_path / "new") == set(NAMES)
    assert load("test", str(tmp_path / "new"))[0].shape == (10_000, 28, 28)


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
    is_root: bool, tmp_path: Path, small: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("dpkg-deb") is None:
        pytest.skip("no dpkg-deb here: not a Debian")
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: it\nVersion: 1\nArchitecture: all\nMaintainer: n\nDescription: d\n"
    )
    (tree / fetch.DEBIAN_FILES).mkdir(parents=True)
    for name, data in small.items():
        (tree / fetch.DEBIAN_FILES / f"{name}.gz").write_bytes(data)
    package, log = tmp_path / "it.deb", tmp_path / "log"
    subprocess.run(["dpkg-deb", "-Znone", "--build", tree, package], check=True, capture_output=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "apt-get").write_text(APT_GET.format(log=log, package=package))
    (tmp_path / "bin" / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "geteuid", lambda: 0 if is_root else 1000)
    if is_root:
        fetch_files(tmp_path / "new", mirrors=[])
        assert names_in(tmp_path / "new") == set(NAMES)
    else:
        with pytest.raises(ValueError) as error:
            fetch_files(tmp_path / "new", mirrors=[])
        assert_one_line(error, "Unable to locate package", *WAYS_OUT)
    calls = [line.split()[-2:] for line in log.read_text().splitlines()]
    assert [call[-1] for call in calls] == [fetch.DEBIAN_PACKAGE, "update", fetch.DEBIAN_PACKAGE][: 3 if is_root else 1]
