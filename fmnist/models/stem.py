"""The channels a model reads: an RGB stem folded into a one-channel stem that computes the same numbers."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import nn

from fmnist.models.trial import try_model

log = logging.getLogger("fmnist")


@dataclass(frozen=True)
class Normalization:
    """How images become the model's input: len(mean) channels, channel c being (image / 255 - mean[c]) / std[c]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def to_one_channel(model: nn.Module, name: str, sizes: Sequence[int]) -> Normalization:
    """Fold the RGB stem of a pretrained timm model, in place, for gray images where that is exact.

    A gray image g reaches the RGB stem as channels (g - m_c) / s_c, m and s from the model's pretrained_cfg.
    Without padding sum_c W_c * (g - m_c) / s_c is one kernel sum_c W_c / s_c on g and a constant, so the raw
    image goes in. Padding adds zeros after the normalisation, gray level m_c in channel c: one gray image can
    have that only if the statistics of all channels agree. Then the kernel sum_c W_c reads (g - m) / s; else
    the model keeps three channels.

    Args:
        model: a timm model of three channels; its weights may be random (the structure comes out the same).
        name: for messages, `model.name`.
        sizes: image sizes it will be given, in pixels.

    Returns:
        The normalization of the folded model (one channel) or of the untouched one (three).

    Raises:
        ValueError: an image size that the model cannot take.
    """
    pretrained_cfg = cast(dict[str, Any], model.pretrained_cfg)
    mean, std = tuple(pretrained_cfg["mean"]), tuple(pretrained_cfg["std"])
    names = pretrained_cfg.get("first_conv") or ()
    stems = [model.get_submodule(path) for path in ((names,) if isinstance(names, str) else names)]
    readers = try_model(model, name, 3, sizes)

    padded = any(_pads(stem) for stem in stems)
    equal = len(set(mean)) == len(set(std)) == 1
    if not stems or set(stems) != readers or not all(_is_plain(stem) for stem in stems):
        reason = "its first layer is not a plain convolution of the image"
    elif padded and not equal:
        reason = f"its stem pads and its channels differ in mean {mean} or std {std}"
    else:
        for stem in stems:
            _fold(cast(nn.Conv2d, stem), None if padded else Normalization(mean, std))
        return Normalization(mean[:1], std[:1]) if padded else Normalization((0.0,), (1.0,))
    log.info("%s keeps three channels: %s", name, reason)
    return Normalization(mean, std)


def _is_plain(conv: nn.Module) -> bool:
    # Exact types: subclasses standardise their kernels on the fly, which a folded kernel would not survive.
    if not isinstance(conv, nn.Conv2d) or type(conv) not in (nn.Conv2d, Conv2dSame):
        return False
    return conv.groups == 1 and conv.padding_mode == "zeros"


def _pads(conv: nn.Module) -> bool:
    # Conv2dSame says padding 0 and pads in its forward.
    return isinstance(conv, Conv2dSame) or getattr(conv, "padding", None) not in ((0, 0), "valid")


def _fold(conv: nn.Conv2d, normalization: Normalization | None) -> None:
    """Make conv read one channel: the raw image, or (None) one that is normalised like all three were."""
    dtype = conv.weight.dtype
    kernel = conv.weight.detach().double()  # [out, 3, k, k]; float64, so that the cast rounds once
    if normalization is not None:
        mean = torch.tensor(normalization.mean, dtype=torch.float64)
        std = torch.tensor(normalization.std, dtype=torch.float64)
        kernel = kernel / std[:, None, None]
        bias = -(kernel.sum((2, 3)) @ mean)
        if conv.bias is not None:
            bias += conv.bias.detach().double()
        conv.bias = nn.Parameter(bias.to(dtype))
    conv.weight = nn.Parameter(kernel.sum(1, keepdim=True).to(dtype))
    conv.in_channels = 1
