"""Data sets by name: what `data.name` takes."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fmnist.config.first_look import NEEDS_ROOT
from fmnist.config.schema import DataConfig
from fmnist.data.fashion_mnist import INFO, load_indexed, name_of, stratified_split
from fmnist.data.find import locate
from fmnist.data.info import DataInfo
from fmnist.data.sources.arrays import TORCHVISION, Parts, read_npz, read_torchvision

SplitName = Literal["train", "val", "test"]
Part = tuple[Tensor, Tensor, Tensor]  # images uint8 [N, H, W] or [N, C, H, W], labels int64 [N], published int64 [N]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set whose files were found; it is read a split at a time.

    Attributes:
        info: what to know of it without its images.
        location: where it lies, for people.
        title: names a split for people: not as the data set where its files are other ones than the published.
        read: images, labels, and the images' positions in the data set's own file; all on the CPU, and none where
            there is no such split.
    """

    info: DataInfo
    location: str
    title: Callable[[SplitName], str]
    read: Callable[[SplitName], Part]


def open_source(cfg: DataConfig, *, fetch: bool = False) -> Source:
    """Find the files of a data set.

    Args:
        cfg: which, and where.
        fetch: download it, where it can be and no folder was named.

    Raises:
        ValueError: an unknown name, or files that are missing or cannot be used; one line.
    """
    if cfg.name not in SOURCES:
        raise ValueError(f"data.name is {cfg.name!r:.80}; valid: {', '.join(SOURCES)}")
    if cfg.name in NEEDS_ROOT and cfg.root is None:  # as in what is exported, which names no place of a machine
        raise ValueError(f"data.name is {cfg.name}, which needs {NEEDS_ROOT[cfg.name]}: --data.root PATH")
    return SOURCES[cfg.name](cfg, fetch)


def _fashion_mnist(cfg: DataConfig, fetch: bool) -> Source:
    folder = locate(cfg.root, fetch=fetch)
    return Source(
        info=INFO,
        location=str(folder),
        title=lambda name: name_of(name, cfg.root),
        read=lambda name: load_indexed(name, cfg.root, cfg.val_size),
    )


def held_out(parts: Parts, val_size: int, num_classes: int) -> Callable[[SplitName], Part]:
    """Return what reads the three splits of a data set that comes with a train, and perhaps a val and a test part.

    Without a val part, `val_size` training images are held out, stratified by class, the same ones for ever.

    Args:
        parts: images and labels under train, val, test; val and test may be missing.
        val_size: images to hold out.
        num_classes: labels are below it.

    Raises:
        ValueError: val_size takes more than half of the training images.
    """
    images, labels = parts["train"]
    if "val" in parts:
        kept = {name: torch.arange(len(part[1])) for name, part in parts.items()}
        whole = dict(parts)
    else:
        if val_size > len(labels) // 2:
            raise ValueError(
                f"data.val_size is {val_size}, more than half of the {len(labels):,} training images; "
                f"for a tenth of them: --data.val_size {len(labels) // 10}"
            )
        train, val = stratified_split(labels, val_size, num_classes)
        whole = parts | {"val": parts["train"]}
        kept = {"train": train, "val": val}
    nothing = torch.zeros(0, dtype=torch.int64)

    def read(name: SplitName) -> Part:
        if name not in whole:
            return images[:0], labels[:0], nothing
        part, part_labels = whole[name]
        if name not in kept:
            return part, part_labels, torch.arange(len(part_labels))
        return part[kept[name]], part_labels[kept[name]], kept[name]

    return read


def _arrays(cfg: DataConfig, read: tuple[DataInfo, Parts]) -> Source:
    info, parts = read
    return Source(
        info=info,
        location=cfg.root or info.source,
        title=lambda name: info.title,
        read=held_out(parts, cfg.val_size, len(info.class_names)),
    )


SOURCES: dict[str, Callable[[DataConfig, bool], Source]] = {
    INFO.name: _fashion_mnist,
    **dict.fromkeys(TORCHVISION, lambda cfg, fetch: _arrays(cfg, read_torchvision(cfg.name, cfg.root, fetch=fetch))),
    "npz": lambda cfg, fetch: _arrays(cfg, read_npz(os.path.expanduser(cfg.root or ""))),
}
