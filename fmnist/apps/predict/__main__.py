"""Predict your own pictures with a trained run.

Each picture is made to look like the run's own images: resized and cropped as those were. For Fashion-MNIST the object
is cut from its plain background, turned light on black, and fitted into 28 x 28. Written to the output folder:
predictions.csv, one row per picture, and predictions.png, each photo beside what the model sees. JPEG, PNG, WebP, GIF,
BMP and TIFF are read; a file that cannot be is a row with its error.

example: fmnist predict runs/cnn photos/ more/*.jpg --output predictions
"""

import argparse
from collections import Counter
from pathlib import Path

from fmnist.runtime.arguments import CommandLine, number
from fmnist.runtime.console import log_to_console, one_line_errors
from fmnist.runtime.ownership import check_outputs, check_suffix

PARSER = CommandLine(prog="fmnist predict", description=__doc__)
PARSER.add_run()
PARSER.add_argument("paths", nargs="+", metavar="PATH", help="pictures, folders or globs")
PARSER.add_argument("--output", type=Path, default=Path("predictions"), help="folder for the CSV and the sheet")
PARSER.add_force()
PARSER.add_argument("--top", type=number(1), help="classes given with their probability (default: 3, or all of fewer)")
PARSER.add_argument("--probabilities", action="store_true", help="a column `p_CLASS` for each class, in label order")
PARSER.add_argument(
    "--invert",
    choices=("auto", "always", "never"),
    default="auto",
    help="Fashion-MNIST: turn dark on light into light on dark",
)
PARSER.add_argument(
    "--crop",
    action=argparse.BooleanOptionalAction,
    default=True,
    help="Fashion-MNIST: cut the object from its background; --no-crop uses every picture uncropped",
)
PARSER.add_argument(
    "--calibrate",
    action=argparse.BooleanOptionalAction,
    default=True,
    help="scale confidences by the temperature that the run fitted on its validation images",
)
PARSER.add_argument(
    "--coverage",
    type=number(0.01, 0.9999, float),
    help="a column `set`: the classes that may be right, so that the true one is there in this share of the pictures "
    "of each class, 0.95 say, if they are like the run's validation images",
)
PARSER.add_argument(
    "--max_error",
    type=number(0.0001, 0.5, float),
    help="a column `decision`: automatic from the confidence on at which at most this share of answers (e.g. 0.01) is "
    "wrong, judged on the run's validation images, else person",
)
PARSER.add_argument(
    "--explain",
    action="store_true",
    help="on the sheet, what each answer rests on: how far its probability drops where a part is covered",
)
PARSER.add_argument("--sheet", type=number(0, 1000), default=120, help="pictures on the sheet; 0: no sheet")
PARSER.add_argument("--json", action="store_true", help="print the counts as JSON, for scripts")


def main(argv: list[str] | None = None) -> int:
    """Predict the pictures; return 0, or 1 where none of them could be read."""
    args = PARSER.parse_args(argv)
    if args.explain and not args.sheet:
        PARSER.error("--explain draws on the sheet, and --sheet 0 leaves that out")
    log_to_console()
    with one_line_errors(PARSER.prog):
        from fmnist.data.photos import find_pictures

        left_out: Counter[str] = Counter()
        found = list(find_pictures(args.paths, left_out))
        if all(error for _, error in found):
            raise ValueError("; ".join(f"{name}: {error}" for name, error in found[:3]))
        check_suffix(args.output, "")
        marks = {args.output / "predictions.csv": b"file,prediction,confidence,"}
        marks |= {args.output / "predictions.png": b""} if args.sheet else {}
        check_outputs(marks, force=args.force)

        from fmnist.apps.predict.predictions import predict

        return predict(found, args, left_out)


if __name__ == "__main__":
    raise SystemExit(main())
