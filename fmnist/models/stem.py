"""The channels a model reads: an RGB stem turned into a one-channel stem that gives the same numbers."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

log = logging.getLogger("fmnist")


@dataclass(frozen=True)
class Normalization:
    """What the model reads: len(mean) channels, channel c being (image / 255 - mean[c]) / std[c]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


# Mean and standard deviation of the 60,000 training images in [0, 1].
FASHION_MNIST = Normalization((0.2860,), (0.3530,))


def modules_that_see_the_image(model: nn.Module, num_channels: int, sizes: Sequence[int]) -> set[nn.Module]:
    """Run one image of each size through the model and return the layers that read the image itself.

    Args:
        model: left as it was: parameters, buffers and training mode.
        num_channels: channels of the image.
        sizes: heights (and widths) to try, in pixels.

    Returns:
        The leaf modules whose first operand was the image, unchanged, at every size.

    Raises:
        ValueError: an image size that the model cannot take.
    """
    seen: list[set[nn.Module]] = []
    image = torch.empty(0)
    dtype = next(model.parameters()).dtype

    def note(module: nn.Module, operands: tuple[object, ...]) -> None:
        if operands and isinstance(operands[0], Tensor) and torch.equal(operands[0], image):
            seen[-1].add(module)

    leaves = [m for m in model.modules() if not any(m.children()) and not isinstance(m, nn.Identity)]
    hooks = [leaf.register_forward_pre_hook(note) for leaf in leaves]
    modes = {module: module.training for module in model.modules()}
    model.eval()  # or BatchNorm would count this image
    try:
        for size in sizes:
            # Fixed numbers: drawing them would move the global random state that the run depends on.
            image = torch.linspace(0, 1, num_channels * size * size, dtype=dtype)
            image = image.view(1, num_channels, size, size)
            seen.append(set())
            with torch.no_grad():
                model(image)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"augment.size: this model cannot take images of {size} px: {reason}") from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return set.intersection(*seen)


def to_one_channel(model: nn.Module, sizes: Sequence[int]) -> Normalization:
    """Fold the RGB stem of a pretrained timm model, in place, for gray images where that is exact.

    A gray image g reaches the RGB stem as channels (g - m_c) / s_c, m and s from the model's pretrained_cfg.
    Without padding sum_c W_c * (g - m_c) / s_c is one kernel sum_c W_c / s_c on g and a constant, so the raw
    image goes in. Padding adds zeros after the normalisation, gray level m_c in channel c: one gray image can
    have that only if the statistics of all channels agree. Then the kernel sum_c W_c reads (g - m) / s; else
    the model keeps three channels.

    Args:
        model: a timm model of three channels; its weights may be random (the structure comes out the same).
        sizes: image sizes it will be given, in pixels.

    Returns:
        The normalization of the folded model (one channel) or of the untouched one (three).

    Raises:
        ValueError: an image size that the model cannot take.
    """
    pretrained_cfg = cast(dict[str, Any], model.pretrained_cfg)
    mean, std = tuple(pretrained_cfg["mean"]), tuple(pretrained_cfg["std"])
    names = pretrained_cfg.get("first_conv") or ()
    stems = [model.get_submodule(name) for name in ((names,) if isinstance(names, str) else names)]
    readers = modules_that_see_the_image(model, 3, sizes)

    padded = any(_pads(stem) for stem in stems)
    equal = len(set(mean)) == len(set(std)) == 1
    if set(stems) != readers or not all(_is_plain(stem) for stem in stems):
        reason = "its first layer is not a plain convolution of the image"
    elif padded and not equal:
        reason = f"its stem pads and its channels differ in mean {mean} or std {std}"
    else:
        for stem in stems:
            _fold(cast(nn.Conv2d, stem), None if padded else Normalization(mean, std))
        return Normalization(mean[:1], std[:1]) if padded else Normalization((0.0,), (1.0,))
    log.info("%s keeps three channels: %s", type(model).__name__, reason)
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
