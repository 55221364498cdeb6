"""What an augmented image should be, in float64 and plain numpy: the judge of every pipeline."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fmnist.data.fashion_mnist import MEAN

Chain = Literal["one warp", "warp, then resize", "resize, then warp"]
Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """One augmentation, given instead of drawn: the image is flipped, then rotated, then shifted.

    Attributes:
        flip: mirror left and right.
        angle: degrees, counter-clockwise as seen.
        shift_x, shift_y: whole source pixels, right and down.
        box: the erased rectangle (x0, y0, x1, y1) as fractions of the side; none erases nothing.
    """

    flip: bool = False
    angle: float = 0.0
    shift_x: int = 0
    shift_y: int = 0
    box: tuple[float, float, float, float] | None = None


# Each parameter alone and together, within what the race draws: +-10 degrees, +-2.8 pixels, boxes of 2 to 33 %.
CASES = (
    Fixed(),
    Fixed(flip=True),
    Fixed(angle=7.5),
    Fixed(shift_x=2, shift_y=-1),
    Fixed(flip=True, angle=-4.0, shift_x=-1, shift_y=2),
    Fixed(flip=True, angle=9.0, shift_x=1, shift_y=1, box=(0.25, 0.5, 0.75, 0.75)),
)


def box_pixels(fixed: Fixed, size: int) -> tuple[int, int, int, int]:
    """Return the erased rectangle (x0, y0, x1, y1) in whole output pixels, (0, 0, 0, 0) where there is none."""
    x0, y0, x1, y1 = (round(edge * size) for edge in fixed.box or (0, 0, 0, 0))
    return x0, y0, x1, y1


def enlarged(fixed: Fixed, factor: float) -> Fixed:
    """Return the same augmentation for an image resized by this factor."""
    return replace(fixed, shift_x=round(fixed.shift_x * factor), shift_y=round(fixed.shift_y * factor))


def expected(images: NDArray[np.uint8], fixed: Fixed, size: int, chain: Chain) -> tuple[Array, NDArray[np.bool_]]:
    """Augment images exactly, and say which pixels depend on nothing outside the source image.

    Outside the image conventions differ (zeros, edge pixels, a fade): those pixels are not for comparing.

    Args:
        images: uint8 [B, H, W], square.
        fixed: the augmentation.
        size: pixels per side of the result.
        chain: one warp straight to the result's pixels; or a warp at the source's size and a resize after it; or a
            resize first and a warp of its pixels, shifts rounded to whole ones.

    Returns:
        float64 [B, size, size] in [0, 1], and bool [size, size], True where every pixel read lies inside.
    """
    side = images.shape[1]
    scaled = images.astype(np.float64) / 255
    if chain == "one warp":
        result, inside = _bilinear(scaled, *_source_places(fixed, side, size))
    else:
        y, x = _centres(size, side)
        places = [
            place.clip(0, side - 1) for place in (x + (side - 1) / 2, y + (side - 1) / 2)
        ]  # a resize has no outside
        if chain == "warp, then resize":
            warped, inside_warped = _bilinear(scaled, *_source_places(fixed, side, side))
            result, _ = _bilinear(warped, *places)
            inside = _bilinear(inside_warped[None].astype(np.float64), *places)[0][0] > 1 - 1e-9
        else:
            resized, _ = _bilinear(scaled, *places)
            result, inside = _bilinear(resized, *_source_places(enlarged(fixed, size / side), size, size))
    x0, y0, x1, y1 = box_pixels(fixed, size)
    result[:, y0:y1, x0:x1] = MEAN
    inside[y0:y1, x0:x1] = True
    return result, inside


def _centres(size: int, side: int) -> tuple[Array, Array]:
    """Return y and x [size, size] of the output's pixel centres, in source pixels from the image's centre."""
    centre = (np.arange(size) + 0.5) * side / size - side / 2
    y, x = np.meshgrid(centre, centre, indexing="ij")
    return y, x


def _source_places(fixed: Fixed, side: int, size: int) -> tuple[Array, Array]:
    """Return x and y [size, size]: where each output pixel lies among the source's pixel indices."""
    y, x = _centres(size, side)
    x, y = x - fixed.shift_x, y - fixed.shift_y
    # y points down, so what is counter-clockwise as seen is undone by this turn.
    cos, sin = np.cos(np.radians(fixed.angle)), np.sin(np.radians(fixed.angle))
    x, y = cos * x - sin * y, sin * x + cos * y
    x = -x if fixed.flip else x
    return x + (side - 1) / 2, y + (side - 1) / 2


def _bilinear(images: Array, x: Array, y: Array) -> tuple[Array, NDArray[np.bool_]]:
    last = images.shape[1] - 1
    inside = (x >= -1e-9) & (x <= last + 1e-9) & (y >= -1e-9) & (y <= last + 1e-9)
    x, y = x.clip(0, last), y.clip(0, last)
    left, top = np.floor(x).astype(int).clip(max=last - 1), np.floor(y).astype(int).clip(max=last - 1)
    dx, dy = x - left, y - top
    upper = images[:, top, left] * (1 - dx) + images[:, top, left + 1] * dx
    lower = images[:, top + 1, left] * (1 - dx) + images[:, top + 1, left + 1] * dx
    return upper * (1 - dy) + lower * dy, inside
