"""Find the images of a split that nearly copy a training image."""

import functools
import logging
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fmnist.config.schema import DataConfig
from fmnist.data.registry import open_source
from fmnist.data.split import Split
from fmnist.runtime.processes import ALONE, Processes

logger = logging.getLogger("fmnist")
NEAR_COPY, SIMILAR = 0.99, 0.98  # correlations above which an image counts as a near copy, or as similar
BASIS_SIZE = 96
CHUNK = 2048  # images of one side of a matrix product
REFERENCES = 4 * CHUNK  # training images of the other side, which are with it on the device: 2,048 x 8,192 are 67 MB
MARGIN = 1e-4  # of the float32 bound, whose rounding is near 1e-6
PAIR_SIDE, MAX_PAIRS = 48, 200_000
PAIRS = 512  # whose pixels are multiplied at once


@dataclass(frozen=True, kw_only=True)
class NearCopies:
    """The images of a split that resemble a training image, most alike first.

    Attributes:
        indices: int64 [M], their positions in the split.
        partners: int64 [M], the position of the most alike training image.
        correlations: float64 [M], Pearson's, over pixels.
        num_images: of the split.
    """

    indices: Tensor
    partners: Tensor
    correlations: Tensor
    num_images: int

    def above(self, threshold: float) -> Tensor:
        """Return int64 positions, sorted, of the images whose correlation is above a threshold."""
        return self.indices[self.correlations > threshold].sort().values


def _centred(images: Tensor) -> Tensor:
    """Flatten, subtract each image's mean and divide by its norm; a constant image stays zero and resembles none."""
    flat = images.flatten(1).float()
    flat = flat - flat.mean(dim=1, keepdim=True)
    return flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-6)


def _principal_basis(second_moment: Tensor) -> Tensor:
    """Return orthonormal columns near the leading principal axes: a few power iterations, products only."""
    size = min(BASIS_SIZE, len(second_moment))
    start = torch.randn(len(second_moment), size, generator=torch.Generator().manual_seed(0))
    axes = start.to(second_moment.device)
    for _ in range(3):
        axes = torch.linalg.qr(second_moment @ axes).Q
    return axes


def _with_rest(unit: Tensor, basis: Tensor) -> Tensor:
    """Return coordinates in the basis, and in one column more the norm of what the basis leaves out."""
    coordinates = unit @ basis
    rest = (unit.square().sum(1) - coordinates.square().sum(1)).clamp(min=0).sqrt()
    return torch.cat([coordinates, rest[:, None]], dim=1)


@torch.inference_mode()
def find_near_copies(
    images: Tensor,
    training: Tensor,
    threshold: float = SIMILAR,
    device: torch.device | None = None,
    processes: Processes = ALONE,
) -> NearCopies:
    """Find the images that correlate with a training image above a threshold; exact, in chunks of products.

    Correlation is a product of centred unit vectors. Cut into principal coordinates and a rest, the product of the
    rests is at most that of their norms (Cauchy and Schwarz): a product of 97 columns instead of 784 bounds each pair
    from above, and only the few pairs whose bound passes are computed whole.

    Args:
        images: uint8 [N, H, W].
        training: uint8 [T, H, W].
        threshold: Pearson correlation, below 1.
        device: where it is computed, a part at a time; None is that of the images.
        processes: each looks through its share of the training images, and all learn what was found.

    Returns:
        What was found, on the CPU: the same for every device and process count.
    """
    device = device or images.device
    mine = list(processes.share(range(0, len(training), REFERENCES)))
    # of these training images alone: any basis bounds, and the nearest to theirs most closely
    moments = [unit.T @ unit for unit in (_centred(training[at : at + REFERENCES].to(device)) for at in mine)]
    basis = _principal_basis(torch.stack(moments).sum(0)) if moments else None
    pairs, exact = [torch.zeros(0, 2, dtype=torch.int64)], [torch.zeros(0, dtype=torch.float64)]
    for at in mine:
        assert basis is not None
        references = _centred(training[at : at + REFERENCES].to(device))
        bounding = _with_rest(references, basis).T
        for first in range(0, len(images), CHUNK):
            queries = _centred(images[first : first + CHUNK].to(device))
            bound = _with_rest(queries, basis) @ bounding
            row, column = torch.nonzero(bound > threshold - MARGIN, as_tuple=True)
            alike = _alike(queries, references, row, column, threshold)
            pairs.append(torch.stack((first + row[alike], at + column[alike]), dim=1).cpu())
            exact.append(correlations(images, training, pairs[-1]))
    found = [processes.gather_rows(torch.cat(part)) for part in (pairs, exact)]
    return _best(found[0], found[1], threshold, len(images))


def _best(pairs: Tensor, exact: Tensor, threshold: float, num_images: int) -> NearCopies:
    """Return each image with its most alike partner, of int64 [P, 2] pairs and their float64 [P] correlations."""
    order = (pairs[:, 0] << 32 | pairs[:, 1]).argsort()  # whoever found them, and in whatever order
    order = order[exact[order].argsort(descending=True, stable=True)]
    order = order[exact[order] > threshold]
    row, column = pairs.unbind(1)
    seen: dict[int, int] = {}  # an image of the split, and where it comes first: with its most alike partner
    for position, image in enumerate(row[order].tolist()):
        seen.setdefault(image, position)
    best = order[list(seen.values())]
    return NearCopies(indices=row[best], partners=column[best], correlations=exact[best], num_images=num_images)


def _alike(left: Tensor, right: Tensor, rows: Tensor, columns: Tensor, threshold: float) -> Tensor:
    """Say of which pairs of unit vectors the product may be above a threshold, bool [P]; a part of them at a time."""
    parts = zip(rows.split(PAIRS), columns.split(PAIRS), strict=True)
    return torch.cat([(left[row] * right[column]).sum(dim=1) > threshold - MARGIN for row, column in parts])


def correlations(images: Tensor, others: Tensor, pairs: Tensor) -> Tensor:
    """Return Pearson's correlation of pairs of uint8 images, float64 [P] on the CPU, from exact sums.

    So on which side of a threshold one falls depends on no device, and on no batch that it is computed in.

    Args:
        images, others: uint8 [N, ...] and [T, ...], of one size.
        pairs: int64 [P, 2] on the CPU, a position in each.
    """
    found = []
    for part in pairs.split(PAIRS):  # images that are much alike have pairs without number
        x = images[part[:, 0].to(images.device)].cpu().flatten(1).long()
        y = others[part[:, 1].to(others.device)].cpu().flatten(1).long()
        products = ((x, y), (x, x), (y, y))
        covariance, *variances = (x.shape[1] * (a * b).sum(1) - a.sum(1) * b.sum(1) for a, b in products)
        norms = variances[0].double().sqrt() * variances[1].double().sqrt()
        found.append(covariance.double() / norms.clamp(min=1))
    return torch.cat(found)


def load_pair(name: Literal["test", "val"], data: DataConfig) -> tuple[Split, Split]:
    """Load a split, and the training images to compare with it.

    Args:
        name: test, to compare with the training images and those held out of them; or val, with the training images.
        data: the data set.
    """
    whole = name == "test" and data.limit is None  # all of them, in the file's order
    source = open_source(replace(data, val_size=0) if whole else data)
    train, val = Split.load("train", source), Split.load("val", source)
    if name == "val" or not len(val):
        return Split.load(name, source), train
    published = None
    if not source.own_val and train.published is not None and val.published is not None:
        published = torch.cat((train.published, val.published))
    return Split.load("test", source), replace(
        train,
        images=torch.cat((train.images, val.images)),
        labels=torch.cat((train.labels, val.labels)),
        published=published,
    )


@functools.cache  # the same for all runs on the same images
def near_copies_of(
    name: Literal["test", "val"], data: DataConfig, device: torch.device, processes: Processes = ALONE
) -> NearCopies:
    """Search the training images for near copies of a split's.

    Args:
        name: see `load_pair`.
        data: the data set.
        device: where it is computed.
        processes: see `find_near_copies`.
    """
    logger.info("%s images: searching near copies of training images", name)
    split, training = processes.together(lambda: load_pair(name, data))
    return find_near_copies(split.images, training.images, device=device, processes=processes)


def are_near_copies(images: Tensor, positions: Tensor, others: Tensor) -> Tensor:
    """Say which images nearly copy another, bool [Q, K].

    Args:
        images: uint8 [N, H, W] or [N, C, H, W]; larger ones are compared at PAIR_SIDE pixels.
        positions: int64 [Q].
        others: int64 [Q, K], what each of them is compared with.
    """
    found = [torch.zeros(0, others.shape[1], dtype=torch.bool)]
    for one, more in zip(positions.split(32), others.split(32), strict=True):  # photos of 224 px are 100 MB already
        unit = _centred(_shrunk(images[more.flatten()]))
        beside = _centred(_shrunk(images[one])).repeat_interleave(more.shape[1], dim=0)
        found.append(((unit * beside).sum(dim=1) > NEAR_COPY).view(more.shape))
    return torch.cat(found)


@torch.inference_mode()
def find_pairs(images: Tensor, threshold: float = SIMILAR) -> tuple[Tensor, Tensor]:
    """Find all pairs of images that correlate above a threshold, as `find_near_copies` does between two sets.

    Args:
        images: uint8 [N, H, W] or [N, C, H, W] on the device; larger ones are compared at PAIR_SIDE pixels.
        threshold: Pearson correlation, below 1.

    Returns:
        int64 [P, 2] positions, the smaller one first, and float64 [P] correlations, highest first; on the CPU, at most
        MAX_PAIRS.
    """
    small = torch.cat([_shrunk(part) for part in images.split(CHUNK)]) if len(images) else images
    unit = _centred(small)
    basis = _principal_basis(unit.T @ unit)
    bounds = _with_rest(unit, basis)
    found, count = [torch.zeros(0, 2, dtype=torch.int64)], 0
    for first in range(0, len(unit), CHUNK):
        for second in range(first, len(unit), CHUNK):
            bound = bounds[first : first + CHUNK] @ bounds[second : second + CHUNK].T
            row, column = torch.nonzero(bound > threshold - MARGIN, as_tuple=True)
            left, right = row + first, column + second
            left, right = left[right > left], right[right > left]
            alike = _alike(unit, unit, left, right, threshold)
            found.append(torch.stack((left[alike], right[alike]), dim=1).cpu())
            count += len(found[-1])
            if count > MAX_PAIRS:
                logger.warning("more than %s pairs of similar images: the search ends at image %s", MAX_PAIRS, first)
                break
        else:
            continue
        break
    pairs = torch.cat(found)[:MAX_PAIRS]
    exact = correlations(small, small, pairs)
    order = exact.argsort(descending=True, stable=True)
    order = order[exact[order] > threshold]
    return pairs[order], exact[order]


def _shrunk(images: Tensor) -> Tensor:
    """Return images of at most PAIR_SIDE pixels per side, averaged over areas."""
    side = max(images.shape[-2:])
    if side <= PAIR_SIDE:
        return images
    size = [max(1, round(length * PAIR_SIDE / side)) for length in images.shape[-2:]]
    channels = images[:, None] if images.ndim == 3 else images
    return torch.nn.functional.interpolate(channels.float(), size, mode="area").round().byte()
