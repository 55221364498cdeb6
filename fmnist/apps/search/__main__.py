"""Find the images that look most like a picture, by a trained run's penultimate features.

fmnist search query runs/cnn test:17 shoe.jpg                  search.csv and search.png: the ten nearest of each
fmnist search query runs/cnn shoe.jpg --split all              ... among all images of its data set
fmnist search index runs/cnn --folder shop/                    the pictures in a folder, for query --index
fmnist search evaluate runs/cnn                                how often the ten nearest are of the same class

The features of a split are computed once and kept in the run's folder features/.
"""

import argparse
from pathlib import Path

from fmnist.apps.search.names import SOURCES, find_queries
from fmnist.runtime.arguments import CommandLine, existing, number
from fmnist.runtime.console import log_to_console, one_line_errors
from fmnist.runtime.ownership import check_suffix


def folder(text: str) -> Path:
    """Read the path of a folder, for add_argument's `type`."""
    if not existing(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a folder")
    return Path(text)


PARSER = CommandLine(prog="fmnist search", description=__doc__)
COMMANDS = PARSER.add_subparsers(dest="command", required=True, metavar="{query,index,evaluate}")

ASK = COMMANDS.add_parser("query", help="show the nearest images of pictures")
ASK.add_run()
ASK.add_argument("images", nargs="+", metavar="IMAGE", help="pictures, folders, globs, or split:index as test:17")
ASK.add_argument("--split", choices=SOURCES, default="train", help="images to search in (default: train)")
ASK.add_argument("--index", type=existing, metavar="FILE", help="search in a folder's pictures instead, see index")
ASK.add_argument("--k", type=number(1), default=10, help="images found per query (default: 10)")
ASK.add_argument("--output", type=Path, metavar="FOLDER", help="for search.csv and search.png (default: RUN/search)")
ASK.add_force()
ASK.add_argument("--sheet", type=number(0, 200), default=30, help="queries on search.png; 0: no sheet (default: 30)")
ASK.add_argument("--json", action="store_true", help="print what was found as JSON, for scripts")

INDEX = COMMANDS.add_parser("index", help="compute the features of a folder of pictures, once")
INDEX.add_run()
INDEX.add_argument("--folder", type=folder, required=True, metavar="DIR", help="its pictures, and those below it")
INDEX.add_argument("--output", type=Path, metavar="FILE", help="default: RUN/search/index.safetensors")
INDEX.add_force()

EVALUATE = COMMANDS.add_parser("evaluate", help="precision of test images among the training images, per class")
EVALUATE.add_run()
EVALUATE.add_argument("--k", type=number(1), default=10, help="nearest images counted (default: 10)")
EVALUATE.add_argument("--output", type=Path, metavar="FILE", help="default: RUN/evaluation/test/retrieval.json")
EVALUATE.add_force()
EVALUATE.add_argument("--json", action="store_true", help="print the figures as JSON, for scripts")


def main(argv: list[str] | None = None) -> int:
    """Run one of the three commands."""
    args = PARSER.parse_args(argv)
    log_to_console()
    with one_line_errors(PARSER.prog):
        if args.output:
            check_suffix(args.output, {"query": "", "index": ".safetensors", "evaluate": ".json"}[args.command])
        if args.command == "query":
            args.named, args.left_out = find_queries(args.images)
        from fmnist.apps.search import queries

        return {"query": queries.query, "index": queries.index, "evaluate": queries.evaluate}[args.command](args)


if __name__ == "__main__":
    raise SystemExit(main())
