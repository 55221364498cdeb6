"""Check flags of train.py and print the run directory that they lead to, and count GPUs, for batch scripts."""

import sys
from pathlib import Path

from fmnist.config.parse import parse_config
from fmnist.runtime.console import one_line_errors
from fmnist.runtime.launcher import check_gpus, given_gpus

HELP = """\
usage: fmnist launch [flags of train.py]
       fmnist launch --count_gpus

Prints the run directory that train.py would use with these flags, or the one line that it would refuse them with
(status 2). With --count_gpus: how many GPUs SLURM gave this node, if torch sees any. slurm/train.sbatch asks both
before it starts a run.
"""


def main(argv: list[str] | None = None) -> int:
    """Print the run directory."""
    argv = sys.argv[1:] if argv is None else argv
    if argv in (["--help"], ["-h"]):
        print(HELP, end="")
        return 0
    if argv == ["--count_gpus"]:
        with one_line_errors("fmnist launch"):
            if given := given_gpus():
                import torch

                check_gpus(torch.accelerator.device_count())
            print(given)
        return 0
    cfg = parse_config(argv, prog="fmnist launch")
    print(Path(cfg.output_dir or "runs/run").resolve())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
