"""Fork processes that save checkpoints in a loop, and SIGKILL each at a random time: kill_saves.py DIRECTORY KILLS

Prints one JSON object: the kills, how many fell into a save, and the newest good step after each.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from fmnist.checkpoint.contents import EMA, MODEL, OPTIMIZER, TrainState, read_state
from fmnist.checkpoint.store import Checkpoints
from fmnist.checkpoint.tensors import read_tensors


def save_forever(checkpoints: Checkpoints, step: int) -> None:
    while True:
        step += 1
        groups = {name: {"weight": torch.full((100_000,), float(step))} for name in (MODEL, EMA, OPTIMIZER)}
        checkpoints.save(TrainState(step=step, best_step=step - step % 5), groups)
        if step % 5 == 4:  # the best, after an evaluation between two full ones
            checkpoints.save(TrainState(step=step + 1, best_step=step + 1), {EMA: groups[EMA]})


def newest_step(checkpoints: Checkpoints) -> int:
    """Load the newest good checkpoint and check that its content is that of its step."""
    newest = checkpoints.newest_good()
    if newest is None:
        return 0
    step = read_state(newest).step
    for name in (MODEL, EMA, OPTIMIZER):
        assert (read_tensors(newest / name)["weight"] == step).all(), newest / name
    return step


def main(directory: Path, kills: int) -> None:
    torch.set_num_threads(1)  # a forked child has no thread pool
    checkpoints = Checkpoints(directory, keep_last=2, meta={})
    generator, step, steps, in_a_save = random.Random(0), 0, [], 0
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            save_forever(checkpoints, step)
        deadline = time.monotonic() + 60
        while not checkpoints.steps() or checkpoints.steps()[-1] == step:  # it has saved once at least
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(generator.random() * 0.1)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        in_a_save += any(directory.glob(".part_*"))
        now = newest_step(checkpoints)
        assert now > step, (now, step)
        step = now
        steps.append(step)
    print(json.dumps({"kills": kills, "in_a_save": in_a_save, "steps": steps}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
