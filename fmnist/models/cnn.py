"""A small convolutional network for 28 px: a quarter of a million parameters, trained in seconds per epoch on a CPU."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def _conv(in_channels: int, out_channels: int, *, stride: int = 1, pool: bool = False) -> nn.Sequential:
    # 3 x 3, and 4 x 4 with stride 2. No bias: BatchNorm subtracts it again.
    conv = nn.Conv2d(in_channels, out_channels, 2 + stride, stride, padding=1, bias=False)
    return nn.Sequential(conv, *([nn.MaxPool2d(2)] if pool else []), nn.BatchNorm2d(out_channels), nn.SiLU())


class CellPool(nn.Module):
    """Average maps over `cells` x `cells` cells, equally far apart, which overlap where the sizes do not divide.

    Not AdaptiveAvgPool2d: its gradient on a GPU is summed in no fixed order, and ONNX knows no such pooling.
    """

    def __init__(self, cells: int) -> None:
        super().__init__()
        self.cells = cells

    def forward(self, maps: Tensor) -> Tensor:
        """Return [B, C, cells, cells] of maps [B, C, H, W]; neither H nor W below cells."""
        if min(maps.shape[2:]) < self.cells:
            size = " x ".join(map(str, maps.shape[2:]))
            raise ValueError(
                f"pool_size is {self.cells}, but the last maps are {size}: train on larger images, or lower it"
            )
        strides = [size // self.cells for size in maps.shape[2:]]
        kernel = [size - (self.cells - 1) * by for size, by in zip(maps.shape[2:], strides, strict=True)]
        return F.avg_pool2d(maps, kernel, strides)


class Cnn(nn.Module):
    def __init__(
        self,
        num_classes: int,
        drop_rate: float = 0.0,
        widths: Sequence[int] = (32, 64, 128),
        depths: Sequence[int] | None = None,
        *,
        stem_stride: int = 1,
        early_pool: bool = False,
        pool_size: int = 1,
        in_channels: int = 1,
    ) -> None:
        """Build the network; it takes images of any size whose last maps have pool_size values a side.

        Args:
            num_classes: logits per image.
            drop_rate: dropout probability before the head, in [0, 1).
            widths: channels of the stem and of each stage; a stage sees half the resolution of the one before.
            depths: convolutions of each stage; none is two in each.
            stem_stride: 1, or 2: the stem halves the resolution, and the first stage does not.
            in_channels: of the images.
            early_pool: halve between a stage's last convolution and its norm, which is cheaper than after both.
            pool_size: cells in a row of the grid in which the last maps are averaged; the head reads widths[-1] values
                of each, and so knows where in the image they were. 1: a mean over all.

        Raises:
            ValueError: widths and depths do not belong together, or a stride that is neither.
        """
        super().__init__()
        depths = [2] * (len(widths) - 1) if depths is None else depths
        if len(depths) != len(widths) - 1 or min(depths, default=1) < 1 or stem_stride not in (1, 2) or pool_size < 1:
            raise ValueError(
                f"widths {list(widths)}, depths {list(depths)}, stem_stride {stem_stride}, pool_size {pool_size}; "
                "valid: a width for the stem and for each stage, a depth of 1 or more for each stage, a stride of 1 or "
                "2, a pool_size of 1 or more"
            )
        strided = stem_stride == 2
        self.stem = _conv(in_channels, widths[0], stride=stem_stride, pool=early_pool and not strided)
        stages = []
        for i, (width_in, width, depth) in enumerate(zip(widths[:-1], widths[1:], depths, strict=True)):
            pools_first = not early_pool and not (strided and i == 0)
            pools_last = early_pool and i + 1 < len(depths)
            convs = [_conv(width_in, width, pool=pools_last and depth == 1)]
            convs += [_conv(width, width, pool=pools_last and j == depth) for j in range(2, depth + 1)]
            stages.append(nn.Sequential(*([nn.MaxPool2d(2)] if pools_first else []), *convs))
        self.stages = nn.Sequential(*stages)
        pool = nn.AdaptiveAvgPool2d(1) if pool_size == 1 else CellPool(pool_size)
        self.pool = nn.Sequential(pool, nn.Flatten(), nn.Dropout(drop_rate))
        self.head = nn.Linear(widths[-1] * pool_size**2, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, num_classes] of images [B, in_channels, H, W]."""
        return self.head(self.pool(self.stages(self.stem(images))))
