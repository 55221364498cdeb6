"""Time what images that are spread over the processes cost: their exchange alone, and in the step, against `device`.

  torchrun --nproc_per_node 2 -m fmnist.benchmark.spread --model cnn@28

Fashion-MNIST, in interleaved rounds: an exchange of a micro-batch and nothing else; train.py's own step on images that
lie on each process's device; the same step on images that are spread, one micro-batch brought ahead beside it.
"""

import statistics
from argparse import Namespace
from pathlib import Path
from typing import Any

from fmnist.runtime.arguments import CommandLine, number
from fmnist.runtime.console import log_to_console, one_line_errors
from fmnist.runtime.files import write_json
from fmnist.runtime.ownership import check_outputs
from fmnist.runtime.provenance import measured_now

PROGRAM = "fmnist.benchmark.spread"
WARM_UP = 3  # steps before a round
PARSER = CommandLine(prog=PROGRAM, description=__doc__, joined=True)
PARSER.add_argument("--model", default="cnn@28", metavar="NAME@PX", help="what is trained (default: cnn@28)")
PARSER.add_argument("--batch", type=number(1, 8192), default=128, help="images per step and process (default: 128)")
PARSER.add_argument("--rounds", type=number(1, 100), default=7, help="interleaved rounds (default: 7)")
PARSER.add_argument("--steps", type=number(1, 10_000), default=20, help="of a round (default: 20)")
PARSER.add_argument("--output", type=Path, default=Path("runs/spread.json"), metavar="JSON", help="file to write")
PARSER.add_force()


def measure(options: Namespace, compute: Any) -> dict[str, Any]:
    """Time the three by turns; milliseconds of the slowest process, the median over the rounds and all of them."""
    from fmnist.benchmark.timing import seconds_of
    from fmnist.benchmark.trainer import Trainer
    from fmnist.config.schema import AugmentConfig, Config, DataConfig, ModelConfig, OptimConfig
    from fmnist.data.batches import Loader
    from fmnist.data.placement import place, place_of
    from fmnist.data.split import Split

    name, _, side = options.model.partition("@")
    if not side.isdecimal():
        raise ValueError(f"--model is {options.model!r:.80}; valid: NAME@PIXELS, e.g. cnn@28")
    model, augment = ModelConfig(name=name, cuda_graph="never"), AugmentConfig(size=int(side))
    trainer = Trainer(Config(model=model, augment=augment, optim=OptimConfig(lr=1e-4)), compute)
    splits = {"train": compute.together(lambda: Split.load("train", DataConfig()))}
    shared = {"seed": 0, "rank": compute.rank, "world_size": compute.world_size}
    loaders: dict[str, Loader] = {}
    for where in ("device", "spread"):
        placement = place_of(where, splits, compute.world_size, 1)
        split = place(splits, placement, compute, compute.device, 1)["train"]
        exchange = compute.exchange if where == "spread" else None
        loaders[where] = Loader(
            split, global_batch_size=options.batch * compute.world_size, exchange=exchange, **shared
        )
    staging = loaders["spread"].staging
    assert staging is not None

    def train(where: str, first: int, steps: int) -> None:
        for step in range(first, first + steps):
            trainer.train(loaders[where].micro_batches(step), trainer.augment)

    times: dict[str, list[float]] = {"exchange": [], "device": [], "spread": [], "wait": []}
    num_bytes, first = 0, 0
    for _ in range(options.rounds):
        num_bytes, seconds = staging.probe()
        times["exchange"].append(max(compute.gather(seconds)))
        for where in loaders:
            train(where, first, WARM_UP)
            compute.join()
            waited = staging.waited()
            seconds, _ = seconds_of(lambda: train(where, first + WARM_UP, options.steps), compute.device)  # noqa: B023
            times[where].append(max(compute.gather(seconds / options.steps)))
        times["wait"].append(max(compute.gather((staging.waited() - waited) / options.steps)))
        first += WARM_UP + options.steps
    rows = {name: {"median_ms": 1000 * statistics.median(each), "rounds_ms": [1000 * s for s in each]}
            for name, each in times.items()}  # fmt: skip
    largest = max(compute.gather(num_bytes))
    return {"exchanged_bytes": largest, "bytes_per_second": largest / statistics.median(times["exchange"]), **rows}


def table(found: dict[str, Any]) -> str:
    """Lay the numbers out as text."""
    ms = {name: found[name]["median_ms"] for name in ("exchange", "device", "spread", "wait")}
    size, rate = found["exchanged_bytes"] / 1e6, found["bytes_per_second"] / 1e9
    rows = {
        "exchange alone": ("exchange", f"{size:.3g} MB to each process, {rate:.3g} GB/s"),
        "step, images on each device": ("device", ""),
        "step, images spread": (
            "spread",
            f"{ms['spread'] / ms['device']:.3f} times as long, {ms['wait']:.3f} ms of it waiting for images",
        ),
    }
    return "\n".join(f"{what:<30}{ms[key]:9.3f} ms  {more}".rstrip() for what, (key, more) in rows.items())


def main(argv: list[str] | None = None) -> int:
    """Print the three rows, and write them with every round's numbers."""
    options = PARSER.parse_args(argv)
    from fmnist.runtime.compute import Compute

    log_to_console()
    with one_line_errors(PROGRAM), Compute() as compute:
        if compute.world_size == 1:
            raise ValueError(f"one process exchanges nothing: torchrun --nproc_per_node 2 -m {PROGRAM}")
        given = vars(options)
        compute.agree_on_options({key: value for key, value in given.items() if key not in ("output", "force")})
        compute.on_main(check_outputs, {options.output: b'"name": "spread"'}, force=options.force)
        found = measure(options, compute)
        about: dict[str, Any] = {
            "name": "spread",
            "command": f"torchrun --nproc_per_node {compute.world_size} -m {PROGRAM}",
        }
        about |= measured_now(device=compute.device_name) | {"world_size": compute.world_size}
        about["options"] = {key: given[key] for key in ("model", "batch", "rounds", "steps")}
        compute.on_main(write_json, options.output, about | found)
        compute.on_main(print, f"{table(found)}\nwrote {options.output}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
