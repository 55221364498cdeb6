"""Write a trained run for other programs, checked against the run on real test images (or validation images).

fmnist export runs/cnn --to onnx    runs/cnn/export/model.onnx: uint8 pictures in, logits and probabilities out; resize
                                    and normalisation are in the graph
fmnist export runs/cnn --to onnx --int8
                                    runs/cnn/export/model_int8.onnx: weights and activations in int8 for a CPU; accuracy
                                    before and after on the validation images
fmnist export runs/cnn --to hub     runs/cnn/export/hub: config.json, weights, data.json, model card; for a timm model,
                                    timm.create_model("local-dir:FOLDER", pretrained=True) opens it

The run is opened in float32 on the CPU, whatever it was trained on.
"""

from pathlib import Path

from fmnist.runtime.arguments import CommandLine, number
from fmnist.runtime.console import log_to_console, one_line_errors
from fmnist.runtime.ownership import check_outputs, check_suffix

NAMES, SUFFIXES = {"onnx": "model.onnx", "hub": "hub"}, {"onnx": ".onnx", "hub": ""}
PARSER = CommandLine(prog="fmnist export", description=__doc__)
PARSER.add_run(device=False)
PARSER.add_argument("--to", choices=sorted(NAMES), required=True, help="what to write")
PARSER.add_argument(
    "--output", type=Path, metavar="PATH", help="file or folder (default: export/model.onnx or export/hub in the run)"
)
PARSER.add_argument("--int8", action="store_true", help="with --to onnx: quantise, calibrated on training images")
PARSER.add_argument(
    "--max_loss", type=number(0, 1, float), help="with --int8: validation top1 that it may lose (default: 0.005)"
)
PARSER.add_argument(
    "--keep_float", nargs="+", choices=("first", "last"), help="with --int8: layers that stay in float32"
)
PARSER.add_argument(
    "--reduce_range", action="store_true", help="with --int8: weights in 7 bits, for x86 processors without VNNI"
)
PARSER.add_force()


def main(argv: list[str] | None = None) -> int:
    """Write the file or the folder, and print how closely it agrees with the run."""
    args = PARSER.parse_args(argv)
    if args.int8 and args.to != "onnx":
        PARSER.error("--int8 is of --to onnx")
    of_int8 = {name: getattr(args, name) for name in ("max_loss", "keep_float", "reduce_range")}
    if not args.int8 and (given := [name for name, value in of_int8.items() if value not in (None, False)]):
        PARSER.error(f"--{given[0]} has no effect without --int8")
    log_to_console()
    with one_line_errors(PARSER.prog):
        if args.output:
            check_suffix(args.output, SUFFIXES[args.to])
        from fmnist.apps.export.expected import open_expected
        from fmnist.apps.export.hub import FILES, write_hub
        from fmnist.apps.export.int8 import write_int8
        from fmnist.apps.export.onnx import write_onnx

        expected = open_expected(args.run, args.root, args.batch_size)
        path = args.output or expected.trained.folder("export", "model_int8.onnx" if args.int8 else NAMES[args.to])
        marks = {path / name: mark for name, mark in FILES.items()} if args.to == "hub" else {path: b""}
        check_outputs(marks, force=args.force)
        if args.int8:
            options = {name: value for name, value in of_int8.items() if value is not None}
            print(write_int8(expected, path, args.root, **options))
        else:
            print({"onnx": write_onnx, "hub": write_hub}[args.to](expected, path))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
