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

from fmnist.benchmark.command_line import LOADERS
from fmnist.benchmark.pipelines import Fixed, Ours, Pipeline, Setting, Synthetic, library_steps
from fmnist.data.augment import with_channels
from fmnist.data.split import Split

BILINEAR = {"interpolation": transforms.InterpolationMode.BILINEAR}


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

    def __init__(self, name: str, setting: Setting) -> None:
        super().__init__(name, setting)
        self.multiple = setting.workers if name == "torchvision-pil" else 2
        if name == "torchvision-pil" and setting.workers <= 2:
            raise ValueError(f"{setting.workers} cores: the same as 2 workers")
        self.own_rounding = 1 / 255 if setting.channels == 3 else 0.0
        self.transform = transforms.Compose(library_steps(transforms, self, BILINEAR, transforms.ToTensor()))
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

    def __init__(self, name: str, setting: Setting) -> None:
        super().__init__(name, setting)
        self.transform = v2.Compose(library_steps(v2, self, BILINEAR))

    def apply(self, indices: Tensor, transform: Callable[[Tensor], Tensor]) -> Tensor:
        one_by_one = self.name.endswith("image")
        return super().apply(indices, lambda x: torch.stack([*map(transform, x)]) if one_by_one else transform(x))

    def apply_fixed(self, indices: Tensor, fixed: Fixed) -> Tensor:
        return self.apply(indices, fix_torchvision(self.transform, fixed, self.setting.size))


class Kornia(OnDevice):
    """kornia, which draws for each sample."""

    def __init__(self, name: str, setting: Setting) -> None:
        super().__init__(name, setting)
        import kornia.augmentation as K  # late: it may not be installed

        # align_corners=True, its default, is another geometry
        steps = library_steps(K, self, {"align_corners": False}, p=1.0)
        self.transform = K.AugmentationSequential(*steps, data_keys=["input"]).to(setting.device)

    def apply_fixed(self, indices: Tensor, fixed: Fixed) -> Tensor:
        parameters = self.transform.forward_parameters(with_channels(self.setting.split.images[indices]).shape)
        x0, y0, x1, y1 = fixed.box_pixels(self.setting.size)
        left, top, width, height = fixed.crop or (0, 0, 1, 1)
        right, bottom = left + width - 1, top + height - 1
        corners = torch.tensor([[left, top], [right, top], [right, bottom], [left, bottom]])
        box = {"xs": x0, "ys": y0, "widths": x1 - x0, "heights": y1 - y0}
        shift = torch.tensor([fixed.shift_x, fixed.shift_y])
        values: dict[str, dict[str, Any]] = {
            "RandomResizedCrop": {"src": corners},
            "ColorJitter": fixed.factors() | {"hue_factor": 0.0},
            "RandomHorizontalFlip": {"batch_prob": fixed.flip},
            "RandomAffine": {"angle": -fixed.angle, "translations": shift},  # clockwise, like torchvision
            "RandomErasing": {"batch_prob": fixed.box is not None} | box,
        }
        for item in parameters:
            for key, value in values.get(item.name.rpartition("_")[0], {}).items():
                item.data[key][:] = value
        return self.apply(indices, partial(self.transform, params=parameters))


# By the beginning of a loader's name; the rest says which variant.
KINDS = {"synthetic": Synthetic, "ours": Ours, "torchvision-pil": PilLoader, "torchvision-v2": V2, "kornia": Kornia}
PIPELINES: dict[str, Any] = {
    name: next(kind for begin, kind in KINDS.items() if name.startswith(begin)) for name in LOADERS
}
