"""Which layers of a model train as matrix products or by a kernel, and how they come and go: see depthwise.py."""

from collections.abc import Iterable
from typing import Literal, cast

import torch
import torch.nn.functional as F
from timm.layers.activations import GELU
from timm.layers.conv2d_same import Conv2dSame
from timm.models.convnext import ConvNeXtBlock, ConvNeXtStage
from torch import Tensor, nn

from fmnist.models.depthwise import axes, by_channel, depthwise_matmul
from fmnist.models.trial import layer_inputs
from fmnist.models.triton_layers import KERNELS, TritonConv2d, fits_triton
from fmnist.runtime.console import counted
from fmnist.runtime.hardware import has_triton

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


# What each class is put in place of: exactly these, since subclasses make their kernels on the fly.
PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    MatmulConv2d: nn.Conv2d,
    MatmulConv2dSame: Conv2dSame,
    TritonConv2d: nn.Conv2d,
    LinearConv2d: nn.Conv2d,
    PixelGELU: GELU,
}


def depthwise_layers(model: nn.Module) -> list[nn.Conv2d]:
    """Return the plain depthwise convolutions of a model: one kernel per channel, padded with zeros."""
    kinds = (nn.Conv2d, Conv2dSame, MatmulConv2d, MatmulConv2dSame, TritonConv2d)
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d) and type(module) in kinds]
    plain = [conv for conv in layers if conv.padding_mode == "zeros"]
    return [conv for conv in plain if conv.groups == conv.in_channels == conv.out_channels > 1]


def _is_patches(layer: nn.Module) -> bool:
    if type(layer) is not nn.Conv2d or layer.groups > 1 or layer.kernel_size != layer.stride:
        return False
    return layer.padding in ((0, 0), "valid") and layer.dilation == (1, 1)


def use_fast_layers(
    model: nn.Module, choice: Literal["auto", "conv", "matmul", "triton"], device: torch.device
) -> None:
    """Let a model train with matrix products or our kernel in place of convolutions, as `model.depthwise` says.

    The layers stay where they are and keep their parameters, buffers and hooks; only their class changes.

    Args:
        model: changed in place; `use_convolutions` changes it back.
        choice: auto: what is faster on the device; matmul: matrix products wherever they stay small; triton: the kernel
            wherever it fits; conv: neither.
        device: where it will be trained.
    """
    use_convolutions(model)
    if choice == "conv":
        return
    if choice == "triton" or (choice == "auto" and device.type != "cpu"):
        kernel = has_triton(device) and (choice == "triton" or torch.version.hip is None)  # auto: as measured
        for conv in depthwise_layers(model) if kernel else ():
            if fits_triton(conv):
                conv.__class__ = TritonConv2d
                conv.choice = choice  # type: ignore[assignment]
        return
    for conv in depthwise_layers(model):
        conv.__class__ = MatmulConv2dSame if isinstance(conv, Conv2dSame) else MatmulConv2d
        conv.choice = choice  # type: ignore[assignment]
    for part in model.modules():  # ConvNeXt's norms leave the channels of a pixel side by side
        inner: nn.Module = nn.Identity()
        if isinstance(part, ConvNeXtStage):
            inner = part.downsample
        elif isinstance(part, ConvNeXtBlock) and part.use_conv_mlp:
            inner = part.mlp
        for layer in inner.children():
            if _is_patches(layer):
                layer.__class__ = LinearConv2d
            elif type(layer) is GELU:
                layer.__class__ = PixelGELU


def use_convolutions(model: nn.Module) -> None:
    """Undo `use_fast_layers`."""
    for module in model.modules():
        if type(module) in PLAIN:
            vars(module).pop("choice", None)
            module.__class__ = PLAIN[type(module)]


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


def depthwise_without_effect(model: nn.Module, choice: str, channels: int, sizes: Iterable[int]) -> str:
    """Say why `model.depthwise` changes nothing in a model, where it was given and does not; else return nothing.

    Args:
        model: as `use_fast_layers` left it.
        choice: the option.
        channels, sizes: see `layer_inputs`.
    """
    if choice == "auto" or describe_matmul(model, channels, sizes):
        return ""
    if not depthwise_layers(model):
        return f"{choice} has no effect: the model has no plain depthwise convolution"
    if choice == "triton" and not any(isinstance(module, TritonConv2d) for module in model.modules()):
        if not has_triton(next(model.parameters()).device):
            return "triton has no effect: it needs a CUDA device and the package triton"
        sides = ", ".join(f"{side} x {side}" for side in KERNELS)
        return f"triton has no effect: no depthwise convolution has a kernel of {sides}, stride 1 and as much padding"
    if choice == "matmul":
        return f"matmul has no effect: no depthwise convolution has a map of at most {MOST_PIXELS[choice]} pixels"
    return ""
