"""Which layers of a model train as matrix products or by our kernel, and how these come and go."""

from collections.abc import Iterable
from typing import Literal

import torch
from timm.layers.activations import GELU
from timm.layers.conv2d_same import Conv2dSame
from timm.models.convnext import ConvNeXtBlock, ConvNeXtStage
from torch import nn

from fmnist.models.matmul_layers import (
    MOST_PIXELS,
    LinearConv2d,
    MatmulConv2d,
    MatmulConv2dSame,
    PixelGELU,
    describe_matmul,
)
from fmnist.models.triton_layers import KERNELS, TritonConv2d, fits_triton
from fmnist.runtime.hardware import has_triton

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
        choice: auto: on a CPU matrix products where those are faster; matmul: matrix products wherever they stay small;
            triton: the kernel wherever it fits; conv: neither.
        device: where it will be trained.
    """
    use_convolutions(model)
    if choice == "conv" or (choice == "auto" and device.type != "cpu"):
        return
    if choice == "triton":
        for conv in depthwise_layers(model) if has_triton(device) else ():
            if fits_triton(conv):
                conv.__class__ = TritonConv2d
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
