"""A batch of pictures: read in parts, tested for drift, reported."""

import argparse
import json
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmnist.apps.monitor.drift import MIN_PICTURES, SIGNALS, BatchSums, DriftTest, by_class, drift_test
from fmnist.apps.novelty import MIN_CALIBRATION, open_reference
from fmnist.apps.views import count_kinds, read_photos, stack_views
from fmnist.data.idx import MAX_FILE_BYTES, read_idx
from fmnist.data.info import DataInfo
from fmnist.data.photos import find_pictures
from fmnist.runtime.console import counted, one_line
from fmnist.trained import open_trained

CHUNK = 256  # images of an array at a time
UNREADABLE = 0.1  # share of unreadable files above which they are themselves an alert


def monitor(args: argparse.Namespace) -> int:
    """Test a batch against the run's validation images, print the result and return the exit status.

    Raises:
        ValueError: one line, for a run or a batch that cannot be used.
    """
    trained = open_trained(args.run, args.device, args.batch_size)
    reference = open_reference(trained, args.root, own=True)
    if len(reference.val) < MIN_CALIBRATION:
        raise ValueError(
            f"{trained.name} has {len(reference.val)} validation images: too few to say what is usual; valid: "
            f"{MIN_CALIBRATION} and more (data.val_size, or data.holdout of a folder without parts)"
        )
    batch = BatchSums(reference)
    errors, left_out = Counter[str](), Counter[str]()
    for images, failed in read_batch(args.batch, trained.info, left_out):
        errors += failed
        if len(images):
            batch.add(*trained(images))
    tested = drift_test(batch, args.false_alarms) if batch.num_images >= MIN_PICTURES else None
    result = report(batch, tested, errors, left_out, trained.class_names, args)
    print(json.dumps(result, indent=2, allow_nan=False) if args.json else result["line"])
    return {"fine": 0, "alert": 1, "too few": 2}[result["verdict"]]


def read_batch(path: Path, info: DataInfo, left_out: Counter[str]) -> Iterator[tuple[Tensor, Counter[str]]]:
    """Read a batch in parts.

    Args:
        path: a folder of pictures, an IDX file, .npy or .npz.
        info: the run's data set.
        left_out: counts what a folder holds beside pictures, by suffix.

    Yields:
        uint8 [N, H, W] or [N, 3, H, W] on the CPU, and how many pictures beside them could not be read, by suffix.

    Raises:
        ValueError: one line, for a path that is none of them, or an array of another shape or type.
    """
    if path.is_dir():
        for photos in read_photos(find_pictures([str(path)], left_out), info):
            failed = (Path(photo.name).suffix.lower() or "no suffix" for photo in photos if photo.cutout is None)
            yield stack_views(photos, info), Counter(failed)
        return
    images = _read_array(path) if path.suffix in (".npy", ".npz") else read_idx(path)[0]
    channels, height, width = info.shape
    found, sides = list(images.shape), f"{height}, {width}"
    if channels > 1 and found[-1:] == [channels] and found[1:2] != [channels]:
        images = images.movedim(-1, 1)  # as data sets in .npz files have their colours
    if images.dtype != torch.uint8 or images.shape[1:] != info.image_shape:
        kind = str(images.dtype).removeprefix("torch.")
        valid = f"[N, {sides}]" if channels == 1 else f"[N, {channels}, {sides}] or [N, {sides}, {channels}]"
        raise ValueError(f"{path}: {kind} {found}, expected uint8 {valid}")
    for part in images.split(CHUNK):
        yield part, Counter()


def _read_array(path: Path) -> Tensor:
    """Read .npy, or .npz with one array or one called images; never a pickle."""
    try:
        if zipfile.is_zipfile(path):  # whatever its name: numpy goes by the content too
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
        raise ValueError(f"{path}: {one_line(error) or 'cannot be read'}") from None


def report(
    batch: BatchSums,
    tested: DriftTest | None,
    unreadable: Counter[str],
    left_out: Counter[str],
    class_names: tuple[str, ...],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Return what --json prints; `verdict` is fine, alert or too few, and `line` says it to people."""
    errors, number = unreadable.total(), counted(batch.num_images, "picture")
    number += f", {errors:,} unreadable ({count_kinds(unreadable)})" if errors else ""
    number += f", left out {count_kinds(left_out)}" if left_out else ""
    result: dict[str, Any] = {
        "verdict": "too few",
        "line": f"too few: {number}; the drift test needs at least {MIN_PICTURES}",
        "run": str(args.run),
        "batch": str(args.batch),
        "num_images": batch.num_images,
        "num_errors": errors,
        "unreadable": unreadable,
        "left_out": left_out,
        "false_alarm_rate": args.false_alarms,
    }
    if tested is None:
        return result
    signals = zip(SIGNALS, tested.values, tested.limits, tested.p, tested.alarms, strict=True)
    result["signals"] = {
        name: {"value": float(value), "limit": float(limit), "p": float(p), "alarm": bool(alarm)}
        for name, value, limit, p, alarm in signals
    }
    classes = len(class_names)
    for key, means in (("batch_means", batch.mean), ("usual_means", tested.usual)):
        mix = dict(zip(class_names, map(float, means[:classes]), strict=True))
        result[key] = {"class_mix": mix, "confidence": float(means[classes]), "unfamiliar": float(means[classes + 1])}
    found = reasons(batch.mean, tested, class_names)
    if errors > UNREADABLE * (errors + batch.num_images):
        found.append(f"more than {UNREADABLE:.0%} of the files unreadable")
    result["verdict"] = "alert" if found else "fine"
    like = f"like the training data (p {tested.joint_p:.2g}, an alarm from {args.false_alarms:g} down)"
    result["line"] = f"{result['verdict']}: {number}: {'; '.join(found) or like}"
    return result


def reasons(mean: np.ndarray, tested: DriftTest, class_names: tuple[str, ...]) -> list[str]:
    """Say each alarm in words, with the batch's number and the usual one."""
    usual, classes = tested.usual, len(class_names)
    most = int(by_class(mean - usual, usual, classes).argmax())
    words = {
        "class mix": f"class mix ({class_names[most]} {mean[most]:.1%}, usually {usual[most]:.1%})",
        "confidence": f"mean confidence {mean[classes]:.4f} (usually {usual[classes]:.4f})",
        "unfamiliar": f"{mean[classes + 1]:.1%} unfamiliar (usually {usual[classes + 1]:.1%})",
        "drift": f"features drifted {tested.values[3]:.3g} (usually at most {tested.limits[3]:.3g})",
    }
    return [words[name] for name, alarm in zip(SIGNALS, tested.alarms, strict=True) if alarm]
