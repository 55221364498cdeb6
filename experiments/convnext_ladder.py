"""Measure where a ConvNeXt training step's time goes on this device: eager, lean, compiled, rung by rung.

    python -m experiments.convnext_ladder --output FILE                  # a GPU, ConvNeXt-Tiny at 224 px, seven minutes
    python -m experiments.convnext_ladder --output FILE --device cpu     # a dry pass of a small one

Interleaved: each round times every rung once, on one batch of noise, after rounds that compile and warm up. The step is
train.py's own `train_step`, without its data path. The device's own ceilings are measured first, and the kernels of the
first and the fastest rung are sorted into classes last. A rung that fails is said, and the others race on.
"""

import argparse
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch.profiler import ProfilerActivity, profile

from fmnist.benchmark.output import gpu_clocks
from fmnist.benchmark.pipelines import Pipeline
from fmnist.benchmark.timing import measure_ceilings, seconds_of
from fmnist.benchmark.trainer import Trainer
from fmnist.config.schema import AugmentConfig, Config, ModelConfig, OptimConfig
from fmnist.models.residual import use_stock_residual
from fmnist.runtime.compute import Compute
from fmnist.runtime.files import write_json
from fmnist.runtime.hardware import available_cores
from fmnist.runtime.provenance import measured_now

# Beside options of the model: timm's residual stream with cuDNN's convolutions chosen by trial, as timm's users have
# it; and that choice alone, which may differ from run to run.
STOCK, BY_TRIAL = "stock", "by_trial"
# By name: options of the model.
RUNGS: dict[str, dict[str, Any]] = {
    "eager, timm's residual": {STOCK: True},
    "eager": {},
    "eager, channels_last": {"channels_last": True},
    "eager, channels_last, cuDNN by trial": {"channels_last": True, BY_TRIAL: True},
    "compiled, timm's residual": {STOCK: True, "compile": True},
    "compiled": {"compile": True},
    "compiled, channels_last": {"compile": True, "channels_last": True},
    "compiled, small maps as matrix products": {"compile": True, "depthwise": "matmul"},
    "our depthwise kernel, eager": {"channels_last": True, "depthwise": "triton"},
    "our depthwise kernel, compiled": {"compile": True, "channels_last": True, "depthwise": "triton"},
}
# By class: parts of kernels' names, in the order in which they are tried.
CLASSES = {
    "compiled": ("triton_",),  # first: the compiler names a kernel after all that it fuses
    "matrix products": ("gemm", "cutlass", "nvjet", "::mm", "addmm", "bmm"),
    "depthwise and other convolutions": ("conv", "depthwise", "dgrad", "wgrad", "cudnn"),
    "norms": ("layer_norm", "layernorm", "norm"),
    "optimizer": ("adam", "multi_tensor"),
    "copies": ("copy", "memcpy", "memset"),
}


@dataclass
class Rung:
    """One way to train.

    Attributes:
        trainer: of its own model and optimizer.
        batch: images and labels, as a loader of the benchmark delivers them.
        by_trial: whether cuDNN chooses its convolutions by trial.
        rates: images per second, of each round.
    """

    trainer: Trainer
    batch: Pipeline
    by_trial: bool
    rates: list[float] = field(default_factory=list)

    def steps(self, count: int) -> int:
        """Train `count` steps and return their images."""
        if not self.by_trial:
            return sum(self.trainer.train_on(self.batch) for _ in range(count))
        with torch.backends.cudnn.flags(benchmark=True, deterministic=False, allow_tf32=False):
            return sum(self.trainer.train_on(self.batch) for _ in range(count))

    def timed(self, count: int, device: torch.device) -> float:
        """Return the images per second of `count` steps, after three that are not timed."""
        self.steps(3)
        images: list[int] = []
        seconds, _ = seconds_of(lambda: images.append(self.steps(count)), device)
        return images[0] / seconds


def build(options: dict[str, Any], base: Config, compute: Compute, batch_size: int) -> Rung:
    """Build one rung; all of them have the same first weights and the same batch."""
    chosen = {key: value for key, value in options.items() if key not in (STOCK, BY_TRIAL)}
    cfg = replace(base, model=replace(base.model, **chosen))
    trainer = Trainer(cfg, compute)
    if STOCK in options:
        use_stock_residual(trainer.model)
    layout = torch.channels_last if cfg.model.channels_last else torch.contiguous_format
    size, generator = trainer.augment.final_size, torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, len(trainer.augment.mean), size, size, generator=generator)
    images = images.to(compute.device, torch.bfloat16).contiguous(memory_format=layout)
    labels = torch.randint(0, 10, (batch_size,), generator=generator).to(compute.device)
    pipeline = cast(Pipeline, SimpleNamespace(next=lambda: (images, labels)))
    return Rung(trainer, pipeline, by_trial=STOCK in options or BY_TRIAL in options)


def kind_of(kernel: str) -> str:
    """Return the class of a kernel, by its name."""
    kinds = (kind for kind, parts in CLASSES.items() if any(part in kernel.lower() for part in parts))
    return next(kinds, "other")


def kernel_classes(rung: Rung, device: torch.device) -> dict[str, Any]:
    """Return each class's share of the device's time in three steps, and the twelve longest kernels."""
    on_cpu = device.type == "cpu"
    with profile(activities=[ProfilerActivity.CPU if on_cpu else ProfilerActivity.CUDA]) as trace:
        seconds_of(lambda: rung.steps(3), device)
    times: dict[str, float] = {}
    for event in trace.key_averages():
        times[event.key] = event.self_cpu_time_total if on_cpu else event.self_device_time_total
    shares: dict[str, float] = defaultdict(float)
    for name, spent in times.items():
        shares[kind_of(name)] += spent / (sum(times.values()) or 1)
    longest = sorted(times, key=lambda name: -times[name])[:12]
    return {kind: round(share, 3) for kind, share in shares.items()} | {"longest": [name[:90] for name in longest]}


def config(model: str, size: int, **options: Any) -> Config:
    """Return what all rungs have in common."""
    network = ModelConfig(name=model, options=options, drop_path_rate=0.1, precision="bf16", depthwise="conv")
    optim = OptimConfig(lr=1e-4, label_smoothing=0.1)
    return Config(model=network, augment=AugmentConfig(size=size), optim=optim)


def small_config() -> Config:
    """Return that of the dry pass."""
    return config("convnext_atto", 32, depths=[1, 1, 1, 1], dims=[8, 8, 16, 16], conv_mlp=False)


def race(args: argparse.Namespace, compute: Compute) -> dict[str, Any]:
    """Build the rungs, time them round by round, and say what they reached."""
    device, begun = compute.device, time.monotonic()
    small = device.type == "cpu"
    base = small_config() if small else config(args.model, args.size)
    copy, product = measure_ceilings(device, torch.bfloat16) if not small else (0.0, 0.0)
    rungs: dict[str, Rung] = {}
    failed: dict[str, str] = {}
    for name, options in RUNGS.items():
        if args.only and not name.startswith(tuple(args.only)):
            continue
        if time.monotonic() - begun > 0.7 * args.seconds:
            failed[name] = "no time was left"
            continue
        try:
            rung = build(options, base, compute, 4 if small else args.batch)
            rung.timed(2, device)  # compiles
            rungs[name] = rung
        except Exception as error:
            failed[name] = " ".join(str(error).split())[:200]
        print(f"{time.monotonic() - begun:6.1f} s  {name}: {failed.get(name, 'ready')}", flush=True)
    for _ in range(args.rounds):
        if time.monotonic() - begun < args.seconds:
            for rung in rungs.values():
                rung.rates.append(rung.timed(args.steps, device))
    rows = {name: row(rung, product) for name, rung in rungs.items() if rung.rates}
    classes = {}
    for name in dict.fromkeys([*list(rows)[:1], *sorted(rows, key=lambda key: -rows[key]["images_per_second"])[:1]]):
        classes[name] = kernel_classes(rungs[name], device)
    return {
        "model": base.model.name,
        "size": base.augment.size,
        "batch": 4 if small else args.batch,
        "steps": args.steps,
        "ceilings": {"bf16_tflops": product / 1e12, "copy_tb_s": copy / 1e12},
        "rungs": rows,
        "failed": failed,
        "kernel_classes": classes,
    }


def row(rung: Rung, product: float) -> dict[str, float]:
    """Return a rung's median, extremes and last loss, and its share of the device's matrix products where measured."""
    rate = statistics.median(rung.rates)
    found = {"images_per_second": rate, "lowest": min(rung.rates), "highest": max(rung.rates)}
    found |= {"rounds": len(rung.rates), "loss": float(rung.trainer.loss)}
    return found | ({"mfu": rate * rung.trainer.flops / product} if product else {})


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", help="cpu for a dry pass of a small model")
    parser.add_argument("--model", default="convnext_tiny", help="any ConvNeXt of timm")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20, help="of one timing")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=420, help="no new round begins after this")
    parser.add_argument("--only", nargs="+", help="beginnings of the names of the rungs to race")
    args = parser.parse_args(argv)
    with Compute(precision="bf16", device=args.device) as compute:
        about = {
            "command": " ".join(["python -m experiments.convnext_ladder", *argv]),
            **measured_now(device=compute.device_name, cpu_cores=available_cores(), clocks=gpu_clocks()),
            "load": os.getloadavg()[1],
        }
        found = race(args, compute)
    write_json(args.output, about | found)
    print(f"\n{'rung':42s} images/s (lowest to highest)       of the first   MFU   loss")
    first = next((entry["images_per_second"] for entry in found["rungs"].values()), 1.0)
    for key, entry in found["rungs"].items():
        rates = "{images_per_second:9.1f} ({lowest:.1f} to {highest:.1f})".format(**entry)
        ratio = entry["images_per_second"] / first
        print(f"{key:42s} {rates:34s} {ratio:6.2f} {entry.get('mfu', 0):9.3f}  {entry['loss']:.4f}")


if __name__ == "__main__":
    main(sys.argv[1:])
