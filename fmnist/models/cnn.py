"""A small convolutional network for 28 px: 0.28 M parameters, trained in seconds per epoch on a CPU."""

from collections.abc import Sequence

from torch import Tensor, nn


def _conv(in_channels: int, out_channels: int) -> nn.Sequential:
    # No bias: BatchNorm subtracts it again.
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.SiLU())


class Cnn(nn.Module):
    def __init__(self, num_classes: int, drop_rate: float = 0.0, widths: Sequence[int] = (32, 64, 128)) -> None:
        """Build the network; it takes one-channel images of any size from 8 px.

        Args:
            num_classes: logits per image.
            drop_rate: dropout probability before the head, in [0, 1).
            widths: channels at full, half, quarter ... resolution.
        """
        super().__init__()
        self.stem = _conv(1, widths[0])
        self.stages = nn.Sequential(
            *(
                nn.Sequential(nn.MaxPool2d(2), _conv(width_in, width), _conv(width, width))
                for width_in, width in zip(widths[:-1], widths[1:], strict=True)
            )
        )
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(drop_rate))
        self.head = nn.Linear(widths[-1], num_classes)
        self.head_hidden_size = widths[-1]

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the last stage's map [B, widths[-1], h, w] of images [B, 1, H, W]."""
        return self.stages(self.stem(images))

    def forward_head(self, maps: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits [B, num_classes] of the last stage's map, or with `pre_logits` features [B, widths[-1]]."""
        features = self.pool(maps)
        return features if pre_logits else self.head(features)

    def get_classifier(self) -> nn.Linear:
        """Return the layer that makes the logits."""
        return self.head

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, num_classes] of images [B, 1, H, W]."""
        return self.forward_head(self.forward_features(images))
