"""Compare incoming pictures with the training data: python -m fmnist.apps.monitor RUN BATCH [--json FILE]

Four signals: the mix of predicted classes, the mean confidence, the share of pictures unlike the training images, and
the drift of the mean features. Together they raise a false alarm for one batch in a hundred (--false_alarms 0.01).
One line says whether to worry; the exit status is 0 fine, 1 worry, 2 a mistake or too few pictures to judge.

in a crontab: 0 6 * * * python -m fmnist.apps.monitor runs/cnn incoming/ --json monitor.json || mail -s worry me
"""

import argparse
import json
import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmnist.apps.monitor.drift import MIN_PICTURES, SIGNALS, SMALLEST_RATE, BatchSums, Judgement, judge
from fmnist.apps.novelty import open_reference
from fmnist.data.fashion_mnist import CLASS_NAMES, IMAGE_SIZE
from fmnist.data.idx import MAX_FILE_BYTES, read_idx
from fmnist.data.photos import find_pictures, read_photo
from fmnist.runtime.console import log_to_console, one_line_errors
from fmnist.runtime.files import write_atomic
from fmnist.trained import open_trained

CHUNK = 256
UNREADABLE = 0.1  # share of the files above which their errors are themselves a reason to worry


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fmnist.apps.monitor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="what train.py wrote: a run directory or a checkpoint")
    parser.add_argument(
        "batch",
        type=Path,
        metavar="BATCH",
        help="folder of pictures; or an IDX file (.gz too), .npy or .npz of uint8 [N, 28, 28], light on black",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all the numbers here")
    parser.add_argument("--false_alarms", type=float, default=0.01, help="per batch that is like the training data")
    parser.add_argument("--device", help="as torch names it (default: the accelerator, else the CPU)")
    parser.add_argument("--data.root", dest="root", help="folder of Fashion-MNIST for the calibration (the run's)")
    args = parser.parse_args(argv)
    if not SMALLEST_RATE <= args.false_alarms <= 0.5:
        parser.error(f"--false_alarms is {args.false_alarms}; legal: {SMALLEST_RATE} to 0.5")
    return args


def read_batch(path: Path) -> Iterator[tuple[Tensor, int]]:
    """Read a batch in parts.

    Args:
        path: a folder of pictures, an IDX file, .npy or .npz.

    Yields:
        uint8 [N, 28, 28] on the CPU, and how many files beside them could not be read.

    Raises:
        ValueError: one line, for a path that is none of them, or an array of another shape or type.
    """
    if path.is_dir():
        pictures = find_pictures([str(path)])
        while chunk := list(islice(pictures, CHUNK)):
            views = []
            for name, error in chunk:
                photo = None if error else read_photo(name)
                if photo is not None and photo.cutout is not None:
                    views.append(photo.cutout.view)
            yield _stack(views), len(chunk) - len(views)
        return
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder")
    images = _read_array(path) if path.suffix in (".npy", ".npz") else read_idx(path)[0]
    if images.dtype != torch.uint8 or images.ndim != 3 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE):
        kind = str(images.dtype).removeprefix("torch.")
        raise ValueError(f"{path}: {kind} {list(images.shape)}, expected uint8 [N, {IMAGE_SIZE}, {IMAGE_SIZE}]")
    for part in images.split(CHUNK):
        yield part, 0


def _stack(views: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(views)) if views else torch.zeros(0, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)


def _read_array(path: Path) -> Tensor:
    """Read .npy, or .npz with one array or one called images; never a pickle."""
    try:
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                size = sum(item.file_size for item in archive.infolist())  # what it says it unpacks to
        else:
            size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ValueError(f"{size:,} bytes, expected at most {MAX_FILE_BYTES:,}")
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.ndarray):
            with loaded:
                names = loaded.files
                if "images" not in names and len(names) != 1:
                    raise ValueError(f"holds {', '.join(names) or 'nothing'}; expected one array, or one called images")
                loaded = loaded["images" if "images" in names else names[0]]
        return torch.from_numpy(np.ascontiguousarray(loaded))
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split()) or 'cannot be read'}") from None


def report(batch: BatchSums, judgement: Judgement | None, errors: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return what the JSON holds; `verdict` is fine, worry or too few, and `line` says it to people."""
    number = f"{batch.num_images:,} pictures" + (f", {errors:,} unreadable" if errors else "")
    result: dict[str, Any] = {
        "verdict": "too few",
        "line": f"too few: {number}; at least {MIN_PICTURES} are needed to judge a batch",
        "run": str(args.run),
        "batch": str(args.batch),
        "num_images": batch.num_images,
        "num_errors": errors,
        "false_alarm_rate": args.false_alarms,
    }
    if judgement is None:
        return result
    classes = len(CLASS_NAMES)
    mean, usual = batch.mean, judgement.usual
    signals = zip(SIGNALS, judgement.values, judgement.limits, judgement.p, judgement.alarms, strict=True)
    result["signals"] = {
        name: {"value": float(value), "limit": float(limit), "p": float(p), "alarm": bool(alarm)}
        for name, value, limit, p, alarm in signals
    }
    for key, means in (("batch_means", mean), ("usual_means", usual)):
        mix = dict(zip(CLASS_NAMES, map(float, means[:classes]), strict=True))
        result[key] = {"class_mix": mix, "confidence": float(means[classes]), "unlike": float(means[classes + 1])}
    most = int(np.abs(mean - usual)[:classes].argmax())
    reasons = {
        "class mix": f"class mix ({CLASS_NAMES[most]} {mean[most]:.0%}, usually {usual[most]:.0%})",
        "confidence": f"mean confidence {mean[classes]:.2f} (usually {usual[classes]:.2f})",
        "unlike": f"{mean[classes + 1]:.0%} unlike the training images (usually {usual[classes + 1]:.0%})",
        "drift": f"features drifted {judgement.values[3]:.3g} (at most {judgement.limits[3]:.3g} is usual)",
    }
    found = [reasons[name] for name, alarm in zip(SIGNALS, judgement.alarms, strict=True) if alarm]
    if errors > UNREADABLE * (errors + batch.num_images):
        found.append(f"more than {UNREADABLE:.0%} of the files unreadable")
    result["verdict"] = "worry" if found else "fine"
    like = f"like the training data (smallest p {judgement.p.min():.2g}, false alarms {args.false_alarms:g})"
    result["line"] = f"{result['verdict']}: {number}: {'; '.join(found) or like}"
    return result


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    log_to_console()
    with one_line_errors("python -m fmnist.apps.monitor"):
        if not args.batch.exists():
            raise ValueError(f"{args.batch}: no such file or folder")
        trained = open_trained(args.run, args.device)
        batch, errors = BatchSums(open_reference(trained, args.root)), 0
        for images, failed in read_batch(args.batch):
            errors += failed
            if len(images):
                batch.add(*trained(images))
        judgement = judge(batch, args.false_alarms) if batch.num_images >= MIN_PICTURES else None
        result = report(batch, judgement, errors, args)
        if args.json is not None:
            try:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(args.json, (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())
            except OSError as error:
                raise ValueError(f"--json is {args.json}: {error.strerror}") from None
    print(result["line"])
    raise SystemExit({"fine": 0, "worry": 1, "too few": 2}[result["verdict"]])


if __name__ == "__main__":
    main()
