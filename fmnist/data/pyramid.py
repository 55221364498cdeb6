"""Images at half their size, a quarter, and so on: what a warp reads where it shrinks them by 2 or more.

A bilinear read takes four pixels of an image. Where an output pixel covers more of them, the others are left out, and
fine patterns turn into coarse ones. Each pixel of level k is the mean over its area of the stored image, about 2^k by
2^k pixels, so that an output pixel covers less than two of them in a row.

Source:
    Williams 1983, Pyramidal parametrics.
"""

import functools
import math

import torch
from torch import Tensor

from fmnist.runtime.hardware import to_device

CHUNK = 2**24  # pixels averaged at a time: what the pyramid needs besides itself, some 200 MB


def level_of(shrinking: float, source_shape: tuple[int, int]) -> int:
    """Return the level to read for images shrunk by this factor: the last that has no fewer pixels than the output.

    Args:
        shrinking: source pixels per output pixel, along the direction that has fewest.
        source_shape: height and width of the stored images, pixels.
    """
    smallest = min(source_shape).bit_length() - 2  # two pixels are left, as an interpolation needs
    return max(0, min(smallest, math.floor(math.log2(shrinking) + 1e-4)))


def shrink(images: Tensor, level: int) -> Tensor:
    """Average images over the area of each pixel of a level: the exact mean, rounded once, half to even.

    Args:
        images: uint8 [N, C, H, W].
        level: from 0.

    Returns:
        uint8 [N, C, H >> level, W >> level].
    """
    if level == 0:
        return images
    totals, area = images, 1
    for axis in (-2, -1):
        pixels, shares, whole = _overlaps(images.shape[axis], level)
        area *= whole
        # In integers, which no device rounds: 255 times the area of an image of 2,900 px fits into int32.
        wide = torch.int32 if 256 * area < 2**31 else torch.int64
        indices = to_device(torch.tensor(pixels), images.device)
        weights = to_device(torch.tensor(shares, dtype=torch.int32), images.device)
        weights = weights[..., None] if axis == -2 else weights
        parts = (totals.index_select(axis, i).to(wide) * w for i, w in zip(indices, weights, strict=True))
        totals = functools.reduce(torch.add, parts)
    above = totals + area // 2
    mean = above.div(area, rounding_mode="floor")
    if area % 2 == 0:
        mean = mean - (above == mean * area) * (mean % 2)  # halfway between two numbers: the even one
    return mean.to(torch.uint8)


@functools.cache
def _overlaps(side: int, level: int) -> tuple[list[list[int]], list[list[int]], int]:
    """Return which pixels each pixel of a level covers along an axis, how much of each, and how much in all.

    Both lists hold the first of these pixels for each of the level's, then the second and so on: [taps][side >> level].
    Their unit is the largest that makes all of them whole numbers.
    """
    small = side >> level
    unit = math.gcd(side, small)
    length, step = side // unit, small // unit  # of a pixel of the level, and of a stored one
    taps = [[start * length // step + tap for start in range(small)] for tap in range(-(-length // step) + 1)]
    shares = [
        [max(0, min((i + 1) * step, (k + 1) * length) - max(i * step, k * length)) for k, i in enumerate(pixels)]
        for pixels in taps
    ]
    used = [number for number, tap in enumerate(shares) if any(tap)]
    pixels = [[min(i, side - 1) for i in taps[number]] for number in used]
    return pixels, [shares[number] for number in used], length


def build_pyramid(images: Tensor, highest: int) -> Tensor:
    """Return the levels 1 to `highest` of all images, one after another: uint8 [N, bytes] on their device.

    Args:
        images: uint8 [N, C, H, W].
        highest: from 1.
    """
    pyramid = images.new_empty(len(images), bytes_to(highest, images.shape[1:]))
    step = max(1, CHUNK // images[0].numel())
    for first in range(0, len(images), step):
        part = images[first : first + step]
        levels = [shrink(part, level).flatten(1) for level in range(1, highest + 1)]
        torch.cat(levels, dim=1, out=pyramid[first : first + step])
    return pyramid


def bytes_to(level: int, image_shape: tuple[int, ...]) -> int:
    """Return the bytes that the levels 1 to `level` of an image [C, H, W] take."""
    channels, height, width = image_shape
    return sum(channels * (height >> k) * (width >> k) for k in range(1, level + 1))


def at_level(images: Tensor, pyramid: Tensor | None, level: int) -> Tensor:
    """Return a level of all images, a view: uint8 [N, C, H >> level, W >> level]."""
    if pyramid is None or level == 0:
        return images
    channels, height, width = images.shape[1:]
    part = pyramid[:, bytes_to(level - 1, images.shape[1:]) : bytes_to(level, images.shape[1:])]
    return part.unflatten(1, (channels, height >> level, width >> level))
