"""Time the reading of a folder of photographs by class: the first time, from the cache, after a kill, by two at once.

    python -m experiments.folder_source draw /tmp/photos 2000    # goes on where it was stopped
    python -m experiments.folder_source measure /tmp/photos      # writes results/folder_source_2000.json

The photographs are JPEG of 300 to 1,200 px, cut from one large picture of soft shapes and a camera's noise: no two are
the same. Every reading is a process of its own, whose largest resident memory is its ru_maxrss; the files lie in the
system's page cache. Times on a machine that others use at the same time are upper bounds; the load stands beside them.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

from fmnist.runtime.environment import inherited
from fmnist.runtime.files import write_atomic
from fmnist.runtime.provenance import measured_now

RESULTS = Path(__file__).parent / "results"
CANVAS, CLASSES, STORED_SIZE = 4000, 10, 224


def draw(folder: Path, number: int, seconds: float) -> None:
    """Write the photographs that are not there yet, for so many seconds."""
    rng = np.random.default_rng(0)
    soft = Image.fromarray(rng.integers(0, 256, (60, 60, 3), dtype=np.uint8)).resize((CANVAS, CANVAS))
    noise = rng.integers(-8, 9, (CANVAS, CANVAS, 1), dtype=np.int16)
    canvas = Image.fromarray(np.clip(np.asarray(soft) + noise, 0, 255).astype(np.uint8))
    until = time.monotonic() + seconds

    def photograph(index: int) -> None:
        path = folder / f"class_{index % CLASSES}" / f"{index:06}.jpg"
        if path.exists() or time.monotonic() > until:
            return
        rng = np.random.default_rng(index)
        width, height = (int(side) for side in rng.integers(300, 1201, 2))
        left, top = (int(rng.integers(0, CANVAS - side)) for side in (width, height))
        part = canvas.crop((left, top, left + width, top + height))
        part.save(path.with_suffix(".part"), format="JPEG", quality=int(rng.integers(80, 95)))
        path.with_suffix(".part").rename(path)

    for label in range(CLASSES):
        (folder / f"class_{label}").mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:
        list(pool.map(photograph, range(number)))
    print(f"{sum(1 for _ in folder.rglob('*.jpg')):,} of {number:,} photographs")


def read(folder: Path) -> None:
    """Read the folder, and print what that took as JSON: one process of the measurement."""
    from fmnist.data.sources.folder import read_folder

    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    decoded = read_folder(folder, stored_size=STORED_SIZE, fit="crop", bad_files="refuse", holdout=0.1)
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    result = {"images": len(decoded.files), "digest": decoded.digests["train"], "seconds": round(seconds, 2)}
    result |= {"cpu_seconds": round(cpu, 2), "peak_rss_mb": round(after.ru_maxrss * 1024 / 1e6)}
    print(json.dumps(result | {"rss_mb_before": round(before.ru_maxrss * 1024 / 1e6)}))


def start(folder: Path, cache: str) -> subprocess.Popen[str]:
    """Start one reading."""
    command = [sys.executable, "-m", "experiments.folder_source", "read", str(folder)]
    return subprocess.Popen(
        command, env=inherited(FMNIST_CACHE=cache), stdout=subprocess.PIPE, text=True, cwd=RESULTS.parents[1]
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for a reading and return what it printed."""
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"a reading ended with status {process.returncode}")
    return json.loads(out.splitlines()[-1])


def leftovers(cache: str) -> int:
    """Return the bytes in temporary files."""
    return sum(path.stat().st_size for path in Path(cache).glob(".*.part"))


def measure(folder: Path, cache_root: Path | None, *, kills: bool, note: str) -> None:
    """Read the folder in all ways, and write the result."""
    with tempfile.TemporaryDirectory(dir=cache_root) as cache:
        cold = finish(start(folder, cache))
        warm = [finish(start(folder, cache)) for _ in range(3)]
        bytes_kept = sum(path.stat().st_size for path in Path(cache).iterdir())
    runs: dict[str, Any] = {"cold": cold, "warm": min(warm, key=lambda run: run["seconds"])}
    if kills:
        with tempfile.TemporaryDirectory(dir=cache_root) as cache:
            killed = start(folder, cache)
            while not (left := leftovers(cache)) or left < bytes_kept / 4:
                time.sleep(0.02)
            killed.kill()
            killed.communicate()
            runs["after_kill"] = finish(start(folder, cache)) | {"mb_left_by_the_kill": round(left / 1e6)}
            runs["after_kill"]["mb_left_at_the_end"] = round(leftovers(cache) / 1e6)
        with tempfile.TemporaryDirectory(dir=cache_root) as cache:
            pair = [start(folder, cache) for _ in range(2)]
            runs["two_at_once"] = [finish(process) for process in pair]
    results = [cold, *warm, *runs.get("two_at_once", []), *([runs["after_kill"]] if kills else [])]
    megabytes = sum(path.stat().st_size for path in folder.rglob("*.jpg")) / 1e6
    result = {
        "name": f"folder_source_{cold['images']}",
        "command": f"python -m experiments.folder_source measure FOLDER{' --kills' * kills}",
        **(about := measured_now(device="CPU")),
        "note": note,
        "load": [round(load, 1) for load in os.getloadavg()],
        "versions": about["versions"] | {"pillow": PIL.__version__, "numpy": np.__version__},
        "photographs": f"{cold['images']:,} JPEG of 300 to 1,200 px, {megabytes:,.0f} MB",
        "stored_size": STORED_SIZE,
        "cache_mb": round(bytes_kept / 1e6),
        "equal_tensors": len({run.pop("digest") for run in results}) == 1,
        "runs": runs,
    }
    text = json.dumps(result, indent=2) + "\n"
    write_atomic(RESULTS / f"{result['name']}.json", text)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("draw", "read", "measure"):
        commands.add_parser(name).add_argument("folder", type=Path)
    commands.choices["draw"].add_argument("number", type=int)
    commands.choices["draw"].add_argument("--seconds", type=float, default=100, help="to stop after")
    commands.choices["measure"].add_argument("--cache", type=Path, default=None, help="folder for the caches")
    commands.choices["measure"].add_argument("--kills", action="store_true", help="kill it, and two at once, too")
    commands.choices["measure"].add_argument(
        "--note", default="", help="kept beside the times: how quiet the machine was"
    )
    args = parser.parse_args()
    if args.command == "draw":
        draw(args.folder, args.number, args.seconds)
    elif args.command == "read":
        read(args.folder.resolve())
    else:
        measure(args.folder.resolve(), args.cache, kills=args.kills, note=args.note)


if __name__ == "__main__":
    main()
