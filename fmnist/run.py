"""A training run: compute, and beside it a directory with its lock, signals and trackers."""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import BaseFileLock

from fmnist.checkpoint.fingerprint import keep_fingerprint
from fmnist.checkpoint.run_directory import (
    SUMMARY,
    check_still_held,
    has_run,
    holder,
    lock_directory,
    read_summary,
)
from fmnist.config.same_run import run_yaml
from fmnist.config.schema import Config, flatten
from fmnist.runtime import interrupts
from fmnist.runtime.background import Background
from fmnist.runtime.compute import Compute
from fmnist.runtime.console import log_to_file, stop_logging_to
from fmnist.runtime.files import write_atomic, write_json
from fmnist.runtime.launcher import announce
from fmnist.runtime.ownership import delete_run_files
from fmnist.runtime.stop_vote import StopVote
from fmnist.tracking.progress import Progress
from fmnist.tracking.tracker import NullTracker, Tracker

logger = logging.getLogger("fmnist")
TRAIN_LOG = "train.log"


class Run(Compute):
    """One process's view of a training run.

    Attributes:
        cfg: every option.
        directory: the run directory.
        clock, began: seconds, and when by them the program, or in a notebook this run, began.
        fingerprint: of data and weights, see checkpoint/fingerprint.py; `build` fills it in.
        kept: further files of JSON that the run keeps, by name; likewise.
        should_stop: say, after a step, whether a signal or the time limit asks for a stop; all processes answer alike.
        writing: the checkpoint that is being written beside the steps; where that fails, a stop is asked for.

    Args:
        cfg: every option.
        directory: the run directory.
    """

    def __init__(self, cfg: Config, directory: Path) -> None:
        super().__init__(precision=cfg.model.precision, shards=cfg.exact, seed=cfg.seed, threads=cfg.threads)
        self.cfg, self.directory = cfg, directory
        self.clock = time.monotonic
        self.began = interrupts.began or self.clock()
        self.fingerprint: dict[str, str] = {}
        self.kept: dict[str, Mapping[str, Any]] = {}
        self.should_stop = StopVote(
            self.control, max_minutes=cfg.max_minutes, timeout_s=cfg.timeout_s, heartbeat=self.heartbeat
        )
        self.writing = Background(self.should_stop.give_up)
        self.tracker: NullTracker = NullTracker()
        self.steps_per_epoch = 1
        self._lock: BaseFileLock | None = None
        self._holder: str | None = None
        self._log: logging.Handler | None = None

    def claim(self) -> None:
        """Lock the run directory, before anything in it is read, against a second process that would write it too.

        Raises:
            ValueError: another process holds it.
        """
        self.on_main(self._claim)

    def _claim(self) -> None:
        if self._lock is None and self.directory.is_dir():
            self._lock = lock_directory(self.directory)
            self._holder = holder(self.directory)
            if has_run(self.directory) and not self.cfg.overwrite:
                self._open_log()  # now: what it resumes from stands there too

    def _open_log(self) -> None:
        if self._log is None:
            self._log = log_to_file(self.directory / TRAIN_LOG)

    def start(self, progress: Progress, opening: Sequence[str]) -> None:
        """Write config.yaml and open train.log and the trackers, on the main process; then listen to signals.

        Args:
            progress: where the run stands.
            opening: lines that say what is about to be trained.
        """
        self.steps_per_epoch = progress.steps_per_epoch
        self.join()  # every process has read the directory as it was
        self.on_main(self._open, progress, opening)
        self.should_stop.watch_signals()

    def _open(self, progress: Progress, opening: Sequence[str]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self._claim()
            if has_run(self.directory):
                raise ValueError(f"output_dir {self.directory}: another process began a run here; start again")
        if self.cfg.overwrite and progress.step() == 0:  # else the run goes on that this command began
            delete_run_files(self.directory)
        (self.directory / "REQUEUE").unlink(missing_ok=True)
        write_atomic(self.directory / "config.yaml", run_yaml(self.cfg))
        keep_fingerprint(self.fingerprint, self.directory)
        for name, content in self.kept.items():
            write_json(self.directory / name, content)
        if (summary := read_summary(self.directory)).get("status") == "finished":  # it goes on beyond its end
            write_json(self.directory / SUMMARY, summary | {"status": "stopped"})
        self._open_log()
        for line in opening:
            logger.info("%s", line)
        announce()
        self.tracker = Tracker(self.directory, self.cfg.log, flatten(self.cfg), progress)

    def wait_for_save(self) -> None:
        """Wait until the last checkpoint is on the disk and the directory is still the run's; all processes call it.

        Raises:
            OSError: on the main process: it could not be written, or the directory is gone; the others end with it.
        """
        self.on_main(self._wait_for_save)

    def _wait_for_save(self) -> None:
        try:
            self.writing.wait()
        finally:  # where the directory is gone, that is why nothing could be written
            check_still_held(self.directory, self._holder)

    def log(self, prefix: str, scalars: Mapping[str, float], step: int) -> None:
        """Hand scalars to the tracker, with the time spent so far; silent on all processes but the main one."""
        if scalars:
            spent = {"elapsed_seconds": self.clock() - self.began, "processor_seconds": time.process_time()}
            scalars = {**scalars, **spent}
        self.tracker.log(prefix, scalars, step, step / self.steps_per_epoch)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json (and REQUEUE after a stop), and close the trackers."""
        self.should_stop.last()
        self.on_main(self._conclude, summary)

    def _conclude(self, summary: Mapping[str, Any]) -> None:
        write_json(self.directory / SUMMARY, summary)
        if summary["status"] == "stopped":
            write_atomic(self.directory / "REQUEUE", "continue with the same command\n")
        self.tracker.finish(summary)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end_if_lost(error)
        try:
            self.writing.wait()
        except OSError as unwritten:  # a write that failed is told even where another error ends the run
            logger.error("a checkpoint could not be written: %s", unwritten)
        finally:
            self.writing.join()  # before the lock goes, whatever interrupts the wait
            super().__exit__(kind, error, at)

    def close(self) -> None:
        """Put the signal handlers back, let go of the directory, and close the trackers and what `Compute` opened."""
        self.should_stop.restore_signals()
        self.tracker.finish(None)  # after an error; else it is closed already
        super().close()
        if self._log is not None:
            stop_logging_to(self._log)
            self._log = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None
