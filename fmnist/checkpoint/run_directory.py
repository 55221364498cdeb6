"""The run directory: may it be used, is it finished."""

import errno
import logging
import os
import platform
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from fmnist.config.parse import load_config
from fmnist.config.same_run import differences
from fmnist.config.schema import Config
from fmnist.runtime.files import read_json

logger = logging.getLogger("fmnist")
SUMMARY = "summary.json"
# Everything a run writes into its directory; nothing else there is ever touched.
RUN_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "checkpoints",
    "model.safetensors",
    SUMMARY,
    "train.log",
    "learning_curves.png",
    "features",
    "profile",
    "evaluation",
    "wandb",
    "wandb_run_id",
    "REQUEUE",
    "non_finite_step_*.png",
)
LOCK, LOCK_WAIT_S = ".lock", 5.0
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)  # of a file system without them


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
            raise ValueError(f"output_dir {directory} holds {present[0]} but no config.yaml: no run to resume")
        if changed := differences(load_config(directory / "config.yaml"), cfg):
            raise ValueError(
                f"{directory} holds a run with another config: {'; '.join(changed[:3])}. "
                "Give another --output_dir, or --resume never --overwrite true"
            )
    return directory


def has_run(directory: Path) -> bool:
    """Say whether a run has begun in this directory."""
    return (directory / "config.yaml").exists()


def lock_directory(directory: Path) -> BaseFileLock:
    """Lock a run directory until this process ends, however it ends: the kernel lets go of an flock.

    It holds between the machines of a network file system too where that passes flock on, as NFS on Linux does; after a
    machine's crash until the server gives its lock up (NFSv4: about 90 s). Where there is no flock, a warning says so.
    Where a mount keeps it to one machine (Lustre's localflock), two machines do not see each other.

    Raises:
        ValueError: another process holds it after a few seconds, or the directory cannot be written.
    """
    path = directory / LOCK
    try:
        with suppress(FileExistsError):
            path.open("xb").close()  # so that its mode follows the umask, and colleagues of a group can take it
        # one that was just killed may not be gone yet
        lock = FileLock(path, timeout=LOCK_WAIT_S, mode=path.lstat().st_mode & 0o777)
        lock.acquire()
    except Timeout:
        holder = path.read_text(errors="replace")[:200].strip()
        raise ValueError(f"output_dir {directory} is in use by another process ({holder})") from None
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ValueError(f"output_dir {directory} cannot be written: {error.strerror}") from None
        if error.errno not in NO_LOCKS:
            raise
        logger.warning("%s cannot be locked (%s): make sure that no second run writes here", path, error.strerror)
        return lock
    if isinstance(lock, SoftFileLock):  # filelock's own, where there is no flock: its content is the lock
        logger.warning("%s: no flock here; a lock file stands in for it", directory)
    else:
        path.write_text(f"host {platform.node()}, process {os.getpid()}\n")
    return lock


def read_summary(directory: Path) -> dict[str, Any]:
    """Return what summary.json holds; empty where there is none, or it is no summary."""
    try:
        return read_json(directory / SUMMARY)
    except ValueError:
        return {}


def is_finished(directory: Path, *, test: bool) -> bool:
    """Say whether the run in this directory has reached its end, and tell people so.

    Args:
        directory: of the run.
        test: the test images belong to it: a run that left them out is then not finished yet.
    """
    summary = read_summary(directory)
    top1 = summary.get("test.top1")
    if summary.get("status") != "finished" or (test and top1 is None):
        return False
    evaluated = f"test top1 {100 * top1:.2f} %" if isinstance(top1, int | float) else "it names no test accuracy"
    logger.info("%s is finished: %s", directory, "the test images were not evaluated" if top1 is None else evaluated)
    return True


def clear_directory(directory: Path) -> None:
    """Delete a run's files, and nothing else."""
    for path in [path for name in RUN_FILES for path in directory.glob(name)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
