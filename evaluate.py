"""Evaluate runs or checkpoints, and compare several: metrics, figures and report.html in each run's evaluation/."""

import argparse
import functools
from pathlib import Path

from fmnist.evaluation.findings import Findings, findings
from fmnist.evaluation.near_copies import NearCopies, find_near_copies, load_pair
from fmnist.evaluation.outcome import Outcome, Request, ensemble, evaluate
from fmnist.evaluation.ranking import check_comparable, comparison_rows
from fmnist.evaluation.retrieval import retrieval_key, retrieval_of
from fmnist.report.comparison import write_comparison
from fmnist.report.retrieval_table import RETRIEVAL_FILE, read_precision, write_precision
from fmnist.report.write import write_evaluation
from fmnist.runtime.compute import Compute
from fmnist.runtime.console import log_to_console, one_line_errors
from fmnist.trained import open_trained


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
        "--quick",
        action="store_true",
        help="metrics and figures only: skips near-copy subsets, calibration, timing, retrieval and report.html",
    )
    args = parser.parse_args()
    if args.batch_size is not None and args.batch_size < 1:
        parser.error(f"--batch_size is {args.batch_size}; valid range: 1 and more")
    if args.ensemble and len(args.paths) < 2:
        parser.error("--ensemble averages several runs: give two or more")
    return args


def main() -> None:
    args = parse_args()
    log_to_console()
    request = Request(split=args.split, tta=args.tta, batch_size=args.batch_size, root=args.root, quick=args.quick)
    with one_line_errors("evaluate.py"), Compute() as compute:
        opened = [open_trained(path, compute.device) for path in args.paths]
        check_comparable(opened, request.split)

        @functools.cache  # the same for all runs on the same images
        def near_copies(root: str | None, val_size: int) -> NearCopies | None:
            if request.quick or request.split == "train":
                return None
            (images, _), (training, _) = load_pair(request.split, root, val_size)
            return find_near_copies(images.to(compute.device), training.to(compute.device))

        def report(outcome: Outcome) -> Findings:
            """Compute the rest and write the files, on the main process."""
            data = (outcome.trained or opened[0]).cfg.data
            copies = near_copies(request.root or data.root, 0 if request.split == "test" else data.val_size)
            retrieval = None
            if outcome.trained is not None and outcome.cost is not None and request.split == "test":
                kept = outcome.trained.folder("evaluation") / "test" / RETRIEVAL_FILE
                retrieval = read_precision(kept, retrieval_key(outcome.trained, request.root))
                if retrieval is None and (retrieval := retrieval_of(outcome, request.root)) is not None:
                    write_precision(retrieval, kept)
            found = findings(outcome, copies, retrieval, quick=request.quick)
            write_evaluation(found)
            print((outcome.directory / "report.txt").read_text())
            print(f"written to {outcome.directory}\n")
            return found

        found = []
        for trained in opened:
            outcome = evaluate(trained, compute, request)  # on all processes
            if outcome is not None:  # the main one
                found.append(report(outcome))
        if args.ensemble and found:
            found.append(report(ensemble([each.outcome for each in found], args.comparison)))
        if len(found) > 1:
            compared, results = [each.outcome for each in found], [each.metrics for each in found]
            rows = comparison_rows(compared, results)
            print(write_comparison(rows, compared, results, args.comparison))
            print(f"written to {args.comparison}")


if __name__ == "__main__":
    main()
