"""Entry: python -m fmnist.benchmark {data,train,all,plot} [options]; --help explains them."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fmnist.benchmark import output, races
from fmnist.benchmark.ceilings import copy_bytes_per_second, matmul_flops_per_second
from fmnist.benchmark.command_line import Options, parse
from fmnist.benchmark.gate import Verdict
from fmnist.benchmark.pipelines import Pipeline, Setting
from fmnist.benchmark.registry import OURS, PIPELINES, build
from fmnist.benchmark.timing import Pace
from fmnist.config.schema import DataConfig
from fmnist.data.batches import Split
from fmnist.runtime.compute import Compute
from fmnist.runtime.console import log_to_console, one_line_errors


class Benchmark:
    """One run of the benchmark: the result grows table by table, and each is printed and saved as it is done.

    Args:
        options: with the defaults of the device filled in.
        argv: the command line, for the record.
        compute: the device and the other processes.
    """

    def __init__(self, options: Options, argv: list[str], compute: Compute) -> None:
        self.options, self.compute = options, compute
        self.dtype = torch.bfloat16 if compute.precision == "bf16" else torch.float32
        self.split = Split.load("train", DataConfig(root=options.data_root), compute.device)
        seconds = options.seconds or 1.0
        self.pace = Pace(rounds=options.rounds or 1, steps=options.steps, warmup=options.warmup, seconds=seconds)
        self.ceilings = races.Ceilings(
            copy_bytes_per_second=copy_bytes_per_second(compute.device),
            matmul_flops_per_second=matmul_flops_per_second(compute.device, self.dtype),
        )
        self.result = output.describe(compute, argv, asdict(options))
        self.result |= {"ceilings": asdict(self.ceilings), "gate": [], "skipped": {}, "tables": []}
        self.say(
            f"{compute.device_name}, {compute.world_size} process(es), {compute.precision}; measured ceilings: copy "
            f"{output.scaled(self.ceilings.copy_bytes_per_second, 'B/s')}, matrix product "
            f"{output.scaled(self.ceilings.matmul_flops_per_second, 'FLOP/s')} ({self.dtype})"
        )

    def say(self, text: str) -> None:
        """Print on the main process."""
        self.compute.on_main(print, text, flush=True)

    def admitted(self, names: tuple[str, ...], size: int, batch_size: int) -> list[Pipeline]:
        """Build the loaders, send them through the gate, and say in a line what becomes of each that is left out."""
        torch.compiler.reset()  # a compiler keeps few versions of one function, then runs it uncompiled in silence
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self.compute.world_size))
        setting = Setting(
            split=self.split,
            size=size,
            batch_size=batch_size,
            dtype=self.dtype,
            seed=self.options.seed,
            rank=self.compute.rank,
            world_size=self.compute.world_size,
            workers=max(1, len(os.sched_getaffinity(0)) // local),
        )
        pipelines, skipped, verdicts = races.admit(
            names, setting, self.compute, lambda verdict: self.announce(verdict, size)
        )
        for name, reason in skipped.items():
            if self.result["skipped"].get(name) != reason:
                self.say(f"skipped  {name}: {reason}")
        self.result["skipped"] |= skipped
        self.result["gate"] += races.verdicts_as_json(verdicts, size)
        return pipelines

    def announce(self, verdict: Verdict, size: int) -> None:
        """Say what the gate found."""
        head = f"{'passed ' if verdict.passed else 'REFUSED'}  {verdict.name} at {size} px: "
        fine = f"{verdict.largest_error:.2f}/255 from its float64 {verdict.chain}, labels in order"
        self.say(head + (fine if verdict.passed else f"{verdict.reason}; not timed"))

    def finish(self, table: dict[str, Any]) -> None:
        """Print a table and save what there is so far."""
        if self.options.baseline:
            add_efficiency(table, json.loads(self.options.baseline.read_text()), self.compute.world_size)
        self.result["tables"].append(table)
        self.say(output.render_table(table))
        self.save()

    def save(self) -> None:
        """Write the JSON file, on the main process."""
        self.result["hardware"]["clocks_after"] = output.gpu_clocks()
        self.compute.on_main(output.write_json, with_suffix(self.options.output, "json"), self.result)

    def data(self) -> None:
        """Race the loaders alone, at every size; then ours again at a batch that hides the cost of launching."""
        names = tuple(name for name in self.options.loaders if name != "synthetic")
        ours = tuple(name for name in names if name in OURS)
        plans = [(names, size, self.options.batch) for size in self.options.sizes]
        plans += [(ours, size, self.options.large_batch) for size in self.options.sizes if self.options.large_batch]
        for loaders, size, batch in plans:
            stored = self.split.images.shape[-1]
            resize = f"{size} px" if size == stored else f"{stored} to {size} px"
            title = f"loaders alone, {resize}, batch {batch}"
            try:
                if pipelines := self.admitted(loaders, size, batch):
                    self.finish(races.race_loaders(pipelines, self.pace, self.compute, self.ceilings, title))
            except torch.OutOfMemoryError:
                self.result["skipped"][title] = "not enough device memory"
                self.say(f"skipped  {title}: not enough device memory")

    def train(self) -> None:
        """Race the loaders as they feed each model in each variant."""
        for model, size in self.options.models or ():
            for variant in self.options.variants or ():
                if pipelines := self.admitted(self.training_loaders(size), size, self.options.batch):
                    table = races.race_training(model, variant, pipelines, self.pace, self.compute, self.ceilings)
                    self.finish(table)

    def training_loaders(self, size: int) -> tuple[str, ...]:
        """Return the loaders that feed models; with --scaling the synthetic one and the first of ours that runs."""
        if not self.options.scaling:
            return self.options.loaders
        setting = Setting(split=self.split, size=size, batch_size=self.options.batch, dtype=self.dtype)
        return ("synthetic", *(pipeline.name for pipeline in build(OURS, setting)[0][:1]))


def add_efficiency(table: dict[str, Any], baseline: dict[str, Any], world_size: int) -> None:
    """Add to each row its images/s over world_size times those of one process in the same race.

    Raises:
        ValueError: the baseline is not of one process, or has no such race.
    """
    if baseline.get("world_size") != 1:
        raise ValueError(f"--baseline is of {baseline.get('world_size')} processes; legal: the JSON of one process")
    same = next((other for other in baseline["tables"] if other["title"] == table["title"]), None)
    if same is None:
        raise ValueError(f"--baseline has no race {table['title']!r}; run the same command with one process")
    single = {row["name"]: row["images_per_second"]["median"] for row in same["rows"]}
    for row in table["rows"]:
        if row["name"] in single:
            row["efficiency"] = row["images_per_second"]["median"] / (world_size * single[row["name"]])


def with_defaults(options: Options, *, on_cpu: bool) -> Options:
    """Fill in what depends on the device: a CPU takes smaller work, so that `all` ends within five minutes."""
    defaults: dict[str, Any] = {
        "rounds": 7 if on_cpu else 5,
        "seconds": 0.7 if on_cpu else 1.0,
        "models": (("cnn", 28),) if on_cpu else (("cnn", 28), ("convnext_tiny", 224)),
        "variants": ("eager",) if on_cpu else ("eager", "compiled"),
        "large_batch": 0 if on_cpu else 8192,
    }
    return replace(options, **{key: value for key, value in defaults.items() if getattr(options, key) is None})


def with_suffix(stem: Path, suffix: str) -> Path:
    """Return STEM.suffix; a stem may hold dots."""
    return stem.with_name(f"{stem.name}.{suffix}")


def plot(result: dict[str, Any], path: Path, say: Callable[[str], None] = print) -> None:
    """Draw the chart, or say what is missing for it."""
    try:
        from fmnist.benchmark.chart import draw
    except ImportError as error:
        return say(f"no chart: {error}; draw it elsewhere with: python -m fmnist.benchmark plot FILE.json")
    draw(result, path)
    return say(f"chart: {path}")


def main(argv: list[str]) -> int:
    """Run the benchmark; return the exit status, 1 where the gate refused something."""
    options = parse(argv, tuple(PIPELINES))
    log_to_console()
    with one_line_errors("fmnist.benchmark"):
        if options.file is not None:
            plot(json.loads(options.file.read_text()), options.file.with_suffix(".png"))
            return 0
        with Compute(precision=options.precision, keep_memory=options.allocator == "kept") as compute:  # type: ignore[arg-type]
            return race(options, argv, compute)


def race(options: Options, argv: list[str], compute: Compute) -> int:
    """Run the races that the options name; return the exit status, 1 where the gate refused something."""
    benchmark = Benchmark(with_defaults(options, on_cpu=compute.device.type == "cpu"), argv, compute)
    if options.mode in ("data", "all"):
        benchmark.data()
    if options.mode in ("train", "all"):
        benchmark.train()
    benchmark.save()
    refused = sorted({item["name"] for item in benchmark.result["gate"] if not item["passed"]})
    if benchmark.result["tables"]:
        compute.on_main(plot, benchmark.result, with_suffix(options.output, "png"), benchmark.say)
    elif not refused:
        raise ValueError(f"nothing to race: none of {', '.join(options.loaders)} runs here in {options.mode}")
    if refused:
        line = f"fmnist.benchmark: error: the gate refused {', '.join(refused)}: wrong images or labels\n"
        compute.on_main(sys.stderr.write, line)
    return 1 if refused else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
