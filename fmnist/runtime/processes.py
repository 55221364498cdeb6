"""The processes of a run: sums and small messages between them, one that acts while the others wait, one that is lost.

The files beside this one and `data/batches.py` are the only ones that know rank or world size.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fmnist.runtime.console import one_line
from fmnist.runtime.exchange import Exchange
from fmnist.runtime.hardware import in_float64
from fmnist.runtime.heartbeat import PATIENCE, Heartbeat, end_for_another
from fmnist.runtime.lost_process import describe_loss, is_lost_process, share_status

T = TypeVar("T")


class SaidByAll(ValueError):
    """An error that all processes have heard of, and raise alike."""


class Processes:
    """This process among the others; every method is called by all of them.

    Attributes:
        rank, world_size: this process and how many there are.
        control: a gloo group for what runs beside the step, on the host; none for one process.
        heartbeat: notices a process that hangs; none for one process.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.control: Any = dist.new_group(backend="gloo", timeout=PATIENCE) if world_size > 1 else None
        if rank:  # the others' messages are those of the main process; their warnings are their own
            logging.getLogger("fmnist").setLevel(logging.WARNING)
        self.heartbeat = Heartbeat(rank, world_size, self.control) if world_size > 1 else None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.rank == 0

    @cached_property
    def exchange(self) -> Exchange:
        """Brings rows of spread tensors, beside the step; first asked for by all processes together."""
        return Exchange(self.rank, self.world_size, self.heartbeat)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, scalars: Mapping[str, Tensor]) -> dict[str, float]:
        """Average device scalars, float32 [] each, over processes and read them: one device sync."""
        stacked = self.sum(in_float64(torch.stack(list(scalars.values())))) / self.world_size
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
        if self.control is None:
            return action(*args, **kwargs)
        if self.rank:
            if status := share_status(0, self.control):
                raise SystemExit(status)
            return None
        try:
            result = action(*args, **kwargs)
        except Exception as error:
            share_status(2 if isinstance(error, ValueError) else 1, self.control)
            raise
        share_status(0, self.control)
        return result

    def gather(self, value: T) -> list[T]:
        """Return every process' value, by rank; for small things that are not tensors, and not in every step."""
        values = [value] * self.world_size
        if self.control is not None:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def together(self, action: Callable[[], T]) -> T:
        """Do something on every process; where it fails on one it fails on all, with that one's words.

        Within it some may be done together too: a process that has failed before it came there counts as failed there.

        Raises:
            ValueError: the first of the processes' errors.
        """
        failure = ""
        try:
            result = action()
        except SaidByAll:
            raise
        except (ValueError, OSError) as error:
            failure = str(error)
        if said := next(filter(None, self.gather(failure)), ""):
            raise SaidByAll(said)
        return result

    def agree(self, seen: Mapping[str, str], remedy: str) -> None:
        """Compare what the processes see, before anything is done on it.

        Args:
            seen: what this process sees, under the words that say where.
            remedy: ends the message.

        Raises:
            ValueError: on all of them, naming the first that sees something else than rank 0.
        """
        views = self.gather(dict(seen))
        for rank, view in enumerate(views):
            for name, value in view.items():
                if value != views[0].get(name):
                    raise ValueError(f"rank {rank} sees {value} {name}, rank 0 {views[0].get(name)}: {remedy}")

    def agree_on_options(self, options: Mapping[str, object]) -> None:
        """Compare the options that all processes of one start have to share, by their names.

        Raises:
            ValueError: as `agree`.
        """
        seen = {f"as {name}": json.dumps(value) for name, value in options.items()}
        self.agree(seen, "give all processes the same options")

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's contiguous share; the shares of all processes cover every item exactly once."""
        first, last = (len(items) * rank // self.world_size for rank in (self.rank, self.rank + 1))
        return items[first:last]

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Put the rows of all processes one after another, by rank, on every one of them; all on the CPU."""
        if self.world_size == 1:
            return rows
        counts = self.gather(len(rows))
        parts = [rows.new_empty((count, *rows.shape[1:])) for count in counts]
        parts[self.rank] = rows.contiguous()
        for source, part in enumerate(parts):
            dist.broadcast(part, source, group=self.control)
        return torch.cat(parts)

    def join(self) -> None:
        """Wait for all processes."""
        if self.control is not None:
            dist.barrier(group=self.control)

    def end_if_lost(self, error: BaseException | None) -> None:
        """End this process with one line and status 1 where a collective failed because another one died or hangs."""
        if self.control is not None and isinstance(error, RuntimeError) and is_lost_process(error):
            others = [rank for rank in range(self.world_size) if rank != self.rank]
            loss = describe_loss(error, self.control, others)
            end_for_another(self.rank, loss, one_line(error, 4096)[-160:])  # NCCL says why at the end

    def gather_shards(self, rows: Tensor) -> Tensor:
        """Gather [A, P] from W processes into [A x W, P]; micro-batch a of rank r is shard a x W + r."""
        if self.world_size == 1:
            return rows
        gathered = [torch.empty_like(rows) for _ in range(self.world_size)]
        dist.all_gather(gathered, rows)
        return torch.stack(gathered, dim=1).flatten(0, 1)


ALONE = Processes(0, 1)  # where one process does it all
