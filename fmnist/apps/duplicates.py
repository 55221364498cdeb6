"""List the images that nearly copy a training image, as CSV: index, label, train_index, train_label, correlation.

An index is the position in the data set's own file. Pearson's correlation over pixels, exact, between each image of a
split and every training image.
"""

import sys
import time
from pathlib import Path

from fmnist.runtime.arguments import CommandLine, number
from fmnist.runtime.console import log_to_console, one_line_errors
from fmnist.runtime.ownership import check_outputs, check_suffix

NEAR_COPY, SIMILAR = 0.99, 0.98  # those of evaluation/near_copies.py, which imports torch
HEADER = ("index", "label", "train_index", "train_label", "correlation")
PARSER = CommandLine(prog="fmnist duplicates", description=__doc__)
PARSER.add_argument("--split", choices=("test", "val"), default="test", help="images to look at")
PARSER.add_argument("--val_size", type=number(0), default=5000, help="validation images among the 60,000")
PARSER.add_argument(
    "--threshold", type=number(SIMILAR, 1, float), default=NEAR_COPY, help="list images above this correlation"
)
PARSER.add_argument("--output", type=Path, metavar="FILE", help="CSV to write (default: print it)")
PARSER.add_force()
PARSER.add_argument("--data.root", dest="root", help="folder with the data set")
PARSER.add_device()


def main(argv: list[str] | None = None) -> int:
    """Write or print the CSV; the counts go to stderr."""
    args = PARSER.parse_args(argv)
    log_to_console()
    with one_line_errors(PARSER.prog):
        if args.output:
            check_suffix(args.output, ".csv")
            check_outputs({args.output: ",".join(HEADER).encode()}, force=args.force)
        from fmnist.config.schema import DataConfig
        from fmnist.evaluation.near_copies import find_near_copies, load_pair
        from fmnist.runtime.files import csv_bytes, write_atomic
        from fmnist.runtime.hardware import describe_device, open_device

        device = open_device(args.device)
        split, training = load_pair(args.split, DataConfig(root=args.root, val_size=args.val_size))
        start = time.perf_counter()
        found = find_near_copies(split.images.to(device), training.images.to(device))
        seconds = time.perf_counter() - start
        pairs = zip(found.indices.tolist(), found.partners.tolist(), found.correlations.tolist(), strict=True)
        content = csv_bytes(
            HEADER,
            [
                (
                    *(split.position(place), split.class_names[split.labels[place]]),
                    *(training.position(partner), split.class_names[training.labels[partner]], f"{value:.6f}"),
                )
                for place, partner, value in pairs
                if value > args.threshold
            ],
        )
        if args.output:
            write_atomic(args.output, content)
        else:
            print(content.decode(), end="")
    near, similar = (int((found.correlations > threshold).sum()) for threshold in (NEAR_COPY, SIMILAR))
    sys.stderr.write(
        f"{near} of {found.num_images:,} {args.split} images correlate above {NEAR_COPY} with a training image, "
        f"{similar} above {SIMILAR} ({describe_device(device)}, {seconds:.1f} s)\n"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
