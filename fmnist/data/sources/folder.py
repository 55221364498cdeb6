"""A folder of pictures by class as tensors: decoded once, kept in a cache, and read in place from there."""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fmnist.data.mapped import CHUNK
from fmnist.data.sources.cache import Cache
from fmnist.data.sources.decode import Fit
from fmnist.data.sources.fill import Decoding, check_fits, examples_of
from fmnist.data.sources.layout import list_pictures, wait_for_another_time
from fmnist.runtime.console import one_line

CACHE_REMEDY = "delete their cache, the folder FMNIST_CACHE or else ~/.cache/fmnist"
logger = logging.getLogger("fmnist")


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """A folder of pictures by class.

    Attributes:
        images: uint8 [N, C, H, W] on the CPU, in place in the cache's file; C is 1 where every file is grey, else 3.
        labels: int64 [N].
        class_names: in label order.
        files: relative to the root, in the order of the images.
        parts: "train", and "val" and "test" where they are there: int64 positions into the above, ascending.
        mean, std: per channel, in [0, 1], of the train part, rounded to four digits; a channel of one value has std 1.
        skipped: files that could not be read, and why.
        digests: of each part, as `Split.digest`.
        has_parts: they are folders of its own; else `holdout` made them.
        new: they were decoded, and their digests made from the file, a moment ago.
        checked: of the parts that were compared with their digest, that of each split they are cut into.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    files: tuple[str, ...]
    parts: dict[str, Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    skipped: tuple[tuple[str, str], ...]
    digests: dict[str, str]
    has_parts: bool
    new: bool
    checked: dict[str, dict[str, str]] = field(default_factory=dict)


def read_folder(
    root: Path,
    *,
    stored_size: int | None,
    fit: Fit,
    bad_files: Literal["refuse", "skip"],
    holdout: float,
    fits: Callable[[int], str] | None = None,
) -> Decoded:
    """Read ROOT/CLASS/* or ROOT/{train,val,test}/CLASS/*; see `list_pictures`.

    The first time decodes into the cache folder (`cache_folder`); later ones, and other processes of this machine, read
    that, for as long as names, sizes and times of the files are the same. Nothing is written elsewhere.

    Args:
        root: the folder.
        stored_size: see `stored_shape`.
        fit: see `in_shape`.
        bad_files: refuse: an error names them; skip: they are left out.
        holdout: share of each class that goes to val, and as much to test, in [0, 0.5), where the folder has no parts;
            see `split_by_content`.
        fits: says of a number of bytes, of all images, why they are too many; an empty text where they fit.

    Raises:
        ValueError: a folder, files or a cache folder that cannot be used, or too many images; one line.
    """
    try:
        root = Path(os.path.abspath(os.path.expanduser(root)))
        found, left_out = list_pictures(root)
        if left_out:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in left_out.most_common())
            logger.info("%s", one_line(f"{root}: ignored files that are no pictures: {kinds}", 1000))
        options = {"stored_size": stored_size, "fit": fit, "bad_files": bad_files, "holdout": holdout}
        cache = Cache(root, options, found)
        kept, new = cache.read(), False  # without a lock, which a cache that somebody else made may not allow
        if kept is None:
            with cache.locked():
                kept = cache.read()  # another process may have been faster
                if kept is None:
                    wait_for_another_time(found)
                    decoding = Decoding(cache, found, stored_size=stored_size, fit=fit, bad_files=bad_files)
                    decoding.fill_cache(holdout, fits)
                    kept, new = cache.read(), True
        if kept is None:
            raise ValueError(f"{cache.array} was removed while it was read")
        decoded = _decoded(*kept, has_parts=bool(found[0].part), new=new)
        check_fits(tuple(decoded.images.shape), fits)
    except ValueError as error:
        raise ValueError(one_line(error, 1500)) from None
    if decoded.skipped:
        logger.warning("%s", one_line(f"{root}: skipped {examples_of(decoded.skipped, len(found))}", 1000))
    return decoded


def check_part(decoded: Decoded, name: str, splits: Mapping[str, Tensor], root: Path) -> dict[str, str]:
    """Compare the pixels of a part with their digest, the first time: a disk may have damaged the cache since.

    Args:
        decoded: the folder.
        name: of the part.
        splits: by name, the int64 positions, ascending, of those that it is cut into.
        root: the folder's path.

    Returns:
        The digest of each of them, as `Split.digest`: of the same reading, so that nothing is read for it again.

    Raises:
        ValueError: the pixels differ; one line.
    """
    if name not in decoded.checked:
        whole = decoded.parts[name]
        wanted = {split: at for split, at in splits.items() if not torch.equal(at, whole)}
        if not decoded.new:
            wanted[""] = whole
        found = _digests(decoded, whole, wanted)
        if found.setdefault("", decoded.digests[name]) != decoded.digests[name]:
            raise ValueError(
                f"data.root: the decoded {name} images of {one_line(str(root))} are damaged: {CACHE_REMEDY}"
            )
        decoded.checked[name] = {split: found.get(split, found[""]) for split in splits}
    return decoded.checked[name]


def _digests(decoded: Decoded, read: Tensor, splits: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the digest of each of some splits of the images at `read`, of one reading; int64 positions, ascending."""
    channels, *side = decoded.images.shape[1:]
    image = [*([channels] * (channels > 1)), *side]
    found = {name: hashlib.sha256(f"torch.uint8 {[len(at), *image]} ".encode()) for name, at in splits.items()}
    member = {name: torch.isin(read, at) for name, at in splits.items()}
    for first in range(0, len(read) if splits else 0, CHUNK):
        some = slice(first, first + CHUNK)
        pixels = decoded.images[read[some]]
        for name, digest in found.items():
            own = member[name][some]
            digest.update((pixels if own.all() else pixels[own]).numpy().data)
    for name, at in splits.items():
        found[name].update(f"torch.int64 {[len(at)]} ".encode())
        found[name].update(decoded.labels[at].numpy().data)
    return {name: digest.hexdigest() for name, digest in found.items()}


def _decoded(images: NDArray[np.uint8], facts: dict[str, Any], *, has_parts: bool, new: bool) -> Decoded:
    return Decoded(
        images=torch.from_numpy(images),
        labels=torch.tensor(facts["labels"], dtype=torch.int64),
        class_names=tuple(facts["class_names"]),
        files=tuple(facts["files"]),
        parts={name: torch.tensor(positions, dtype=torch.int64) for name, positions in facts["parts"].items()},
        mean=tuple(facts["mean"]),
        std=tuple(facts["std"]),
        skipped=tuple((name, reason) for name, reason in facts["skipped"]),
        digests=facts["digests"],
        has_parts=has_parts,
        new=new,
    )
