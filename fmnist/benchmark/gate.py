"""The correctness gate: a loader that makes wrong images, or delivers them in another order, is not timed.

With given parameters each transform must lie within 2/255 of a float64 warp, wherever no pixel outside the image is
read: there conventions differ (zeros, edge pixels, a fade). Libraries that interpolate twice are compared with the
float64 form of their own chain, which the JSON names. bfloat16 output is allowed its own rounding on top, PIL
that of colours, which it cuts to whole values after each change.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from fmnist.benchmark.pipelines import COLOURS, Chain, Fixed, Pipeline
from fmnist.data.colour import LUMA, grey_of
from fmnist.data.fashion_mnist import MEAN

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
# Photographs, by colour: crops of no more pixels than the output, since libraries differ in how they shrink.
SHOWN = (20, 32, 200, 180)
CHANGES: list[dict[str, Any]] = [{colour: factor} for colour in COLOURS for factor in (0.85, 1.2)]
COLOUR_CASES = [Fixed(crop=SHOWN, **change) for change in ({}, {"flip": True}, *CHANGES)]


def check(pipeline: Pipeline) -> dict[str, Any]:
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


def transform_error(pipeline: Pipeline) -> tuple[float, float, float]:
    """Return by how much the error exceeds the tolerance (<= 0 passes), the error, and the share compared."""
    setting = pipeline.setting
    indices = torch.arange(NUM_IMAGES, device=setting.device)
    source = setting.split.images[:NUM_IMAGES].cpu().numpy()
    excess, largest, shares = -1.0, 0.0, []
    mean, std = (np.array(part)[:, None, None] for part in (setting.split.info.mean, setting.split.info.std))
    grey = grey_of(setting.split.info.mean) if pipeline.contrast_about == "the data set's grey" else None
    for fixed in CASES if setting.channels == 1 else COLOUR_CASES:
        right, known = expected(source, fixed, setting.size, pipeline.chain)
        right = recoloured(right.reshape(len(source), -1, setting.size, setting.size), fixed, grey)
        scale = setting.size / source.shape[-1] if pipeline.chain == "resize, then warp" else 1.0
        normalized = pipeline.apply_fixed(indices, fixed.enlarged(scale)).double().cpu().numpy()
        if normalized.shape != right.shape or not np.isfinite(normalized).all():
            return float("inf"), float("inf"), 0.0
        error = np.abs(normalized * std + mean - right)[..., known]
        rounding = np.abs(normalized * std)[..., known] * torch.finfo(setting.dtype).eps / 2
        excess = max(excess, float((error - rounding).max()) - pipeline.own_rounding - TOLERANCE)
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
        shape = (len(wanted), setting.channels, setting.size, setting.size)
        if tuple(images.shape) != shape or images.dtype != setting.dtype or images.device != setting.device:
            return f"delivers {tuple(images.shape)} {images.dtype} on {images.device}, not {shape} {setting.dtype}"
        if not torch.equal(labels, setting.split.labels[wanted]):
            return "delivers labels in another order than asked for"
    brightness = torch.cat([images.double().mean((1, 2, 3)) for images, _ in batches])
    source = torch.cat([setting.split.images[wanted].double().flatten(1).mean(1) for wanted in indices])
    if float(torch.corrcoef(torch.stack((brightness, source)))[0, 1]) < MIN_CORRELATION:
        return "delivers images that do not belong to their labels"
    return ""


def expected(images: NDArray[np.uint8], fixed: Fixed, size: int, chain: Chain) -> tuple[Array, NDArray[np.bool_]]:
    """Augment square images, uint8 [B, H, W] or [B, C, H, W], exactly, but for their colours.

    Returns:
        float64 [B, size, size], or [B * C, size, size], in [0, 1]; and bool [size, size], True where every pixel read
        lies inside what is shown of the source.
    """
    side = images.shape[-1]
    warps: dict[Chain, list[tuple[Fixed, int]]] = {
        "one warp": [(fixed, size)],
        "warp, then resize": [(fixed, side), (RESIZE, size)],
        "resize, then warp": [(RESIZE, size), (fixed.enlarged(size / side), size)],
    }
    result, inside = images.reshape(-1, side, side) / 255, np.ones((1, side, side))
    for step, target in warps[chain]:
        result, inside = _warped(result, inside, step, target)
    known = inside[0] > 1 - 1e-9
    x0, y0, x1, y1 = fixed.box_pixels(size)
    result[:, y0:y1, x0:x1], known[y0:y1, x0:x1] = MEAN, True
    return result, known


def _warped(images: Array, inside: Array, fixed: Fixed, size: int) -> tuple[Array, Array]:
    """Return images [B, S, S] and the share [1, S, S] of each pixel read that is theirs, at another size."""
    left, top, width, height = fixed.crop or (0, 0, images.shape[-1], images.shape[-1])
    images, inside = (part[:, top : top + height, left : left + width] for part in (images, inside))
    centre = (np.arange(size) + 0.5) / size - 0.5  # from the middle of what is shown
    y, x = np.meshgrid(centre * height - fixed.shift_y, centre * width - fixed.shift_x, indexing="ij")
    # y points down: this turn undoes a counter-clockwise one
    cos, sin = np.cos(np.radians(fixed.angle)), np.sin(np.radians(fixed.angle))
    x, y = cos * x - sin * y, sin * x + cos * y
    x = -x if fixed.flip else x
    within = (np.abs(x) <= (width - 1) / 2 + 1e-9) & (np.abs(y) <= (height - 1) / 2 + 1e-9)
    within |= fixed is RESIZE  # a resize continues the edges: it has no outside
    places = y + (height - 1) / 2, x + (width - 1) / 2
    read = partial(map_coordinates, coordinates=places, order=1, mode="nearest")
    return np.stack([*map(read, images)]), np.stack([*map(read, inside)]) * within


def recoloured(images: Array, fixed: Fixed, grey: float | None) -> Array:
    """Change the colours of images [B, C, S, S]; contrast is about this grey, or where None, each image's own."""
    images = (images * fixed.brightness).clip(0, 1)
    luma = np.array(LUMA)[:, None, None] if images.shape[1] == 3 else np.ones((1, 1, 1))
    middle = (images * luma).sum(1, keepdims=True).mean((2, 3), keepdims=True) if grey is None else grey
    images = ((images - middle) * fixed.contrast + middle).clip(0, 1)
    own = (images * luma).sum(1, keepdims=True)
    return ((images - own) * fixed.saturation + own).clip(0, 1)
