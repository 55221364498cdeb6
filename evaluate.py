"""Evaluate runs or checkpoints, and compare several: metrics, figures and report.html in each run's evaluation/."""

from fmnist.runtime.interrupts import end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # without a traceback, until the next imports are done

import argparse
import logging
from collections.abc import Sequence
from typing import Any

from fmnist.evaluation.options import parse_args
from fmnist.runtime.console import log_to_console, one_line, one_line_errors, open_door, same_arguments

if __name__ == "__main__":
    open_door("evaluate.py")
    with same_arguments():
        ARGS = parse_args()  # before torch is imported: help and a mistake are answered at once

from fmnist.evaluation.exact_copies import ExactCopies, exact_copies_of
from fmnist.evaluation.findings import Findings, findings
from fmnist.evaluation.near_copies import NearCopies, near_copies_of
from fmnist.evaluation.outcome import Outcome, Request, ensemble, evaluate
from fmnist.evaluation.ranking import check_comparable, comparison_rows, split_to_use, told_apart
from fmnist.evaluation.retrieval import query_split, retrieval_key, retrieval_of
from fmnist.report.comparison import write_comparison
from fmnist.report.retrieval_table import RETRIEVAL_FILE, read_precision, write_precision
from fmnist.report.write import write_evaluation
from fmnist.runtime.compute import Compute
from fmnist.trained import Trained, open_together

logger = logging.getLogger("fmnist")


Copies = tuple[NearCopies | None, Sequence[ExactCopies]]


def copies_of(trained: Trained, request: Request, compute: Compute) -> Copies:
    """Look for copies of the images, on all processes; once for all runs on the same images."""
    if request.quick:
        return None, ()
    data, near = trained.data(request.root), None
    if trained.info.is_fashion_mnist and request.split != "train":
        near = near_copies_of(request.split, data, compute.device, compute)
    return near, exact_copies_of(data, compute)


def precision_of(
    trained: Trained, outcome: Outcome | None, request: Request, compute: Compute
) -> dict[str, Any] | None:
    """Measure retrieval precision, on all processes; what is kept of the same weights and images is not measured."""
    if request.quick or request.split != query_split(trained):
        return None
    logger.info("%s: measuring retrieval precision", trained.name)

    def kept() -> dict[str, Any] | None:
        assert outcome is not None  # this is the main process
        return read_precision(outcome.directory / RETRIEVAL_FILE, retrieval_key(trained, request.root))

    found = compute.on_main(kept)
    if not any(compute.gather(found is not None)):
        found = retrieval_of(trained, outcome, request.root, compute)
        if found is not None and outcome is not None:
            write_precision(found, outcome.directory / RETRIEVAL_FILE)
    return found


def report(outcome: Outcome, copies: Copies, request: Request, retrieval: dict[str, Any] | None = None) -> Findings:
    """Compute the rest and write the files, on the main process."""
    logger.info("%s: computing the numbers, drawing the figures", outcome.name)
    near, exact = copies
    found = findings(outcome, near, retrieval, exact, request.root, quick=request.quick)
    write_evaluation(found)
    print((outcome.directory / "report.txt").read_text(encoding="utf-8"))
    print(f"written to {one_line(str(outcome.directory), 4096)}\n", flush=True)
    return found


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

        found = []
        for position, trained in enumerate(opened, 1):
            rest = "" if request.quick else ", then timing the model"
            logger.info("%s (%d of %d): %s images%s", trained.name, position, len(opened), request.split, rest)
            outcome = evaluate(trained, compute, request)  # on all processes
            copies = copies_of(trained, request, compute)
            retrieval = precision_of(trained, outcome, request, compute)
            if outcome is not None:  # the main one
                found.append(report(outcome, copies, request, retrieval))
        if args.ensemble and found:
            together = ensemble([each.outcome for each in found], args.comparison)
            found.append(report(together, copies_of(opened[0], request, compute), request))  # not searched again
        if len(found) > 1:
            compared, results = told_apart([each.outcome for each in found]), [each.metrics for each in found]
            rows = comparison_rows(compared, results)
            print(write_comparison(rows, compared, results, args.comparison))
            print(f"written to {args.comparison}")


if __name__ == "__main__":
    main(ARGS)
