"""Depthwise convolutions on small maps as matrix products, which a CPU trains faster: same parameters, same names.

On a map of h x w pixels a depthwise kernel is, for each channel, a matrix [oh * ow, h * w] of its taps, with zeros
beyond its reach. At 8 x 8 and less it has about as many entries as the direct form has multiplications, and a matrix
product runs at the speed of the machine, as oneDNN's gradients of a depthwise convolution do not. The forward alone is
fast there: evaluation, exports and the count of FLOPs keep the convolution, and its bits.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import get_same_padding
from torch import Tensor, nn


class Axis(NamedTuple):
    """A convolution along one side of a map: pixels in and out, taps, and how those lie over the pixels."""

    size: int
    out: int
    kernel: int
    stride: int
    dilation: int
    padding: int  # before the first pixel

    @property
    def reach(self) -> Tensor:
        """Say by ones and zeros which tap joins an output to an input: float32 [kernel, out, size]."""
        offset = torch.arange(self.size) - self.stride * torch.arange(self.out)[:, None] + self.padding
        return (offset == self.dilation * torch.arange(self.kernel)[:, None, None]).float()


def axes(conv: nn.Conv2d, size: Sequence[int]) -> tuple[Axis, Axis]:
    """Return how a convolution lies over a map of height and width `size`: along rows and columns of its kernel."""
    found = []
    for i, pixels in enumerate(size):
        kernel, stride, dilation = conv.kernel_size[i], conv.stride[i], conv.dilation[i]
        if isinstance(conv, Conv2dSame):  # TensorFlow's padding, which depends on the map
            padding = get_same_padding(pixels, kernel, stride, dilation)
        elif isinstance(conv.padding, str):
            padding = dilation * (kernel - 1) if conv.padding == "same" else 0
        else:
            padding = 2 * conv.padding[i]
        out = (pixels + padding - dilation * (kernel - 1) - 1) // stride + 1
        found.append(Axis(pixels, out, kernel, stride, dilation, padding // 2))
    return found[0], found[1]


def by_channel(images: Tensor) -> bool:
    """Say whether the pixels of a channel lie side by side, and not the channels of a pixel."""
    return images.is_contiguous() or images.stride(1) != 1


class _Transposed(torch.autograd.Function):
    """A matrix transposed in memory, and its gradient too: torch's own choice, strided copies, is slower."""

    @staticmethod
    def forward(_: Any, matrix: Tensor) -> Tensor:
        return matrix.t().contiguous()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return gradient.t().contiguous()


def depthwise_matmul(images: Tensor, weight: Tensor, bias: Tensor | None, rows: Axis, columns: Axis) -> Tensor:
    """Convolve every channel with its own kernel, as one batched matrix product.

    Args:
        images: [B, C, rows.size, columns.size].
        weight: [C, 1, rows.kernel, columns.kernel].
        bias: [C], or none.
        rows, columns: see `axes`.

    Returns:
        [B, C, rows.out, columns.out], in channels_last where the images are.
    """
    batch, channels = images.shape[:2]
    # a product with ones and zeros, and no indexing: the gradient of that would be summed in no fixed order
    reach = rows.reach[:, None, :, None, :, None] * columns.reach[None, :, None, :, None, :]
    reach = reach.view(rows.kernel * columns.kernel, -1).to(weight)
    matrices = (weight.flatten(1) @ reach).view(channels, rows.out * columns.out, -1).transpose(1, 2)
    plain = by_channel(images)
    if plain:
        maps = images.flatten(2).transpose(0, 1)  # [C, B, h * w]
    else:
        by_pixel = images.permute(0, 2, 3, 1).reshape(-1, channels)
        maps = _Transposed.apply(by_pixel).view(channels, batch, rows.size * columns.size)
    convolved = torch.bmm(maps, matrices) if bias is None else torch.baddbmm(bias.view(-1, 1, 1), maps, matrices)
    if plain:
        return convolved.transpose(0, 1).contiguous().view(batch, channels, rows.out, columns.out)
    pixels = _Transposed.apply(convolved.view(channels, -1))
    return pixels.view(batch, rows.out, columns.out, channels).permute(0, 3, 1, 2)
