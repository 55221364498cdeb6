"""Rank labels by how likely they are wrong, and count which classes are taken for each other."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fmnist.evaluation.near_copies import are_near_copies
from fmnist.evaluation.neighbours import Neighbours

LOWEST = 1e-30  # of a probability, whose logarithm is taken
VOTERS, VOTE_WEIGHT = 10, 0.5  # chosen on planted errors
SPARE = 10  # nearest images more, in the place of those that are near copies
FEWEST = 2000  # labels that are voted on, where a tenth is less


@dataclass(frozen=True, kw_only=True)
class Suspects:
    """All labels, ranked; on the CPU.

    Attributes:
        order: int64 [N], positions, the most suspect first.
        own: float64 [N], probability of each image's own label.
        suggested: int64 [N], the likeliest other class.
        confidence: float64 [N], its probability.
    """

    order: Tensor
    own: Tensor
    suggested: Tensor
    confidence: Tensor


def rank_labels(
    probabilities: Tensor,
    labels: Tensor,
    images: Tensor,
    features: Tensor,
    device: torch.device,
    *,
    voters: int = VOTERS,
    weight: float = VOTE_WEIGHT,
) -> Suspects:
    """Rank labels by what the models and the nearest images say together, the most suspect first.

    With p(c) the probability of class c, and v(c) the share of the nearest images that are labelled c, the score of a
    label is the logarithm of p(c) v(c) ** weight minus that of the likeliest other class. Images that p alone
    does not count among the most suspect tenth come after, by p: neighbours cost a product with all images.

    Args:
        probabilities: float64 [N, num_classes], two classes or more; zeros for an image that no model speaks of, which
            takes no other's place among those that are voted on.
        labels: int64 [N].
        images: uint8 [N, H, W] or [N, C, H, W]: near copies of an image do not vote on its label, which is theirs.
        features: [N, D], any float type.
        device: where neighbours are searched.
        voters: how many nearest images vote.
        weight: of their votes; 0 ranks by the probabilities alone.

    Source:
        Votes: Bahri, Jiang and Gupta, "Deep k-NN for noisy labels", 2020, arXiv:2004.12289. Their product with p is a
        logarithmic opinion pool (Genest and Zidek 1986). Figures: experiments/label_audit.py, docs/audit.md.
    """
    own = probabilities.gather(1, labels[:, None])[:, 0]
    confidence, suggested = probabilities.scatter(1, labels[:, None], -1.0).max(dim=1)
    logs = probabilities.clamp(min=LOWEST).log()
    unknown = probabilities.sum(dim=1) == 0
    order = log_ratio(logs, labels).masked_fill(unknown, torch.inf).argsort(stable=True)
    doubted = order[: max(FEWEST, len(order) // 10) if weight else 0]
    neighbours = Neighbours(features, device)
    votes = vote_shares(doubted, labels, images, features, neighbours, probabilities.shape[1], voters)
    score = log_ratio(logs[doubted] + weight * votes.log(), labels[doubted])
    order = torch.cat((doubted[score.argsort(stable=True)], order[len(doubted) :]))
    return Suspects(order=order, own=own, suggested=suggested, confidence=confidence)


def log_ratio(logs: Tensor, labels: Tensor) -> Tensor:
    """Return float [N]: of logarithms [N, num_classes] that of the label minus the largest other one."""
    own = logs.gather(1, labels[:, None])[:, 0]
    return own - logs.scatter(1, labels[:, None], -torch.inf).amax(dim=1)


def vote_shares(
    queries: Tensor,
    labels: Tensor,
    images: Tensor,
    features: Tensor,
    neighbours: Neighbours,
    num_classes: int,
    voters: int,
) -> Tensor:
    """Return the share of each class among the labels of the nearest images, and of one more spread over all classes.

    Args:
        queries: int64 [Q], positions of the images that are voted on.
        labels: int64 [N].
        images: uint8 [N, H, W] or [N, C, H, W].
        features: [N, D], any float type.
        neighbours: of these N features.
        num_classes: there are.
        voters: of the nearest images that are neither the image itself nor a near copy of it.

    Returns:
        float64 [Q, num_classes], above 0; each row sums to 1.
    """
    among = min(voters + SPARE, len(labels) - 1)
    votes = torch.full((len(queries), num_classes), 1 / num_classes, dtype=torch.float64)
    if among < 1:
        return votes
    near = neighbours(features[queries], among, queries)[1]
    counted = ~are_near_copies(images, queries, near)
    counted &= counted.cumsum(dim=1) <= voters
    votes.scatter_add_(1, labels[near], counted.double())
    return votes / (1 + counted.sum(dim=1, keepdim=True))


def confident_joint(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Count labels by the class that they seem to be.

    An image counts for a class that is at least as likely as it is, on average, for the images labelled so; for the
    likeliest of several such classes, and for none where there is none.

    Args:
        probabilities: float64 [N, num_classes].
        labels: int64 [N].

    Returns:
        int64 [num_classes, num_classes]: given label by likely class.

    Source:
        Northcutt, Jiang and Chuang, "Confident learning: estimating uncertainty in dataset labels", 2021,
        arXiv:1911.00068, section 3.1.
    """
    num_classes = probabilities.shape[1]
    present = torch.bincount(labels, minlength=num_classes)
    own = probabilities.gather(1, labels[:, None])[:, 0]
    threshold = torch.zeros(num_classes, dtype=own.dtype).index_add(0, labels, own) / present.clamp(min=1)
    threshold[present == 0] = torch.inf
    confident = torch.where(probabilities >= threshold, probabilities, -1.0)
    value, likely = confident.max(dim=1)
    counted = value >= 0
    cells = labels[counted] * num_classes + likely[counted]
    return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)
