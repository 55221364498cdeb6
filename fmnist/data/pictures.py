"""A picture file as Fashion-MNIST would show it: grey, light on black, 28 px."""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
MAX_PIXELS = 64_000_000  # a decoded picture beyond this is refused before it is decoded
SIDE, OBJECT_SIDE = 28, 26  # Fashion-MNIST leaves a pixel or more of black around the object


def list_pictures(folder: Path) -> list[Path]:
    """Return the picture files in a folder and those below it, in the order of their names.

    Raises:
        ValueError: no such folder, or no file with a picture's suffix in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise ValueError(f"{folder} holds no picture ({', '.join(SUFFIXES)})")
    return found


def prepare_photo(path: Path) -> Tensor:
    """Read a picture, turn it upright, make it light on black, and fit the object into 28 x 28.

    Args:
        path: a file that Pillow reads; a picture that is 28 x 28 and dark at its border is taken as it is.

    Returns:
        uint8 [28, 28] on the CPU.

    Raises:
        ValueError: one line, for a file that is missing, damaged, or of more than MAX_PIXELS.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures; the limit here is our own
            with Image.open(path) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise ValueError(f"{opened.width} x {opened.height} pixels are more than {MAX_PIXELS:,}")
                upright = ImageOps.exif_transpose(opened).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a picture that can be read: {reason}") from None
    white = Image.new("RGBA", upright.size, "white")  # a cut-out without a background lies on white
    pixels = np.asarray(Image.alpha_composite(white, upright).convert("L"))
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    if np.median(border) > 127:
        pixels = 255 - pixels
    if pixels.shape != (SIDE, SIDE):
        pixels = _fit(pixels)
    return torch.from_numpy(pixels.copy())


def _fit(pixels: np.ndarray) -> np.ndarray:
    """Crop what is lighter than the background, scale its longer side to OBJECT_SIDE, and centre it."""
    seen = pixels > 40
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    if len(rows):
        pixels = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = OBJECT_SIDE / max(pixels.shape)
    width, height = (max(1, round(scale * side)) for side in (pixels.shape[1], pixels.shape[0]))
    small = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
    result = Image.new("L", (SIDE, SIDE))
    result.paste(small, ((SIDE - width) // 2, (SIDE - height) // 2))
    return np.asarray(result)
