"""From pictures to predictions.csv and predictions.png."""

import argparse
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fmnist.apps.novelty import NoveltyReference, open_reference
from fmnist.apps.predict.photo_sheet import BLACK, GREY, ORANGE, Cell, draw_sheet
from fmnist.apps.trust import PERSON, Trust, open_trust
from fmnist.apps.views import NAMED, Photo, check_cutting, count_kinds, read_photos, stack_views
from fmnist.data.photos import MISSING
from fmnist.evaluation.calibration import few_images
from fmnist.evaluation.occlusion import occlusion_map
from fmnist.runtime.console import keep_at_interrupt, one_line
from fmnist.runtime.files import FORMULA, csv_bytes, write_atomic
from fmnist.runtime.ownership import remove_own
from fmnist.trained import Trained, open_trained

logger = logging.getLogger("fmnist")
SAID = 10  # pictures whose prediction is printed; the CSV has all


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One row.

    Attributes:
        photo: the picture, or why there is none.
        top: (class name, probability), the likeliest first; empty where there is an error.
        probabilities: of all classes, in label order; likewise.
        score: distance from the training images, see `NoveltyReference.score`; 0 where there is an error.
        unfamiliar: whether the score is above the calibrated threshold.
        trust: cells of the columns that `Trust` adds.
        drops: float32 [H, W], see `occlusion_map`; None where nothing is explained.
    """

    photo: Photo
    top: tuple[tuple[str, float], ...] = ()
    probabilities: tuple[float, ...] = ()
    score: float = 0.0
    unfamiliar: bool = False
    trust: tuple[str, ...] = ()
    drops: Tensor | None = None


def predict(found: Sequence[tuple[str, str]], args: argparse.Namespace, left_out: Counter[str]) -> int:
    """Predict pictures and write the files; return 0; 1 where none could be read, or a path is not there.

    Args:
        found: what `find_pictures` yields.
        args: the command line.
        left_out: what was found beside pictures, by suffix.

    Raises:
        ValueError: one line, for a run that cannot be used or a --top above its number of classes.
    """
    trained = open_trained(args.run, args.device, args.batch_size)
    args.top = num_top(args, trained)
    if args.top > len(trained.class_names):
        raise ValueError(f"--top is {args.top}; valid range: 1 to {len(trained.class_names)}, the classes")
    check_cutting(trained.info, invert=args.invert, crop=args.crop)
    asked = {"coverage": args.coverage, "max_error": args.max_error, "calibrate": args.calibrate, "root": args.root}
    trust = open_trust(trained, **asked)  # first: it may find the features that the reference draws from
    reference = open_reference(trained, args.root)
    items, title = predict_pictures(trained, reference, found, args, trust), "each photo and what the model sees"
    if args.explain:
        from fmnist.report.overlay import LEGEND

        items, title = explained(items, trained, args), f"{title}; {LEGEND}"
    each_class = trained.class_names if args.probabilities else ()
    counts = write_predictions(items, args, f"{trained.name}: {title}", trust.columns, each_class)
    if args.json:
        print(json.dumps({**counts, **trust.counts(), "left_out": left_out, "output": str(args.output)}))
    else:
        errors = f"{counts['errors']:,} error{'s' * (counts['errors'] != 1)}"
        flags = f"{counts['unfamiliar']:,} flagged as unfamiliar"
        flags += f", {counts['uncropped']:,} used uncropped" if trained.info.is_fashion_mnist else ""
        beside = f"; left out: {count_kinds(left_out)}" if left_out else ""
        print(f"{counts['predicted']:,} predicted: {flags}; {errors}{beside}")
        for line in trust.lines():
            print(line)
        if args.calibrate and trained.temperature != 1:
            print(f"confidences are calibrated, at temperature {trained.temperature:.3f}; --no-calibrate leaves it out")
        elif args.calibrate and (few := few_images(trained.info.num_val)):
            print(few)
        print(f"written to {args.output}")
    return 0 if counts["predicted"] and not any(error in MISSING for _, error in found) else 1


def num_top(args: argparse.Namespace, trained: Trained) -> int:
    """Return how many classes are given: three, or all of fewer, where --top says nothing."""
    return int(args.top or min(3, len(trained.class_names)))


def predict_pictures(
    trained: Trained,
    reference: NoveltyReference,
    found: Iterable[tuple[str, str]],
    args: argparse.Namespace,
    trust: Trust | None = None,
) -> Iterator[Prediction]:
    """Predict pictures in the order found."""
    trust = trust or Trust(class_names=trained.class_names)
    for photos in read_photos(found, trained.info, invert=args.invert, crop=args.crop):
        logits, features = trained(stack_views(photos, trained.info))
        chances = trained.probabilities(logits, calibrate=args.calibrate)
        values, labels = chances.topk(num_top(args, trained))
        scores = reference.score(features)
        rows = zip(values.tolist(), labels.tolist(), scores.tolist(), chances, strict=True)
        for photo in photos:
            if photo.cutout is None:
                yield Prediction(photo=photo, trust=trust.unread())
                continue
            probabilities, classes, score, all_classes = next(rows)
            top = tuple((trained.class_names[i], p) for p, i in zip(probabilities, classes, strict=True))
            unfamiliar = score > reference.threshold
            cells = trust.cells(all_classes, unfamiliar=unfamiliar)
            known = {"top": top, "probabilities": tuple(all_classes.tolist()), "score": score, "unfamiliar": unfamiliar}
            yield Prediction(photo=photo, trust=cells, **known)


def explained(items: Iterable[Prediction], trained: Trained, args: argparse.Namespace) -> Iterator[Prediction]:
    """Add the occlusion map of the likeliest class to those pictures that the sheet shows."""
    for number, item in enumerate(items):
        drops = None
        if number < args.sheet and item.photo.cutout is not None:
            view, label = torch.from_numpy(item.photo.cutout.view), trained.class_names.index(item.top[0][0])
            drops = occlusion_map(trained, view, label, calibrate=args.calibrate)
        yield replace(item, drops=drops)


def header(num_top: int, more: Sequence[str] = (), each_class: Sequence[str] = ()) -> list[str]:
    """Name the columns of predictions.csv; `more` are those of `Trust`, `each_class` those that have a column."""
    places = [name for place in range(1, num_top + 1) for name in (f"top{place}", f"p{place}")]
    return [
        "file",
        "prediction",
        "confidence",
        *places,
        "unfamiliar",
        "score",
        "cropped",
        *more,
        "error",
        *(f"p_{name}" for name in each_class),
    ]


def row(item: Prediction, num_top: int, each_class: Sequence[str] = ()) -> list[str]:
    """Return the cells of one picture, in the order of `header`."""
    name = item.photo.name
    # A spreadsheet runs a cell that starts like a formula; "./" before a relative path names the same file.
    name = os.path.join(".", name) if name.startswith(FORMULA) else name
    if not item.top or item.photo.cutout is None:
        return [name, *[""] * (2 + 2 * num_top), "", "", "", *item.trust, item.photo.error, *("" for _ in each_class)]
    best = [item.top[0], *item.top]
    cells = [cell for label, probability in best for cell in (label, f"{probability:.6f}")]
    cropped = "yes" if item.photo.cutout.box else "no"
    chances = [f"{chance:.9g}" for _, chance in zip(each_class, item.probabilities, strict=False)]
    return [name, *cells, "yes" if item.unfamiliar else "no", f"{item.score:.6f}", cropped, *item.trust, "", *chances]


def prediction_line(item: Prediction) -> str:
    """Say what a picture is, on one line."""
    label, probability = item.top[0]
    flag = ", unfamiliar" * item.unfamiliar
    return f"{one_line(item.photo.name)}  {one_line(label)} {100 * probability:.0f} %{flag}"


def captions(names: Sequence[str]) -> list[str]:
    """Return what the sheet calls each file: by its name, with its folder where another has the same."""
    files = [os.path.basename(name) or name for name in names]
    seen = Counter(files)
    return [
        file if seen[file] == 1 else os.path.join(*Path(name).parts[-2:])
        for name, file in zip(names, files, strict=True)
    ]


def sheet_cell(item: Prediction, columns: Sequence[str] = (), caption: str = "") -> Cell:
    """Return the cell of the sheet for one picture.

    Args:
        item: the picture.
        columns: those of `Trust`, told as the CSV has them.
        caption: see `captions`; empty: of this file alone.
    """
    lines = [(caption or captions([item.photo.name])[0], GREY)]
    asked = [pair for pair in zip(columns, item.trust, strict=True) if pair[1]]
    trust = [(f"{name}: {said}", ORANGE if (name, said) == ("decision", PERSON) else GREY) for name, said in asked]
    if item.photo.cutout is None:
        return Cell(image=item.photo.image, box=None, view=None, lines=[*lines, (item.photo.error, ORANGE), *trust])
    shares = [f"{label} {100 * probability:.0f} %" for label, probability in item.top[:2]]
    lines += [(shares[0], BLACK), (", ".join(["then " + share for share in shares[1:]]), GREY)]
    lines += trust
    lines += [(f"unfamiliar ({item.score:.2f})", ORANGE)] if item.unfamiliar else []
    cutout, drops = item.photo.cutout, item.drops
    lines += [(f"covered: down by {100 * max(0.0, float(drops.max())):.0f} points", GREY)] if drops is not None else []
    return Cell(image=item.photo.image, box=cutout.box, view=cutout.view, drops=drops, lines=lines)


def write_predictions(
    items: Iterable[Prediction],
    args: argparse.Namespace,
    title: str,
    columns: Sequence[str] = (),
    each_class: Sequence[str] = (),
) -> Counter[str]:
    """Write predictions.csv, then predictions.png; each appears whole or not at all. For the columns see `header`.

    Returns:
        How many are `predicted`, of those `unfamiliar` and `uncropped` (no object cut out), and `errors`.

    Raises:
        KeyboardInterrupt: at Ctrl-C, once predictions.csv holds what is done.
    """
    counts = Counter(predicted=0, unfamiliar=0, uncropped=0, errors=0)
    rows: list[list[str]] = []
    shown: list[Prediction] = []
    with keep_at_interrupt() as interrupted:
        for item in items:
            rows.append(row(item, args.top, each_class))
            counts["predicted" if item.top else "errors"] += 1
            if not item.top and counts["errors"] <= NAMED and not args.json:
                logger.warning("%s: %s", one_line(item.photo.name), item.photo.error)
            if item.top and counts["predicted"] <= SAID and not args.json:
                print(prediction_line(item))
            counts["unfamiliar"] += item.unfamiliar
            counts["uncropped"] += item.photo.cutout is not None and item.photo.cutout.box is None
            if len(shown) < args.sheet:  # pictures are kept for the sheet only
                shown.append(item)
    path = args.output / "predictions.csv"
    if rows or not interrupted:
        write_atomic(path, csv_bytes(header(args.top, columns, each_class), rows))
    if interrupted:
        raise KeyboardInterrupt(f"{path} holds the {len(rows):,} pictures that are done" if rows else "")
    if shown:
        part = f", the first {len(shown)} of {len(rows):,}" if len(rows) > len(shown) else ""
        called = captions([item.photo.name for item in shown])
        cells = [sheet_cell(item, columns, caption) for item, caption in zip(shown, called, strict=True)]
        write_atomic(args.output / "predictions.png", draw_sheet(cells, title + part))
    else:
        remove_own(args.output / "predictions.png")  # of other pictures
    return counts
