"""Run every experiment of queue.yaml that has no result yet, in order, one at a time.

python -m experiments.queue [--only NAME ...]     run; stopped or killed, the same command goes on where it was
python -m experiments.queue --table               print what is finished: mean and standard deviation over seeds

NAME is an entry, or one seed of it (cnn_seed0). An entry of queue.yaml:

- name: cnn_wide             # results/queue/cnn_wide_seed0.json, runs/queue/cnn_wide_seed0/
  config: configs/cnn.yaml   # the recipe ...
  flags: {optim.lr: 0.008}   # ... and options that beat it
  seeds: [0, 1, 2]
  search: true               # chosen on validation: the test images are not evaluated, and the result has none
  note: why                  # optional

An entry keeps its meaning: once a result is there, an entry of that name with other options is an error.
"""

import argparse
import ctypes
import datetime
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fmnist.config import strict_yaml
from fmnist.config.parse import parse_config
from fmnist.config.same_run import recipe
from fmnist.config.schema import Config, flatten
from fmnist.runtime.files import read_json, write_atomic
from fmnist.runtime.provenance import processor

ROOT = Path(__file__).resolve().parent.parent
FROM_SUMMARY = ("model", "parameters", "epochs", "steps", "val.top1", "images_per_second", "train_seconds")
FROM_TEST = ("test.top1", "test.loss", "test.num_images")
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One recipe of the queue and its seeds."""

    name: str
    config: str
    seeds: list[int] = field(default_factory=lambda: [0])
    flags: dict[str, Any] = field(default_factory=dict)
    search: bool = False
    note: str = ""

    def arguments(self, seed: int, directory: Path) -> list[str]:
        """Return what train.py is called with."""
        flags = {**self.flags, **({"evaluation.test": False} if self.search else {}), "seed": seed}
        given = [part for key, value in flags.items() for part in (f"--{key}", json.dumps(value).strip('"'))]
        return ["--config", self.config, *given, "--output_dir", str(directory)]


def read_queue(path: Path) -> list[Entry]:
    """Read the entries.

    Raises:
        ValueError: a key that there is not, or a name given twice.
    """
    content = strict_yaml.load_file(path)
    if not isinstance(content, list):
        raise ValueError(f"{path}: expected a list of entries, - name: ...")
    try:
        entries = [Entry(**item) for item in content]
    except TypeError as error:
        raise ValueError(f"{path}: {str(error).removeprefix('Entry.__init__() ')}") from None
    names = [entry.name for entry in entries]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path}: {', '.join(sorted(twice))} is there twice")
    return entries


def resolved(entry: Entry, seed: int) -> dict[str, Any]:
    """Return the options that decide a run's result and differ from the defaults, as JSON reads them back."""
    cfg = parse_config(entry.arguments(seed, Path("runs")), prog=entry.name, to_run=False)
    options, defaults = recipe(cfg), flatten(Config())
    return json.loads(json.dumps({key: value for key, value in options.items() if value != defaults[key]}))


def has_result(entry: Entry, seed: int, path: Path) -> bool:
    """Say whether the result is there.

    Raises:
        ValueError: it is one of other options.
    """
    if not path.is_file():
        return False
    before, now = read_json(path)["options"], resolved(entry, seed)
    if changed := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
        raise ValueError(f"{path.name} is of another {', '.join(changed)}: give the entry another name, or delete it")
    return True


def run(entry: Entry, seed: int, directory: Path) -> bool:
    """Train until the run is finished, or say that it is not; note what each start of it took.

    The trainer goes on from its own newest checkpoint. It gets SIGTERM when this process dies, and saves one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "train.py", *entry.arguments(seed, directory)]
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    die_with_me = (lambda: libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))) if libc else None
    usage, began = directory / "usage.jsonl", time.monotonic()
    _append(usage, {"event": "start", "date": datetime.datetime.now().isoformat(timespec="seconds")})
    process = subprocess.Popen(command, cwd=ROOT, preexec_fn=die_with_me)
    try:
        _, status, used = os.wait4(process.pid, 0)
    except BaseException:  # Ctrl-C reaches the trainer too: let it save
        process.terminate()
        process.wait()
        raise
    _append(usage, {"event": "end", "wall": time.monotonic() - began, "cpu": used.ru_utime + used.ru_stime})
    return status == 0 and read_json(directory / "summary.json").get("status") == "finished"


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def result_of(entry: Entry, seed: int, directory: Path) -> dict[str, Any]:
    """Return the result of a finished run."""
    summary = read_json(directory / "summary.json")
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    events = [json.loads(line) for line in (directory / "usage.jsonl").read_text().splitlines()]
    ends = [event for event in events if event["event"] == "end"]
    whole = 2 * len(ends) == len(events)  # else a start was killed with this process, and what it took is not known
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
        "val": [{key: line[key] for key in ("epoch", "top1", "loss")} for line in lines if line["prefix"] == "val"],
        "starts": len(events) - len(ends),
        "wall_seconds": round(sum(end["wall"] for end in ends), 1) if whole else None,
        "cpu_seconds": round(sum(end["cpu"] for end in ends), 1) if whole else None,
    }
    if not entry.search:
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


def table(entries: list[Entry], results: Path) -> str:
    """Return one row per entry: seeds done, mean and standard deviation of accuracy, mean processor seconds."""

    def cell(found: list[dict[str, Any]], key: str, scale: float, digits: int) -> str:
        values = [scale * result[key] for result in found if result.get(key) is not None]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}" if values else "-"

    rows = ["| entry | seeds | val top1, % | test top1, % | processor s | note |", "|---|---|---|---|---|---|"]
    for entry in entries:
        paths = [results / f"{entry.name}_seed{seed}.json" for seed in entry.seeds]
        found = [read_json(path) for path in paths if path.is_file()]
        cells = [cell(found, "val.top1", 100, 2), cell(found, "test.top1", 100, 2), cell(found, "cpu_seconds", 1, 0)]
        rows.append(f"| {entry.name} | {len(found)}/{len(paths)} | {' | '.join(cells)} | {entry.note} |")
    return "\n".join(rows)


def work(entries: list[Entry], results: Path, runs: Path, only: list[str] | None = None) -> int:
    """Run what has no result, and return how many runs failed; one that fails does not keep the next from running."""
    failed = 0
    results.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        for seed in entry.seeds:
            name = f"{entry.name}_seed{seed}"
            if only is not None and not {entry.name, name} & set(only):
                continue
            if has_result(entry, seed, results / f"{name}.json"):
                continue
            print(f"--- {name}", flush=True)
            if not run(entry, seed, runs / name):
                print(f"--- {name} did not finish", flush=True)
                failed += 1
                continue
            result = result_of(entry, seed, runs / name)
            write_atomic(results / f"{name}.json", json.dumps(result, indent=2) + "\n")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these entries, or seeds of them, alone")
    for option, default in (
        ("queue", "experiments/queue.yaml"),
        ("results", "experiments/results/queue"),
        ("runs", "runs/queue"),
    ):
        parser.add_argument(f"--{option}", type=Path, default=Path(default), help=f"default: {default}")
    parser.add_argument("--table", action="store_true", help="print the results, run nothing")
    args = parser.parse_args()
    os.chdir(ROOT)
    try:
        entries = read_queue(args.queue)
        if args.table:
            print(table(entries, args.results))
        elif failed := work(entries, args.results, args.runs, args.only):
            sys.exit(f"{failed} run(s) did not finish; the same command tries them again")
    except ValueError as error:
        sys.exit(f"experiments.queue: {error}")


if __name__ == "__main__":
    main()
