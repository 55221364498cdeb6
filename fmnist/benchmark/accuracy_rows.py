"""What runs of train.py took to reach an accuracy, from the files that they leave; the mean over runs; the table."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fmnist.report.comparison import Columns, text_table
from fmnist.report.curves import evaluations, of_last_size, of_one_start
from fmnist.runtime.console import counted
from fmnist.runtime.files import read_json
from fmnist.runtime.provenance import measured_now

SECONDS = ("seconds", "processor_seconds", "seconds_from_step_0", "processor_seconds_from_step_0")
COLUMNS: Columns = {
    "seed": ("seed", str),
    "epoch": ("epoch", "{:.4g}".format),
    "val_top1": ("val top1", "{:.2%}".format),
    "test_top1": ("test top1", "{:.2%}".format),
    "seconds": ("seconds", "{:,.1f}".format),
    "processor_seconds": ("processor s", "{:,.1f}".format),
    "seconds_from_step_0": ("from step 0", "{:,.1f}".format),
    "processor_seconds_from_step_0": ("processor s", "{:,.1f}".format),
    "missed": ("missed", str),
}


def measured(directory: Path, target: float) -> dict[str, Any]:
    """Return what a finished run took to hold a target.

    Args:
        directory: of the run.
        target: top1, 0 to 1.

    Returns:
        `step`, `epoch` and `val_top1` of the first evaluation that holds it, `test_top1` of the run, and in seconds
        until that evaluation's end: wall and processor time since the process began, and since step 0; `missed` says
        why it does not count.

    Raises:
        ValueError: the run's files lack these numbers.
    """
    summary, metrics = read_json(directory / "summary.json"), directory / "metrics.jsonl"
    lines = of_last_size(evaluations(metrics))
    top1s = [line.get("top1") or 0.0 for line in lines]
    if not top1s:
        raise ValueError(f"{directory} evaluated no validation images: there are none to hold the target on")
    if not of_one_start(metrics):  # each start has a clock of its own
        raise ValueError(f"{directory} was trained in several starts, so its times are lost: give another --output")
    try:
        row: dict[str, Any] = {"test_top1": summary["test.top1"]}
        first = next((line for line, top1 in zip(lines, top1s, strict=True) if top1 >= target), None)
        if first is None:
            return row | {"missed": f"best validation top1 {100 * max(top1s):.2f} %"}
        row |= {"step": first["step"], "epoch": first["epoch"], "val_top1": first["top1"]}
        row |= {"seconds": first["elapsed_seconds"], "processor_seconds": first["processor_seconds"]}
        row["seconds_from_step_0"] = row["seconds"] - summary["startup_seconds"]
        row["processor_seconds_from_step_0"] = row["processor_seconds"] - summary["startup_processor_seconds"]
    except KeyError as error:
        raise ValueError(f"{directory} holds no {error.args[0]}, so it cannot be measured") from None
    if summary["test.top1"] < target:
        row["missed"] = f"test top1 {100 * summary['test.top1']:.2f} %"
    return row


def made_by(folder: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what made the runs: date, hardware, versions, commit.

    Raises:
        ValueError: a run of an earlier start was made by other code or on another device.
    """
    about, device = measured_now(), ""
    for seed in (row["seed"] for row in rows if "test_top1" in row):
        summary = read_json(folder / f"seed_{seed}" / "summary.json")
        device = device or summary["device"]
        for key, now in ("device", device), ("git_revision", about["git_revision"]), ("versions", about["versions"]):
            if summary[key] != now:
                was = f"{key} {summary[key]}, now {now}"
                raise ValueError(f"{folder / f'seed_{seed}'} is not comparable ({was}): give another --output")
    return about | {"hardware": about["hardware"] | {"device": device or "unknown"}}


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean and the standard deviation of each time over the runs that count, and who missed."""
    counting = [row for row in rows if "missed" not in row]
    times = {key: [row[key] for row in counting] for key in SECONDS}
    return {
        "reached": len(counting),
        "missed": {f"seed_{row['seed']}": row["missed"] for row in rows if "missed" in row},
        "mean": {key: statistics.fmean(values) for key, values in times.items() if values},
        "standard_deviation": {key: statistics.stdev(values) for key, values in times.items() if len(values) > 1},
    }


def report(rows: Sequence[Mapping[str, Any]], target: float) -> str:
    """Return the table of all runs, and in a line how many reached the target."""
    found = summarize(rows)
    bottom = [{"seed": "mean"} | found["mean"], {"seed": "std"} | found["standard_deviation"]]
    table = text_table([*rows, *(row for row in bottom if len(row) > 1)], COLUMNS, ["seed", "missed"])
    missed = f"; missed: {', '.join(found['missed'])}" if found["missed"] else ""
    reach = f"{found['reached']} of {counted(len(rows), 'run')} reached {100 * target:.2f} % on the validation images"
    return f"{table}\n{reach}, confirmed by the test images{missed}"
