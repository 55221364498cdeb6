"""Open and close a run: Accelerator, seeds, run directory, signals."""

import json
import logging
import signal
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from fmnist.checkpoint.run_directory import clear_directory, has_run, lock_directory
from fmnist.config.schema import Config, flatten, to_yaml
from fmnist.runtime.console import log_to_file
from fmnist.runtime.files import write_atomic
from fmnist.runtime.gradients import ShardSum
from fmnist.runtime.hardware import (
    describe_device,
    keep_freed_memory,
    make_deterministic,
    resolve_precision,
    use_all_cores,
)
from fmnist.runtime.launcher import announce, check_world_size, stop_with_launcher
from fmnist.runtime.lost_process import PATIENCE, limit_waits
from fmnist.runtime.processes import Processes
from fmnist.tracking.tracker import NullTracker, Tracker

logger = logging.getLogger("fmnist")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Run(Processes):
    """One process's view of a run.

    Attributes:
        device: where every tensor of the run lives.
        rank, world_size: this process and how many there are (`Processes`).
        precision: fp32 or bf16.
        directory: the run directory.

    Args:
        cfg: every option.
        directory: the run directory.
        keep_memory: on a CPU, see `keep_freed_memory`.
    """

    def __init__(self, cfg: Config, directory: Path, *, keep_memory: bool = True) -> None:
        stop_with_launcher()
        self.accelerator = Accelerator(
            mixed_precision={"fp32": "no", "bf16": "bf16"}[resolve_precision(cfg.model.precision)],
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=PATIENCE),
            ],
        )
        self.cfg, self.directory = cfg, directory
        self.device = self.accelerator.device
        if self.device.type == "cpu" and keep_memory:
            keep_freed_memory()
        if cfg.exact:
            make_deterministic(self.device)
        elif self.device.type == "cpu":
            use_all_cores(self.accelerator.state)
        self.device_name = describe_device(self.device)
        super().__init__(self.accelerator.process_index, self.accelerator.num_processes)
        check_world_size(self.world_size)
        self.precision = "bf16" if self.accelerator.mixed_precision == "bf16" else "fp32"
        self.tracker: NullTracker = NullTracker()
        self.started, self._signal = time.monotonic(), 0
        self._agreement: tuple[Tensor, Any] | None = None
        self._shards: ShardSum | None = None
        self._lock: int | None = None
        torch.backends.cudnn.deterministic = True  # a resumed run ends with the bits of an unbroken one
        torch.manual_seed(cfg.seed)

    # --- the model and its gradients -----------------------------------------------------------------------------

    def prepare(self, model: nn.Module) -> nn.Module:
        """Compile the model if asked to, and wrap it for autocast and DDP; its parameters stay the optimizer's."""
        if self.cfg.model.compile:
            model.compile()  # in place: the names of its tensors stay as they are
        if self.cfg.exact:
            self.broadcast(model.state_dict().values())  # what DDP does when it wraps
            self._shards = ShardSum(model, self.cfg.exact, self.gather_shards)
        return self.accelerator.prepare_model(model, evaluation_mode=self._shards is not None)  # true leaves DDP out

    def unwrap(self, model: nn.Module) -> nn.Module:
        """Return the model inside the DDP wrapper."""
        return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model

    def gradient_sync(self, model: nn.Module, *, enabled: bool) -> AbstractContextManager[Any]:
        """Return a context in which backward sums gradients over processes, or does not."""
        return nullcontext() if enabled or self._shards else self.accelerator.no_sync(model)

    def loss_divisor(self, micro_batches: int) -> int:
        """Return what a micro-batch's mean loss is divided by; DDP divides by the process count besides."""
        return self._shards.shards if self._shards else micro_batches

    def backward(self, loss: Tensor) -> None:
        """Compute gradients; with `exact`, set them aside."""
        self.accelerator.backward(loss)
        if self._shards:
            self._shards.keep(loss)

    def sum_shards(self, loss: Tensor) -> Tensor:
        """With `exact`, sum what was set aside over all processes and return the summed loss; else return loss."""
        return self._shards.reduce() if self._shards else loss

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of the run's precision, for a model that was not prepared."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    # --- stopping ------------------------------------------------------------------------------------------------

    def watch_signals(self) -> None:
        """Let SIGTERM, SIGUSR1 and SIGINT ask for a stop at the next step; a second SIGINT interrupts at once."""

        def note(number: int, frame: object) -> None:
            if self._signal and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._signal = number

        for number in STOP_SIGNALS:
            signal.signal(number, note)

    def should_stop(self) -> bool:
        """Say whether a signal or the time limit asks for a stop; all processes answer alike at the same step.

        With several processes the answer is that of the call before: its small all-reduce ran beside the step, on the
        host, and costs neither a wait nor a device sync.
        """
        minutes = (time.monotonic() - self.started) / 60
        mine = bool(self._signal) or (self.cfg.max_minutes is not None and minutes >= self.cfg.max_minutes)
        if self.control is None:
            return mine
        if self._agreement is None:  # the first step is done, with all its compiling
            limit_waits(self.cfg.timeout_s)
        stop = self._agreed()
        flag = torch.tensor(int(mine))
        self._agreement = (flag, dist.all_reduce(flag, group=self.control, async_op=True))
        return stop

    def _agreed(self) -> bool:
        if self._agreement is None:
            return False
        flag, work = self._agreement
        work.wait(timedelta(seconds=self.cfg.timeout_s))
        self._agreement = None
        return bool(flag)

    # --- the run directory ---------------------------------------------------------------------------------------

    def claim(self) -> None:
        """Lock the run directory, before anything in it is read, against a second process that would write it too.

        Raises:
            ValueError: another process holds it.
        """
        self.on_main(self._claim)

    def _claim(self) -> None:
        if self._lock is None and self.directory.is_dir():
            self._lock = lock_directory(self.directory)

    def start(self, step: int, total_steps: int, backend: str) -> None:
        """Write config.yaml and open train.log and the trackers, on the main process."""
        self.join()  # every process has read the directory as it was
        self.on_main(self._open, step, total_steps)
        logger.info(
            "%d process(es) on %s, %s, images made by: %s", self.world_size, self.device_name, self.precision, backend
        )
        self.watch_signals()

    def _open(self, step: int, total_steps: int) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self._claim()
            if has_run(self.directory):
                raise ValueError(f"output_dir {self.directory}: another process began a run here; start again")
        if self.cfg.overwrite:
            clear_directory(self.directory)
        (self.directory / "REQUEUE").unlink(missing_ok=True)
        write_atomic(self.directory / "config.yaml", to_yaml(self.cfg).encode())
        log_to_file(self.directory / "train.log")
        announce()
        self.tracker = Tracker(self.directory, self.cfg.log, flatten(self.cfg), step=step, total_steps=total_steps)

    def log(self, prefix: str, scalars: Mapping[str, float], step: int, epoch: float) -> None:
        """Hand scalars to the tracker; silent on all processes but the main one."""
        self.tracker.log(prefix, scalars, step, epoch)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json (and REQUEUE after a stop), close the trackers, join, and leave the process group."""
        self._agreed()
        self.on_main(self._conclude, summary)
        self.close()

    def _conclude(self, summary: Mapping[str, Any]) -> None:
        write_atomic(self.directory / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
        if summary["status"] == "stopped":
            (self.directory / "REQUEUE").write_text("continue with the same command\n")
        self.tracker.finish(summary)

    def close(self) -> None:
        """Join all processes, then end the process group: without the join a fast one can abort a slow one."""
        self.join()
        self.accelerator.end_training()
