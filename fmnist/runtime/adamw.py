"""AdamW with few launches: layer decay makes dozens of parameter groups."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class FusedAdamW(torch.optim.AdamW):
    """torch's fused AdamW, to the bit, in one launch for all groups that share learning rate and weight decay.

    torch launches two a group: the second, which counts steps, is one for all here.

    Args:
        groups: parameter groups, of one device and dtype.
        lr: learning rate.
        betas: of the averages of gradients and of their squares; the same in all groups.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, lr=lr, betas=betas, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient; `closure` is not called."""
        launches: dict[tuple[float, float], list[list[Tensor]]] = {}
        for group in self.param_groups:
            lists = launches.setdefault((group["lr"], group["weight_decay"]), [[] for _ in range(6)])
            self._init_group(group, *lists)  # appends, and makes what a first step lacks
        if counts := [count for lists in launches.values() for count in lists[-1]]:
            torch._foreach_add_(counts, 1)
        (beta1, beta2), eps = self.defaults["betas"], self.defaults["eps"]
        for (lr, weight_decay), lists in launches.items():
            if lists[0]:
                torch._fused_adamw_(
                    *lists,
                    lr=lr,
                    beta1=beta1,
                    beta2=beta2,
                    weight_decay=weight_decay,
                    eps=eps,
                    amsgrad=False,
                    maximize=False,
                )
