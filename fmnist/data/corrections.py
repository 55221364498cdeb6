"""Decisions about labels, as `fmnist audit` writes them and people fill them in: read, checked, applied."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from fmnist.runtime.files import csv_cell, read_csv

COLUMNS = ("split", "index", "label", "suggested", "decision")
DECISIONS = ("keep", "relabel", "drop")
SPLITS = ("train", "val", "test")
DROPPED = -1
Labelled = tuple[Tensor, Tensor]  # labels int64 [N], and their positions in the data set's own file, int64 [N]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A row of the file.

    Attributes:
        line: where it stands.
        split, index: the image, by its position in the data set's own file.
        label: as the data set gives it.
        suggested: the class to relabel it to; None where there is none.
        decision: keep, relabel, drop, or nothing.
    """

    line: int
    split: str
    index: int
    label: int
    suggested: int | None
    decision: str

    @property
    def outcome(self) -> int:
        """The label after the decision, or DROPPED."""
        if self.decision == "relabel" and self.suggested is not None:
            return self.suggested
        return DROPPED if self.decision == "drop" else self.label


@dataclass(frozen=True)
class Corrections:
    """Labels that decisions changed.

    Attributes:
        changed: by split, position and new label, or DROPPED.
    """

    changed: Mapping[str, Mapping[int, int]]

    @property
    def sha256(self) -> str:
        """What tells them from others: neither the file's order nor rows that change nothing."""
        rows = sorted((name, *row) for name, rows in self.changed.items() for row in rows.items())
        return sha256(json.dumps(rows).encode()).hexdigest()

    def apply(self, name: str, labels: Tensor, published: Tensor) -> Tensor | None:
        """Return a split's labels after the decisions, DROPPED where an image goes; None where all stay as they are.

        Args:
            name: train, val or test.
            labels: int64 [N], as given.
            published: int64 [N], their positions in the data set's own file.
        """
        changed = self.changed.get(name, {})
        if not changed:
            return None
        positions = torch.tensor(sorted(changed))
        new = torch.tensor([changed[position] for position in positions.tolist()])
        place = torch.searchsorted(positions, published).clamp(max=len(positions) - 1)
        return torch.where(positions[place] == published, new[place], labels)


def read_decisions(path: Path, class_names: Sequence[str]) -> list[Decision]:
    """Read a file of decisions; a row without one is checked too.

    Args:
        path: a CSV with at least COLUMNS, in any order.
        class_names: what label and suggested may name.

    Raises:
        ValueError: it cannot be read, or a row is not valid; one line with the row's.
    """
    numbers = {name: number for number, name in enumerate(class_names)}
    numbers |= {csv_cell(name): number for name, number in numbers.items()}
    found = []
    for line, row in read_csv(path, COLUMNS):
        cell = {name: row[name].strip() for name in COLUMNS}
        cell |= {name: cell[name].lower() for name in ("split", "decision")}
        cell |= {name: row[name] for name in ("label", "suggested") if row[name] in numbers}  # spaces may be its own
        where = f"{path} line {line}"
        if cell["split"] not in SPLITS:
            raise ValueError(f"{where}: split is {row['split']!r:.60}; valid: {', '.join(SPLITS)}")
        if not (cell["index"].isascii() and cell["index"].isdecimal() and len(cell["index"]) < 19):
            raise ValueError(f"{where}: index is {row['index']!r:.60}; valid: a position in the data set's own file")
        if cell["decision"] not in ("", *DECISIONS):
            raise ValueError(f"{where}: decision is {row['decision']!r:.60}; valid: {', '.join(DECISIONS)}, or empty")
        for name in ("label", "suggested"):
            if cell[name] not in numbers and (name == "label" or cell[name]):
                valid = ", ".join(class_names[:20]) + (", ..." if len(class_names) > 20 else "")
                raise ValueError(f"{where}: {name} is {row[name]!r:.60}; valid: {valid}")
        label, suggested = numbers[cell["label"]], numbers.get(cell["suggested"])
        if cell["decision"] == "relabel" and suggested in (None, label):
            what = "is the label itself" if suggested is not None else "is empty"
            raise ValueError(f"{where}: decision is relabel, but suggested {what}; valid: another class")
        found.append(
            Decision(
                line=line,
                split=cell["split"],
                index=int(cell["index"]),
                label=label,
                suggested=suggested,
                decision=cell["decision"],
            )
        )
    return found


def read_corrections(
    file: str, class_names: Sequence[str], parts: Mapping[str, Labelled], *, own_val: bool, val_aside: bool = False
) -> Corrections:
    """Read a file of decisions, and compare it with the data set that it is about.

    Args:
        file: its path.
        class_names: in label order.
        parts: the data set's splits, train, val and test.
        own_val: positions of validation images are not positions among the training images: else a row may say train
            or val, since another `data.val_size` divides them otherwise.
        val_aside: the data set's own validation images are in none of the parts: a fold of the training images is val.

    Raises:
        ValueError: the file cannot be read, a row is not valid or of other data, two rows contradict each other, or a
            class is left without a training image; one line.
    """
    path = Path(os.path.expanduser(file))
    places = {
        name: dict(zip(published.tolist(), labels.tolist(), strict=True)) for name, (labels, published) in parts.items()
    }
    changed: dict[str, dict[int, int]] = {name: {} for name in parts}
    decided: dict[tuple[str, int], Decision] = {}
    for row in read_decisions(path, class_names):
        either: tuple[str, ...] = ("train", "val") if row.split != "test" and not own_val else (row.split,)
        if row.split == "val" and val_aside:
            either = ()
        name = next((name for name in either if row.index in places[name]), None)
        if name is None:
            raise ValueError(f"{path} line {row.line}: there is no image {row.index} in {row.split}")
        given = places[name][row.index]
        if given != row.label:
            raise ValueError(
                f"{path} line {row.line}: label is {class_names[row.label]!r}, but image {row.index} of {row.split} is "
                f"{class_names[given]!r} here: the file is of another data set"
            )
        if not row.decision:
            continue
        before = decided.setdefault((name, row.index), row)
        if before.outcome != row.outcome:
            raise ValueError(f"{path} line {row.line}: image {row.index} is decided otherwise in line {before.line}")
        if row.outcome != given:
            changed[name][row.index] = row.outcome
    found = Corrections(changed)
    labels, published = parts["train"]
    after = found.apply("train", labels, published)
    if after is not None:
        counts = torch.bincount(after[after >= 0], minlength=len(class_names))
        lost = (counts == 0) & (torch.bincount(labels, minlength=len(class_names)) > 0)
        if lost.any():
            raise ValueError(f"{path} leaves no training image of class {class_names[int(lost.nonzero()[0])]!r}")
    return found
