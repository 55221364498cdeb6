"""Race steps launched one kernel at a time against steps launched as one CUDA graph, and compare their bits.

    python -m experiments.capture_speed                     # on a GPU, 80 seconds
    python -m experiments.capture_speed --compiled          # the CNN with torch.compile too, a minute more
    python -m experiments.capture_speed --dry               # on a CPU, tiny: to see that it runs; nothing is kept

Rounds are interleaved, and the median counts. What is timed is what train.py does in a step but for its clock and log:
learning rate, micro-batches, `train_step`. Bits are compared after the first 20 steps of two networks that begin alike:
weights, moments and the moving average.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fmnist.benchmark.trainer import Trainer
from fmnist.config.parse import parse_config
from fmnist.config.schema import AugmentConfig, BatchConfig, Config, ModelConfig
from fmnist.data.batches import Loader
from fmnist.data.split import Split
from fmnist.optim import Schedule, set_lr
from fmnist.runtime.captured_step import CapturedStep
from fmnist.runtime.compute import Compute
from fmnist.runtime.files import write_json
from fmnist.runtime.provenance import measured_now
from fmnist.runtime.weight_average import WeightAverage

OUTPUT = Path(__file__).parent / "results" / "capture_speed.json"
COMPARED = 20  # steps


class Racer:
    """A network that trains on random pixels, as train.py would.

    Args:
        cfg: its recipe.
        split: the training images.
        choice: of model.cuda_graph.
        compute: the device.
    """

    def __init__(self, cfg: Config, split: Split, choice: Literal["auto", "never"], compute: Compute) -> None:
        cfg = replace(cfg, model=replace(cfg.model, cuda_graph=choice))
        self.trainer, self.done = Trainer(cfg, compute), 0
        model, decay = self.trainer.gradients.model, cfg.optim.ema_decay
        self.ema = WeightAverage(model, decay=decay, use_warmup=True) if decay else None
        self.loader = Loader(split, global_batch_size=cfg.batch.global_batch_size, seed=cfg.seed)
        self.schedule = Schedule.from_config(cfg, self.loader.steps_per_epoch)

    def steps(self, count: int) -> None:
        """Update the weights so many times."""
        t = self.trainer
        for _ in range(count):
            set_lr(t.optimizer, self.schedule, self.done)
            batches = self.loader.micro_batches(self.done)
            t.step(t.model, t.optimizer, batches, t.augment, t.gradients, t.cfg, self.ema)
            self.done += 1

    def tensors(self) -> Iterator[Tensor]:
        """Yield all that training has made."""
        yield from self.trainer.gradients.model.state_dict().values()
        for state in self.trainer.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
        yield from self.ema.module.state_dict().values() if self.ema else ()


def recipes(*, compiled: bool, dry: bool) -> dict[str, Config]:
    """Return what is raced, by name."""
    cnn, mlp = (
        parse_config(["--config", f"experiments/recipes/{name}.yaml"]) for name in ("cnn_11_epochs", "mlp_adamw")
    )
    small = parse_config(["--config", "configs/convnext_32px.yaml"])
    at_28 = replace(cnn, augment=replace(cnn.augment, size=28))
    large = Config(model=ModelConfig(name="convnext_tiny", drop_path_rate=0.1), augment=AugmentConfig(size=224))
    found = {
        "mlp, 28 px, batch 256": replace(mlp, batch=BatchConfig(global_batch_size=256)),
        "cnn, 28 px, batch 128": replace(at_28, batch=BatchConfig(global_batch_size=128)),
        "cnn, 28 px, batch 1024": replace(at_28, batch=BatchConfig(global_batch_size=1024)),
        "configs/convnext_32px.yaml, batch 128": small,
        "convnext_tiny, 224 px, batch 128": replace(large, batch=BatchConfig(global_batch_size=128)),
    }
    if dry:
        found = {name: replace(cfg, batch=BatchConfig(global_batch_size=8)) for name, cfg in list(found.items())[:2]}
    if compiled:
        cnn = found["cnn, 28 px, batch 128"]
        found = {"cnn compiled, 28 px, batch 128": replace(cnn, model=replace(cnn.model, compile=True))}
    return found


def race(cfg: Config, split: Split, compute: Compute, rounds: int, seconds: float) -> dict[str, Any]:
    """Race one recipe: ms a step, images/s, host time, and whether the bits are equal."""
    eager, captured = (Racer(cfg, split, choice, compute) for choice in ("never", "auto"))
    for racer in (eager, captured):
        racer.steps(COMPARED)
    equal = all(torch.equal(a, b) for a, b in zip(eager.tensors(), captured.tensors(), strict=True))
    times: dict[str, list[float]] = {"eager": [], "captured": []}
    counts = {}
    for name, racer in (("eager", eager), ("captured", captured)):
        counts[name] = max(5, int(seconds / timed(racer.steps, 5, compute)))
    for _ in range(rounds):
        for name, racer in (("eager", eager), ("captured", captured)):
            times[name].append(timed(racer.steps, counts[name], compute))
    synchronize(compute)
    began = time.perf_counter()
    captured.steps(20)
    host = (time.perf_counter() - began) / 20
    step: Any = captured.trainer.step
    recorded = step.recorded if isinstance(step, CapturedStep) else None
    replay = recorded._replay if recorded else None
    ms = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    batch = cfg.batch.global_batch_size
    return {
        **{f"{name}_ms": round(value, 3) for name, value in ms.items()},
        **{f"{name}_images_per_second": round(1e3 * batch / value) for name, value in ms.items()},
        **{f"{name}_spread_ms": [round(1e3 * f(values), 3) for f in (min, max)] for name, values in times.items()},
        "ratio": round(ms["eager"] / ms["captured"], 2),
        "host_us": round(1e6 * host, 1),
        "graph_ms": round(1e3 * timed(lambda count: [replay() for _ in range(count)], 50, compute), 3)
        if replay
        else None,
        "bits_equal": equal,
        "captured": replay is not None,
    }


def synchronize(compute: Compute) -> None:
    if compute.device.type != "cpu":
        torch.accelerator.synchronize()


def timed(steps: Callable[[int], object], count: int, compute: Compute) -> float:
    """Return seconds of one of so many steps, all done on the device."""
    synchronize(compute)
    began = time.perf_counter()
    steps(count)
    synchronize(compute)
    return (time.perf_counter() - began) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each variant in each round")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with Compute(precision="fp32" if args.dry else "bf16") as compute:
        side = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (2000 if args.dry else 60_000, 28, 28), dtype=torch.uint8, generator=side)
        labels = torch.randint(0, 10, (len(images),), generator=side)
        split = Split(images=images.to(compute.device), labels=labels.to(compute.device))
        for name, cfg in recipes(compiled=args.compiled, dry=args.dry).items():
            began = time.perf_counter()
            try:
                found[name] = race(cfg, split, compute, args.rounds, 0.05 if args.dry else args.seconds)
            except Exception as error:  # the other rows count
                found[name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
            compute.release()
            print(name, f"{time.perf_counter() - began:.1f} s", found[name], flush=True)
        device = compute.device_name
    about = {
        "command": " ".join(["python -m experiments.capture_speed", *sys.argv[1:]]),
        **measured_now(device=device),
        "rounds": args.rounds,
    }
    if not args.dry:
        before = json.loads(args.output.read_text()) if args.output.exists() else {}
        result = before | {"compiled" if args.compiled else "steps": about | {"rows": found}}
        write_json(args.output, result)
    print(f"{'':38} {'eager ms':>9} {'graph ms':>9} {'images/s':>10} {'ratio':>6} {'host us':>8} {'alone':>7}  bits")
    for name, row in found.items():
        if "failed" in row:
            print(f"{name:38} {row['failed'][:100]}")
            continue
        print(
            f"{name:38} {row['eager_ms']:9.3f} {row['captured_ms']:9.3f} {row['captured_images_per_second']:10,} "
            f"{row['ratio']:6.2f} {row['host_us']:8.1f} {row['graph_ms'] or 0:7.3f}  "
            f"{'equal' if row['bits_equal'] else 'DIFFERENT'}{'' if row['captured'] else ', not captured'}"
        )


if __name__ == "__main__":
    main()
