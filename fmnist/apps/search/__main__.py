"""Find the catalogue items that look most like a picture, by a trained run's penultimate features.

python -m fmnist.apps.search index runs/cnn                          the training images, to runs/cnn/search/index.npz
python -m fmnist.apps.search query runs/cnn test:17 shoe.jpg         search.png and search.csv: the ten nearest of each
python -m fmnist.apps.search evaluate runs/cnn                       how often the ten nearest are of the same class
"""

import argparse
import re
import time
from pathlib import Path

import torch
from torch import Tensor

from fmnist.apps.search.catalogue import (
    SOURCES,
    UNKNOWN,
    Catalogue,
    check_same_weights,
    folder_catalogue,
    index_file,
    load_catalogue,
    read_split,
    save_catalogue,
    split_catalogue,
)
from fmnist.apps.search.hits import Hit, plot_hits, write_hits
from fmnist.data.photos import read_view
from fmnist.evaluation.neighbours import Neighbours
from fmnist.evaluation.retrieval import measure_precision
from fmnist.report.retrieval_table import RETRIEVAL_FILE, precision_table, write_precision
from fmnist.runtime.console import log_to_console, one_line_errors
from fmnist.trained import Trained, open_trained

PROGRAM = "python -m fmnist.apps.search"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="index|query|evaluate")
    index = commands.add_parser("index", help="compute the features of a split or a folder, once")
    index.add_argument("run", type=Path, metavar="RUN", help="a run directory, or one of its checkpoints")
    what = index.add_mutually_exclusive_group()
    what.add_argument("--split", choices=SOURCES, default="train", help="images of the catalogue (default: train)")
    what.add_argument("--folder", type=Path, metavar="DIR", help="or the pictures in a folder and those below it")
    index.add_argument("--output", type=Path, metavar="FILE", help="default: search/index.npz in the run")
    query = commands.add_parser("query", help="show the nearest items of pictures")
    query.add_argument("index", type=Path, metavar="INDEX_OR_RUN", help="an .npz of `index`, or a run that has one")
    query.add_argument("images", nargs="+", metavar="IMAGE", help="a picture file, or split:number such as test:17")
    query.add_argument("--k", type=_positive, default=10, help="items per query (default: 10)")
    query.add_argument("--run", type=Path, help="the run, where it is no longer where the index was made")
    query.add_argument("--output", type=Path, metavar="PNG", help="default: search.png beside the index; the CSV too")
    evaluate = commands.add_parser("evaluate", help="precision of test images among the training images, per class")
    evaluate.add_argument("run", type=Path, metavar="RUN", help="a run directory, or one of its checkpoints")
    evaluate.add_argument("--k", type=_positive, default=10, help="nearest items counted (default: 10)")
    evaluate.add_argument("--output", type=Path, metavar="JSON", help="default: evaluation/test/retrieval.json")
    for command in (index, query, evaluate):
        command.add_argument("--data.root", dest="root", help="folder with the IDX files (default: the run's)")
        command.add_argument("--device", help="as torch names it (default: the accelerator, else the CPU)")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; legal: 1 and more")
    return int(text)


def make_index(args: argparse.Namespace) -> None:
    """Compute a catalogue's features and write them."""
    trained = open_trained(args.run, args.device)
    start = time.perf_counter()
    if args.folder is not None:
        catalogue = folder_catalogue(trained, args.folder)
    else:
        catalogue = split_catalogue(trained, args.split, args.root)
    seconds = time.perf_counter() - start
    path = args.output or index_file(trained)
    save_catalogue(catalogue, path)
    size = f"{len(catalogue):,} items of {catalogue.features.shape[1]} features in {seconds:.1f} s"
    print(f"{path}: {size}, {path.stat().st_size / 1e6:.1f} MB")


def make_query(args: argparse.Namespace) -> None:
    """Find the nearest items of each picture, and write the sheet and the CSV."""
    path = args.index
    if path.is_dir():
        path = index_file(open_trained(path))
        if not path.is_file():
            raise ValueError(f"{args.index} has no index yet; make one: {PROGRAM} index {args.index}")
    catalogue = load_catalogue(path)
    run = args.run or (args.index if args.index.is_dir() else Path(catalogue.run_directory))
    trained = open_trained(run, args.device)
    check_same_weights(catalogue, trained, path)
    queries = [_read_query(name, trained, args.root) for name in args.images]
    images = torch.stack([image for image, _ in queries])
    logits, features = trained(images)
    predictions = logits.argmax(1)
    exclude = torch.tensor([_position(name, catalogue) for name in args.images])
    k = min(args.k, len(catalogue) - bool((exclude >= 0).any()))

    neighbours = Neighbours(catalogue.features, trained.device)
    neighbours(features[:1], k, exclude[:1])  # the first product also starts the device's libraries
    start = time.perf_counter()
    similarities, positions = neighbours(features, k, exclude)
    milliseconds = 1000 * (time.perf_counter() - start) / len(queries)
    hits = [
        Hit(
            query=name,
            image=image,
            label=label,
            prediction=int(predictions[i]),
            positions=positions[i],
            similarities=similarities[i],
        )
        for i, (name, (image, label)) in enumerate(zip(args.images, queries, strict=True))
    ]
    sheet = args.output or path.with_name("search.png")
    plot_hits(hits, catalogue, sheet)
    write_hits(hits, catalogue, sheet.with_suffix(".csv"))
    print(f"{sheet}, {sheet.with_suffix('.csv').name}: the {k} nearest of {len(catalogue):,} items to each picture, ")
    print(f"found in {milliseconds:.1f} ms a query on {trained.device}")


def _read_query(name: str, trained: Trained, root: str | None) -> tuple[Tensor, int]:
    """Return the picture and its class (UNKNOWN for a file)."""
    match = re.fullmatch(r"(train|val|test):([0-9]{1,9})", name)
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


def make_evaluation(args: argparse.Namespace) -> None:
    """Measure retrieval precision, print the table and write the JSON."""
    trained = open_trained(args.run, args.device)
    result = measure_precision(trained, k=args.k, root=args.root)
    output = args.output or trained.folder("evaluation") / "test" / RETRIEVAL_FILE
    write_precision(result, output)
    print(f"{precision_table(result)}\n\nwritten to {output}; the next report.html of evaluate.py shows it")


COMMANDS = {"index": make_index, "query": make_query, "evaluate": make_evaluation}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    log_to_console()
    with one_line_errors(PROGRAM):
        COMMANDS[args.command](args)


if __name__ == "__main__":
    main()
