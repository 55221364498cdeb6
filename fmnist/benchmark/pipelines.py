"""What every loader in the race shares, the synthetic one, and ours; the others are in `libraries.py`."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from fmnist.config.schema import AugmentConfig
from fmnist.data import augment_table as table
from fmnist.data.augment import Augment
from fmnist.data.batches import NUM_UNIFORMS, Loader, MicroBatch
from fmnist.data.fashion_mnist import NUM_CLASSES
from fmnist.data.split import Split

Chain = Literal["one warp", "warp, then resize", "resize, then warp"]
FLIP, ROTATION, SHIFT, ERASE = 0.5, 10.0, 0.1, 0.25  # probability, degrees, fraction of the side, probability
CROP, CROP_ASPECT, JITTER = 0.35, 4 / 3, 0.2  # of photographs: least share of the area, ratio, largest change
COLOURS = ("brightness", "contrast", "saturation")


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """One augmentation with given parameters: the image is flipped, then rotated, then shifted."""

    flip: bool = False  # left and right
    angle: float = 0.0  # degrees, counter-clockwise as seen
    shift_x: int = 0  # whole source pixels, to the right
    shift_y: int = 0  # and down
    box: tuple[float, float, float, float] | None = None  # to erase: x0, y0, x1, y1 as fractions of the side
    crop: tuple[int, int, int, int] | None = None  # shown alone, before the flip: x0, y0, width, height, source pixels
    brightness: float = 1.0  # factors of the colours
    contrast: float = 1.0
    saturation: float = 1.0

    def box_pixels(self, size: int) -> tuple[int, int, int, int]:
        """Return the box in whole output pixels, all zero if there is none."""
        x0, y0, x1, y1 = (round(edge * size) for edge in self.box or (0, 0, 0, 0))
        return x0, y0, x1, y1

    def factors(self) -> dict[str, float]:
        """Return the colours' factors by the names that torchvision and kornia give them."""
        return {f"{name}_factor": getattr(self, name) for name in COLOURS}

    def enlarged(self, factor: float) -> "Fixed":
        """Return the same augmentation for an image resized by this factor."""
        return replace(self, shift_x=round(self.shift_x * factor), shift_y=round(self.shift_y * factor))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all loaders of one race share."""

    split: Split  # on the device
    size: int  # pixels per side of the images delivered
    batch_size: int  # images per batch of this process
    dtype: torch.dtype  # of the images delivered, the model's
    rank: int = 0
    world_size: int = 1
    workers: int = 1  # processes of a DataLoader that uses all cores
    repeat_epoch: bool = False  # ours repeats the first epoch: no epoch's tables are drawn while the clock runs

    @property
    def device(self) -> torch.device:
        """Where the batches are delivered."""
        return self.split.labels.device

    @property
    def channels(self) -> int:
        """1, or 3 where photographs are raced: those are cropped and recoloured, not turned, shifted and erased."""
        return len(self.split.info.mean)

    def loader(self) -> Loader:
        """Return the order that all loaders follow."""
        batch = self.batch_size * self.world_size
        return Loader(self.split, global_batch_size=batch, seed=0, rank=self.rank, world_size=self.world_size)


class Pipeline(ABC):
    """A loader in the race, a key of LOADERS; one whose name ends in resize-first warps the resized image."""

    multiple: int = 1  # timed steps are a multiple of this: worker processes deliver in bursts
    bytes_rule: Literal["formula", "operations", "none"] = "operations"  # how the bytes per image are known
    bytes_per_image: float | None = None  # as the gate found it
    chain: Chain = "warp, then resize"
    own_rounding = 0.0  # beyond the gate's tolerance, in [0, 1] units
    contrast_about: Literal["its own grey", "the data set's grey"] = "its own grey"

    def __init__(self, name: str, setting: Setting) -> None:
        self.name, self.setting, self.position, self.order = name, setting, 0, setting.loader()
        if setting.channels == 3:  # the crop is the one warp there
            self.chain = "one warp"
        elif name.endswith("resize-first"):
            self.chain = "resize, then warp"
            if setting.size == setting.split.images.shape[-1]:
                raise ValueError("nothing to resize at this size")

    def start(self) -> None:
        """Begin at the first batch; called before every round."""
        self.position = 0

    def stop(self) -> None:  # noqa: B027 nothing to do for most
        """Leave nothing at work in the background: another loader is timed next."""

    def micro_batch(self) -> MicroBatch:
        """Return the samples of the next batch."""
        step = self.position % self.order.steps_per_epoch if self.setting.repeat_epoch else self.position
        self.position += 1
        return self.order.micro_batches(step)[0]

    @abstractmethod
    def next(self) -> tuple[Tensor, Tensor]:
        """Return the next batch: images [B, C, S, S] in the setting's dtype, labels int64 [B], on the device."""

    @abstractmethod
    def apply_fixed(self, indices: Tensor, fixed: Fixed) -> Tensor:
        """Push samples (int64 [B]) through the same transform with given parameters, in pixels of the warped image."""


class Synthetic(Pipeline):
    """One batch of noise, repeated: the speed of the model alone, 1.00 in the training race."""

    bytes_rule = "none"

    def __init__(self, name: str, setting: Setting) -> None:
        super().__init__(name, setting)
        generator = torch.Generator().manual_seed(0)
        shape = (setting.batch_size, 1, setting.size, setting.size)
        # Normal numbers, as normalised images are: zeros would run faster on a GPU.
        images = torch.randn(shape, generator=generator).to(setting.device, setting.dtype)
        self.batch = images, torch.randint(NUM_CLASSES, shape[:1], generator=generator).to(setting.device)

    def next(self) -> tuple[Tensor, Tensor]:
        return self.batch

    def apply_fixed(self, indices: Tensor, fixed: Fixed) -> Tensor:
        return self.batch[0][: len(indices)]  # noise, which no gate passes


class Ours(Pipeline):
    """The project's data path: the split as one uint8 tensor on the device, everything else done there."""

    chain = "one warp"
    contrast_about = "the data set's grey"

    def __init__(self, name: str, setting: Setting) -> None:
        super().__init__(name, setting)
        if name == "ours-triton" and setting.device.type == "cpu":
            raise ValueError("the Triton kernel needs a GPU")
        options: dict[str, Any] = {"rotation": ROTATION, "shift": SHIFT, "erase": ERASE}
        if setting.channels == 3:
            options = {"crop": CROP, "crop_aspect": CROP_ASPECT} | dict.fromkeys(COLOURS, JITTER)
        cfg = AugmentConfig(size=setting.size, flip=FLIP, backend=cast(Any, name.removeprefix("ours-")), **options)
        mean, std = setting.split.info.mean, setting.split.info.std
        kinds: dict[str, Any] = {"dtype": setting.dtype, "device": setting.device}
        self._augment = Augment(cfg, num_classes=NUM_CLASSES, mean=mean, std=std, fill=mean, **kinds)
        self.bytes_rule = "operations" if name == "ours-eager" else "formula"

    def next(self) -> tuple[Tensor, Tensor]:
        return self._augment(self.micro_batch())

    def apply_fixed(self, indices: Tensor, fixed: Fixed) -> Tensor:
        split, count, batch = self.setting.split, len(indices), self.setting.batch_size
        # A whole batch, so that the gate checks the very code, compiled for its shape, that is timed.
        indices = indices.repeat(math.ceil(batch / count))[: max(count, batch)]
        uniforms = fixed_uniforms(fixed, split.images.shape[-1]).repeat(len(split), 1).to(self.setting.device)
        whole = MicroBatch(split=split, indices=indices, partners=indices, uniforms=uniforms, epoch=0, key=(0, 0, 0))
        return self._augment(whole)[0][:count]


def fixed_uniforms(fixed: Fixed, side: int) -> Tensor:
    """Return the uniforms [NUM_UNIFORMS] from which our augmentation makes just these parameters."""
    row = torch.full((NUM_UNIFORMS,), 0.5)
    row[table.ANGLE] = (fixed.angle / ROTATION + 1) / 2
    row[table.SHIFT_X], row[table.SHIFT_Y] = ((x / side / SHIFT + 1) / 2 for x in (fixed.shift_x, fixed.shift_y))
    row[table.FLIP], row[table.ERASE] = 0.99 * (not fixed.flip), 0.99 * (fixed.box is None)  # 0.99: above the limits
    x0, y0, x1, y1 = fixed.box or (0.25, 0.25, 0.75, 0.75)
    width, height = x1 - x0, y1 - y0
    low, high = (math.log(aspect) for aspect in table.ERASE_ASPECTS)
    least, most = table.ERASE_AREAS
    row[table.ERASE_AREA] = (width * height - least) / (most - least)
    row[table.ERASE_ASPECT] = (math.log(width / height) - low) / (high - low)
    row[table.ERASE_X], row[table.ERASE_Y] = x0 / (1 - width), y0 / (1 - height)
    if fixed.crop:
        left, top, across, down = (edge / side for edge in fixed.crop)
        row[table.CROP_AREA] = (across * down - CROP) / (1 - CROP)
        row[table.CROP_X], row[table.CROP_Y] = left / (1 - across), top / (1 - down)
        limit = min(-math.log(across * down), math.log(CROP_ASPECT))
        row[table.CROP_ASPECT] = (math.log(across / down) / limit + 1) / 2
    row[table.BRIGHTNESS : table.HUE] = (torch.tensor([*fixed.factors().values()]) - 1) / JITTER / 2 + 0.5
    return row


def library_steps(
    library: Any, pipeline: Pipeline, resampling: dict[str, Any], *to_tensor: Any, **always: Any
) -> list[Any]:
    """Return the race's augmentation in the words that torchvision.transforms, its v2 and kornia have in common."""
    side, info = (pipeline.setting.size, pipeline.setting.size), pipeline.setting.split.info
    flip, normalize = library.RandomHorizontalFlip(p=FLIP), library.Normalize(info.mean, info.std)
    if pipeline.setting.channels == 3:
        crop = library.RandomResizedCrop(side, (CROP, 1.0), (1 / CROP_ASPECT, CROP_ASPECT), **resampling)
        return [crop, flip, library.ColorJitter(JITTER, JITTER, JITTER), *to_tensor, normalize]
    resize = library.Resize(side, **resampling)
    affine = library.RandomAffine(ROTATION, translate=(SHIFT, SHIFT), **resampling, **always)
    # its value 0 is the mean by then
    erase = library.RandomErasing(p=ERASE, scale=table.ERASE_AREAS, ratio=table.ERASE_ASPECTS)
    warp = [resize, flip, affine] if pipeline.chain == "resize, then warp" else [flip, affine, resize]
    return [*warp, *to_tensor, normalize, erase]
