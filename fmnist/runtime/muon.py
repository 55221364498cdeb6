"""Muon: momentum whose step is made orthogonal, for the matrices and filters of hidden layers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fmnist.runtime.adamw import FusedAdamW

# Keller Jordan's quintic: five steps bring every singular value near 1, without a decomposition.
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


def suits_muon(parameter: nn.Parameter) -> bool:
    """Say whether a parameter is a matrix once its input channels and kernel are one dimension.

    Vectors are not; nor are depthwise kernels, a stem's kernels for one channel, and position embeddings [1, N, D].
    """
    return parameter.ndim >= 2 and min(parameter.shape[:2]) > 1


def orthogonalize(matrix: Tensor) -> Tensor:
    """Bring the singular values of float32 [R, C] to about 1 (0.7 to 1.2), and keep its singular vectors.

    Source:
        Newton-Schulz iteration of Muon, https://kellerjordan.github.io/posts/muon/. In float32: the bfloat16 of torch's
        and timm's Muon takes twice as long on a CPU, and tens of times where the CPU has no such instructions.
    """
    a, b, c = COEFFICIENTS
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


class Muon(FusedAdamW):
    """Update groups with `muon: true` by Muon with Nesterov momentum, all others by AdamW.

    A step of Muon is scaled to the usual size of one of AdamW, 0.2 a value (root mean square, times the learning rate):
    one learning rate and one weight decay serve both.

    Args:
        groups: parameter groups, each with the key `muon`.
        lr: learning rate.
        betas: AdamW's; the first is Muon's momentum too.

    Source:
        Jordan 2024; the scale: Liu et al. 2025, Muon is Scalable for LLM Training.
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state; AdamW's own would look for a count of steps beside every parameter."""
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["muon"]]
            super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            for parameter in group["params"] if group["muon"] else ():
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        momentum, state = group["betas"][0], self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        matrix = gradient.lerp(buffer, momentum).flatten(1)
        direction = orthogonalize(matrix).view(parameter.shape)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction, alpha=-group["lr"] * 0.2 * max(matrix.shape) ** 0.5)
