"""Depthwise convolutions on a GPU by our own kernels: which tile for which map, how they are launched, their gradients.

Two operators of torch, opaque to `torch.compile`, hold the launches; both want channels_last and answer in it.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fmnist.models.depthwise_kernels import convolve, correlate


class Tile(NamedTuple):
    """What a program does; units and channels are powers of two."""

    rows: int  # of outputs, a thread
    strip: int  # columns of outputs, a thread
    units: int  # such blocks side by side
    channels: int
    warps: int
    programs: int = 0  # of the gradient of the weights: at most so many share the batch


def _block(channels: int) -> int:
    return next((size for size in (128, 64, 32) if channels % size == 0), 32)


def _strip(width: int) -> int:
    """Return how many columns a thread takes: all of a narrow map, for what lies outside then costs nothing."""
    if width <= 14 or width % 7 == 0:
        return width if width <= 14 else 7
    return min(range(4, 9), key=lambda strip: -(-width // strip) * (strip + 3))  # few strips, little beyond the edge


def forward_tile(images: Tensor, kernel: int) -> Tile:
    """Return the tile of the forward and of the gradient of the images: the best of experiments/depthwise_gpu.py.

    It depends on a layer's shape alone, as that of the weights does: so do the bits.
    """
    _, channels, height, width = images.shape
    block, strip = _block(channels), _strip(width)
    if max(height, width) <= 7:
        return Tile(height, width, 128 // block, block, 4)
    if width <= 14:
        return Tile(2, strip, 128 // block, block, 2)
    return Tile(4 if kernel < 7 else 2, strip, 256 // block, block, 4)


def weights_tile(images: Tensor, kernel: int) -> Tile:
    """Return the tile of the gradient of the weights; see `forward_tile`."""
    _, channels, height, width = images.shape
    block, strip = _block(channels), _strip(width)
    if max(height, width) <= 7:
        return Tile(height, width, 128 // block, block, 4, 528)
    if width <= 14:
        return Tile(2, strip, 128 // block, block, 4, 528)
    if kernel == 3:
        return Tile(4, strip, 256 // block, block, 4, 528)
    if width >= 56 and kernel < 9:
        return Tile(2, strip, 256 // block, block, 4, 528)
    return Tile(4, strip, 128 // block, block, 4, 528)


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
    with torch.cuda.device_of(images):  # Triton launches on the current device
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
    batch, channels, height, width = images.shape
    groups = triton.cdiv(channels, tile.channels)
    units = batch * triton.cdiv(height, tile.rows) * triton.cdiv(width, tile.strip)
    splits = min(triton.cdiv(tile.programs, groups), triton.cdiv(units, tile.units))
    parts = images.new_empty((splits, kernel * kernel + 1, channels), dtype=torch.float32)
    with torch.cuda.device_of(images):
        correlate[splits * groups,](images, gradient, parts, batch, **constants(images, kernel, tile))
    return parts.sum(0)


@torch.library.custom_op("fmnist::depthwise", mutates_args=())
def _convolve(images: Tensor, weight: Tensor, bias: Tensor | None, flipped: bool) -> Tensor:
    taps = weight.flatten(1).t().float().contiguous()
    tile = forward_tile(images, weight.shape[-1])
    return launch_convolve(images, taps, None if bias is None else bias.float(), flipped, tile)


@_convolve.register_fake
def _(images: Tensor, weight: Tensor, bias: Tensor | None, flipped: bool) -> Tensor:
    return torch.empty_like(images)


@torch.library.custom_op("fmnist::depthwise_weights", mutates_args=())
def _correlate(images: Tensor, gradient: Tensor, kernel: int) -> Tensor:
    return launch_correlate(images, gradient, kernel, weights_tile(images, kernel))


@_correlate.register_fake
def _(images: Tensor, gradient: Tensor, kernel: int) -> Tensor:
    return images.new_empty((kernel * kernel + 1, images.shape[1]), dtype=torch.float32)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, weight, bias, _ = inputs
    ctx.save_for_backward(images, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    images, weight = ctx.saved_tensors
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    of_images = of_weight = of_bias = None
    if ctx.needs_input_grad[0]:
        of_images = _convolve(gradient, weight, None, True)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        sums = _correlate(images, gradient, weight.shape[-1])
        # strides as the weight's, those of length 1 too: DDP compares them, and warns
        of_weight = torch.empty_like(weight).copy_(sums[:-1].t().unflatten(1, weight.shape[1:]))
        if ctx.bias_dtype is not None:
            of_bias = sums[-1].to(ctx.bias_dtype)
    return of_images, of_weight, of_bias, None


_convolve.register_autograd(_gradients, setup_context=_remember)


def depthwise_triton(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve every channel with its own kernel, as our kernel does, with zeros beyond the edges.

    Sums are in float32; under autocast the images are cast as a convolution's are, weight and bias stay as they are.

    Args:
        images: [B, C, H, W], float32, bfloat16 or float16, not empty; in any memory format, but one that is not
            channels_last is copied.
        weight: [C, 1, k, k], k odd.
        bias: [C], or none.

    Returns:
        [B, C, H, W], channels_last.
    """
    if torch.is_autocast_enabled(images.device.type):
        images = images.to(torch.get_autocast_dtype(images.device.type))
    convolved: Tensor = _convolve(images.contiguous(memory_format=torch.channels_last), weight, bias, False)
    return convolved
