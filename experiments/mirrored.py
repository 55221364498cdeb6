"""What flips in training are worth: accuracy of runs on the validation images as they are, and mirrored.

python -m experiments.mirrored RUN... [--out FILE]

All shoes of Fashion-MNIST point the same way, those of a shop's pictures do not.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from experiments.markdown import markdown_table
from fmnist.runtime.files import write_json
from fmnist.runtime.provenance import measured_now
from fmnist.trained import Trained, open_trained

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "experiments" / "results" / "mirrored.json"
PART = 500  # images at once


@torch.no_grad()
def hits(run: Trained, *, mirrored: bool) -> torch.Tensor:
    """Return which validation images a run names rightly, bool [N]."""
    split = run.split("val")
    found = []
    for start in range(0, len(split), PART):
        images = run.augment.evaluation(split.between(start, start + PART), run.size)
        logits = run.model(images.flip(-1) if mirrored else images)
        found.append(logits.argmax(1) == split.labels[start : start + PART])
    return torch.cat(found)


def measure(directory: Path) -> dict[str, Any]:
    """Return a run's row: its options of flips, and top1 as they are, mirrored, and mirrored by class."""
    run = open_trained(directory, "cpu")
    plain, mirrored = (hits(run, mirrored=flag) for flag in (False, True))
    labels = run.split("val").labels
    classes = {name: mirrored[labels == label].float().mean().item() for label, name in enumerate(run.class_names)}
    row = {"run": directory.name, "model": run.cfg.model.name, "epochs": run.cfg.schedule.epochs}
    row |= {"augment.flip": run.cfg.augment.flip, "augment.flip_in_turn": run.cfg.augment.flip_in_turn}
    return row | {
        "val.top1": plain.float().mean().item(),
        "mirrored.top1": mirrored.float().mean().item(),
        "mirrored.top1_by_class": {name: round(value, 4) for name, value in classes.items()},
    }


def table() -> str:
    """Return the recorded rows as a Markdown table."""
    rows = []
    for row in json.loads(OUT.read_text())["rows"]:
        flips = "in turn, every second epoch" if row["augment.flip_in_turn"] else f"{100 * row['augment.flip']:g} %"
        values = row["val.top1"], row["mirrored.top1"], row["mirrored.top1_by_class"]["Ankle boot"]
        rows.append([row["model"], flips, *(f"{100 * value:.2f}" for value in values)])
    head = ("model", "flips in training", "val top1, %", "mirrored, %", "mirrored ankle boots, %")
    return markdown_table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    command = f"python -m experiments.mirrored {' '.join(run.name for run in args.runs)}"
    result = {"name": "mirrored", "command": command, **measured_now(device="CPU")}
    result |= {"rows": [measure(run) for run in args.runs]}
    write_json(args.out, result)
    print(table() if args.out == OUT else json.dumps(result["rows"], indent=2))


if __name__ == "__main__":
    main()
