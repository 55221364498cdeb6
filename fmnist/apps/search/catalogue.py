"""A catalogue to search in: pictures, what the model makes of them, and whose weights made it."""

import io
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from fmnist.data.fashion_mnist import load_split
from fmnist.data.photos import find_pictures, read_view
from fmnist.evaluation.features import compute_features, features_of
from fmnist.runtime.files import write_atomic
from fmnist.trained import Trained

logger = logging.getLogger("fmnist")
FORMAT = 1
UNKNOWN = -1  # the label of a picture from a folder
Source = Literal["train", "val", "test", "all"]
SOURCES: tuple[Source, ...] = get_args(Source)


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """Items to search in, on the CPU.

    Attributes:
        features: float16 [N, D], penultimate features, each of length 1 (to rounding).
        labels: int16 [N], the class, or UNKNOWN.
        predictions: int16 [N], the class the model sees.
        names: N times `split:number`, or a file's path below its folder.
        images: uint8 [N, H, W], what the model was given.
        run: name of the run whose weights made the features.
        run_directory: where that run was; a query opens it again.
        weights_sha256: of the weights.
        source: the split, or the folder.
    """

    features: Tensor
    labels: Tensor
    predictions: Tensor
    names: list[str]
    images: Tensor
    run: str
    run_directory: str
    weights_sha256: str
    source: str

    def __len__(self) -> int:
        return len(self.names)


def read_split(trained: Trained, split: Literal["train", "val", "test"], root: str | None) -> tuple[Tensor, Tensor]:
    """Read a split as the run divides the images: uint8 [N, H, W] images and int64 [N] labels.

    Raises:
        ValueError: the data cannot be had, or the run kept no validation images.
    """
    data = trained.cfg.data
    if split == "val" and data.val_size == 0:
        raise ValueError(f"{trained.name} was trained with data.val_size 0: it has no validation images")
    return load_split(split, root or data.root, data.val_size)


def split_catalogue(trained: Trained, source: Source, root: str | None = None) -> Catalogue:
    """Make a catalogue of a split, or of all three; the features are kept beside the run.

    Args:
        trained: the run.
        source: train, val, test or all.
        root: folder with the IDX files; None takes the run's.

    Raises:
        ValueError: images that cannot be had, or weights that give features that are not finite.
    """
    splits: tuple[Literal["train", "val", "test"], ...] = ("train", "val", "test") if source == "all" else (source,)
    loaded = {split: read_split(trained, split, root) for split in splits}
    found = [features_of(trained, split, images) for split, (images, _) in loaded.items()]
    images, labels = (torch.cat(tensors) for tensors in zip(*loaded.values(), strict=True))
    return Catalogue(
        features=torch.cat([part.features for part in found]),
        labels=labels.short(),
        predictions=torch.cat([part.logits for part in found]).argmax(1).short(),
        names=[f"{split}:{number}" for split, (_, part) in loaded.items() for number in range(len(part))],
        images=images,
        source=source,
        **_made_by(trained),
    )


def folder_catalogue(trained: Trained, folder: Path) -> Catalogue:
    """Make a catalogue of the pictures in a folder and those below it; one that cannot be read is left out.

    Raises:
        ValueError: no such folder, no picture in it that can be read, or features that are not finite.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    views, names = [], []
    found = list(find_pictures([str(folder)]))
    if found[0][0] == str(folder):  # the folder itself: nothing is in it
        raise ValueError(": ".join(found[0]))
    for name, error in found:
        try:
            if error:
                raise ValueError(f"{name}: {error}")
            views.append(read_view(name))
        except ValueError as reason:
            logger.warning("left out: %s", reason)
        else:
            names.append(Path(name).relative_to(folder).as_posix())
    if not views:
        raise ValueError(f"{folder} holds no picture that can be read")
    images = torch.stack(views)
    made = compute_features(trained, images)
    return Catalogue(
        features=made.features,
        labels=torch.full((len(images),), UNKNOWN, dtype=torch.int16),
        predictions=made.logits.argmax(1).short(),
        names=names,
        images=images,
        source=str(folder.resolve()),
        **_made_by(trained),
    )


def _made_by(trained: Trained) -> dict[str, Any]:
    return {
        "run": trained.name,
        "run_directory": str(trained.weights.parent.resolve()),  # the run's, or the checkpoint's
        "weights_sha256": trained.digest,
    }


ARRAYS = ("features", "labels", "predictions", "images")
WORDS = ("run", "run_directory", "weights_sha256", "source")


def index_file(trained: Trained) -> Path:
    """Return where an index of these weights is kept."""
    return trained.folder("search") / "index.npz"


def save_catalogue(catalogue: Catalogue, path: Path) -> None:
    """Write a catalogue as .npz, whole or not at all: arrays and one JSON text, no pickle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"format": FORMAT} | {word: getattr(catalogue, word) for word in WORDS}
    arrays = {name: getattr(catalogue, name).numpy() for name in ARRAYS}
    # Names as JSON too: an array of strings gives each one the room of the longest.
    texts = {"names": json.dumps(catalogue.names), "about": json.dumps(about)}
    arrays |= {key: np.frombuffer(text.encode(), dtype=np.uint8) for key, text in texts.items()}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_atomic(path, buffer.getvalue())


def load_catalogue(path: Path) -> Catalogue:
    """Read what `save_catalogue` wrote.

    Raises:
        ValueError: one line, for a file that is missing, damaged, or not a catalogue of this version.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in ARRAYS}
            names, about = (json.loads(file[key].tobytes()) for key in ("names", "about"))
        _check(arrays, names, about)
    except FileNotFoundError:
        raise ValueError(f"there is no index {path}") from None
    except (OSError, EOFError, KeyError, TypeError, ValueError, AttributeError, BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not an index of this version: {reason}") from None
    fields: dict[str, Any] = {"names": names, **arrays} | {word: about[word] for word in WORDS}
    return Catalogue(**fields)


def _check(arrays: dict[str, Tensor], names: Any, about: dict[str, Any]) -> None:
    if about["format"] != FORMAT:
        raise ValueError(f"format {about['format']}, not {FORMAT}")
    shapes = {name: (str(array.dtype).removeprefix("torch."), array.ndim) for name, array in arrays.items()}
    wanted = {"features": ("float16", 2), "labels": ("int16", 1), "predictions": ("int16", 1), "images": ("uint8", 3)}
    if shapes != wanted or len({len(names), *map(len, arrays.values())}) != 1 or not names:
        raise ValueError(f"its arrays are {shapes} with {len(names)} names")
    if not all(isinstance(text, str) for text in (*names, *(about[word] for word in WORDS))):
        raise ValueError("a name in it is not a text")
    low, high = (int(bound) for bound in torch.cat([arrays["labels"], arrays["predictions"]]).aminmax())
    if low < UNKNOWN or not arrays["features"].isfinite().all():
        raise ValueError(f"classes from {low} to {high}, or features that are not finite")


def check_same_weights(catalogue: Catalogue, trained: Trained, path: Path) -> None:
    """Refuse a catalogue whose features another model made: its similarities would mean nothing.

    Raises:
        ValueError: one line with both names and the way out.
    """
    sha256 = trained.digest
    if sha256 != catalogue.weights_sha256:
        raise ValueError(
            f"{path} was made by other weights ({catalogue.run}, sha256 {catalogue.weights_sha256[:12]}) than those of "
            f"{trained.name} (sha256 {sha256[:12]}); make it again: fmnist search index"
        )
