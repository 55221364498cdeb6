"""Augmentation parameters: one row of numbers says all that happens to a sample in an epoch.

The rows are pure functions of the sample's uniforms, made for all samples at once when an epoch begins. The plain torch
code of `augment_torch.py` and the kernel of `augment_triton.py` read the same rows: what they do cannot drift apart.
"""

import functools
import math

import torch
from scipy.special import betaincinv
from torch import Tensor

from fmnist.config.schema import AugmentConfig
from fmnist.data.batches import FLIP_IN_TURN, NUM_UNIFORMS, epoch_generator
from fmnist.data.colour import changes_colours, colour_matrix
from fmnist.data.pyramid import level_of
from fmnist.runtime.hardware import to_device

# What each column of the uniforms decides.
FLIP, ANGLE, SHIFT_X, SHIFT_Y, ZOOM, ERASE, ERASE_AREA, ERASE_ASPECT, ERASE_X, ERASE_Y = range(10)
MIX, MIX_KIND, MIX_LAMBDA, CUT_X, CUT_Y = range(10, 15)
FLIP_VERTICAL, CROP_AREA, CROP_ASPECT, CROP_X, CROP_Y, BRIGHTNESS, CONTRAST, SATURATION, HUE = range(15, 24)
TRIVIAL, STRENGTH = range(24, NUM_UNIFORMS)

# The columns of a row, as many as are used. Boxes are x0, y0, x1, y1 in whole pixels of the output, empty where
# x1 <= x0.
MATRIX = slice(0, 6)  # inverse affine, row-major 2 x 3: output to source, both in [-1, 1]
ERASE_BOX = slice(6, 10)
OWN_WEIGHT = 10  # of the sample itself outside the cut box: mixup's lambda, else 1
CUT_BOX = slice(11, 15)  # where CutMix shows the partner
OWN_SHARE = 15  # of the sample's own label in the target: the mean of its weight over the pixels
LEVEL = 16  # of the pyramid, which the matrix is applied to; left out with the colours where all read level 0
COLOUR = slice(17, 29)  # row-major 3 x 4: factors of red, green and blue, and an offset; left out where none change

ERASE_AREAS, ERASE_ASPECTS = (0.02, 0.33), (0.3, 3.3)
# TrivialAugment's operations with their largest strengths: turn, in radians; shifts right and down, 1 being half the
# image; shears along x and y.
TRIVIAL_LIMITS = (math.radians(30), 2 * 10 / 32, 2 * 10 / 32, 0.3, 0.3)
BETA_TABLE_SIZE = 4096


def augmentation_table(
    cfg: AugmentConfig,
    uniforms: Tensor,
    source_shape: tuple[int, int],
    size: int,
    *,
    whole_pixels: bool,
    grey: float = 0.5,
) -> Tensor:
    """Turn uniforms into rows of parameters.

    Args:
        cfg: how far each augmentation may go.
        uniforms: float32 [N, NUM_UNIFORMS] in [0, 1).
        source_shape: height and width of the stored images, pixels.
        size: pixels per side of the output.
        whole_pixels: round shifts to whole source pixels.
        grey: of the mean colour, which contrast leaves as it is, in [0, 1] units.

    Returns:
        float32 [N, 16], [N, 17] where some sample may read another level than 0, or [N, 29] where colours change, on
        the device of the uniforms.

    Source:
        Erasing: Zhong et al. 2017. mixup: Zhang et al. 2018. CutMix: Yun et al. 2019.
    """
    u = uniforms.unbind(1)
    matrix = _inverse_affine(cfg, u, source_shape, whole_pixels=whole_pixels)
    weight, cut_box, share = _mixing(cfg, u, size)
    columns = [*matrix, *_erase_box(cfg, u, size), weight, *cut_box, share]
    levels = levels_read(cfg, source_shape, size)
    if levels[-1] or changes_colours(cfg):
        columns.append(_level(matrix, source_shape, size, levels))
    if changes_colours(cfg):
        columns += colour_matrix(cfg, u[BRIGHTNESS : HUE + 1], grey)
    return torch.stack(columns, dim=1)


def flip_in_turn(uniforms: Tensor, seed: int, epoch: int) -> Tensor:
    """Replace what decides the flip: each sample has one number u for the whole run, and 1 - u in every second epoch.

    Args:
        uniforms: float32 [N, NUM_UNIFORMS] in [0, 1), of this epoch; they are not changed.
        seed: the run's.
        epoch: passes over the data completed before this one.

    Source:
        Alternating flip: Jordan 2024, 94% on CIFAR-10 in 3.29 Seconds on a Single GPU.
    """
    drawn = torch.rand(len(uniforms), generator=epoch_generator(seed, 0, FLIP_IN_TURN))
    turned = uniforms.clone()
    turned[:, FLIP] = to_device(drawn if epoch % 2 == 0 else 1 - drawn, uniforms.device)
    return turned


def _inverse_affine(
    cfg: AugmentConfig, u: tuple[Tensor, ...], source_shape: tuple[int, int], *, whole_pixels: bool
) -> list[Tensor]:
    # The image is cropped, flipped, then magnified, sheared, rotated and shifted; the inverse undoes this from the end.
    shift_x, shift_y = ((2 * u[i] - 1) * cfg.shift for i in (SHIFT_X, SHIFT_Y))  # 1 is the whole image; right, down
    if whole_pixels:
        height, width = source_shape
        shift_x, shift_y = (shift_x * width).round() / width, (shift_y * height).round() / height
    turn, further_x, further_y, shear_x, shear_y = _trivial(cfg, u)
    shift_x, shift_y = 2 * shift_x + further_x, 2 * shift_y + further_y
    angle = (2 * u[ANGLE] - 1) * math.radians(cfg.rotation) + turn  # counter-clockwise as seen
    zoom = torch.exp((2 * u[ZOOM] - 1) * math.log1p(cfg.scale))
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    shown_x, shown_y, centre_x, centre_y = _crop(cfg, u)
    side_x = shown_x * torch.where(u[FLIP] < cfg.flip, -1.0, 1.0)
    side_y = shown_y * torch.where(u[FLIP_VERTICAL] < cfg.flip_vertical, -1.0, 1.0)
    xx, xy = cos - shear_x * sin, -sin - shear_x * cos
    yx, yy = sin - shear_y * cos, cos + shear_y * sin
    row_x = (side_x * xx, side_x * xy, side_x * (-xy * shift_y - xx * shift_x) + centre_x)
    return [*row_x, side_y * yx, side_y * yy, side_y * (-yx * shift_x - yy * shift_y) + centre_y]


def _trivial(cfg: AugmentConfig, u: tuple[Tensor, ...]) -> list[Tensor]:
    """Return what a sample's operation adds to its turn, shifts and shears: one of them, of any strength, or none.

    Source:
        Mueller and Hutter 2021, TrivialAugment; the five that are affine, with the ranges of its code, here continuous.
    """
    operations = len(TRIVIAL_LIMITS)
    chosen = (u[TRIVIAL] * (operations / cfg.trivial)).floor() if cfg.trivial else u[TRIVIAL] + operations
    strength = 2 * u[STRENGTH] - 1
    return [torch.where(chosen == number, strength * most, 0.0) for number, most in enumerate(TRIVIAL_LIMITS)]


def _crop(cfg: AugmentConfig, u: tuple[Tensor, ...]) -> list[Tensor]:
    """Return width, height and centre of what is shown of an image, in halves of its sides: 1, 1, 0, 0 is all.

    As torchvision's and timm's RandomResizedCrop, but for this: the aspect ratio is relative to the image's own, and
    where the area leaves no room for it, it is drawn from what fits instead of anew (at most ten times, then a centred
    crop): the area stays uniform, each draw serves. Places are not rounded to whole pixels. What a rotation or shift
    brings in from beyond the crop is the image, not black.
    """
    area = cfg.crop + u[CROP_AREA] * (1 - cfg.crop)
    limit = (-torch.log(area)).clamp(max=math.log(cfg.crop_aspect))
    aspect = torch.exp((2 * u[CROP_ASPECT] - 1) * limit)
    width, height = (area * aspect).sqrt(), (area / aspect).sqrt()
    return [width, height, (2 * u[CROP_X] - 1) * (1 - width), (2 * u[CROP_Y] - 1) * (1 - height)]


def levels_read(cfg: AugmentConfig, source_shape: tuple[int, int], size: int) -> range:
    """Return the levels of the pyramid that a sample may read: only 0, the stored image, where nothing shrinks by 2."""
    whole, zoom = min(source_shape) / size, 1 + cfg.scale
    least = whole / zoom * math.sqrt(cfg.crop / (cfg.crop_aspect if cfg.crop < 1 else 1))
    if cfg.trivial:
        least *= math.hypot(1, TRIVIAL_LIMITS[-1] / 2) - TRIVIAL_LIMITS[-1] / 2  # a shear's smaller singular value
    return range(level_of(least, source_shape), level_of(whole * zoom, source_shape) + 1)


def _level(matrix: list[Tensor], source_shape: tuple[int, int], size: int, levels: range) -> Tensor:
    """Return the level for each matrix: that of its smaller singular value, so that no direction loses pixels."""
    height, width = source_shape
    a, b, c, d = (matrix[i] * (side / size) for i, side in ((0, width), (1, width), (3, height), (4, height)))
    shrinking = (torch.hypot(a + d, c - b) - torch.hypot(a - d, b + c)).abs() / 2
    return torch.floor(torch.log2(shrinking) + 1e-4).clamp(levels[0], levels[-1])


def _erase_box(cfg: AugmentConfig, u: tuple[Tensor, ...], size: int) -> list[Tensor]:
    area = ERASE_AREAS[0] + u[ERASE_AREA] * (ERASE_AREAS[1] - ERASE_AREAS[0])
    low, high = (math.log(aspect) for aspect in ERASE_ASPECTS)
    aspect = torch.exp(low + u[ERASE_ASPECT] * (high - low))
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    x0, y0 = u[ERASE_X] * (1 - width), u[ERASE_Y] * (1 - height)
    x0, y0, x1, y1 = ((edge * size).round() for edge in (x0, y0, x0 + width, y0 + height))
    return [x0, y0, torch.where(u[ERASE] < cfg.erase, x1, x0), y1]


def _mixing(cfg: AugmentConfig, u: tuple[Tensor, ...], size: int) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return the own weight [N], the cut box as 4 x [N], and the own share [N]."""
    share_cut = 0.5 if cfg.mixup_alpha and cfg.cutmix_alpha else float(cfg.cutmix_alpha > 0)
    mixed = u[MIX] < (cfg.mix_probability if cfg.mixes else 0)
    cut = mixed & (u[MIX_KIND] < share_cut)
    weight = torch.where(mixed & ~cut, beta_quantile(u[MIX_LAMBDA], cfg.mixup_alpha or 1.0), 1.0)
    half = (1 - beta_quantile(u[MIX_LAMBDA], cfg.cutmix_alpha or 1.0)).sqrt() / 2
    x0, y0, x1, y1 = (
        ((centre + side * half).clamp(0, 1) * size).round() for side in (-1, 1) for centre in (u[CUT_X], u[CUT_Y])
    )
    x1 = torch.where(cut, x1, x0)
    own = 1 - (x1 - x0) * (y1 - y0) / size**2
    return weight, [x0, y0, x1, y1], weight * own


def beta_quantile(uniform: Tensor, alpha: float) -> Tensor:
    """Map uniforms to Beta(alpha, alpha) by its inverse distribution function, tabulated once."""
    table = _beta_table(alpha, uniform.device)
    place = uniform * (BETA_TABLE_SIZE - 1)
    below = place.long().clamp(max=BETA_TABLE_SIZE - 2)
    return torch.lerp(table[below], table[below + 1], place - below)


@functools.cache
def _beta_table(alpha: float, device: torch.device) -> Tensor:
    points = torch.linspace(0, 1, BETA_TABLE_SIZE, dtype=torch.float64).numpy()
    return to_device(torch.tensor(betaincinv(alpha, alpha, points), dtype=torch.float32), device)
