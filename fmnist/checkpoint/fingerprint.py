"""What decides a run's result beside its options: the images, and the weights that it began from."""

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from fmnist.runtime.files import cannot_read, read_json, sha256_of, write_atomic

FINGERPRINT = "fingerprint.json"
CLASSES = "class names in data.root"
WEIGHTS, CORRECTIONS = "model.weights", "data.corrections"
IMAGES = {"train": "training images in data.root", "val": "validation images in data.root",
          "test": "test images in data.root"}  # fmt: skip


def fingerprint(
    images: Mapping[str, str], class_names: Sequence[str], weights: str | None, corrections: str = "none"
) -> dict[str, str]:
    """Return the digests of what a run is made of, each under the name that a message gives it.

    Args:
        images: digests of train, val and test.
        class_names: in label order.
        weights: `model.weights`; None where the run begins from none, or from timm's own.
        corrections: digest of what `data.corrections` changes.

    Raises:
        ValueError: there is no such file of weights.
    """
    found = {IMAGES[name]: digest for name, digest in images.items()}
    found[CLASSES] = sha256(json.dumps(list(class_names)).encode()).hexdigest()
    return found | {CORRECTIONS: corrections, WEIGHTS: "none" if weights is None else digest_of_weights(weights)}


def digest_of_weights(weights: str) -> str:
    """Return the sha256 of a file of weights to begin from: its bytes count, not its path."""
    try:
        return sha256_of(Path(weights))
    except OSError as error:
        raise cannot_read(Path(f"{WEIGHTS}: {weights}"), error) from None


def keep_fingerprint(found: Mapping[str, str], directory: Path) -> None:
    """Write a run's fingerprint into its directory."""
    write_atomic(directory / FINGERPRINT, json.dumps(dict(found), indent=2) + "\n")


def kept_fingerprint(directory: Path) -> dict[str, str]:
    """Read a run's fingerprint; empty for a run from before there was one, which is compared with nothing.

    Raises:
        ValueError: it is there and cannot be read.
    """
    path = directory / FINGERPRINT
    return {name: str(value) for name, value in read_json(path).items()} if path.exists() else {}
