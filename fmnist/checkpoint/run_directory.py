"""The run directory: may it be used, is it finished, is it locked."""

import errno
import logging
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from fmnist.checkpoint.contents import MODEL
from fmnist.config import strict_yaml
from fmnist.config.parse import load_config
from fmnist.config.same_run import changes, differences, is_run_yaml, lengthened, listed, recipe
from fmnist.config.schema import Config
from fmnist.runtime.files import read_json
from fmnist.runtime.ownership import (
    CONFIG,
    RUN_FILES,
    check_place,
    check_writable,
    foreign_file,
    listing,
    run_around,
    run_files,
)

logger = logging.getLogger("fmnist")
SUMMARY = "summary.json"
LOCK, LOCK_WAIT_S = ".lock", 5.0
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)  # of a file system without them


def open_directory(cfg: Config) -> Path:
    """Check that the run directory may be used, before anything is built or written.

    Raises:
        ValueError: it cannot be written, holds another run, files that a run would overwrite, or a link that would
            lead a run's files out of it; with `overwrite`, anything that is not provably a run's.
    """
    directory = Path(cfg.output_dir or "runs/run")
    try:
        if cfg.dry_run or has_run(directory):  # which may be finished, on a read-only disk
            check_place(directory)
        else:
            check_writable(directory, "--output_dir")
    except ValueError as error:
        raise ValueError(f"output_dir: {error}") from None
    names = listing(directory)
    for path in (directory / name for name in (LOCK, *run_files(directory), "evaluation/test", "profile/trace.json")):
        if path.is_symlink() and path.name != "wandb":  # the client's files, which people keep on another disk
            raise ValueError(
                f"{path} is a link: a run writes inside its directory only; output_dir itself may be a link"
            )
        if path.exists() and not path.is_file() and not path.is_dir():  # opening a pipe would wait without end
            raise ValueError(f"{path} is a pipe or a device, not a file of a run")
    outer = run_around(directory)
    if outer is not None and directory.resolve().relative_to(outer).parts[0] in RUN_FILES:
        raise ValueError(f"output_dir {directory} lies among the files of the run in {outer}")
    if cfg.overwrite:
        _check_ours(directory, names)
    elif cfg.resume == "never":
        if names:
            raise ValueError(f"output_dir {directory} is not empty; add --overwrite true to delete the run in it")
    elif present := run_files(directory):
        if CONFIG not in present:
            raise ValueError(f"output_dir {directory} holds {present[0]} but no config.yaml: no run to resume")
        before, after = recipe(_run_config(directory)), recipe(cfg)
        only_longer = not changes(lengthened(before, after), after)
        if (changed := changes(before, after)) and not (
            only_longer and read_summary(directory).get("status") == "finished"
        ):
            way_out = "Give another --output_dir, or --resume never --overwrite true"
            if only_longer:
                way_out = (
                    "Only a finished run can be extended: finish it with its original command, then raise the length"
                )
            raise ValueError(f"{directory} holds a run with another config: {listed(changed)}. {way_out}")
    return directory


def _run_config(directory: Path) -> Config:
    """Read the config.yaml of a run; one that somebody wrote by hand is not replaced by a run's."""
    cfg = load_config(directory / CONFIG)
    if not is_run_yaml(strict_yaml.load_file(directory / CONFIG)):
        raise ValueError(f"{directory / CONFIG} was not written by a run: some sections are not in it")
    return cfg


def _check_ours(directory: Path, names: list[str]) -> None:
    """Refuse to overwrite what is not provably a run: an empty directory, or a run's config.yaml and its files."""
    if not names:
        return
    try:
        _run_config(directory)
    except ValueError as error:
        found = foreign_file(directory) or directory / names[0]
        raise ValueError(
            f"overwrite is true, but output_dir {directory} is not a run ({error}) and holds {found}; nothing was "
            "deleted: give another --output_dir"
        ) from None
    if (foreign := foreign_file(directory)) is not None:
        raise ValueError(
            f"overwrite is true, but {foreign} was not written by the run; nothing was deleted: move it away, "
            "or give another --output_dir"
        )


def same_recipe(directory: Path, cfg: Config) -> bool:
    """Say whether the run in a directory has the options that a config asks for."""
    return has_run(directory) and not differences(load_config(directory / CONFIG), cfg)


def has_run(directory: Path) -> bool:
    """Say whether a run has begun in this directory."""
    return (directory / CONFIG).exists()


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
        mode = -1  # filelock's own choice
        if not issubclass(FileLock, SoftFileLock):  # of which a file that is there is a lock that is held
            with suppress(FileExistsError):
                path.open("xb").close()  # so that its mode follows the umask, and colleagues of a group can take it
            mode = path.lstat().st_mode & 0o777
        lock = FileLock(path, timeout=LOCK_WAIT_S, mode=mode)  # one that was just killed may not be gone yet
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


def holder(directory: Path) -> str | None:
    """Return what the lock of a directory says of the process that holds it; None where that cannot be read."""
    try:
        return (directory / LOCK).read_text(errors="replace")
    except OSError:
        return None


def check_still_held(directory: Path, was: str | None) -> None:
    """Refuse to write on in a directory that is not the one that was locked: another may be training there by now.

    Args:
        directory: of the run.
        was: its `holder`, right after it was locked.

    Raises:
        OSError: it was moved, deleted or replaced.
    """
    now = holder(directory)
    if now == was or (now is None and has_run(directory)):  # the lock alone was deleted
        return
    what = "was moved or deleted" if now is None else f"was replaced, and is in use by another process ({now.strip()})"
    raise OSError(f"{directory} {what} while this run wrote to it: nothing more is saved there")


def read_summary(directory: Path) -> dict[str, Any]:
    """Return what summary.json holds; empty where there is none, or, with a warning, where it is no summary."""
    if not os.path.lexists(directory / SUMMARY):
        return {}
    try:
        return read_json(directory / SUMMARY)
    except ValueError as error:
        logger.warning("%s", error)
        return {}


def is_finished(directory: Path, *, test: bool, total_steps: int, length: str | None = "schedule.epochs") -> bool:
    """Say whether the run in this directory has reached its end and has its weights, and tell people so.

    Args:
        directory: of the run.
        test: the test images, where there are any, belong to it: a run that left them out is then not finished yet.
        total_steps: its end; one that came to an earlier end is continued.
        length: the option that makes it longer; None where a clock found its end.
    """
    summary = read_summary(directory)
    top1, steps = summary.get("test.top1"), summary.get("steps")
    no_test = summary.get("test.num_images") == 0
    if summary.get("status") != "finished" or (test and top1 is None and not no_test):
        return False
    if isinstance(steps, int) and steps < total_steps:
        return False
    if not (directory / MODEL).is_file():
        logger.warning("%s is lost: it is made again from the checkpoints", directory / MODEL)
        return False
    evaluated = "the test images were not evaluated" if top1 is None else "summary.json has no valid test accuracy"
    evaluated = "its data set has no test images" if no_test else evaluated
    if isinstance(top1, int | float):
        evaluated = f"test top1 {100 * top1:.2f} %"
    again = "to train again, give another --output_dir or --resume never --overwrite true"
    longer = f"to train longer, raise --{length}; " if length else ""
    logger.info("%s is finished: %s; %s%s", directory, evaluated, longer, again)
    return True
