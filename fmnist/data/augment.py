"""Augmentation on the device: what the model trains on, made from uint8 images and a table of parameters."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fmnist.config.schema import AugmentConfig
from fmnist.data.augment_table import MATRIX, OWN_SHARE, augmentation_table, flip_in_turn, levels_read
from fmnist.data.augment_torch import (
    Plan,
    augment_reference,
    choose_level,
    compose,
    normalize,
    pack_channels,
    pack_neighbours,
    resample_packed,
)
from fmnist.data.batches import MicroBatch
from fmnist.data.colour import changes_colours, grey_of
from fmnist.data.fashion_mnist import MEAN
from fmnist.data.pyramid import at_level, build_pyramid, bytes_to, level_of, shrink
from fmnist.data.whole_pixels import check_whole_pixels
from fmnist.runtime.hardware import has_triton

# Of images, pyramid, indices, partners, table and plan: see `augment_reference`.
Make = Callable[[Tensor, Tensor | None, Tensor, Tensor, Tensor, Plan], Tensor]


class Augment:
    """Make the images and targets that the model trains on.

    Args:
        cfg: the augmentations; `cfg.size` may change by epoch.
        num_classes: length of a soft target.
        mean: per channel of the model, in [0, 1] units; its length is the number of channels.
        std: likewise.
        fill: the data set's mean per channel of the images, or one for all, in [0, 1] units: of erased pixels, and
            what contrast leaves as it is.
        channels_last: memory format of the images.
        dtype: of the images, float32 or bfloat16.
        device: where the split is; none is the CPU.

    Attributes:
        backend: how the images are made: triton, compiled or eager.

    Raises:
        ValueError: cfg.backend is triton where it cannot run.
    """

    def __init__(
        self,
        cfg: AugmentConfig,
        *,
        num_classes: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        fill: tuple[float, ...] = (MEAN,),
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        self.cfg, self.num_classes = cfg, num_classes
        self.mean, self.std, self.fill, self.channels_last, self.dtype = mean, std, fill, channels_last, dtype
        self.sizes = cfg.sizes
        self.mixes = cfg.mixes
        self.backend = choose_backend(cfg.backend, device or torch.device("cpu"))
        self._make = _implementation(self.backend)
        self._table: tuple[Tensor, int, Tensor] | None = None
        self._pyramid: tuple[Tensor, Tensor | None] | None = None

    def size(self, epoch: int) -> int:
        """Return the pixels per side of an epoch."""
        return self.sizes[max(first for first in self.sizes if first <= epoch)]

    @property
    def final_size(self) -> int:
        """Pixels per side of the last epochs, and of evaluation."""
        return self.sizes[max(self.sizes)]

    def plan(self, size: int, source_shape: tuple[int, int]) -> Plan:
        """Return what is the same for all samples at this output size."""
        return Plan(
            size=size,
            mean=self.mean,
            std=self.std,
            fill=self.fill,
            dtype=self.dtype,
            channels_last=self.channels_last,
            levels=levels_read(self.cfg, source_shape, size),
            colours=changes_colours(self.cfg),
            erases=self.cfg.erase > 0,
            mixes=self.mixes,
            whole_pixels=source_shape == (size, size) and not self.cfg.interpolates,
        )

    def table(self, batch: MicroBatch) -> Tensor:
        """Return the parameters of every sample in the batch's epoch: float32 [N, 16, 17 or 29].

        Raises:
            ValueError: colours change, but the images have neither one channel nor three; or fill has other channels.
        """
        if batch.table is not None:
            return batch.table
        size = self.size(batch.epoch)
        if self._table is None or self._table[0] is not batch.uniforms or self._table[1] != size:
            channels, height, width = with_channels(batch.split.images).shape[1:]
            plan = self.plan(size, shape := (height, width))
            if plan.colours and channels not in (1, 3):
                raise ValueError(f"images have {channels} channels; brightness, contrast, saturation, hue need 1 or 3")
            if len(self.fill) not in (1, channels):
                raise ValueError(f"fill has {len(self.fill)} values, but images have {channels} channels")
            uniforms = batch.uniforms
            if self.cfg.flip_in_turn:
                uniforms = flip_in_turn(uniforms, seed=batch.key[0], epoch=batch.epoch)
            grey, whole_pixels = grey_of(self.fill) if plan.colours else 0.0, plan.whole_pixels
            table = augmentation_table(self.cfg, uniforms, shape, size, whole_pixels=whole_pixels, grey=grey)
            if whole_pixels:
                check_whole_pixels(table[:, MATRIX], size)
            self._table = (batch.uniforms, size, table)
        return self._table[2]

    def pyramid(self, images: Tensor) -> Tensor | None:
        """Return what `at_level` reads for a split's images; none where no sample of any epoch shrinks by 2."""
        if self._pyramid is None or self._pyramid[0] is not images:
            highest = highest_level(self.cfg, images)
            self._pyramid = images, build_pyramid(with_channels(images), highest) if highest else None
        return self._pyramid[1]

    def evaluation(self, images: Tensor, size: int) -> Tensor:
        """Resize without augmentation; uint8 [B, H, W] or [B, C, H, W] to self.dtype [B, C, size, size].

        Where that shrinks by 2 or more, it reads the level of the pyramid that training does.
        """
        shape = _source_shape(images)
        scaled = shrink(with_channels(images), level_of(min(shape) / size, shape)).float() / 255
        if scaled.shape[-2:] != (size, size):
            scaled = F.interpolate(scaled, (size, size), mode="bilinear", align_corners=False)
        return normalize(scaled.unbind(1), self.plan(size, (size, size)))

    def __call__(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return images, self.dtype [B, C, S, S], and targets: int64 [B], or float32 [B, num_classes] where mixed."""
        split, table = batch.split, self.table(batch)
        images = self._images(batch, table, self.plan(self.size(batch.epoch), _source_shape(split.images)))
        labels = split.labels[batch.indices]
        if not self.mixes:
            return images, labels
        share = table[batch.indices if batch.draws is None else batch.draws[0], OWN_SHARE, None]
        own, partner = (F.one_hot(item, self.num_classes) for item in (labels, split.labels[batch.partners]))
        return images, own * share + partner * (1 - share)

    def _images(self, batch: MicroBatch, table: Tensor, plan: Plan) -> Tensor:
        split, size = batch.split, len(batch.indices)
        assert split.rows is None or batch.pixels is not None, "images that lie elsewhere have to be staged"
        if batch.pixels is None and batch.draws is None:
            sources = with_channels(split.images), self.pyramid(split.images)
            return self._make(*sources, batch.indices, batch.partners, table, plan)
        if batch.pixels is not None:
            staged, highest = batch.pixels(), plan.levels[-1]
            stored, places, rows = with_channels(staged.images), staged.places, table[staged.positions]
            pyramid = build_pyramid(stored, highest) if highest else None
        else:  # an image that is drawn twice has two rows
            samples = torch.cat((batch.indices, batch.partners)) if self.mixes else batch.indices
            stored, rows, pyramid = with_channels(split.images)[samples], table[samples], self.pyramid(split.images)
            pyramid, places = None if pyramid is None else pyramid[samples], torch.arange(len(rows), device=rows.device)
        if batch.draws is not None:
            rows[places] = table[batch.draws.flatten()[: len(rows)]]
        return self._make(stored, pyramid, places[:size], places[size:], rows, plan)


def highest_level(cfg: AugmentConfig, images: Tensor) -> int:
    """Return the highest level of the pyramid that a sample of any epoch may read."""
    return max(levels_read(cfg, _source_shape(images), size)[-1] for size in cfg.sizes.values())


def pyramid_bytes(cfg: AugmentConfig, images: Tensor) -> int:
    """Return the bytes that the pyramid of images [N, H, W] or [N, C, H, W] takes; it is not built for that."""
    return len(images) * bytes_to(highest_level(cfg, images), tuple(with_channels(images[:1]).shape[1:]))


def with_channels(images: Tensor) -> Tensor:
    """Return [N, C, H, W] for [N, H, W] or [N, C, H, W]."""
    return images if images.ndim == 4 else images[:, None]


def _source_shape(images: Tensor) -> tuple[int, int]:
    height, width = images.shape[-2:]
    return height, width


def choose_backend(wish: str, device: torch.device) -> str:
    """Return triton, compiled or eager: the one place where this is decided.

    The kernel wherever there is a GPU and Triton; else plain torch, which needs no compiler and starts at once.

    Raises:
        ValueError: triton is asked for where it cannot run.
    """
    if wish == "triton" and not has_triton(device):
        raise ValueError(
            "augment.backend is triton, which needs a CUDA device and the package triton; "
            "valid here: auto, compiled, eager"
        )
    if wish != "auto":
        return wish
    return "triton" if device.type != "cpu" and has_triton(device) else "eager"


def _implementation(backend: str) -> Make:
    if backend == "triton":
        from fmnist.data.augment_triton import augment_fused

        return augment_fused
    return _compile() if backend == "compiled" else augment_reference


def _compile() -> Make:
    # Static shapes: a run has one batch size, and few image sizes.
    parts = augment_reference, pack_channels, pack_neighbours, _finish
    plain, channels, neighbours, finish = (torch.compile(part, dynamic=False) for part in parts)

    def make(
        images: Tensor, pyramid: Tensor | None, indices: Tensor, partners: Tensor, table: Tensor, plan: Plan
    ) -> Tensor:
        if plan.whole_pixels:
            return plain(images, pyramid, indices, partners, table, plan)
        samples = torch.cat((indices, partners)) if plan.mixes else indices
        pack = channels if images.shape[1] == 3 else neighbours
        packed = {level: pack(at_level(images, pyramid, level), samples) for level in plan.levels}
        return finish(packed, table[samples], len(indices), plan)

    return make


def _finish(packed: dict[int, Tensor], rows: Tensor, batch_size: int, plan: Plan) -> Tensor:
    """Do what is left of `augment_reference` for packed samples and their rows, partners after the batch."""
    made = {level: resample_packed(pixels, rows[:, MATRIX], plan.size) for level, pixels in packed.items()}
    channels = choose_level(made, rows)
    own, *partners = (
        ([one[part] for one in channels], rows[part]) for part in (slice(batch_size), slice(batch_size, None))
    )
    return compose(own, partners[0] if plan.mixes else None, plan)
