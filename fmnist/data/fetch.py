"""Fetch Fashion-MNIST from torchvision's mirrors, then from Debian's package; keep only the published bytes."""

import functools
import gzip
import hashlib
import io
import logging
import os
import shutil
import subprocess
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from fmnist.runtime.console import one_line
from fmnist.runtime.environment import inherited
from fmnist.runtime.files import CHUNK_BYTES, read_at_most
from fmnist.runtime.probe import URL_ERRORS, open_url

logger = logging.getLogger("fmnist")

# Size and sha256 of the decompressed files, so repacked gzip headers (Debian's) make no difference. The mirrors may be
# plain http, because no file that differs from these is kept.
PUBLISHED = {
    "train-images-idx3-ubyte": (47_040_016, "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
    "train-labels-idx1-ubyte": (60_008, "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    "t10k-images-idx3-ubyte": (7_840_016, "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
    "t10k-labels-idx1-ubyte": (10_008, "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
}
MIRRORS = ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",)  # torchvision's, without its slow import
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FILES = "usr/share/datasets/fashion-mnist"  # inside the package
DEBIAN_FOLDER = Path("/") / DEBIAN_FILES
STAGING = ".fetching"  # a folder that holds this is being filled, or the fetch into it was killed

PROBE_S = 10.0  # longest wait for an unreachable or silent mirror
MIN_BYTES_PER_S = 10_000  # a slower mirror is abandoned
APT_TIMEOUT_S = 600.0
LOCK_TIMEOUT_S = 3600.0
# What a bad server, a bad file or a failing command raises.
SOURCE_ERRORS = (*URL_ERRORS, EOFError, zlib.error, subprocess.SubprocessError)


def find_file(folder: Path, name: str) -> Path | None:
    """Return the path of one of the four files in `folder`, plain or .gz, or None.

    Args:
        folder: holds the files, or as Kaggle's archive unpacks a folder for each: `NAME/NAME`.
        name: the published name; `train-images.idx3-ubyte`, as some tools unpack it, is found too.
    """
    names = (name, name.replace("-idx", ".idx"))
    places = (folder, *(folder / part for part in names))
    paths = (place / f"{spelled}{suffix}" for place in places for spelled in names for suffix in ("", ".gz"))
    return next((path for path in paths if path.is_file()), None)


def missing_files(folder: Path) -> list[str]:
    """Return the names of the published files that `folder` lacks."""
    return [name for name in PUBLISHED if find_file(folder, name) is None]


def fetch_files(target: Path, *, mirrors: Sequence[str] | None = None, debian: bool = True) -> None:
    """Fill the folder `target` with the four published files, decompressed; wait while another process does so.

    Each file appears under its name complete and verified, or not at all.

    Args:
        target: The folder to fill; created if absent.
        mirrors: URLs of the folders of the .gz files, tried in order; default MIRRORS.
        debian: Try Debian's package last.

    Raises:
        ValueError: If every source fails; one line with what was tried and how to go on.
        OSError: If `target` cannot be written.
    """
    target.mkdir(parents=True, exist_ok=True)
    staging = target / STAGING
    with FileLock(target / ".lock", timeout=LOCK_TIMEOUT_S):
        if not missing_files(target):
            return
        staging.mkdir(exist_ok=True)
        try:
            _stage(staging, MIRRORS if mirrors is None else mirrors, debian=debian)
            for name in PUBLISHED:
                os.replace(staging / name, target / name)
        finally:
            # Killed between two renames, the folder stays: it tells the next start to fill the gap.
            if len(missing_files(target)) in (0, len(PUBLISHED)):
                shutil.rmtree(staging, ignore_errors=True)


def _stage(staging: Path, mirrors: Sequence[str], *, debian: bool) -> None:
    sources: list[tuple[str, Callable[[Path], None]]]
    sources = [(mirror, functools.partial(_from_mirror, mirror)) for mirror in mirrors]
    if debian:
        sources.append((f"apt-get download {DEBIAN_PACKAGE}", _from_debian))
    reasons = []
    for label, source in sources:
        logger.info("fetching Fashion-MNIST: %s", label)
        try:
            return source(staging)
        except SOURCE_ERRORS as error:
            reasons.append(f"{label} ({one_line(error)})")
            logger.info("failed: %s", reasons[-1])
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


def _download(url: str, cap: int) -> bytes:
    body = bytearray()
    start = time.monotonic()
    with open_url(url, PROBE_S) as response:
        total = int(response.headers.get("Content-Length") or 0) or None
        # disable=None: no bar if stderr is not a terminal
        with tqdm(total=total, unit="B", unit_scale=True, desc=url.rpartition("/")[2], disable=None) as bar:
            # read1 returns the bytes of one recv; read would wait for a whole piece, however slowly it arrives.
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
    folder = _unpack_debian_package(staging / "apt")
    for name in PUBLISHED:
        path = find_file(folder, name)
        if path is None:
            raise ValueError(f"{DEBIAN_PACKAGE} holds no {name}")
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as stream:
            _keep(staging, name, stream)


def _unpack_debian_package(folder: Path) -> Path:
    """Download and unpack the package, which needs no root rights; return the folder of its files."""
    shutil.rmtree(folder, ignore_errors=True)  # left by a killed fetch
    folder.mkdir()
    options = ["-o", f"Acquire::http::Timeout={PROBE_S:.0f}", "-o", "Acquire::Retries=1"]
    download = ["apt-get", *options, "download", DEBIAN_PACKAGE]
    try:
        _run(download, folder)
    except ValueError as error:
        # Container images often ship without package lists, or with stale ones that name files since replaced.
        signs = ("Unable to locate package", "Can't find a source", "no installation candidate", "404")
        if getattr(os, "geteuid", int)() != 0 or not any(sign in str(error) for sign in signs):
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
    environment = inherited(LC_ALL="C", DEBIAN_FRONTEND="noninteractive")
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
