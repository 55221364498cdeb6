"""Evaluate runs or checkpoints, and compare several: metrics, figures and report.html in each run's evaluation/."""

import argparse
import functools
from pathlib import Path
from typing import Any

from fmnist.evaluation.near_copies import NearCopies, find_near_copies, load_pair
from fmnist.evaluation.outcome import Outcome, Request, ensemble, evaluate
from fmnist.evaluation.retrieval import precision_of
from fmnist.evaluation.write import write_outcome
from fmnist.network import open_trained
from fmnist.report.comparison import check_comparable, write_comparison
from fmnist.run import Run
from fmnist.runtime.console import log_to_console, one_line_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN_OR_CHECKPOINT", help="what train.py wrote")
    parser.add_argument("--split", choices=("test", "val", "train"), default="test", help="images to evaluate on")
    parser.add_argument("--tta", choices=("none", "flip"), help="flip: average image and mirror (default: the run's)")
    parser.add_argument("--batch_size", type=int, help="images of one forward (default: the run's)")
    parser.add_argument("--data.root", dest="root", help="folder with the IDX files (default: the run's)")
    parser.add_argument("--comparison", type=Path, default=Path("comparison"), help="folder for several runs' table")
    parser.add_argument("--ensemble", action="store_true", help="the runs' averaged probabilities as a further row")
    parser.add_argument(
        "--quick", action="store_true", help="no honest sets, calibration, timing, retrieval, report.html"
    )
    args = parser.parse_args()
    if args.batch_size is not None and args.batch_size < 1:
        parser.error(f"--batch_size is {args.batch_size}; legal: 1 and more")
    if args.ensemble and len(args.paths) < 2:
        parser.error("--ensemble averages several runs: give two and more")
    return args


def main() -> None:
    args = parse_args()
    log_to_console()
    with one_line_errors("evaluate.py"):
        request = Request(split=args.split, tta=args.tta, batch_size=args.batch_size, root=args.root, quick=args.quick)
        opened = [open_trained(path) for path in args.paths]
        check_comparable(opened, request.split)
        run = Run(opened[0].cfg, opened[0].directory)

        @functools.cache  # the same for all runs on the same images
        def near_copies(root: str | None, val_size: int) -> NearCopies | None:
            if request.quick or request.split == "train":
                return None
            (images, _), (training, _) = load_pair(request.split, root, val_size)
            return find_near_copies(images.to(run.device), training.to(run.device))

        def write(outcome: Outcome, root: str | None, val_size: int) -> dict[str, Any]:
            retrieval = precision_of(outcome, run.device, root)
            result = write_outcome(outcome, near_copies(root, val_size), retrieval, quick=request.quick)
            print((outcome.directory / "report.txt").read_text())
            print(f"written to {outcome.directory}\n")
            return result

        outcomes, results = [], []
        for trained in opened:
            outcome = evaluate(trained, run, request)
            val_size = 0 if request.split == "test" else trained.cfg.data.val_size
            data = request.root or trained.cfg.data.root, val_size
            if outcome is not None:  # the main process
                outcomes.append(outcome)
                results.append(write(outcome, *data))
        if args.ensemble and outcomes:
            outcomes.append(ensemble(outcomes, args.comparison))
            results.append(write(outcomes[-1], *data))
        if len(outcomes) > 1:
            print(write_comparison(outcomes, results, args.comparison))
            print(f"written to {args.comparison}")


if __name__ == "__main__":
    main()
