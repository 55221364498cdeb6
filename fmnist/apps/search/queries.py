"""The three commands of `fmnist search`, after their arguments."""

import argparse
import functools
import json
import logging
import time
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from fmnist.apps.search.catalogue import (
    UNKNOWN,
    Catalogue,
    folder_catalogue,
    load_catalogue,
    read_split,
    save_catalogue,
    split_catalogue,
)
from fmnist.apps.search.hits import Hit, columns_of, hits_rows, plot_hits
from fmnist.apps.search.names import QUERY, SOURCES
from fmnist.apps.views import NAMED, count_kinds, read_photos
from fmnist.data.photos import MISSING
from fmnist.evaluation.neighbours import Neighbours
from fmnist.evaluation.retrieval import measure_precision, query_split
from fmnist.report.retrieval_table import RETRIEVAL_FILE, precision_table, write_precision
from fmnist.runtime.console import counted, one_line
from fmnist.runtime.files import csv_bytes, write_atomic
from fmnist.runtime.ownership import check_outputs, remove_own
from fmnist.trained import Trained, open_trained

logger = logging.getLogger("fmnist")


def query(args: argparse.Namespace) -> int:
    """Find the nearest images of each picture; write search.csv, then the sheet.

    Returns:
        0; 1 where no picture was read, or a path is not there.
    """
    trained = open_trained(args.run, args.device, args.batch_size)
    output = args.output or trained.folder("search")
    marks = {output / "search.csv": b"query,rank,item,", output / "search.png": b""}
    check_outputs(marks, force=args.force)
    catalogue = load_catalogue(args.index, trained) if args.index else split_catalogue(trained, args.split, args.root)
    queries, errors = _read_queries(args.named, trained, args.root)
    hits, milliseconds = _nearest(queries, trained, catalogue, args.k) if queries else ([], 0.0)
    rows = hits_rows(hits, catalogue, errors)
    status = 0 if hits and not any(error in MISSING for error in errors.values()) else 1
    # First: it is there also where a sheet fails.
    write_atomic(output / "search.csv", csv_bytes(columns_of(catalogue), [list(row.values()) for row in rows]))
    for name, error in islice(() if args.json else errors.items(), NAMED):
        logger.warning("%s: %s", one_line(name), error)
    if shown := hits[: args.sheet]:
        plot_hits(shown, catalogue, output / "search.png")
    else:
        remove_own(output / "search.png")  # of other queries
    if args.json:
        print(json.dumps(rows))
        return status
    part = f" of the first {len(shown)} queries" if len(hits) > len(shown) else ""
    k = len(hits[0].positions) if hits else 0
    bad = f"; {len(errors):,} not read" if errors else ""
    bad += f"; left out: {count_kinds(args.left_out)}" if args.left_out else ""
    print(f"the {k} nearest of {len(catalogue):,} images to each picture, {milliseconds:.1f} ms a query{bad}")
    print(f"written to {output}: search.csv" + (f", search.png{part}" if shown else ""))
    return status


def _read_queries(
    named: list[tuple[str, str]], trained: Trained, root: str | None
) -> tuple[dict[str, tuple[Tensor, int]], dict[str, str]]:
    """Return picture and class (UNKNOWN for a file) of each query that can be read, and an error for each other."""
    split_of = functools.cache(functools.partial(read_split, trained, root=root))
    files = [pair for pair in named if not QUERY.fullmatch(pair[0])]
    photos = {photo.name: (photo.cutout, photo.error) for part in read_photos(files, trained.info) for photo in part}
    queries: dict[str, tuple[Tensor, int]] = {}
    errors: dict[str, str] = {}
    for name, _ in named:
        if match := QUERY.fullmatch(name):
            images, labels, indices, _ = split_of(match[1])
            position = int((indices == int(match[2])).long().argmax())
            if int(indices[position]) != int(match[2]):
                raise ValueError(f"{name}: {match[1]} has {_range(indices)}")
            queries[name] = images[position], int(labels[position])
        elif (cutout := photos[name][0]) is None:
            errors[name] = photos[name][1]
        else:
            queries[name] = torch.from_numpy(cutout.view), UNKNOWN
    return queries, errors


def _range(indices: Tensor) -> str:
    low, high = int(indices.min()), int(indices.max())
    whole = high - low + 1 == len(indices)
    return (
        f"images {low} to {high}"
        if whole
        else f"{len(indices):,} of the images {low} to {high}; the rest are of other splits"
    )


def _nearest(
    queries: dict[str, tuple[Tensor, int]], trained: Trained, catalogue: Catalogue, most: int
) -> tuple[list[Hit], float]:
    """Return the hits, and the milliseconds that the search of a query takes, the model's time apart.

    A picture from outside may point the other way than the images do. Where the run learned from mirrored images, its
    mirror image is looked for as well, and each item counts by the nearer of the two.
    """
    images = torch.stack([image for image, _ in queries.values()])
    logits, features = trained(images)
    exclude = torch.tensor([_position(name, catalogue) for name in queries])
    k = min(most, len(catalogue) - bool((exclude >= 0).any()))
    if not k:
        raise ValueError(f"there is nothing to find: the index holds one picture, {next(iter(queries))} itself")
    neighbours = Neighbours(catalogue.features, trained.device)
    outside = torch.tensor([label == UNKNOWN for _, label in queries.values()])
    mirrors = trained.cfg.augment.flip > 0 and bool(outside.any())
    mirrored_features = trained(images[outside].flip(-1))[1] if mirrors else features[:0]
    start = time.perf_counter()
    similarities, positions = neighbours(features, k, exclude)
    if mirrors:
        mirrored = neighbours(mirrored_features, k, exclude[outside])
        similarities[outside], positions[outside] = nearer((similarities[outside], positions[outside]), mirrored)
    milliseconds = 1000 * (time.perf_counter() - start) / len(queries)
    found = zip(queries.items(), logits.argmax(1), positions, similarities, strict=True)
    hits = [
        Hit(query=name, image=image, label=label, prediction=int(prediction), positions=places, similarities=cosines)
        for (name, (image, label)), prediction, places, cosines in found
    ]
    return hits, milliseconds


def nearer(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the nearest of two lists for each query, an item once.

    Args:
        one, other: float [Q, k] similarities, highest first, and int64 [Q, k] positions.
    """
    similarities, positions = (torch.cat(pair, dim=1) for pair in zip(one, other, strict=True))
    chosen = similarities.argsort(dim=1, descending=True, stable=True)
    similarities, positions = similarities.gather(1, chosen), positions.gather(1, chosen)
    again = (positions[:, :, None] == positions[:, None, :]).tril(-1).any(2)  # it stands there nearer already
    first = again.long().argsort(dim=1, stable=True)[:, : one[0].shape[1]]
    return similarities.gather(1, first), positions.gather(1, first)


def _position(name: str, catalogue: Catalogue) -> int:
    """Where the query itself lies in the catalogue, -1 if it does not."""
    if catalogue.source not in SOURCES:
        path, folder = Path(name).resolve(), Path(catalogue.source)
        name = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else ""
    return catalogue.names.index(name) if name in catalogue.names else -1


def index(args: argparse.Namespace) -> int:
    """Compute the features of a folder's pictures and write them."""
    trained = open_trained(args.run, args.device, args.batch_size)
    path = args.output or trained.folder("search") / "index.safetensors"
    check_outputs({path: b""}, force=args.force)
    start = time.perf_counter()
    catalogue = folder_catalogue(trained, args.folder)
    seconds = time.perf_counter() - start
    save_catalogue(catalogue, path, trained)
    size = f"{counted(len(catalogue), 'picture')}, {catalogue.features.shape[1]} features each, in {seconds:.1f} s"
    print(f"{path}: {size}, {path.stat().st_size / 1e6:.1f} MB")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Measure retrieval precision, print the table and write the JSON."""
    trained = open_trained(args.run, args.device, args.batch_size)
    output = args.output or trained.folder("evaluation", query_split(trained)) / RETRIEVAL_FILE
    check_outputs({output: b'"num_queries"'}, force=args.force)
    result = measure_precision(trained, k=args.k, root=args.root)
    write_precision(result, output)
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{precision_table(result)}\n\nwritten to {output}; the next report.html of fmnist evaluate shows it")
    return 0
