"""Rank the training images of finished runs by how likely their labels are wrong.

fmnist audit runs/cnn                                  one run, on the images that it was trained on
fmnist audit runs/cnn_fold0 ... runs/cnn_fold4         folds, trained with --data.folds 5 --data.fold 0 ... 4
fmnist train --data.corrections runs/cnn/audit/audit.csv     train on the labels as decided

RUN/audit/audit.html shows the first suspects, near copies and the noise of each class; audit.csv ranks all images.
Write keep, relabel (to what suggested says) or drop into its column decision, or decide on the page and export. Run
again, the command keeps the decisions of its audit.csv.
"""

from pathlib import Path

from fmnist.runtime.arguments import CommandLine, EachOnce, number, run_path
from fmnist.runtime.console import log_to_console, one_line_errors
from fmnist.runtime.ownership import check_suffix

PARSER = CommandLine(prog="fmnist audit", description=__doc__)
PARSER.add_argument(
    "runs", nargs="+", type=run_path, action=EachOnce, metavar="RUN", help="run directories of train.py: one, or folds"
)
PARSER.add_device()
PARSER.add_argument("--batch_size", type=number(1), help="images of one forward (default: the run's)")
PARSER.add_argument("--data.root", dest="root", help="folder with the data set (default: the run's)")
PARSER.add_argument("--suspects", type=number(0, 500), default=500, help="on the page (default: 500)")
PARSER.add_argument("--output", type=Path, metavar="FOLDER", help="for audit.html and audit.csv (default: RUN/audit)")
PARSER.add_force()


def main(argv: list[str] | None = None) -> int:
    """Rank, and write both files."""
    args = PARSER.parse_args(argv)
    log_to_console()
    with one_line_errors(PARSER.prog):
        if args.output:
            check_suffix(args.output, "")
        from fmnist.apps.audit.audit import audit

        print(audit(args.runs, args))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
