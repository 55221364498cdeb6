"""All races of one command: the loaders alone, and the whole step fed by each of them."""

import argparse
import itertools
import math
import platform
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fmnist.benchmark import gate, libraries, operators, output, timing
from fmnist.benchmark.command_line import DEFAULTS, LOADERS, PROGRAM
from fmnist.benchmark.failures import failure_of
from fmnist.benchmark.photographs import PHOTO_OUTPUT, photographs
from fmnist.benchmark.pipelines import Pipeline, Setting
from fmnist.benchmark.trainer import Trainer
from fmnist.config.schema import AugmentConfig, Config, DataConfig, ModelConfig, OptimConfig
from fmnist.data.split import Split
from fmnist.runtime.compute import Compute
from fmnist.runtime.files import read_json, write_json
from fmnist.runtime.hardware import available_cores


class Suite:
    """Runs the races that the options name; each table is printed and saved at `path` once it is complete."""

    def __init__(self, options: argparse.Namespace, argv: Sequence[str], path: Path, compute: Compute) -> None:
        on_gpu = compute.device.type != "cpu"
        defaults = {key: values[on_gpu] for key, values in DEFAULTS.items() if getattr(options, key) is None}
        self.options, self.path, self.compute = argparse.Namespace(**vars(options) | defaults), path, compute
        self.baseline = read_json(options.baseline) if options.baseline else None
        colour = options.mode == "colour"
        self.split = photographs(compute.device) if colour else Split.load("train", DataConfig(), compute.device)
        self.dtype = torch.bfloat16 if compute.precision == "bf16" else torch.float32
        self.copy_rate, self.flops_rate = timing.measure_ceilings(compute.device, self.dtype)
        ceilings = {"copy_bytes_per_second": self.copy_rate, "matmul_flops_per_second": self.flops_rate}
        self.result = output.describe(compute, argv, vars(self.options))
        self.result |= {"ceilings": ceilings, "gate": [], "skipped": {}, "tables": []}
        copy, product = output.scaled(self.copy_rate, "B/s"), output.scaled(self.flops_rate, "FLOP/s")
        self.say = partial(compute.on_main, print, flush=True)
        self.say(f"{compute.device_name}, {compute.precision}; measured: copy {copy}, matrix product {product}")

    def run(self) -> int:
        """Run the races; return the exit status, 1 where the gate refused a loader or one failed."""
        for title, names, setting, cfg in self.plans():
            try:
                self.race(title, names, setting, cfg)
            except torch.OutOfMemoryError:
                self.skip(title, "not enough device memory")
        refused = sorted({finding["name"] for finding in self.result["gate"] if not finding["passed"]})
        rows = [row for table in self.result["tables"] for row in table["rows"]]
        failed = sorted({row["name"] for row in rows if "failed" in row})
        if not rows and not refused:
            raise ValueError(f"nothing to race: none of {', '.join(self.options.loaders)} runs here")
        chart = self.path.with_suffix(".png")
        if drawn := not all("failed" in row for row in rows):
            self.compute.on_main(output.draw, self.result, chart)
        if rows:
            self.say(f"\nwrote {self.path}" + f" and {chart}" * drawn)
        for said, names in ("the gate refused {}: wrong images or labels", refused), ("{} failed: see above", failed):
            if names:
                self.compute.on_main(sys.stderr.write, f"{PROGRAM}: error: {said.format(', '.join(names))}\n")
        return 1 if refused or failed else 0

    def plans(self) -> Iterator[tuple[str, list[str], Setting, Config | None]]:
        """Yield title, loaders and setting of each race, with the config of the model to train, if any.

        Ours are raced again at a batch that hides the cost of launching. An epoch is a few steps there, and drawing
        its order and random numbers on the host limits the rate: one more table, one epoch repeated, leaves that out.
        """
        options, compute, stored = self.options, self.compute, self.split.images.shape[-1]
        workers = available_cores() // compute.gather(platform.node()).count(platform.node())
        shared = partial(Setting, split=self.split, dtype=self.dtype, workers=workers)
        setting = partial(shared, rank=compute.rank, world_size=compute.world_size)
        if options.mode != "train":
            colour = "colour photographs, " * (options.mode == "colour")
            no_loaders = ("synthetic", "resize-first" if colour else "synthetic")  # its crop resizes
            loaders = [name for name in options.loaders if not name.endswith(no_loaders)]
            ours = [name for name in loaders if name.startswith("ours")]
            races = [(loaders, options.batch, False)]
            if options.large_batch and not colour:
                races += [(ours, options.large_batch, repeat) for repeat in (False, True)]
            for (names, batch, repeat), size in itertools.product(races, [PHOTO_OUTPUT] if colour else options.sizes):
                title = f"{colour}loaders alone, {f'{stored} to ' * (size != stored)}{size} px, batch {batch}"
                title += ", one epoch repeated" * repeat
                yield title, names, setting(size=size, batch_size=batch, repeat_epoch=repeat), None
        if options.mode in ("train", "all"):
            ours = ["ours-compiled" if compute.device.type == "cpu" else "ours-triton"]
            names, optim = ["synthetic", *ours] if options.scaling else options.loaders, OptimConfig(lr=1e-4)
            for model, variant in itertools.product(options.models, options.variants):
                name, _, size = model.partition("@")
                layout = name != "mlp"  # as the configs have it
                network = ModelConfig(name=name, compile=variant == "compiled", channels_last=layout)
                augment = AugmentConfig(size=int(size))
                cfg = Config(model=network, augment=augment, optim=optim)
                title = f"training {name}, {size} px, {variant}, batch {options.batch}"
                yield title, names, setting(size=int(size), batch_size=options.batch), cfg

    def checked(self, names: Sequence[str], setting: Setting) -> dict[str, Pipeline | str]:
        """Build the loaders; return by name those that pass the gate on every process, or why one failed there."""
        torch.compiler.reset()  # a compiler keeps few versions of a function, then runs it uncompiled without a word
        checked: dict[str, Pipeline | str] = {}
        for name in names:
            try:
                pipeline = libraries.PIPELINES[name](name, setting)
            except (ValueError, ImportError) as missing:
                self.skip(name, str(missing))
                continue
            if name != "synthetic":
                finding: dict[str, Any] = {}
                failure = failure_of(partial(self.examine, pipeline, finding))
                if failure := next(filter(None, self.compute.gather(failure)), ""):
                    checked[name] = failure
                    continue
                if not all(self.compute.gather(finding["passed"])):
                    finding |= {"passed": False, "reason": finding["reason"] or "refused on another process"}
                self.result["gate"].append(finding)
                error = f"{finding['largest_error']:.2f}/255 from float64 ({pipeline.chain})"
                head = f"{'passed ' if finding['passed'] else 'REFUSED'}  {name} at {setting.size} px"
                self.say(f"{head}: {error}, {finding['reason'] or 'labels in order'}")
                if not finding["passed"]:
                    continue
            checked[name] = pipeline
        return checked

    def examine(self, pipeline: Pipeline, finding: dict[str, Any]) -> None:
        """Fill in what the gate finds, and count the bytes that an image costs."""
        finding |= gate.check(pipeline)
        pipeline.bytes_per_image = timing.bytes_per_image(pipeline)

    def skip(self, what: str, reason: str) -> None:
        """Say once why something is not raced, and record it."""
        if self.result["skipped"].get(what) != reason:
            self.say(f"skipped  {what}: {reason}")
        self.result["skipped"][what] = reason

    def race(self, title: str, names: Sequence[str], setting: Setting, cfg: Config | None) -> None:
        """Race the loaders, or a model fed by each; print the table and save all there is so far."""
        options, processes = self.options, self.compute.world_size
        entries = self.checked(names, setting)
        if not entries:
            return
        table: dict[str, Any] = {"mode": "train" if cfg else "data", "title": title, "size": setting.size}
        table |= {"batch_size": setting.batch_size, "dtype": str(setting.dtype).removeprefix("torch.")}
        trainer = Trainer(cfg, self.compute) if cfg else None
        step = trainer.train_on if trainer else lambda pipeline: len(pipeline.next()[1])
        pipelines = [entry for entry in entries.values() if isinstance(entry, Pipeline)]
        results = timing.race(pipelines, step, options.rounds, options.seconds, self.compute, self.fatal(trainer))
        if cfg and trainer:
            variant = "compiled" if cfg.model.compile else "eager"
            table |= {"model": cfg.model.name, "variant": variant, "flops_per_image": trainer.flops}
            if not math.isfinite(float(trainer.loss)):  # what was timed is not training
                raise FloatingPointError(f"{title}: the loss is {float(trainer.loss)} at the end")
        table["rows"] = [self.row(name, entry, results.get(name), trainer) for name, entry in entries.items()]
        output.add_ratios(table, "synthetic" if trainer else "torchvision-pil-2", self.baseline, processes)
        self.result["tables"].append(table)
        self.result["hardware"]["clocks_after"] = output.gpu_clocks()
        self.say(output.render_table(table) + output.render_profile(table))
        self.compute.on_main(write_json, self.path, self.result)

    def fatal(self, trainer: Trainer | None) -> tuple[type[Exception], ...]:
        """Return the errors that end more than a row."""
        if trainer is None:
            return ()
        # of several processes the others would wait inside the step for one whose loader failed
        return (Exception,) if self.compute.world_size > 1 else (torch.OutOfMemoryError,)

    def row(self, name: str, pipeline: Pipeline | str, rounds: Any, trainer: Trainer | None) -> dict[str, Any]:
        """Return a loader's row: what its rounds say, or why it failed."""
        row: dict[str, Any] = {"name": name, "description": LOADERS[name]}
        if isinstance(pipeline, str) or isinstance(rounds, str):
            return row | {"failed": pipeline if isinstance(pipeline, str) else rounds}
        row |= timing.summarize(rounds)
        if name == "ours-compiled" or trainer and trainer.compiled:
            row["recompilations"] = sum(sample["recompilations"] for sample in rounds)
        rate = row["images_per_second"]["median"] / self.compute.world_size
        needed, ceiling = pipeline.bytes_per_image, self.copy_rate
        if trainer:
            needed, ceiling = trainer.flops, self.flops_rate
            row["mfu"] = rate * needed / ceiling
            if self.options.profile:
                profiled = partial(operators.time_by_class, trainer.train_on, pipeline, self.compute.device, row)
                if failure := failure_of(profiled, self.fatal(trainer)):
                    return {"name": name, "description": LOADERS[name], "failed": failure}
        elif needed:
            row |= {"bytes_per_image": needed, "bytes_rule": pipeline.bytes_rule, "bytes_per_second": rate * needed}
            row["share_of_copy_ceiling"] = rate * needed / ceiling
        if needed:
            row["roofline_images_per_second"] = ceiling / needed * self.compute.world_size
        return row
