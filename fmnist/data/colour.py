"""Brightness, contrast, saturation and hue of a sample: one matrix, 3 x 4, of its red, green and blue."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fmnist.config.schema import AugmentConfig

LUMA = (0.299, 0.587, 0.114)  # the grey of red, green and blue
# Turns hues by a quarter, from red towards yellow, and takes the grey away: to YIQ, I := Q, Q := -I, Y := 0, and back.
QUARTER_TURN = (
    (-0.167703247, -0.329268146, 0.496971393),
    (0.328130814, -0.035520929, -0.292609885),
    (-1.249732606, 1.04650843, 0.203224176),
)


def changes_colours(cfg: AugmentConfig) -> bool:
    """Say whether the colours, or the grey, of a sample may change."""
    return any((cfg.brightness, cfg.contrast, cfg.saturation, cfg.hue))


def grey_of(colour: tuple[float, ...]) -> float:
    """Return the grey of a colour that has one channel or three, in its units."""
    return colour[0] if len(colour) == 1 else sum(luma * value for luma, value in zip(LUMA, colour, strict=True))


def colour_matrix(cfg: AugmentConfig, u: tuple[Tensor, ...], grey: float) -> list[Tensor]:
    """Return what scales brightness, then contrast, then saturation, and turns the hue: 12 x [N], row-major 3 x 4.

    As torchvision's ColorJitter, but for this: contrast is about the data set's grey, not about the image's; hue turns
    in YIQ, where that is linear, instead of HSV; the order is fixed, and values are clamped once, at the end.

    Args:
        cfg: how far each may go.
        u: uniforms of the four, in this order, each float32 [N] in [0, 1).
        grey: what contrast leaves as it is, in [0, 1] units.

    Source:
        YIQ: FCC 1953; its use for this: adjust_hsv_in_yiq of TensorFlow Addons.
    """
    limits = (cfg.brightness, cfg.contrast, cfg.saturation, 2 * math.pi * cfg.hue)
    changes = [(2 * drawn - 1) * limit for drawn, limit in zip(u, limits, strict=True)]
    brightness, contrast, saturation = (1 + change for change in changes[:3])
    along, across = saturation * torch.cos(changes[3]), saturation * torch.sin(changes[3])
    columns = []
    for row, turns in enumerate(QUARTER_TURN):
        for column, (luma, turn) in enumerate(zip(LUMA, turns, strict=True)):
            without_grey = float(row == column) - luma
            columns.append(contrast * brightness * (luma + along * without_grey + across * turn))
        columns.append((1 - contrast) * grey)
    return columns


def recolour(channels: Sequence[Tensor], matrices: Tensor) -> list[Tensor]:
    """Apply a matrix to each pixel, and clamp to [0, 1].

    Args:
        channels: three of float [B, S, S] in [0, 1], or one, which is red, green and blue alike.
        matrices: float [B, 12], the table's columns COLOUR.
    """
    changed = []
    for factors in matrices[:, :, None, None].split(4, dim=1)[: len(channels)]:
        red, green, blue, offset = factors.unbind(1)
        # Written out: a matrix product may round to TF32.
        mixed = red * channels[0] + green * channels[1 % len(channels)] + blue * channels[2 % len(channels)]
        changed.append((mixed + offset).clamp(0, 1))
    return changed
