"""List the images that copy those of another split, as CSV.

DATA is a run, or a data set: a name that data.name takes, a .npz file, a folder (default: fashion_mnist). For
Fashion-MNIST, near copies of training images: index, label, train_index, train_label, correlation; Pearson's
correlation over pixels, exact, between each image of a split and every training image. For all others, and with
--exact, copies that are the same pixel for pixel: split, index, label, other_split, other_index, other_label. An index
is the position in the data set's own file, or of a folder of pictures the file.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fmnist.runtime.arguments import CommandLine, number
from fmnist.runtime.console import log_to_console, one_line_errors
from fmnist.runtime.ownership import check_outputs, check_suffix

if TYPE_CHECKING:
    from fmnist.config.schema import DataConfig
Table = tuple[tuple[str, ...], list[tuple[Any, ...]], str]  # header and rows of the CSV, and what to say of them
NEAR_COPY, SIMILAR = 0.99, 0.98  # those of evaluation/near_copies.py, which imports torch
HEADER = ("index", "label", "train_index", "train_label", "correlation")
EXACT = ("split", "index", "label", "other_split", "other_index", "other_label")
PARSER = CommandLine(prog="fmnist duplicates", description=__doc__)
PARSER.add_argument("data", nargs="?", default="fashion_mnist", metavar="DATA", help="a run or a data set")
PARSER.add_argument("--exact", action="store_true", help="list copies that are the same pixel for pixel only")
PARSER.add_argument("--split", choices=("test", "val"), help="images to look at (default: test; both for exact copies)")
PARSER.add_argument("--val_size", type=number(0), help="training images held out as val (default: a run's, else 5000)")
PARSER.add_argument(
    "--threshold", type=number(SIMILAR, 1, float), default=NEAR_COPY, help="list near copies above this correlation"
)
PARSER.add_argument("--output", type=Path, metavar="FILE", help="CSV to write (default: print it)")
PARSER.add_force()
PARSER.add_argument("--data.root", dest="root", help="folder with the data set")
PARSER.add_argument("--data.corrections", dest="corrections", help="decisions about labels (default: a run's)")
PARSER.add_device()


def main(argv: list[str] | None = None) -> int:
    """Write or print the CSV; the counts go to stderr."""
    args = PARSER.parse_args(argv)
    log_to_console()
    with one_line_errors(PARSER.prog):
        if args.output:
            check_suffix(args.output, ".csv")
        from fmnist.config.parse import parse_config
        from fmnist.data.named import flags_of
        from fmnist.runtime.files import csv_bytes, write_atomic

        flags = flags_of(args.data)
        given = {"root": args.root, "val_size": args.val_size, "corrections": args.corrections}
        flags += [f"--data.{name}={value}" for name, value in given.items() if value is not None]
        data = parse_config(flags, prog=PARSER.prog, to_run=False).data
        near = data.name == "fashion_mnist" and not args.exact
        if args.output:
            check_outputs({args.output: ",".join(HEADER if near else EXACT).encode()}, force=args.force)
        header, rows, said = near_copies(data, args) if near else copies(data, args)
        content = csv_bytes(header, rows)
        if args.output:
            write_atomic(args.output, content)
        else:
            print(content.decode(), end="")
        sys.stderr.write(f"{said}\n")
    return 0


def near_copies(data: DataConfig, args: argparse.Namespace) -> Table:
    """Correlate the images of a split with the training images."""
    from fmnist.evaluation.near_copies import find_near_copies, load_pair
    from fmnist.runtime.hardware import describe_device, open_device

    device = open_device(args.device)
    name: Literal["test", "val"] = args.split or "test"
    split, training = load_pair(name, data)
    start = time.perf_counter()
    found = find_near_copies(split.images, training.images, device=device)
    seconds = time.perf_counter() - start
    pairs = zip(found.indices.tolist(), found.partners.tolist(), found.correlations.tolist(), strict=True)
    rows = [
        (
            *(split.position(place), split.class_names[split.labels[place]]),
            *(training.position(partner), split.class_names[training.labels[partner]], f"{value:.6f}"),
        )
        for place, partner, value in pairs
        if value > args.threshold
    ]
    near, similar = (int((found.correlations > threshold).sum()) for threshold in (NEAR_COPY, SIMILAR))
    said = (
        f"{near} of {found.num_images:,} {name} images correlate above {NEAR_COPY} with a training image, "
        f"{similar} above {SIMILAR} ({describe_device(device)}, {seconds:.1f} s)"
    )
    return HEADER, rows, said


def copies(data: DataConfig, args: argparse.Namespace) -> Table:
    """Compare the pixels of all splits."""
    from fmnist.data.info import SplitName
    from fmnist.data.registry import open_source
    from fmnist.data.split import Split
    from fmnist.evaluation.exact_copies import copies_line, exact_copies

    source = open_source(data)
    splits: dict[SplitName, Split] = {name: Split.load(name, source) for name in ("train", "val", "test")}

    def image(name: SplitName, place: int) -> tuple[str, str | int, str]:
        split = splits[name]
        return name, split.file(place) or split.position(place), split.class_names[split.labels[place]]

    found = [pair for pair in exact_copies(splits) if args.split in (None, pair.split)]
    rows = [
        (*image(pair.split, place), *image(pair.other, partner))
        for pair in found
        for place, partner in zip(pair.indices, pair.partners, strict=True)
    ]
    return EXACT, rows, copies_line([pair.as_dict() for pair in found])


if __name__ == "__main__":
    raise SystemExit(main())
