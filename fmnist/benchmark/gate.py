"""The correctness gate: a pipeline that makes other images than it should, or in another order, is not timed.

With given parameters each transform must lie within 2/255 of a float64 warp, wherever no pixel outside the image is
read (there conventions differ). Libraries that warp at 28 px and then resize interpolate twice: each is held to the
float64 form of its own chain, and the JSON says which. bfloat16 output is allowed its own rounding on top.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fmnist.benchmark.ground_truth import CASES, expected
from fmnist.benchmark.pipelines import Pipeline
from fmnist.data.fashion_mnist import MEAN, STD

TOLERANCE = 2 / 255
NUM_IMAGES = 16
NUM_BATCHES = 3
LEAST_CORRELATION = 0.6  # of brightness, delivered against source: erasing lowers it to 0.9; another order, to 0


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the gate found.

    Attributes:
        name, chain: of the pipeline.
        passed: it may be timed.
        largest_error: on the compared pixels, in 1/255.
        pixels_compared: their share of all pixels.
        labels_in_order: the delivered labels are those of the common order.
        reason: why it was refused, else empty.
    """

    name: str
    chain: str
    passed: bool
    largest_error: float
    pixels_compared: float
    labels_in_order: bool
    reason: str


def check(pipeline: Pipeline) -> Verdict:
    """Check a pipeline's transform with given parameters, then its first batches."""
    excess, error, compared = transform_error(pipeline)
    reason = order_fault(pipeline)
    in_order = not reason
    if excess > 0:
        reason = f"off by {error * 255:.1f}/255 from a float64 {pipeline.chain}"
    return Verdict(
        name=pipeline.name,
        chain=pipeline.chain,
        passed=not reason,
        largest_error=round(error * 255, 3),
        pixels_compared=round(compared, 4),
        labels_in_order=in_order,
        reason=reason,
    )


def transform_error(pipeline: Pipeline) -> tuple[float, float, float]:
    """Return by how much the error exceeds what is allowed (at most 0 is right), the error, and the share compared."""
    setting = pipeline.setting
    indices = torch.arange(NUM_IMAGES, device=setting.device)
    source = setting.split.images[:NUM_IMAGES].cpu().numpy()
    excess, largest, shares = -1.0, 0.0, []
    for fixed in CASES:
        right, inside = expected(source, fixed, setting.size, pipeline.chain)
        normalized = pipeline.pinned(indices, fixed).double().cpu().numpy()[:, 0]
        if normalized.shape != right.shape or not np.isfinite(normalized).all():
            return float("inf"), float("inf"), 0.0
        error = np.abs(normalized * STD + MEAN - right)[:, inside]
        rounding = np.abs(normalized)[:, inside] * STD * torch.finfo(setting.dtype).eps / 2
        excess = max(excess, float((error - rounding).max()) - TOLERANCE)
        largest = max(largest, float(error.max()))
        shares.append(float(inside.mean()))
    return excess, largest, float(np.mean(shares))


def order_fault(pipeline: Pipeline) -> str:
    """Return what is wrong with the first batches delivered, or nothing."""
    setting, loader = pipeline.setting, pipeline.setting.loader()
    pipeline.start()
    try:
        batches = [pipeline.next() for _ in range(NUM_BATCHES)]
    finally:
        pipeline.stop()
    indices = [loader.micro_batches(step)[0].indices for step in range(NUM_BATCHES)]
    for (images, labels), wanted in zip(batches, indices, strict=True):
        shape = (len(wanted), 1, setting.size, setting.size)
        if tuple(images.shape) != shape or images.dtype != setting.dtype or images.device != setting.device:
            return f"delivers {tuple(images.shape)} {images.dtype} on {images.device}, not {shape} {setting.dtype}"
        if labels.shape != wanted.shape or not torch.equal(labels, setting.split.labels[wanted]):
            return "delivers labels in another order than asked for"
    brightness = torch.cat([images.double().mean((1, 2, 3)) for images, _ in batches])
    source = torch.cat([setting.split.images[wanted].double().mean((-2, -1)) for wanted in indices])
    if correlation(brightness, source) < LEAST_CORRELATION:
        return "delivers images that do not belong to their labels"
    return ""


def correlation(a: Tensor, b: Tensor) -> float:
    """Return Pearson's correlation of two [N] tensors."""
    return float(torch.corrcoef(torch.stack((a, b)))[0, 1])
