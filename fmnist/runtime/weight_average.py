"""The moving average of a model's weights, in two launches a step."""

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn


class WeightAverage(ModelEmaV3):
    """timm's moving average, to the bit, over tensors that are looked up once instead of in two state dicts a step.

    So a model's buffers may not be replaced after the first update; they are filled in place by all that trains here. A
    tensor that has several names in a model, as CoaT's, is moved once; timm's moves it once for each.
    """

    _floats: tuple[list[Tensor], list[Tensor]] | None = None
    _counts: tuple[list[Tensor], list[Tensor]]

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Move the average towards a model, the same one each time; counts such as BatchNorm's are copied."""
        if self._floats is None:
            own, new = (each.state_dict(keep_vars=True).values() for each in (self.module, model))
            pairs = {id(mine): (mine, theirs) for mine, theirs in zip(own, new, strict=True)}.values()
            floats, counts = ([pair for pair in pairs if pair[0].is_floating_point() is kind] for kind in (True, False))
            self._floats = [mine for mine, _ in floats], [theirs for _, theirs in floats]
            self._counts = [mine for mine, _ in counts], [theirs for _, theirs in counts]
        torch._foreach_lerp_(*self._floats, weight=1.0 - decay)
        if self._counts[0]:
            torch._foreach_copy_(*self._counts)
