"""train.py that also measures its own memory: long_run.py FLAGS...

Prints one JSON list: for each logged line of training its epoch and the bytes held then, on the device or, on a CPU,
resident.
"""

import json
import sys
from typing import Any

import psutil
import torch

import train
from fmnist.config.parse import parse_config
from fmnist.run import Run

real_log = Run.log
seen: list[tuple[float, int]] = []


def log(run: Run, prefix: str, scalars: Any, step: int) -> None:
    real_log(run, prefix, scalars, step)
    if prefix == "train":
        on_gpu = run.device.type == "cuda"
        epoch = step / run.steps_per_epoch
        seen.append((epoch, torch.cuda.memory_allocated() if on_gpu else psutil.Process().memory_info().rss))


if __name__ == "__main__":
    Run.log = log  # type: ignore[method-assign]
    train.main(parse_config(sys.argv[1:]))
    print(json.dumps(seen))
