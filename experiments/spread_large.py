"""Train on many images that are spread over two CPU processes: the start, the memory of each, a step and its wait.

    python -m experiments.spread_large FOLDER --images 600000    # writes results/spread_large.json

The images are colour, 64 px: a pattern of their class under noise, the same ones each time, written by rows into one
.npz file that is not compressed; it and the runs lie in FOLDER, and are deleted at the end. Three starts of 200 steps
of a small CNN: the file out of the system's page cache (cold) and in it (warm), and on 6,000 images. Memory
is of the processes that train, looked at ten times a second: their own, and beside it the pages of files, which all
processes of a machine share and the system may take back.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmnist.runtime.environment import inherited
from fmnist.runtime.files import write_atomic
from fmnist.runtime.provenance import measured_now

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "experiments/results/spread_large.json"
SIDE, CLASSES, ROWS, PROCESSES, STEPS, FEW = 64, 10, 4096, 2, 200, 6000
CONFIG = f"""
data: {{name: npz, where: spread}}
batch: {{global_batch_size: 128}}
augment: {{size: 32, flip: 0.5, shift: 0.1}}
model: {{name: cnn, options: {{widths: [8, 16, 32]}}}}
schedule: {{steps: {STEPS}, warmup_steps: 20}}
evaluation: {{every_steps: {STEPS}, test: false}}
checkpoint: {{every_steps: {STEPS}}}
log: {{every_steps: 20, wandb: disabled}}
"""


def rows_of(seed: int, count: int) -> Iterator[NDArray[np.uint8]]:
    """Yield images uint8 [ROWS and fewer, SIDE, SIDE, 3], of class position % CLASSES."""
    patterns = np.random.default_rng(0).integers(0, 160, (CLASSES, 8, 8, 3), np.uint8)
    patterns = patterns.repeat(SIDE // 8, 1).repeat(SIDE // 8, 2)
    for start in range(0, count, ROWS):
        labels = np.arange(start, min(start + ROWS, count)) % CLASSES
        noise = np.random.default_rng((seed, start)).bytes(len(labels) * SIDE * SIDE * 3)
        yield patterns[labels] + (np.frombuffer(noise, np.uint8) & 63).reshape(-1, SIDE, SIDE, 3)


def write_set(path: Path, number: int) -> None:
    """Write so many images, a hundredth of them for validation and a few for test."""
    val, test = number // 100, max(CLASSES, number // 300)
    with zipfile.ZipFile(path, "w") as archive:
        for seed, (part, count) in enumerate({"train": number - val - test, "val": val, "test": test}.items()):
            with archive.open(f"{part}_images.npy", "w", force_zip64=True) as file:
                shape = (count, SIDE, SIDE, 3)
                np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                for images in rows_of(seed, count):
                    file.write(images.data)
            with archive.open(f"{part}_labels.npy", "w") as file:
                np.lib.format.write_array(file, (np.arange(count) % CLASSES).astype(np.uint8))
    with path.open("rb") as written:
        os.fsync(written.fileno())


def forget(path: Path) -> None:
    """Ask the system to drop a file from its page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory_of(launcher: int) -> dict[int, dict[str, int]]:
    """Return, by process id, the resident bytes of a launcher's processes: their own, and those of files."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            fields = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
            if int(fields["PPid"]) == launcher and "RssAnon" in fields:
                found[int(folder.name)] = {key: 1024 * int(fields[key].split()[0]) for key in ("RssAnon", "RssFile")}
        except (OSError, ValueError, KeyError):  # no process, or one that has ended
            continue
    return found


def train(data: Path, directory: Path) -> dict[str, Any]:
    """Train once, and return what it took."""
    config = directory.with_suffix(".yaml")
    config.write_text(CONFIG)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
    command += ["train.py", "--config", str(config), "--data.root", str(data), "--output_dir", str(directory)]
    began, started = time.monotonic(), 0.0
    peaks: dict[int, dict[str, int]] = {}
    environment = inherited(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    with subprocess.Popen(command, cwd=ROOT, env=environment) as launched:
        while launched.poll() is None:
            for process, held in memory_of(launched.pid).items():
                before = peaks.setdefault(process, dict.fromkeys(held, 0))
                peaks[process] = {key: max(before[key], value) for key, value in held.items()}
            if not started and (directory / "train.log").exists():
                started = time.monotonic() - began
            time.sleep(0.1)
    if launched.returncode:
        raise SystemExit(f"the run in {directory} ended with status {launched.returncode}")
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    windows = [line for line in lines if line["prefix"] == "train"][1:]
    plan = next(line for line in (directory / "train.log").read_text().splitlines() if "MiB of images on each" in line)
    return {
        "start_s": round(started, 1),
        "whole_s": round(time.monotonic() - began, 1),
        "own_mb": sorted(round(held["RssAnon"] / 1e6) for held in peaks.values()),
        "of_files_mb": sorted(round(held["RssFile"] / 1e6) for held in peaks.values()),
        "step_ms": [round(1000 * line["step_time_s"], 1) for line in windows],
        "median_step_ms": round(1000 * statistics.median(line["step_time_s"] for line in windows), 1),
        "median_wait_ms": round(statistics.median(line["data_wait_ms"] for line in windows), 3),
        "said": plan.partition("; ")[2],
        "val_top1": next(line["top1"] for line in lines if line["prefix"] == "val"),
    }


def measure(folder: Path, number: int) -> dict[str, Any]:
    """Write the sets, train on them, and return the numbers."""
    large, small = folder / "large.npz", folder / "small.npz"
    since = time.monotonic()
    write_set(large, number)
    written = time.monotonic() - since
    write_set(small, FEW)
    forget(large)
    found = {name: train(large, folder / name) for name in ("cold", "warm")} | {"small": train(small, folder / "small")}
    sizes = {"image_mb": round(large.stat().st_size / 1e6), "write_s": round(written, 1)}
    return {"images": number, **sizes, "small_images": FEW, "steps": STEPS, "runs": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=600_000)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--note", default="", help="kept beside the times: how quiet the machine was")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = measure(Path(folder).resolve(), args.images)
    result = {
        "command": f"python -m experiments.spread_large FOLDER --images {args.images}",
        **measured_now(device=f"CPU, {PROCESSES} processes of one thread"),
        "note": args.note,
        "load": [round(load, 1) for load in os.getloadavg()],
        **found,
    }
    text = json.dumps(result, indent=2) + "\n"
    write_atomic(args.out, text)
    print(text)


if __name__ == "__main__":
    main()
