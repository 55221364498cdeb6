"""Floating-point operations of a model, forward and backward, counted by torch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count


def _convolution_backward_flops(
    grad_shape: Sequence[int],
    image_shape: Sequence[int],
    weight_shape: Sequence[int],
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    output_mask: Sequence[bool],
    out_shape: Any = None,
    **_: Any,
) -> int:
    # Both gradients take as many multiplications as the forward pass, grouped or not; torch counts grouped ones dense.
    once = conv_flop_count(list(image_shape), list(weight_shape), list(grad_shape), transposed=transposed)
    return once * (int(output_mask[0]) + int(output_mask[1]))


def flops_per_image(model: nn.Module, channels: int, size: int) -> tuple[int, int]:
    """Count floating-point operations (a multiply-add is two) of matrix products and convolutions.

    Args:
        model: from images [B, C, H, W] to logits; left as it is, but for its gradients, which are cleared.
        channels: C.
        size: H and W in pixels.

    Returns:
        The operations of one image's forward, and of its forward and backward together.
    """
    was_training = model.training
    model.eval()  # BatchNorm accepts a single image, and keeps its statistics
    image = torch.zeros(1, channels, size, size, device=next(model.parameters()).device)
    custom = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=custom) as counter:
        logits: Tensor = model(image)
        forward = counter.get_total_flops()
        logits.sum().backward()
    for parameter in model.parameters():
        parameter.grad = None
    model.train(was_training)
    return forward, counter.get_total_flops()
