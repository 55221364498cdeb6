"""Check flags of train.py and print the run directory that they lead to, for batch scripts; no torch is imported."""

import sys
from pathlib import Path

from fmnist.config.parse import parse_config

HELP = """\
usage: fmnist launch [flags of train.py]

Prints the run directory that train.py would use with these flags, or the one line that it would refuse them with
(status 2). slurm/train.sbatch asks it before it starts any process.
"""


def main(argv: list[str] | None = None) -> int:
    """Print the run directory."""
    argv = sys.argv[1:] if argv is None else argv
    if argv in (["--help"], ["-h"]):
        print(HELP, end="")
        return 0
    cfg = parse_config(argv, prog="fmnist launch")
    print(Path(cfg.output_dir or "runs/run").resolve())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
