"""The means of pixels that a run reads where it shrinks its images by 2 or more, for a program without fmnist."""

import torch

from fmnist.data.pyramid import level_of


def level_read(image_shape: tuple[int, ...], size: int) -> int:
    """Return the level of the pyramid that evaluation reads for images [..., H, W] at so many pixels per side."""
    height, width = image_shape[-2:]
    return level_of(min(height, width) / size, (height, width))


# The model card shows its source as it stands: torch is all it may need.
def means(images: torch.Tensor, level: int) -> torch.Tensor:
    """Average uint8 [N, C, H, W] over areas, for height H >> level and width W >> level; float32, whole numbers."""
    weights = []
    for side in images.shape[-2:]:
        small = side >> level
        first, pixel = torch.arange(small)[:, None] * side, torch.arange(side) * small
        shared = torch.minimum(first + side, pixel + small) - torch.maximum(first, pixel)
        weights.append(shared.clamp(min=0).double())  # float64 holds these sums exactly: halves go to the even number
    return (weights[0] @ images.double() @ weights[1].T / (weights[0][0].sum() * weights[1][0].sum())).round().float()
