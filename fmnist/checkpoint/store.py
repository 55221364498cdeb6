"""Write checkpoints whole or not at all, find the newest that verifies, keep the last and the best."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from fmnist.checkpoint.contents import (
    BEST,
    FORMAT,
    FULL,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    TrainState,
    read_manifest,
    read_state,
    verify,
    weights_to_use,
)
from fmnist.checkpoint.tensors import write_tensors
from fmnist.runtime.console import one_line
from fmnist.runtime.files import Unreadable, cannot_read, open_regular, sha256_of, sync_path, write_atomic
from fmnist.runtime.ownership import delete_reports

logger = logging.getLogger("fmnist")


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: `<run>/checkpoints`.
        keep_last: newest ones kept; the best one, or its weights alone, is kept too.
        meta: written into each checkpoint: `model`, `world_size`, `versions`, and `config`, the recipe with the
            fingerprint, which a restart compares.
    """

    def __init__(self, directory: Path, keep_last: int, meta: Mapping[str, Any]) -> None:
        self.directory, self.keep_last, self.meta = directory, keep_last, dict(meta)
        self._damaged: set[int] = set()  # full ones that a restart stepped over: none of them counts as kept

    def path(self, step: int) -> Path:
        """Return where the checkpoint of a step lies, from which a restart continues."""
        return self.directory / f"{FULL}{step:08d}"

    def best_path(self, step: int) -> Path:
        """Return where the weights alone of a step lie, which was the best one between two checkpoints."""
        return self.directory / f"{BEST}{step:08d}"

    def steps(self, kind: str = FULL) -> list[int]:
        """Return the steps that have a checkpoint directory, oldest first; none of them is verified.

        Args:
            kind: how its name begins.

        Raises:
            ValueError: the folder cannot be read: that is not the same as one without checkpoints.
        """
        try:
            names = os.listdir(self.directory)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise cannot_read(self.directory, error) from None
        return sorted(int(name.removeprefix(kind)) for name in names if re.fullmatch(f"{kind}[0-9]{{8}}", name))

    def save(self, state: TrainState, groups: Mapping[str, Mapping[str, Tensor]]) -> Path:
        """Write one checkpoint, then drop those that are no longer kept.

        Args:
            state: where training stands.
            groups: file name -> tensors by name; the weights to use alone are for use, not for a restart.
        """
        final = self.path(state.step) if OPTIMIZER in groups else self.best_path(state.step)
        self._clear_leftovers()
        if not self.directory.is_dir():
            self.directory.mkdir()  # in a run directory that is there: one that was deleted is not made anew
            sync_path(self.directory.parent)
        part = self.directory / f".part_{final.name}"
        try:
            self._write(part, state, groups)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)  # on a full disk it would take the room that is left
            raise
        self._publish(part, final, state)
        return final

    def _publish(self, part: Path, final: Path, state: TrainState) -> None:
        """Give a checkpoint its name, and drop what is no longer kept."""
        if final.is_symlink() or final.exists():  # a damaged one that a restart stepped over
            final.rename(self._trash(final))
        part.rename(final)
        sync_path(self.directory)  # the new one is on the disk before an older one goes
        if final == self.path(state.step):
            self._damaged.discard(state.step)
        self._prune(state)

    def _write(self, part: Path, state: TrainState, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Fill a directory and force it to the disk: each file, then the manifest, then the names."""
        part.mkdir()
        written = {name: write_tensors(part / name, tensors) for name, tensors in groups.items()}
        text = json.dumps(asdict(state) | {"meta": self.meta}, indent=2).encode()
        (part / STATE).write_bytes(text)
        written[STATE] = len(text), hashlib.sha256(text).hexdigest()
        for name in written:
            sync_path(part / name)
        files = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(written.items())}
        write_atomic(part / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=2))

    def newest_good(self) -> Path | None:
        """Return the newest checkpoint that verifies, warning about each newer one that does not.

        Raises:
            ValueError: there are checkpoints, but not one verifies; or Unreadable: one that may be whole can't be read,
                and neither an older one nor a new start may take its place.
        """
        steps, dropped, damaged = self.steps(), False, ""
        for step in reversed(steps):
            try:
                verify(self.path(step))
            except Unreadable:
                raise
            except ValueError as error:
                if not os.path.lexists(self.path(step)):  # the run that is training dropped it just now
                    dropped = True
                    continue
                logger.warning("checkpoint skipped: %s", one_line(error))
                self._damaged.add(step)
                damaged = damaged or str(error)
            else:
                return self.path(step)
        if dropped:
            return self.newest_good()
        if damaged:
            raise ValueError(f"{self.directory} holds no valid checkpoint ({damaged}); train into another --output_dir")
        return None

    def export(self, step: int, target: Path) -> tuple[str, int]:
        """Copy the weights to use of one checkpoint (the moving average where there is one) to a file.

        A damaged or lost one is reported, and the newest valid one taken. Where the file held other weights, reports of
        those beside it are deleted, first: a kill leaves none of other weights.

        Returns:
            The sha256 of what was written, and the step that it is of.

        Raises:
            ValueError: no checkpoint verifies.
        """
        try:
            best = self.best_path(step)
            data = self._weights(best if best.is_dir() else self.path(step))
        except ValueError as error:
            newest = self.newest_good()
            logger.warning("the best weights, of step %d, cannot be used: %s", step, one_line(error))
            if newest is None:
                raise ValueError(f"{self.directory} holds no checkpoint") from None
            logger.warning("%s takes their place", newest)
            data, step = self._weights(newest), read_state(newest).step
        digest = hashlib.sha256(data).hexdigest()
        if target.is_file():
            _delete_reports_of_others(target, digest)
        write_atomic(target, data)
        return digest, step

    def _weights(self, source: Path) -> bytes:
        """Read the weights to use, and check them; the optimizer's file, twice their size, is left alone."""
        listed = read_manifest(source)
        path = weights_to_use(source, listed)
        try:
            with open_regular(path) as file:
                data = file.read()
        except OSError as error:
            raise cannot_read(path, error) from None
        if hashlib.sha256(data).hexdigest() != listed[path.name][1]:
            raise ValueError(f"{path} is not what was written: its sha256 differs")
        return data

    def _prune(self, state: TrainState) -> None:
        """Drop what no restart and no export can need; later ones are damaged: the run went on from before them."""
        every = self.steps()
        valid = [step for step in every if step <= state.step and step not in self._damaged]
        newest = valid[-self.keep_last :]
        wanted = {*newest, state.best_step, *map(self._best_of, newest[-1:])}  # a restart goes on from the newest
        dropped = [self.path(step) for step in every if not (step in valid and step in wanted)]
        # or from one before, if that is damaged: the weights that these know as the best, where no full one holds them
        alone = {state.best_step, *map(self._best_of, newest)}.difference(valid)
        dropped += [self.best_path(step) for step in self.steps(BEST) if step not in alone]
        for path in dropped:
            path.rename(self._trash(path))
        self._clear_leftovers()

    def _best_of(self, step: int) -> int:
        """Return the best step that a full checkpoint knows; 0 where it is damaged, and nothing will ask for it."""
        try:
            return read_state(self.path(step)).best_step
        except ValueError:
            return 0

    def _trash(self, path: Path) -> Path:
        return path.with_name(f".part_old_{path.name}")  # renamed first: a half-deleted one must not look like one

    def _clear_leftovers(self) -> None:
        """Remove what a save or a removal left that was killed."""
        for leftover in self.directory.glob(f".part_*_{'[0-9]' * 8}"):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def newer_than_weights(run: Path, summary: Mapping[str, Any]) -> Path | None:
    """Return a run's newest valid checkpoint where its model.safetensors is older or missing, else None.

    Args:
        run: the run directory.
        summary: its summary.json, which says at which step the weights were written.

    Raises:
        ValueError: there are no weights, and no checkpoint that can be used.
    """
    checkpoints, steps = Checkpoints(run / "checkpoints", 1, {}), summary.get("steps")
    written = steps if isinstance(steps, int) else 0
    has_weights = (run / MODEL).is_file() and (run / "config.yaml").is_file()
    if has_weights and (summary.get("status") == "finished" or max(checkpoints.steps(), default=0) <= written):
        return None
    try:
        newest = checkpoints.newest_good()
    except Unreadable:
        raise
    except ValueError:
        if not has_weights:
            raise
        return None
    if newest is None and not has_weights:
        if best := checkpoints.steps(BEST):  # its first full one is to come
            return checkpoints.best_path(best[-1])
        raise ValueError(f"{run} holds no model.safetensors and no checkpoint: not a run directory of train.py")
    return newest if newest is None or not has_weights or read_state(newest).step > written else None


def _delete_reports_of_others(weights: Path, digest: str) -> None:
    """Delete the evaluations beside weights that others replace; where that fails it is said, and costs no weights."""
    try:
        if sha256_of(weights) != digest and delete_reports(weights.parent):
            logger.info("%s is replaced: the evaluations of the weights before are deleted", weights)
    except OSError as error:
        logger.warning("the evaluations of the weights before could not be deleted: %s", error)
