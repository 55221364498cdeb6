"""The run directory: may it be used, is it finished, what made it."""

import errno
import fcntl
import json
import logging
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path

import accelerate
import timm
import torch

from fmnist.config import Config
from fmnist.options import load_config
from fmnist.recipe import differences

logger = logging.getLogger("fmnist")
# Everything a run writes into its directory; nothing else there is ever touched.
RUN_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "checkpoints",
    "model.safetensors",
    "summary.json",
    "train.log",
    "learning_curves.png",
    "evaluation",
    "wandb",
    "wandb_run_id",
    "REQUEUE",
    "non_finite_step_*.png",
)
LOCK, LOCK_WAIT_S = ".lock", 5.0


def open_directory(cfg: Config) -> Path:
    """Check that the run directory may be used, before anything is built or written.

    Raises:
        ValueError: it holds another run, or files that a run would overwrite.
    """
    directory = Path(cfg.output_dir or "runs/run")
    present = [path.name for name in RUN_FILES for path in directory.glob(name)]
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"output_dir {directory} is a file")
    if cfg.resume == "never" and not cfg.overwrite and any(path.name != LOCK for path in directory.glob("*")):
        raise ValueError(f"output_dir {directory} is not empty; add --overwrite true to delete the run in it")
    if cfg.resume == "auto" and present:
        if "config.yaml" not in present:
            raise ValueError(f"output_dir {directory} holds {present[0]} but no config.yaml: not a run to go on with")
        if changed := differences(load_config(directory / "config.yaml"), cfg):
            raise ValueError(
                f"{directory} holds a run with another config: {'; '.join(changed[:3])}. "
                "Give another --output_dir, or --resume never --overwrite true"
            )
    return directory


def has_run(directory: Path) -> bool:
    """Say whether a run has begun in this directory."""
    return (directory / "config.yaml").exists()


def lock_directory(directory: Path) -> int:
    """Lock a run directory until this process ends, however it ends: the kernel lets go of an flock.

    It holds between the machines of a network file system too where that passes flock on, as NFS on Linux does; after a
    machine's crash until the server gives its lock up (NFSv4: about 90 s). Where there is no flock, it is said. Where a
    mount keeps it to one machine (Lustre's localflock), two machines do not see each other.

    Returns:
        The file descriptor that holds the lock.

    Raises:
        ValueError: another process holds it after a few seconds, or the directory cannot be written.
    """
    path = directory / LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ValueError(f"output_dir {directory} cannot be written: {error.strerror}") from None
        raise
    deadline = time.monotonic() + LOCK_WAIT_S  # one that was just killed may not be gone yet
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            raise ValueError(f"output_dir {directory} is in use by another process ({holder})") from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s): see to it that no second run writes here", path, error.strerror)
            break
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"host {platform.node()}, process {os.getpid()}\n".encode())
    return descriptor


def is_finished(directory: Path, *, test: bool) -> bool:
    """Say whether the run in this directory has reached its end, and tell people so.

    Args:
        directory: of the run.
        test: the test images belong to it: a run that left them out is then not finished yet.
    """
    try:
        summary = json.loads((directory / "summary.json").read_bytes())
    except (OSError, ValueError):
        return False
    top1 = summary.get("test.top1")
    if summary.get("status") != "finished" or (test and top1 is None):
        return False
    outcome = "the test images were not evaluated" if top1 is None else f"test top1 {100 * top1:.2f} %"
    logger.info("%s is finished: %s", directory, outcome)
    return True


def clear_directory(directory: Path) -> None:
    """Delete a run's files, and nothing else."""
    for path in [path for name in RUN_FILES for path in directory.glob(name)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "accelerate": accelerate.__version__,
    }


def git_revision() -> str:
    """Return the commit of the code, with -dirty where it was changed, or unknown."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
