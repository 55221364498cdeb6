"""Predict pictures from outside: python -m fmnist.apps.predict RUN PATH... [--output DIR]

Each picture is made to look like Fashion-MNIST: the object is cut from its plain background, turned light on black,
and fitted into 28 x 28. Written to the output folder: predictions.csv, one row per picture, and predictions.png, each
photo beside what the model sees. A file that cannot be read is a row with its error.

example: python -m fmnist.apps.predict runs/cnn photos/ more/*.jpg --output predictions
"""

import argparse
import csv
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from fmnist.apps.novelty import NoveltyReference, open_reference
from fmnist.apps.predict.photo_sheet import BLACK, GREY, ORANGE, Entry, draw_sheet
from fmnist.data.fashion_mnist import CLASS_NAMES
from fmnist.data.photos import Photo, find_pictures, read_photo
from fmnist.runtime.console import log_to_console, one_line_errors
from fmnist.runtime.files import write_atomic
from fmnist.trained import Trained, open_trained

CHUNK = 64  # pictures in memory at a time


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One row.

    Attributes:
        photo: the picture, or why there is none.
        top: (class name, probability), the likeliest first; empty where there is an error.
        score: how unlike the training images it is, see `NoveltyReference.score`; 0 where there is an error.
        unlike: whether the score is above the calibrated threshold.
    """

    photo: Photo
    top: tuple[tuple[str, float], ...] = ()
    score: float = 0.0
    unlike: bool = False


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fmnist.apps.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="what train.py wrote: a run directory or a checkpoint")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="pictures (JPEG, PNG, WebP), folders or globs")
    parser.add_argument("--output", type=Path, default=Path("predictions"), help="folder for the CSV and the sheet")
    parser.add_argument("--top", type=int, default=3, help="classes given with their probability, 1 to 10")
    parser.add_argument(
        "--invert", choices=("auto", "always", "never"), default="auto", help="turn dark on light into light on dark"
    )
    parser.add_argument(
        "--crop",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="cut the object from its background; --no-crop takes every picture whole",
    )
    parser.add_argument("--sheet", type=int, default=120, help="pictures on the sheet: the first so many; 0: no sheet")
    parser.add_argument("--device", help="as torch names it (default: the accelerator, else the CPU)")
    parser.add_argument("--data.root", dest="root", help="folder of Fashion-MNIST for the calibration (the run's)")
    args = parser.parse_args(argv)
    if not 1 <= args.top <= len(CLASS_NAMES):
        parser.error(f"--top is {args.top}; legal: 1 to {len(CLASS_NAMES)}")
    if not 0 <= args.sheet <= 1000:
        parser.error(f"--sheet is {args.sheet}; legal: 0 to 1000")
    return args


def predict_pictures(
    trained: Trained, reference: NoveltyReference, found: Iterable[tuple[str, str]], args: argparse.Namespace
) -> Iterator[Prediction]:
    """Predict pictures in the order found, a chunk at a time."""
    pictures = iter(found)
    while chunk := list(islice(pictures, CHUNK)):
        photos = [
            Photo(name=name, error=error) if error else read_photo(name, invert=args.invert, crop=args.crop)
            for name, error in chunk
        ]
        views = [photo.cutout.view for photo in photos if photo.cutout]
        images = torch.from_numpy(np.stack(views)) if views else torch.zeros(0, 28, 28, dtype=torch.uint8)
        logits, features = trained(images)
        scores = reference.score(features)
        rows = zip(logits.double().softmax(1), scores.tolist(), strict=True)
        for photo in photos:
            if photo.cutout is None:
                yield Prediction(photo=photo)
                continue
            probabilities, score = next(rows)
            values, labels = probabilities.topk(args.top)
            top = tuple((CLASS_NAMES[i], p) for p, i in zip(values.tolist(), labels.tolist(), strict=True))
            yield Prediction(photo=photo, top=top, score=score, unlike=score > reference.threshold)


def header(num_top: int) -> list[str]:
    """Name the columns of predictions.csv."""
    places = [name for place in range(1, num_top + 1) for name in (f"top{place}", f"p{place}")]
    return ["file", "prediction", "confidence", *places, "unlike", "score", "cropped", "error"]


def row(item: Prediction, num_top: int) -> list[str]:
    """Return the cells of one picture, in the order of `header`."""
    name = item.photo.name
    # A spreadsheet runs a cell that starts like a formula; "./" before a relative path names the same file.
    name = os.path.join(".", name) if name[:1] in ("=", "+", "-", "@", "\t", "\r") else name
    if not item.top or item.photo.cutout is None:
        return [name, *[""] * (2 + 2 * num_top), "", "", "", item.photo.error]
    best = [item.top[0], *item.top]
    cells = [cell for label, probability in best for cell in (label, f"{probability:.6f}")]
    cropped = "yes" if item.photo.cutout.box else "no"
    return [name, *cells, "yes" if item.unlike else "no", f"{item.score:.6f}", cropped, ""]


def entry(item: Prediction) -> Entry:
    """Return the cell of the sheet for one picture."""
    lines = [(os.path.basename(item.photo.name) or item.photo.name, GREY)]
    if item.photo.cutout is None:
        return Entry(image=item.photo.image, box=None, view=None, lines=[*lines, (item.photo.error, ORANGE)])
    shares = [f"{label} {100 * probability:.0f} %" for label, probability in item.top[:2]]
    lines += [(shares[0], BLACK), (", ".join(["then " + share for share in shares[1:]]), GREY)]
    lines += [(f"unlike the training images ({item.score:.2f})", ORANGE)] if item.unlike else []
    return Entry(image=item.photo.image, box=item.photo.cutout.box, view=item.photo.cutout.view, lines=lines)


def write_predictions(items: Iterable[Prediction], args: argparse.Namespace, title: str) -> Counter[str]:
    """Write predictions.csv as predictions arrive, then predictions.png; count what came.

    Both appear whole or not at all.

    Returns:
        `predicted`, of those `unlike` and `whole` (no object cut out), and `failed`.
    """
    counts: Counter[str] = Counter()
    shown: list[Prediction] = []
    target = args.output / "predictions.csv"
    # A file name may hold bytes that are no UTF-8: they are written escaped.
    with tempfile.NamedTemporaryFile(
        "w",
        dir=args.output,
        prefix=".predictions.",
        encoding="utf-8",
        errors="backslashreplace",
        newline="",
        delete=False,
    ) as stream:
        try:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(header(args.top))
            for item in items:
                writer.writerow(row(item, args.top))
                counts["predicted" if item.top else "failed"] += 1
                counts["unlike"] += item.unlike
                counts["whole"] += item.photo.cutout is not None and item.photo.cutout.box is None
                if len(shown) < args.sheet:
                    shown.append(item)
            os.chmod(stream.name, 0o644)
            os.replace(stream.name, target)
        finally:
            Path(stream.name).unlink(missing_ok=True)
    if shown:
        total = counts["predicted"] + counts["failed"]
        part = f", the first {len(shown)} of {total:,}" if total > len(shown) else ""
        write_atomic(args.output / "predictions.png", draw_sheet([entry(item) for item in shown], title + part))
    return counts


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    log_to_console()
    with one_line_errors("python -m fmnist.apps.predict"):
        try:
            args.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--output is {args.output}: {error.strerror}") from None
        trained = open_trained(args.run, args.device)
        reference = open_reference(trained, args.root)
        items = predict_pictures(trained, reference, find_pictures(args.paths), args)
        counts = write_predictions(items, args, f"{trained.name}: each photo and what the model sees")
    print(
        f"{counts['predicted']:,} pictures predicted, {counts['unlike']:,} of them unlike the training images, "
        f"{counts['whole']:,} taken whole (no plain background); {counts['failed']:,} errors"
    )
    print(f"written to {args.output}")
    raise SystemExit(0 if counts["predicted"] else 1)


if __name__ == "__main__":
    main()
