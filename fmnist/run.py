"""Open and close a run: Accelerator, seeds, run directory, signals, sums over processes.

This module and `data/batches.py` are the only ones that know rank or world size.
"""

import json
import logging
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from fmnist.config import Config, flatten, to_yaml
from fmnist.console import log_to_file
from fmnist.directory import clear_directory, has_run, lock_directory
from fmnist.exact import ShardSum
from fmnist.files import write_atomic
from fmnist.launch import announce, check_world_size, stop_with_launcher
from fmnist.peers import PATIENCE, describe_loss, is_lost_peer, limit_waits, share_status
from fmnist.tracking import NullTracker, Tracker

logger = logging.getLogger("fmnist")
T = TypeVar("T")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Run:
    """One process's view of a run.

    Attributes:
        device: where every tensor of the run lives.
        rank, world_size: this process and how many there are.
        precision: fp32 or bf16.
        directory: the run directory.
    """

    def __init__(self, cfg: Config, directory: Path) -> None:
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
        if cfg.exact:
            make_deterministic(self.device)
        elif self.device.type == "cpu":
            use_all_cores(self.accelerator.state)
        self.device_name = describe_device(self.device)
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        check_world_size(self.world_size)
        self.precision = "bf16" if self.accelerator.mixed_precision == "bf16" else "fp32"
        self.tracker: NullTracker = NullTracker()
        self.started, self._signal = time.monotonic(), 0
        self._agreement: tuple[Tensor, Any] | None = None
        self._shards: ShardSum | None = None
        self._control: Any = dist.new_group(backend="gloo", timeout=PATIENCE) if self.world_size > 1 else None
        self._lock: int | None = None
        torch.backends.cudnn.deterministic = True  # a resumed run ends with the bits of an unbroken one
        torch.manual_seed(cfg.seed)

    # --- arithmetic over processes -------------------------------------------------------------------------------

    def prepare(self, model: nn.Module) -> nn.Module:
        """Compile the model if asked to, and wrap it for autocast and DDP; its parameters stay the optimizer's."""
        if self.cfg.model.compile:
            model.compile()  # in place: the names of its tensors stay as they are
        if self.cfg.exact:
            self.broadcast(model.state_dict().values())  # what DDP does when it wraps
            self._shards = ShardSum(model, self.cfg.exact, self._gather_shards)
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

    def _gather_shards(self, rows: Tensor) -> Tensor:
        """Gather [A, P] from W processes into [A x W, P]; micro-batch a of rank r is shard a x W + r."""
        if self.world_size == 1:
            return rows
        gathered = [torch.empty_like(rows) for _ in range(self.world_size)]
        dist.all_gather(gathered, rows)
        return torch.stack(gathered, dim=1).flatten(0, 1)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of the run's precision, for a model that was not prepared."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, scalars: Mapping[str, Tensor]) -> dict[str, float]:
        """Average device scalars over processes and read them: the loop's one device sync."""
        stacked = self.sum(torch.stack([value.double() for value in scalars.values()])) / self.world_size
        return dict(zip(scalars, stacked.tolist(), strict=True))

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give every process rank 0's values, in place."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def on_main(self, action: Callable[..., T], *args: Any, **kwargs: Any) -> T | None:
        """Call something on the main process while the others wait, and return its result there.

        Raises:
            SystemExit: on the other processes, where it failed on the main one, which says why: none is left waiting.
        """
        if self._control is None:
            return action(*args, **kwargs)
        if self.rank:
            if status := share_status(0, self._control):
                raise SystemExit(status)
            return None
        try:
            result = action(*args, **kwargs)
        except Exception as error:
            share_status(2 if isinstance(error, ValueError) else 1, self._control)
            raise
        share_status(0, self._control)
        return result

    def gather(self, value: T) -> list[T]:
        """Return every process' value, by rank; for small things that are not tensors, and not in every step."""
        values = [value] * self.world_size
        if self._control is not None:
            dist.all_gather_object(values, value, group=self._control)
        return values

    def join(self) -> None:
        """Wait for all processes."""
        if self._control is not None:
            dist.barrier(group=self._control)

    @contextmanager
    def watch_peers(self) -> Iterator[None]:
        """End this process with one line and status 1 where a collective fails because another one died or hangs."""
        try:
            yield
        except RuntimeError as error:
            if self._control is None or not is_lost_peer(error):
                raise
            others = [rank for rank in range(self.world_size) if rank != self.rank]
            loss = describe_loss(error, self._control, others)
            said = " ".join(str(error).split())[:160]
            logger.error(
                "rank %d ends: %s; the same command goes on from the last checkpoint (%s)", self.rank, loss, said
            )
            logging.shutdown()
            sys.stderr.flush()
            os._exit(1)  # an orderly exit waits for the lost one

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
        if self._control is None:
            return mine
        if self._agreement is None:  # the first step is done, with all its compiling
            limit_waits(self.cfg.timeout_s)
        stop = self._agreed()
        flag = torch.tensor(int(mine))
        self._agreement = (flag, dist.all_reduce(flag, group=self._control, async_op=True))
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


def resolve_precision(precision: str) -> str:
    """Turn auto into bf16 where the GPU computes in it, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def make_deterministic(device: torch.device) -> None:
    """Let only kernels run whose result depends on nothing but their operands."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    if device.type == "cpu":
        torch.set_num_threads(1)  # how a sum is cut among threads would be part of the result


def use_all_cores(state: Any) -> None:
    """Share this node's cores among its processes where a launcher has set one thread each, which both do unasked."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if launched and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_processes))


def describe_device(device: torch.device) -> str:
    """Return the device's name as people know it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} thread(s)"
