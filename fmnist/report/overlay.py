"""An occlusion map laid over its picture."""

import torch
from torch import Tensor

FOR, AGAINST = (230, 97, 1), (0, 114, 178)  # orange and blue, told apart with any common colour blindness
FAINTEST = 0.05  # drop of the probability: a map without any above it stays pale
LEGEND = "orange: covering this lowers the probability of the prediction; blue: it raises it"


def overlay(image: Tensor, drops: Tensor) -> Tensor:
    """Lay a map over its picture in grey: the stronger the colour, the larger the change of the probability.

    Args:
        image: uint8 [H, W] or [3, H, W], CPU.
        drops: float32 [H, W], see `occlusion_map`.

    Returns:
        uint8 [3, H, W]; the strongest colour is that of the map's largest change, or of FAINTEST.
    """
    grey = image.float() if image.ndim == 2 else image.float().mean(dim=0)
    strength = 0.85 * drops.abs() / max(FAINTEST, float(drops.abs().max()))
    colours = torch.where(drops > 0, torch.tensor(FOR).view(3, 1, 1), torch.tensor(AGAINST).view(3, 1, 1))
    return ((1 - strength) * grey + strength * colours).round().byte()
