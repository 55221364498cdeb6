"""Evaluate runs or checkpoints, and compare several: metrics, figures and report.html in each run's evaluation/.

example: python evaluate.py runs/mlp runs/cnn --ensemble
"""

import argparse
from pathlib import Path

from fmnist.config.shipped import command
from fmnist.runtime.arguments import CommandLine, EachOnce, number, run_path
from fmnist.runtime.ownership import EVALUATION, check_outputs, check_suffix

# What tells the files of an earlier comparison from somebody else's.
COMPARISON = {"comparison.txt": b"McNemar's exact p", "comparison.json": b'"seeds"', "comparison.png": b""}


def parse_args() -> argparse.Namespace:
    """Read the command line; a mistake ends the program with one line and status 2."""
    description = (__doc__ or "").replace("python evaluate.py", command("evaluate"))
    parser = CommandLine(prog="evaluate.py", description=description, joined=True)
    parser.add_argument(
        "paths",
        nargs="+",
        type=run_path,
        action=EachOnce,
        metavar="RUN",
        help="run directories, or checkpoints in them",
    )
    parser.add_argument("--split", choices=("test", "val", "train"), help="images to evaluate on (default: test)")
    parser.add_argument("--tta", choices=("none", "flip"), help="flip: average image and mirror (default: the run's)")
    parser.add_device()
    parser.add_argument("--batch_size", type=number(1), help="images of one forward (default: the run's)")
    parser.add_argument("--data.root", dest="root", help="folder with the data set (default: the run's)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="of one run (default: RUN/evaluation/SPLIT)")
    parser.add_argument("--comparison", type=Path, default=Path("comparison"), help="folder for several runs' table")
    parser.add_force()
    parser.add_argument("--ensemble", action="store_true", help="the runs' averaged probabilities as a further row")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="metrics and figures only: skips near-copy subsets, calibration, timing, retrieval and report.html",
    )
    args = parser.parse_args()
    if args.ensemble and len(args.paths) < 2:
        parser.error("--ensemble averages several runs: give two or more")
    if args.output and (args.output / "manifest.json").exists():
        parser.error("--output is a checkpoint, which a further file would damage; give another folder")
    if args.output and len(args.paths) > 1:
        parser.error("--output takes one run; --comparison is the folder of several")
    places = [(args.output, EVALUATION)] if args.output else []
    places += [(args.comparison, COMPARISON)] if len(args.paths) > 1 else []
    places += [(args.comparison / "ensemble" / (args.split or "test"), EVALUATION)] if args.ensemble else []
    try:
        for folder, marks in places:
            check_suffix(folder, "")
            check_outputs({folder / name: mark for name, mark in marks.items()}, force=args.force)
    except ValueError as error:
        parser.error(str(error))
    return args
