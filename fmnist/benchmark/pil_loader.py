"""torchvision's DataLoader over PIL images: what most tutorials do."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fmnist.benchmark.ground_truth import Fixed, box_pixels
from fmnist.benchmark.pipelines import (
    ERASE,
    ERASE_AREA,
    ERASE_ASPECT,
    FLIP,
    ROTATION,
    SHIFT,
    Pipeline,
    Setting,
    UnavailableError,
)
from fmnist.data.batches import Loader, Split
from fmnist.data.fashion_mnist import MEAN, STD


def torchvision_transforms(room: Any, size: int, to_tensor: list[Any], *, resize_first: bool = False) -> Any:
    """Return the race's augmentation from torchvision.transforms or torchvision.transforms.v2.

    Args:
        room: the module.
        size: pixels per side of the result.
        to_tensor: what turns the image into a tensor, before the normalisation.
        resize_first: resize before the flip and the warp, not after them.
    """
    bilinear = room.InterpolationMode.BILINEAR
    resize = [room.Resize((size, size), interpolation=bilinear)]
    warp = [
        room.RandomHorizontalFlip(p=FLIP),
        room.RandomAffine(degrees=ROTATION, translate=(SHIFT, SHIFT), interpolation=bilinear),
    ]
    return room.Compose(
        [
            *(resize + warp if resize_first else warp + resize),
            *to_tensor,
            room.Normalize((MEAN,), (STD,)),
            room.RandomErasing(p=ERASE, scale=ERASE_AREA, ratio=ERASE_ASPECT),  # value 0 is the mean by now
        ]
    )


def pin_torchvision(transform: Any, fixed: Fixed, size: int) -> Any:
    """Return a copy of the transform whose random draws are replaced by given parameters."""
    transform = copy.deepcopy(transform)
    x0, y0, x1, y1 = box_pixels(fixed, size)
    affine = {
        "angle": -fixed.angle,  # torchvision turns clockwise
        "translate": (fixed.shift_x, fixed.shift_y),
        "scale": 1.0,
        "shear": (0.0, 0.0),
    }
    erase = {"i": y0, "j": x0, "h": y1 - y0, "w": x1 - x0, "v": torch.zeros(1, 1, 1)}
    drawn = {"RandomAffine": affine, "RandomErasing": erase}
    for step in transform.transforms:
        name = type(step).__name__
        if name in drawn:
            values = drawn[name]
            step.get_params = lambda *_, values=values, **__: tuple(values.values())  # the first API
            step.make_params = lambda *_, values=values, **__: values  # v2
        if hasattr(step, "p"):
            step.p = float({"RandomHorizontalFlip": fixed.flip, "RandomErasing": fixed.box is not None}[name])
    return transform


class PilDataset(Dataset[tuple[Tensor, int]]):
    """Grey PIL images with a transform, as torchvision.datasets.FashionMNIST gives them."""

    def __init__(self, split: Split, transform: Callable[[Any], Tensor]) -> None:
        self.images, self.labels, self.transform = split.images.numpy(), split.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


class EndlessOrder(Sampler[list[int]]):
    """Batches of the common order, epoch after epoch: no pause where an epoch ends."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[list[int]]:
        step = 0
        while True:
            yield self.loader.micro_batches(step)[0].indices.tolist()
            step += 1


class PilLoader(Pipeline):
    """torchvision's DataLoader over PIL images; its workers live for one round, so none works in another's."""

    bytes_rule = "none"  # its work is the host's

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        from torchvision import transforms

        self.check_resize_first()
        split = Split(images=setting.split.images.cpu(), labels=setting.split.labels.cpu())
        steps = torchvision_transforms(
            transforms, setting.size, [transforms.ToTensor()], resize_first=self.resizes_first
        )
        self.dataset = PilDataset(split, steps)
        self.multiple = self.workers
        self._loader = DataLoader(
            self.dataset,
            batch_sampler=EndlessOrder(setting.loader(split)),
            num_workers=self.workers,
            prefetch_factor=2,
            persistent_workers=True,
            pin_memory=setting.device.type != "cpu",
        )
        self._batches: Iterator[Any] | None = None

    @property
    def workers(self) -> int:
        """Worker processes."""
        return self.setting.workers

    def start(self) -> None:
        super().start()
        self._batches = iter(self._loader)

    def stop(self) -> None:
        # A persistent iterator is kept by the DataLoader too; its workers end when both let go of it.
        iterator, self._batches, self._loader._iterator = self._loader._iterator, None, None
        if iterator is not None:
            iterator._shutdown_workers()  # type: ignore[attr-defined]

    def fetch(self) -> tuple[Tensor, Tensor]:
        assert self._batches is not None, "start() comes first"
        images, labels = next(self._batches)
        device = self.setting.device
        return images.to(device, non_blocking=True).to(self.setting.dtype), labels.to(device, non_blocking=True)

    def pinned(self, indices: Tensor, fixed: Fixed) -> Tensor:
        transform = pin_torchvision(self.dataset.transform, self.seen(fixed), self.setting.size)
        images = [transform(Image.fromarray(self.dataset.images[index])) for index in indices.tolist()]
        return torch.stack(images).to(self.setting.device, self.setting.dtype)


class PilAllCores(PilLoader):
    name, description = "torchvision-pil", "torchvision DataLoader, PIL, a worker per core"

    def __init__(self, setting: Setting) -> None:
        if setting.workers <= 2:
            raise UnavailableError(f"{setting.workers} core(s) here: the row with 2 workers is the same")
        super().__init__(setting)


class PilTwoWorkers(PilLoader):
    name, description = "torchvision-pil-2", "torchvision DataLoader, PIL, 2 workers"

    @property
    def workers(self) -> int:
        return 2


class PilResizeFirst(PilTwoWorkers):
    name, description = "torchvision-pil-2-resize-first", "torchvision DataLoader, PIL, 2 workers, resize first"
    chain = "resize, then warp"
