"""metrics.jsonl: the names of its numbers, how it is read, and how it is cut back at a restart."""

import json
from pathlib import Path
from typing import Any

from fmnist.runtime.files import write_atomic

METRICS_FILE = "metrics.jsonl"
# Numbers that depend on the clock.
PERF_KEYS = (
    "images_per_second",
    "images_per_second_overall",
    "step_time_s",
    "mfu",
    "save_seconds",
    "share_outside_steps",
    "data_wait_ms",
    "elapsed_seconds",
    "processor_seconds",
    "startup_seconds",
    "startup_processor_seconds",
)


def metric_name(prefix: str, key: str) -> str:
    """Return the name a scalar has everywhere outside metrics.jsonl, e.g. train/loss or perf/step_time_s."""
    return f"perf/{key}" if key in PERF_KEYS else f"{prefix}/{key}"


def read_metrics(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Read metrics.jsonl: lines by prefix, in step order, one per step."""
    lines: dict[str, dict[int, dict[str, Any]]] = {}
    if not path.is_file():  # it could not be written: a figure without curves must not end a run
        return {}
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            step, prefix = int(line["step"]), str(line["prefix"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue  # a killed run leaves half a line, in the middle too once the run has gone on
        # A run that resumes from a checkpoint logs some steps twice: the later line is the one that counts.
        lines.setdefault(prefix, {})[step] = line
    return {prefix: [by_step[step] for step in sorted(by_step)] for prefix, by_step in lines.items()}


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`, which the run writes again, and a line cut short by a crash."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            if entry["step"] <= step and entry.get("prefix") != "test":  # the test images are evaluated again
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    write_atomic(path, "".join(kept))
