"""A wide residual network for small images: few layers, many channels."""

import torch.nn.functional as F
from torch import Tensor, nn


class WideResNet(nn.Module):
    def __init__(
        self, num_classes: int, drop_rate: float = 0.0, *, depth: int = 16, width: int = 8, in_channels: int = 1
    ) -> None:
        """Build the network; it takes images of any size from 8 px.

        Args:
            num_classes: logits per image.
            drop_rate: dropout probability between the two convolutions of a block, in [0, 1).
            depth: convolutions in all: that of the stem, two in each of n blocks of each of three stages, and one in a
                stage's shortcut: 6 n + 4.
            width: the stages have 16, 32 and 64 times this many channels.
            in_channels: of the images.

        Raises:
            ValueError: depth is not 6 n + 4.

        Source: Zagoruyko and Komodakis 2016, arXiv:1605.07146; WRN-16-8 is depth 16, width 8.
        """
        super().__init__()
        if depth < 10 or depth % 6 != 4 or width < 1:
            raise ValueError(f"depth {depth}, width {width}; valid: depth 10, 16, 22, 28 and so on, width 1 or more")
        channels, blocks = 16, []
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        for stage in range(3):
            for block in range((depth - 4) // 6):
                wide = 16 * width * 2**stage
                blocks.append(Block(channels, wide, stride=2 if stage and not block else 1, drop_rate=drop_rate))
                channels = wide
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, num_classes] of images [B, in_channels, H, W]."""
        return self.head(F.relu(self.norm(self.blocks(self.stem(images)))).mean((2, 3)))


class Block(nn.Module):
    """Two 3 x 3 convolutions, each behind its norm and ReLU, and a sum around them."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, drop_rate: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(in_channels), nn.BatchNorm2d(out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(drop_rate)
        same = in_channels == out_channels and stride == 1
        self.shortcut = None if same else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Return [B, out_channels, H', W'] of [B, in_channels, H, W]."""
        ready = F.relu(self.norm1(maps))
        residual = self.conv2(self.dropout(F.relu(self.norm2(self.conv1(ready)))))
        return residual + (maps if self.shortcut is None else self.shortcut(ready))
