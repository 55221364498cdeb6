"""The images of a micro-batch, brought beside each other from where they lie: other processes, or host memory.

One micro-batch ahead, in the thread of the exchange and, on a GPU, on a stream of its own: two buffers are kept, one
that the step reads and one that is filled meanwhile.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fmnist.data.split import Split
from fmnist.runtime.exchange import Exchange
from fmnist.runtime.hardware import to_device

Arrived = tuple[Tensor, Any]  # the order of `Exchange.fetch`, and an event after which a GPU may read


@dataclass(frozen=True, kw_only=True)
class Staged:
    """Images beside each other; the next but one micro-batch overwrites them.

    Attributes:
        images: uint8 [S, C, H, W] or [S, H, W] on the device, in any order.
        positions: int64 [S] on the device, of each in the split.
        places: int64 [S] on the device: where the images asked for stand, in the order asked for.
    """

    images: Tensor
    positions: Tensor
    places: Tensor


class Staging:
    """Two buffers that are filled in turn.

    Args:
        split: its images are spread over the processes, or lie in host memory.
        exchange: brings them, on its thread.
        wanted: of a micro-batch, counted over all steps and accumulations: the int64 positions on the CPU that each
            process asks for; the same on every process, and equally many for each.
    """

    def __init__(self, split: Split, exchange: Exchange, wanted: Callable[[int], Sequence[Tensor]]) -> None:
        self._split, self._exchange, self._wanted = split, exchange, wanted
        self._device = split.labels.device
        self._stream = None if self._device.type == "cpu" else torch.Stream(self._device)
        self._buffers: list[Tensor] = []
        self._pinned: list[tuple[Tensor, Any]] = []  # of images in host memory, on their way to a GPU
        self._next: tuple[int, Tensor, Future[Arrived]] | None = None
        self._waited_s = 0.0

    def take(self, number: int) -> Staged:
        """Return the images of a micro-batch, and have those of the next one brought.

        Args:
            number: of the micro-batch; all processes take the same ones in the same order.
        """
        since = time.perf_counter()
        if self._next is None or self._next[0] != number:
            self._next = self._request(number)
        _, mine, arriving = self._next
        order, ready = arriving.result()
        self._waited_s += time.perf_counter() - since
        if self._stream is not None:
            torch.accelerator.current_stream(self._device).wait_event(ready)
        self._next = self._request(number + 1)
        return self._staged(self._buffers[number % 2], mine, order)

    def for_main(self, positions: Tensor) -> Staged:
        """Return images on the main process, for a picture; called by all of them, and the others get none.

        Args:
            positions: int64, on any device.
        """
        positions = positions.cpu()
        nobody = positions[:0]
        wanted = [positions, *[nobody] * (self._exchange.world_size - 1)]
        mine = wanted[self._exchange.rank]
        out = self._empty(len(mine))
        order, ready = self._submit(wanted, mine, out).result()
        if self._stream is not None:
            torch.accelerator.current_stream(self._device).wait_event(ready)
        return self._staged(out, mine, order)

    def blank(self) -> Staged:
        """Return black images as many as a micro-batch has, for a trial of the memory; nothing is brought."""
        mine = self._wanted(0)[self._exchange.rank]
        return self._staged(torch.zeros_like(self._empty(len(mine))), mine, torch.arange(len(mine)))

    def probe(self) -> tuple[int, float]:
        """Time one micro-batch's way here, where nothing else goes on; called by all processes.

        Returns:
            The bytes of it that lie on other processes, and the seconds that it takes on this one.
        """
        wanted = self._wanted(0)
        mine = wanted[self._exchange.rank]
        out, seconds = self._empty(len(mine)), 0.0
        for _ in range(2):  # the first connects the processes
            since = time.perf_counter()
            _, ready = self._submit(wanted, mine, out).result()
            if ready is not None:
                ready.synchronize()
            seconds = time.perf_counter() - since
        elsewhere = mine % self._exchange.world_size != self._exchange.rank
        return int(elsewhere.sum()) * out[:1].numel(), seconds

    def waited(self) -> float:
        """Return how long the host has waited for images so far, seconds."""
        return self._waited_s

    @property
    def num_bytes(self) -> int:
        """Bytes of both buffers on the device."""
        return 2 * len(self._wanted(0)[self._exchange.rank]) * self._split.images[:1].numel()

    def _request(self, number: int) -> tuple[int, Tensor, Future[Arrived]]:
        wanted = self._wanted(number)
        mine = wanted[self._exchange.rank]
        while len(self._buffers) < 2:
            self._buffers.append(self._empty(len(mine)))
        return number, mine, self._submit(wanted, mine, self._buffers[number % 2])

    def _submit(self, wanted: Sequence[Tensor], mine: Tensor, out: Tensor) -> "Future[Arrived]":
        # what the device has been given to do before this reads that memory; what it is given later does not
        free = None if self._stream is None else torch.accelerator.current_stream(self._device).record_event()

        def bring() -> Arrived:
            with self._stream or nullcontext():
                if self._stream is not None and free is not None:
                    self._stream.wait_event(free)
                if self._split.rows is not None:
                    order = self._exchange.fetch(self._split.images, wanted, out)
                else:
                    order = self._from_host(mine, out)
                return order, None if self._stream is None else self._stream.record_event()

        return self._exchange.submit(bring)

    def _from_host(self, mine: Tensor, out: Tensor) -> Tensor:
        unread = self._split.unread
        images, at = (self._split.images, mine) if unread is None else (unread.array, unread.at[mine])
        if self._stream is None:
            torch.index_select(images, 0, at, out=out)
            return torch.arange(len(mine))
        if len(self._pinned) < 2:
            pinned = torch.empty(out.shape, dtype=out.dtype, pin_memory=True)
        else:
            pinned, copied = self._pinned.pop(0)
            copied.synchronize()  # the copy before the last: it is over
        if pinned.shape != out.shape:
            pinned = torch.empty(out.shape, dtype=out.dtype, pin_memory=True)
        torch.index_select(images, 0, at, out=pinned)
        out.copy_(pinned, non_blocking=True)
        self._pinned.append((pinned, self._stream.record_event()))
        return torch.arange(len(mine))

    def _empty(self, count: int) -> Tensor:
        images = self._split.images
        return torch.empty((count, *images.shape[1:]), dtype=images.dtype, device=self._device)

    def _staged(self, images: Tensor, mine: Tensor, order: Tensor) -> Staged:
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order))
        positions, places = (to_device(tensor, self._device) for tensor in (mine[order], places))
        return Staged(images=images, positions=positions, places=places)
