"""A training run: compute, and beside it a directory with its lock, signals and trackers."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import BaseFileLock

from fmnist.checkpoint.run_directory import SUMMARY, clear_directory, has_run, lock_directory
from fmnist.config.schema import Config, flatten, to_yaml
from fmnist.runtime.compute import Compute
from fmnist.runtime.console import counted, log_to_file
from fmnist.runtime.files import write_atomic
from fmnist.runtime.launcher import announce
from fmnist.runtime.stop_vote import StopVote
from fmnist.tracking.tracker import NullTracker, Tracker

logger = logging.getLogger("fmnist")


class Run(Compute):
    """One process's view of a training run.

    Attributes:
        cfg: every option.
        directory: the run directory.
        should_stop: say, after a step, whether a signal or the time limit asks for a stop; all processes answer alike.

    Args:
        cfg: every option.
        directory: the run directory.
    """

    def __init__(self, cfg: Config, directory: Path) -> None:
        super().__init__(precision=cfg.model.precision, shards=cfg.exact, seed=cfg.seed)
        self.cfg, self.directory = cfg, directory
        self.should_stop = StopVote(
            self.control, max_minutes=cfg.max_minutes, timeout_s=cfg.timeout_s, heartbeat=self.heartbeat
        )
        self.tracker: NullTracker = NullTracker()
        self.steps_per_epoch = 1
        self._lock: BaseFileLock | None = None

    def claim(self) -> None:
        """Lock the run directory, before anything in it is read, against a second process that would write it too.

        Raises:
            ValueError: another process holds it.
        """
        self.on_main(self._claim)

    def _claim(self) -> None:
        if self._lock is None and self.directory.is_dir():
            self._lock = lock_directory(self.directory)

    def start(self, step: int, total_steps: int, steps_per_epoch: int) -> None:
        """Write config.yaml and open train.log and the trackers, on the main process; then listen to signals.

        Args:
            step: completed updates.
            total_steps: of the whole run.
            steps_per_epoch: turn a step into an epoch where numbers are logged.
        """
        self.steps_per_epoch = steps_per_epoch
        self.join()  # every process has read the directory as it was
        self.on_main(self._open, step, total_steps)
        processes = counted(self.world_size, "process", "processes")
        logger.info("training on %s: %s, %s", self.device_name, processes, self.precision)
        self.should_stop.watch_signals()

    def _open(self, step: int, total_steps: int) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self._claim()
            if has_run(self.directory):
                raise ValueError(f"output_dir {self.directory}: another process began a run here; start again")
        if self.cfg.overwrite:
            clear_directory(self.directory)
        (self.directory / "REQUEUE").unlink(missing_ok=True)
        write_atomic(self.directory / "config.yaml", to_yaml(self.cfg))
        log_to_file(self.directory / "train.log")
        announce()
        self.tracker = Tracker(self.directory, self.cfg.log, flatten(self.cfg), step=step, total_steps=total_steps)

    def log(self, prefix: str, scalars: Mapping[str, float], step: int) -> None:
        """Hand scalars to the tracker, if there are any; silent on all processes but the main one."""
        if scalars:
            self.tracker.log(prefix, scalars, step, step / self.steps_per_epoch)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json (and REQUEUE after a stop), and close the trackers."""
        self.should_stop.last()
        self.on_main(self._conclude, summary)

    def _conclude(self, summary: Mapping[str, Any]) -> None:
        write_atomic(self.directory / SUMMARY, json.dumps(summary, indent=2) + "\n")
        if summary["status"] == "stopped":
            write_atomic(self.directory / "REQUEUE", "continue with the same command\n")
        self.tracker.finish(summary)

    def close(self) -> None:
        """Put the signal handlers back, let go of the directory, and close the trackers and what `Compute` opened."""
        self.should_stop.restore_signals()
        self.tracker.finish(None)  # after an error; else it is closed already
        super().close()
        if self._lock is not None:
            self._lock.release()
            self._lock = None
