"""Layers that train as matrix products: see depthwise.py."""

from collections.abc import Iterable
from typing import Literal, cast

import torch.nn.functional as F
from timm.layers.activations import GELU
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from fmnist.models.depthwise import axes, by_channel, depthwise_matmul
from fmnist.models.trial import layer_inputs
from fmnist.runtime.console import counted

MOST_PIXELS = {"auto": 64, "matmul": 256}  # of a map; its matrix has the square of it, per channel


def takes_matmul(conv: "_OnSmallMaps", images: Tensor) -> bool:
    """Say whether a convolution trains as a matrix product: the one place that decides.

    The numbers are those of `python -m experiments.depthwise_speed` on a CPU; they do not depend on the batch, so that
    micro-batches and processes see the same arithmetic.

    Args:
        conv: put in by `use_fast_layers`.
        images: its input.
    """
    if images.dim() != 4:
        return False
    rows, columns = axes(conv, images.shape[2:])
    pixels, taps = rows.size * columns.size, rows.kernel * columns.kernel
    if min(rows.out, columns.out) < 1 or pixels > MOST_PIXELS[conv.choice]:
        return False
    if conv.choice == "matmul":
        return True
    if taps <= 9:  # oneDNN has a fast kernel for 3 x 3, but not where most of it lies outside
        return pixels <= 4
    return pixels <= (6 if by_channel(images) else 1.5) * taps  # else the transposes cost too much


class _OnSmallMaps(nn.Conv2d):
    choice: Literal["auto", "matmul"]

    def forward(self, images: Tensor) -> Tensor:
        if not self.training or not takes_matmul(self, images):
            return super().forward(images)
        return depthwise_matmul(images, self.weight, self.bias, *axes(self, images.shape[2:]))


class MatmulConv2d(_OnSmallMaps):
    """A depthwise convolution that trains as a matrix product on small maps."""


class MatmulConv2dSame(_OnSmallMaps, Conv2dSame):
    """The same with TensorFlow's padding."""


class LinearConv2d(nn.Conv2d):
    """A convolution of windows that lie side by side, 1 x 1 or patches, which trains as a linear layer."""

    def _conv_forward(self, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.training or images.dim() != 4:
            return super()._conv_forward(images, weight, bias)
        height, width = self.kernel_size
        batch, _, rows, columns = images.shape
        rows, columns = rows // height, columns // width
        if not rows * columns:
            return super()._conv_forward(images, weight, bias)
        pixels = images.permute(0, 2, 3, 1)[:, : rows * height, : columns * width]
        patches = pixels.unflatten(2, (columns, width)).unflatten(1, (rows, height)).transpose(2, 3)
        weight = weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(patches.reshape(batch, rows, columns, -1), weight, bias).permute(0, 3, 1, 2)


class PixelGELU(GELU):
    """GELU between two such layers: torch's fast one wants its input contiguous, as it is pixel by pixel."""

    def forward(self, images: Tensor) -> Tensor:
        if not self.training or images.dim() != 4:
            return super().forward(images)
        return super().forward(images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def describe_matmul(model: nn.Module, channels: int, sizes: Iterable[int]) -> str:
    """Say which layers of a model train as matrix products; empty where none does.

    Args:
        model, channels, sizes: see `layer_inputs`.
    """
    taken: dict[nn.Module, int] = {}
    for conv, images in layer_inputs(model, _OnSmallMaps, channels, sizes):
        if takes_matmul(cast(_OnSmallMaps, conv), images):
            taken[conv] = max(taken.get(conv, 0), *images.shape[2:])
    others = sum(isinstance(module, LinearConv2d) for module in model.modules())
    side = max(taken.values(), default=0)
    parts = [f"{counted(len(taken), 'depthwise convolution')} (maps of up to {side} x {side})"] if taken else []
    parts += [counted(others, "pointwise or patch convolution")] if others else []
    return f"as matrix products: {', '.join(parts)}" if parts else ""
