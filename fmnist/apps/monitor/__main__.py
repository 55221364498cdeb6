"""Compare incoming pictures with the training data, and raise an alert where they differ.

Four signals: the mix of predicted classes, the mean confidence, the share of unfamiliar pictures, and the drift of the
mean features. Together they raise a false alarm for one batch in a hundred (--false_alarms 0.01). One line gives the
result; the exit status is 0 fine, 1 alert, 2 a mistake or too few pictures for a test.

in a crontab: 0 6 * * * fmnist monitor runs/cnn incoming/ || mail -s drift me
"""

import traceback

from fmnist.runtime.arguments import CommandLine, existing, number
from fmnist.runtime.console import log_to_console, one_line_errors

SMALLEST_RATE = 0.005  # 10 of the 2,000 resampled batches: below it the threshold itself would be chance
PARSER = CommandLine(prog="fmnist monitor", description=__doc__)
PARSER.add_run()
PARSER.add_argument(
    "batch",
    type=existing,
    metavar="BATCH",
    help="folder of pictures; or an IDX file (.gz too), .npy or .npz of uint8 images as the run's own",
)
PARSER.add_argument(
    "--false_alarms",
    type=number(SMALLEST_RATE, 0.5, float),
    default=0.01,
    help="share of the batches like the training data that raise an alert",
)
PARSER.add_argument("--json", action="store_true", help="print all the numbers as JSON instead of the line")


def main(argv: list[str] | None = None) -> int:
    """Test a batch; return 0 (fine), 1 (alert) or 2 (no verdict: too few pictures, or whatever went wrong)."""
    args = PARSER.parse_args(argv)
    log_to_console()
    try:
        with one_line_errors(PARSER.prog):
            from fmnist.apps.monitor.batch import monitor

            return monitor(args)
    except SystemExit:  # said in one line
        return 2
    except Exception:  # a fault of ours: an alert it is not
        traceback.print_exc()
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
