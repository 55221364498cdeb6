"""Data sets by name: what `data.name` takes."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from fmnist.config.first_look import NEEDS_ROOT
from fmnist.config.schema import DataConfig
from fmnist.data.corrections import Corrections, read_corrections
from fmnist.data.fashion_mnist import INFO, load_indexed, name_of, stratified_split
from fmnist.data.find import locate
from fmnist.data.folds import hold_fold_out
from fmnist.data.info import DataInfo, SplitName
from fmnist.data.mapped import Mapped, Part
from fmnist.data.sources.arrays import TORCHVISION, Parts, read_npz, read_torchvision
from fmnist.data.sources.folder import check_part, read_folder
from fmnist.data.subset import subset
from fmnist.runtime.console import one_line
from fmnist.runtime.hardware import too_large
from fmnist.runtime.processes import Processes

OWN_VAL = "the data set has validation images of its own"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set whose files were found; it is read a split at a time.

    Attributes:
        info: what to know of it without its images.
        location: where it lies, for people.
        title: names a split for people: not as the data set where its files are other ones than the published.
        read: images, which may be left in a file, labels, and the images' positions in the data set's own file; all on
            the CPU, and none where there is no such split.
        files: of a folder: the file of each image, by its position.
        unused: options of the section `data` that this data set has no use for, and why.
        own_val: its validation images lie in a file of their own, with positions of their own.
        corrections: decisions about its labels, which `Split.load` applies; `read` gives them as they are.
    """

    info: DataInfo
    location: str
    title: Callable[[SplitName], str]
    read: Callable[[SplitName], Part]
    files: tuple[str, ...] = ()
    unused: Mapping[str, str] = field(default_factory=dict)
    own_val: bool = False
    corrections: Corrections | None = None

    def remarks(self, cfg: DataConfig) -> list[str]:
        """Say, one line each, which options this data set has no use for, and that its images are stretched."""
        given = {name: getattr(cfg, name) for name in self.unused if getattr(cfg, name) != getattr(DataConfig(), name)}
        lines = [f"data.{name} {value} has no effect: {self.unused[name]}" for name, value in given.items()]
        _, height, width = self.info.shape
        if height != width:
            advice = "; data.fit pad keeps their proportions" if self.info.name == "folder" else ""
            lines.append(f"images of {width} x {height} pixels are stretched to squares{advice}")
        return lines


def open_source(cfg: DataConfig, *, fetch: bool = False, processes: Processes | None = None) -> Source:
    """Find the files of a data set.

    Args:
        cfg: which, and where.
        fetch: download it, where it can be and no folder was named.
        processes: of a run, which all open it, within `together`, and take their rows of it: arrays stay in their file
            where that can be, and each process looks through its share of the images for mean and deviation.

    Raises:
        ValueError: an unknown name, or files that are missing or cannot be used; one line.
    """
    if cfg.name not in SOURCES:
        raise ValueError(f"data.name is {cfg.name!r:.80}; valid: {', '.join(SOURCES)}")
    if cfg.name in NEEDS_ROOT and cfg.root is None:  # as in what is exported, which names no place of a machine
        raise ValueError(f"data.name is {cfg.name}, which needs {NEEDS_ROOT[cfg.name]}: --data.root PATH")
    if cfg.name in NEEDS_ROOT and not os.path.lexists(os.path.expanduser(cfg.root or "")):
        raise ValueError(f"data.root: there is no {cfg.root}; if it was moved, give its new place: --data.root PATH")
    source = SOURCES[cfg.name](cfg if cfg.folds is None else replace(cfg, val_size=0), fetch, processes)
    val_aside = cfg.folds is not None and source.own_val
    if cfg.folds is not None:
        read = hold_fold_out(source.read, cfg.folds, cfg.fold or 0, own_val=source.own_val)
        source = replace(source, read=read, unused={}, own_val=False)
    if cfg.corrections is not None:
        if not os.path.lexists(os.path.expanduser(cfg.corrections)):
            way_out = "give its new place: --data.corrections FILE; with null the labels are used as given"
            raise ValueError(f"data.corrections: there is no {cfg.corrections}; if it was moved, {way_out}")
        parts = {name: source.read(name)[1:] for name in get_args(SplitName)}
        try:
            names, own_val = source.info.class_names, source.own_val
            found = read_corrections(cfg.corrections, names, parts, own_val=own_val, val_aside=val_aside)
        except ValueError as error:
            raise ValueError(f"data.corrections: {error}") from None
        source = replace(source, corrections=found)
    return source if cfg.limit is None else _limited(source, cfg.limit)


def _limited(source: Source, limit: int | float) -> Source:
    """Leave a part of the training images; those for validation and test stay whole."""

    def read(name: SplitName) -> Part:
        images, labels, published = source.read(name)
        if name != "train":
            return images, labels, published
        part = subset(labels, limit)
        return images[part], labels[part], published[part]

    return replace(source, read=read)


def _fashion_mnist(cfg: DataConfig, fetch: bool) -> Source:
    folder = locate(cfg.root, fetch=fetch)
    return Source(
        info=INFO,
        location=str(folder),
        title=lambda name: name_of(name, cfg.root),
        read=lambda name: load_indexed(name, cfg.root, cfg.val_size),
    )


def hold_out(labels: Tensor, val_size: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Hold validation images out of a data set's training images, stratified by class, the same ones for ever.

    Args:
        labels: int64 [N], of the training images.
        val_size: images to hold out.
        num_classes: labels are below it.

    Returns:
        Positions of those that are left, and of those held out.

    Raises:
        ValueError: val_size takes more than half of them.
    """
    if val_size > len(labels) // 2:
        raise ValueError(
            f"data.val_size is {val_size}, more than half of the {len(labels):,} training images; "
            f"for a tenth of them: --data.val_size {len(labels) // 10}"
        )
    return stratified_split(labels, val_size, num_classes)


def _arrays(cfg: DataConfig, read: tuple[DataInfo, Parts]) -> Source:
    info, parts = read
    places = {name: torch.arange(len(labels)) for name, (_, labels) in parts.items()}
    if "val" not in parts:
        places["train"], places["val"] = hold_out(parts["train"][1], cfg.val_size, len(info.class_names))

    def read_split(name: SplitName) -> Part:
        images, labels = parts.get(name, parts["train"])
        at = places.get(name, torch.zeros(0, dtype=torch.int64))
        return images[at], labels[at], at

    return Source(
        info=info,
        location=cfg.root or info.source,
        title=lambda name: info.title,
        read=read_split,
        unused={"val_size": OWN_VAL} if "val" in parts else {},
        own_val="val" in parts,
    )


def _folder(cfg: DataConfig) -> Source:
    root = Path(os.path.expanduser(cfg.root or ""))
    found = read_folder(
        root,
        stored_size=cfg.stored_size,
        fit=cfg.fit,
        bad_files=cfg.bad_files,
        holdout=cfg.holdout,
        fits=lambda num_bytes: too_large(num_bytes, cfg.where),
    )
    places, unused = dict(found.parts), {"val_size": OWN_VAL, "holdout": "the folder has parts of its own"}
    if not found.has_parts:
        unused = {"val_size": "a folder without parts holds out data.holdout of each class"}
    elif "val" not in places:  # ROOT/train and perhaps ROOT/test, as data sets are published
        del unused["val_size"]
        train = places["train"]
        left, held = hold_out(found.labels[train], cfg.val_size, len(found.class_names))
        places |= {"train": train[left], "val": train[held]}
    channels, height, width = found.images.shape[1:]
    images = found.images[:, 0] if channels == 1 else found.images

    def read_split(name: SplitName) -> Part:
        at, sha256 = places.get(name, torch.zeros(0, dtype=torch.int64)), ""
        if len(at):
            part = name if name in found.parts else "train"
            cut = {split: at for split, at in places.items() if part == (split if split in found.parts else "train")}
            sha256 = check_part(found, part, cut, root)[name]
        return Mapped(array=images, at=at, sha256=sha256), found.labels[at], at

    info = DataInfo(
        name="folder",
        title=one_line(root.resolve().name, 80),
        class_names=found.class_names,
        mean=found.mean,
        std=found.std,
        shape=(channels, height, width),
        num_train=len(places["train"]),
        source=one_line(root.resolve().name, 80),
        fit=cfg.fit,
    )
    return Source(
        info=info,
        location=str(root),
        title=lambda name: info.title,
        read=read_split,
        files=found.files,
        unused=unused,
    )


SOURCES: dict[str, Callable[[DataConfig, bool, Processes | None], Source]] = {
    INFO.name: lambda cfg, fetch, _: _fashion_mnist(cfg, fetch),
    **dict.fromkeys(
        TORCHVISION,
        lambda cfg, fetch, processes: _arrays(
            cfg, read_torchvision(cfg.name, cfg.root, fetch=fetch, processes=processes)
        ),
    ),
    "folder": lambda cfg, *_: _folder(cfg),
    "npz": lambda cfg, _, processes: _arrays(cfg, read_npz(os.path.expanduser(cfg.root or ""), processes)),
}
