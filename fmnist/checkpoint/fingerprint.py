"""What decides a run's result beside its options: the images, and the weights that it began from."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from fmnist.checkpoint.contents import read_meta
from fmnist.checkpoint.run_directory import SUMMARY
from fmnist.checkpoint.start_weights import find_start_weights
from fmnist.runtime.console import one_line
from fmnist.runtime.files import cannot_read, read_json, sha256_of, write_json

FINGERPRINT, IN_SUMMARY = "fingerprint.json", "fingerprint"
CLASSES, STATISTICS = "class names in data.root", "mean and std in data.root"
WEIGHTS, CORRECTIONS = "model.weights", "data.corrections"
IMAGES = {"train": "training images in data.root", "val": "validation images in data.root",
          "test": "test images in data.root"}  # fmt: skip
IN_DATA_FILE = {CLASSES: "class_names"} | {images: f"num_{name}" for name, images in IMAGES.items()}


def fingerprint(
    images: Mapping[str, str],
    class_names: Sequence[str],
    statistics: Sequence[float],
    weights: str | None,
    corrections: str = "none",
) -> dict[str, str]:
    """Return the digests of what a run is made of, each under the name that a message gives it.

    Args:
        images: digests of train, val and test.
        class_names: in label order.
        statistics: mean and std, which are those of all training images, also where `data.limit` leaves some out.
        weights: `model.weights`; None where the run begins from none, or from timm's own.
        corrections: digest of what `data.corrections` changes.

    Raises:
        ValueError: there is no such file of weights.
    """
    found = {IMAGES[name]: digest for name, digest in images.items()}
    found |= about_data(class_names, statistics)
    return found | {CORRECTIONS: corrections, WEIGHTS: "none" if weights is None else digest_of_weights(weights)}


def about_data(class_names: Sequence[str], statistics: Sequence[float]) -> dict[str, str]:
    """Return the digests of what data.json says and a model depends on; see `fingerprint`."""
    told = {CLASSES: class_names, STATISTICS: statistics}
    return {name: sha256(json.dumps(list(values)).encode()).hexdigest() for name, values in told.items()}


def what_changed(
    before: Mapping[str, str], now: Mapping[str, str], about: Mapping[str, Any], about_now: Mapping[str, Any]
) -> list[str]:
    """Name what differs between two fingerprints: classes and counts where they say it, else digests.

    Args:
        before, now: fingerprints; what only one of them names is not compared.
        about, about_now: what data.json says of each; empty where that is not known.
    """
    differ = [name for name in before if before[name] != now.get(name, before[name])]
    if IMAGES["train"] in differ and STATISTICS in differ:  # which follow from the images
        differ.remove(STATISTICS)
    lines = []
    for name in sorted(differ, key=lambda name: name != CLASSES):
        old, new = (content.get(IN_DATA_FILE.get(name, "")) for content in (about, about_now))
        if isinstance(old, Sequence) and isinstance(new, Sequence):
            lines.append(f"{name}: {class_changes(old, new)}")
        elif isinstance(old, int) and isinstance(new, int) and old != new:
            lines.append(f"{name}: {old:,} before, now {new:,}")
        else:
            same = f" ({old:,} as before, of other content or in another order)" if isinstance(old, int) else ""
            lines.append(f"{name} was {short(before[name])}, now {short(now[name])}{same}")
    return lines


def class_changes(before: Sequence[str], now: Sequence[str]) -> str:
    """Say how two lists of class names differ."""
    lost, new = ([str(name) for name in one if name not in other] for one, other in ((before, now), (now, before)))
    named = [f"{what} {', '.join(names):.200}" for what, names in (("without", lost), ("with", new)) if names]
    return one_line(" and ".join(named)) or "the same in another order"


def short(digest: str) -> str:
    """Return a digest as a message shows it."""
    return digest if len(digest) != 64 else f"sha256 {digest[:12]}"


def digest_of_weights(weights: str) -> str:
    """Return the sha256 of the file of weights to begin from, a run's or another: its bytes count, not its path."""
    try:
        return sha256_of(find_start_weights(weights).file if os.path.isdir(weights) else Path(weights))
    except OSError as error:
        raise cannot_read(Path(f"{WEIGHTS}: {weights}"), error) from None


def keep_fingerprint(found: Mapping[str, str], directory: Path) -> None:
    """Write a run's fingerprint into its directory."""
    write_json(directory / FINGERPRINT, dict(found))


def kept_fingerprint(directory: Path) -> dict[str, str]:
    """Read a run's fingerprint from wherever it stands: its own file, summary.json, the newest checkpoint.

    Returns:
        Every digest that one of them names; empty for a run from before there were any, which is compared with nothing.

    Raises:
        ValueError: its file cannot be read, or summary.json names another digest.
    """
    path = directory / FINGERPRINT
    kept = read_json(path) if path.exists() else {}
    try:
        summary = _digests(read_json(directory / SUMMARY).get(IN_SUMMARY))
    except ValueError:  # none, or no summary: whoever needs it says so
        summary = {}
    if differ := [name for name in summary if kept.get(name, summary[name]) != summary[name]]:
        raise ValueError(f"{path} and {SUMMARY} name different {', '.join(differ)}: one of them is of another run")
    return _of_newest_checkpoint(directory) | summary | {name: str(value) for name, value in kept.items()}


def _of_newest_checkpoint(directory: Path) -> dict[str, str]:
    """Return what the newest checkpoint whose state can be read says; whoever resumes from it verifies it."""
    for path in sorted((directory / "checkpoints").glob("step_*"), reverse=True):
        with suppress(ValueError):
            return _digests(read_meta(path)["config"])
    return {}


def _digests(found: object) -> dict[str, str]:
    """Return what is a digest: checkpoints from before the fingerprint may hold a path under the same name."""
    known = found if isinstance(found, dict) else {}
    names = (*IMAGES.values(), CLASSES, STATISTICS, CORRECTIONS, WEIGHTS)
    return {name: known[name] for name in names if re.fullmatch("none|[0-9a-f]{64}", str(known.get(name)))}
