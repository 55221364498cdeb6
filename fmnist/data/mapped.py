"""Images that stay in a file until they are asked for, so that a process can take its own alone."""

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CHUNK = 1024  # images read at a time where all are looked at


@dataclass(frozen=True, kw_only=True)
class Mapped:
    """Some of the images in a file.

    Attributes:
        array: uint8 [M, H, W] or [M, C, H, W], in place in the file.
        at: int64 [N], their positions in it.
        stays: it is a file of ours, which nobody changes while a run goes on.
        sha256: the digest of these very images and their labels, where whoever checked the file has made it.
    """

    array: Tensor
    at: Tensor
    stays: bool = True
    sha256: str = ""

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, chosen: Tensor) -> "Mapped":
        """Return some of them, which stay in the file: int64 positions, or bool [N]."""
        return replace(self, at=self.at[chosen], sha256="")

    @property
    def shape(self) -> tuple[int, ...]:
        """Their shape as one tensor."""
        return len(self), *self.array.shape[1:]

    @property
    def outline(self) -> Tensor:
        """A tensor of their type and shape without content."""
        return torch.empty(self.shape, dtype=self.array.dtype, device="meta")

    def read(self, rows: range | None = None) -> Tensor:
        """Read them, or those at some positions, into memory."""
        at = self.at if rows is None else self.at[rows.start : rows.stop : rows.step]
        images = torch.empty((len(at), *self.array.shape[1:]), dtype=self.array.dtype)
        return torch.index_select(self.array, 0, at, out=images)  # straight into their place: no copy beside them


# Images uint8 [N, H, W] or [N, C, H, W], labels int64 [N], published int64 [N].
Part = tuple[Tensor | Mapped, Tensor, Tensor]


def joined(one: Tensor | Mapped, other: Tensor | Mapped) -> Tensor | Mapped:
    """Put images of one data set one after another."""
    if isinstance(one, Mapped) and isinstance(other, Mapped):
        return replace(one, at=torch.cat((one.at, other.at)), sha256="")
    return torch.cat([part.read() if isinstance(part, Mapped) else part for part in (one, other)])


def digest_of(images: Tensor | Mapped, labels: Tensor) -> str:
    """Return the sha256 of images and labels, with their types and shapes."""
    found = hashlib.sha256()
    if isinstance(images, Mapped):
        found.update(f"{images.array.dtype} {list(images.shape)} ".encode())
        for part in images.at.split(CHUNK):
            found.update(images.array[part].contiguous().numpy().data)
        images = torch.empty(0, dtype=torch.uint8)
    else:
        found.update(f"{images.dtype} {list(images.shape)} ".encode())
    found.update(images.cpu().contiguous().numpy().data)
    found.update(f"{labels.dtype} {list(labels.shape)} ".encode())
    found.update(labels.cpu().contiguous().numpy().data)
    return found.hexdigest()
