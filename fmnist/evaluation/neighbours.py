"""Nearest neighbours by cosine on the device, and how often they are of the same class."""

from __future__ import annotations

import torch
from torch import Tensor

from fmnist.evaluation.features import unit

QUERIES_AT_ONCE = 256


class Neighbours:
    """Items whose nearest to a query are found by one matrix product and a top-k, in float32.

    Args:
        features: [N, D], any float type; need not be of length 1.
        device: where the product is computed; float32 [N, D] stay there.
    """

    def __init__(self, features: Tensor, device: torch.device) -> None:
        self.unit = unit(features.to(device))

    def __len__(self) -> int:
        return len(self.unit)

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
            cosines = unit(queries[part].to(self.unit.device)) @ self.unit.T
            if exclude is not None:
                itself = exclude[part].to(cosines.device)
                known = itself >= 0
                cosines[known.nonzero().flatten(), itself[known]] = -torch.inf
            values, items = cosines.topk(k, dim=1)
            similarities.append(values.cpu())
            positions.append(items.cpu())
        return torch.cat(similarities), torch.cat(positions)


def precision_at_k(
    neighbours: Neighbours, labels: Tensor, queries: Tensor, query_labels: Tensor, k: int, exclude: Tensor | None = None
) -> Tensor:
    """Return, for each query, the share of its k nearest items that are of its class.

    Args:
        neighbours: N items.
        labels: int [N], their classes.
        queries: [Q, D].
        query_labels: int [Q].
        k: items counted per query.
        exclude: int64 [Q], the item that is the query itself; see Neighbours.

    Returns:
        float64 [Q].

    Source:
        Manning, Raghavan and Schuetze, "Introduction to Information Retrieval", 2008, section 8.4.
    """
    _, positions = neighbours(queries, k, exclude)
    return (labels.cpu()[positions] == query_labels.cpu()[:, None]).double().mean(1)
