"""Write checkpoints whole or not at all, find the newest that verifies, keep the last and the best."""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fmnist.checkpoint.contents import FORMAT, MANIFEST, STATE, TrainState, verify, weights_to_use
from fmnist.checkpoint.tensors import apart
from fmnist.runtime.console import one_line
from fmnist.runtime.files import sync_path, write_atomic

logger = logging.getLogger("fmnist")


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
        self._clear_leftovers()
        if not self.directory.is_dir():
            self.directory.mkdir(parents=True)
            sync_path(self.directory.parent)
        part = self.directory / f".part_{final.name}"
        try:
            self._write(part, state, groups)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)  # on a full disk it would take the room that is left
            raise
        if final.is_symlink() or final.exists():  # a damaged one that a restart stepped over
            final.rename(self._trash(final))
        part.rename(final)
        sync_path(self.directory)  # the new one is on the disk before an older one goes
        self._prune(state)
        return final

    def _write(self, part: Path, state: TrainState, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Fill a directory and force it to the disk: each file, then the manifest, then the names."""
        part.mkdir()
        for name, tensors in groups.items():
            try:
                save_file(apart(tensors), part / name)
            except SafetensorError as error:  # the library's name for a full disk
                raise OSError(f"{part / name} cannot be written: {one_line(error, 200)}") from None
            (part / name).chmod(part.stat().st_mode & 0o666)  # the library's is 0600; the folder's follows the umask
        (part / STATE).write_text(json.dumps(asdict(state) | {"meta": self.meta}, indent=2), encoding="utf-8")
        files = {}
        for path in sorted(part.iterdir()):
            files[path.name] = {
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            sync_path(path)
        write_atomic(part / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=2))

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
                logger.warning("checkpoint skipped: %s", error)
            else:
                return self.path(step)
        if steps:
            raise ValueError(
                f"{self.directory} holds no valid checkpoint; start again: --resume never --overwrite true"
            )
        return None

    def export(self, step: int, target: Path) -> None:
        """Copy the weights to use of one checkpoint (the moving average where there is one) to a file.

        A damaged or lost one is reported, and the newest valid one taken.

        Raises:
            ValueError: no checkpoint verifies.
        """
        source: Path | None = self.path(step)
        try:
            verify(self.path(step))
        except ValueError as error:
            source = self.newest_good()
            logger.warning("the best checkpoint cannot be used: %s; %s takes its place", error, source)
        if source is None:
            raise ValueError(f"{self.directory} holds no checkpoint")
        write_atomic(target, weights_to_use(source).read_bytes())

    def _prune(self, state: TrainState) -> None:
        """Drop what is not kept: older ones, and later ones, which are damaged: the run went on from before them."""
        steps = self.steps()
        kept = {step for step in steps if step <= state.step}
        kept = set(sorted(kept)[-self.keep_last :]) | {state.best_step}
        for step in steps:
            if step not in kept:
                self.path(step).rename(self._trash(self.path(step)))
        self._clear_leftovers()

    def _trash(self, path: Path) -> Path:
        return path.with_name(f".part_old_{path.name}")  # renamed first: a half-deleted one must not look like one

    def _clear_leftovers(self) -> None:
        """Remove what a save or a removal left that was killed."""
        for leftover in self.directory.glob(".part_*"):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
