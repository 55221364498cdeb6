"""The three commands of `fmnist search`, after their arguments."""

import argparse
import json
import time
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
from fmnist.apps.search.hits import Hit, hits_csv, hits_rows, plot_hits
from fmnist.apps.search.names import QUERY, SOURCES
from fmnist.apps.views import read_view
from fmnist.evaluation.neighbours import Neighbours
from fmnist.evaluation.retrieval import measure_precision
from fmnist.report.retrieval_table import RETRIEVAL_FILE, precision_table, write_precision
from fmnist.runtime.console import counted
from fmnist.runtime.files import write_atomic
from fmnist.trained import Trained, open_trained


def query(args: argparse.Namespace) -> None:
    """Find the nearest images of each picture; write search.csv, then the sheet."""
    trained = open_trained(args.run, args.device, args.batch_size)
    catalogue = load_catalogue(args.index, trained) if args.index else split_catalogue(trained, args.split, args.root)
    queries = [_read_query(name, trained, args.root) for name in args.images]
    logits, features = trained(torch.stack([image for image, _ in queries]))
    exclude = torch.tensor([_position(name, catalogue) for name in args.images])
    k = min(args.k, len(catalogue) - bool((exclude >= 0).any()))
    neighbours = Neighbours(catalogue.features, trained.device)
    start = time.perf_counter()
    similarities, positions = neighbours(features, k, exclude)
    milliseconds = 1000 * (time.perf_counter() - start) / len(queries)
    hits = [
        Hit(query=name, image=image, label=label, prediction=int(prediction), positions=places, similarities=cosines)
        for name, (image, label), prediction, places, cosines in zip(
            args.images, queries, logits.argmax(1), positions, similarities, strict=True
        )
    ]
    output = args.output or trained.folder("search")
    write_atomic(output / "search.csv", hits_csv(hits, catalogue))  # first: it is there also where a sheet fails
    if shown := hits[: args.sheet]:
        plot_hits(shown, catalogue, output / "search.png")
    if args.json:
        print(json.dumps(hits_rows(hits, catalogue)))
        return
    part = f" of the first {len(shown)} queries" if len(hits) > len(shown) else ""
    print(f"the {k} nearest of {len(catalogue):,} images to each picture, {milliseconds:.1f} ms a query")
    print(f"written to {output}: search.csv" + (f", search.png{part}" if shown else ""))


def _read_query(name: str, trained: Trained, root: str | None) -> tuple[Tensor, int]:
    """Return the picture and its class (UNKNOWN for a file)."""
    match = QUERY.fullmatch(name)
    if match is None:
        return read_view(name), UNKNOWN
    images, labels = read_split(trained, match[1], root)  # type: ignore[arg-type]  # one of its three names
    if (number := int(match[2])) >= len(images):
        raise ValueError(f"{name}: {match[1]} has images 0 to {len(images) - 1}")
    return images[number], int(labels[number])


def _position(name: str, catalogue: Catalogue) -> int:
    """Where the query itself lies in the catalogue, -1 if it does not."""
    if catalogue.source not in SOURCES:
        path, folder = Path(name).resolve(), Path(catalogue.source)
        name = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else ""
    return catalogue.names.index(name) if name in catalogue.names else -1


def index(args: argparse.Namespace) -> None:
    """Compute the features of a folder's pictures and write them."""
    trained = open_trained(args.run, args.device, args.batch_size)
    start = time.perf_counter()
    catalogue = folder_catalogue(trained, args.folder)
    seconds = time.perf_counter() - start
    path = args.output or trained.folder("search") / "index.safetensors"
    save_catalogue(catalogue, path, trained)
    size = f"{counted(len(catalogue), 'picture')}, {catalogue.features.shape[1]} features each, in {seconds:.1f} s"
    print(f"{path}: {size}, {path.stat().st_size / 1e6:.1f} MB")


def evaluate(args: argparse.Namespace) -> None:
    """Measure retrieval precision, print the table and write the JSON."""
    trained = open_trained(args.run, args.device, args.batch_size)
    result = measure_precision(trained, k=args.k, root=args.root)
    output = args.output or trained.folder("evaluation") / "test" / RETRIEVAL_FILE
    write_precision(result, output)
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{precision_table(result)}\n\nwritten to {output}; the next report.html of fmnist evaluate shows it")
