"""The project's own data path in the race: fused, compiled and eager."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fmnist.benchmark.ground_truth import Chain, Fixed
from fmnist.benchmark.pipelines import ERASE, FLIP, ROTATION, SHIFT, Pipeline, Setting, UnavailableError
from fmnist.config.schema import AugmentConfig
from fmnist.data import augment_table as params
from fmnist.data.augment import Augment
from fmnist.data.batches import NUM_UNIFORMS, MicroBatch
from fmnist.data.fashion_mnist import MEAN, NUM_CLASSES, STD

Backend = Literal["triton", "compiled", "eager"]


def make_augment(setting: Setting, backend: Backend) -> Augment:
    """Build our augmentation with the race's parameters: the one place that knows its constructor.

    Raises:
        UnavailableError: this backend cannot run here.
    """
    if backend == "triton" and setting.device.type == "cpu":
        raise UnavailableError("the Triton kernel needs a GPU (its interpreter is for tests)")
    cfg = AugmentConfig(size=setting.size, flip=FLIP, rotation=ROTATION, shift=SHIFT, erase=ERASE, backend=backend)
    dtype, device = setting.dtype, setting.device
    try:
        return Augment(cfg, num_classes=NUM_CLASSES, mean=(MEAN,), std=(STD,), dtype=dtype, device=device)
    except ValueError as error:
        raise UnavailableError(str(error)) from None


class Ours(Pipeline):
    """The project's data path: the split as one uint8 tensor on the device, everything else done there."""

    backend: Backend
    chain: Chain = "one warp"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._augment, self._loader = make_augment(setting, self.backend), setting.loader()

    def micro_batches(self) -> Sequence[MicroBatch]:
        self.position += 1
        return self._loader.micro_batches(self.position - 1)

    def augment(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        return self._augment(batch)

    def pinned(self, indices: Tensor, fixed: Fixed) -> Tensor:
        split, count = self.setting.split, len(indices)
        # A whole batch, so that the gate sees the very code, compiled for its shape, that is timed.
        indices = indices.repeat(math.ceil(self.setting.batch_size / count))[: max(count, self.setting.batch_size)]
        uniforms = torch.tensor([pinned_uniforms(fixed, split.images.shape[-1])]).repeat(len(split), 1)
        batch = MicroBatch(
            split=split,
            indices=indices,
            partners=indices,
            uniforms=uniforms.to(self.setting.device),
            epoch=0,
            key=(0, 0, 0),
        )
        return self.augment(batch)[0][:count]


def pinned_uniforms(fixed: Fixed, side: int) -> list[float]:
    """Return the row of uniforms from which our augmentation makes just these parameters."""
    row = [0.99] * NUM_UNIFORMS  # 0.99 is above the probabilities of flipping and erasing
    row[params.ZOOM] = 0.5
    row[params.ANGLE] = (fixed.angle / ROTATION + 1) / 2
    row[params.SHIFT_X] = (fixed.shift_x / side / SHIFT + 1) / 2
    row[params.SHIFT_Y] = (fixed.shift_y / side / SHIFT + 1) / 2
    if fixed.flip:
        row[params.FLIP] = 0.0
    if fixed.box:
        x0, y0, x1, y1 = fixed.box
        width, height = x1 - x0, y1 - y0
        low, high = (math.log(aspect) for aspect in params.ERASE_ASPECTS)
        least, most = params.ERASE_AREAS
        row[params.ERASE] = 0.0
        row[params.ERASE_AREA] = (width * height - least) / (most - least)
        row[params.ERASE_ASPECT] = (math.log(width / height) - low) / (high - low)
        row[params.ERASE_X], row[params.ERASE_Y] = x0 / (1 - width), y0 / (1 - height)
    return row


class OursTriton(Ours):
    name, description, backend = "ours-triton", "ours: one fused Triton kernel", "triton"
    bytes_rule = "formula"


class OursCompiled(Ours):
    name, description, backend = "ours-compiled", "ours: plain torch, compiled", "compiled"
    bytes_rule = "formula"


class OursEager(Ours):
    name, description, backend = "ours-eager", "ours: plain torch, eager", "eager"
