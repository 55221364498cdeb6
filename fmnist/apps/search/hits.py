"""Results of a search: rows for the CSV, and a sheet of pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fmnist.apps.search.catalogue import UNKNOWN, Catalogue
from fmnist.evaluation.misclassified import channels_last
from fmnist.report.figures import BLUE, GREEN, ORANGE, Axes, Figure, by_default_style, save_figure, shorten

COLUMN_NAMES = ("query", "rank", "item", "class", "predicted", "similarity", "error")  # of search.csv
COLUMNS = 10  # images in one line of the sheet; more follow below
CELL_INCHES, CAPTION_INCHES, HEAD_INCHES = 0.98, 0.46, 0.62
SURE_TO_FIT = 7  # letters of a caption, as wide as they come


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A query and its nearest items.

    Attributes:
        query: `split:number` or the file's name.
        image: uint8 [H, W] or [3, H, W], what the model was given.
        label: the query's class, or UNKNOWN.
        prediction: the predicted class.
        positions: int64 [k], items of the catalogue, nearest first.
        similarities: float32 [k], their cosines.
    """

    query: str
    image: Tensor
    label: int
    prediction: int
    positions: Tensor
    similarities: Tensor


def columns_of(catalogue: Catalogue) -> tuple[str, ...]:
    """Return the columns of search.csv: a file for each image only where the data set is a folder of pictures."""
    return (*COLUMN_NAMES, "file") if catalogue.files else COLUMN_NAMES


def hits_rows(hits: Sequence[Hit], catalogue: Catalogue, errors: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return one row per query and image found, then one per query that could not be read; see `columns_of`."""
    rows: list[tuple[Any, ...]] = []
    for hit in hits:
        for rank, (position, similarity) in enumerate(
            zip(hit.positions.tolist(), hit.similarities.tolist(), strict=True), 1
        ):
            label = int(catalogue.labels[position])
            known = "" if label == UNKNOWN else catalogue.class_names[label]
            predicted = catalogue.class_names[int(catalogue.predictions[position])]
            file = catalogue.files[position : position + 1]
            rows.append((hit.query, rank, catalogue.names[position], known, predicted, round(similarity, 6), "", *file))
    rows += [(query, *[""] * 5, error, *[""] * bool(catalogue.files)) for query, error in errors.items()]
    return [dict(zip(columns_of(catalogue), row, strict=True)) for row in rows]


@by_default_style
def plot_hits(hits: Sequence[Hit], catalogue: Catalogue, path: Path) -> None:
    """Draw each query, framed, then its nearest items with class and similarity.

    Args:
        hits: at least one, all with the same k.
        catalogue: the items' pictures.
        path: the PNG to write.
    """
    k = len(hits[0].positions)
    columns, lines = min(k, COLUMNS), -(-k // COLUMNS)
    width = (columns + 1.4) * CELL_INCHES
    height = HEAD_INCHES + len(hits) * lines * (CELL_INCHES + CAPTION_INCHES)
    figure = Figure(figsize=(max(width, 5.0), height))
    head = f"Nearest of {len(catalogue):,} images ({_short(catalogue.source, 40)}) by the features of {catalogue.run}"
    figure.text(0.01, 1 - 0.2 / height, head, va="top", fontsize=11, parse_math=False)

    def cell(line: int, left: float) -> Axes:
        # Inches from the top left, so that every picture has the same size whatever the count.
        top = HEAD_INCHES + line * (CELL_INCHES + CAPTION_INCHES)
        side = 0.9 * CELL_INCHES
        place = (left / figure.get_figwidth(), 1 - (top + side) / height)
        axes = figure.add_axes((*place, side / figure.get_figwidth(), side / height))
        axes.set(xticks=[], yticks=[])
        return axes

    for row, hit in enumerate(hits):
        known = hit.label != UNKNOWN
        axes = cell(row * lines, 0.2)
        caption, query = catalogue.class_names[hit.label if known else hit.prediction], _short(hit.query, 16)
        _draw(axes, hit.image, BLUE, 2.5, caption, query if known else f"as predicted\n{query}", "bold")
        for rank, (position, similarity) in enumerate(zip(hit.positions, hit.similarities, strict=True)):
            axes = cell(row * lines + rank // COLUMNS, (rank % COLUMNS + 1.4) * CELL_INCHES)
            label = int(catalogue.labels[position])
            name = _short(catalogue.names[position], 16) if label == UNKNOWN else catalogue.class_names[label]
            color = "#666666"
            if known and label != UNKNOWN:
                color = GREEN if label == hit.label else ORANGE
            _draw(axes, catalogue.images[position], color, 1.2, name, f"{similarity:.4f}", "normal")
    save_figure(path, figure)


def _draw(axes: Axes, image: Tensor, color: str, width: float, first: str, second: str, weight: str) -> None:
    axes.imshow(channels_last(image), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    for spine in axes.spines.values():
        spine.set(edgecolor=color, linewidth=width)
    text: dict[str, Any] = {
        "ha": "center",
        "va": "top",
        "transform": axes.transAxes,
        "parse_math": False,
        "color": "black",
    }
    name = axes.text(0.5, -0.06, shorten(first), fontsize=8, **(text | {"color": color, "weight": "bold"}))
    length, room = len(name.get_text()), 0.95 * CELL_INCHES * axes.figure.dpi  # a gap to the next
    while length > SURE_TO_FIT and name.get_window_extent().width > room:
        length -= 1
        name.set_text(shorten(first, length))
    axes.text(0.5, -0.22, second, fontsize=7.5, weight=weight, **text)


def _short(name: str, length: int) -> str:
    """The end of a long name, which tells files apart better than its start; nothing that breaks a line."""
    shown = "".join(character if character.isprintable() else "?" for character in name)
    return shown if len(shown) <= length else f"...{shown[3 - length :]}"
