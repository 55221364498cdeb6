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

logger = logging.getLogger("fmnist")
NEAR_COPY, SIMILAR = 0.99, 0.98  # correlations above which an image counts as a near copy, or as similar
BASIS_SIZE = 96
CHUNK = 2048  # training images of one matrix product: 10,000 x 2,048 float32 are 82 MB
MARGIN = 1e-4  # of the float32 bound, whose rounding is near 1e-6
PAIR_SIDE, MAX_PAIRS = 48, 200_000


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


def _principal_basis(unit: Tensor, size: int) -> Tensor:
    """Return orthonormal columns near the leading principal axes: a few power iterations, products only."""
    start = torch.randn(unit.shape[1], size, generator=torch.Generator().manual_seed(0))
    axes = start.to(unit.device)
    second_moment = unit.T @ unit
    for _ in range(3):
        axes = torch.linalg.qr(second_moment @ axes).Q
    return axes


def _with_rest(unit: Tensor, basis: Tensor) -> Tensor:
    """Return coordinates in the basis, and in one column more the norm of what the basis leaves out."""
    coordinates = unit @ basis
    rest = (unit.square().sum(1) - coordinates.square().sum(1)).clamp(min=0).sqrt()
    return torch.cat([coordinates, rest[:, None]], dim=1)


@torch.inference_mode()
def find_near_copies(images: Tensor, training: Tensor, threshold: float = SIMILAR) -> NearCopies:
    """Find the images that correlate with a training image above a threshold; exact, in chunks of products.

    Correlation is a product of centred unit vectors. Cut into principal coordinates and a rest, the product of the
    rests is at most that of their norms (Cauchy and Schwarz): a product of 97 columns instead of 784 bounds each pair
    from above, and only the few pairs whose bound passes are computed whole.

    Args:
        images: uint8 [N, H, W] on the device.
        training: uint8 [T, H, W] on the same device.
        threshold: Pearson correlation, below 1.

    Returns:
        What was found, on the CPU.
    """
    queries, references = _centred(images), _centred(training)
    basis = _principal_basis(references, min(BASIS_SIZE, queries.shape[1]))
    bounds = _with_rest(queries, basis)
    rows, columns = [], []
    for start in range(0, len(references), CHUNK):
        bound = bounds @ _with_rest(references[start : start + CHUNK], basis).T
        row, column = torch.nonzero(bound > threshold - MARGIN, as_tuple=True)
        alike = (queries[row] * references[start + column]).sum(dim=1) > threshold - MARGIN
        rows.append(row[alike])
        columns.append(start + column[alike])
    row, column = torch.cat(rows).cpu(), torch.cat(columns).cpu()
    # The few that are left again in float64: on which side of the threshold one falls depends on no device.
    exact = _exact(images[row.to(images.device)].cpu(), training[column.to(images.device)].cpu())
    order = exact.argsort(descending=True, stable=True)
    order = order[exact[order] > threshold]
    seen: dict[int, int] = {}  # an image of the split, and where it comes first: with its most alike partner
    for position, image in enumerate(row[order].tolist()):
        seen.setdefault(image, position)
    best = order[list(seen.values())]
    return NearCopies(indices=row[best], partners=column[best], correlations=exact[best], num_images=len(images))


def _exact(left: Tensor, right: Tensor) -> Tensor:
    pair = [part.flatten(1).double() for part in (left, right)]
    pair = [part - part.mean(dim=1, keepdim=True) for part in pair]
    norms = pair[0].norm(dim=1) * pair[1].norm(dim=1)
    return (pair[0] * pair[1]).sum(dim=1) / norms.clamp(min=1e-12)


def load_pair(name: Literal["test", "val"], data: DataConfig) -> tuple[Split, Split]:
    """Load a split, and the training images to compare with it.

    Args:
        name: test, to compare with the training images and those held out of them; or val, with the training images.
        data: the data set.
    """
    source = open_source(data if name == "val" else replace(data, val_size=0))  # all of them, in the file's order
    train, val = Split.load("train", source), Split.load("val", source)
    if name == "val" or not len(val):
        return Split.load(name, source), train
    return Split.load("test", source), replace(
        train,
        images=torch.cat((train.images, val.images)),
        labels=torch.cat((train.labels, val.labels)),
        published=None,
    )


@functools.cache  # the same for all runs on the same images
def near_copies_of(name: Literal["test", "val"], data: DataConfig, device: torch.device) -> NearCopies:
    """Search the training images for near copies of a split's.

    Args:
        name: see `load_pair`.
        data: the data set.
        device: where it is computed.
    """
    logger.info("%s images: searching near copies of training images", name)
    split, training = load_pair(name, data)
    return find_near_copies(split.images.to(device), training.images.to(device))


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
        about MAX_PAIRS.
    """
    small = torch.cat([_shrunk(part) for part in images.split(CHUNK)]) if len(images) else images
    unit = _centred(small)
    basis = _principal_basis(unit, min(BASIS_SIZE, unit.shape[1]))
    bounds = _with_rest(unit, basis)
    found, count = [torch.zeros(0, 2, dtype=torch.int64)], 0
    for first in range(0, len(unit), CHUNK):
        for second in range(first, len(unit), CHUNK):
            bound = bounds[first : first + CHUNK] @ bounds[second : second + CHUNK].T
            row, column = torch.nonzero(bound > threshold - MARGIN, as_tuple=True)
            left, right = row + first, column + second
            left, right = left[right > left], right[right > left]
            for part in range(0, len(left), 16 * CHUNK):  # many where images are much alike
                near = slice(part, part + 16 * CHUNK)
                alike = (unit[left[near]] * unit[right[near]]).sum(dim=1) > threshold - MARGIN
                found.append(torch.stack((left[near][alike], right[near][alike]), dim=1).cpu())
                count += len(found[-1])
            if count > MAX_PAIRS:
                logger.warning("more than %s pairs of near copies: the search ends at image %s", MAX_PAIRS, first)
                break
        else:
            continue
        break
    pairs = torch.cat(found)
    exact = _exact(small.cpu()[pairs[:, 0]], small.cpu()[pairs[:, 1]])
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
