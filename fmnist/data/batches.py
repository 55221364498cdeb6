"""The epoch's order, and this process's part of each global batch.

Order and augmentation parameters are pure functions of (seed, epoch, sample): they are drawn on the CPU, so that every
device and process count sees the same ones, and moved once per epoch. Any batch of any step can be made again alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fmnist.data.balance import balanced_order, class_members, own_draws
from fmnist.data.split import Split
from fmnist.data.staging import Staged, Staging
from fmnist.runtime.background import Background
from fmnist.runtime.console import counted
from fmnist.runtime.exchange import Exchange
from fmnist.runtime.hardware import to_device

# Random numbers of one sample and epoch; augment_table.py says what each decides. The first FIRST_UNIFORMS are drawn
# together; each that is added later has a key of its own, so that it moves no draw of an older run.
FIRST_UNIFORMS = 15  # never changed
NUM_UNIFORMS = 26
NOTHING_DRAWN = (-1, torch.empty(0), torch.empty(0))
ORDER, UNIFORMS, FLIP_IN_TURN, LATER = 0, 1, 2, 3  # what a generator is for, the last part of its key


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one forward sees, by reference: the data path gathers it by index.

    Attributes:
        split: all the training images.
        indices: int64 [B], the samples.
        partners: int64 [B], the sample that mixup and CutMix mix into each.
        uniforms: float32 [N, NUM_UNIFORMS] in [0, 1), this epoch's augmentation parameters of every sample.
        epoch: passes over the data completed before this one.
        key: (seed, step, position of the first sample in the global batch): names this micro-batch for ever.
        class_weights: float32 [C], of the loss; None: all classes weigh the same.
        total_weight: float32 [], this micro-batch's equal share of the weights of the global batch's labels.
        pixels: gives the images of the samples, and of the partners after them where they are mixed in; None: they are
            read by index from the split, which is on the device.
        table: what `Augment.table` makes of the uniforms, where a CUDA graph reads it from memory of its own.
        draws: int64 [2, B], where an epoch repeats images: whose augmentation parameters the samples and their partners
            have; None: their own.
    """

    split: Split
    indices: Tensor
    partners: Tensor
    uniforms: Tensor
    epoch: int
    key: tuple[int, int, int]
    class_weights: Tensor | None = None
    total_weight: Tensor | None = None
    pixels: Callable[[], Staged] | None = None
    table: Tensor | None = None
    draws: Tensor | None = None

    @property
    def step(self) -> int:
        """Optimizer updates completed before the one that takes this micro-batch."""
        return self.key[1]

    @property
    def seed(self) -> int:
        """What seeds dropout and drop path."""
        return mix_key(*self.key)

    @property
    def _chosen(self) -> dict[str, Tensor]:
        values = {name: getattr(self, name) for name in ("indices", "partners", "draws", "total_weight")}
        return {name: value for name, value in values.items() if value is not None}

    def standing(self, table: Tensor) -> "MicroBatch":
        """Return a micro-batch in memory of its own, which `take` fills, with a table."""
        own: dict[str, Any] = {name: tensor.clone() for name, tensor in self._chosen.items()}
        return replace(self, table=table, **own)

    def first(self, most: int) -> "MicroBatch":
        """Return a micro-batch of no more than so many of its samples."""
        draws = None if self.draws is None else self.draws[:, :most]
        return replace(self, indices=self.indices[:most], partners=self.partners[:most], draws=draws)

    def take(self, other: "MicroBatch") -> None:
        """Put the samples of another micro-batch of the same size into the memory of this one."""
        torch._foreach_copy_([*self._chosen.values()], [*other._chosen.values()])


def mix_key(*key: int) -> int:
    """Hash integers to a 63-bit seed; keys that differ in a single bit give unrelated seeds (splitmix64)."""
    mixed = 0
    for part in key:
        mixed = (mixed + part + 0x9E3779B97F4A7C15) % 2**64
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % 2**64
        mixed ^= mixed >> 31
    return mixed % 2**63


def epoch_generator(seed: int, epoch: int, purpose: int) -> torch.Generator:
    """Return a CPU generator keyed by (seed, epoch, purpose)."""
    return torch.Generator().manual_seed(mix_key(seed, epoch, purpose))


def draw_uniforms(num_images: int, seed: int, epoch: int) -> Tensor:
    """Return an epoch's float32 [num_images, NUM_UNIFORMS] in [0, 1), on the CPU."""
    first = torch.rand(num_images, FIRST_UNIFORMS, generator=epoch_generator(seed, epoch, UNIFORMS))
    later = range(LATER, LATER + NUM_UNIFORMS - FIRST_UNIFORMS)
    more = [torch.rand(num_images, 1, generator=epoch_generator(seed, epoch, purpose)) for purpose in later]
    return torch.cat([first, *more], dim=1)


def batch_size_for(num_images: int) -> int:
    """Return a global batch size for so few training images: a quarter of them, so that an epoch has a few steps."""
    return max(1, min(32, num_images // 4))


class Loader:
    """Cut each epoch's order into global batches, and each of those into this process's micro-batches.

    The last, incomplete batch of an epoch is dropped; which samples that are differs from epoch to epoch.

    Args:
        split: the training images, on the device.
        global_batch_size: images per optimizer step over all processes; at most len(split).
        micro_batch_size: images per forward on one process; None is global_batch_size / world_size.
        seed: the run's seed.
        rank: this process, 0 to world_size - 1.
        world_size: processes.
        sampling: uniform: each image once an epoch; balanced: all classes equally often, see `balanced_order`.
        class_weights: float32 [C] on the device, of the loss; None: all classes weigh the same.
        exchange: brings the images of each micro-batch, where the split's are not all on the device; None: they are.
        mixes: partners are mixed in, and have to be brought too.

    Raises:
        ValueError: global_batch_size is more than the images, or not a multiple of micro_batch_size x world_size.
    """

    def __init__(
        self,
        split: Split,
        *,
        global_batch_size: int,
        micro_batch_size: int | None = None,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        sampling: Literal["uniform", "balanced"] = "uniform",
        class_weights: Tensor | None = None,
        exchange: Exchange | None = None,
        mixes: bool = False,
    ) -> None:
        if global_batch_size > len(split):
            raise ValueError(
                f"batch.global_batch_size is {global_batch_size} but there are {len(split)} training images; valid: "
                f"at most {len(split)}, e.g. --batch.global_batch_size {batch_size_for(len(split))}"
            )
        micro = micro_batch_size or max(1, global_batch_size // world_size)
        if global_batch_size % (micro * world_size):
            raise ValueError(
                f"batch.global_batch_size {global_batch_size} is not a multiple of "
                f"micro_batch_size {micro} x {counted(world_size, 'process', 'processes')} = {micro * world_size}"
            )
        self.split, self.seed, self.rank, self.world_size = split, seed, rank, world_size
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro
        self.accumulation_steps = global_batch_size // (micro * world_size)
        self.steps_per_epoch = len(split) // global_batch_size
        self._members = class_members(split.labels) if sampling == "balanced" else []
        if len({len(member) for member in self._members}) == 1:  # then the order and its bits are the uniform ones
            sampling = "uniform"
        self.sampling, self.class_weights = sampling, class_weights
        self._tables: tuple[int, Tensor, Tensor] | None = None
        self._draws = torch.empty(0, dtype=torch.int64)  # of the tables' epoch, where it repeats images
        self._drawing, self._drawn = Background(), NOTHING_DRAWN  # the tables of the next epoch
        self._ahead = -1  # the epoch that is drawn, or was drawn last
        self._orders: dict[int, Tensor] = {}  # of two epochs: one micro-batch is staged ahead
        self.exchange, self.mixes = exchange, mixes
        self.staging = Staging(split, exchange, self._wanted) if exchange is not None else None

    def whole(self) -> "Loader":
        """Return the loader of one process that makes every micro-batch of a step, by index."""
        return self._with(rank=0, world_size=1, exchange=None)

    def cut(self, micro_batch_size: int) -> "Loader":
        """Return a loader of the same batches in micro-batches of another size."""
        return self._with(micro_batch_size=micro_batch_size)

    def _with(self, **changes: int | None) -> "Loader":
        names = "global_batch_size", "micro_batch_size", "seed", "rank", "world_size", "sampling", "class_weights"
        return Loader(self.split, **{name: getattr(self, name) for name in (*names, "exchange", "mixes")} | changes)

    def trial(self, step: int) -> MicroBatch:
        """Return this process's first micro-batch of a step, black where its images have to be brought here."""
        batch = self.micro_batches(step)[0]
        return batch if self.staging is None else replace(batch, pixels=self.staging.blank)

    def for_main(self, step: int, most: int | None = None) -> list[MicroBatch]:
        """Return the micro-batches of a step over all processes, to be looked at by the main one; all call this.

        Args:
            step: as for `micro_batches`.
            most: leave out all but so many images of the first micro-batch.
        """
        batches = self.whole().micro_batches(step)
        if most is not None:
            batches = [batches[0].first(most)]
        if self.staging is None:
            return batches
        samples = [torch.cat((b.indices, b.partners) if self.mixes else (b.indices,)) for b in batches]
        staged = [self.staging.for_main(positions) for positions in samples]
        return [replace(b, pixels=partial(lambda here: here, here)) for b, here in zip(batches, staged, strict=True)]

    def _order(self, epoch: int) -> Tensor:
        """Return the epoch's order, int64 [N], on the CPU; called from several threads.

        The epoch before is kept, too: one micro-batch is staged ahead.
        """
        orders = self._orders
        if epoch not in orders:
            generator = epoch_generator(self.seed, epoch, ORDER)
            if self.sampling == "balanced":
                order = balanced_order(self._members, generator)
            else:
                order = torch.randperm(len(self.split), generator=generator)
            newest = dict([*orders.items()][-1:])
            orders = self._orders = newest | {epoch: order}
        return orders[epoch]

    def _wanted(self, number: int) -> list[Tensor]:
        """Return the positions that each process needs for its micro-batch of this number, on the CPU: see Staging."""
        step, accumulation = divmod(number, self.accumulation_steps)
        epoch, position = divmod(step, self.steps_per_epoch)
        batch = self._order(epoch)[position * self.global_batch_size :][: self.global_batch_size]
        parts = [self._part(accumulation, rank) for rank in range(self.world_size)]
        reverse = batch.flip(0)
        return [torch.cat((batch[part], reverse[part])) if self.mixes else batch[part] for part in parts]

    def _part(self, accumulation: int, rank: int) -> slice:
        first = (accumulation * self.world_size + rank) * self.micro_batch_size
        return slice(first, first + self.micro_batch_size)

    def _epoch_tables(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the epoch's order, int64 [N], and its uniforms, float32 [N, NUM_UNIFORMS], on the device."""
        if self._tables is None or self._tables[0] != epoch:
            device = self.split.labels.device
            self._drawing.wait()
            drawn = self._drawn if self._drawn[0] == epoch else self._draw(epoch)
            self._drawn = NOTHING_DRAWN  # on a GPU the host has no more need of them
            self._tables = (epoch, to_device(drawn[1], device), to_device(drawn[2], device))
            if self.sampling == "balanced":
                self._draws = to_device(own_draws(drawn[1]), device)
        return self._tables[1:]

    def _draw(self, epoch: int) -> tuple[int, Tensor, Tensor]:
        """Draw an epoch's tables on the host."""
        self._drawn = (epoch, self._order(epoch), draw_uniforms(len(self.split), self.seed, epoch))
        return self._drawn

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """Return this process's accumulation_steps micro-batches of one step.

        Micro-batch a of rank r starts at position (a * world_size + r) * micro_batch_size of the global batch: so one
        process with accumulation 2 and two processes without it run the same forwards.

        Args:
            step: optimizer updates completed before this one, from 0.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        order, uniforms = self._epoch_tables(epoch)
        if position == 1 and self._ahead != epoch + 1:  # so that no step waits for them
            self._drawing.wait()
            self._ahead = epoch + 1
            self._drawing.start(self._draw, epoch + 1)
        start = position * self.global_batch_size
        batch = order[start : start + self.global_batch_size]
        reverse = batch.flip(0)  # the first is mixed with the last, and so on, whichever process holds them
        draws = None
        if self.sampling == "balanced":
            draws = self._draws[start : start + self.global_batch_size]
            draws = torch.stack((draws, draws.flip(0)))
        weights, total_weight = self.class_weights, None
        if weights is not None:  # of the whole batch, which every process knows: no share depends on how it is cut
            total_weight = weights[self.split.labels[batch]].sum() * (self.micro_batch_size / self.global_batch_size)
        parts = []
        for accumulation in range(self.accumulation_steps):
            part = self._part(accumulation, self.rank)
            pixels = None
            if self.staging is not None:
                pixels = partial(self.staging.take, step * self.accumulation_steps + accumulation)
            parts.append(
                MicroBatch(
                    split=self.split,
                    indices=batch[part],
                    partners=reverse[part],
                    uniforms=uniforms,
                    epoch=epoch,
                    key=(self.seed, step, part.start),
                    class_weights=weights,
                    total_weight=total_weight,
                    pixels=pixels,
                    draws=None if draws is None else draws[:, part],
                )
            )
        return parts
