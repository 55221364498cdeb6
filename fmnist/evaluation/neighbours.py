"""Nearest neighbours by cosine on the device, and how often they are of the same class."""

from collections.abc import Callable

import torch
from torch import Tensor

from fmnist.evaluation.features import unit
from fmnist.runtime.processes import ALONE, Processes

QUERIES_AT_ONCE, ITEMS_AT_ONCE = 256, 8192  # of a product: the same ones, and so the same bits, on any process count


class Neighbours:
    """Items whose nearest to a query are found by one matrix product and a top-k, in float32.

    Args:
        features: [N, D], any float type; need not be of length 1.
        device: where the product is computed; float32 [N, D] stay there, of each process its share.
        processes: share the items.
        made_by: makes the features of some items, where `features` are still the images.
    """

    def __init__(
        self,
        features: Tensor,
        device: torch.device,
        processes: Processes = ALONE,
        made_by: Callable[[Tensor], Tensor] = lambda items: items,
    ) -> None:
        starts = processes.share(range(0, len(features), ITEMS_AT_ONCE))
        self._count, self._processes, self._first = len(features), processes, starts[0] if starts else 0
        mine = features[starts[0] : starts[-1] + ITEMS_AT_ONCE] if starts else features[:0]
        self._unit = unit((made_by(mine) if len(mine) else torch.zeros(0, 1)).to(device))

    def __len__(self) -> int:
        return self._count

    @torch.no_grad()
    def __call__(self, queries: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Find the k nearest items of each query.

        Args:
            queries: [Q, D], any float type; need not be of length 1.
            k: 1 to N, or to N - 1 with exclude.
            exclude: int64 [Q], the item that is the query itself and does not count; -1 for none.

        Returns:
            float32 [Q, k] cosines, highest first, and int64 [Q, k] positions, on the CPU.

        Raises:
            ValueError: k is out of range.
        """
        available = len(self) - (exclude is not None and bool((exclude >= 0).any()))
        if not 1 <= k <= available:
            raise ValueError(f"k is {k}; valid range: 1 to {available}, the items to choose from")
        similarities, positions = [torch.zeros(0, k)], [torch.zeros(0, k, dtype=torch.int64)]
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            part = slice(start, start + QUERIES_AT_ONCE)
            itself = None if exclude is None else exclude[part].to(self._unit.device)
            values, items = self._nearest(unit(queries[part].to(self._unit.device)), k, itself)
            similarities.append(values.cpu())
            positions.append(items.cpu())
        # [Q, W x k]: the nearest of each process's share
        every = (self._processes.gather_rows(torch.cat(part)) for part in (similarities, positions))
        values, items = (torch.cat(found.split(len(queries) or 1), dim=1) for found in every)
        return _first(values, items, k)

    def _nearest(self, queries: Tensor, k: int, itself: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the k nearest of this process's items, filled up with none where it has fewer."""
        values = torch.full((len(queries), k), -torch.inf, device=queries.device)
        items = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)
        for start in range(0, len(self._unit), ITEMS_AT_ONCE):
            cosines = queries @ self._unit[start : start + ITEMS_AT_ONCE].T
            if itself is not None:
                at = itself - self._first - start
                here = (at >= 0) & (at < cosines.shape[1])
                cosines[here.nonzero().flatten(), at[here]] = -torch.inf
            near, places = cosines.topk(min(k, cosines.shape[1]), dim=1)
            both = torch.cat((values, near), dim=1), torch.cat((items, places + self._first + start), dim=1)
            values, items = _first(*both, k)
        return values, items


def _first(values: Tensor, items: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k highest of each row, and their items; of equal ones those that come first."""
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values[:, :k], items.gather(1, order[:, :k])


def precision_at_k(neighbours: Neighbours, labels: Tensor, queries: Tensor, query_labels: Tensor, k: int) -> Tensor:
    """Return, for each query, the share of its k nearest items that are of its class.

    Args:
        neighbours: N items.
        labels: int [N], their classes.
        queries: [Q, D].
        query_labels: int [Q].
        k: items counted per query.

    Returns:
        float64 [Q].

    Source:
        Manning, Raghavan and Schuetze, "Introduction to Information Retrieval", 2008, section 8.4.
    """
    _, positions = neighbours(queries, k)
    return (labels.cpu()[positions] == query_labels.cpu()[:, None]).double().mean(1)
