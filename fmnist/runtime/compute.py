"""A device, and this process among others on it: what every program opens that runs a model."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, Self

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from fmnist.runtime.captured_step import CapturedStep
from fmnist.runtime.console import one_line
from fmnist.runtime.cuda_graph import record_cuda_graph
from fmnist.runtime.environment import hidden, is_true
from fmnist.runtime.gradients import AllReduce, Gradients, ShardSum, as_it_was
from fmnist.runtime.hardware import (
    describe_device,
    find_device,
    keep_freed_memory,
    make_deterministic,
    resolve_precision,
    set_threads,
)
from fmnist.runtime.heartbeat import PATIENCE
from fmnist.runtime.launcher import (
    STARTED,
    check_gpus,
    check_processes,
    check_world_size,
    gpu_warning,
    stop_with_launcher,
    without_effect,
)
from fmnist.runtime.processes import Processes

logger = logging.getLogger("fmnist")
MOST_KERNELS = 64  # of all modules of a process: image sizes, batch sizes, training and evaluation
WAITING_S = 5.0  # that processes started together may come apart, before the wait is reported


class Compute(Processes):
    """The device, its arithmetic, and the processes that share the work.

    A context manager: at the end of its block all processes join and leave the process group.

    Attributes:
        device: where every tensor lives.
        device_name: as people know it.
        precision: fp32 or bf16.
        rank, world_size: this process and how many there are (`Processes`).

    Args:
        precision: fp32, bf16, or auto: bf16 on a GPU that has it.
        shards: of `--exact`: only deterministic kernels, gradients summed in a fixed order; None turns it off.
        seed: of the initial weights.
        keep_memory: on a CPU, see `keep_freed_memory`.
        device: as torch names it; None takes the accelerator where there is one, one for each process.
        threads: of this process on a CPU; None takes the cores that the job was given.

    Raises:
        ValueError: the launcher started another number of processes than the job asked for, or they cannot meet; a
            device that is not there, or one accelerator named for several processes.
    """

    def __init__(
        self,
        *,
        precision: Literal["auto", "fp32", "bf16"] = "auto",
        shards: int | None = None,
        seed: int = 0,
        keep_memory: bool = True,
        device: str | None = None,
        threads: int | None = None,
    ) -> None:
        stop_with_launcher()
        if not device:
            check_gpus(torch.accelerator.device_count())
        named = find_device(device) if device else None
        # tell Accelerate: on a machine without an accelerator it would otherwise leave each process on its own
        no_gpu = is_true("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
        on_cpu = named.type == "cpu" if named else no_gpu
        place = (
            named or (torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator()) or torch.device("cpu")
        )
        if shards and on_cpu and threads not in (None, 1):
            raise ValueError(f"threads is {threads}, but exact computes with one on a CPU: leave threads out")
        with _meeting(check_processes()):
            self.accelerator = Accelerator(
                cpu=on_cpu,
                mixed_precision={"fp32": "no", "bf16": "bf16"}[resolve_precision(precision, place)],
                kwargs_handlers=[
                    # `predict` gives all processes the main one's buffers; no step does
                    DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
                    InitProcessGroupKwargs(timeout=2 * PATIENCE),  # NCCL's; the host's group, which says who, is first
                ],
            )
        # Accelerate calls rank 1's CPU cpu:1; moving a CPU tensor there would copy it
        self.device, self.shards = named or (torch.device("cpu") if on_cpu else self.accelerator.device), shards
        try:
            check_world_size(self.accelerator.num_processes)
        except ValueError:
            AcceleratorState._reset_state(reset_partial_state=True)  # for the next one in this process
            raise
        if named is not None and named.type != "cpu" and self.accelerator.num_processes > 1:
            raise ValueError(f"device is {device}; with several processes each takes its own accelerator: leave it out")
        if self.device.type == "cpu" and keep_memory:
            keep_freed_memory()
        if shards:
            make_deterministic(self.device)
        if threads or (self.device.type == "cpu" and not shards):
            set_threads(threads, self.accelerator.num_processes)
        self.device_name = describe_device(self.device)
        super().__init__(self.accelerator.process_index, self.accelerator.num_processes)
        self.precision = "bf16" if self.accelerator.mixed_precision == "bf16" else "fp32"
        if self.is_main and (ignored := without_effect(self.precision)):
            logger.warning("%s: no effect here; see docs/environment.md", ", ".join(ignored))
        found = torch.accelerator.device_count()
        if self.is_main and named is None and (warning := gpu_warning(self.world_size, found)):
            logger.warning("%s", warning)
        torch.backends.cudnn.deterministic = True  # a resumed run ends with the bits of an unbroken one
        torch.backends.cudnn.allow_tf32 = False  # float32 means it, for convolutions as for matrix products
        torch.manual_seed(seed)

    def prepare(
        self, model: nn.Module, *, compiled: bool = False, trial: Callable[[], Tensor] | None = None
    ) -> tuple[nn.Module, Gradients]:
        """Wrap a model for autocast and DDP; its parameters stay the optimizer's.

        From three processes on the order of a sum depends on where a gradient lies among the others, and DDP lays them
        out by the order in which they came in its first backward. So one is computed before the first step: without it
        the first step after a restart would sum otherwise than the same step of a run that was not stopped.

        Args:
            model: on the device, in training mode.
            compiled: compile it in place, so that the names of its tensors stay as they are.
            trial: makes images such as a step's, [B, C, S, S]; None where the bits of a restart do not matter.

        Returns:
            The wrapped model, and what sums its gradients over micro-batches and processes.
        """
        if compiled:
            # a kernel for each size: those of any size have no layout of their own
            torch._dynamo.config.recompile_limit = MOST_KERNELS
            model.compile(dynamic=False)
        if self.shards is None:
            wrapped = self.accelerator.prepare_model(model)
            if self.world_size > 2 and trial is not None:
                with as_it_was(model), torch.compiler.set_stance("force_eager"):
                    wrapped(trial()).sum().backward()
            return wrapped, AllReduce(model, self.accelerator)
        self.broadcast(model.state_dict().values())  # what DDP does when it wraps
        wrapped = self.accelerator.prepare_model(model, evaluation_mode=True)  # true leaves DDP out
        return wrapped, ShardSum(model, self.accelerator, self.shards, self.gather_shards)

    @property
    def captures(self) -> bool:
        """Whether `captured` can record a step here: on one CUDA device, with gradients that are not set aside."""
        return self.device.type == "cuda" and self.world_size == 1 and self.shards is None

    def captured(self, step: Callable[..., Any], choice: str) -> Callable[..., Any]:
        """Return `train_step` as a CUDA graph where that is wanted and possible, else as it is.

        Args:
            step: `train_step`.
            choice: `model.cuda_graph`: auto or never.
        """
        return CapturedStep(step, record_cuda_graph) if choice == "auto" and self.captures else step

    def release(self) -> None:
        """Let go of the models prepared so far, and of the memory that they took."""
        self.accelerator.free_memory()

    def close(self) -> None:
        """Join all processes, then end the process group: without the join a fast one can abort a slow one."""
        if "exchange" in self.__dict__:
            self.exchange.close()
        self.join()
        if self.heartbeat is not None:
            self.heartbeat.stop()
        self.accelerator.end_training()
        if self.world_size == 1:  # so that the next one in this process may have another device or precision
            AcceleratorState._reset_state(reset_partial_state=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end_if_lost(error)
        # After an error the other processes may be gone, and a join would wait for them: the group ends with this one.
        if error is None or self.world_size == 1:
            self.close()


@contextmanager
def _meeting(world_size: int) -> Iterator[None]:
    """Let Accelerate see who the processes are, and nothing else that is set for it; report a long wait for others."""
    if world_size == 1:  # what is left over of another run's processes has no effect
        with hidden("ACCELERATE_*", "RANK", "LOCAL_RANK", *STARTED):
            yield
        return
    missing = f"waiting for {world_size - 1} more process{'es' * (world_size > 2)} (WORLD_SIZE={world_size})"
    timer = threading.Timer(WAITING_S, logger.warning, (missing,))
    timer.daemon = True
    timer.start()
    try:
        with hidden("ACCELERATE_*", *STARTED):
            yield
    except RuntimeError as error:  # what torch raises where they cannot meet
        raise ValueError(f"{world_size} processes (WORLD_SIZE) cannot meet: {one_line(error)}") from error
    finally:
        timer.cancel()
