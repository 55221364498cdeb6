"""Numbers out: metrics.jsonl always, lines for people, Weights & Biases. None of them can stop a run."""

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fmnist.config.schema import LogConfig
from fmnist.tracking.metrics_file import METRICS_FILE, metric_name, truncate_metrics
from fmnist.tracking.progress import Progress
from fmnist.tracking.wandb_run import finish_wandb, start_wandb, without_secrets

logger = logging.getLogger("fmnist")


class NullTracker:
    """What every process but the main one logs to."""

    def log(self, prefix: str, scalars: Mapping[str, float], step: int, epoch: float) -> None:
        """Do nothing."""

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Do nothing."""


class Tracker(NullTracker):
    """Write the main process's numbers.

    Args:
        directory: the run directory.
        cfg: where the numbers go.
        resolved: every option of the run, for Weights & Biases.
        progress: what people see; lines of metrics.jsonl after its step are dropped, since the run writes them again.
    """

    def __init__(self, directory: Path, cfg: LogConfig, resolved: Mapping[str, Any], progress: Progress) -> None:
        self.path = directory / METRICS_FILE
        self.file: Any = None
        self._warned = False
        try:
            truncate_metrics(self.path, progress.step())
            self.file = self.path.open("ab", buffering=0)  # no buffer: nothing is left in it when the disk is full
        except OSError as error:
            self._warn(error)
        self.progress = progress
        self.wandb: Any = None  # started last: what people wait for is said before
        if cfg.wandb != "disabled":
            self._try_wandb(lambda: setattr(self, "wandb", start_wandb(directory, cfg, resolved)))
        progress.start()

    def log(self, prefix: str, scalars: Mapping[str, float], step: int, epoch: float) -> None:
        """Write one line of scalars.

        Args:
            prefix: train, val or test.
            scalars: names without the prefix; where there are none, only the line for people is written.
            step: completed optimizer updates, the x axis.
            epoch: passes over the training images, with the fraction.
        """
        self.progress.log(prefix, scalars, step)
        if not scalars:
            return
        # JSON has no NaN: a broken value is written as null and said by name elsewhere.
        clean = {k: v if math.isfinite(v) else None for k, v in scalars.items()}
        self._write(json.dumps({"step": step, "epoch": round(epoch, 4), "prefix": prefix} | clean))
        named = {metric_name(prefix, k): v for k, v in scalars.items()}
        self._try_wandb(lambda: self.wandb and self.wandb.log(named | {"step": step, "epoch": epoch}))

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Close everything, once; the summary goes to Weights & Biases too, None says that the run failed."""
        if self.file is not None:
            try:
                self.file.close()
            except OSError as error:  # where a network disk tells that it was full
                self._warn(error)
        self.progress.close()
        self._try_wandb(lambda: self._finish_wandb(summary))
        self.file = self.wandb = None

    def _write(self, line: str) -> None:
        if self.file is None:
            return
        data = line.encode() + b"\n"
        try:
            size = os.fstat(self.file.fileno()).st_size
            if self.file.write(data) != len(data):
                os.ftruncate(self.file.fileno(), size)  # no half line that the next one would continue
                raise OSError("the disk is full")
        except OSError as error:  # a full disk must not end the training that may yet save elsewhere
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            logger.warning("%s: further numbers are not written: %s", self.path, error.strerror or error)
        self._warned = True

    def _try_wandb(self, call: Callable[[], Any]) -> None:
        """Call Weights & Biases; at its first failure warn once and drop it."""
        try:
            call()
        except Exception as error:  # whatever a tracker raises must not end a training
            logger.warning("Weights & Biases is off from here: %s", without_secrets(error))
            self.wandb = None

    def _finish_wandb(self, summary: Mapping[str, Any] | None) -> None:
        if self.wandb is not None:
            self.wandb.summary.update({k: v for k, v in (summary or {}).items() if isinstance(v, int | float | str)})
            finish_wandb(self.wandb, failed=summary is None)
