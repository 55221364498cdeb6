"""A split of a data set on the device."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from fmnist.config.schema import DataConfig
from fmnist.data.corrections import DROPPED
from fmnist.data.fashion_mnist import INFO
from fmnist.data.info import DataInfo, SplitName
from fmnist.data.mapped import Mapped, digest_of
from fmnist.data.registry import Source, open_source


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
        unread: the images, where they stay in their file; `images` has then their shape alone.
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
    unread: Mapped | None = None

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
        return self.sha256 or digest_of(self.images if self.unread is None else self.unread, self.labels)

    def at_rows(self, rows: range | None) -> Tensor:
        """Return a copy of the images at some positions, or all, of a split that holds all or has not read them."""
        if self.unread is not None:
            return self.unread.read(rows)
        return self.images if rows is None else self.images[rows.start : rows.stop : rows.step].clone()

    def between(self, first: int, last: int) -> Tensor:
        """Return the images from `first` to before `last`, on the device of the labels.

        Returns:
            uint8 [n, H, W] or [n, C, H, W].

        Raises:
            IndexError: they are held by another process.
        """
        last = min(last, len(self))
        if self.rows is not None:
            if self.rows.step != 1 or not self.rows.start <= first <= last <= self.rows.stop:
                raise IndexError(f"images {first} to {last} are asked for, {self.rows} are held here")
            first, last = first - self.rows.start, last - self.rows.start
        images = self.images[first:last] if self.unread is None else self.unread.read(range(first, last))
        return images.to(self.labels.device)

    @classmethod
    def load(
        cls, name: SplitName, source: DataConfig | Source, device: torch.device | str = "cpu", *, read: bool = True
    ) -> Self:
        """Read a split of a data set and move it to the device.

        Args:
            name: train, val or test.
            source: the data set, opened, or the options that name it.
            device: where its tensors go.
            read: false leaves images in their file, where they lie in one that can be read by rows.

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
        unread, known = None, ""
        if isinstance(images, Mapped):
            known = images.sha256 if name != "train" or source.corrections is None else ""  # else: other labels
            images, unread = (images.read(), None) if read else (images.outline, images)
        height, width = images.shape[-2:]
        info = replace(source.info, shape=(source.info.shape[0], height, width))
        split = cls(
            images=images.to(device) if unread is None else images,
            unread=unread,
            labels=labels.to(device),
            info=info,
            published=published,
            files=source.files,
            location=source.location,
            corrected=corrected,
            corrections_sha256="none" if source.corrections is None else source.corrections.sha256,
            title=functools.partial(source.title, name),
        )
        if known:
            vars(split)["digest"] = known  # for as long as it holds these images
        return split
