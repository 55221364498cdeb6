"""Fetch Fashion-MNIST: torchvision's mirrors, then Debian's package; only the published bytes are kept."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import logging
import os
import queue
import shutil
import subprocess
import threading
import time
import urllib.request
import zlib
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm import tqdm

from fmnist.data.idx import CHUNK_BYTES, read_at_most

logger = logging.getLogger("fmnist")

# Size and sha256 of the decompressed files: repacked gzip headers (Debian's) then make no difference, and the
# mirrors may be plain http, because nothing that differs from these is ever kept.
PUBLISHED = {
    "train-images-idx3-ubyte": (
        47_040_016,
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ),
    "train-labels-idx1-ubyte": (60_008, "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    "t10k-images-idx3-ubyte": (7_840_016, "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
    "t10k-labels-idx1-ubyte": (10_008, "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
}
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FILES = "usr/share/datasets/fashion-mnist"  # inside the package
DEBIAN_FOLDER = Path("/") / DEBIAN_FILES
STAGING = ".fetching"  # its presence in a folder says that a fetch is under way there, or was killed

PROBE_S = 10.0  # an unreachable or silent mirror costs this much at most
MIN_BYTES_PER_S = 10_000  # a mirror slower than this is given up
APT_TIMEOUT_S = 600.0
LOCK_TIMEOUT_S = 3600.0
# What reading a bad file or asking a bad server can raise.
READ_ERRORS = (OSError, EOFError, zlib.error, ValueError, HTTPException, subprocess.SubprocessError)


def find_file(folder: Path, name: str) -> Path | None:
    """Return the path of one of the four files in `folder`, plain before .gz, or None."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def missing_files(folder: Path) -> list[str]:
    """Return the names of those of the four files that `folder` lacks."""
    return [name for name in PUBLISHED if find_file(folder, name) is None]


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, of at most 300 characters."""
    text = " ".join(str(error).split())[:300]
    return text or type(error).__name__


def fetch(target: Path) -> None:
    """Fill the folder `target` with the four published files, decompressed; wait if another process does.

    Each file appears under its name complete and verified, or not at all.

    Args:
        target: The folder to fill; made where it is absent.

    Raises:
        ValueError: If no source could give the data; one line that says what was tried and the ways out.
        OSError: If `target` cannot be written.
    """
    target.mkdir(parents=True, exist_ok=True)
    staging = target / STAGING
    with FileLock(target / ".lock", timeout=LOCK_TIMEOUT_S):
        if not missing_files(target):
            return
        staging.mkdir(exist_ok=True)
        try:
            _stage(staging)
            for name in PUBLISHED:
                os.replace(staging / name, target / name)
        finally:
            # Between two renames the folder stays: it tells the next start that the gap is ours to fill.
            if len(missing_files(target)) in (0, len(PUBLISHED)):
                shutil.rmtree(staging, ignore_errors=True)


def _stage(staging: Path) -> None:
    from torchvision.datasets import FashionMNIST  # late: its import takes longer than finding the files

    sources: list[tuple[str, Callable[[Path], None]]]
    sources = [(mirror, functools.partial(_from_mirror, mirror)) for mirror in FashionMNIST.mirrors]
    sources.append((f"apt-get download {DEBIAN_PACKAGE}", _from_debian))
    reasons = []
    for label, source in sources:
        logger.info("fetching Fashion-MNIST: %s", label)
        try:
            return source(staging)
        except READ_ERRORS as error:
            reasons.append(f"{label} ({one_line(error)})")
            logger.info("not from there: %s", reasons[-1])
    raise ValueError(
        f"Fashion-MNIST could not be fetched into {staging.parent}; tried {'; '.join(reasons)}. Put the four "
        f"files in a folder and pass --data.root FOLDER, or run: apt-get install {DEBIAN_PACKAGE}"
    )


def _keep(staging: Path, name: str, stream: io.BufferedIOBase) -> None:
    num_bytes, sha256 = PUBLISHED[name]
    data = read_at_most(stream, num_bytes)
    if len(data) != num_bytes or hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{name} is not the published file of {num_bytes:,} bytes, sha256 {sha256[:8]}...")
    with open(staging / name, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _from_mirror(mirror: str, staging: Path) -> None:
    for name, (num_bytes, _) in PUBLISHED.items():
        # No .gz of these is longer than what it holds, so the decompressed size caps the download too.
        packed = _download(f"{mirror.rstrip('/')}/{name}.gz", cap=num_bytes)
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as stream:
            _keep(staging, name, stream)


def _open(url: str) -> Any:
    # In a thread, because a name lookup and headers that trickle in obey no socket timeout.
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(urllib.request.urlopen(url, timeout=PROBE_S))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=PROBE_S)
    except queue.Empty:
        raise TimeoutError(f"no answer within {PROBE_S:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _download(url: str, cap: int) -> bytes:
    body = bytearray()
    start = time.monotonic()
    with _open(url) as response:
        total = int(response.headers.get("Content-Length") or 0) or None
        # disable=None: no bar where stderr is not a terminal.
        with tqdm(total=total, unit="B", unit_scale=True, desc=url.rpartition("/")[2], disable=None) as bar:
            # read1 returns what one recv brought; read would wait for a whole piece, however slowly it comes.
            while piece := response.read1(CHUNK_BYTES):
                body += piece
                bar.update(len(piece))
                elapsed = time.monotonic() - start
                if len(body) > cap:
                    raise ValueError(f"more than {cap:,} bytes")
                if elapsed > PROBE_S and len(body) < MIN_BYTES_PER_S * elapsed:
                    raise TimeoutError(f"slower than {MIN_BYTES_PER_S:,} bytes per second")
    return bytes(body)


def _from_debian(staging: Path) -> None:
    # The installed package fills a given root too: so the advice to install it holds.
    folder = _unpack_debian_package(staging / "apt") if missing_files(DEBIAN_FOLDER) else DEBIAN_FOLDER
    for name in PUBLISHED:
        path = find_file(folder, name)
        if path is None:
            raise ValueError(f"{DEBIAN_PACKAGE} holds no {name}")
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as stream:
            _keep(staging, name, stream)


def _unpack_debian_package(folder: Path) -> Path:
    """Download the package without installing it, which needs no root; return the folder of its files."""
    shutil.rmtree(folder, ignore_errors=True)  # what a killed fetch left
    folder.mkdir()
    options = ["-o", f"Acquire::http::Timeout={PROBE_S:.0f}", "-o", "Acquire::Retries=1"]
    download = ["apt-get", *options, "download", DEBIAN_PACKAGE]
    try:
        _run(download, folder)
    except ValueError as error:
        # Images are often shipped without package lists, or with old ones that name files since replaced.
        signs = ("Unable to locate package", "Can't find a source", "no installation candidate", "404")
        if os.geteuid() != 0 or not any(sign in str(error) for sign in signs):
            raise
        _run(["apt-get", *options, "update"], folder)
        _run(download, folder)
    packages = list(folder.glob("*.deb"))
    if len(packages) != 1:
        raise ValueError(f"apt-get left {len(packages)} packages, expected 1")
    unpacked = folder / "unpacked"
    _run(["dpkg-deb", "-x", str(packages[0]), str(unpacked)], folder)
    return unpacked / DEBIAN_FILES


def _run(command: list[str], folder: Path) -> None:
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, timeout=APT_TIMEOUT_S, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, errors="replace",
        )  # fmt: skip
    except FileNotFoundError:
        raise ValueError(f"{command[0]} is not installed") from None
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("E:")] or [done.stderr[-200:]]
        raise ValueError(f"status {done.returncode}: {' '.join(errors)}")
