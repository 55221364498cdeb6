"""From a photo on a plain background to what Fashion-MNIST shows: light on black, trimmed, centred, 28 x 28."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from fmnist.data.fashion_mnist import IMAGE_SIZE

Floats = NDArray[np.float32]
Invert = Literal["auto", "always", "never"]
TOLERANCE = 0.05 * 255  # the paper trims what is within 5 % of the background's colour
# The pictures of a shop have full contrast: (share, level) such that in 95 % of the training images, and for the second
# in all of them, so large a share of the object is below no less than this level.
CONTRAST = ((0.95, 157.0), (0.995, 230.0))
GRID = 64  # cells per side on which parts of one object are joined: a sandal's straps are a few cells apart
LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as Pillow's mode L


@dataclass(frozen=True, kw_only=True)
class Cutout:
    """What the model sees of a picture.

    Attributes:
        view: uint8 [28, 28], light on black.
        box: left, top, right, bottom of the object, in pixels of the picture; None where it was taken whole.
        inverted: whether dark became light.
    """

    view: NDArray[np.uint8]
    box: tuple[int, int, int, int] | None
    inverted: bool


def cut_out(rgb: Floats, alpha: Floats | None, *, invert: Invert = "auto", crop: bool = True) -> Cutout:
    """Make a picture look like Fashion-MNIST: trimmed, longest edge 28, light on black, grey, centred.

    A picture of 28 x 28 is taken to be one of the data set's kind: nothing is trimmed. So is a picture without a
    plain background, and every picture with `crop` off.

    Args:
        rgb: float32 [H, W, 3], 0 to 255.
        alpha: float32 [H, W], 0 to 1, where the picture has transparency: then that is the background.
        invert: auto makes the object lighter than its background, whichever it was; always and never decide it.
        crop: find the object and trim the rest.

    Raises:
        ValueError: the picture is one plain colour or wholly transparent: nothing to see.

    Source: Xiao et al. 2017, Fashion-MNIST, section 2, steps 2 to 7 (their sharpening of step 4 is left to Lanczos).
    """
    grey = rgb @ LUMINANCE
    if np.ptp(grey if alpha is None else alpha * (1 + grey)) < 1e-3:
        raise ValueError("one plain colour: there is no object in it")
    if alpha is not None:
        mask = alpha > 0.5
        if not mask.any():
            raise ValueError("wholly transparent: there is no object in it")
        # A cut-out is shown on white, as in a shop; a white object would vanish there, so it is shown on black.
        back = np.full_like(grey, 0.0 if grey[mask].mean() > 200 else 255.0)
        grey = alpha * grey + (1 - alpha) * back
        # Below half opacity is a drawn shadow, or the edge: the edge stays soft by a pixel.
        found = (back, ndimage.binary_dilation(mask)) if crop and grey.shape != (IMAGE_SIZE, IMAGE_SIZE) else None
    elif crop and grey.shape != (IMAGE_SIZE, IMAGE_SIZE):
        found = find_object(rgb)
    else:
        found = None
    if found is None:
        inverted = _is_light(grey) if invert == "auto" else invert == "always"
        return Cutout(view=fit(255 - grey if inverted else grey), box=None, inverted=inverted)

    back, mask = found
    darker = np.where(mask, back - grey, 0)
    inverted = bool(darker.sum() >= 0) if invert == "auto" else invert == "always"
    # The background becomes exactly black, and what is as dark (or light) as can be against it 255.
    room = np.maximum(back if inverted else 255 - back, 32.0)
    light = np.clip((darker if inverted else -darker) / room * 255, 0, 255)
    light = np.minimum(light * max(1.0, *(level / max(np.quantile(light[mask], q), 1.0) for q, level in CONTRAST)), 255)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    view = fit(light[top:bottom, left:right].astype(np.float32))
    return Cutout(view=view, box=(left, top, right, bottom), inverted=inverted)


def find_object(rgb: Floats) -> tuple[Floats, NDArray[np.bool_]] | None:
    """Separate the object from a plain background.

    Args:
        rgb: float32 [H, W, 3], 0 to 255.

    Returns:
        The background's grey under every pixel, float32 [H, W], and the object's mask, bool [H, W]; None where the
        border is not of one colour (up to a gradient of light), or nothing, or nearly all, differs from it.
    """
    surface, spread = _background(rgb)
    if 4 * spread > TOLERANCE:  # a camera's noise; where there is none the edge stays where it is, to the pixel
        rgb = ndimage.gaussian_filter(rgb, (1, 1, 0))
        surface, spread = _background(rgb)
    distance = np.abs(rgb - surface).max(axis=2)
    limit = max(TOLERANCE, 4 * spread)
    ring = _ring(distance.shape)
    if (distance[ring] < limit).mean() < 0.6:
        return None
    mask = ndimage.binary_opening(distance > limit, np.ones((3, 3)))
    mask = _largest(mask)
    if not 0.002 < mask.mean() < 0.98:
        return None
    return surface @ LUMINANCE, mask


def _ring(shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """The outermost pixels: 3 % of the shorter side, all around."""
    width = max(1, round(0.03 * min(shape)))
    ring = np.ones(shape, dtype=bool)
    ring[width:-width, width:-width] = False
    return ring


def _background(rgb: Floats) -> tuple[Floats, float]:
    """Fit each channel's background as a plane to the border; return it [H, W, 3] and the spread around it."""
    height, width = rgb.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    planes = np.stack([np.ones_like(x), x, y], axis=-1)
    ring = _ring((height, width))
    points, colours = planes[ring], rgb[ring]
    fit_points = np.median(colours, axis=0, keepdims=True)  # where the object touches the border, the rest decides
    weights = np.zeros((3, 3), dtype=np.float32)
    for _ in range(4):
        residual = np.abs(colours - fit_points).max(axis=1)
        inside = residual <= max(TOLERANCE, 2.5 * float(np.median(residual)))
        weights = np.linalg.lstsq(points[inside], colours[inside], rcond=None)[0]
        fit_points = points @ weights
    residual = np.abs(colours - fit_points).max(axis=1)
    return np.clip(planes @ weights, 0, 255), 1.4826 * float(np.median(residual))


def _largest(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Keep the largest object; parts less than a few hundredths of the picture apart count as one."""
    if not mask.any():
        return mask
    height, width = mask.shape
    rows, columns = np.arange(height) * GRID // height, np.arange(width) * GRID // width
    cells = np.zeros((GRID, GRID), dtype=bool)
    where = np.nonzero(mask)
    cells[rows[where[0]], columns[where[1]]] = True
    labels, _ = ndimage.label(ndimage.binary_dilation(cells, np.ones((3, 3))), np.ones((3, 3)))
    of_pixel = labels[rows[:, None], columns[None]]
    sizes = np.bincount(of_pixel[mask])
    return mask & (of_pixel == sizes.argmax())


def _is_light(grey: Floats) -> bool:
    """Whether the corners, which are black in nearly every image of the data set, are light."""
    height, width = grey.shape
    side = max(1, min(height, width) // 28)
    corners = [grey[a, b] for a in (slice(side), slice(-side, None)) for b in (slice(side), slice(-side, None))]
    return float(np.median([corner.mean() for corner in corners])) > 127


def fit(light: Floats) -> NDArray[np.uint8]:
    """Resize the longest edge to 28, and pad the other with black on both sides.

    Args:
        light: float32 [H, W], 0 to 255, light on black.

    Returns:
        uint8 [28, 28].
    """
    height, width = light.shape
    scale = IMAGE_SIZE / max(height, width)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    view = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    # An odd row or column of padding is above or to the left, as in nearly every image of the data set.
    top, left = (IMAGE_SIZE - rows + 1) // 2, (IMAGE_SIZE - columns + 1) // 2
    # Pillow's Lanczos widens its kernel when it shrinks: every pixel of the picture has its share.
    resized = Image.fromarray(np.ascontiguousarray(light)).resize((columns, rows), Image.Resampling.LANCZOS)
    view[top : top + rows, left : left + columns] = np.asarray(resized)
    return np.clip(np.rint(view), 0, 255).astype(np.uint8)
