"""From a photo on a plain background to what Fashion-MNIST shows: light on black, trimmed, centred, 28 x 28."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from fmnist.data.fashion_mnist import IMAGE_SIZE

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
Fine = NDArray[np.int16]  # grey values and distances in steps of 1 / FINE
Invert = Literal["auto", "always", "never"]
TOLERANCE = 0.05 * 255  # the paper trims what is within 5 % of the background's colour
# The pictures of a shop have full contrast: (share, level) such that in 95 % of the training images, and for the second
# in all of them, so large a share of the object is below no less than this level.
CONTRAST = ((0.95, 157.0), (0.995, 230.0))
CONTRAST_STEP = 2  # every second row and column of the object tell its contrast
BORDER_POINTS = 1500  # pixels of the border that tell the background
FINE = np.int16(32)
GRID = 64  # cells per side on which parts of one object are joined: a sandal's straps are a few cells apart
LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as Pillow's mode L


@dataclass(frozen=True, kw_only=True)
class Cutout:
    """What the model sees of a picture.

    Attributes:
        view: uint8 [28, 28], light on black; for another data set [H, W] or [3, H, W] as its images are stored.
        box: left, top, right, bottom of what is seen, in pixels of the picture; None where it was taken whole.
        inverted: whether dark became light.
    """

    view: NDArray[np.uint8]
    box: tuple[int, int, int, int] | None
    inverted: bool


def cut_out(image: Image.Image, *, invert: Invert = "auto", crop: bool = True) -> Cutout:
    """Make a picture look like Fashion-MNIST: trimmed, longest edge 28, light on black, grey, centred.

    A picture of 28 x 28 is taken to be one of the data set's kind: nothing is trimmed. So is a picture without a
    plain background, and every picture with `crop` off.

    Args:
        image: of mode RGB, or RGBA: then what is transparent is the background.
        invert: auto makes the object lighter than its background, whichever it was; always and never decide it.
        crop: find the object and trim the rest.

    Raises:
        ValueError: the picture is one plain colour or wholly transparent: nothing to see.

    Source: Xiao et al. 2017, Fashion-MNIST, section 2, steps 2 to 7 (their sharpening of step 4 is left to Lanczos).
    """
    grey, back, mask = _on_background(image, crop=crop and image.size != (IMAGE_SIZE, IMAGE_SIZE))
    if mask is None:
        grey = grey.astype(np.float32)
        inverted = _is_light(grey) if invert == "auto" else invert == "always"
        return Cutout(view=fit(255 - grey if inverted else grey), box=None, inverted=inverted)

    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    box = np.s_[top:bottom, left:right]
    mask = mask[box]
    paper = np.divide(back[box], FINE, dtype=np.float32)
    darker = (paper - grey[box]) * mask
    inverted = bool(darker.sum() >= 0) if invert == "auto" else invert == "always"
    # The background becomes exactly black, and what is as dark (or light) as can be against it 255.
    light = darker * ((255 if inverted else -255) / np.maximum(paper if inverted else 255 - paper, 32))
    np.clip(light, 0, 255, out=light)
    some = np.s_[::CONTRAST_STEP, ::CONTRAST_STEP] if min(light.shape) > 8 * CONTRAST_STEP else np.s_[:, :]
    seen = np.quantile(light[some][mask[some]], [share for share, _ in CONTRAST])
    gain = max(1.0, *(level / max(value, 1.0) for value, (_, level) in zip(seen.tolist(), CONTRAST, strict=True)))
    light *= np.float32(gain)
    return Cutout(view=fit(np.minimum(light, 255, out=light)), box=(left, top, right, bottom), inverted=inverted)


def _on_background(image: Image.Image, *, crop: bool) -> tuple[NDArray[Any], Fine, Mask | None]:
    """Return the grey of a picture, 0 to 255, that of its background, and the object's mask, if any; all [H, W]."""
    grey: NDArray[Any] = np.asarray(image.convert("L"))
    if image.mode == "RGB":
        if crop and (found := find_object(image)) is not None:
            return grey, *found
        extrema: Any = image.getextrema() if not np.ptp(grey) else ((0, 1),)  # of each channel; it takes its time
        if all(low == high for low, high in extrema):
            raise ValueError("one plain colour: there is no object in it")
        return grey, np.zeros(grey.shape, dtype=np.int16), None
    alpha = np.asarray(image.getchannel("A"), dtype=np.float32) / np.float32(255)
    mask = alpha > 0.5
    if np.ptp(alpha * (np.float32(1) + grey)) < 1e-3:
        raise ValueError("one plain colour: there is no object in it")
    if not mask.any():
        raise ValueError("wholly transparent: there is no object in it")
    # A cut-out is shown on white, as in a shop; a white object would vanish there, so it is shown on black.
    paper = 0 if grey[mask].mean() > 200 else 255
    back = np.full(grey.shape, paper * FINE, dtype=np.int16)
    # Below half opacity is a drawn shadow, or the edge: the edge stays soft by a pixel.
    return alpha * grey + (1 - alpha) * paper, back, ndimage.binary_dilation(mask) if crop else None


def find_object(image: Image.Image) -> tuple[Fine, Mask] | None:
    """Separate the object from a plain background.

    Args:
        image: of mode RGB.

    Returns:
        The background's grey under every pixel, int16 [H, W], and the object's mask, bool [H, W]; None where the
        border is not of one colour (up to a gradient of light), or nothing, or nearly all, differs from it.
    """
    # An array per channel, and integers: a reduction over an axis of three floats takes twenty times as long.
    planes = [np.multiply(np.asarray(plane), FINE, dtype=np.int16) for plane in image.split()]
    slopes, spread = _background(planes)
    if 4 * spread > TOLERANCE:  # a camera's noise; where there is none the edge stays where it is, to the pixel
        planes = [ndimage.gaussian_filter(plane, 1) for plane in planes]
        slopes, spread = _background(planes)
    distance = np.zeros(planes[0].shape, dtype=np.int16)  # from the background, of the channel that differs most
    for plane, slope in zip(planes, slopes, strict=True):
        plane -= _surface(slope, plane.shape)
        np.maximum(distance, np.abs(plane, out=plane), out=distance)
    limit = round(int(FINE) * max(TOLERANCE, 4 * spread))
    if (_border(distance) < limit).mean() < 0.6:
        return None
    mask = _largest(_opened(distance > limit))
    if not 0.002 < np.count_nonzero(mask) / mask.size < 0.98:
        return None
    return _surface(LUMINANCE @ slopes, mask.shape), mask


def _border(plane: NDArray[Any]) -> NDArray[Any]:
    """Return the outermost pixels, flat: 3 % of the shorter side, all around."""
    width = max(1, round(0.03 * min(plane.shape)))
    middle = plane[width:-width]
    parts = (plane[:width], plane[-width:], middle[:, :width], middle[:, -width:])
    return np.concatenate([part.ravel() for part in parts])


@lru_cache(maxsize=16)  # a folder's pictures have few sizes
def _axis(side: int) -> Floats:
    return np.linspace(-1, 1, side, dtype=np.float32)


def _surface(slope: Floats, shape: tuple[int, ...]) -> Fine:
    """Return level + along * x + down * y for x and y in -1 to 1, 0 to 255 in steps of 1 / FINE: int16 [H, W]."""
    level, along, down = slope * FINE
    y, x = map(_axis, shape)
    rows, columns = (np.clip(part, -15000, 15000).astype(np.int16) for part in (level + down * y, along * x))
    surface = rows[:, None] + columns
    inside = rows.min() + columns.min() >= 0 and rows.max() + columns.max() <= 255 * FINE
    return surface if inside else np.clip(surface, 0, 255 * FINE, out=surface)


@lru_cache(maxsize=16)
def _border_points(shape: tuple[int, ...]) -> tuple[Floats, NDArray[np.int64]]:
    """Return 1, x and y of some pixels of the border, float32 [3, P], and their places in the flat picture."""
    border = _border(np.arange(shape[0] * shape[1]).reshape(shape))
    places = border[:: len(border) // BORDER_POINTS | 1]  # odd, so that they fall on all places of JPEG's 8 x 8 blocks
    y, x = np.mgrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j].astype(np.float32)
    return np.stack([part.ravel()[places] for part in (np.ones_like(x), x, y)]), places


def _background(planes: Sequence[Fine]) -> tuple[Floats, float]:
    """Fit each channel's background to the border; return [3 channels, 3], see `_surface`, and the spread around it."""
    points, places = _border_points(planes[0].shape)
    colours = np.stack([plane.ravel()[places] for plane in planes]).astype(np.float32) / np.float32(FINE)
    expected = np.median(colours, axis=1, keepdims=True)  # where the object touches the border, the rest decides
    slopes = np.zeros((3, 3), dtype=np.float32)
    for _ in range(4):
        residual = np.abs(colours - expected).max(axis=0)
        inside = residual <= max(TOLERANCE, 2.5 * float(np.median(residual)))
        known = points[:, inside]
        slopes = np.linalg.lstsq(known @ known.T, known @ colours[:, inside].T, rcond=None)[0].T
        expected = slopes @ points
    residual = np.abs(colours - expected).max(axis=0)
    return slopes, 1.4826 * float(np.median(residual))


def _opened(mask: Mask) -> Mask:
    """Remove what is thinner than three pixels: scipy's binary_opening by 3 x 3, in a twentieth of its time."""
    eroded = np.zeros_like(mask)
    tall = mask[:-2] & mask[1:-1] & mask[2:]
    eroded[1:-1, 1:-1] = tall[:, :-2] & tall[:, 1:-1] & tall[:, 2:]
    return _widened(eroded)


def _widened(mask: Mask) -> Mask:
    """Add the eight neighbours of every pixel: binary_dilation by 3 x 3."""
    tall = mask.copy()
    tall[1:] |= mask[:-1]
    tall[:-1] |= mask[1:]
    wide = tall.copy()
    wide[:, 1:] |= tall[:, :-1]
    wide[:, :-1] |= tall[:, 1:]
    return wide


def _largest(mask: Mask) -> Mask:
    """Keep the largest object; parts less than a few hundredths of the picture apart count as one.

    Args:
        mask: opened: in each 3 x 3 of it a third row and column can be looked at, and the others follow.
    """
    height, width = mask.shape
    rows, columns = np.arange(height) * GRID // height, np.arange(width) * GRID // width
    cells = (GRID * rows[::3, None] + columns[::3])[mask[::3, ::3]]
    counts = np.bincount(cells, minlength=GRID**2)
    touching = _widened(counts.reshape(GRID, GRID) > 0)
    labels, _ = ndimage.label(touching, np.ones((3, 3)))
    sizes = np.bincount(labels.ravel(), weights=counts)
    return mask & (labels == sizes.argmax())[:, columns][rows]  # a row at a time is what is copied most


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
