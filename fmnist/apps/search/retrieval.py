"""Exact nearest neighbours by cosine on the device, and how often they are of the same class."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fmnist.apps.search.catalogue import Catalogue, build_catalogue, embed, index_file, load_catalogue, read_split
from fmnist.data.fashion_mnist import CLASS_NAMES
from fmnist.network import Trained
from fmnist.report.figures import write_file
from fmnist.runtime.files import sha256_of
from fmnist.trained import Predictor

QUERIES_AT_ONCE = 64
SPARE = 32  # candidates beyond k that the float32 product proposes and float64 puts in order


class Neighbours:
    """Items whose nearest to a query are found by one matrix product and a top-k.

    The product is float32 on the device. Its best k + SPARE are ordered again in float64, and a query whose k-th is
    within rounding of what was left out is asked again with more of them: the result is that of float64 over all.

    Args:
        features: [N, D], any float type; need not be of length 1.
        device: where the product is done; float32 [N, D] stay there.
    """

    def __init__(self, features: Tensor, device: torch.device) -> None:
        self.features = features.cpu()
        self.unit = F.normalize(features.to(device).float(), dim=1)
        # Rounding of a dot product of unit vectors grows as the root of its length; four times that.
        self.tolerance = 4 * math.sqrt(features.shape[1]) * 2.0**-24

    def __len__(self) -> int:
        return len(self.features)

    @torch.no_grad()
    def __call__(self, queries: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Find the k nearest items of each query.

        Args:
            queries: [Q, D], any float type; need not be of length 1.
            k: 1 to N, or to N - 1 with exclude.
            exclude: int64 [Q], the item that is the query itself and does not count; -1 for none.

        Returns:
            float64 [Q, k] cosines, highest first, and int64 [Q, k] positions (equal cosines: the lower first), on the
            CPU.

        Raises:
            ValueError: k is out of range.
        """
        available = len(self) - (exclude is not None and bool((exclude >= 0).any()))
        if not 1 <= k <= available:
            raise ValueError(f"k is {k}; legal: 1 to {available}, the items to choose from")
        if exclude is None:
            exclude = torch.full((len(queries),), -1)
        pairs = zip(queries.cpu().split(QUERIES_AT_ONCE), exclude.cpu().split(QUERIES_AT_ONCE), strict=True)
        found = [self._search(part, k, itself, k + SPARE) for part, itself in pairs]
        if not found:
            return torch.zeros(0, k, dtype=torch.float64), torch.zeros(0, k, dtype=torch.int64)
        similarities, positions = zip(*found, strict=True)
        return torch.cat(similarities), torch.cat(positions)

    def _search(self, queries: Tensor, k: int, exclude: Tensor, count: int) -> tuple[Tensor, Tensor]:
        count = min(count + 1, len(self))  # one more: the query itself may be among them
        scores, positions = (F.normalize(queries.to(self.unit).float(), dim=1) @ self.unit.T).topk(count, dim=1)
        lowest, positions = scores[:, -1].cpu().double(), positions.cpu().sort(dim=1).values
        candidates = F.normalize(self.features[positions].double(), dim=2)
        # A sum, not a matrix product, whose blocks may give equal items cosines that differ in the last bit.
        exact = (F.normalize(queries.double(), dim=1)[:, None] * candidates).sum(2)
        exact[positions == exclude[:, None]] = -torch.inf
        exact, order = exact.sort(dim=1, descending=True, stable=True)
        exact, positions = exact[:, :k], positions.gather(1, order)[:, :k]
        unsure = exact[:, -1] <= lowest + self.tolerance
        if count < len(self) and unsure.any():
            exact[unsure], positions[unsure] = self._search(queries[unsure], k, exclude[unsure], 4 * count)
        return exact, positions


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


def summarize_precision(precision: Tensor, labels: Tensor, class_names: Sequence[str]) -> dict[str, Any]:
    """Return the mean over queries with a 95 % interval (normal approximation) and the mean of each class.

    Args:
        precision: float64 [Q].
        labels: int [Q], classes of the queries.
        class_names: in label order; a class without a query is None.
    """
    half = 1.96 * float(precision.std()) / math.sqrt(len(precision)) if len(precision) > 1 else 0.0
    mean = float(precision.mean())
    per_class = {name: precision[labels == label] for label, name in enumerate(class_names)}
    return {
        "mean": mean,
        "interval": [max(0.0, mean - half), min(1.0, mean + half)],
        "per_class": {name: float(values.mean()) if len(values) else None for name, values in per_class.items()},
    }


def measure_precision(predictor: Predictor, *, k: int = 10, root: str | None = None) -> dict[str, Any]:
    """Search the training images for every test image, by the run's features and by raw pixels.

    Args:
        predictor: the run; where it has an index of its training images, of these weights, that one is searched.
        k: nearest items counted.
        root: folder with the IDX files; none is the run's.

    Returns:
        A JSON-ready dict: `k`, `num_queries`, `num_items`, `run`, `weights_sha256`, `data_root`, and under `features`
        and `pixels` (cosine of the 784 grey values, the baseline) what `summarize_precision` returns.

    Raises:
        ValueError: k is out of range, the images cannot be had, or the features are not finite.
    """
    catalogue = _training_images(predictor, root)
    images, labels, _ = read_split(predictor, "test", root)
    features, _ = embed(predictor, images)
    spaces = {
        "features": (catalogue.features, features),
        "pixels": (catalogue.images.flatten(1).half(), images.flatten(1).half()),  # 0 to 255 are exact in float16
    }
    result: dict[str, Any] = {
        "k": k,
        "num_queries": len(labels),
        "num_items": len(catalogue),
        "run": catalogue.run,
        "weights_sha256": catalogue.weights_sha256,
        "data_root": _data_root(predictor.trained, root),
    }
    for space, (items, queries) in spaces.items():
        neighbours = Neighbours(items, predictor.device)
        precision = precision_at_k(neighbours, catalogue.labels, queries, labels, k)
        result[space] = summarize_precision(precision, labels, CLASS_NAMES)
    return result


def _training_images(predictor: Predictor, root: str | None) -> Catalogue:
    trained = predictor.trained
    path = index_file(trained)
    if _data_root(trained, root) == _data_root(trained, None) and path.is_file():
        catalogue = load_catalogue(path)
        if catalogue.source == "train" and catalogue.weights_sha256 == sha256_of(trained.weights):
            return catalogue
    return build_catalogue(predictor, "train", root)


def _data_root(trained: Trained, root: str | None) -> str:
    return str(root or trained.cfg.data.root)


def precision_file(trained: Trained) -> Path:
    """Return where the figures of these weights are kept."""
    return trained.output / "test" / "retrieval.json"


def write_precision(result: dict[str, Any], path: Path) -> None:
    """Keep what `measure_precision` gave."""
    write_file(path, json.dumps(result, indent=2, allow_nan=False) + "\n")


def read_precision(trained: Trained, root: str | None = None) -> dict[str, Any] | None:
    """Return what `measure_precision` gave for these very weights and images; none where it was not measured."""
    try:
        result: dict[str, Any] = json.loads(precision_file(trained).read_bytes())
        wanted = {"weights_sha256": sha256_of(trained.weights), "data_root": _data_root(trained, root)}
        return result if {key: result[key] for key in wanted} == wanted else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def precision_table(result: dict[str, Any]) -> str:
    """Lay the figures of `retrieval_precision` out as text, one class a line, without a last newline."""
    features, pixels = result["features"], result["pixels"]
    lines = [f"{'':>12}  {'features':>9}  {'raw pixels':>10}"]
    rows = [(name, features["per_class"][name], pixels["per_class"][name]) for name in features["per_class"]]
    for name, *values in [*rows, ("mean", features["mean"], pixels["mean"])]:
        cells = ["-" if value is None else f"{100 * value:.2f} %" for value in values]
        lines.append(f"{name:>12}  {cells[0]:>9}  {cells[1]:>10}")
    return "\n".join([f"{result['run']}: {precision_line(result)}", "", *lines])


def precision_line(result: dict[str, Any]) -> str:
    """Say the mean precision of `measure_precision` in one line."""
    low, high = (100 * bound for bound in result["features"]["interval"])
    counts = f"{result['num_queries']:,} test images among {result['num_items']:,} training images"
    mean = f"{100 * result['features']['mean']:.2f} % (95 % interval {low:.2f} to {high:.2f})"
    return f"precision at {result['k']}, {counts}: {mean}; by raw pixels {100 * result['pixels']['mean']:.2f} %"
