"""The correctness gate: a loader that makes wrong images, or delivers them in another order, is not timed.

With given parameters each transform must lie within 2/255 of a float64 warp, wherever no pixel outside the image is
read: there conventions differ (zeros, edge pixels, a fade). Libraries that interpolate twice are compared with the
float64 form of their own chain, which the JSON names. bfloat16 output is allowed its own rounding on top.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from fmnist.benchmark.pipelines import Augmenting, Chain, Fixed, Pipeline
from fmnist.data.fashion_mnist import MEAN, STD

TOLERANCE = 2 / 255
NUM_IMAGES, NUM_BATCHES = 16, 3
MIN_CORRELATION = 0.6  # of brightness, delivered against source: erasing lowers it to 0.9; another order, to 0
Array = NDArray[np.float64]
RESIZE = Fixed()
# Each parameter alone and together, within what the race draws: +-10 degrees, +-2.8 pixels, boxes of 2 to 33 %.
CASES = (
    Fixed(),
    Fixed(flip=True),
    Fixed(angle=7.5),
    Fixed(shift_x=2, shift_y=-1),
    Fixed(flip=True, angle=-4.0, shift_x=-1, shift_y=2),
    Fixed(flip=True, angle=9.0, shift_x=1, shift_y=1, box=(0.25, 0.5, 0.75, 0.75)),
)


def check(pipeline: Augmenting) -> dict[str, Any]:
    """Check a loader's transform with given parameters, then its first batches.

    Returns:
        As JSON: `largest_error` on the compared pixels, in 1/255; `pixels_compared`, their share of all pixels;
        `labels_in_order`; `passed`: it may be timed; `reason`, empty where it passed.
    """
    excess, error, compared = transform_error(pipeline)
    fault = order_fault(pipeline)
    reason = "more than 2/255 off" if excess > 0 else fault
    finding = {"size": pipeline.setting.size, "name": pipeline.name, "chain": pipeline.chain, "passed": not reason}
    finding |= {"largest_error": round(error * 255, 3), "pixels_compared": round(compared, 4)}
    return finding | {"labels_in_order": not fault, "reason": reason}


def transform_error(pipeline: Augmenting) -> tuple[float, float, float]:
    """Return by how much the error exceeds the tolerance (<= 0 passes), the error, and the share compared."""
    setting = pipeline.setting
    indices = torch.arange(NUM_IMAGES, device=setting.device)
    source = setting.split.images[:NUM_IMAGES].cpu().numpy()
    excess, largest, shares = -1.0, 0.0, []
    for fixed in CASES:
        right, known = expected(source, fixed, setting.size, pipeline.chain)
        images = pipeline.apply_fixed(indices, fixed.enlarged(pipeline.enlargement))
        normalized = images.double().cpu().numpy()[:, 0]
        if normalized.shape != right.shape or not np.isfinite(normalized).all():
            return float("inf"), float("inf"), 0.0
        error = np.abs(normalized * STD + MEAN - right)[:, known]
        rounding = np.abs(normalized)[:, known] * STD * torch.finfo(setting.dtype).eps / 2
        excess = max(excess, float((error - rounding).max()) - TOLERANCE)
        largest = max(largest, float(error.max()))
        shares.append(float(known.mean()))
    return excess, largest, float(np.mean(shares))


def order_fault(pipeline: Pipeline) -> str:
    """Return what is wrong with the first batches delivered, or an empty string."""
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
        if not torch.equal(labels, setting.split.labels[wanted]):
            return "delivers labels in another order than asked for"
    brightness = torch.cat([images.double().mean((1, 2, 3)) for images, _ in batches])
    source = torch.cat([setting.split.images[wanted].double().mean((-2, -1)) for wanted in indices])
    if float(torch.corrcoef(torch.stack((brightness, source)))[0, 1]) < MIN_CORRELATION:
        return "delivers images that do not belong to their labels"
    return ""


def expected(images: NDArray[np.uint8], fixed: Fixed, size: int, chain: Chain) -> tuple[Array, NDArray[np.bool_]]:
    """Augment square images, uint8 [B, H, W], exactly.

    Returns:
        float64 [B, size, size] in [0, 1]; and bool [size, size], True where every pixel read lies inside the source.
    """
    side = images.shape[1]
    warps: dict[Chain, list[tuple[Fixed, int, int]]] = {
        "one warp": [(fixed, side, size)],
        "warp, then resize": [(fixed, side, side), (RESIZE, side, size)],
        "resize, then warp": [(RESIZE, side, size), (fixed.enlarged(size / side), size, size)],
    }
    result, inside = images.astype(np.float64) / 255, np.ones((1, side, side))
    for step, source, target in warps[chain]:
        y, x = _source_places(step, source, target)
        last = source - 1 + 1e-9
        within = (x >= -1e-9) & (x <= last) & (y >= -1e-9) & (y <= last)
        within |= step is RESIZE  # a resize continues the edges: it has no outside
        result, inside = _bilinear(result, y, x), _bilinear(inside, y, x) * within
    known = inside[0] > 1 - 1e-9
    x0, y0, x1, y1 = fixed.box_pixels(size)
    result[:, y0:y1, x0:x1], known[y0:y1, x0:x1] = MEAN, True
    return result, known


def _source_places(fixed: Fixed, side: int, size: int) -> tuple[Array, Array]:
    """Return y and x [size, size]: where each output pixel lies among the source's pixel indices."""
    centre = (np.arange(size) + 0.5) * side / size - side / 2  # source pixels from the image's centre
    y, x = np.meshgrid(centre - fixed.shift_y, centre - fixed.shift_x, indexing="ij")
    # y points down: this turn undoes a counter-clockwise one
    cos, sin = np.cos(np.radians(fixed.angle)), np.sin(np.radians(fixed.angle))
    x, y = cos * x - sin * y, sin * x + cos * y
    return y + (side - 1) / 2, (-x if fixed.flip else x) + (side - 1) / 2


def _bilinear(images: Array, y: Array, x: Array) -> Array:
    return np.stack([map_coordinates(image, (y, x), order=1, mode="nearest") for image in images])
