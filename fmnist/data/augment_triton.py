"""The data path as one Triton kernel: gather, warp, resize, colour, erasing, mixing, normalisation.

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

from fmnist.data.augment_torch import Plan, augment_reference
from fmnist.runtime.hardware import to_device

TILE = 32  # pixels per side of what one program makes; 7 of them are 224, so no lane idles there
NUM_WARPS = 2  # 16 pixels a thread pay for reading a sample's row once


@triton.jit
def _in_box(row, first: tl.constexpr, x, y):  # type: ignore[no-untyped-def]
    inside_x = (x >= tl.load(row + first)) & (x < tl.load(row + first + 2))
    inside_y = (y >= tl.load(row + first + 1)) & (y < tl.load(row + first + 3))
    return inside_x & inside_y


@triton.jit
def _pixel_affine(row, first: tl.constexpr, side, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    # One row of the matrix, from output pixels to source pixels instead of [-1, 1] to [-1, 1].
    # The side is a constant, or a number where each sample has a level of its own.
    a, b, c = tl.load(row + first), tl.load(row + first + 1), tl.load(row + first + 2)
    offset = (c + 1.0 + (a + b) * (1.0 / SIZE - 1.0)) * (side * 0.5) - 0.5
    return a * (side / SIZE), b * (side / SIZE), offset


@triton.jit
def _bilinear(  # type: ignore[no-untyped-def]
    image, place_x, place_y, left, top, fade, height, width, CHANNELS: tl.constexpr
):
    # A tuple of the source's channels, 0 to 255.
    dx, dy = place_x - left, place_y - top
    corner = image + (top * width + left)
    values = ()
    for _ in tl.static_range(CHANNELS):
        v00, v01 = tl.load(corner).to(tl.float32), tl.load(corner + 1).to(tl.float32)
        v10, v11 = tl.load(corner + width).to(tl.float32), tl.load(corner + (width + 1)).to(tl.float32)
        upper, lower = v00 + dx * (v01 - v00), v10 + dx * (v11 - v10)
        values += (fade * (upper + dy * (lower - upper)),)  # type: ignore[assignment]
        corner += height * width
    return values


@triton.jit
def _fade(place, side):  # type: ignore[no-untyped-def]
    fade = (side + 1.0) - 2.0 * tl.abs(place - (side - 1.0) * 0.5)
    return tl.minimum(tl.maximum(fade, 0.0), 1.0)


@triton.jit
def _warp(  # type: ignore[no-untyped-def]
    image,
    row,
    x,  # float32 [1, TILE], output pixels
    y,  # float32 [TILE, 1]
    first_x,  # the tile's first column and line
    first_y,
    height,
    width,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    # A tuple of the source's channels, float32 [TILE, TILE], 0 to 255.
    ax, bx, cx = _pixel_affine(row, 0, width, SIZE)
    ay, by, cy = _pixel_affine(row, 3, height, SIZE)
    place_x, place_y = ax * x + (bx * y + cx), ay * x + (by * y + cy)
    # A tile whose corners all lie between source pixels lies there whole: nothing to clamp, nothing to fade.
    corner_x, corner_y = ax * first_x + bx * first_y + cx, ay * first_x + by * first_y + cy
    low_x = corner_x + (TILE - 1) * (tl.minimum(ax, 0.0) + tl.minimum(bx, 0.0))
    low_y = corner_y + (TILE - 1) * (tl.minimum(ay, 0.0) + tl.minimum(by, 0.0))
    high_x = corner_x + (TILE - 1) * (tl.maximum(ax, 0.0) + tl.maximum(bx, 0.0))
    high_y = corner_y + (TILE - 1) * (tl.maximum(ay, 0.0) + tl.maximum(by, 0.0))
    values = ()
    for _ in tl.static_range(CHANNELS):  # both branches below have to give what is there already
        values += (tl.full((TILE, TILE), 0.0, tl.float32),)  # type: ignore[assignment]
    if (tl.minimum(low_x, low_y) > 0.001) & (high_x < width - 1.001) & (high_y < height - 1.001):
        left, top = place_x.to(tl.int32), place_y.to(tl.int32)
        values = _bilinear(image, place_x, place_y, left, top, 1.0, height, width, CHANNELS)
    else:
        fade = _fade(place_x, width) * _fade(place_y, height)
        place_x = tl.minimum(tl.maximum(place_x, 0.0), width - 1.0)
        place_y = tl.minimum(tl.maximum(place_y, 0.0), height - 1.0)
        left = tl.minimum(place_x.to(tl.int32), width - 2)  # not negative: truncation is floor
        top = tl.minimum(place_y.to(tl.int32), height - 2)
        values = _bilinear(image, place_x, place_y, left, top, fade, height, width, CHANNELS)
    return values


@triton.jit
def _mixed(row, first: tl.constexpr, red, green, blue):  # type: ignore[no-untyped-def]
    # One row of the colour matrix.
    linear = tl.load(row + first) * red + tl.load(row + first + 1) * green + tl.load(row + first + 2) * blue
    return tl.minimum(tl.maximum(linear + 255.0 * tl.load(row + first + 3), 0.0), 255.0)


@triton.jit
def _sample(  # type: ignore[no-untyped-def]
    images,
    pyramid,
    table,
    sample,
    x,
    y,
    first_x,
    first_y,
    fills,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    LAST_LEVEL: tl.constexpr,
    PYRAMID_BYTES: tl.constexpr,
    COLOURS: tl.constexpr,
    ERASES: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    # A sample's channels, warped, recoloured and erased: a tuple of float32 [TILE, TILE], 0 to 255.
    row = table + sample * COLUMNS
    image = images + sample * (CHANNELS * HEIGHT * WIDTH)
    if LAST_LEVEL > 0:
        level = tl.load(row + 16).to(tl.int32)
        if level > 0:
            image = pyramid + sample * PYRAMID_BYTES
            for lower in tl.static_range(1, LAST_LEVEL):
                image += tl.where(level > lower, CHANNELS * (HEIGHT >> lower) * (WIDTH >> lower), 0)
        height, width = HEIGHT >> level, WIDTH >> level
        values = _warp(image, row, x, y, first_x, first_y, height, width, CHANNELS, SIZE, TILE)
    else:
        values = _warp(image, row, x, y, first_x, first_y, HEIGHT, WIDTH, CHANNELS, SIZE, TILE)
    if COLOURS:
        if CHANNELS == 1:
            values = (_mixed(row, 17, values[0], values[0], values[0]),)
        else:
            red, green, blue = values
            values = (
                _mixed(row, 17, red, green, blue),
                _mixed(row, 21, red, green, blue),
                _mixed(row, 25, red, green, blue),
            )
    if ERASES:
        box, kept = _in_box(row, 6, x, y), values
        values = ()
        for channel in tl.static_range(CHANNELS):
            values += (tl.where(box, tl.load(fills + channel), kept[channel]),)
    return values


@triton.jit
def _augment_kernel(  # type: ignore[no-untyped-def]
    images,
    pyramid,  # read only where LAST_LEVEL is not 0
    indices,
    partners,
    table,
    statistics,  # float32 [3, CHANNELS]: factor and offset from 0 to 255 to the model's numbers; fill, 0 to 255
    out,
    SOURCE_CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    LAST_LEVEL: tl.constexpr,
    PYRAMID_BYTES: tl.constexpr,
    COLOURS: tl.constexpr,
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
    fills = statistics + 2 * CHANNELS
    sample = tl.load(indices + batch)
    values = _sample(
        *(images, pyramid, table, sample, x, y, first_x, first_y, fills),
        *(SOURCE_CHANNELS, HEIGHT, WIDTH, SIZE, LAST_LEVEL, PYRAMID_BYTES, COLOURS, ERASES, COLUMNS, TILE),
    )
    if MIXES:
        own = table + sample * COLUMNS
        weight = tl.where(_in_box(own, 11, x, y), 0.0, tl.load(own + 10))
        others = _sample(
            *(images, pyramid, table, tl.load(partners + batch), x, y, first_x, first_y, fills),
            *(SOURCE_CHANNELS, HEIGHT, WIDTH, SIZE, LAST_LEVEL, PYRAMID_BYTES, COLOURS, ERASES, COLUMNS, TILE),
        )
    start = out + batch.to(tl.int64) * (CHANNELS * SIZE * SIZE)
    for channel in tl.static_range(CHANNELS):
        value = values[channel % SOURCE_CHANNELS]  # a grey source is one value with several statistics
        if MIXES:
            value = weight * value + (1.0 - weight) * others[channel % SOURCE_CHANNELS]
        result = value * tl.load(statistics + channel) + tl.load(statistics + CHANNELS + channel)
        if CHANNELS_LAST:
            offset = (line * SIZE + column) * CHANNELS + channel
        else:
            offset = channel * SIZE * SIZE + line * SIZE + column
        tl.store(start + offset, result.to(out.dtype.element_ty), mask=mask)


def augment_fused(
    images: Tensor, pyramid: Tensor | None, indices: Tensor, partners: Tensor, table: Tensor, plan: Plan
) -> Tensor:
    """Gather, warp, recolour, erase, mix and normalise one micro-batch in one kernel; see `augment_reference`.

    Args:
        images: uint8 [N, C, H, W], contiguous; C is 1 or the number of plan.mean. The kernel reads a pixel and the next
            one of each axis: what is one pixel high or wide goes through `augment_reference`.
        pyramid: uint8 [N, bytes], contiguous, with all of plan.levels; None where that is only 0.
        indices: int64 [B], the samples.
        partners: int64 [B], what is mixed into each; read only where plan.mixes.
        table: float32 [N, 16, 17 or 29], contiguous.
        plan: what is the same for all samples.

    Returns:
        plan.dtype [B, len(plan.mean), S, S] on the device of the images.
    """
    (source_channels, height, width), channels, size = images.shape[1:], len(plan.mean), plan.size
    if min(height, width) < 2:
        return augment_reference(images, pyramid, indices, partners, table, plan)
    memory_format = torch.channels_last if plan.channels_last else torch.contiguous_format
    out = torch.empty(
        (len(indices), channels, size, size), dtype=plan.dtype, device=images.device, memory_format=memory_format
    )
    grid = (len(indices) * triton.cdiv(size, TILE) ** 2,)
    with torch.cuda.device_of(images):  # Triton launches on the current device
        _augment_kernel[grid](
            images,
            images if pyramid is None else pyramid,
            indices,
            partners,
            table,
            _statistics(plan.mean, plan.std, plan.fill, images.device),
            out,
            SOURCE_CHANNELS=source_channels,
            HEIGHT=height,
            WIDTH=width,
            CHANNELS=channels,
            SIZE=size,
            CHANNELS_LAST=plan.channels_last,
            LAST_LEVEL=plan.levels[-1],
            PYRAMID_BYTES=0 if pyramid is None else pyramid.shape[1],
            COLOURS=plan.colours,
            ERASES=plan.erases,
            MIXES=plan.mixes,
            COLUMNS=table.shape[1],
            TILE=TILE,
            num_warps=NUM_WARPS,
        )
    return out


@functools.cache
def _statistics(
    mean: tuple[float, ...], std: tuple[float, ...], fill: tuple[float, ...], device: torch.device
) -> Tensor:
    """Return float32 [3, C]: v * factor + offset normalises v in 0 to 255; fill, in 0 to 255."""
    factors = [1 / (255 * s) for s in std]
    offsets = [-m / s for m, s in zip(mean, std, strict=True)]
    fills = [255 * value for value in (fill * len(mean))[: len(mean)]]
    return to_device(torch.tensor([factors, offsets, fills], dtype=torch.float32), device)
