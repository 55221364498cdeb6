"""Which depthwise convolutions train by our Triton kernel: see depthwise_triton.py."""

from collections.abc import Iterable
from typing import Literal, cast

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


def takes_triton(conv: "TritonConv2d", images: Tensor) -> bool:
    """Say whether a layer trains by the kernel: the one place that decides.

    The numbers are those of `python -m experiments.depthwise_gpu` on an H200; they do not depend on the batch, so that
    micro-batches and processes see the same arithmetic.

    Args:
        conv: put in by `use_fast_layers`.
        images: its input.
    """
    if not (images.is_cuda or ENVIRONMENT.get("TRITON_INTERPRET") == "1"):
        return False
    if images.dim() != 4 or not images.numel() or images.dtype not in DTYPES:
        return False
    if conv.choice == "triton":
        return True
    kind = images.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else images.dtype
    # measured from 7 x 7 to 112 x 112 pixels, with 96 to 768 channels: 1.8 to 7 times as fast as cuDNN, pass by pass
    measured = conv.kernel_size[0] <= 7 and min(images.shape[2:]) >= 7 and conv.in_channels >= 32
    aligned = conv.in_channels % 16 == 0 and images.is_contiguous(memory_format=torch.channels_last)
    return dtype == torch.bfloat16 and measured and aligned


class TritonConv2d(nn.Conv2d):
    """A depthwise convolution that trains by our kernel."""

    choice: Literal["auto", "triton"]

    def forward(self, images: Tensor) -> Tensor:
        if not self.training or not takes_triton(self, images):
            return super().forward(images)
        from fmnist.models.depthwise_triton import depthwise_triton

        return depthwise_triton(images, self.weight, self.bias)


def describe_triton(model: nn.Module, channels: int, sizes: Iterable[int]) -> str:
    """Say which layers of a model train by the kernel, and what that costs at a first start; empty where none does.

    Args:
        model, channels, sizes: see `layer_inputs`; to be called under the autocast of the training.
    """
    seen = [(cast(TritonConv2d, conv), images) for conv, images in layer_inputs(model, TritonConv2d, channels, sizes)]
    taken = [(conv, images.shape[1:]) for conv, images in seen if takes_triton(conv, images)]
    if not taken:
        return ""
    programs = 2 * len({(shape, conv.kernel_size) for conv, shape in taken})  # one is for the gradient of the weights
    convolutions = counted(len({conv for conv, _ in taken}), "depthwise convolution")
    return f"{convolutions} by our kernel: Triton compiles it for their maps at the first start, {programs} times 10 s"
