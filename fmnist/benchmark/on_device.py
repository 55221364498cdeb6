"""Libraries that augment on the device, fed from the same uint8 tensor as ours: torchvision v2 and kornia."""

from typing import Any

import torch
from torch import Tensor

from fmnist.benchmark.ground_truth import Fixed, box_pixels
from fmnist.benchmark.pil_loader import pin_torchvision, torchvision_transforms
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
from fmnist.data.fashion_mnist import MEAN, STD


class OnDevice(Pipeline):
    """What gathers its batch from the same uint8 tensor on the device, then calls another library on it."""

    transform: Any

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._loader = setting.loader()

    def gather(self, indices: Tensor) -> Tensor:
        """Return float32 [B, 1, H, W] in [0, 1]."""
        return self.setting.split.images[indices][:, None].float() / 255

    def apply(self, images: Tensor, transform: Any) -> Tensor:
        """Transform a gathered batch: float32 [B, 1, S, S]."""
        return transform(images)

    def fetch(self) -> tuple[Tensor, Tensor]:
        indices = self._loader.micro_batches(self.position)[0].indices
        images = self.apply(self.gather(indices), self.transform).to(self.setting.dtype)
        return images, self.setting.split.labels[indices]


class V2Batch(OnDevice):
    name, description = "torchvision-v2-batch", "torchvision v2 on the device, one draw per batch (weaker)"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        from torchvision.transforms import v2

        self.transform = torchvision_transforms(v2, setting.size, [])

    def pinned(self, indices: Tensor, fixed: Fixed) -> Tensor:
        transform = pin_torchvision(self.transform, fixed, self.setting.size)
        return self.apply(self.gather(indices), transform).to(self.setting.dtype)


class V2Image(V2Batch):
    name, description = "torchvision-v2-image", "torchvision v2 on the device, image by image"

    def apply(self, images: Tensor, transform: Any) -> Tensor:
        return torch.stack([transform(image) for image in images])


class Kornia(OnDevice):
    name, description = "kornia", "kornia on the device, per sample"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        try:
            import kornia.augmentation as room
        except ImportError:
            raise UnavailableError("not installed; pip install -r requirements-benchmark.txt") from None
        self.check_resize_first()
        size, (mean, std) = setting.size, (torch.tensor([MEAN]), torch.tensor([STD]))
        resize: list[Any] = [room.Resize((size, size), align_corners=False)]  # its default, True, is another geometry
        warp: list[Any] = [
            room.RandomHorizontalFlip(p=FLIP),
            room.RandomAffine(ROTATION, translate=(SHIFT, SHIFT), p=1.0),
        ]
        self.transform = room.AugmentationSequential(
            *(resize + warp if self.resizes_first else warp + resize),
            room.Normalize(mean, std),
            room.RandomErasing(scale=ERASE_AREA, ratio=ERASE_ASPECT, p=ERASE),
            data_keys=["input"],
        ).to(setting.device)

    def pinned(self, indices: Tensor, fixed: Fixed) -> Tensor:
        images = self.gather(indices)
        parameters = self.transform.forward_parameters(images.shape)
        x0, y0, x1, y1 = box_pixels(fixed, self.setting.size)
        fixed = self.seen(fixed)
        values: dict[str, dict[str, Any]] = {
            "RandomHorizontalFlip": {"batch_prob": fixed.flip},
            # Like torchvision, it turns clockwise for a positive angle.
            "RandomAffine": {"angle": -fixed.angle, "translations": torch.tensor([fixed.shift_x, fixed.shift_y])},
            "RandomErasing": {
                "batch_prob": fixed.box is not None,
                **{"xs": x0, "ys": y0, "widths": x1 - x0, "heights": y1 - y0},
            },
        }
        for item in parameters:
            for key, value in values.get(item.name.rpartition("_")[0], {}).items():
                item.data[key][:] = value
        return self.transform(images, params=parameters).to(self.setting.dtype)


class KorniaResizeFirst(Kornia):
    name, description = "kornia-resize-first", "kornia on the device, per sample, resize first"
    chain = "resize, then warp"
