"""Write a trained run for other programs, checked against the run on real test images.

python -m fmnist.apps.export runs/cnn --to onnx       runs/cnn/export/model.onnx: uint8 pictures in, logits and
                                                 probabilities out; resize and normalisation are in the graph
python -m fmnist.apps.export runs/cnn --to hub        runs/cnn/export/hub: config.json, weights, model card; for a timm
                                                 model, timm.create_model("local-dir:FOLDER", pretrained=True) opens it
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from fmnist.apps.export.expected import open_expected
from fmnist.apps.export.hub import write_hub
from fmnist.apps.export.onnx import write_onnx
from fmnist.runtime.console import log_to_console, one_line_errors

PROGRAM = "python -m fmnist.apps.export"
WRITERS: dict[str, tuple[Callable[..., str], str]] = {
    "onnx": (write_onnx, "model.onnx"),
    "hub": (write_hub, "hub"),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, or one of its checkpoints")
    parser.add_argument("--to", choices=sorted(WRITERS), required=True, help="what to write")
    parser.add_argument("--output", type=Path, metavar="PATH", help="default: export/model.onnx, export/hub in the run")
    parser.add_argument("--data.root", dest="root", help="folder with the IDX files (default: the run's)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    log_to_console()
    write, name = WRITERS[args.to]
    with one_line_errors(PROGRAM):
        expected = open_expected(args.run, args.root)
        print(write(expected, args.output or expected.trained.folder("export") / name))


if __name__ == "__main__":
    main()
