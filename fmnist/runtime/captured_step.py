"""The step as a CUDA graph: what it launches is recorded once, and then launched again by one call.

A step of a small model is hundreds of kernels of microseconds, and the host takes longer to launch them than the device
to run them. A graph holds everything from the augmentation to the clipped gradients. The update follows it as ever, in
a few launches: so the learning rate, the optimizer's counts and the average's warm-up are no constants of the graph.
"""

import logging
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fmnist.runtime.console import one_line

logger = logging.getLogger("fmnist")
WARM_UP = 3  # steps of each image size that run as ever: they compile, choose algorithms and allocate
SYNC = "synchronizing CUDA operation"  # in torch's warning
Metrics = dict[str, Tensor]
Record = Callable[[Callable[[], Metrics]], tuple[Callable[[], None], Metrics]]


class GradientsOnly:
    """Stand in for an optimizer while a step is recorded: the update is left to follow."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.param_groups = optimizer.param_groups

    def step(self) -> None:
        """Leave the weights."""

    def zero_grad(self, *, set_to_none: bool) -> None:
        """Keep the gradients: the graph writes them into the same memory each time."""


class Recorded:
    """A step in memory of its own: what it reads, how it is replayed, and what that writes.

    Args:
        step: from micro-batches to metrics; it leaves gradients.
        micro_batches: such as it will be given, by reference.
        table: their augmentation parameters.
        record: see `CapturedStep`.
    """

    def __init__(
        self, step: Callable[[list[Any]], Metrics], micro_batches: Sequence[Any], table: Tensor, record: Record
    ) -> None:
        self._table, self._made_from = torch.empty_like(table), torch.empty(0)
        key = micro_batches[-1].key
        batches = self._batches = [batch.standing(self._table, key) for batch in micro_batches]
        torch.manual_seed(micro_batches[-1].seed)  # the same seed may be set again while the step is recorded
        self._replay, self._metrics = record(lambda: step(batches))

    def replay(self, micro_batches: Sequence[Any], table: Tensor) -> Metrics:
        """Compute the gradients of other micro-batches of the same shape, and return their metrics."""
        if self._made_from is not table:  # once an epoch
            self._table.copy_(table)
            self._made_from = table
        for own, batch in zip(self._batches, micro_batches, strict=True):
            own.take(batch)
        torch.manual_seed(micro_batches[-1].seed)  # a replay draws from where the generator stands
        self._replay()
        return {name: value.clone() for name, value in self._metrics.items()}


class CapturedStep:
    """`train_step` with the same arguments, result and bits, by a graph once the shapes of its batches are known.

    The first steps of each image size run as ever, and the last of them is watched: a step that waits for the device
    or draws random numbers on the host cannot be recorded. Neither is a step recorded whose several micro-batches draw
    on the device, each with a seed of its own: a graph has one. One graph is kept; a new image size drops it.

    Args:
        step: `train_step`.
        record: records what a function launches, without running it; returns what replays it, and its result, which a
            replay writes anew.
    """

    def __init__(self, step: Callable[..., Metrics], record: Record) -> None:
        self._step, self._record = step, record
        self._shape: tuple[int, ...] = ()
        self._seen, self._refused = 0, ""
        self.recorded: Recorded | None = None

    def __call__(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        micro_batches: Sequence[Any],
        augment: Any,
        gradients: Any,
        cfg: Any,
        ema: Any = None,
    ) -> Metrics:
        """Update the weights once: see `train_step`."""

        def plain() -> Metrics:
            return self._step(model, optimizer, micro_batches, augment, gradients, cfg, ema)

        last = micro_batches[-1]
        if self._refused or last.pixels is not None:  # staged images lie elsewhere each time
            return plain()
        shape = augment.size(last.epoch), *(len(batch.indices) for batch in micro_batches)
        if shape != self._shape:
            self._shape, self._seen = shape, 0
            self._forget(optimizer)
        self._seen += 1
        if self._seen < WARM_UP:
            return plain()
        table = augment.table(last)
        if self._seen == WARM_UP:
            with self._watched(micro_batches):
                return plain()
        if self.recorded is None:
            held = GradientsOnly(optimizer)
            optimizer.zero_grad(set_to_none=True)
            try:
                self.recorded = Recorded(
                    lambda batches: self._step(model, held, batches, augment, gradients, cfg),
                    micro_batches,
                    table,
                    self._record,
                )
            except Exception as error:  # nothing has run; a fault of the step itself comes again below
                self._refuse(one_line(error, 200))
            if self.recorded is None:  # by now what the error held is free
                self._forget(optimizer)
                return plain()
        metrics = self.recorded.replay(micro_batches, table)
        optimizer.step()
        if ema is not None:
            ema.update(gradients.model, step=last.step)
        return metrics

    def _forget(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop the graph, and the gradients in its memory."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # a replay may be at work in it
        self.recorded = None
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()

    def _refuse(self, why: str) -> None:
        self._refused = why
        logger.warning("model.cuda_graph: steps run without a graph, with the same result: %s", why)

    @contextmanager
    def _watched(self, micro_batches: Sequence[Any]) -> Iterator[None]:
        """Refuse the graph where what runs inside waits for the device or draws what a graph would not."""
        before = random.getstate()
        with warnings.catch_warnings(record=True) as said, _syncs_warn():
            warnings.simplefilter("always")
            yield
        last, device = micro_batches[-1], micro_batches[-1].indices.device
        host, drawn = _drawn(last.seed, device)
        if any(SYNC in str(warning.message) for warning in said):
            self._refuse("a step of this model waits for the device")
        elif host or random.getstate() != before:
            self._refuse("this model draws random numbers on the host")
        elif drawn and len(micro_batches) > 1:
            self._refuse("this model draws random numbers, anew for each micro-batch")


def record_cuda_graph(action: Callable[[], Metrics]) -> tuple[Callable[[], None], Metrics]:
    """Record what a function launches on the current CUDA device, without running it."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads save and draw meanwhile
            metrics = action()
    except Exception:
        # a capture that broke leaves the generator waiting for its end; a new state ends that
        device = torch.cuda.current_device()
        torch.cuda.default_generators[device].graphsafe_set_state(torch.Generator(torch.device("cuda", device)))
        raise
    return graph.replay, metrics


@contextmanager
def _syncs_warn() -> Iterator[None]:
    if not torch.cuda.is_available():
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _drawn(seed: int, device: torch.device) -> tuple[bool, bool]:
    """Say whether random numbers were drawn on the host, and whether on the device, since all was seeded with this."""
    if device.type != "cuda":  # the host is the device
        return False, not torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(seed).get_state())
    host = not torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(seed).get_state())
    return host, torch.cuda.default_generators[device.index or 0].get_offset() > 0
