"""Bit-identical training for any process count: the sums over virtual shards, taken in a fixed order.

A sum of floats depends on its order, and the order of an all-reduce depends on the process count. With `exact: V` the
global batch is V shards, whoever computes them; what each contributes is kept apart, gathered, and added from shard 0
to shard V - 1 on every process. BatchNorm's running statistics are updated in the same order.

The cost: V copies of the gradients in memory, gathered instead of reduced, no overlap of communication with backward,
one CPU thread a process, and only deterministic kernels.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class ShardSum:
    """Sum gradients, loss and BatchNorm statistics over the shards of a step.

    Args:
        model: its parameters receive the summed gradients; not wrapped for distributed training.
        shards: V, over all processes.
        gather: from this process's rows [V / processes, P] to all of them, [V, P] in the order of the shards.

    Raises:
        ValueError: a BatchNorm layer averages over all batches (momentum None), which has no order to keep.
    """

    def __init__(self, model: nn.Module, shards: int, gather: Callable[[Tensor], Tensor]) -> None:
        self.shards, self._gather = shards, gather
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

    def keep(self, loss: Tensor) -> None:
        """Set one shard's loss, gradients and batch statistics aside; the gradients are then cleared."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        parts = [loss.detach(), *grads, *self._statistics()]
        self._rows.append(torch.cat([part.reshape(-1).float() for part in parts]))
        for parameter in self._parameters:
            parameter.grad = None

    def reduce(self) -> Tensor:
        """Add up all shards in order; set gradients and running statistics, and return the summed loss."""
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
                module.num_batches_tracked += self.shards - local
        return total[0]
