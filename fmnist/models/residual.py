"""ConvNeXt's residual stream in bf16: the same parameters under the same names, with fewer bytes moved in training.

Under autocast timm's ConvNeXt keeps its stream in float32, for two reasons: the layer scale (gamma) multiplies a bf16
map by float32 numbers, and LayerNorm is computed, and returned, in float32. Here what scales a map scales the weights
of the linear layer beside it: the layer scale, and drop path's 1 / (1 - rate), those of the layer before; a norm's
scale and shift those of the layer behind. That is computed in float32, and rounded once, as the weights are anyway. The
norm itself has no parameters left, takes bf16, sums in float32 and returns bf16, which is what the layer behind it
reads.

Evaluation, exports and the count of FLOPs keep timm's form, and its bits.
"""

from typing import TypeGuard, cast

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.layers.grn import GlobalResponseNorm
from timm.layers.norm import LayerNorm, LayerNorm2d
from timm.models.convnext import ConvNeXt, ConvNeXtBlock, ConvNeXtStage
from torch import Tensor, nn

Layer = nn.Linear | nn.Conv2d


def _without_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def _folds(norm: nn.Module) -> TypeGuard[nn.LayerNorm]:
    """Say whether a norm's scale and shift may go into the layer behind it."""
    return type(norm) in (LayerNorm, LayerNorm2d) and norm.weight is not None and norm.bias is not None


def _along(numbers: Tensor, weight: Tensor, dim: int) -> Tensor:
    """Return one number per output (`dim` 0) or input (1) channel in the shape that multiplies a weight."""
    return numbers.view([-1 if i == dim else 1 for i in range(weight.dim())])


def _shifted(layer: Layer, shift: Tensor) -> Tensor:
    """Return the bias that a layer has where `shift`, one number per channel, is added to all that it reads."""
    with _without_autocast(shift):
        bias = layer.weight.flatten(2).sum(2) @ shift if layer.weight.dim() == 4 else layer.weight @ shift
    return bias if layer.bias is None else layer.bias + bias


def _apply(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer, or a convolution, with other weights than its own."""
    return layer._conv_forward(x, weight, bias) if isinstance(layer, nn.Conv2d) else F.linear(x, weight, bias)


def _layer_norm(norm: nn.LayerNorm, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """Return LayerNorm over the channels in the dtype of `x`, its sums in float32, with the scale and shift given."""
    first = isinstance(norm, LayerNorm2d)
    with _without_autocast(x):
        x = F.layer_norm(x.permute(0, 2, 3, 1) if first else x, norm.normalized_shape, scale, shift, norm.eps)
    return x.permute(0, 3, 1, 2) if first else x


def normalized_layer(norm: nn.Module, layer: Layer, x: Tensor) -> Tensor:
    """Apply a norm and the layer behind it, the norm's scale and shift folded into the layer where they can be.

    Args:
        norm: over the channels of `x`.
        layer: linear, or a convolution without padding, so that the shift reaches all its pixels alike.
        x: [B, C, H, W] where the layer is a convolution, else [B, H, W, C].
    """
    if not _folds(norm):
        return cast(Tensor, layer(norm(x)))
    weight = layer.weight * _along(norm.weight, layer.weight, 1)
    return _apply(layer, _layer_norm(norm, x), weight, _shifted(layer, norm.bias))


def response_norm(grn: GlobalResponseNorm, x: Tensor) -> Tensor:
    """Return ConvNeXt V2's norm without its shift, in the dtype of `x`; sums over a map are float32, or wider."""
    with _without_autocast(x):
        wide = torch.promote_types(x.dtype, torch.float32)
        size = torch.linalg.vector_norm(x, dim=grn.spatial_dim, keepdim=True, dtype=wide)
        response = size / (size.mean(dim=grn.channel_dim, keepdim=True) + grn.eps) * grn.weight.view(grn.wb_shape)
        return torch.addcmul(x, x, response.to(x.dtype))  # x + x * response, rounded once


class LeanBlock(ConvNeXtBlock):
    """A block whose branch comes out of its second linear layer as it is added to the stream."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        drop = self.drop_path if isinstance(self.drop_path, DropPath) else None
        keep = 1 - drop.drop_prob if drop else 1.0
        branch = self.conv_dw(x)
        branch = branch if self.use_conv_mlp else branch.permute(0, 2, 3, 1)
        branch = self.mlp.act(normalized_layer(self.norm, self.mlp.fc1, branch))
        branch = self._second_layer(branch, 1 / keep if drop and drop.scale_by_keep else 1.0)
        branch = branch if self.use_conv_mlp else branch.permute(0, 3, 1, 2)
        if keep == 1:
            return branch + self.shortcut(x)
        kept = branch.new_empty(len(branch), 1, 1, 1).bernoulli_(keep)  # as timm draws them
        return torch.addcmul(self.shortcut(x), branch, kept)

    def _second_layer(self, x: Tensor, factor: float) -> Tensor:
        """Apply the second linear layer, scaled by the layer scale and `factor`, behind ConvNeXt V2's norm if any."""
        layer, grn = self.mlp.fc2, getattr(self.mlp, "grn", None)
        weight, bias = layer.weight, layer.bias if grn is None else _shifted(layer, grn.bias)
        x = x if grn is None else response_norm(grn, x)
        if self.gamma is None and factor == 1:
            return _apply(layer, x, weight, bias)
        scale = factor * (weight.new_ones(len(weight)) if self.gamma is None else self.gamma)
        return _apply(layer, x, weight * _along(scale, weight, 0), None if bias is None else bias * scale)


class LeanDownsample(nn.Sequential):
    """A norm and the convolution behind it, between two stages."""

    def forward(self, x: Tensor) -> Tensor:
        return normalized_layer(self[0], cast(nn.Conv2d, self[1]), x) if self.training else super().forward(x)


class LeanStem(nn.Sequential):
    """A stem from which the stream begins in the dtype of its last convolution."""

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return super().forward(images)
        *layers, norm = self
        x = images
        for layer in layers:
            x = layer(x)
        # there is no layer behind that could hold its scale and shift: rounded like those of a layer
        return _layer_norm(norm, x, norm.weight.to(x.dtype), norm.bias.to(x.dtype)) if _folds(norm) else norm(x).to(x)


PLAIN_PARTS: dict[type[nn.Module], type[nn.Module]] = {
    LeanBlock: ConvNeXtBlock,
    LeanDownsample: nn.Sequential,
    LeanStem: nn.Sequential,
}


def use_lean_residual(model: nn.Module) -> None:
    """Let timm's ConvNeXts of a model train with a residual stream in autocast's dtype; other models stay as they are.

    The layers stay where they are and keep their parameters; only the class of their containers changes. What hooks
    norms and second linear layers have is not called in training, since their parts are computed elsewhere.

    Args:
        model: changed in place; `use_stock_residual` changes it back.
    """
    for part in list(model.modules()):
        if type(part) is ConvNeXtBlock:
            part.__class__ = LeanBlock
        elif isinstance(part, ConvNeXt) and type(part.stem) is nn.Sequential:
            part.stem.__class__ = LeanStem
        elif isinstance(part, ConvNeXtStage) and type(part.downsample) is nn.Sequential:
            norm, conv = part.downsample
            without_padding = type(conv).forward is nn.Conv2d.forward and conv.padding in ((0, 0), "valid")
            if _folds(norm) and without_padding:  # else the shift would not reach the pixels at the edges
                part.downsample.__class__ = LeanDownsample


def use_stock_residual(model: nn.Module) -> None:
    """Undo `use_lean_residual`."""
    for part in model.modules():
        if type(part) in PLAIN_PARTS:
            part.__class__ = PLAIN_PARTS[type(part)]
