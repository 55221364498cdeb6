"""Measure the cost of `--exact V`: a step's processor time with it, over that without, in V micro-batches or in one.

    OMP_NUM_THREADS=1 python -m experiments.exact_cost [--rounds 7] [--shards 1 2 4 8]

One process with one thread, interleaved: each round times every variant once, and the minimum over the rounds counts.
Processor time, because other work on the machine distorts it less than wall-clock time. The exchange between processes
is not measured: `exact` gathers V copies of the gradients where DDP sums one.
"""

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from fmnist.benchmark.trainer import Trainer
from fmnist.config.schema import AugmentConfig, Config, ModelConfig
from fmnist.data.batches import Loader
from fmnist.data.split import Split
from fmnist.runtime.compute import Compute
from fmnist.runtime.files import write_json
from fmnist.runtime.provenance import measured_now

GLOBAL_BATCH_SIZE = 128


def make_step(
    name: str, micro_batch_size: int, split: Split, compute: Compute, fill: bool = False
) -> Callable[[], None]:
    """Return a function that does one optimizer step, exact where `compute` is; fresh memory is filled, or not."""
    network = ModelConfig(name=name, precision="fp32")
    cfg = Config(model=network, augment=AugmentConfig(flip=0.5, shift=0.1), exact=compute.shards)
    trainer = Trainer(cfg, compute)
    loader = Loader(split, global_batch_size=GLOBAL_BATCH_SIZE, micro_batch_size=micro_batch_size, seed=0)
    micro_batches = loader.micro_batches(0)

    def step() -> None:
        # the setting is the process's own; here both kinds of run share one
        torch.use_deterministic_algorithms(compute.shards is not None)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        trainer.train(micro_batches, trainer.augment)

    return step


def measure(name: str, shards: list[int], rounds: int, steps: int) -> dict[tuple[str, int], float]:
    """Return processor seconds of one step: the lowest of the rounds, by kind (plain, parts, exact, filled) and V."""
    images = torch.randint(0, 256, (1024, 28, 28), dtype=torch.uint8)  # the pixels do not change the time
    split = Split(images=images, labels=torch.randint(0, 10, (1024,)))
    with ExitStack() as stack:
        plain = stack.enter_context(Compute(precision="fp32"))
        variants = {("plain", 1): make_step(name, GLOBAL_BATCH_SIZE, split, plain)}
        for count in shards:
            exact = stack.enter_context(Compute(precision="fp32", shards=count))
            variants["parts", count] = make_step(name, GLOBAL_BATCH_SIZE // count, split, plain)
            variants["exact", count] = make_step(name, GLOBAL_BATCH_SIZE // count, split, exact)
            variants["filled", count] = make_step(name, GLOBAL_BATCH_SIZE // count, split, exact, fill=True)
        best = dict.fromkeys(variants, float("inf"))
        for step in variants.values():
            step()
        for _ in range(rounds):
            for key, step in variants.items():
                begun = time.process_time()
                for _ in range(steps):
                    step()
                best[key] = min(best[key], (time.process_time() - begun) / steps)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="steps of one timing")
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/exact_cost.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in ("mlp", "cnn"):
        best = measure(name, args.shards, args.rounds, args.steps)
        for shards in args.shards:
            seconds = {kind: best[kind, shards] for kind in ("parts", "exact", "filled")}
            rows.append({"model": name, "shards": shards, "plain": best["plain", 1], **seconds})
            print(rows[-1], flush=True)
    command = " ".join(["python -m experiments.exact_cost", *sys.argv[1:]])
    write_json(args.output, {"command": command, **measured_now(), "processor_seconds": rows})


if __name__ == "__main__":
    main()
