"""The step as a CUDA graph: what it launches is recorded once, and then launched again by one call.

A step of a small model is hundreds of kernels of microseconds, and the host takes longer to launch them than the device
to run them. A graph holds everything from the augmentation to the clipped gradients. The update follows it as ever, in
launches of its own (by AdamW a few, by Muon some twenty a matrix): so the learning rate, the optimizer's counts and the
average's warm-up are no constants of the graph.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fmnist.runtime.console import one_line
from fmnist.runtime.cuda_graph import Metrics, Record, watched
from fmnist.runtime.hardware import seed_generators

logger = logging.getLogger("fmnist")
WARM_UP = 3  # steps of each image size that run as ever: they compile, choose algorithms and allocate


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
        parameters: those that get gradients.
        record: see `CapturedStep`.
    """

    def __init__(
        self,
        step: Callable[[list[Any]], Metrics],
        micro_batches: Sequence[Any],
        table: Tensor,
        parameters: Sequence[Tensor],
        record: Record,
    ) -> None:
        self._table, self._made_from = torch.empty_like(table), torch.empty(0)
        batches = self._batches = [batch.standing(self._table) for batch in micro_batches]
        self._device = batches[-1].indices.device
        self._replay, self._metrics = record(lambda: step(batches))
        self._gradients = [(p, p.grad) for p in parameters if p.grad is not None]

    def replay(self, micro_batches: Sequence[Any], table: Tensor) -> Metrics:
        """Compute the gradients of other micro-batches of the same shape, and return their metrics."""
        if self._made_from is not table:  # once an epoch
            self._table.copy_(table)
            self._made_from = table
        for own, batch in zip(self._batches, micro_batches, strict=True):
            own.take(batch)
        for p, gradient in self._gradients:
            if p.grad is not gradient:  # someone cleared it: the update would find none, and leave the weight
                p.grad = gradient
        seed_generators(micro_batches[-1].seed, self._device)
        self._replay()
        return {name: value.clone() for name, value in self._metrics.items()}


class CapturedStep:
    """`train_step` with the same arguments, result and bits, by a graph once the shapes of its batches are known.

    The first steps of each image size run as ever, and the last of them is watched for what cannot be recorded. One
    graph is kept; a new image size drops it. Steps whose images are staged run as ever.

    Args:
        step: `train_step`.
        record: records what a function launches, without running it; returns what replays it, and its result, which a
            replay writes anew.
    """

    def __init__(self, step: Callable[..., Metrics], record: Record) -> None:
        self._step, self._record = step, record
        self._shape: tuple[int, ...] = ()
        self._seen, self._refused = 0, False
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
        if self._refused or last.pixels is not None:
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
            with watched(model, last.seed, last.indices.device, len(micro_batches)) as obstacles:
                metrics = plain()
            if obstacles:
                self._refuse(obstacles[0])
            return metrics
        if self.recorded is None:
            held = GradientsOnly(optimizer)
            optimizer.zero_grad(set_to_none=True)
            try:
                self.recorded = Recorded(
                    lambda batches: self._step(model, held, batches, augment, gradients, cfg),
                    micro_batches,
                    table,
                    [p for group in optimizer.param_groups for p in group["params"]],
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
        self._refused = True
        logger.warning("model.cuda_graph: steps run without a graph, with the same result: %s", why)
