"""A small convolutional network for 28 px: 0.28 M parameters, trained in seconds per epoch on a CPU."""

from collections.abc import Sequence

from torch import Tensor, nn


def _conv(in_channels: int, out_channels: int, *, stride: int = 1, pool: bool = False) -> nn.Sequential:
    # 3 x 3, and 4 x 4 with stride 2. No bias: BatchNorm subtracts it again.
    conv = nn.Conv2d(in_channels, out_channels, 2 + stride, stride, padding=1, bias=False)
    return nn.Sequential(conv, *([nn.MaxPool2d(2)] if pool else []), nn.BatchNorm2d(out_channels), nn.SiLU())


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
        in_channels: int = 1,
    ) -> None:
        """Build the network; it takes images of any size from 8 px.

        Args:
            num_classes: logits per image.
            drop_rate: dropout probability before the head, in [0, 1).
            widths: channels of the stem and of each stage; a stage sees half the resolution of the one before.
            depths: convolutions of each stage; none is two in each.
            stem_stride: 1, or 2: the stem halves the resolution, and the first stage does not.
            in_channels: of the images.
            early_pool: halve between a stage's last convolution and its norm, which is cheaper than after both.

        Raises:
            ValueError: widths and depths do not belong together, or a stride that is neither.
        """
        super().__init__()
        depths = [2] * (len(widths) - 1) if depths is None else depths
        if len(depths) != len(widths) - 1 or min(depths, default=1) < 1 or stem_stride not in (1, 2):
            raise ValueError(
                f"widths {list(widths)}, depths {list(depths)}, stem_stride {stem_stride}; valid: a width for the stem "
                "and for each stage, a depth of 1 or more for each stage, a stride of 1 or 2"
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
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(drop_rate))
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, num_classes] of images [B, in_channels, H, W]."""
        return self.head(self.pool(self.stages(self.stem(images))))
