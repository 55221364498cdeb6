"""How the gradients of a step are summed over micro-batches and processes: by DDP's all-reduce, or in a fixed order.

A sum of floats depends on its order, and the order of an all-reduce depends on the process count. With `exact: V` the
global batch is V shards, on whichever process; what each contributes is kept apart, gathered, and added from shard 0
to shard V - 1 on every process. BatchNorm's running statistics are updated in the same order.

The cost: V copies of the gradients in memory, gathered instead of reduced, no overlap of communication with backward,
one CPU thread a process, and only deterministic kernels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Batch = TypeVar("Batch")


class Gradients(Protocol):
    """Sums the gradients of one step.

    Attributes:
        model: the bare model, inside any wrapper, whose parameters hold the gradients.
    """

    model: nn.Module

    def over(self, wrapped: nn.Module, micro_batches: Sequence[Batch]) -> Iterator[Batch]:
        """Yield the micro-batches of one step; the body of the loop calls `backward` once for each."""

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of one micro-batch's mean loss, weighted so that they sum to the global batch's."""

    def total(self) -> Tensor:
        """Put the summed gradients in place after the last micro-batch, and return the step's loss, float32 []."""


class AllReduce:
    """One all-reduce a step, which DDP runs beside the last micro-batch's backward; none on a single process.

    Args:
        model: the bare model.
        accelerator: Accelerate's, which wrapped it.
    """

    def __init__(self, model: nn.Module, accelerator: Any) -> None:
        self.model, self._accelerator = model, accelerator
        self._loss = torch.zeros((), device=accelerator.device)
        self._num_micro_batches = 1

    def over(self, wrapped: nn.Module, micro_batches: Sequence[Batch]) -> Iterator[Batch]:
        """See `Gradients`."""
        self._loss = torch.zeros_like(self._loss)
        self._num_micro_batches = len(micro_batches)
        *first, last = micro_batches
        for batch in first:
            with self._accelerator.no_sync(wrapped):
                yield batch
        yield last

    def backward(self, loss: Tensor) -> None:
        """See `Gradients`; DDP divides by the number of processes besides."""
        loss = loss / self._num_micro_batches
        self._accelerator.backward(loss)
        self._loss += loss.detach()

    def total(self) -> Tensor:
        """Return this process's mean loss; DDP has put the gradients in place."""
        return self._loss


class ShardSum:
    """Sum gradients, loss and BatchNorm statistics over the shards of a step, in their order.

    Args:
        model: its parameters receive the summed gradients; not wrapped for distributed training.
        accelerator: Accelerate's.
        shards: V, over all processes.
        gather: from this process's rows [V / processes, P] to all of them, [V, P] in the order of the shards.

    Raises:
        ValueError: a BatchNorm layer averages over all batches (momentum None), which has no order to keep.
    """

    def __init__(self, model: nn.Module, accelerator: Any, shards: int, gather: Callable[[Tensor], Tensor]) -> None:
        self.model, self._accelerator, self._shards, self._gather = model, accelerator, shards, gather
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        if any(m.momentum is None for m in self._norms):
            raise ValueError("exact cannot be kept with a BatchNorm layer whose momentum is None")
        self._momenta = [float(m.momentum or 0) for m in self._norms]
        self._running = [t.clone() for t in self._statistics()]
        for module in self._norms:
            module.momentum = 1.0  # a forward then leaves its own batch's statistics, to be averaged in order
        self._rows: list[Tensor] = []

    def _statistics(self) -> list[Tensor]:
        return [t for m in self._norms for t in (m.running_mean, m.running_var) if t is not None]

    def over(self, wrapped: nn.Module, micro_batches: Sequence[Batch]) -> Iterator[Batch]:
        """See `Gradients`; each micro-batch is one shard."""
        yield from micro_batches

    def backward(self, loss: Tensor) -> None:
        """Set one shard's loss, gradients and batch statistics aside; the gradients are then cleared."""
        loss = loss / self._shards
        self._accelerator.backward(loss)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        parts = [loss.detach(), *grads, *self._statistics()]
        self._rows.append(torch.cat([part.reshape(-1).float() for part in parts]))
        for parameter in self._parameters:
            parameter.grad = None

    def total(self) -> Tensor:
        """Add up all shards in order; set gradients and running statistics, and return the global batch's loss."""
        rows = self._gather(torch.stack(self._rows))
        local, self._rows = len(self._rows), []
        total = rows[0].clone()
        for row in rows[1:]:
            total += row
        parameters, statistics = self._parameters, self._statistics()
        parts = total[1:].split([t.numel() for t in (*parameters, *statistics)])
        for parameter, part in zip(parameters, parts, strict=False):
            parameter.grad = torch.empty_like(parameter).copy_(part.view(parameter.shape))
        start = 1 + sum(p.numel() for p in parameters)
        for i, (buffer, running) in enumerate(zip(statistics, self._running, strict=True)):
            momentum, stop = self._momenta[i // 2], start + buffer.numel()
            for row in rows[:, start:stop]:
                running.lerp_(row, momentum)
            buffer.copy_(running)
            start = stop
        for module in self._norms:
            if module.num_batches_tracked is not None:
                module.num_batches_tracked += self._shards - local
        return total[0]


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Put the model's buffers back, such as BatchNorm's statistics, and drop its gradients."""
    before = [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, old in zip(model.buffers(), before, strict=True):
            buffer.copy_(old)
        model.zero_grad(set_to_none=True)
