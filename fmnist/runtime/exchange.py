"""Rows of a tensor that is spread over the processes, brought to whoever asks for them in one all-to-all.

Every process knows what all of them ask for, so the sizes of the all-to-all are computed, not exchanged. It has a
process group of its own, and a thread that takes one request after another: so it runs beside the step, and all
processes make their requests in one order.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fmnist.runtime.heartbeat import PATIENCE, Heartbeat

T = TypeVar("T")


class Exchange:
    """What one process sends and receives; with a single process it only copies.

    Args:
        rank, world_size: this process and how many there are; all of them create it.
        heartbeat: is to count its collectives; None for one process.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, heartbeat: Heartbeat | None = None) -> None:
        self.rank, self.world_size = rank, world_size
        self._group: Any = None if world_size == 1 else dist.new_group(timeout=PATIENCE)
        if heartbeat is not None:
            heartbeat.watch(self._group)
        self._requests: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._outgoing = torch.empty(0, dtype=torch.uint8)
        # A daemon: a process that ends for its own error does not wait for the others here.
        self._thread = threading.Thread(target=self._work, name="exchange", daemon=True)
        self._thread.start()

    def rows(self, count: int) -> range:
        """Return the positions, of so many, whose rows this process holds."""
        return range(self.rank, count, self.world_size)

    def submit(self, request: Callable[[], T]) -> "Future[T]":
        """Let the thread do something when it has done what it was given before; an error is raised by the result."""
        done: Future[T] = Future()
        self._requests.put((request, done))
        return done

    def close(self) -> None:
        """Finish what was submitted, and let go of the group."""
        self._requests.put(None)
        self._thread.join()
        self._group = None

    def fetch(self, held: Tensor, wanted: Sequence[Tensor], out: Tensor) -> Tensor:
        """Bring rows here, in the order of their owners.

        Args:
            held: this process's rows, [n, ...]: row i // W for each position i with i % W == rank.
            wanted: by process, int64 positions on the CPU that it asks for; the same on every process.
            out: [len(wanted[rank]), ...], of the type and on the device of `held`; it is filled.

        Returns:
            int64 on the CPU: the place in `wanted[rank]` of each row of `out`.
        """
        rows, sends, receives, order = self.plan(wanted)
        rows = rows.to(held.device, non_blocking=True)
        if self._group is None:
            torch.index_select(held, 0, rows, out=out)
        else:
            outgoing = torch.index_select(held, 0, rows, out=self._room(held, len(rows), len(out)))
            dist.all_to_all_single(out, outgoing, receives, sends, group=self._group)
        return order

    def plan(self, wanted: Sequence[Tensor]) -> tuple[Tensor, list[int], list[int], Tensor]:
        """Find out what to send and to receive.

        Args:
            wanted: as for `fetch`.

        Returns:
            int64 rows held here that others ask for, in their order; how many go to each process, and come from each;
            what `fetch` returns.
        """
        world, asked = self.world_size, torch.cat(list(wanted))
        from_here, owners = asked % world == self.rank, wanted[self.rank] % world
        asking = torch.arange(world).repeat_interleave(torch.tensor([len(positions) for positions in wanted]))
        sends, receives = (torch.bincount(each, minlength=world).tolist() for each in (asking[from_here], owners))
        return asked[from_here] // world, sends, receives, torch.argsort(owners, stable=True)

    def _room(self, held: Tensor, count: int, usual: int) -> Tensor:
        """Return room for rows to be sent, which is kept.

        As many are sent as received, give or take chance: six standard deviations, of at most the root of that number,
        are beyond what a run sees; a batch by design, such as a picture's for one process alone, may make it grow.
        """
        row = held[:1].numel()
        if len(self._outgoing) < count * row or self._outgoing.device != held.device:
            most = max(count, usual + round(6 * usual**0.5))
            self._outgoing = torch.empty(most * row, dtype=held.dtype, device=held.device)
        return self._outgoing[: count * row].view(count, *held.shape[1:])

    def _work(self) -> None:
        while (item := self._requests.get()) is not None:
            request, done = item
            try:
                done.set_result(request())
            except BaseException as error:
                done.set_exception(error)
            del item, request, done  # hold no batch while waiting
