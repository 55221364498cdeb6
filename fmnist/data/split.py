"""A split of a data set on the device."""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from fmnist.config.schema import DataConfig
from fmnist.data.corrections import DROPPED
from fmnist.data.fashion_mnist import INFO
from fmnist.data.info import DataInfo
from fmnist.data.registry import Source, SplitName, open_source


@dataclass(frozen=True, kw_only=True)
class Split:
    """Images and labels that stay on the device.

    Attributes:
        images: uint8 [N, H, W], or [N, C, H, W] where there are colours; 0 to 255.
        labels: int64 [N].
        info: of the data set that it belongs to.
        published: int64 [N] on the CPU, the images' positions in the data set's own file; None: they have none.
        files: of a folder of pictures: the file of each published position.
        location: where it lies, for people.
        corrected: of val and test, whose labels stay as given: int64 [N] labels after `data.corrections`, -1 for an
            image that they drop; None where they change none. The training images' labels are corrected themselves.
        corrections_sha256: tells these corrections from others.
        title: makes the name of the data set for people, who may have put other files in its place.
        rows: the positions of the images that are held here, where others lie on other processes; None: all are.
        sha256: the digest of all, where that is so.
    """

    images: Tensor
    labels: Tensor
    info: DataInfo = INFO
    published: Tensor | None = None
    files: tuple[str, ...] = ()
    location: str = ""
    corrected: Tensor | None = None
    corrections_sha256: str = "none"
    title: Callable[[], str] = lambda: INFO.title
    rows: range | None = None
    sha256: str = ""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in label order."""
        return self.info.class_names

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Images and labels."""
        return self.images, self.labels

    def __len__(self) -> int:
        return len(self.labels)

    def position(self, index: int) -> int:
        """Return where an image stands in the data set's own file."""
        return index if self.published is None else int(self.published[index])

    def file(self, index: int) -> str:
        """Return the file of an image in a folder of pictures; empty where images have none."""
        return self.files[self.position(index)] if self.files else ""

    @cached_property
    def digest(self) -> str:
        """The sha256 of images and labels, with their types and shapes: what a run was trained and judged on."""
        if self.sha256:
            return self.sha256
        found = hashlib.sha256()
        for tensor in (self.images, self.labels):
            found.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
            found.update(tensor.cpu().contiguous().numpy().data)
        return found.hexdigest()

    def between(self, first: int, last: int) -> Tensor:
        """Return the images from `first` to before `last`, which have to be held here, on the device of the labels."""
        last = min(last, len(self))
        if self.rows is not None:
            if self.rows.step != 1 or not self.rows.start <= first <= last <= self.rows.stop:
                raise IndexError(f"images {first} to {last} are asked for, {self.rows} are held here")
            first, last = first - self.rows.start, last - self.rows.start
        return self.images[first:last].to(self.labels.device)

    @classmethod
    def load(cls, name: SplitName, source: DataConfig | Source, device: torch.device | str = "cpu") -> Self:
        """Read a split of a data set and move it to the device.

        Args:
            name: train, val or test.
            source: the data set, opened, or the options that name it.
            device: where its tensors go.

        Raises:
            ValueError: files that are missing or invalid.
        """
        if isinstance(source, DataConfig):
            source = open_source(source)
        images, labels, published = source.read(name)
        corrected = None if source.corrections is None else source.corrections.apply(name, labels, published)
        if name == "train" and corrected is not None:
            kept = corrected != DROPPED
            images, labels, published, corrected = images[kept], corrected[kept], published[kept], None
        height, width = images.shape[-2:]
        info = replace(source.info, shape=(source.info.shape[0], height, width))
        return cls(
            images=images.to(device),
            labels=labels.to(device),
            info=info,
            published=published,
            files=source.files,
            location=source.location,
            corrected=corrected,
            corrections_sha256="none" if source.corrections is None else source.corrections.sha256,
            title=functools.partial(source.title, name),
        )
