"""A split of the data set on the device."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from fmnist.config.schema import DataConfig
from fmnist.data.fashion_mnist import CLASS_NAMES, load_indexed
from fmnist.data.subset import subset


@dataclass(frozen=True, kw_only=True)
class Split:
    """Images and labels that stay on the device.

    Attributes:
        images: uint8 [N, H, W], or [N, C, H, W] where there are colours; 0 to 255.
        labels: int64 [N].
        class_names: in label order.
        published: int64 [N] on the CPU, the images' positions in the data set's own file; None: they have none.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...] = ()
    published: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """The sha256 of images and labels, with their types and shapes: what a run was trained and judged on."""
        found = hashlib.sha256()
        for tensor in (self.images, self.labels):
            found.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
            found.update(tensor.cpu().contiguous().numpy().data)
        return found.hexdigest()

    @classmethod
    def load(
        cls, name: Literal["train", "val", "test"], cfg: DataConfig, device: torch.device, *, fetch: bool = False
    ) -> "Split":
        """Read a split of Fashion-MNIST and move it to the device; with `fetch`, download it if no root was named.

        Raises:
            ValueError: files that are missing, cannot be fetched, or are invalid.
        """
        images, labels, published = load_indexed(name, cfg.root, cfg.val_size, fetch=fetch)
        if name == "train" and cfg.limit is not None:
            part = subset(labels, cfg.limit)
            images, labels, published = images[part], labels[part], published[part]
        return cls(images=images.to(device), labels=labels.to(device), class_names=CLASS_NAMES, published=published)
