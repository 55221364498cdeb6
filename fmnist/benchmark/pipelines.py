"""What every loader in the race is, what they share, and the one without a data path."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from fmnist.benchmark.ground_truth import Chain, Fixed, enlarged
from fmnist.data.batches import Loader, MicroBatch, Split
from fmnist.data.fashion_mnist import NUM_CLASSES

FLIP, ROTATION, SHIFT, ERASE = 0.5, 10.0, 0.1, 0.25  # probability, degrees, fraction of the side, probability
ERASE_AREA, ERASE_ASPECT = (0.02, 0.33), (0.3, 3.3)  # torchvision's defaults, and ours


class UnavailableError(Exception):
    """This loader cannot run here; the message says what it needs."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all loaders of one race share.

    Attributes:
        split: uint8 images and labels on the device.
        size: pixels per side of what they deliver.
        batch_size: images per batch of this process.
        dtype: of the images delivered, the model's.
        seed: of the order.
        rank, world_size: this process's part of each global batch.
        workers: processes of a DataLoader with all cores.
    """

    split: Split
    size: int
    batch_size: int
    dtype: torch.dtype
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    workers: int = 1

    @property
    def device(self) -> torch.device:
        """Where the batches are delivered."""
        return self.split.labels.device

    def loader(self, split: Split | None = None) -> Loader:
        """Return the order that all pipelines follow; a copy of the split elsewhere gives the same one."""
        return Loader(
            split or self.split,
            global_batch_size=self.batch_size * self.world_size,
            seed=self.seed,
            rank=self.rank,
            world_size=self.world_size,
        )


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """A finished batch in the place of a MicroBatch: `train_step` reads only its key, `augment` the rest."""

    images: Tensor
    labels: Tensor
    key: tuple[int, int, int]


class Pipeline:
    """A loader in the race; also the base of all of them.

    Attributes:
        name: short, for options and JSON.
        description: for tables, with what is weaker or different about it.
        chain: how many interpolations make an image.
        checked: there is something for the correctness gate to check.
        multiple: timed steps are a multiple of this: worker processes deliver in bursts.
        bytes_rule: how the device bytes per image are known: by formula, op by op, or not at all.
    """

    name: str
    description: str
    chain: Chain = "warp, then resize"
    checked: bool = True
    multiple: int = 1
    bytes_rule: Literal["formula", "operations", "none"] = "operations"

    def __init__(self, setting: Setting) -> None:
        self.setting, self.position = setting, 0

    @property
    def resizes_first(self) -> bool:
        """It warps the resized image, not the stored one."""
        return self.chain == "resize, then warp"

    def check_resize_first(self) -> None:
        """Leave a loader that resizes first out where there is nothing to resize."""
        if self.resizes_first and self.setting.split.images.shape[-1] == self.setting.size:
            raise UnavailableError("nothing to resize at this size")

    def seen(self, fixed: Fixed) -> Fixed:
        """Return given parameters in the pixels of the image that this loader warps."""
        factor = self.setting.size / self.setting.split.images.shape[-1]
        return enlarged(fixed, factor) if self.resizes_first else fixed

    def start(self) -> None:
        """Begin at the first batch of the order; called before every round."""
        self.position = 0

    def stop(self) -> None:
        """Leave nothing at work in the background: the next pipeline is timed now."""

    def fetch(self) -> tuple[Tensor, Tensor]:
        """Return the next batch: images [B, 1, S, S] in the setting's dtype, labels int64 [B], on the device."""
        raise NotImplementedError

    def pinned(self, indices: Tensor, fixed: Fixed) -> Tensor:
        """Push these samples (int64 [B], on the device) through the same transform with given parameters."""
        raise NotImplementedError

    def micro_batches(self) -> Sequence[MicroBatch]:
        """Return what `train_step` takes next."""
        images, labels = self.fetch()
        self.position += 1
        key = (self.setting.seed, self.position, 0)
        return [cast(MicroBatch, Delivered(images=images, labels=labels, key=key))]

    def augment(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return images and labels of a micro-batch; `train_step` calls it."""
        delivered = cast(Delivered, batch)
        return delivered.images, delivered.labels

    def next(self) -> tuple[Tensor, Tensor]:
        """Return the next batch, finished, on the device in the model's dtype."""
        return self.augment(self.micro_batches()[0])


class Synthetic(Pipeline):
    """One batch of noise for ever: what the model alone can do, 1.00 in the training race."""

    name, description = "synthetic", "one synthetic batch for ever (no data path)"
    checked, bytes_rule = False, "none"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        generator = torch.Generator().manual_seed(setting.seed)
        shape = (setting.batch_size, 1, setting.size, setting.size)
        # Normal numbers, as normalised images are: zeros would run faster on a GPU.
        self.images = torch.randn(shape, generator=generator).to(setting.device, setting.dtype)
        self.labels = torch.randint(NUM_CLASSES, shape[:1], generator=generator).to(setting.device)

    def fetch(self) -> tuple[Tensor, Tensor]:
        return self.images, self.labels
