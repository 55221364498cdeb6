"""Augmentation on the device: the reference in plain torch. One inverse affine, one bilinear interpolation.

Every random quantity of a sample comes from its row of uniforms, so the same row gives the same image everywhere.
Coordinates are those of `torch.nn.functional.grid_sample` with align_corners=False: [-1, 1] spans the image's area.
Outside that area the image continues its edge pixel and fades to 0 within half a source pixel: the identity is then
torchvision's bilinear resize, and a shift by whole pixels fills with exact zeros.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.special import betaincinv
from torch import Tensor

from fmnist.config import AugmentConfig
from fmnist.data.batches import NUM_UNIFORMS, MicroBatch

# What each column of the table of uniforms decides.
FLIP, ANGLE, SHIFT_X, SHIFT_Y, ZOOM, ERASE, ERASE_AREA, ERASE_ASPECT, ERASE_X, ERASE_Y = range(10)
MIX, MIX_KIND, MIX_LAMBDA, CUT_X, CUT_Y = range(10, NUM_UNIFORMS)
ERASE_AREAS, ERASE_ASPECTS = (0.02, 0.33), (0.3, 3.3)
FILL = 0.2860  # what an erased pixel becomes, as a fraction of 255: the mean of Fashion-MNIST
BETA_TABLE_SIZE = 4096


@dataclass(frozen=True)
class SampleParams:
    """Geometry and erasing of B samples; each is a float32 [B] tensor.

    Attributes:
        flip: 1 or -1, the sign of the source's x axis.
        angle: radians, counter-clockwise as seen.
        shift_x: right, in [-1, 1] units: 2 is the whole image.
        shift_y: down, likewise.
        zoom: magnification.
        box: erased rectangle as 4 tensors (x0, y0, x1, y1) in [0, 1] units; empty where x1 <= x0.
    """

    flip: Tensor
    angle: Tensor
    shift_x: Tensor
    shift_y: Tensor
    zoom: Tensor
    box: tuple[Tensor, Tensor, Tensor, Tensor]


def sample_params(cfg: AugmentConfig, uniforms: Tensor, source_size: int, *, whole_pixels: bool) -> SampleParams:
    """Turn rows of uniforms into augmentation parameters.

    Args:
        cfg: how far each augmentation may go.
        uniforms: float32 [B, NUM_UNIFORMS] in [0, 1).
        source_size: pixels per side of the stored images.
        whole_pixels: round shifts to whole source pixels.
    """
    u = uniforms.unbind(1)
    shift_x, shift_y = ((2 * u[i] - 1) * cfg.shift for i in (SHIFT_X, SHIFT_Y))
    if whole_pixels:
        shift_x, shift_y = (torch.round(s * source_size) / source_size for s in (shift_x, shift_y))
    area = ERASE_AREAS[0] + u[ERASE_AREA] * (ERASE_AREAS[1] - ERASE_AREAS[0])
    low, high = (math.log(aspect) for aspect in ERASE_ASPECTS)
    aspect = torch.exp(low + u[ERASE_ASPECT] * (high - low))
    width, height = ((area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1))
    x0, y0 = u[ERASE_X] * (1 - width), u[ERASE_Y] * (1 - height)
    erased = u[ERASE] < cfg.erase
    return SampleParams(
        flip=torch.where(u[FLIP] < cfg.flip, -1.0, 1.0),
        angle=(2 * u[ANGLE] - 1) * math.radians(cfg.rotation),
        shift_x=2 * shift_x,
        shift_y=2 * shift_y,
        zoom=torch.exp((2 * u[ZOOM] - 1) * math.log1p(cfg.scale)),
        box=(x0, y0, torch.where(erased, x0 + width, x0), y0 + height),
    )


def inverse_affine(params: SampleParams) -> Tensor:
    """Return float32 [B, 2, 3] matrices that take output coordinates to source coordinates.

    The image is flipped, then magnified, rotated and shifted; the inverse undoes this from the end.
    """
    cos, sin = torch.cos(params.angle) / params.zoom, torch.sin(params.angle) / params.zoom
    row_x = torch.stack((cos, -sin, sin * params.shift_y - cos * params.shift_x), 1) * params.flip[:, None]
    row_y = torch.stack((sin, cos, -sin * params.shift_x - cos * params.shift_y), 1)
    return torch.stack((row_x, row_y), 1)


def resample(images: Tensor, matrices: Tensor, size: int) -> Tensor:
    """Warp images by one bilinear interpolation.

    Args:
        images: uint8 [B, H, W].
        matrices: float [B, 2, 3], from `inverse_affine`; its dtype is the arithmetic's.
        size: pixels per side of the result.

    Returns:
        [B, size, size] in [0, 1], in the dtype of matrices.
    """
    height, width = images.shape[1:]
    grid = F.affine_grid(matrices, [len(images), 1, size, size], align_corners=False)
    scaled = (images.to(matrices.dtype) / 255)[:, None]
    warped = F.grid_sample(scaled, grid, mode="bilinear", padding_mode="border", align_corners=False)[:, 0]
    # Distance outside the image's area, in source pixels; grid units are half an image long.
    outside_x, outside_y = ((grid[..., i].abs() - 1) * (side / 2) for i, side in ((0, width), (1, height)))
    fade_x, fade_y = ((1 - 2 * outside).clamp(0, 1) for outside in (outside_x, outside_y))
    return warped * fade_x * fade_y


def shift_and_flip(images: Tensor, params: SampleParams) -> Tensor:
    """Flip and shift by whole pixels without interpolation: what `resample` gives at the stored size, exactly.

    Args:
        images: uint8 [B, H, W].
        params: angle 0, zoom 1, shifts of whole pixels.

    Returns:
        float32 [B, H, W] in [0, 1].
    """
    height, width = images.shape[1:]
    shift_x, shift_y = ((s * (n / 2)).round().long() for s, n in ((params.shift_x, width), (params.shift_y, height)))
    columns = torch.arange(width, device=images.device) - shift_x[:, None]
    rows = torch.arange(height, device=images.device) - shift_y[:, None]
    columns = torch.where(params.flip[:, None] < 0, width - 1 - columns, columns)
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    moved = images[sample, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]]
    return (moved * inside).float() / 255


def in_box(box: tuple[Tensor, Tensor, Tensor, Tensor], size: int) -> Tensor:
    """Return bool [B, size, size]: pixels whose centre lies in the box (x0, y0, x1, y1), each [B] in [0, 1] units."""
    centre = (torch.arange(size, device=box[0].device) + 0.5) / size
    x0, y0, x1, y1 = (edge[:, None] for edge in box)
    return ((centre >= y0) & (centre < y1))[:, :, None] & ((centre >= x0) & (centre < x1))[:, None, :]


def cut_box(lam: Tensor, centre_x: Tensor, centre_y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return CutMix's box of area 1 - lam about a centre, clipped to the image; all [B], in [0, 1] units."""
    half = (1 - lam).sqrt() / 2
    x0, y0 = (centre_x - half).clamp(0, 1), (centre_y - half).clamp(0, 1)
    return x0, y0, (centre_x + half).clamp(0, 1), (centre_y + half).clamp(0, 1)


class Augment:
    """Make the images and targets that the model trains on.

    Args:
        cfg: the augmentations; `cfg.size` may change by epoch.
        num_classes: length of a soft target.
        mean: per channel of the model, in [0, 1] units; its length is the number of channels.
        std: likewise.
        channels_last: memory format of the images.

    Source:
        Erasing: Zhong et al. 2017. mixup: Zhang et al. 2018. CutMix: Yun et al. 2019.
    """

    def __init__(
        self,
        cfg: AugmentConfig,
        *,
        num_classes: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        channels_last: bool = False,
    ) -> None:
        self.cfg, self.num_classes = cfg, num_classes
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.mean, self.std = mean, std
        self.sizes = cfg.size if isinstance(cfg.size, dict) else {0: cfg.size}
        self.mixes = cfg.mixup_alpha > 0 or cfg.cutmix_alpha > 0
        self._quantiles: dict[float, Tensor] = {}

    def size(self, epoch: int) -> int:
        """Return the pixels per side of an epoch."""
        return self.sizes[max(first for first in self.sizes if first <= epoch)]

    @property
    def final_size(self) -> int:
        """Pixels per side of the last epochs, and of evaluation."""
        return self.sizes[max(self.sizes)]

    def geometry(self, images: Tensor, uniforms: Tensor, size: int) -> Tensor:
        """Flip, rotate, shift, scale, resize and erase; uint8 [B, H, W] to float32 [B, size, size] in [0, 1]."""
        exact = size == images.shape[1] == images.shape[2] and not self.cfg.rotation and not self.cfg.scale
        params = sample_params(self.cfg, uniforms, images.shape[1], whole_pixels=exact)
        warped = shift_and_flip(images, params) if exact else resample(images, inverse_affine(params), size)
        return torch.where(in_box(params.box, size), FILL, warped) if self.cfg.erase else warped

    def normalize(self, images: Tensor) -> Tensor:
        """Give the model's channels: float32 [B, S, S] in [0, 1] to float32 [B, C, S, S]."""
        channels = [(images - mean) / std for mean, std in zip(self.mean, self.std, strict=True)]
        return torch.stack(channels, dim=1).contiguous(memory_format=self.memory_format)

    def evaluation(self, images: Tensor, size: int) -> Tensor:
        """Resize without augmentation; uint8 [B, H, W] to float32 [B, C, size, size]."""
        scaled = images[:, None].float() / 255
        if images.shape[1:] != (size, size):
            scaled = F.interpolate(scaled, (size, size), mode="bilinear", align_corners=False)
        return self.normalize(scaled[:, 0])

    def __call__(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return float32 images [B, C, S, S] and targets: int64 [B], or float32 [B, num_classes] where mixing is on."""
        split, uniforms = batch.split, batch.uniforms[batch.indices]
        size = self.size(batch.epoch)
        images = self.geometry(split.images[batch.indices], uniforms, size)
        labels = split.labels[batch.indices]
        if not self.mixes:
            return self.normalize(images), labels
        partners = self.geometry(split.images[batch.partners], batch.uniforms[batch.partners], size)
        weight = self._own_weight(uniforms, size)
        images = weight * images + (1 - weight) * partners
        own = weight.mean(dim=(1, 2))[:, None]
        targets = F.one_hot(labels, self.num_classes) * own
        targets = targets + F.one_hot(split.labels[batch.partners], self.num_classes) * (1 - own)
        return self.normalize(images), targets

    def _own_weight(self, uniforms: Tensor, size: int) -> Tensor:
        """Return float32 [B, size, size]: how much of each pixel stays the sample's own."""
        u, cfg = uniforms.unbind(1), self.cfg
        share_cut = 0.5 if cfg.mixup_alpha and cfg.cutmix_alpha else float(cfg.cutmix_alpha > 0)
        mixed, cut = u[MIX] < cfg.mix_probability, u[MIX_KIND] < share_cut
        lam = torch.where(
            cut, self._beta(u[MIX_LAMBDA], cfg.cutmix_alpha or 1.0), self._beta(u[MIX_LAMBDA], cfg.mixup_alpha or 1.0)
        )
        pasted = in_box(cut_box(lam, u[CUT_X], u[CUT_Y]), size)
        weight = torch.where(cut[:, None, None], (~pasted).float(), lam[:, None, None])
        return torch.where(mixed[:, None, None], weight, 1.0)

    def _beta(self, uniform: Tensor, alpha: float) -> Tensor:
        """Map uniforms to Beta(alpha, alpha) by its inverse distribution function, tabulated once."""
        table = self._quantiles.get(alpha)
        if table is None:
            points = torch.linspace(0, 1, BETA_TABLE_SIZE, dtype=torch.float64).numpy()
            table = torch.tensor(betaincinv(alpha, alpha, points), dtype=torch.float32, device=uniform.device)
            self._quantiles[alpha] = table
        place = uniform * (BETA_TABLE_SIZE - 1)
        below = place.long().clamp(max=BETA_TABLE_SIZE - 2)
        return torch.lerp(table[below], table[below + 1], place - below)
