"""Whole programs in the race: fmnist benchmark programs TIMM [options]."""

import argparse
import json
import re
import shlex
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmnist.config.shipped import shipped
from fmnist.runtime.arguments import CommandLine, existing, number
from fmnist.runtime.console import log_to_console, one_line, one_line_errors
from fmnist.runtime.files import read_json, temporary_folder, write_atomic, write_json
from fmnist.runtime.launcher import stop_with_parent
from fmnist.runtime.ownership import check_outputs

PROGRAM = "fmnist benchmark programs"
DESCRIPTION = """\
Race train.py against timm's own train.py and benchmark.py, as they are, from a checkout of timm's sources.

Each is started as a process of its own, in turn, `--rounds` times. The two trainers get as many images of
Fashion-MNIST, and the same batch size, optimizer (AdamW), flips and label smoothing; they train two epochs of
`--steps` steps, validate on as many images after each, and say themselves how fast the second was. benchmark.py
repeats one synthetic batch, of three channels since it knows no other, and updates by AdamW, too.

example:
  git clone https://github.com/huggingface/pytorch-image-models
  fmnist benchmark programs pytorch-image-models --model convnext_atto --size 32
"""
MOST_IMAGES = 30_000  # half of all: as many are validated
OURS, TRAIN, BENCHMARK = "train.py", "timm's train.py", "timm's benchmark.py"
TIMM_RATE = re.compile(r"Train: 1 \[.*\(\d+\.\d+s, +([\d.]+)/s\)")  # the mean since the second epoch began


@dataclass(frozen=True)
class Program:
    """One program of the race.

    Attributes:
        name: of its row.
        command: what starts it.
        folder: where it runs.
        rate: reads images/s from all that it printed; None where it is not there.
    """

    name: str
    command: list[str]
    folder: Path
    rate: Callable[[str], float | None]


def run(command: Sequence[str], log: Path, folder: Path | None = None) -> tuple[str, str]:
    """Run a program to its end, its output added to a file.

    Args:
        command: what starts it.
        log: the file.
        folder: where it runs; None: here.

    Returns:
        How it ended, empty where its exit status is 0; and what it printed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        began = file.tell()
        pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        status = subprocess.run(command, **pipes, cwd=folder, preexec_fn=stop_with_parent).returncode
    printed = log.read_bytes()[began:].decode(errors="replace")
    ended = f"killed by signal {-status}" if status < 0 else f"exit status {status}" if status else ""
    return ended, printed


def last_line(printed: str) -> str:
    """Return the last line of what a program printed, safe to print again."""
    return one_line((printed.strip().splitlines() or ["no output"])[-1])


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = CommandLine(prog=PROGRAM, description=DESCRIPTION, usage=f"{PROGRAM} TIMM [options]")
    parser.add_argument("timm", type=existing, metavar="TIMM", help="a checkout of timm's sources")
    parser.add_argument("--model", default="convnext_atto", metavar="NAME", help="timm's name (default: convnext_atto)")
    parser.add_argument("--size", type=number(8, 512), default=32, metavar="PX", help="pixels (default: 32)")
    parser.add_argument("--batch", type=number(4, 8192), default=256, help="images of a step (default: 256)")
    parser.add_argument("--steps", type=number(2, 100_000), default=20, help="of an epoch (default: 20)")
    parser.add_argument("--rounds", type=number(1, 100), default=3, help="of all programs in turn (default: 3)")
    parser.add_argument("--compile", action="store_true", help="each by torch.compile, as it does that itself")
    default = Path("runs/benchmark_programs")
    parser.add_argument("--output", type=Path, default=default, metavar="STEM", help=f"STEM.json (default: {default})")
    parser.add_force()
    options = parser.parse_args(argv)
    for name in ("train.py", "benchmark.py", "timm/version.py"):
        if not (options.timm / name).is_file():
            parser.error(f"{options.timm} holds no {name}: it is not a checkout of timm's sources")
    return options


def main(argv: list[str]) -> int:
    """Run the race; return the exit status, 1 where a program failed."""
    options = parse(argv)
    from fmnist.benchmark.output import scaled  # late: importing torch takes seconds
    from fmnist.config.schema import DataConfig
    from fmnist.data.split import Split
    from fmnist.report.comparison import Columns, text_table
    from fmnist.runtime.hardware import available_cores, describe_device, find_device, resolve_precision
    from fmnist.runtime.provenance import measured_now

    log_to_console()
    with one_line_errors(PROGRAM):
        path = options.output.with_name(f"{options.output.name}.json")
        log = path.with_suffix(".txt")
        check_outputs({path: b'"name": "programs"', log: PROGRAM.encode()}, force=options.force)
        device, images = find_device(None), options.batch * options.steps
        precision = resolve_precision("auto", device)
        if images > MOST_IMAGES:
            raise ValueError(f"--batch times --steps is {images:,} images; valid range: 1 to {MOST_IMAGES:,}")
        split = Split.load("train", DataConfig(), find_device("cpu"))
        with temporary_folder(path.absolute()) as folder:
            write_torchvision(folder / "data", split.images[:images].numpy(), split.labels[:images].numpy())
            racing = programs(options, folder, device.type, precision, available_cores())
            rows = race(racing, options.rounds, log)
            places = {str(folder.absolute()): "FOLDER", sys.executable: "python", str(shipped("train.py")): "train.py"}
            for row, program in zip(rows, racing, strict=True):
                row["command"] = shlex.join(program.command)
                for place, name in places.items():
                    row["command"] = row["command"].replace(place, name)
        columns: Columns = {
            "name": ("program", str),
            "median": ("images/s", "{:,.0f}".format),
            "max": ("best", "{:,.0f}".format),
            "ratio": ("ratio", "{:.2f}".format),
            "seconds": ("whole process, s", "{:.1f}".format),
            "failed": ("failed", str),
        }
        about: dict[str, Any] = {"name": "programs", "command": shlex.join([*PROGRAM.split(), *argv])}
        about |= measured_now(device=describe_device(device), threads=available_cores())
        about |= {"timm_sources": timm_version(options.timm), "model": options.model, "size": options.size}
        about |= {"batch_size": options.batch, "steps": options.steps, "precision": precision}
        about |= {"compiled": options.compile, "rows": rows}
        write_json(path, about)
        title = f"{options.model}, {options.size} px, batch {options.batch}, {precision}"
        print(f"\n{title} ({scaled(images)} images an epoch; ratios to {TRAIN})")
        print(f"{text_table(rows, columns, ['name', 'failed'])}\n\nwrote {path}", flush=True)
        if failed := [row["name"] for row in rows if "failed" in row]:
            sys.stderr.write(f"{PROGRAM}: error: {', '.join(failed)} failed: see {log}\n")
        return 1 if failed else 0


def programs(options: argparse.Namespace, folder: Path, device: str, precision: str, workers: int) -> list[Program]:
    """Return what is raced.

    Args:
        options: of the command line.
        folder: with the images, and for what the programs write.
        device: its type, as torch names it.
        precision: bf16 or fp32, of all three.
        workers: of timm's DataLoader.
    """
    size, batch, epochs, images = str(options.size), str(options.batch), 2, options.batch * options.steps
    recipe = {
        "data": {"limit": images, "val_size": images},
        "batch": {"global_batch_size": options.batch},
        "augment": {"size": options.size, "flip": 0.5},
        "model": {"name": options.model, "compile": options.compile},
        "optim": {"lr": 1e-4, "weight_decay": 0.05, "label_smoothing": 0.1},
        "schedule": {"epochs": epochs},
        "evaluation": {"test": False},
        "log": {"every_steps": options.steps, "wandb": "disabled"},
    }
    folder.joinpath("recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    common = ["--device", device, "--model", options.model, "--num-classes", "10", "--batch-size", batch]
    common += ["--opt", "adamw", "--weight-decay", "0.05", "--smoothing", "0.1"]
    common += ["--amp", "--amp-dtype", "bfloat16"] * (precision == "bf16") + ["--torchcompile"] * options.compile
    trainer = ["--dataset", "torch/fashion_mnist", "--data-dir", str(folder / "data"), "--in-chans", "1"]
    trainer += ["--train-split", "train", "--val-split", "validation", "--input-size", "1", size, size]
    trainer += ["--mean", "0.286", "--std", "0.353", "--scale", "1", "1", "--ratio", "1", "1", "--color-jitter", "0"]
    trainer += ["--hflip", "0.5", "--lr", "1e-4", "--epochs", str(epochs), "--workers", str(workers)]
    trainer += ["--log-interval", str(options.steps), "--output", str(folder / "timm")]
    steps = ["--num-warm-iter", str(options.steps), "--num-bench-iter", str(options.steps)]
    steps += ["--results-file", str(folder / "benchmark.json"), "--results-format", "json"]
    sources, here, directory = options.timm.resolve(), Path.cwd(), folder / "run"

    def ours(_: str) -> float | None:
        summary = read_json(directory / "summary.json")
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        rates = [line["images_per_second"] for line in lines if line["prefix"] == "train"]
        return rates[-1] if summary["status"] == "finished" and rates else None

    def timms(printed: str) -> float | None:
        return float(found[-1]) if (found := TIMM_RATE.findall(printed)) else None

    def benchmark(_: str) -> float | None:
        return json.loads((folder / "benchmark.json").read_text()).get("train_samples_per_sec")

    train = [str(shipped("train.py")), "--config", str(folder / "recipe.yaml"), "--output_dir", str(directory)]
    train += ["--resume", "never", "--overwrite", "true"]
    bench = ["benchmark.py", "--bench", "train", "--no-retry", *common, "--input-size", "3", size, size, *steps]
    return [
        Program(OURS, [sys.executable, *train], here, ours),
        Program(TRAIN, [sys.executable, "train.py", *common, *trainer], sources, timms),
        Program(BENCHMARK, [sys.executable, *bench], sources, benchmark),
    ]


def race(racing: Sequence[Program], rounds: int, log: Path) -> list[dict[str, Any]]:
    """Run the programs in turn; one that fails takes no further part.

    Args:
        racing: the programs.
        rounds: how often.
        log: all that they print.

    Returns:
        For each program `name`, and `median`, `min` and `max` in images/s, `ratio` to timm's train.py,
        `seconds` of the whole process (median) and `rounds`; or `failed`, why.
    """
    rows: dict[str, dict[str, Any]] = {program.name: {"name": program.name} for program in racing}
    samples: dict[str, list[dict[str, float]]] = {program.name: [] for program in racing}
    write_atomic(log, f"{PROGRAM}\n")
    for i in range(rounds):
        for program in racing:
            if "failed" in rows[program.name]:
                continue
            began = time.perf_counter()
            ended, printed = run(program.command, log, program.folder)
            seconds = time.perf_counter() - began
            try:
                rate = None if ended else program.rate(printed)
            except (OSError, ValueError, KeyError):  # it left no result, or half of one
                rate = None
            if not rate:
                rows[program.name]["failed"] = f"{ended or 'says no images/s'}: {last_line(printed)}"
            else:
                samples[program.name].append({"images_per_second": rate, "seconds": seconds})
            said = f"{rate:,.0f} images/s, {seconds:.1f} s" if rate else rows[program.name]["failed"]
            print(f"round {i + 1} of {rounds}  {program.name}: {said}", flush=True)
    for name, row in rows.items():
        if "failed" not in row:
            rates = [sample["images_per_second"] for sample in samples[name]]
            row |= {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}
            row |= {"seconds": statistics.median(s["seconds"] for s in samples[name]), "rounds": samples[name]}
    for row in rows.values():
        if "median" in row and "median" in rows.get(TRAIN, {}):
            row["ratio"] = row["median"] / rows[TRAIN]["median"]
    return list(rows.values())


def write_torchvision(folder: Path, images: Any, labels: Any) -> None:
    """Write images, uint8 [N, H, W], and labels, [N], as torchvision's FashionMNIST reads them, as both its splits."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split in "train", "t10k":
        pairs = ((f"{split}-images-idx3-ubyte", images), (f"{split}-labels-idx1-ubyte", labels.astype("uint8")))
        for name, array in pairs:
            header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (raw / name).write_bytes(header + array.tobytes())


def timm_version(sources: Path) -> str:
    """Return timm's version as its sources have it."""
    found = re.search(r"__version__ = ['\"](.+?)['\"]", (sources / "timm/version.py").read_text())
    return one_line(found[1]) if found else "unknown"
