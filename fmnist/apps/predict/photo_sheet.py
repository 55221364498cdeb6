"""A contact sheet: each photo beside what the model sees, with the prediction."""

import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from fmnist.report.overlay import overlay

SIDE, MARGIN, LINE = 112, 10, 16  # pixels; 112 is 4 times 28
ORANGE, GREY, BLACK, BLUE = "#B84A00", "#666666", "#111111", "#0072B2"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of the sheet.

    Attributes:
        image: the photo, RGB; None where there is none to show.
        box: left, top, right, bottom of the part that the model sees, in the photo's pixels.
        view: uint8 [H, W] or [3, H, W], what the model sees; None where there is none.
        drops: float32 [H, W], an occlusion map that is drawn as a third picture; None where there is none.
        lines: (text, colour), below the pictures.
    """

    image: Image.Image | None
    box: tuple[int, int, int, int] | None
    view: NDArray[np.uint8] | None
    lines: Sequence[tuple[str, str]]
    drops: Tensor | None = None


def draw_sheet(cells: Sequence[Cell], title: str, columns: int = 5) -> bytes:
    """Draw the cells in rows.

    Args:
        cells: at least one.
        title: heading.
        columns: cells in a row.

    Returns:
        A PNG.
    """
    # DejaVu Sans, which has most scripts that a file name is written in, lies in matplotlib's folder. Importing it and
    # what draws figures takes a second.
    spec = importlib.util.find_spec("matplotlib")
    assert spec is not None and spec.origin is not None  # it is required
    fonts = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"
    font = ImageFont.truetype(fonts / "DejaVuSans.ttf", 12)
    bold = ImageFont.truetype(fonts / "DejaVuSans-Bold.ttf", 15)
    columns = min(columns, len(cells))
    num_lines = max(len(cell.lines) for cell in cells)
    pictures = 3 if any(cell.drops is not None for cell in cells) else 2
    wide = pictures * (SIDE + 4) - 4
    width, height = wide + 2 * MARGIN, SIDE + num_lines * LINE + 2 * MARGIN
    head = 2 * MARGIN + 18
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (max(columns * width, 420 if pictures == 2 else 960), head + rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), _shorten(title, bold, sheet.width - 2 * MARGIN), BLACK, bold)
    for position, cell in enumerate(cells):
        left, top = position % columns * width + MARGIN, head + position // columns * height
        _draw_photo(sheet, draw, cell, left, top)
        for number, (text, colour) in enumerate(cell.lines):
            y = top + SIDE + 4 + number * LINE
            draw.text((left, y), _shorten(text, font, wide), colour, font)
    buffer, about = io.BytesIO(), PngInfo()
    about.add_text("Software", "fmnist")  # how the next sheet knows that it may replace this one
    sheet.save(buffer, "PNG", pnginfo=about)
    return buffer.getvalue()


def _draw_photo(sheet: Image.Image, draw: ImageDraw.ImageDraw, cell: Cell, left: int, top: int) -> None:
    frame = (left, top, left + SIDE - 1, top + SIDE - 1)
    draw.rectangle(frame, "#F0F0F0")
    if cell.image is not None:
        x, y = _paste(sheet, cell.image, left, top)
        if cell.box is not None:
            scale = SIDE / max(cell.image.size)
            a, b, c, d = (round(edge * scale) for edge in cell.box)
            draw.rectangle((x + a, y + b, max(x + c - 1, x + a), max(y + d - 1, y + b)), outline=BLUE)
    else:
        draw.line((left, top, left + SIDE - 1, top + SIDE - 1), "#C0C0C0")
        draw.line((left, top + SIDE - 1, left + SIDE - 1, top), "#C0C0C0")
    if cell.view is not None:
        _draw_view(sheet, cell.view, left + SIDE + 4, top)
    if cell.view is not None and cell.drops is not None:
        _draw_view(sheet, overlay(torch.from_numpy(cell.view), cell.drops).numpy(), left + 2 * (SIDE + 4), top)


def _draw_view(sheet: Image.Image, pixels: NDArray[np.uint8], left: int, top: int) -> None:
    _paste(sheet, Image.fromarray(pixels if pixels.ndim == 2 else pixels.transpose(1, 2, 0).copy()), left, top)


def _paste(sheet: Image.Image, picture: Image.Image, left: int, top: int) -> tuple[int, int]:
    """Fit a picture into its square, a small one with its pixels to be seen; return its left and top edge."""
    scale = SIDE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    fitted = picture.resize((width, height), Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)
    place = left + (SIDE - width) // 2, top + (SIDE - height) // 2
    sheet.paste(fitted.convert("RGB"), place)
    return place


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Cut a text to a width; a control character, which would break the line, shows as a question mark."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
