"""A small hybrid: convolutions while the maps are large, attention among the 7 x 7 places that are left of 28 px."""

from collections.abc import Sequence

from timm.models.vision_transformer import Block
from torch import Tensor, nn

from fmnist.models.cnn import Cnn


class Hybrid(nn.Module):
    def __init__(
        self,
        num_classes: int,
        drop_rate: float = 0.0,
        widths: Sequence[int] = (32, 64, 128),
        *,
        blocks: int = 3,
        heads: int = 4,
        mlp_ratio: float = 2.0,
        in_channels: int = 1,
    ) -> None:
        """Build the network; it takes images of any size from 8 px.

        There is no position embedding: the zeros around the convolutions' maps already tell a place from another.

        Args:
            num_classes: logits per image.
            drop_rate: dropout probability before the head, in [0, 1).
            widths: channels of the strided stem and of one convolution at each lower resolution; the last is what the
                attention blocks work in.
            blocks: attention blocks.
            heads: of each block's attention; they share the last width evenly.
            mlp_ratio: hidden units of a block's perceptron, as a multiple of the last width.
            in_channels: of the images.

        Raises:
            ValueError: the last width is no multiple of the heads.
        """
        super().__init__()
        if widths[-1] % heads:
            raise ValueError(f"the last of widths {list(widths)} is no multiple of heads {heads}")
        depths = [1] * (len(widths) - 1)
        convolutions = Cnn(
            num_classes, widths=widths, depths=depths, stem_stride=2, early_pool=True, in_channels=in_channels
        )
        self.stem, self.stages = convolutions.stem, convolutions.stages
        self.blocks = nn.Sequential(*(Block(widths[-1], heads, mlp_ratio, qkv_bias=True) for _ in range(blocks)))
        self.norm, self.dropout = nn.LayerNorm(widths[-1]), nn.Dropout(drop_rate)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, num_classes] of images [B, in_channels, H, W]."""
        places = self.stages(self.stem(images)).flatten(2).transpose(1, 2)  # [B, 49, C] of 28 px
        return self.head(self.dropout(self.norm(self.blocks(places)).mean(1)))
