"""What `--exact V` costs: a step's processor time with it, as a multiple of that without, V micro-batches or one.

    OMP_NUM_THREADS=1 python -m experiments.exact_cost [--rounds 7] [--shards 1 2 4 8]

One process with one thread, interleaved: each round times every variant once, and the minimum over the rounds counts.
Processor time, which other work on the machine distorts less than the wall clock's. What is left out is the exchange
between processes: `exact` gathers V copies of the gradients where DDP sums one.
"""

import argparse
import time
from collections.abc import Callable

import torch

from fmnist.config.schema import AugmentConfig, Config, ModelConfig
from fmnist.data.batches import Loader, Split
from fmnist.network import build_network
from fmnist.optim import build_optimizer
from fmnist.runtime.compute import Compute
from fmnist.step import train_step

GLOBAL_BATCH_SIZE = 128


def make_step(name: str, micro_batch_size: int, exact: int | None, split: Split) -> Callable[[], None]:
    """Return a function that makes one optimizer step."""
    model_config = ModelConfig(name=name, precision="fp32")
    cfg = Config(model=model_config, augment=AugmentConfig(flip=0.5, shift=0.1), exact=exact)
    compute = Compute(precision="fp32", shards=exact)
    model, augment = build_network(cfg, compute.device, load_weights=True)
    optimizer = build_optimizer(model, cfg.optim)
    prepared, gradients = compute.prepare(model)
    loader = Loader(split, global_batch_size=GLOBAL_BATCH_SIZE, micro_batch_size=micro_batch_size, seed=0)
    micro_batches = loader.micro_batches(0)

    def step() -> None:
        # Accelerate's processes have one setting; here both kinds of run share one.
        torch.use_deterministic_algorithms(exact is not None)
        train_step(prepared, optimizer, micro_batches, augment, gradients, cfg.optim)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="steps of one timing")
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2, 4, 8])
    args = parser.parse_args()
    torch.set_num_threads(1)
    images = torch.randint(0, 256, (1024, 28, 28), dtype=torch.uint8)  # no step takes longer for what is in them
    split = Split(images=images, labels=torch.randint(0, 10, (1024,)))
    print("| model | V | plain, 1 x 128, ms | plain, V micro-batches, ms | exact, ms | of plain | of V micro-batches |")
    print("|---|---|---|---|---|---|---|")
    for name in ("mlp", "cnn"):
        variants = {("plain", 1): make_step(name, GLOBAL_BATCH_SIZE, None, split)}
        for shards in args.shards:
            micro = GLOBAL_BATCH_SIZE // shards
            variants["parts", shards] = make_step(name, micro, None, split)
            variants["exact", shards] = make_step(name, micro, shards, split)
        best = dict.fromkeys(variants, float("inf"))
        for step in variants.values():
            step()
        for _ in range(args.rounds):
            for key, step in variants.items():
                begun = time.process_time()
                for _ in range(args.steps):
                    step()
                best[key] = min(best[key], (time.process_time() - begun) / args.steps)
        plain = best["plain", 1]
        for shards in args.shards:
            parts, exact = best["parts", shards], best["exact", shards]
            times = " | ".join(f"{1e3 * seconds:.1f}" for seconds in (plain, parts, exact))
            print(f"| {name} | {shards} | {times} | {exact / plain:.2f} | {exact / parts:.2f} |")


if __name__ == "__main__":
    main()
