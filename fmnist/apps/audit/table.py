"""audit.csv: every image with its rank, and the decisions that people filled in."""

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fmnist.apps.audit.pool import Pool
from fmnist.data.corrections import Decision, read_decisions
from fmnist.evaluation.suspects import Suspects
from fmnist.runtime.files import csv_bytes

logger = logging.getLogger("fmnist")
CSV_NAME = "audit.csv"
HEADER = ("rank", "split", "index", "label", "suggested", "own_probability", "decision")


@dataclass(frozen=True, kw_only=True)
class Row:
    """An image in the ranking.

    Attributes:
        rank: from 1, the most suspect.
        position: in the pool.
        label: as given.
        suggested: the class to relabel it to: the likeliest other one, or what somebody chose.
        likely, confidence: the likeliest other class, and its probability.
        own: probability of the label.
        decision: keep, relabel, drop, or nothing.
    """

    rank: int
    position: int
    label: int
    suggested: int
    likely: int
    confidence: float
    own: float
    decision: str


def earlier_decisions(table: Path, corrections: Path | None, pool: Pool, *, force: bool = False) -> dict[int, Decision]:
    """Read what was decided before about the images of the pool.

    Args:
        table: the file that will be replaced: no decision in it may be lost.
        corrections: what the run was trained with; table overrides it. Either may be absent.
        pool: the images.
        force: leave out what cannot be kept.

    Returns:
        Decisions by position in the pool.

    Raises:
        ValueError: a file cannot be read, or table decides on an image that is not ranked; one line.
    """
    images = enumerate(zip(pool.splits, pool.indices, pool.known.tolist(), strict=True))
    places = {pool.key(split, index): position for position, (split, index, known) in images if known}
    found: dict[int, Decision] = {}
    for path in (corrections, table):
        if path is None or not os.path.lexists(path):
            continue
        try:
            for row in read_decisions(path, pool.class_names):
                position = places.get(pool.key(row.split, row.index))
                if row.decision and position is not None and int(pool.labels[position]) == row.label:
                    found[position] = row
                elif row.decision and path is table:
                    raise ValueError(
                        f"{path} line {row.line}: {row.split}:{row.index}, so labelled, is not ranked here"
                    )
        except ValueError as error:
            if not force:
                raise ValueError(f"{error}; decisions would be lost: mend it, move it, or --force") from None
            logger.warning("%s: left out", error)
    return found


def rank_rows(pool: Pool, suspects: Suspects, decided: dict[int, Decision]) -> list[Row]:
    """Return all images that were ranked, the most suspect first."""
    rows: list[Row] = []
    known = pool.known.tolist()
    own, confidence = suspects.own.tolist(), suspects.confidence.tolist()
    labels, suggested = pool.labels.tolist(), suspects.suggested.tolist()
    for position in suspects.order.tolist():
        if not known[position]:
            continue
        before = decided.get(position)
        other = suggested[position] if before is None or before.suggested is None else before.suggested
        rows.append(
            Row(
                rank=len(rows) + 1,
                position=position,
                label=labels[position],
                suggested=other,
                likely=suggested[position],
                confidence=confidence[position],
                own=own[position],
                decision="" if before is None else before.decision,
            )
        )
    return rows


def cells(row: Row, pool: Pool) -> tuple[object, ...]:
    """Return a row of audit.csv."""
    return (
        row.rank,
        pool.splits[row.position],
        pool.indices[row.position],
        pool.class_names[row.label],
        pool.class_names[row.suggested],
        f"{row.own:.6g}",
        row.decision,
    )


def table_bytes(rows: Iterable[Row], pool: Pool) -> bytes:
    """Return audit.csv."""
    return csv_bytes(HEADER, (cells(row, pool) for row in rows))
