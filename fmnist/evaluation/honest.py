"""Accuracy counted in several ways: on all images, with flip averaging, without near copies of training images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fmnist.evaluation.calibration import Calibration
from fmnist.evaluation.near_copies import NEAR_COPY, SIMILAR, NearCopies
from fmnist.report.write import wilson_interval


def accuracy(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return `top1`, its `top1_interval` (95 %, Wilson) and `num_images`."""
    correct, num_images = int((logits.argmax(dim=1) == labels).sum()), len(labels)
    return {
        "top1": correct / num_images,
        "top1_interval": wilson_interval(correct, num_images),
        "num_images": num_images,
    }


def honest_sets(by_tta: Mapping[str, Tensor], labels: Tensor, copies: NearCopies | None) -> dict[str, dict[str, Any]]:
    """Compute accuracy on all images, with flip averaging, and without those that resemble a training image.

    Args:
        by_tta: float32 [N, C] logits without (none) and with (flip) flip averaging.
        labels: int64 [N].
        copies: the near copies among its images; none for training images.

    Returns:
        `all`, `flip_averaging`, `without_near_copies` and `without_similar`, the last two (and the first) without
        flip averaging and with `correlation` and `removed`.
    """
    plain = by_tta["none"]
    sets = {
        "all": accuracy(plain, labels),
        "flip_averaging": accuracy(by_tta["flip"], labels),
    }
    if copies is None:
        return sets
    for key, correlation in (("without_near_copies", NEAR_COPY), ("without_similar", SIMILAR)):
        removed = copies.above(correlation)
        kept = torch.ones(len(labels), dtype=torch.bool)
        kept[removed] = False
        if kept.any():
            about = {"correlation": correlation, "removed": len(removed)}
            sets[key] = accuracy(plain[kept], labels[kept]) | about
    return sets


def notes(honest: Mapping[str, Mapping[str, Any]], calibration: Calibration | None) -> str:
    """Return the last lines of report.txt: the honest sets, and what temperature scaling does."""
    words = {
        "all": "all images, without flip averaging",
        "flip_averaging": "all images, with flip averaging",
        "without_near_copies": "without near copies of training images (correlation > {correlation})",
        "without_similar": "without similar ones too (correlation > {correlation})",
    }
    lines = []
    for key, entry in honest.items():
        low, high = (100 * bound for bound in entry["top1_interval"])
        text = words[key].format(**entry)
        lines.append(f"{text:<68} {entry['num_images']:>7,} {100 * entry['top1']:6.2f} % ({low:.2f} to {high:.2f})")
    if calibration is None:
        lines.append("\nno validation images: no temperature is fitted")
    else:
        where = "these validation images themselves" if calibration.same_images else "validation images"
        lines.append(
            f"\ntemperature {calibration.temperature:.3f}, fitted on {calibration.num_images:,} {where}: "
            f"ECE {calibration.ece_before:.4f} -> {calibration.ece_after:.4f}, "
            f"loss {calibration.loss_before:.4f} -> {calibration.loss_after:.4f}"
        )
    return "\n".join(lines)
