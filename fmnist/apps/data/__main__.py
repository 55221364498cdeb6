"""Show what a run would see of a data set: counts by class and split, sizes, exact copies, and its images.

DATA is a name that data.name takes, a run directory, a .npz file, or a folder. Flags of train.py that begin with
--data. or --augment., and --config, say how it is split and augmented. Written to the output folder: samples.png,
training images of each class, and augmented.png, the same images as the model would be trained on.

example: fmnist data cats.npz --data.val_size 500 --config configs/cnn.yaml
"""

from pathlib import Path

from fmnist.runtime.arguments import CommandLine
from fmnist.runtime.console import log_to_console, one_line_errors
from fmnist.runtime.ownership import check_outputs, check_suffix

PARSER = CommandLine(prog="fmnist data", description=__doc__)
PARSER.add_argument("data", metavar="DATA", help="the data set")
PARSER.add_argument("--output", type=Path, default=Path("samples"), help="folder for the two sheets (default: samples)")
PARSER.add_force()
PARSER.add_argument("--json", action="store_true", help="print the numbers as JSON, for scripts")
PASSED = ("--data.", "--augment.", "--config")  # to train.py's parser


def main(argv: list[str] | None = None) -> int:
    """Print the numbers and write the two sheets."""
    import sys

    own, passed = _divide(sys.argv[1:] if argv is None else argv)
    args = PARSER.parse_args(own)
    log_to_console()
    with one_line_errors(PARSER.prog):
        check_suffix(args.output, "")
        check_outputs({args.output / name: b"" for name in ("samples.png", "augmented.png")}, force=args.force)
        from fmnist.apps.data.show import show
        from fmnist.config.parse import parse_config
        from fmnist.data.named import flags_of

        show(parse_config([*flags_of(args.data), *passed], prog=PARSER.prog, to_run=False), args)
    return 0


def _divide(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return this command's own arguments, and those of train.py's options: `--data.root X` or `--data.root=X`."""
    own: list[str] = []
    passed: list[str] = []
    rest = iter(argv)
    for argument in rest:
        if not argument.startswith(PASSED):
            own.append(argument)
            continue
        passed.append(argument)
        if "=" not in argument and (value := next(rest, None)) is not None:
            passed.append(value)
    return own, passed


if __name__ == "__main__":
    raise SystemExit(main())
