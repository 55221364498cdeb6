"""What can be trusted of a run: coverage of its prediction sets, errors among its automatic answers: docs/trust.md.

    python evaluate.py runs/mlp && python evaluate.py runs/cnn
    python -m experiments.prediction_sets measure runs/mlp runs/cnn

`measure` takes the numbers of the test images from each run's evaluation/test/metrics.json, and counts how often three
rules for --max_error let more errors through than allowed: validation and test images are mixed and cut anew SPLITS
times into as many to choose on and as many to count on. `python -m experiments.tables table` makes the page's tables.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binom

from experiments.markdown import markdown_table
from fmnist.apps import trust
from fmnist.runtime.console import log_to_console, one_line_errors
from fmnist.runtime.files import read_json, write_atomic
from fmnist.runtime.provenance import measured_now
from fmnist.trained import open_trained

RESULT = Path(__file__).parent / "results" / "prediction_sets.json"
SPLITS = 200
MAX_ERRORS = (0.005, 0.01, 0.02, 0.05)
RULES = ("in use", "lowest that passes", "plain share")


def chosen(rule: str, confidence: torch.Tensor, correct: torch.Tensor, max_error: float) -> float | None:
    """Return the confidence that a rule chooses on some images; None where none will do."""
    if rule == "in use":
        return trust.confidence_threshold(confidence, correct, max_error)
    ranked, order = confidence.sort(descending=True)
    errors, counts = (~correct[order]).cumsum(0).numpy(), np.arange(1, len(order) + 1)
    share = errors / counts <= max_error
    passed = share if rule == "plain share" else binom.cdf(errors, counts, max_error) <= 0.1
    places = np.flatnonzero(passed)
    return float(ranked[places[-1]]) if len(places) else None


def other_sets(run: Path) -> dict[str, dict[str, float]]:
    """Return size and worst coverage of sets at 95 %: one threshold for all classes; the adaptive score, by class."""
    trained = open_trained(run, "cpu")
    known, others = (trained.split(name) for name in ("val", "test"))
    chances = [trained.probabilities(trained(split.images)[0]) for split in (known, others)]
    every = torch.cat([chances[0].gather(1, known.labels[:, None]), torch.zeros(len(known.labels), 1)], dim=1)
    one = trust.class_thresholds(every, torch.zeros_like(known.labels), 0.95)[0]
    # of all classes, from the likeliest down to this one, the probability that is left
    left = []
    for part in chances:
        ranked, order = part.sort(descending=True)
        left.append(torch.zeros_like(part).scatter(1, order, 1 - ranked.cumsum(1)))
    adaptive = trust.class_thresholds(left[0], known.labels, 0.95)
    found = {}
    for name, scores, thresholds in (("one threshold", chances[1], one), ("adaptive score", left[1], adaptive)):
        sets = (scores >= thresholds).scatter(1, chances[1].argmax(1, keepdim=True), value=True)
        hit = sets.gather(1, others.labels[:, None])[:, 0].double()
        worst = min(float(hit[others.labels == label].mean()) for label in others.labels.unique())
        found[name] = {"worst_coverage": worst, "mean_size": float(sets.sum(1).double().mean())}
    return found


def splits(run: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Return, by rule and allowed errors, in which share of the splits more were found, and the share automatic."""
    trained, parts = open_trained(run, "cpu"), []
    for name in ("val", "test"):
        split = trained.split(name)
        confidence, predictions = trained.probabilities(trained(split.images)[0]).max(1)
        parts.append((confidence, predictions == split.labels))
    num_val = len(parts[0][0])
    confidence, correct = (torch.cat(both) for both in zip(*parts, strict=True))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for rule in RULES:
        for max_error in MAX_ERRORS:
            generator, over, automatic = torch.Generator().manual_seed(0), 0, 0.0
            for _ in range(SPLITS):
                order = torch.randperm(len(confidence), generator=generator)
                known, others = order[:num_val], order[num_val:]
                limit = chosen(rule, confidence[known], correct[known], max_error)
                if limit is not None:
                    answered = confidence[others] >= limit
                    over += float((~correct[others][answered]).double().mean()) > max_error
                    automatic += float(answered.double().mean())
            counted = {"more_errors": over / SPLITS, "automatic": automatic / SPLITS}
            found.setdefault(rule, {})[str(max_error)] = counted
    return found


def measure(runs: list[Path]) -> dict[str, Any]:
    """Return what the result file holds."""
    of_runs = {}
    for run in runs:
        metrics = read_json(run / "evaluation" / "test" / "metrics.json")
        of_runs[run.name] = {"top1": metrics["top1"], **metrics["trust"], "other_sets_95": other_sets(run)}
        of_runs[run.name]["splits"] = splits(run)
    return {
        "name": "prediction_sets",
        "command": f"python -m experiments.prediction_sets measure {' '.join(f'runs/{run.name}' for run in runs)}",
        **measured_now(device="CPU"),
        "num_splits": SPLITS,
        "runs": of_runs,
    }


def sets_table() -> str:
    """Return the table of coverage and sizes of the sets."""
    rows = []
    for name, run in read_json(RESULT)["runs"].items():
        for row in run["sets"]:
            low, worst = row["per_class"][row["worst_class"]]["expected"][0], 100 * row["worst_coverage"]
            shares = f"{100 * row['asked']:g} %", f"{100 * row['coverage']:.1f} %"
            of_class = f"{row['worst_class']} {worst:.1f} %", f"{100 * low:.1f} % or more"
            rows.append((name, *shares, *of_class, f"{row['mean_size']:.2f}"))
    return markdown_table(("model", "asked", "reached", "worst class", "expected of it", "classes a set"), rows)


def classes_table() -> str:
    """Return the table of each class's coverage, in percent."""
    runs = read_json(RESULT)["runs"]
    heads = [f"{name}, {100 * row['asked']:g} %" for name, run in runs.items() for row in run["sets"]]
    sets = [row["per_class"] for run in runs.values() for row in run["sets"]]
    rows = [(name, *(f"{100 * row[name]['coverage']:.1f}" for row in sets)) for name in sets[0]]
    return markdown_table(("class", *heads), rows)


def automation_table() -> str:
    """Return the table of what is automatic, and how often each rule lets more errors through."""
    rows = []
    for name, run in read_json(RESULT)["runs"].items():
        for row in run["automation"]:
            cells = ["-", "none", "-"]
            if row["threshold"] is not None:
                low, high = (100 * bound for bound in row["interval"])
                errors = f"{100 * row['errors']:.2f} % ({low:.2f} to {high:.2f})"
                cells = [f"{row['threshold']:.4f}", f"{100 * row['automatic']:.1f} %", errors]
            cells += [f"{100 * run['splits'][rule][str(row['max_error'])]['more_errors']:.1f} %" for rule in RULES]
            rows.append((name, f"{100 * row['max_error']:g} %", *cells))
    of_answers = ("from confidence", "automatic", "errors (95 % interval)")
    return markdown_table(("model", "errors allowed", *of_answers, f"more than allowed: {RULES[0]}", *RULES[1:]), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("measure",))
    parser.add_argument("runs", type=Path, nargs="+")
    args = parser.parse_args()
    log_to_console()
    with one_line_errors("experiments/prediction_sets.py"):
        result = json.dumps(measure(args.runs), indent=2) + "\n"
        write_atomic(RESULT, result)
        print(result)


if __name__ == "__main__":
    main()
