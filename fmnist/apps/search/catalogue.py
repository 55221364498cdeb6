"""The images to search in, with their features: a split of the data set, or the pictures in a folder."""

import itertools
import json
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fmnist.apps.views import count_kinds, read_photos
from fmnist.data.info import SplitName
from fmnist.data.photos import find_pictures
from fmnist.evaluation.features import compute_features, features_of
from fmnist.runtime.console import one_line
from fmnist.runtime.files import write_atomic
from fmnist.trained import Trained

logger = logging.getLogger("fmnist")
FORMAT = "2"
UNKNOWN = -1  # the label of a picture from a folder
TENSORS = {"features": torch.float16, "predictions": torch.int32, "images": torch.uint8}


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """Images to search in, on the CPU.

    Attributes:
        features: float16 [N, D], penultimate features, each of length 1 (to rounding).
        labels: int64 [N], the class, or UNKNOWN.
        predictions: int32 [N], the predicted class.
        names: N times `split:number`, the position in the data set's own file, or a path below its folder.
        images: uint8 [N, H, W] or [N, 3, H, W], what the model was given.
        class_names: in label order.
        run: name of the run whose weights made the features.
        source: the split, `all`, or the folder.
        files: of a data set that is a folder of pictures: N times the file; empty for others.
    """

    features: Tensor
    labels: Tensor
    predictions: Tensor
    names: list[str]
    images: Tensor
    class_names: tuple[str, ...]
    run: str
    source: str
    files: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)


def read_split(trained: Trained, split: SplitName, root: str | None) -> tuple[Tensor, Tensor, Tensor, tuple[str, ...]]:
    """Read a split as the run divides the images; with positions in the data set's file, or of a folder also the files.

    Raises:
        ValueError: the data cannot be had, or there are no such images.
    """
    found = trained.split(split, root)
    assert found.published is not None
    files = tuple(map(found.file, range(len(found)))) if found.files else ()
    return found.images, found.labels, found.published, files


def split_catalogue(trained: Trained, source: SplitName | Literal["all"], root: str | None = None) -> Catalogue:
    """Make a catalogue of a split, or of all three; the features are kept beside the run.

    Args:
        trained: the run.
        source: train, val, test or all.
        root: folder of the data set; None takes the run's.

    Raises:
        ValueError: images that cannot be had, or weights that give features that are not finite.
    """
    splits: tuple[SplitName, ...] = (source,) if source != "all" else trained.splits
    loaded = {split: read_split(trained, split, root) for split in splits}
    found = [features_of(trained, split, images) for split, (images, *_) in loaded.items()]
    *columns, files = zip(*loaded.values(), strict=True)
    images, labels, indices = (torch.cat(tensors) for tensors in columns)
    splits_of = [split for split, (_, part, *_) in loaded.items() for _ in range(len(part))]
    return Catalogue(
        features=torch.cat([part.features for part in found]),
        labels=labels,
        predictions=torch.cat([part.logits for part in found]).argmax(1).int(),
        names=[f"{split}:{index}" for split, index in zip(splits_of, indices.tolist(), strict=True)],
        images=images,
        class_names=trained.class_names,
        run=trained.name,
        source=source,
        files=tuple(itertools.chain(*files)),
    )


def folder_catalogue(trained: Trained, folder: Path) -> Catalogue:
    """Make a catalogue of the pictures in a folder and those below it; one that cannot be read is left out.

    Raises:
        ValueError: no picture in it that can be read, or features that are not finite.
    """
    found = list(find_pictures([str(folder)], left_out := Counter[str]()))
    if found[0][0] == str(folder):  # the folder itself: nothing is in it
        raise ValueError(": ".join(found[0]))
    views, names = [], []
    for photo in (photo for photos in read_photos(found, trained.info) for photo in photos):
        if photo.cutout is None:
            logger.warning("left out: %s: %s", one_line(photo.name), photo.error)
        else:
            views.append(torch.from_numpy(photo.cutout.view))
            names.append(Path(photo.name).relative_to(folder).as_posix())
    if left_out:
        logger.warning("left out beside pictures: %s", count_kinds(left_out))
    if not views:
        raise ValueError(f"{folder} holds no picture that can be read")
    images = torch.stack(views)
    made = compute_features(trained, images)
    return Catalogue(
        features=made.features,
        labels=torch.full((len(images),), UNKNOWN),
        predictions=made.logits.argmax(1).int(),
        names=names,
        images=images,
        class_names=trained.class_names,
        run=trained.name,
        source=str(folder.resolve()),
    )


def save_catalogue(catalogue: Catalogue, path: Path, trained: Trained) -> None:
    """Write a folder's catalogue, whole or not at all: tensors, and names as JSON; no pickle."""
    about = {
        "format": FORMAT,
        "names": json.dumps(catalogue.names),
        "source": catalogue.source,
        "run": catalogue.run,
        "weights_sha256": trained.digest,
    }
    tensors = {name: getattr(catalogue, name).contiguous() for name in TENSORS}
    write_atomic(path, save(tensors, metadata=about))


def load_catalogue(path: Path, trained: Trained) -> Catalogue:
    """Read what `save_catalogue` wrote.

    Raises:
        ValueError: one line, for a file that is damaged, not a catalogue of this version, or of other weights, whose
            similarities would mean nothing.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            # Copied: a mapped file that shrinks would end the process.
            tensors = {name: file.get_tensor(name).clone() for name in TENSORS}
        if tensors["predictions"].dtype == torch.int16 and len(trained.class_names) <= 1 << 15:  # an older index
            tensors["predictions"] = tensors["predictions"].int()
        names, sha256 = json.loads(about["names"]), about["weights_sha256"]
        _check(tensors, names, about, trained)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not an index of this version: {reason}") from None
    if sha256 != trained.digest:
        raise ValueError(
            f"{path} was made by other weights ({about['run']}, sha256 {sha256[:12]}) than those of {trained.name} "
            f"(sha256 {trained.digest[:12]}); make it again: fmnist search index"
        )
    return Catalogue(
        **tensors,
        labels=torch.full((len(names),), UNKNOWN),
        names=names,
        class_names=trained.class_names,
        run=about["run"],
        source=about["source"],
    )


def _check(tensors: dict[str, Tensor], names: list[str], about: dict[str, str], trained: Trained) -> None:
    if about["format"] != FORMAT:
        raise ValueError(f"format {about['format']}, not {FORMAT}")
    shapes = {name: (tensor.dtype, tensor.ndim) for name, tensor in tensors.items()}
    ndims = {"features": 2, "predictions": 1, "images": 1 + len(trained.info.image_shape)}
    expected = {name: (dtype, ndims[name]) for name, dtype in TENSORS.items()}
    if shapes != expected or {len(tensor) for tensor in tensors.values()} != {len(names)} or not names:
        raise ValueError(f"its tensors are {shapes} with {len(names)} names")
    if not all(isinstance(name, str) for name in names):
        raise ValueError("a name in it is not a text")
    low, high = (int(bound) for bound in tensors["predictions"].aminmax())
    if low < 0 or high >= len(trained.class_names) or not tensors["features"].isfinite().all():
        raise ValueError(f"classes from {low} to {high}, or features that are not finite")
