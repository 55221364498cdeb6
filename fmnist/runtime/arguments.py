"""One style for all command lines, parsed before torch is imported: RUN first, the same options, one-line errors.

A command is a module with `main(argv) -> status`. At its top stands its parser, and nothing heavy; what needs torch,
scipy or matplotlib is imported inside `main`, after `parse_args`. So help, a misspelt option and a missing path are
answered at once. `train.py` and `evaluate.py` parse above their own imports instead.
"""

import argparse
import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fmnist.runtime.console import one_line, same_arguments
from fmnist.runtime.launcher import check_alone

MAX_NUMBER = 2**62  # no tensor has more


class CommandLine(argparse.ArgumentParser):
    """argparse with options in full only, and one line on stderr (status 2) for a mistake.

    Args:
        joined: the command may run in several processes, which share its work; all others run in one.
        kwargs: of argparse.
    """

    def __init__(self, *, joined: bool = False, **kwargs: Any) -> None:
        kwargs = {"formatter_class": argparse.RawDescriptionHelpFormatter} | kwargs
        super().__init__(allow_abbrev=False, **kwargs)
        self._joined = joined

    def add_run(self, *, device: bool = True) -> None:
        """Add RUN, and what every command that runs a model takes."""
        self.add_argument(
            "run", type=run_path, metavar="RUN", help="a run directory of train.py, or a checkpoint in it"
        )
        if device:
            self.add_device()
        self.add_argument("--batch_size", type=number(1), help="images of one forward (default: the run's)")
        self.add_argument("--data.root", dest="root", help="folder with the data set (default: the run's)")

    def add_force(self) -> None:
        """Add --force."""
        self.add_argument("--force", action="store_true", help="replace files that this command did not make")

    def add_device(self) -> None:
        """Add --device."""
        self.add_argument("--device", help="as torch names it (default: the accelerator, else the CPU)")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        """Refuse an unknown option first: argparse itself would complain of missing arguments instead."""
        args = list(sys.argv[1:] if args is None else args)
        for arg in args:
            if arg == "--" or (self._subparsers is not None and not arg.startswith("-")):
                break
            name = arg.partition("=")[0]
            if name.startswith("--") and name not in self._option_string_actions:
                self.error(f"unknown option {name}{nearest(name, self._option_string_actions)}")
        parsed = super().parse_known_args(args, namespace)
        if not self._joined:
            try:
                check_alone()
            except ValueError as error:
                self.error(str(error))
        return parsed

    def error(self, message: str) -> NoReturn:
        """End with one line on stderr, of one process of a launcher, and status 2."""
        line = re.sub(r"^argument ([^:]+): ", r"\1: ", one_line(message, 2000))
        with same_arguments():
            sys.stderr.write(f"{self.prog}: error: {line}\n")
            raise SystemExit(2)


def nearest(name: str, known: Any) -> str:
    """Return " (did you mean ...?)", or nothing where no known name is similar."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""


def number(low: float, high: float = math.inf, kind: Callable[[str], float] = int) -> Callable[[str], float]:
    """Return what reads an int or a float within limits, for add_argument's `type`."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= min(high, MAX_NUMBER):
            limits = f"{low:g} and more" if high == math.inf else f"{low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"{text!r:.60} is not valid; valid range: {limits}")
        return value

    return read


def existing(text: str) -> Path:
    """Read a path to something that is there, for add_argument's `type`."""
    path = Path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{path}: no such file or folder")
    return path


class EachOnce(argparse.Action):
    """Store a list of paths, no two of which lead to the same place."""

    def __call__(self, _: object, namespace: argparse.Namespace, values: Any, __: str | None = None) -> None:
        seen: set[str] = set()
        for path in values:
            if (real := os.path.realpath(path)) in seen:
                raise argparse.ArgumentError(self, f"{path} is given twice")
            seen.add(real)
        setattr(namespace, self.dest, values)


def run_path(text: str) -> Path:
    """Read the path of a run directory or a checkpoint, for add_argument's `type`."""
    path = existing(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is not a directory: give a run directory or one of its checkpoints")
    if not any((path / name).exists() for name in ("config.yaml", "checkpoints", "manifest.json")):
        raise argparse.ArgumentTypeError(f"{path} holds no config.yaml: not a run directory of train.py")
    return path
