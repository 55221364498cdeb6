"""The data path alone, for somebody else's loop: a split on the device, and its augmented batches."""

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from fmnist.config.schema import OPTIONS, AugmentConfig, Config, DataConfig, check_values, convert
from fmnist.data.augment import Augment
from fmnist.data.batches import Loader
from fmnist.data.info import SplitName
from fmnist.data.registry import open_source
from fmnist.data.split import Split
from fmnist.runtime.hardware import find_device

OF_TRAINING = {"sampling": ("uniform",), "where": ("auto", "device")}  # options of a run, and their values here


def load(
    name: str = "fashion_mnist",
    split: SplitName = "train",
    *,
    device: str | torch.device | None = None,
    root: str | None = None,
    val_size: int = 0,
    **options: Any,
) -> "ImageSet":
    """Load a split of a data set onto the device.

    Args:
        name: as `data.name` of a config.
        split: train, val or test.
        device: None takes the accelerator where there is one, else the CPU.
        root: folder with the files; None looks where `fmnist train` does, and fetches them once.
        val_size: training images held out as `val`, stratified by class; the same ones in every process.
        options: others of the section `data`, e.g. stored_size.

    Returns:
        The images and labels, on the device.

    Raises:
        ValueError: an unknown name or split, or files that cannot be used; one line.
    """
    if split not in ("train", "val", "test"):
        raise ValueError(f"split {split!r}; valid: train, val, test")
    given = {"name": name, "val_size": val_size} | ({} if root is None else {"root": str(root)}) | options
    if unknown := sorted(set(given) - {field.name for field in fields(DataConfig)}):
        raise ValueError(f"unknown option {unknown[0]!r} of a data set")
    for key, usual in OF_TRAINING.items():
        if given.get(key, usual[0]) not in usual:
            raise ValueError(f"{key} {given[key]!r:.40} has no effect here; valid: {', '.join(usual)}")
    cfg = DataConfig(**{key: convert(f"data.{key}", value) for key, value in given.items()})
    check_values(Config(data=cfg))
    loaded = ImageSet.load(split, open_source(cfg, fetch=True), find_device(device))
    if split == "val" and not len(loaded):
        raise ValueError("split 'val' is empty with val_size 0; valid: 1 and more, the same for train and val")
    if not len(loaded):
        raise ValueError(f"split {split!r} is empty: {loaded.info.title} has no {split} images")
    return loaded


class ImageSet(Split):
    """A split on its device that makes batches for any training loop."""

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        mean: float | tuple[float, ...] | None = None,
        std: float | tuple[float, ...] | None = None,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        **augment: Any,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the batches of one epoch, made on the device.

        Order and augmentation are pure functions of (seed, epoch, image): the same for every process count, and the
        same whether an epoch is begun at its start or in the middle.

        Args:
            batch_size: images of one step over all processes; a multiple of world_size.
            seed, epoch: name the order and the random parameters.
            start: steps to pass over, of an epoch that is continued.
            shuffle: False yields all images as they are stored, the last batch shorter, resized but not augmented.
            rank, world_size: this process and how many there are; each gets its part of every batch.
            mean, std: the images are normalized with these, one number or one per channel, in units of [0, 1]; None:
                those of the data set.
            dtype, channels_last: of the images.
            augment: size (pixels per side; default: as stored, within 8 to 1024), flip, rotation, shift, scale, erase,
                mixup_alpha and the other options of the section `augment`; what is not named is off.

        Returns:
            An iterator over images, dtype [B, C, size, size], and targets: int64 [B], or float32 [B, num_classes] with
            mixup or CutMix.

        Raises:
            ValueError: an unknown option, or a value outside its range; one line.
        """
        whole = {"batch_size": (batch_size, 1), "world_size": (world_size, 1), "rank": (rank, 0), "seed": (seed, 0)}
        for name, (value, low) in (whole | {"epoch": (epoch, 0), "start": (start, 0)}).items():
            if type(value) is not int or value < low:
                raise ValueError(f"{name} is {value!r:.40}; valid: a whole number, {low} or more")
        if rank >= world_size:
            raise ValueError(f"rank is {rank}; valid range: 0 to {world_size - 1}, world_size being {world_size}")
        means, stds = _per_channel(mean, self.info.mean), _per_channel(std, self.info.std)
        if len(means) != len(stds) or len(means) not in {len(self.info.mean), 3}:
            raise ValueError(
                f"mean {mean}, std {std}; valid: one number, or one for each of {len(self.info.mean)} channels"
            )
        if not dtype.is_floating_point or not all(map(math.isfinite, means)) or not all(0 < s < math.inf for s in stds):
            raise ValueError(f"mean {mean}, std {std}, dtype {dtype}; valid: finite, std above 0, a dtype of floats")
        maker = Augment(
            _augment_config(augment, self.images.shape[-1], shuffle=shuffle),
            num_classes=len(self.class_names),
            mean=means,
            std=stds,
            fill=self.info.mean,
            channels_last=channels_last,
            dtype=dtype,
            device=self.images.device,
        )
        if not shuffle:
            _check_start(start, math.ceil(len(self) / batch_size))
            return self._in_order(maker, batch_size, epoch, start, rank, world_size)
        loader = Loader(self, global_batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
        _check_start(start, loader.steps_per_epoch)
        first = epoch * loader.steps_per_epoch
        steps = range(first + start, first + loader.steps_per_epoch)
        return (maker(*loader.micro_batches(step)) for step in steps)

    def _in_order(
        self, maker: Augment, batch_size: int, epoch: int, start: int, rank: int, world_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(start * batch_size, len(self), batch_size):
            low, high = (first + batch_size * part // world_size for part in (rank, rank + 1))
            part = slice(low, high)
            yield maker.evaluation(self.images[part], maker.size(epoch)), self.labels[part]


def _check_start(start: int, steps: int) -> None:
    if start > steps:
        raise ValueError(f"start is {start}; valid range: 0 to {steps}, the steps of an epoch")


def _augment_config(augment: dict[str, Any], side: int, *, shuffle: bool) -> AugmentConfig:
    """Return the augmentation that is asked for, and no other, for images of a side; refuse what is none."""
    known = {field.name for field in fields(AugmentConfig)}
    if unknown := sorted(set(augment) - known):
        raise ValueError(f"unknown augmentation {unknown[0]!r}; valid: {', '.join(sorted(known))}")
    if augment.keys() - {"size"} and not shuffle:
        raise ValueError("shuffle is False, which augments nothing; valid with it: size")
    typed = {name: convert(f"augment.{name}", value) for name, value in augment.items()}
    low, high = OPTIONS["augment.size"].metadata["valid"]  # a side as stored may lie outside
    cfg = AugmentConfig(**{"size": min(max(side, low), high), "flip": 0.0} | typed)
    check_values(Config(augment=cfg))
    return cfg


def _per_channel(given: float | tuple[float, ...] | None, own: tuple[float, ...]) -> tuple[float, ...]:
    if given is None:
        return own
    return tuple(given) if isinstance(given, tuple | list) else (given,) * len(own)
