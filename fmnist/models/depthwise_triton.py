"""Depthwise convolutions on a GPU by our own kernels: which tile for which map, and how they are launched."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fmnist.models.depthwise_kernels import convolve, correlate


class Tile(NamedTuple):
    """What a program does; all are powers of two but rows and strip."""

    rows: int  # of outputs, a thread
    strip: int  # columns of outputs, a thread
    units: int  # such blocks side by side
    channels: int
    warps: int
    programs: int = 0  # of the gradient of the weights: about so many share the batch


def constants(images: Tensor, kernel: int, tile: Tile) -> dict[str, int]:
    """Return the constants that a kernel is compiled with."""
    _, channels, height, width = images.shape
    map_ = {"HEIGHT": height, "WIDTH": width, "C": channels, "K": kernel}
    blocks = {"ROWS": tile.rows, "STRIP": tile.strip, "UNITS": tile.units, "CHANNELS": tile.channels}
    return map_ | blocks | {"num_warps": tile.warps}


def launch_convolve(images: Tensor, taps: Tensor, bias: Tensor | None, flipped: bool, tile: Tile) -> Tensor:
    """Convolve every channel with its own kernel, or turned around, with zeros beyond the edges.

    Args:
        images: [B, C, H, W], channels_last.
        taps: float32 [k * k, C], contiguous.
        bias: float32 [C], or none.
        flipped: take the taps in reverse order, as the gradient of the images does.
        tile: what a program does.

    Returns:
        As the images.
    """
    (batch, channels, height, width), count = images.shape, len(taps)
    out = torch.empty_like(images)
    blocks = triton.cdiv(batch * triton.cdiv(height, tile.rows), tile.units)
    grid = (triton.cdiv(width, tile.strip) * triton.cdiv(channels, tile.channels) * blocks,)
    first, step = ((count - 1) * channels, -channels) if flipped else (0, channels)
    weights = (taps, taps if bias is None else bias)
    flags = (batch, first, step, int(bias is not None))
    convolve[grid](images, *weights, out, *flags, **constants(images, round(count**0.5), tile))
    return out


def launch_correlate(images: Tensor, gradient: Tensor, kernel: int, tile: Tile) -> Tensor:
    """Return the gradients of taps and bias, float32 [k * k + 1, C].

    Args:
        images: [B, C, H, W], channels_last.
        gradient: as the images, of what came out.
        kernel: its side, k.
        tile: what a program does.
    """
    batch, channels = images.shape[:2]
    groups = triton.cdiv(channels, tile.channels)
    splits = triton.cdiv(tile.programs, groups)
    parts = images.new_empty((splits, kernel * kernel + 1, channels), dtype=torch.float32)
    correlate[splits * groups,](images, gradient, parts, batch, **constants(images, kernel, tile))
    return parts.sum(0)
