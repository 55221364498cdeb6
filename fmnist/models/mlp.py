"""A perceptron with two hidden layers: the baseline that knows nothing of neighbouring pixels."""

from torch import Tensor, nn


class Mlp(nn.Module):
    def __init__(
        self, num_classes: int, drop_rate: float = 0.0, *, image_size: int, in_channels: int = 1, width: int = 512
    ) -> None:
        """Build the network for images of one size.

        Args:
            num_classes: logits per image.
            drop_rate: dropout probability after each hidden layer, in [0, 1).
            image_size: height and width of the images, in pixels.
            in_channels: of the images.
            width: units of each hidden layer.
        """
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Flatten(),
            nn.Linear(in_channels * image_size**2, width),
            nn.SiLU(),
            nn.Dropout(drop_rate),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Dropout(drop_rate),
        )
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, num_classes] of images [B, in_channels, image_size, image_size]."""
        return self.head(self.hidden(images))
