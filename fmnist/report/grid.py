"""A grid of images under their titles, as one PNG."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from fmnist.report.figures import Figure, by_default_style, save_figure, shorten


@by_default_style
def draw_grid(path: Path, images: Tensor, titles: Sequence[str], heading: str, *, columns: int | None = None) -> None:
    """Write images [N, S, S, 3] in [0, 1] as rows of a grid, each under its title; square unless `columns` is given."""
    count, size = len(images), images.shape[1]
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    strip = max(1, size // 3)  # white, above each image, for its title
    cells = torch.cat((images, images.new_ones(rows * columns - count, size, size, 3)))
    cells = F.pad(cells, (0, 0, 0, 1, strip, 0), value=1.0)
    canvas = rearrange(cells, "(row column) height width channel -> (row height) (column width) channel", row=rows)
    pitch = size + strip
    figure = Figure(figsize=(max(4.0, 0.9 * columns), max(1.6, 0.9 * rows * pitch / size) + 0.4), layout="constrained")
    axes = figure.add_subplot()
    for i, text in enumerate(titles):
        row, column = divmod(i, columns)
        place = column * (size + 1), row * pitch + strip - 1
        text = "\n".join(shorten(line, 18) for line in text.split("\n"))
        axes.text(*place, text, fontsize=6, va="bottom", linespacing=0.9, parse_math=False)
    axes.imshow(canvas.numpy(), interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(heading, fontsize=8, parse_math=False)
    save_figure(path, figure)
