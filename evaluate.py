"""Evaluate runs or checkpoints, and compare several: metrics, figures and report.html in each run's evaluation/."""

from fmnist.runtime.interrupts import end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # without a traceback, until the next imports are done

import argparse
import logging

from fmnist.evaluation.options import parse_args
from fmnist.runtime.console import log_to_console, one_line, one_line_errors, open_door, same_arguments

if __name__ == "__main__":
    open_door("evaluate.py")
    with same_arguments():
        ARGS = parse_args()  # before torch is imported: help and a mistake are answered at once

from fmnist.evaluation.exact_copies import exact_copies_of
from fmnist.evaluation.findings import Findings, findings
from fmnist.evaluation.near_copies import near_copies_of
from fmnist.evaluation.outcome import Outcome, Request, ensemble, evaluate
from fmnist.evaluation.ranking import check_comparable, comparison_rows, split_to_use
from fmnist.evaluation.retrieval import query_split, retrieval_key, retrieval_of
from fmnist.report.comparison import write_comparison
from fmnist.report.retrieval_table import RETRIEVAL_FILE, read_precision, write_precision
from fmnist.report.write import write_evaluation
from fmnist.runtime.compute import Compute
from fmnist.trained import open_together

logger = logging.getLogger("fmnist")


def main(args: argparse.Namespace | None = None) -> None:
    args = args or parse_args()
    log_to_console()
    about = {name: getattr(args, name) for name in ("split", "tta", "batch_size", "root", "quick", "output")}
    with one_line_errors("evaluate.py"), Compute(device=args.device) as compute:
        # not where runs and data lie: the main process reads the weights, and the images are compared by their bytes
        shared = {f"--{name}": getattr(args, name) for name in ("split", "tta", "batch_size", "quick", "ensemble")}
        compute.agree_on_options({"RUN": [path.resolve().name for path in args.paths], **shared})
        opened = [open_together(path, compute) for path in args.paths]
        request = Request(**about | {"split": split_to_use(opened, args.split)}, written=True)
        check_comparable(opened, request.split)

        def report(outcome: Outcome) -> Findings:
            """Compute the rest and write the files, on the main process."""
            copies, data = None, (outcome.trained or opened[0]).data(request.root)
            exact = () if request.quick else exact_copies_of(data)
            if not request.quick and outcome.info.is_fashion_mnist and request.split != "train":
                copies = near_copies_of(request.split, data, compute.device)
            retrieval = None
            if outcome.trained and outcome.cost is not None and request.split == query_split(outcome.trained):
                logger.info("%s: measuring retrieval precision", outcome.name)
                kept = outcome.directory / RETRIEVAL_FILE
                retrieval = read_precision(kept, retrieval_key(outcome.trained, request.root))
                if retrieval is None and (retrieval := retrieval_of(outcome, request.root)) is not None:
                    write_precision(retrieval, kept)
            logger.info("%s: computing the numbers, drawing the figures", outcome.name)
            found = findings(outcome, copies, retrieval, exact, request.root, quick=request.quick)
            write_evaluation(found)
            print((outcome.directory / "report.txt").read_text())
            print(f"written to {one_line(str(outcome.directory), 4096)}\n", flush=True)
            return found

        found = []
        for position, trained in enumerate(opened, 1):
            rest = "" if request.quick else ", then timing the model"
            logger.info("%s (%d of %d): %s images%s", trained.name, position, len(opened), request.split, rest)
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
    main(ARGS)
