"""The confusion matrix of report.html: cells with their colours, and the images that each opens."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from scipy.sparse import csr_array

from fmnist.evaluation.cells import MatrixCell, matrix_cells
from fmnist.evaluation.misclassified import Confusion
from fmnist.evaluation.outcome import Outcome
from fmnist.report.figures import shorten, shown_classes
from fmnist.report.page_figures import sheet

MOST_WHOLE = 100  # classes of a matrix shown whole; of more, those with the most errors
# Images of a cell, their largest side in pixels, and whether small ones are kept without loss: the first that fits.
CHOICES = (
    *((60, 64, True), (60, 64, False), (30, 64, False), (15, 48, False), (8, 48, False)),
    *((4, 32, False), (2, 32, False), (1, 24, False), (1, 16, True)),
)
SHEET_BYTES = 10_000_000  # of all sheets together, in base64: the page stays below 15 MB


def matrix_rows(confusion: Confusion, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Return rows of cells with their colours: blue for right, orange for wrong, by the square root of the share.

    Of more than MOST_WHOLE classes those that `shown_classes` gives, and a last cell for all others.
    """
    whole = len(class_names) <= MOST_WHOLE
    rows, shown = [], list(range(len(class_names))) if whole else shown_classes(confusion)
    for i, counts in zip(shown, csr_array(confusion)[shown].toarray().tolist(), strict=True):
        total = max(1, sum(counts))
        places = [(j, counts[j]) for j in shown]
        places += [] if whole else [(-1, sum(counts) - sum(counts[j] for j in shown))]
        cells = []
        for j, count in places:
            share = count / total
            # Half of a class is as dark as it gets for errors: a tenth should be seen at once.
            strength = share if i == j else min(1.0, math.sqrt(2 * share))
            color = "0, 91, 150" if i == j else "213, 94, 0"
            cells.append(
                {
                    "label": i,
                    "prediction": j,
                    "count": count,
                    "style": f"background: rgba({color}, {0.9 * strength:.3f})" if count else "",
                    "light": strength > 0.6,
                    "right": i == j,
                }
            )
        rows.append(
            {
                "name": class_names[i],
                "short": shorten(class_names[i], 14),
                "cells": cells,
                "recall": counts[i] / total if sum(counts) else None,
            }
        )
    return rows


def cell_images(outcome: Outcome, wanted: Iterable[tuple[int, int]]) -> dict[str, Any]:
    """Return what the page's script shows of each cell, as JSON takes it.

    Args:
        outcome: of an evaluation.
        wanted: label and prediction of the cells that can be opened; those without images are left out.

    Returns:
        `width`, `height` of a picture in pixels, and `cells`: by "label,prediction" their `count`, whether they are
        `right`, and of the worst of them `names`, `confidences` in percent, and one `sheet` with one below another.
    """
    found = matrix_cells(outcome)
    cells = {place: found[place] for place in dict.fromkeys(wanted) if place in found}
    some = outcome.images[:: max(1, len(outcome.images) // 64)]
    for most, side, lossless in CHOICES:
        number = sum(min(most, len(cell.positions)) for cell in cells.values())
        expected = number * len(sheet(some, side, lossless)[0]) / len(some)
        if expected > 1.2 * SHEET_BYTES and (most, side, lossless) != CHOICES[-1]:
            continue  # far too much: it need not be drawn
        shown = {place: sheet(outcome.images[cell.positions[:most]], side, lossless) for place, cell in cells.items()}
        if sum(len(uri) for uri, _ in shown.values()) <= SHEET_BYTES:
            break
    width, height = next(iter(shown.values()))[1] if shown else (1, 1)
    return {
        "width": width,
        "height": height,
        "cells": {
            f"{place[0]},{place[1]}": _described(outcome, place, cell, most) | {"sheet": shown[place][0]}
            for place, cell in cells.items()
        },
    }


def _described(outcome: Outcome, place: tuple[int, int], cell: MatrixCell, most: int) -> dict[str, Any]:
    indices, positions = outcome.indices, cell.positions[:most]
    return {
        "count": len(cell.positions),
        "right": place[0] == place[1],
        "names": [outcome.files[at] if outcome.files else indices[at] for at in positions],
        "confidences": [round(100 * confidence, 1) for confidence in cell.confidences[:most]],
    }
