"""The data path as one Triton kernel: gather, flip, rotation, shift, scale, resize, erasing, mixing, normalisation.

It reads the uint8 pixels of the whole split by index and writes the batch that the model takes: no batch exists in
between. Parameters and meaning are those of `augment_torch.py`; the arithmetic is float32. Shapes are compile-time
constants, so that a division by the size is a multiplication and the four neighbours share one address: each new
combination of size, shape and options compiles once, about a second.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fmnist.data.augment_table import NUM_COLUMNS
from fmnist.data.augment_torch import Plan
from fmnist.data.batches import to_device

TILE = 32  # pixels per side of what one program makes; 7 of them are 224, so no lane idles there
NUM_WARPS = 2  # 16 pixels a thread pay for reading a sample's row once


@triton.jit
def _in_box(row, first: tl.constexpr, x, y):  # type: ignore[no-untyped-def]
    inside_x = (x >= tl.load(row + first)) & (x < tl.load(row + first + 2))
    inside_y = (y >= tl.load(row + first + 1)) & (y < tl.load(row + first + 3))
    return inside_x & inside_y


@triton.jit
def _pixel_affine(row, first: tl.constexpr, side: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    # One row of the matrix, from output pixels to source pixels instead of [-1, 1] to [-1, 1].
    a, b, c = tl.load(row + first), tl.load(row + first + 1), tl.load(row + first + 2)
    offset = (c + 1.0 + (a + b) * (1.0 / SIZE - 1.0)) * (side * 0.5) - 0.5
    return a * (side / SIZE), b * (side / SIZE), offset


@triton.jit
def _bilinear(image, place_x, place_y, left, top, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    dx, dy = place_x - left, place_y - top
    corner = image + (top * WIDTH + left)
    v00, v01 = tl.load(corner).to(tl.float32), tl.load(corner + 1).to(tl.float32)
    v10, v11 = tl.load(corner + WIDTH).to(tl.float32), tl.load(corner + (WIDTH + 1)).to(tl.float32)
    upper, lower = v00 + dx * (v01 - v00), v10 + dx * (v11 - v10)
    return upper + dy * (lower - upper)  # 0 to 255


@triton.jit
def _fade(place, side: tl.constexpr):  # type: ignore[no-untyped-def]
    fade = (side + 1.0) - 2.0 * tl.abs(place - (side - 1.0) * 0.5)
    return tl.minimum(tl.maximum(fade, 0.0), 1.0)


@triton.jit
def _sample(  # type: ignore[no-untyped-def]
    image,
    row,
    x,  # float32 [1, TILE], output pixels
    y,  # float32 [TILE, 1]
    first_x,  # the tile's first column and line
    first_y,
    fill,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    ERASES: tl.constexpr,
    TILE: tl.constexpr,
):
    ax, bx, cx = _pixel_affine(row, 0, WIDTH, SIZE)
    ay, by, cy = _pixel_affine(row, 3, HEIGHT, SIZE)
    place_x, place_y = ax * x + (bx * y + cx), ay * x + (by * y + cy)
    # A tile whose corners all lie between source pixels lies there whole: nothing to clamp, nothing to fade.
    corner_x, corner_y = ax * first_x + bx * first_y + cx, ay * first_x + by * first_y + cy
    low_x = corner_x + (TILE - 1) * (tl.minimum(ax, 0.0) + tl.minimum(bx, 0.0))
    low_y = corner_y + (TILE - 1) * (tl.minimum(ay, 0.0) + tl.minimum(by, 0.0))
    high_x = corner_x + (TILE - 1) * (tl.maximum(ax, 0.0) + tl.maximum(bx, 0.0))
    high_y = corner_y + (TILE - 1) * (tl.maximum(ay, 0.0) + tl.maximum(by, 0.0))
    if (tl.minimum(low_x, low_y) > 0.001) & (high_x < WIDTH - 1.001) & (high_y < HEIGHT - 1.001):
        value = _bilinear(image, place_x, place_y, place_x.to(tl.int32), place_y.to(tl.int32), WIDTH)
    else:
        fade = _fade(place_x, WIDTH) * _fade(place_y, HEIGHT)
        place_x = tl.minimum(tl.maximum(place_x, 0.0), WIDTH - 1.0)
        place_y = tl.minimum(tl.maximum(place_y, 0.0), HEIGHT - 1.0)
        left = tl.minimum(place_x.to(tl.int32), WIDTH - 2)  # not negative: truncation is floor
        top = tl.minimum(place_y.to(tl.int32), HEIGHT - 2)
        value = fade * _bilinear(image, place_x, place_y, left, top, WIDTH)
    if ERASES:
        value = tl.where(_in_box(row, 6, x, y), fill, value)
    return value


@triton.jit
def _augment_kernel(  # type: ignore[no-untyped-def]
    images,
    indices,
    partners,
    table,
    statistics,  # float32 [2, CHANNELS]: factor and offset from 0 to 255 to the model's numbers
    out,
    fill,  # 0 to 255
    SOURCE_CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ERASES: tl.constexpr,
    MIXES: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    TILES: tl.constexpr = (SIZE + TILE - 1) // TILE
    batch = tl.program_id(0) // (TILES * TILES)
    tile = tl.program_id(0) % (TILES * TILES)
    first_x, first_y = (tile % TILES) * TILE, (tile // TILES) * TILE
    column, line = first_x + tl.arange(0, TILE)[None, :], first_y + tl.arange(0, TILE)[:, None]
    x, y = column.to(tl.float32), line.to(tl.float32)
    mask = (column < SIZE) & (line < SIZE)
    sample = tl.load(indices + batch)
    own = table + sample * COLUMNS
    if MIXES:
        partner = tl.load(partners + batch)
        weight = tl.where(_in_box(own, 11, x, y), 0.0, tl.load(own + 10))
    start = out + batch.to(tl.int64) * (CHANNELS * SIZE * SIZE)
    for channel in tl.static_range(CHANNELS):
        if channel < SOURCE_CHANNELS:  # the channels of a grey source are one value with several statistics
            image = images + (sample * SOURCE_CHANNELS + channel) * (HEIGHT * WIDTH)
            value = _sample(image, own, x, y, first_x, first_y, fill, HEIGHT, WIDTH, SIZE, ERASES, TILE)
            if MIXES:
                image = images + (partner * SOURCE_CHANNELS + channel) * (HEIGHT * WIDTH)
                row = table + partner * COLUMNS
                other = _sample(image, row, x, y, first_x, first_y, fill, HEIGHT, WIDTH, SIZE, ERASES, TILE)
                value = weight * value + (1.0 - weight) * other
        result = value * tl.load(statistics + channel) + tl.load(statistics + CHANNELS + channel)
        if CHANNELS_LAST:
            offset = (line * SIZE + column) * CHANNELS + channel
        else:
            offset = channel * SIZE * SIZE + line * SIZE + column
        tl.store(start + offset, result.to(out.dtype.element_ty), mask=mask)


def augment_fused(images: Tensor, indices: Tensor, partners: Tensor, table: Tensor, plan: Plan) -> Tensor:
    """Gather, warp, erase, mix and normalise one micro-batch in one kernel; see `augment_reference`.

    Args:
        images: uint8 [N, C, H, W], contiguous, H and W at least 2; C is 1 or the number of plan.mean.
        indices: int64 [B], the samples.
        partners: int64 [B], what is mixed into each; read only where plan.mixes.
        table: float32 [N, NUM_COLUMNS], contiguous.
        plan: what is the same for all samples.

    Returns:
        plan.dtype [B, len(plan.mean), S, S] on the device of the images.
    """
    (source_channels, height, width), channels, size = images.shape[1:], len(plan.mean), plan.size
    memory_format = torch.channels_last if plan.channels_last else torch.contiguous_format
    out = torch.empty(
        (len(indices), channels, size, size), dtype=plan.dtype, device=images.device, memory_format=memory_format
    )
    grid = (len(indices) * triton.cdiv(size, TILE) ** 2,)
    _augment_kernel[grid](
        images,
        indices,
        partners,
        table,
        _statistics(plan.mean, plan.std, images.device),
        out,
        plan.fill * 255,
        SOURCE_CHANNELS=source_channels,
        HEIGHT=height,
        WIDTH=width,
        CHANNELS=channels,
        SIZE=size,
        CHANNELS_LAST=plan.channels_last,
        ERASES=plan.erases,
        MIXES=plan.mixes,
        COLUMNS=NUM_COLUMNS,
        TILE=TILE,
        num_warps=NUM_WARPS,
    )
    return out


@functools.cache
def _statistics(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Tensor:
    """Return float32 [2, C]: v * factor + offset normalises v in 0 to 255."""
    factors = [1 / (255 * s) for s in std]
    offsets = [-m / s for m, s in zip(mean, std, strict=True)]
    return to_device(torch.tensor([factors, offsets], dtype=torch.float32), device)
