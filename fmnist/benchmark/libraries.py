"""Other libraries in the race: torchvision's DataLoader over PIL images, torchvision v2 and kornia on the device."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import v2

from fmnist.benchmark.pipelines import Fixed, Ours, Pipeline, Setting, Synthetic, library_steps
from fmnist.data.augment import with_channels
from fmnist.data.split import Split


def torchvision_transforms(library: Any, setting: Setting, *to_tensor: Any, resize_first: bool = False) -> Any:
    """Return the race's augmentation from a library: torchvision.transforms or torchvision.transforms.v2."""
    bilinear = {"interpolation": library.InterpolationMode.BILINEAR}
    return library.Compose(library_steps(library, setting, bilinear, resize_first, list(to_tensor)))


def fix_torchvision(transform: Any, fixed: Fixed, size: int) -> Any:
    """Return a copy of the transform whose random draws are replaced by given parameters."""
    transform = copy.deepcopy(transform)
    x0, y0, x1, y1 = fixed.box_pixels(size)
    shift = (fixed.shift_x, fixed.shift_y)
    left, top, width, height = fixed.crop or (0, 0, size, size)
    drawn: dict[str, dict[str, Any]] = {
        "RandomResizedCrop": {"top": top, "left": left, "height": height, "width": width},
        "ColorJitter": {"fn_idx": torch.arange(3)} | fixed.factors() | {"hue_factor": None},
        # torchvision turns clockwise
        "RandomAffine": {"angle": -fixed.angle, "translate": shift, "scale": 1.0, "shear": (0.0, 0.0)},
        "RandomErasing": {"i": y0, "j": x0, "h": y1 - y0, "w": x1 - x0, "v": torch.zeros(1, 1, 1)},
    }
    for step in transform.transforms:
        values = drawn.get(type(step).__name__, {})
        step.get_params = lambda *_, values=values, **__: tuple(values.values())  # the first API
        step.make_params = lambda *_, values=values, **__: values  # v2
        if hasattr(step, "p"):
            step.p = float(fixed.box is not None if "Erasing" in type(step).__name__ else fixed.flip)
    return transform


class PilLoader(Pipeline):
    """torchvision's DataLoader over PIL images; its workers live for one round, so none works in another's."""

    bytes_rule = "none"  # its work is the host's

    def __init__(self, name: str, setting: Setting, *, workers: int | None = None, resize_first: bool = False) -> None:
        super().__init__(name, setting, resize_first=resize_first)
        if workers is None and setting.workers <= 2:
            raise ValueError(f"{setting.workers} cores: the same as 2 workers")
        self.multiple = workers or setting.workers
        self.own_rounding = 1 / 255 if setting.channels == 3 else 0.0
        self.transform = torchvision_transforms(transforms, setting, transforms.ToTensor(), resize_first=resize_first)
        # on the host, the order too: reading an index from the device would wait for the model
        split = Split(images=setting.split.images.cpu(), labels=setting.split.labels.cpu())
        self.order, self._batches = replace(setting, split=split).loader(), cast(Any, None)
        pixels = split.images if setting.channels == 1 else split.images.movedim(1, -1).contiguous()
        self._images, self._labels = pixels.numpy(), split.labels.tolist()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return what torchvision.datasets.FashionMNIST does: the DataLoader takes this loader for its data set."""
        return self.transform(Image.fromarray(self._images[index])), self._labels[index]

    def start(self) -> None:
        order = (self.order.micro_batches(step)[0].indices.tolist() for step in itertools.count())  # never ends
        pinned, workers = self.setting.device.type != "cpu", self.multiple
        self._batches = iter(DataLoader(cast(Any, self), batch_sampler=order, num_workers=workers, pin_memory=pinned))

    def stop(self) -> None:
        self._batches._shutdown_workers()

    def next(self) -> tuple[Tensor, Tensor]:
        images, labels = (part.to(self.setting.device, non_blocking=True) for part in next(self._batches))
        return images.to(self.setting.dtype), labels

    def apply_fixed(self, indices: Tensor, fixed: Fixed) -> Tensor:
        transform = fix_torchvision(self.transform, fixed, self.setting.size)
        images = [transform(Image.fromarray(self._images[index])) for index in indices.tolist()]
        return torch.stack(images).to(self.setting.device, self.setting.dtype)


class OnDevice(Pipeline):
    """Gathers its batch from the same uint8 tensor on the device as ours, then calls another library on it."""

    transform: Any

    def apply(self, indices: Tensor, transform: Callable[[Tensor], Tensor]) -> Tensor:
        """Transform samples: [B, C, S, S]."""
        images = with_channels(self.setting.split.images[indices]).float() / 255
        return transform(images).to(self.setting.dtype)

    def next(self) -> tuple[Tensor, Tensor]:
        indices = self.micro_batch().indices
        return self.apply(indices, self.transform), self.setting.split.labels[indices]


class V2(OnDevice):
    """torchvision v2: one draw for a whole batch, or one for each image."""

    def __init__(self, name: str, setting: Setting, *, per_image: bool = False) -> None:
        super().__init__(name, setting)
        self.per_image, self.transform = per_image, torchvision_transforms(v2, setting)

    def apply(self, indices: Tensor, transform: Callable[[Tensor], Tensor]) -> Tensor:
        each = (lambda images: torch.stack([transform(image) for image in images])) if self.per_image else transform
        return super().apply(indices, each)

    def apply_fixed(self, indices: Tensor, fixed: Fixed) -> Tensor:
        return self.apply(indices, fix_torchvision(self.transform, fixed, self.setting.size))


class Kornia(OnDevice):
    """kornia, which draws for each sample."""

    def __init__(self, name: str, setting: Setting, *, resize_first: bool = False) -> None:
        super().__init__(name, setting, resize_first=resize_first)
        import kornia.augmentation as K  # late: it may not be installed

        # align_corners=True, its default, is another geometry
        steps = library_steps(K, setting, {"align_corners": False}, resize_first, [], p=1.0)
        self.transform = K.AugmentationSequential(*steps, data_keys=["input"]).to(setting.device)

    def apply_fixed(self, indices: Tensor, fixed: Fixed) -> Tensor:
        parameters = self.transform.forward_parameters(with_channels(self.setting.split.images[indices]).shape)
        x0, y0, x1, y1 = fixed.box_pixels(self.setting.size)
        shift, box = torch.tensor([fixed.shift_x, fixed.shift_y]), {"xs": x0, "ys": y0, "widths": x1 - x0}
        left, top, width, height = fixed.crop or (0, 0, 1, 1)
        right, bottom = left + width - 1, top + height - 1
        corners = torch.tensor([[left, top], [right, top], [right, bottom], [left, bottom]])
        values: dict[str, dict[str, Any]] = {
            "RandomResizedCrop": {"src": corners},
            "ColorJitter": fixed.factors() | {"hue_factor": 0.0},
            "RandomHorizontalFlip": {"batch_prob": fixed.flip},
            "RandomAffine": {"angle": -fixed.angle, "translations": shift},  # clockwise, like torchvision
            "RandomErasing": {"batch_prob": fixed.box is not None, "heights": y1 - y0, **box},
        }
        for item in parameters:
            for key, value in values.get(item.name.rpartition("_")[0], {}).items():
                item.data[key][:] = value
        return self.apply(indices, partial(self.transform, params=parameters))


PIPELINES: dict[str, Callable[[str, Setting], Pipeline]] = {
    "synthetic": Synthetic,
    "ours-triton": partial(Ours, backend="triton"),
    "ours-compiled": partial(Ours, backend="compiled"),
    "ours-eager": partial(Ours, backend="eager"),
    "torchvision-pil": PilLoader,
    "torchvision-pil-2": partial(PilLoader, workers=2),
    "torchvision-pil-2-resize-first": partial(PilLoader, workers=2, resize_first=True),
    "torchvision-v2-batch": V2,
    "torchvision-v2-image": partial(V2, per_image=True),
    "kornia": Kornia,
    "kornia-resize-first": partial(Kornia, resize_first=True),
}
