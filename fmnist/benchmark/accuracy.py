"""Time to accuracy: fmnist benchmark accuracy [--config FILE] --target TOP1 --runs N [-- options of train.py]."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fmnist.benchmark.programs import last_line, run
from fmnist.config.parse import DEFAULT_CONFIG, load_config, parse_config
from fmnist.config.same_run import changes, listed
from fmnist.config.schema import Config, flatten
from fmnist.config.shipped import shipped
from fmnist.runtime.arguments import CommandLine, number
from fmnist.runtime.console import log_to_console, one_line_errors
from fmnist.runtime.files import read_json, write_json
from fmnist.runtime.ownership import CONFIG, check_outputs, check_suffix, delete_run_files

PROGRAM = "fmnist benchmark accuracy"
DESCRIPTION = """\
How long train.py takes to reach an accuracy: its recipe as it is, with seeds 0 to N - 1, one run after another.

The clock stops at the first evaluation on the validation images that holds the target. A run counts only where its
test accuracy, read once at its end, holds the target too. Rerun the same command to train the runs that are missing.
The exit status is 1 where no run reaches the target.

example:
  fmnist benchmark accuracy --config configs/cnn.yaml --target 0.93 --runs 5 -- --log.wandb disabled
"""
RESULT = "accuracy.json"
# Of one start, so no run keeps them in its config.yaml; with other values no whole run would be timed as it is.
WHOLE = {"dry_run": False, "max_minutes": None, "resume": "auto", "overwrite": False, "profile": None}


def main(argv: list[str]) -> int:
    """Train, measure and report; return the exit status."""
    own, options = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = CommandLine(prog=PROGRAM, description=DESCRIPTION, usage=f"{PROGRAM} [options] [-- options of train.py]")
    parser.add_argument("--config", default=str(DEFAULT_CONFIG), metavar="FILE", help="recipe (default: the CNN)")
    parser.add_argument("--target", type=number(0.01, 1, float), required=True, help="top1, e.g. 0.93")
    parser.add_argument("--runs", type=number(1, 1000), default=3, metavar="N", help="number of seeds (default: 3)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: runs/accuracy_RECIPE")
    parser.add_force()
    args = parser.parse_args(own)
    for option in options:
        if (name := option.partition("=")[0]) in ("--seed", "--output_dir"):
            parser.error(f"{name} after --: this command gives each run its own")
        if name == "--config":  # it would win over this command's own, which the result names
            parser.error("--config after --: give it before")
    folder = args.output or Path("runs") / f"accuracy_{Path(args.config).stem}"
    recipe = ["--config", args.config, *options]
    cfg = parse_config([*recipe, "--output_dir", str(folder)], prog=PROGRAM)
    from fmnist.benchmark.accuracy_rows import made_by, measured, report, summarize  # late: they draw, too

    with one_line_errors(PROGRAM):
        check(cfg, folder, force=args.force)
        for seed in range(args.runs):
            check_same_options(cfg, folder / f"seed_{seed}", seed)
        log_to_console()
        rows: list[dict[str, Any]] = []

        def write() -> None:
            result = {"name": "accuracy", "command": shlex.join([*PROGRAM.split(), *argv]), **made_by(folder, rows)}
            result |= {"config": args.config, "train_options": options, "target": args.target}
            write_json(folder / RESULT, result | summarize(rows) | {"rows": rows})

        if not (folder / RESULT).exists():
            write()  # before any run: it says whose the folder is
        for seed in range(args.runs):
            directory = folder / f"seed_{seed}"
            print(f"run {seed + 1} of {args.runs}: {directory}", flush=True)
            missed = train(directory, [*recipe, "--seed", str(seed), "--output_dir", str(directory)])
            rows.append({"seed": seed} | ({"missed": missed} if missed else measured(directory, args.target)))
            write()
        print(f"\n{report(rows, args.target)}\nwrote {folder / RESULT}", flush=True)
        return 0 if any("missed" not in row for row in rows) else 1


def check(cfg: Config, folder: Path, *, force: bool) -> None:
    """Refuse what cannot be measured, before anything is trained.

    Raises:
        ValueError: one line.
    """
    check_suffix(folder, "")
    check_outputs({folder / RESULT: b'"name": "accuracy"'}, force=force)
    if not (folder / RESULT).exists() and (foreign := next(folder.glob("seed_*"), None)):
        raise ValueError(f"{foreign} was not made by this command: give another --output")
    if not cfg.evaluation.test:
        raise ValueError("evaluation.test is false: the accuracy on the test images has to confirm the target")
    for name, value in WHOLE.items():
        if (given := getattr(cfg, name)) != value:
            raise ValueError(f"{name} is {given}: leave it out, each run is trained whole and once")


def check_same_options(cfg: Config, directory: Path, seed: int) -> None:
    """Refuse a run that is there with other options: train.py leaves those that change only its time, or its length.

    Raises:
        ValueError: one line.
    """
    if not (directory / CONFIG).exists():
        return
    try:
        before, after = flatten(load_config(directory / CONFIG)), flatten(cfg) | {"seed": seed}
    except ValueError as error:
        raise ValueError(f"{error}: give another --output") from None
    before["output_dir"] = after["output_dir"]  # the folder may have been moved
    if changed := changes(before, after):
        said = listed(changed)
        raise ValueError(f"{directory} holds a run with another config: {said}: give another --output")


def train(directory: Path, argv: Sequence[str]) -> str:
    """Run train.py in a process of its own, from its first step; a finished run is left as it is.

    Args:
        directory: of the run; a run in it that did not finish is deleted, since its times are lost.
        argv: its options.

    Returns:
        Why there is no finished run; empty where there is one.

    Raises:
        ValueError: it refuses its options, or another process trains there.
    """
    if directory.is_dir() and not is_finished(directory):
        try:
            with FileLock(directory / ".lock", timeout=5):
                delete_run_files(directory)
        except Timeout:
            raise ValueError(
                f"{directory} is in use by another process: wait for its end, or give another --output"
            ) from None
    log = directory.with_suffix(".txt")
    ended, printed = run([sys.executable, str(shipped("train.py")), *argv], log)
    if ended == "exit status 2":
        raise ValueError(last_line(printed).removeprefix("train.py: error: "))
    if ended:
        return f"{ended}: {last_line(printed)} ({log})"
    return "" if is_finished(directory) else f"stopped before its end ({log})"


def is_finished(directory: Path) -> bool:
    """Say whether a run has come to its end."""
    path = directory / "summary.json"
    return path.is_file() and read_json(path).get("status") == "finished"
