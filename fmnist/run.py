"""Open and close a run: Accelerator, seeds, run directory, signals, sums over processes.

This module and `data/batches.py` are the only ones that know rank or world size.
"""

import json
import logging
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import accelerate
import timm
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn

from fmnist.checkpoint import write_atomic
from fmnist.config import Config, differences, flatten, load_config, to_yaml
from fmnist.tracking import NullTracker, Tracker

logger = logging.getLogger("fmnist")
T = TypeVar("T")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
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
)


class Run:
    """One process's view of a run.

    Attributes:
        device: where every tensor of the run lives.
        rank, world_size: this process and how many there are.
        precision: fp32 or bf16.
        directory: the run directory.
    """

    def __init__(self, cfg: Config, directory: Path) -> None:
        self.accelerator = Accelerator(
            mixed_precision={"fp32": "no", "bf16": "bf16"}[resolve_precision(cfg.model.precision)],
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
        self.cfg, self.directory = cfg, directory
        self.device = self.accelerator.device
        self.device_name = describe_device(self.device)
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.precision = "bf16" if self.accelerator.mixed_precision == "bf16" else "fp32"
        self.tracker: NullTracker = NullTracker()
        self.started, self._signal, self._agreement = time.monotonic(), 0, None
        self._control = dist.new_group(backend="gloo") if self.world_size > 1 else None
        torch.backends.cudnn.deterministic = True  # a resumed run ends with the bits of an unbroken one
        torch.manual_seed(cfg.seed)

    # --- arithmetic over processes -------------------------------------------------------------------------------

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Wrap the model for autocast and DDP; the optimizer keeps pointing at the same parameters."""
        wrapped, _ = self.accelerator.prepare(model, optimizer)
        return wrapped

    def unwrap(self, model: nn.Module) -> nn.Module:
        """Return the model inside the DDP wrapper."""
        return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model

    def gradient_sync(self, model: nn.Module, *, enabled: bool) -> AbstractContextManager[Any]:
        """Return a context in which backward sums gradients over processes, or does not."""
        return nullcontext() if enabled else self.accelerator.no_sync(model)

    def backward(self, loss: Tensor) -> None:
        """Compute gradients."""
        self.accelerator.backward(loss)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of the run's precision."""
        return self.accelerator.autocast()

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
        """Call something on the main process only, and return its result there."""
        return action(*args, **kwargs) if self.rank == 0 else None

    def join(self) -> None:
        """Wait for all processes."""
        self.accelerator.wait_for_everyone()

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
        stop = self._agreed()
        flag = torch.tensor(int(mine))
        self._agreement = (flag, dist.all_reduce(flag, group=self._control, async_op=True))
        return stop

    def _agreed(self) -> bool:
        if self._agreement is None:
            return False
        flag, work = self._agreement
        work.wait()
        self._agreement = None
        return bool(flag)

    # --- the run directory ---------------------------------------------------------------------------------------

    def start(self, step: int, total_steps: int) -> None:
        """Write config.yaml and open train.log and the trackers, on the main process."""
        self.join()  # every process has read the directory as it was
        if self.rank == 0:
            if self.cfg.overwrite:
                clear_directory(self.directory)
            self.directory.mkdir(parents=True, exist_ok=True)
            (self.directory / "REQUEUE").unlink(missing_ok=True)
            write_atomic(self.directory / "config.yaml", to_yaml(self.cfg).encode())
            log_to_file(self.directory / "train.log")
            self.tracker = Tracker(
                self.directory, self.cfg.log, flatten(self.cfg), step=step, total_steps=total_steps
            )
        logger.info("%d process(es) on %s, %s", self.world_size, self.device_name, self.precision)
        self.watch_signals()

    def log(self, prefix: str, scalars: Mapping[str, float], step: int, epoch: float) -> None:
        """Hand scalars to the tracker; silent on all processes but the main one."""
        self.tracker.log(prefix, scalars, step, epoch)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json (and REQUEUE after a stop), close the trackers, join, and leave the process group."""
        self._agreed()
        if self.rank == 0:
            write_atomic(self.directory / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
            if summary["status"] == "stopped":
                (self.directory / "REQUEUE").write_text("continue with the same command\n")
        self.tracker.finish(summary)
        self.close()

    def close(self) -> None:
        """Join all processes, then end the process group: without the join a fast one can abort a slow one."""
        self.join()
        self.accelerator.end_training()


def open_directory(cfg: Config) -> Path:
    """Check that the run directory may be used, before anything is built or written.

    Raises:
        ValueError: it holds another run, or files that a run would overwrite.
    """
    directory = Path(cfg.output_dir or "runs/run")
    present = [name for name in RUN_FILES if (directory / name).exists()]
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"output_dir {directory} is a file")
    if cfg.resume == "never" and directory.is_dir() and any(directory.iterdir()) and not cfg.overwrite:
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


def is_finished(directory: Path) -> bool:
    """Say whether the run in this directory has reached its end, and tell people so."""
    try:
        summary = json.loads((directory / "summary.json").read_bytes())
    except (OSError, ValueError):
        return False
    if summary.get("status") != "finished":
        return False
    logger.info("%s is finished: test top1 %.2f %%", directory, 100 * summary.get("test.top1", math.nan))
    return True


def clear_directory(directory: Path) -> None:
    """Delete a run's files, and nothing else."""
    for name in RUN_FILES:
        path = directory / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def resolve_precision(precision: str) -> str:
    """Turn auto into bf16 where the GPU computes in it, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def describe_device(device: torch.device) -> str:
    """Return the device's name as people know it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"


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


def log_to_console() -> None:
    """Send messages to stderr: from the main process all, from the others warnings; metrics where no bar is drawn."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    logger.propagate = False
    metrics = logging.getLogger("fmnist.metrics")
    metrics.propagate = not sys.stderr.isatty()


def log_to_file(path: Path) -> None:
    """Append messages and metrics to train.log."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    metrics = logging.getLogger("fmnist.metrics")
    if not metrics.propagate:
        metrics.addHandler(handler)


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn a user's mistake (ValueError: status 2) and a non-finite loss (status 1) into one line on stderr."""
    try:
        yield
    except (ValueError, FloatingPointError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            sys.stderr.write(f"{program}: error: {' '.join(str(error).split())}\n")
        raise SystemExit(2 if isinstance(error, ValueError) else 1) from None


class Clock:
    """Images per second of training alone.

    Args:
        global_batch_size: images of one step.
        total_seconds: what earlier starts of the run have trained.
    """

    def __init__(self, global_batch_size: int, total_seconds: float = 0.0) -> None:
        self.global_batch_size, self.total_seconds = global_batch_size, total_seconds
        self._window_seconds, self._steps = 0.0, 0
        self.rates: list[float] = []
        self._since = time.perf_counter()

    def start(self) -> None:
        """Begin to count: what came before the loop is not training."""
        self._since = time.perf_counter()

    def tick(self) -> None:
        """Count one step."""
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Return the speed since the last read; right after a device sync, so that all counted work is done."""
        self._bank()
        seconds, steps = self._window_seconds / max(1, self._steps), self._steps
        self._window_seconds, self._steps = 0.0, 0
        if steps == 0:
            return {}
        self.rates.append(self.global_batch_size / seconds)
        return {"images_per_second": self.global_batch_size / seconds, "step_time_s": seconds}

    def median_rate(self) -> float:
        """Return the median images/s over the windows, the first (warm-up, compilation) apart where there are more."""
        rates = sorted(self.rates[1:] or self.rates or [0.0])
        return rates[len(rates) // 2]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside: evaluations and checkpoints."""
        self._bank()
        yield
        self._since = time.perf_counter()

    def _bank(self) -> None:
        now = time.perf_counter()
        self._window_seconds += now - self._since
        self.total_seconds += now - self._since
        self._since = now
