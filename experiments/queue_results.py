"""The result of a queue's run, with its validation curve, and the table of all."""

import datetime
import json
import os
import statistics
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from experiments.queue_entries import Entry, resolved, result_path
from fmnist.runtime.files import read_json
from fmnist.runtime.provenance import processor

FROM_SUMMARY = ("model", "parameters", "epochs", "steps", "val.top1", "images_per_second", "train_seconds")
FROM_TEST = ("test.top1", "test.loss", "test.num_images")
USAGE = "usage.jsonl"  # what each start of a run took


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a .jsonl file; none where it is missing, and not a line that is still being written."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def curve(directory: Path) -> list[dict[str, float]]:
    """Return epoch, top1, loss and seconds of training at each validation of a run, finished or not.

    The seconds are those of the steps alone: each logged line has the mean of those since the line before.
    """
    lines = read_lines(directory / "metrics.jsonl")
    times = {line["step"]: line["step_time_s"] for line in lines if line.get("step_time_s") is not None}
    ends = sorted(times)
    passed = np.cumsum(np.diff([0, *ends]) * [times[end] for end in ends])
    points = []
    validations = {line["step"]: line for line in lines if line["prefix"] == "val"}  # of a step logged twice the later
    for _, line in sorted(validations.items()):
        points.append({key: line[key] for key in ("epoch", "top1", "loss")})
        if ends:
            beyond = max(0, line["step"] - ends[-1]) * times[ends[-1]]
            points[-1]["seconds"] = round(float(np.interp(line["step"], [0, *ends], [0, *passed])) + beyond, 2)
    return points


def result_of(entry: Entry, seed: int, directory: Path) -> dict[str, Any]:
    """Return the result of a finished run, or of a trial that was stopped."""
    summary = read_json(directory / "summary.json")
    events = read_lines(directory / USAGE)
    ends = [event for event in events if event["event"] == "end"]
    whole = 2 * len(ends) == len(events)  # else a start was killed with the queue, and what it took is not known
    result: dict[str, Any] = {
        "name": entry.name,
        "seed": seed,
        "search": entry.search,
        "note": entry.note,
        "command": " ".join(["python", "train.py", *entry.arguments(seed, directory)]),
        "options": resolved(entry, seed),
        "date": datetime.date.today().isoformat(),
        "hardware": {"device": summary["device"], "processor": processor(), "cpu_cores": os.cpu_count()},
        "versions": summary["versions"],
        "git_revision": summary["git_revision"],
        **{key: summary[key] for key in FROM_SUMMARY},
        "val": curve(directory),
        "starts": len(events) - len(ends),
        "wall_seconds": round(sum(end["wall"] for end in ends), 1) if whole else None,
        "cpu_seconds": round(sum(end["cpu"] for end in ends), 1) if whole else None,
    }
    if summary["status"] != "finished":
        result["stopped_at_epoch"] = result["val"][-1]["epoch"]
    elif not entry.search:
        test = read_json(directory / "evaluation" / "test" / "metrics.json")
        result |= {key: summary[key] for key in FROM_TEST} | {"test.top1_interval": test["top1_interval"]}
        result |= {f"test.{key}": test[key] for key in ("macro_f1", "balanced_accuracy")}
        result["test.macro_f1_interval"] = macro_f1_interval(test["confusion_matrix"])
    return result


def macro_f1_interval(confusion: list[list[int]], resamples: int = 10_000) -> list[float]:
    """Return the 2.5 and 97.5 % points of macro F1 over resampled test images, of their confusion matrix."""
    counts = np.array(confusion)
    drawn = np.random.default_rng(0).multinomial(counts.sum(), counts.ravel() / counts.sum(), size=resamples)
    drawn = drawn.reshape(resamples, *counts.shape)
    hits, rows, columns = np.einsum("nii->ni", drawn), drawn.sum(2), drawn.sum(1)
    present = rows > 0  # a class without an image in the sample counts as in the metric itself: not at all
    f1 = np.where(present, 2 * hits / np.maximum(rows + columns, 1), 0).sum(1) / present.sum(1)
    return [float(point) for point in np.percentile(f1, [2.5, 97.5])]


def read_results(entry: Entry, results: Path) -> list[dict[str, Any]]:
    """Return the results of an entry that are there, by seed in its order."""
    paths = [result_path(results, entry.name, seed) for seed in entry.seeds]
    return [read_json(path) for path in paths if path.is_file()]


def spread(values: list[float], digits: int = 2, scale: float = 1.0) -> str:
    """Return the mean of some values, with their standard deviation where they are several; - of none."""
    scaled = [scale * value for value in values]
    deviation = f" ± {statistics.stdev(scaled):.{digits}f}" if len(scaled) > 1 else ""
    return f"{statistics.mean(scaled):,.{digits}f}{deviation}" if scaled else "-"


def numbers(found: list[dict[str, Any]], key: str) -> list[float]:
    """Return one number of each result that has it."""
    return [result[key] for result in found if result.get(key) is not None]


def table(entries: list[Entry], results: Path) -> str:
    """Return one row per entry: seeds done, mean and standard deviation of accuracy and processor seconds, days."""
    rows = [
        "| entry | seeds | val top1, % | test top1, % | processor s | day | note |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        found = read_results(entry, results)
        cells = [spread(numbers(found, f"{split}.top1"), scale=100) for split in ("val", "test")]
        cells.append(spread(numbers(found, "cpu_seconds"), digits=0))
        cells.append(" to ".join(sorted({min(days), max(days)})) if (days := [each["date"] for each in found]) else "-")
        stopped = [f"stopped at epoch {epoch:g}" for epoch in numbers(found, "stopped_at_epoch")]
        note = "; ".join(part for part in (entry.note, *stopped) if part)
        rows.append(f"| {entry.name} | {len(found)}/{len(entry.seeds)} | {' | '.join(cells)} | {note} |")
    return "\n".join(rows)


def plan(left: list[tuple[Entry, int]], cores: int) -> str:
    """Return the runs that are left by group, with the estimated processor minutes, and the hours of all."""
    groups: dict[str, list[float]] = {}
    for entry, _ in left:
        groups.setdefault(entry.group, []).append(entry.minutes)
    total = sum(map(sum, groups.values()))
    rows = ["| group | runs left | processor minutes |", "|---|---|---|"]
    rows += [f"| {name} | {len(minutes)} | {sum(minutes):.0f} |" for name, minutes in groups.items()]
    rows += [f"| all | {len(left)} | {total:.0f} |", f"{total / 60 / cores:.1f} hours on {cores} cores, undisturbed"]
    return "\n".join(rows)
