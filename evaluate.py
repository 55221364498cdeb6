"""Evaluate runs or checkpoints: python evaluate.py RUN_OR_CHECKPOINT... [--split test|val|train] [--tta none|flip]"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fmnist.console import log_to_console, one_line_errors
from fmnist.data.batches import Split
from fmnist.data.fashion_mnist import CLASS_NAMES
from fmnist.figures import plot_comparison, plot_learning_curves
from fmnist.metrics import predict
from fmnist.network import Trained, open_trained
from fmnist.report import comparison_table, write_evaluation
from fmnist.run import Run, resolve_precision


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN_OR_CHECKPOINT", help="what train.py wrote")
    parser.add_argument("--split", choices=("test", "val", "train"), default="test", help="images to evaluate on")
    parser.add_argument("--tta", choices=("none", "flip"), help="flip: average image and mirror (default: the run's)")
    parser.add_argument("--batch_size", type=int, help="images of one forward (default: the run's)")
    parser.add_argument("--data.root", dest="root", help="folder with the IDX files (default: the run's)")
    parser.add_argument("--comparison", type=Path, default=Path("comparison"), help="folder for several runs' table")
    args = parser.parse_args()
    if args.batch_size is not None and args.batch_size < 1:
        parser.error(f"--batch_size is {args.batch_size}; legal: 1 and more")
    return args


def evaluate(trained: Trained, run: Run, args: argparse.Namespace) -> dict[str, Any] | None:
    """Evaluate one model on one split; write its files, and return its row of the comparison on the main process."""
    run.precision = resolve_precision(trained.cfg.model.precision)  # that of its training: the same numbers
    model, augment = trained.load(run.device)
    data = replace(trained.cfg.data, root=args.root or trained.cfg.data.root)
    split = Split.load(args.split, data, run.device)
    if not len(split):
        raise ValueError(f"{trained.name} was trained with data.val_size 0: it has no validation images")
    cfg = trained.cfg.evaluation
    cfg = replace(cfg, tta=args.tta or cfg.tta, batch_size=args.batch_size or cfg.batch_size)

    start = time.perf_counter()
    logits = predict(model, split, augment, cfg, run).cpu()  # on the host: the device has finished
    seconds = time.perf_counter() - start
    return run.on_main(write_files, trained, args.split, cfg.tta, logits, split.labels.cpu(), len(split) / seconds)


def write_files(
    trained: Trained, split: str, tta: str, logits: torch.Tensor, labels: torch.Tensor, rate: float
) -> dict[str, Any]:
    """Write one evaluation and print its report; return its row of the comparison."""
    directory = trained.output / split
    title = f"{trained.name}: {split} images" + (", flip averaging" if tta == "flip" else "")
    result = write_evaluation(directory, logits, labels, torch.arange(len(labels)), CLASS_NAMES, title=title)
    if (trained.directory / "metrics.jsonl").is_file():
        curves = trained.directory / "learning_curves.png"
        plot_learning_curves(trained.directory / "metrics.jsonl", curves, trained.name)
    print((directory / "report.txt").read_text())
    print(f"written to {directory}\n")
    about = {"run": trained.name, "model": trained.cfg.model.name, "images_per_second": rate}
    return result | about | {"parameters": trained.summary.get("parameters")}


def main() -> None:
    args = parse_args()
    log_to_console()
    with one_line_errors("evaluate.py"):
        opened = [open_trained(path) for path in args.paths]
        run = Run(opened[0].cfg, opened[0].directory)
        rows = [evaluate(trained, run, args) for trained in opened]
    compared = [row for row in rows if row is not None]
    if len(compared) > 1:
        args.comparison.mkdir(parents=True, exist_ok=True)
        table = comparison_table(compared)
        (args.comparison / "comparison.txt").write_text(table + "\n")
        plot_comparison(compared, args.comparison / "comparison.png")
        print(f"{table}\nwritten to {args.comparison}")


if __name__ == "__main__":
    main()
