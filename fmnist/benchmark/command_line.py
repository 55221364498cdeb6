"""The benchmark's command line."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

DESCRIPTION = """\
Race the data path against torchvision's and kornia's, on this machine.

  data   the loaders alone: images/s delivered to the device
  train  the project's own train_step fed by each loader, and by one synthetic batch for ever (= 1.00)
  all    both
  plot   draw the chart of a JSON file again: plot FILE.json

Every loader first passes a correctness gate: with given parameters its images must lie within 2/255 of a float64
warp, its labels in the common order. One that is wrong is not timed, and the exit status is 1. Rounds are
interleaved; medians and spreads are over rounds. It writes STEM.json and STEM.png, and prints the tables.
"""
EPILOG = """\
examples:
  python -m fmnist.benchmark all                                   # under five minutes on two CPU cores
  python -m fmnist.benchmark data --sizes 224 --loaders ours-compiled torchvision-pil-2 kornia
  python -m fmnist.benchmark train --models convnext_tiny@224 --variants eager compiled --batch 1024
  torchrun --nproc_per_node 4 -m fmnist.benchmark train --scaling --baseline one.json --output runs/four
"""
VARIANTS = ("eager", "compiled")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure; None is a default that depends on the device."""

    mode: str
    file: Path | None
    loaders: tuple[str, ...]
    sizes: tuple[int, ...]
    models: tuple[tuple[str, int], ...] | None
    variants: tuple[str, ...] | None
    batch: int
    large_batch: int | None
    rounds: int | None
    steps: int
    warmup: int
    seconds: float | None
    scaling: bool
    baseline: Path | None
    precision: str
    allocator: str
    seed: int
    data_root: str | None
    output: Path


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End with one line on stderr and status 2."""
        sys.stderr.write(f"fmnist.benchmark: error: {' '.join(message.split())}\n")
        raise SystemExit(2)


def _between(low: float, high: float, kind: Callable[[str], float] = int) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r}; legal: {low:g} to {high:g}")
        return value

    return convert


def _size(text: str) -> int:
    size = int(_between(8, 512)(text))
    if size % 4:
        raise argparse.ArgumentTypeError(f"{text!r}; legal: multiples of 4 (the gate erases a quarter)")
    return size


def _model(text: str) -> tuple[str, int]:
    name, at, size = text.partition("@")
    if not (name and at):
        raise argparse.ArgumentTypeError(f"{text!r}; legal: NAME@PIXELS, e.g. convnext_tiny@224")
    return name, _size(size)


def parser(loaders: tuple[str, ...]) -> argparse.ArgumentParser:
    """Return the parser; loaders are the legal names."""
    layout = argparse.RawDescriptionHelpFormatter
    result = _Parser("python -m fmnist.benchmark", description=DESCRIPTION, epilog=EPILOG, formatter_class=layout)
    add = result.add_argument
    add("mode", choices=("data", "train", "all", "plot"), help="what to race")
    add("file", nargs="?", type=Path, help="with plot: the JSON file")
    add("--loaders", nargs="+", choices=loaders, default=loaders, metavar="NAME", help=f"of: {', '.join(loaders)}")
    add("--sizes", nargs="+", type=_size, default=(28, 224), metavar="PX", help="of data, pixels (default: 28 224)")
    add(
        "--models",
        nargs="+",
        type=_model,
        metavar="NAME@PX",
        help="of train (CPU: cnn@28; GPU: also convnext_tiny@224)",
    )
    add(
        "--variants", nargs="+", choices=VARIANTS, metavar="V", help="of train: eager, compiled (CPU: eager; GPU: both)"
    )
    add("--batch", type=_between(4, 8192), default=256, help="images per batch and process (default: %(default)s)")
    add(
        "--large_batch",
        type=_between(0, 65536),
        help="of data: ours again at this batch, where launching costs nothing (CPU: 0, none; GPU: 8192)",
    )
    add("--rounds", type=_between(1, 100), help="interleaved rounds (CPU: 7; GPU: 5)")
    add("--steps", type=_between(1, 10_000), default=60, help="timed steps of a round, at most (default: %(default)s)")
    add("--warmup", type=_between(1, 1000), default=20, help="untimed steps before, at most (default: %(default)s)")
    add("--seconds", type=_between(0.01, 600, float), help="aim of a round's timed part (CPU: 0.7; GPU: 1.0)")
    add(
        "--scaling",
        action="store_true",
        help="under torchrun: train with ours and synthetic only, images/s of all processes",
    )
    add(
        "--baseline",
        type=Path,
        metavar="JSON",
        help="of --scaling: the same command's JSON with one process, for the efficiency",
    )
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on a GPU, fp32 on a CPU")
    add(
        "--allocator",
        choices=("kept", "default"),
        default="kept",
        help="on a CPU: freed memory is kept, as in train.py, or left to the C library, as in other programs",
    )
    add("--seed", type=_between(0, 2**31 - 1), default=0, help="of the order and the weights (default: %(default)s)")
    add("--data_root", metavar="DIR", help="folder of the IDX files (default: found as by train.py, not fetched)")
    add(
        "--output",
        type=Path,
        default=Path("runs/benchmark"),
        metavar="STEM",
        help="writes STEM.json and STEM.png (default: %(default)s)",
    )
    return result


def parse(argv: list[str], loaders: tuple[str, ...]) -> Options:
    """Read the command line.

    Raises:
        SystemExit: status 2 and one line for anything that is not legal; 0 after --help.
    """
    reader = parser(loaders)
    values = vars(reader.parse_args(argv))
    if (values["mode"] == "plot") != (values["file"] is not None):
        reader.error("plot takes one JSON file, and nothing else takes any")
    if values["scaling"] and values["mode"] != "train":
        reader.error("--scaling goes with train")
    if values["baseline"] and not values["scaling"]:
        reader.error("--baseline goes with --scaling")
    for path in (values["file"], values["baseline"]):
        if path is not None and not path.is_file():
            reader.error(f"no such file: {path}")
    lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    return Options(**values | lists)
