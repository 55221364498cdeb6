"""Checkpoints: written whole or not at all, verified before they are used, no pickle in them.

A checkpoint is a directory `step_<8 digits>` with safetensors, JSON, and `manifest.json`: the size and sha256 of every
other file, written last. It is built under another name, synced, and renamed.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

logger = logging.getLogger("fmnist")
FORMAT = 1
MANIFEST, STATE, MODEL, EMA, OPTIMIZER = (
    "manifest.json",
    "state.json",
    "model.safetensors",
    "ema.safetensors",
    "optimizer.safetensors",
)


@dataclass(kw_only=True)
class TrainState:
    """Everything a run needs beside tensors to go on.

    Attributes:
        step: completed optimizer updates.
        best_top1: highest validation top1 so far (fraction); -1 before the first evaluation.
        best_step: the step of its checkpoint; without validation images, the newest.
        train_seconds: wall clock of training steps over all starts, evaluations apart.
    """

    step: int = 0
    best_top1: float = -1.0
    best_step: int = 0
    train_seconds: float = 0.0

    def update_best(self, top1: float | None) -> None:
        """Take this step as the best if its top1 is higher than any before, or if there is no validation (None)."""
        if top1 is None or top1 > self.best_top1:
            self.best_top1, self.best_step = -1.0 if top1 is None else top1, self.step


def sync_path(path: Path) -> None:
    """Force a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    sync_path(part)
    part.replace(path)
    sync_path(path.parent)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state by parameter name, e.g. {"exp_avg/head.weight": ...}."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {f"{key}/{names[id(p)]}": value for p, state in optimizer.state.items() for key, value in state.items()}


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` returned; the optimizer casts and moves it as it needs."""
    names = {id(p): name for name, p in model.named_parameters()}
    states: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        key, _, name = full.partition("/")
        states.setdefault(name, {})[key] = tensor
    payload = optimizer.state_dict()
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    payload["state"] = {i: states[names[id(p)]] for i, p in enumerate(ordered) if names[id(p)] in states}
    optimizer.load_state_dict(payload)


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Load tensors whose names and shapes are exactly the module's.

    Raises:
        ValueError: one line naming the tensors that are missing, unexpected or of another shape, and the file.
    """
    own = module.state_dict()
    wrong = [f"{name} missing" for name in own if name not in tensors]
    wrong += [f"{name} unexpected" for name in tensors if name not in own]
    wrong += [
        f"{name} is {list(tensors[name].shape)} not {list(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if wrong:
        raise ValueError(f"{source} does not fit the model: {'; '.join(wrong[:3])} ({len(wrong)} tensors in all)")
    module.load_state_dict(dict(tensors))


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Name the tensors that hold a NaN or an infinity."""
    floats = {name: t for name, t in tensors.items() if t.is_floating_point()}
    verdicts = torch.stack([t.isfinite().all() for t in floats.values()]).tolist()  # one device sync for all
    return [name for name, fine in zip(floats, verdicts, strict=True) if not fine]


def verify(directory: Path) -> None:
    """Check a checkpoint against its manifest.

    Raises:
        ValueError: one line naming the file that is missing, unexpected, or not as it was written.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        version, files = manifest["format"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{directory / MANIFEST} is missing or not readable") from None
    if version != FORMAT:
        raise ValueError(f"{directory / MANIFEST} has format {version}; this version reads {FORMAT}")
    present = {path.name for path in directory.iterdir()} - {MANIFEST}
    if present != set(files):
        raise ValueError(f"{directory} holds {sorted(present)}; its manifest lists {sorted(files)}")
    for name, entry in files.items():
        data = (directory / name).read_bytes()
        if len(data) != entry["bytes"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise ValueError(f"{directory / name} is not what was written: {len(data)} bytes, wrong sha256")


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: `<run>/checkpoints`.
        keep_last: newest ones kept; the best one is kept too.
        meta: written into each, for people: config digest, versions, world size.
    """

    def __init__(self, directory: Path, keep_last: int, meta: Mapping[str, Any]) -> None:
        self.directory, self.keep_last, self.meta = directory, keep_last, dict(meta)

    def path(self, step: int) -> Path:
        """Return where the checkpoint of a step lies."""
        return self.directory / f"step_{step:08d}"

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint directory, oldest first; none of them is verified."""
        found = self.directory.glob("step_" + "[0-9]" * 8)
        return sorted(int(path.name.removeprefix("step_")) for path in found)

    def save(self, state: TrainState, groups: Mapping[str, Mapping[str, Tensor]]) -> Path:
        """Write one checkpoint, then drop those that are no longer kept.

        Args:
            state: where training stands.
            groups: file name -> tensors by name.
        """
        final = self.path(state.step)
        for leftover in self.directory.glob(".part_*"):  # of a save or a removal that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        part = self.directory / f".part_{final.name}"
        part.mkdir(parents=True)
        for name, tensors in groups.items():
            save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, part / name)
        (part / STATE).write_text(json.dumps(asdict(state) | {"meta": self.meta}, indent=2), encoding="utf-8")
        files = {}
        for path in sorted(part.iterdir()):
            files[path.name] = {
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            sync_path(path)
        write_atomic(part / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=2).encode())
        if final.exists():  # a corrupt one of the same step that a restart stepped over
            self._remove(final)
        part.rename(final)
        sync_path(self.directory)
        self._prune(state.best_step)
        return final

    def newest_good(self) -> Path | None:
        """Return the newest checkpoint that verifies, warning about each newer one that does not.

        Raises:
            ValueError: there are checkpoints, but not one verifies.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                verify(self.path(step))
            except ValueError as error:
                logger.warning("checkpoint passed over: %s", error)
            else:
                return self.path(step)
        if steps:
            raise ValueError(
                f"{self.directory} holds no valid checkpoint; start again: --resume never --overwrite true"
            )
        return None

    def export(self, step: int, target: Path) -> None:
        """Copy the weights to use of one checkpoint (the moving average where there is one) to a file."""
        source = self.path(step)
        weights = source / EMA if (source / EMA).is_file() else source / MODEL
        write_atomic(target, weights.read_bytes())

    def _prune(self, best_step: int) -> None:
        steps = self.steps()
        for step in steps[: -self.keep_last]:
            if step != best_step:
                self._remove(self.path(step))

    def _remove(self, path: Path) -> None:
        trash = path.with_name(f".part_{path.name}")  # renamed first: a half-deleted one must not look like one
        path.rename(trash)
        shutil.rmtree(trash)


def read_state(directory: Path) -> TrainState:
    """Read the state of a verified checkpoint."""
    values = json.loads((directory / STATE).read_bytes())
    values.pop("meta", None)
    return TrainState(**values)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        ValueError: one line, for a file that is missing or not safetensors.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())[:120]}") from None
