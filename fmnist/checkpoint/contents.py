"""What a checkpoint holds: its files, where training stood, and the manifest that they are verified against."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmnist.runtime.files import read_json

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
    """Everything a run needs beside tensors to resume.

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


def verify(directory: Path) -> dict[str, str]:
    """Check a checkpoint against its manifest, and return the sha256 of each of its files.

    Raises:
        ValueError: one line naming the file that is missing, unexpected, or not as it was written.
    """
    try:
        manifest = read_json(directory / MANIFEST)
        version = manifest["format"]
        files = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{directory / MANIFEST} is missing or not readable") from None
    if version != FORMAT:
        raise ValueError(f"{directory / MANIFEST} has format {version}; this version reads {FORMAT}")
    present = {path.name for path in directory.iterdir()} - {MANIFEST}
    if present != set(files):
        raise ValueError(f"{directory} holds {sorted(present)}; its manifest lists {sorted(files)}")
    for name, (size, digest) in files.items():
        path = directory / name
        try:
            with path.open("rb") as file:
                found = os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:  # a dangling link, a directory, a disk that cannot be read
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        if found != (size, digest):
            raise ValueError(f"{path} is not what was written: {found[0]} bytes for {size}, sha256 differs")
    return {name: digest for name, (_, digest) in files.items()}


def weights_to_use(directory: Path) -> Path:
    """Return a checkpoint's file of weights to use: the moving average where there is one, else the model's."""
    return directory / (EMA if (directory / EMA).is_file() else MODEL)


def read_state(directory: Path) -> TrainState:
    """Read the state of a verified checkpoint.

    Raises:
        ValueError: one line, for a file that does not hold a state, or that of another step.
    """
    try:
        values = read_json(directory / STATE)
        values.pop("meta", None)
        state = TrainState(**values)
        valid = state.step > 0 and 0 <= state.best_step <= state.step and -1 <= state.best_top1 <= 1
        if not (valid and isinstance(state.step, int) and 0 <= state.train_seconds < float("inf")):
            raise ValueError
    except (ValueError, TypeError):
        raise ValueError(f"{directory / STATE} does not hold the state of a run") from None
    if directory.name != f"step_{state.step:08d}":
        raise ValueError(f"{directory} holds step {state.step}: it is another checkpoint under this name")
    return state


def read_meta(directory: Path) -> dict[str, Any]:
    """Return what a verified checkpoint says about itself: model, config, world size, versions."""
    meta = read_json(directory / STATE).get("meta")
    return meta if isinstance(meta, dict) else {}
