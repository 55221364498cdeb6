"""Find images that stand in two splits of a data set, pixel for pixel."""

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, get_args

import torch

from fmnist.config.schema import DataConfig
from fmnist.data.info import SplitName
from fmnist.data.mapped import CHUNK
from fmnist.data.registry import open_source
from fmnist.data.split import Split
from fmnist.runtime.processes import ALONE, Processes

# What is looked at, and where: the model learns from train, and its best epoch is chosen on val.
PAIRS: tuple[tuple[SplitName, SplitName], ...] = (("val", "train"), ("test", "train"), ("test", "val"))


@dataclass(frozen=True, kw_only=True)
class ExactCopies:
    """The images of a split whose pixels are also in another one.

    Attributes:
        split, other: their names.
        num_images: of the split.
        indices: positions of the copies in the split, ascending.
        partners: position in the other of the image that each copies, one of another class where there is one.
        contradicting: whether that one is of another class.
    """

    split: SplitName
    other: SplitName
    num_images: int
    indices: Sequence[int]
    partners: Sequence[int]
    contradicting: Sequence[bool]

    def as_dict(self) -> dict[str, Any]:
        """Return the counts, as metrics.json holds them."""
        return {
            "split": self.split,
            "other": self.other,
            "num_images": self.num_images,
            "copies": len(self.indices),
            "contradicting": sum(self.contradicting),
        }


def exact_copies(splits: Mapping[SplitName, Split], processes: Processes = ALONE) -> list[ExactCopies]:
    """Compare the pixels of each split's images with those of the splits before it, by their digests.

    Args:
        splits: train, val and test, or some of them; an empty one is left out.
        processes: each hashes its share of the images, and all learn the digests.

    Returns:
        One for each pair of splits.
    """
    places = {name: _by_digest(split, processes) for name, split in splits.items() if len(split)}
    labels = {name: split.labels.tolist() for name, split in splits.items()}
    found = []
    for name, other in PAIRS:
        if not {name, other} <= places.keys():
            continue
        rows: list[tuple[int, int, bool]] = []
        for digest in places[name].keys() & places[other].keys():
            for index in places[name][digest]:
                label, partners = labels[name][index], places[other][digest]
                partner = next((place for place in partners if labels[other][place] != label), partners[0])
                rows.append((index, partner, labels[other][partner] != label))
        columns = list(zip(*sorted(rows), strict=True)) or [(), (), ()]
        found.append(
            ExactCopies(
                split=name,
                other=other,
                num_images=len(splits[name]),
                indices=columns[0],
                partners=columns[1],
                contradicting=columns[2],
            )
        )
    return found


@functools.cache  # the same for all runs on the same images
def exact_copies_of(data: DataConfig, processes: Processes = ALONE) -> tuple[ExactCopies, ...]:
    """Compare the splits of a data set; see `exact_copies`."""

    def load() -> dict[SplitName, Split]:
        source = open_source(data)
        return {name: Split.load(name, source, read=False) for name in get_args(SplitName)}

    return tuple(exact_copies(processes.together(load), processes))


def copies_line(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say in one line what `ExactCopies.as_dict` counts."""
    parts = []
    for row in rows:
        other_class = f" ({row['contradicting']:,} of another class)" if row["contradicting"] else ""
        parts.append(f"{row['copies']:,} of {row['num_images']:,} {row['split']} images in {row['other']}{other_class}")
    return "exact copies: " + ("; ".join(parts) or "there is one split only")


def _by_digest(split: Split, processes: Processes) -> dict[bytes, list[int]]:
    digests = [torch.empty(0, 16, dtype=torch.uint8)]
    for start in processes.share(range(0, len(split), CHUNK)):
        images = split.at_rows(range(start, min(start + CHUNK, len(split)))).cpu().contiguous().flatten(1).numpy()
        found = b"".join(blake2b(pixels, digest_size=16).digest() for pixels in images)
        digests.append(torch.frombuffer(bytearray(found), dtype=torch.uint8).view(-1, 16))
    places: dict[bytes, list[int]] = defaultdict(list)
    for index, digest in enumerate(processes.gather_rows(torch.cat(digests)).numpy()):
        places[digest.tobytes()].append(index)
    return places
