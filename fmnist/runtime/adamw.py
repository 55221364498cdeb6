"""AdamW with few launches: layer decay makes dozens of parameter groups."""

from collections.abc import Callable
from typing import Any, cast

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

    # What a step needs beside the gradients, looked up again only where that may have changed.
    _launches: tuple[tuple[dict[str, Any], list[list[Tensor]]], ...] = ()
    _counts: tuple[Tensor, ...] = ()
    _made_for: tuple[object, ...] = ()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient; `closure` is not called."""
        groups, firsts = self.param_groups, dict[tuple[float, float], int]()
        launch = [firsts.setdefault((g["lr"], g["weight_decay"]), number) for number, g in enumerate(groups)]
        absent = [p.grad is None for group in groups for p in group["params"]]
        if self._made_for[1:] != (launch, absent) or self._made_for[0] is not self.state:
            self._prepare(launch)
            self._made_for = self.state, launch, absent
        if self._counts:
            torch._foreach_add_(self._counts, 1)
        (beta1, beta2), eps = self.defaults["betas"], self.defaults["eps"]
        for group, (params, *state) in self._launches:
            torch._fused_adamw_(
                params,
                cast("list[Tensor]", [p.grad for p in params]),
                *state,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=eps,
                amsgrad=False,
                maximize=False,
            )

    def _prepare(self, launch: list[int]) -> None:
        """Gather the tensors of each launch, and make what a first step lacks.

        Args:
            launch: of each group, the number of the first that shares its launch.
        """
        launches: dict[int, list[list[Tensor]]] = {}
        for group, first in zip(self.param_groups, launch, strict=True):
            self._init_group(group, *launches.setdefault(first, [[] for _ in range(6)]))  # appends
        self._launches = tuple(
            (self.param_groups[first], [params, *state]) for first, (params, _, *state) in launches.items() if params
        )
        self._counts = tuple(count for _, (*_, counts) in self._launches for count in counts)
