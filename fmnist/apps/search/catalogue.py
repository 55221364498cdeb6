"""A catalogue to search in: pictures, what the model makes of them, and whose weights made it, in one file."""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from fmnist.data.fashion_mnist import NUM_CLASSES, load_split
from fmnist.data.photos import find_pictures, read_view
from fmnist.network import Trained
from fmnist.runtime.files import sha256_of
from fmnist.trained import Predictor

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
        weights_sha256: of the weights file.
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


def read_split(predictor: Predictor, source: Source, root: str | None) -> tuple[Tensor, Tensor, list[str]]:
    """Read a split, or all three, as the run divides the images.

    Args:
        predictor: of the run, whose config says how many images are for validation.
        source: train, val, test or all.
        root: folder with the IDX files; none is the run's.

    Returns:
        uint8 [N, H, W] images, int64 [N] labels and N names `split:number`, numbered as in predictions.csv.

    Raises:
        ValueError: the data cannot be had, or the run kept no validation images.
    """
    data = predictor.trained.cfg.data
    if source == "val" and data.val_size == 0:
        raise ValueError(f"{predictor.trained.name} was trained with data.val_size 0: it has no validation images")
    parts: tuple[Literal["train", "val", "test"], ...] = ("train", "val", "test") if source == "all" else (source,)
    loaded = {part: load_split(part, root or data.root, data.val_size) for part in parts}
    names = [f"{part}:{number}" for part, (_, labels) in loaded.items() for number in range(len(labels))]
    images, labels = (torch.cat(tensors) for tensors in zip(*loaded.values(), strict=True))
    return images, labels, names


def read_folder(folder: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Read the pictures in a folder and those below it; one that cannot be read is left out with a warning.

    Returns:
        uint8 [N, 28, 28] images, int64 [N] labels, all UNKNOWN, and the N paths below the folder.

    Raises:
        ValueError: no such folder, or no picture in it that can be read.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    images, names = [], []
    found = list(find_pictures([str(folder)]))
    if found[0][0] == str(folder):  # the folder itself: nothing is in it
        raise ValueError(": ".join(found[0]))
    for name, error in found:
        try:
            if error:
                raise ValueError(f"{name}: {error}")
            images.append(read_view(name))
        except ValueError as reason:
            logger.warning("left out: %s", reason)
        else:
            names.append(Path(name).relative_to(folder).as_posix())
    if not images:
        raise ValueError(f"{folder} holds no picture that can be read")
    return torch.stack(images), torch.full((len(images),), UNKNOWN), names


def embed(predictor: Predictor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return features float16 [N, D] of length 1, as a catalogue holds them, and predicted classes int16 [N].

    Args:
        predictor: gives the penultimate features.
        images: uint8 [N, H, W].

    Raises:
        ValueError: a feature is not finite.
    """
    features, predictions = [], []
    for part in tqdm(images.split(2000), desc="images", unit_scale=2000, disable=None, leave=False):
        logits, part_features = predictor(part)
        features.append(F.normalize(part_features, dim=1).half())
        predictions.append(logits.argmax(1).short())
    result = torch.cat(features)
    if not result.isfinite().all():
        raise ValueError(f"{predictor.trained.weights} gives features that are not finite")
    return result, torch.cat(predictions)


def build_catalogue(predictor: Predictor, source: Source | Path, root: str | None = None) -> Catalogue:
    """Read the pictures of a split or a folder and compute their features.

    Args:
        predictor: the run.
        source: a split's name, or a folder of pictures.
        root: folder with the IDX files; none is the run's.

    Raises:
        ValueError: pictures that cannot be read, or weights that give no finite features.
    """
    images, labels, names = read_folder(source) if isinstance(source, Path) else read_split(predictor, source, root)
    features, predictions = embed(predictor, images)
    trained = predictor.trained
    return Catalogue(
        features=features,
        labels=labels.short(),
        predictions=predictions,
        names=names,
        images=images,
        run=trained.name,
        run_directory=str(trained.weights.parent.resolve()),  # the run's, or the checkpoint's
        weights_sha256=sha256_of(trained.weights),
        source=str(source.resolve()) if isinstance(source, Path) else source,
    )


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
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with part.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


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
    if low < UNKNOWN or high >= NUM_CLASSES or not arrays["features"].isfinite().all():
        raise ValueError(f"classes from {low} to {high}, or features that are not finite")


def check_same_weights(catalogue: Catalogue, predictor: Predictor, path: Path) -> None:
    """Refuse a catalogue whose features another model made: its similarities would mean nothing.

    Raises:
        ValueError: one line with both names and the way out.
    """
    sha256 = sha256_of(predictor.trained.weights)
    if sha256 != catalogue.weights_sha256:
        raise ValueError(
            f"{path} was made by other weights ({catalogue.run}, sha256 {catalogue.weights_sha256[:12]}) than those of "
            f"{predictor.trained.name} (sha256 {sha256[:12]}); make it again: python -m fmnist.apps.search index"
        )
