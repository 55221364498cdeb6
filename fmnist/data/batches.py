"""The epoch's order, and this process's part of each global batch.

Order and augmentation parameters are pure functions of (seed, epoch, sample): they are drawn on the CPU, so that every
device and process count sees the same ones, and moved once per epoch. Any batch of any step can be made again alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fmnist.data.split import Split

# Random numbers of one sample and epoch; augment_table.py says what each decides. The first FIRST_UNIFORMS are drawn
# together; each that is added later has a key of its own, so that it moves no draw of an older run.
FIRST_UNIFORMS = 15  # never changed
NUM_UNIFORMS = 26
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
    """

    split: Split
    indices: Tensor
    partners: Tensor
    uniforms: Tensor
    epoch: int
    key: tuple[int, int, int]

    @property
    def step(self) -> int:
        """Optimizer updates completed before the one that takes this micro-batch."""
        return self.key[1]

    @property
    def seed(self) -> int:
        """What seeds dropout and drop path."""
        return mix_key(*self.key)


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
    ) -> None:
        if global_batch_size > len(split):
            raise ValueError(
                f"batch.global_batch_size is {global_batch_size} but there are {len(split)} training images"
            )
        micro = micro_batch_size or max(1, global_batch_size // world_size)
        if global_batch_size % (micro * world_size):
            raise ValueError(
                f"batch.global_batch_size {global_batch_size} is not a multiple of "
                f"micro_batch_size {micro} x {world_size} processes = {micro * world_size}"
            )
        self.split, self.seed, self.rank, self.world_size = split, seed, rank, world_size
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro
        self.accumulation_steps = global_batch_size // (micro * world_size)
        self.steps_per_epoch = len(split) // global_batch_size
        self._tables: tuple[int, Tensor, Tensor] | None = None

    def _epoch_tables(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the epoch's order, int64 [N], and its uniforms, float32 [N, NUM_UNIFORMS], on the device."""
        if self._tables is None or self._tables[0] != epoch:
            device = self.split.labels.device
            order = torch.randperm(len(self.split), generator=epoch_generator(self.seed, epoch, ORDER))
            uniforms = draw_uniforms(len(self.split), self.seed, epoch)
            self._tables = (epoch, to_device(order, device), to_device(uniforms, device))
        return self._tables[1:]

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """Return this process's accumulation_steps micro-batches of one step.

        Micro-batch a of rank r starts at position (a * world_size + r) * micro_batch_size of the global batch: so one
        process with accumulation 2 and two processes without it run the same forwards.

        Args:
            step: optimizer updates completed before this one, from 0.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        order, uniforms = self._epoch_tables(epoch)
        start = position * self.global_batch_size
        batch = order[start : start + self.global_batch_size]
        mirrored = batch.flip(0)  # the first is mixed with the last, and so on, whichever process holds them
        parts = []
        for accumulation in range(self.accumulation_steps):
            first = (accumulation * self.world_size + self.rank) * self.micro_batch_size
            part = slice(first, first + self.micro_batch_size)
            parts.append(
                MicroBatch(
                    split=self.split,
                    indices=batch[part],
                    partners=mirrored[part],
                    uniforms=uniforms,
                    epoch=epoch,
                    key=(self.seed, step, first),
                )
            )
        return parts


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor without making the host wait for the device's queue."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
