"""The data path in plain torch: gather, warp, recolour, erase, mix and normalise a micro-batch.

This is the definition that the kernel of `augment_triton.py` is held to. Coordinates are those of
`torch.nn.functional.grid_sample` with align_corners=False: [-1, 1] spans the image's area. Outside that area the image
continues its edge pixel and fades to 0 within half a pixel of what is read, the stored image or a level of the pyramid:
the identity is then torchvision's bilinear resize, and a shift by whole pixels fills with exact zeros.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fmnist.data.augment_table import COLOUR, CUT_BOX, ERASE_BOX, LEVEL, MATRIX, OWN_WEIGHT
from fmnist.data.colour import recolour
from fmnist.data.pyramid import at_level
from fmnist.data.whole_pixels import shift_and_flip


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is the same for every sample of an epoch.

    Attributes:
        size: pixels per side of the output.
        mean: per channel of the output, in [0, 1] units; its length is the number of channels.
        std: likewise.
        fill: value of an erased pixel per channel of the source, or one for all, in [0, 1] units: the data set's mean.
        dtype: of the output, float32 or bfloat16.
        channels_last: memory format of the output.
        levels: of the pyramid, those that a sample may read; 0 is the stored image.
        colours: rows have a colour matrix.
        erases: some rows have a box to erase.
        mixes: some rows mix a partner in.
        whole_pixels: nothing is rotated, scaled or resized, and shifts are whole: no interpolation is needed.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fill: tuple[float, ...]
    dtype: torch.dtype
    channels_last: bool
    levels: range
    colours: bool
    erases: bool
    mixes: bool
    whole_pixels: bool


def resample(images: Tensor, matrices: Tensor, size: int) -> Tensor:
    """Warp images by one bilinear interpolation: the definition, in torch's own operations.

    Args:
        images: uint8 [B, C, H, W].
        matrices: float [B, 6], the table's columns MATRIX; its dtype is the arithmetic's.
        size: pixels per side of the result.

    Returns:
        [B, C, size, size] in [0, 1], in the dtype of matrices.
    """
    height, width = images.shape[-2:]
    grid = F.affine_grid(matrices.view(-1, 2, 3), [len(images), 1, size, size], align_corners=False)
    scaled = images.to(matrices.dtype) / 255
    warped = F.grid_sample(scaled, grid, mode="bilinear", padding_mode="border", align_corners=False)
    # Distance outside the image's area, in source pixels; grid units are half an image long.
    outside_x, outside_y = ((grid[..., i].abs() - 1) * (side / 2) for i, side in ((0, width), (1, height)))
    fade_x, fade_y = ((1 - 2 * outside).clamp(0, 1) for outside in (outside_x, outside_y))
    return warped * (fade_x * fade_y)[:, None]


def pack_neighbours(images: Tensor, samples: Tensor) -> Tensor:
    """Gather samples, and put each pixel beside its right, lower and lower right neighbours, a byte each.

    Args:
        images: uint8 [N, C, H, W].
        samples: int64 [B].

    Returns:
        int32 [B, C, H + 1, W + 1]: all that an interpolation reads at one place, in one read; places begin one pixel
        outside the image, which continues its edges there.
    """
    pixels = images[samples].to(torch.int32)
    pixels = torch.cat((pixels[..., :1], pixels, pixels[..., -1:]), dim=-1)
    pixels = torch.cat((pixels[..., :1, :], pixels, pixels[..., -1:, :]), dim=-2)
    upper = pixels[..., :-1, :-1] | pixels[..., :-1, 1:] << 8
    lower = pixels[..., 1:, :-1] << 16 | pixels[..., 1:, 1:] << 24
    return upper | lower


def pack_channels(images: Tensor, samples: Tensor) -> Tensor:
    """Gather samples of three channels, and put those of a pixel together, a byte each.

    Args:
        images: uint8 [N, 3, H, W].
        samples: int64 [B].

    Returns:
        int32 [B, H, W]: of a pixel all channels, in one read.
    """
    red, green, blue = images[samples].to(torch.int32).unbind(1)
    return red | green << 8 | blue << 16


def resample_packed(packed: Tensor, matrices: Tensor, size: int) -> list[Tensor]:
    """Do what `resample` does, written for a compiler: it fuses this, and reads memory as seldom as can be.

    What is the same along a row is put together first, which leaves one multiply-add a pixel and coordinate.

    Args:
        packed: int32 [B, C, H + 1, W + 1], from `pack_neighbours`, or int32 [B, H, W], from `pack_channels`; a tensor
            of its own, for a compiler that fused the packing into this would pack anew for every pixel.
        matrices: float [B, 6], as for `resample`.
        size: pixels per side of the result.

    Returns:
        Of each channel float [B, size, size] in [0, 1].
    """
    by_channels = packed.ndim == 3
    rows, columns = (side + by_channels for side in packed.shape[-2:])
    centre = torch.arange(size, device=packed.device) * (2 / size) + (1 / size - 1)
    u, v = centre[None, None, :], centre[None, :, None]
    a, b, c, d, e, f = matrices[:, :, None, None].unbind(1)
    # In source pixels; 0 is the centre of the pixel before the first, which is one half pixel from the image's area.
    x = (a * ((columns - 1) / 2)) * u + ((b * v + (c + 1)) * ((columns - 1) / 2) + 0.5)
    y = (d * ((rows - 1) / 2)) * u + ((e * v + (f + 1)) * ((rows - 1) / 2) + 0.5)
    fade_x = (columns - 2 * (x - columns / 2).abs()).clamp(0, 1)
    fade_y = (rows - 2 * (y - rows / 2).abs()).clamp(0, 1)
    left, top = x.to(torch.int32).clamp(0, columns - 1), y.to(torch.int32).clamp(0, rows - 1)
    dx, dy, fade = x - left, y - top, fade_x * fade_y  # dx, dy: beyond [0, 1] only where the fade is 0
    warped = []
    for pixels in (_read_channels if by_channels else _read_neighbours)(packed, left, top):
        v00, v01, v10, v11 = (pixel.to(matrices.dtype) for pixel in pixels)
        upper, lower = v00 + dx * (v01 - v00), v10 + dx * (v11 - v10)
        warped.append((upper + dy * (lower - upper)) * fade * (1 / 255))
    return warped  # each by itself: a compiler would write channels that are put together to memory here


def _read_neighbours(packed: Tensor, left: Tensor, top: Tensor) -> list[list[Tensor]]:
    """Return of each channel the pixel at each place, and its neighbours right, below, and below right.

    Args:
        packed: int32 [B, C, H + 1, W + 1].
        left, top: int32 [B, S, S], places in it.

    Returns:
        C times four of int32 [B, S, S].
    """
    batch_size, channels, rows, columns = packed.shape
    first = torch.arange(batch_size, device=packed.device)[:, None, None] * (channels * rows * columns)
    place = first + (top * columns + left)
    # The places are clamped: they are not checked again for each pixel.
    fours = [torch.ops.aten._unsafe_index(packed.flatten(), [place + k * rows * columns]) for k in range(channels)]
    return [[four >> shift & 255 for shift in (0, 8, 16, 24)] for four in fours]


def _read_channels(packed: Tensor, left: Tensor, top: Tensor) -> list[list[Tensor]]:
    """Do what `_read_neighbours` does where packed is int32 [B, H, W]; places begin one pixel outside of it."""
    batch_size, height, width = packed.shape
    image = torch.arange(batch_size, device=packed.device)[:, None, None] * height
    lines = [(image + row) * width for row in ((top - 1).clamp(min=0), top.clamp(max=height - 1))]
    columns = (left - 1).clamp(min=0), left.clamp(max=width - 1)  # the image continues its edges
    four = [torch.ops.aten._unsafe_index(packed.flatten(), [line + column]) for line in lines for column in columns]
    return [[pixel >> shift & 255 for pixel in four] for shift in (0, 8, 16)]


def in_box(box: Tensor, size: int) -> Tensor:
    """Return bool [B, size, size]: the pixels in boxes float32 [B, 4] (x0, y0, x1, y1, whole pixels)."""
    pixel = torch.arange(size, device=box.device)
    x0, y0, x1, y1 = box[:, :, None].unbind(1)
    return ((pixel >= y0) & (pixel < y1))[:, :, None] & ((pixel >= x0) & (pixel < x1))[:, None, :]


def normalize(source: Sequence[Tensor], plan: Plan) -> Tensor:
    """Give the output's channels: one or C of float32 [B, S, S] in [0, 1] to plan.dtype [B, C, S, S]."""
    source = [*source] * (len(plan.mean) // len(source))
    channels = [(image - mean) / std for image, mean, std in zip(source, plan.mean, plan.std, strict=True)]
    memory_format = torch.channels_last if plan.channels_last else torch.contiguous_format
    return torch.stack(channels, dim=1).to(plan.dtype).contiguous(memory_format=memory_format)


def augment_reference(
    images: Tensor, pyramid: Tensor | None, indices: Tensor, partners: Tensor, table: Tensor, plan: Plan
) -> Tensor:
    """Gather, warp, recolour, erase, mix and normalise one micro-batch.

    Args:
        images: uint8 [N, C, H, W], the whole split.
        pyramid: uint8 [N, bytes], from `build_pyramid`, with all of plan.levels; None where that is only 0.
        indices: int64 [B], the samples.
        partners: int64 [B], what is mixed into each.
        table: float32 [N, up to 29], from `augmentation_table`.
        plan: what is the same for all samples.

    Returns:
        plan.dtype [B, len(plan.mean), S, S].
    """
    warp = shift_and_flip if plan.whole_pixels else resample

    def part(samples: Tensor) -> tuple[list[Tensor], Tensor]:
        rows = table[samples]
        made = {k: warp(at_level(images, pyramid, k)[samples], rows[:, MATRIX], plan.size) for k in plan.levels}
        return choose_level({level: warped.unbind(1) for level, warped in made.items()}, rows), rows

    return compose(part(indices), part(partners) if plan.mixes else None, plan)


def choose_level(made: Mapping[int, Sequence[Tensor]], rows: Tensor) -> list[Tensor]:
    """Take each sample from the level that its row names.

    Args:
        made: the channels by level, each float [B, S, S].
        rows: of the table, float32 [B, 17 or more] where there are several levels.
    """
    (_, chosen), *others = made.items()
    for level, channels in others:
        here = rows[:, LEVEL, None, None] == level
        chosen = [torch.where(here, one, before) for one, before in zip(channels, chosen, strict=True)]
    return [*chosen]


def compose(
    own: tuple[Sequence[Tensor], Tensor], partner: tuple[Sequence[Tensor], Tensor] | None, plan: Plan
) -> Tensor:
    """Recolour, erase, mix and normalise what is warped.

    Args:
        own: the samples' channels, as many as the source has, each float [B, S, S] in [0, 1], and their rows of the
            table.
        partner: likewise what is mixed into each, where plan.mixes.
        plan: what is the same for all samples.

    Returns:
        plan.dtype [B, len(plan.mean), S, S].
    """

    def finished(channels: Sequence[Tensor], rows: Tensor) -> Sequence[Tensor]:
        if plan.colours:
            channels = recolour(channels, rows[:, COLOUR])
        if plan.erases:
            box, fills = in_box(rows[:, ERASE_BOX], plan.size), plan.fill * (len(channels) // len(plan.fill))
            channels = [torch.where(box, fill, channel) for fill, channel in zip(fills, channels, strict=True)]
        return channels

    result, rows = finished(*own), own[1]
    if partner is not None:
        weight = rows[:, OWN_WEIGHT, None, None] * ~in_box(rows[:, CUT_BOX], plan.size)
        pairs = zip(result, finished(*partner), strict=True)
        result = [weight * mine + (1 - weight) * other for mine, other in pairs]
    return normalize(result, plan)
