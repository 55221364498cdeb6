"""Which depthwise convolutions train by our Triton kernel: see depthwise_triton.py."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from fmnist.models.trial import layer_inputs
from fmnist.runtime.console import counted
from fmnist.runtime.environment import ENVIRONMENT

KERNELS = (3, 5, 7, 9)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fits_triton(conv: nn.Conv2d) -> bool:
    """Say whether the kernel computes what a depthwise convolution does: odd squares that move by one pixel."""
    side = conv.kernel_size[0]
    padding = (side // 2, side // 2)
    return (
        type(conv) is nn.Conv2d
        and side in KERNELS
        and conv.kernel_size == (side, side)
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding in (padding, "same")
    )


def takes_triton(images: Tensor) -> bool:
    """Say whether a layer that `use_fast_layers` put in trains by the kernel on these images."""
    runs = images.is_cuda or ENVIRONMENT.get("TRITON_INTERPRET") == "1"
    return runs and images.dim() == 4 and images.numel() > 0 and images.dtype in DTYPES


class TritonConv2d(nn.Conv2d):
    """A depthwise convolution that trains by our kernel."""

    def forward(self, images: Tensor) -> Tensor:
        if not self.training or not takes_triton(images):
            return super().forward(images)
        from fmnist.models.depthwise_triton import depthwise_triton

        return depthwise_triton(images, self.weight, self.bias)


def describe_triton(model: nn.Module, channels: int, sizes: Iterable[int]) -> str:
    """Say which layers of a model train by the kernel, and what that costs at a first start; empty where none does.

    Args:
        model, channels, sizes: see `layer_inputs`.
    """
    seen = [(cast(TritonConv2d, conv), images) for conv, images in layer_inputs(model, TritonConv2d, channels, sizes)]
    taken = [(conv, images.shape[1:]) for conv, images in seen if takes_triton(images)]
    if not taken:
        return ""
    programs = 2 * len({(shape, conv.kernel_size) for conv, shape in taken})  # one is for the gradient of the weights
    convolutions = counted(len({conv for conv, _ in taken}), "depthwise convolution")
    return f"{convolutions} by our kernel: Triton compiles {programs} kernels at the first start, about 10 s each"
