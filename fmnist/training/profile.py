"""A trace of some steps, for whoever asks where the time goes: --profile STEPS."""

import atexit
import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from fmnist.runtime.console import counted
from fmnist.runtime.files import write_atomic

logger = logging.getLogger("fmnist")
SKIPPED = 10  # first steps, which compile, allocate and fill caches


class StepProfiler:
    """Trace some steps of one process and write what they took.

    Writes trace.json (open it in chrome://tracing or Perfetto) and table.txt (operators by time) once the last traced
    step is done.

    Args:
        steps: to trace, after the first ten; None traces nothing.
        directory: made when the files are written.
        device: of the training.
    """

    def __init__(self, steps: int | None, directory: Path, device: torch.device) -> None:
        self.directory, self.device = directory, device
        self._profile: profile | None = None
        self._steps, self._written = 0, False
        if steps is not None:
            on_gpu = device.type != "cpu"
            self._profile = profile(
                activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])],
                schedule=schedule(skip_first=SKIPPED - 1, wait=0, warmup=1, active=steps, repeat=1),
                on_trace_ready=self._write,
            )
            self._profile.start()
            atexit.register(self.close)  # after an error, too

    def step(self) -> None:
        """Note that a step is done."""
        if self._profile is not None:
            self._profile.step()
            self._steps += 1

    def close(self) -> None:
        """Write what was traced so far, where the run ends within the traced steps: one left open crashes at exit."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
            if not self._written:
                had = counted(self._steps, "step")
                logger.warning("profile: nothing is written: it traces after %d steps; this start had %s", SKIPPED, had)

    def _write(self, traced: profile) -> None:
        column = "self_cpu_time_total" if self.device.type == "cpu" else "self_device_time_total"
        write_atomic(self.directory / "table.txt", traced.key_averages().table(sort_by=column, row_limit=40) + "\n")
        traced.export_chrome_trace(str(self.directory / "trace.json"))
        self._written = True
        logger.info("profile: %s and trace.json beside it", self.directory / "table.txt")
