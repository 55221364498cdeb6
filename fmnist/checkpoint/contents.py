"""What a checkpoint holds: its files, where training stood, and the manifest that they are verified against."""

import hashlib
import logging
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fmnist.runtime.files import Unreadable, cannot_read, open_regular, read_json

logger = logging.getLogger("fmnist")

FORMAT = 2
MANIFEST, STATE, MODEL, EMA, OPTIMIZER = (
    "manifest.json",
    "state.json",
    "model.safetensors",
    "ema.safetensors",
    "optimizer.safetensors",
)
NEEDED = {STATE, MODEL, OPTIMIZER}  # the moving average is there only where the run keeps one
FULL, BEST = "step_", "best_"  # how the names begin of what a restart continues from, and of weights alone


@dataclass(kw_only=True)
class TrainState:
    """Everything a run needs beside tensors to resume.

    Attributes:
        step: completed optimizer updates.
        best_step: the step whose weights are kept; without validation images, the newest.
        best_val: all validation numbers of the best step, by name; empty without a validation.
        total_steps: what `schedule.minutes` came to; None where it is not given.
        micro_batch_size: what `batch.micro_batch_size: auto` found; None where it is not auto.
        train_seconds: wall clock of training steps over all starts, evaluations apart.
        size: pixels per side of the last step's images; None before the first.
    """

    step: int = 0
    best_step: int = 0
    train_seconds: float = 0.0
    best_val: dict[str, float] = field(default_factory=dict)
    total_steps: int | None = None
    micro_batch_size: int | None = None
    size: int | None = None

    def update_best(self, val: Mapping[str, float], by: str = "top1") -> None:
        """Take this step as the best if no step before was as good, or if there is no validation.

        Numbers at one image size are not compared with those at another: those at the last size of training, which
        name none, win; else the newer step is the best.

        Args:
            val: validation numbers by name; empty without validation images.
            by: `evaluation.best`; of loss the lowest is the best.
        """
        sign, before = -1 if by == "loss" else 1, self.best_val.get(by)
        size_before = self.best_val.get("size")
        # Whatever is first is the best so far, a NaN too: there are weights to use.
        if (
            not val
            or before is None
            or (sign * val[by] > sign * before if val.get("size") == size_before else size_before is not None)
        ):
            self.best_step = self.step
            self.best_val = {name: value for name, value in val.items() if math.isfinite(value)}


def read_manifest(directory: Path) -> dict[str, tuple[int, str]]:
    """Return the size and sha256 of each file of a checkpoint, as its manifest lists them.

    Raises:
        ValueError: one line: there is none, or it is of no checkpoint; Unreadable where this user may not read it.
    """
    try:
        manifest = read_json(directory / MANIFEST)
        version = manifest["format"]
        files = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except Unreadable:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{directory / MANIFEST} is missing or is no manifest") from None
    if version != FORMAT:
        raise ValueError(f"{directory / MANIFEST} has format {version}; this version reads {FORMAT}")
    needed = {STATE, weights_to_use(directory, files).name} if directory.name.startswith(BEST) else NEEDED
    if lacking := sorted(needed - files.keys()):
        raise ValueError(f"{directory / MANIFEST} does not list {', '.join(lacking)}, which a checkpoint needs")
    return files


def is_checkpoint(path: Path) -> bool:
    """Say whether a path is a checkpoint by its name and manifest; of its weights alone, too."""
    return path.name.startswith((FULL, BEST)) and (path / MANIFEST).is_file()


def verify(directory: Path) -> dict[str, str]:
    """Check a checkpoint against its manifest, and return the sha256 of each of its files.

    Other files beside them, such as a file manager's, are one warning: nothing reads them.

    Raises:
        ValueError: one line naming the file that is missing or not as it was written; Unreadable where this user may
            not read one, which may be whole.
    """
    files = read_manifest(directory)
    for name, (size, digest) in files.items():
        path = directory / name
        try:
            with open_regular(path) as file:
                found = os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:  # a dangling link, a directory, a disk that cannot be read
            raise cannot_read(path, error) from None
        if found != (size, digest):
            raise ValueError(f"{path} is not what was written: {found[0]} bytes for {size}, sha256 differs")
    if more := sorted(set(os.listdir(directory)) - files.keys() - {MANIFEST}):
        logger.warning("%s holds files that are not of the checkpoint, and are not used: %.200r", directory, more)
    return {name: digest for name, (_, digest) in files.items()}


def weights_to_use(directory: Path, listed: Collection[str]) -> Path:
    """Return a checkpoint's file of weights to use: the moving average where it has one, else the model's.

    Args:
        directory: the checkpoint.
        listed: the files that its manifest lists: another one is none of it.
    """
    return directory / (EMA if EMA in listed else MODEL)


def read_state(directory: Path) -> TrainState:
    """Read the state of a verified checkpoint.

    Raises:
        ValueError: one line, for a file that does not hold a state, or that of another step.
    """
    try:
        values = read_json(directory / STATE)
        values.pop("meta", None)
        state = TrainState(**values)
        valid = state.step > 0 and 0 <= state.best_step <= state.step
        finite = math.isfinite(sum(state.best_val.values())) and 0 <= state.train_seconds < math.inf
        found = [value for value in (state.total_steps, state.micro_batch_size, state.size) if value is not None]
        whole = all(isinstance(value, int) for value in (state.step, *found))
        if not (valid and finite and whole and min(found, default=1) > 0):
            raise ValueError
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{directory / STATE} does not hold the state of a run") from None
    if directory.name not in (f"{FULL}{state.step:08d}", f"{BEST}{state.step:08d}"):
        raise ValueError(f"{directory} holds step {state.step}: it is another checkpoint under this name")
    return state


def read_meta(directory: Path) -> dict[str, Any]:
    """Return what a verified checkpoint says about itself: model, config, world size, versions."""
    meta = read_json(directory / STATE).get("meta")
    meta = meta if isinstance(meta, dict) else {}
    return meta | {key: {} for key in ("config", "versions") if not isinstance(meta.get(key), dict)}
