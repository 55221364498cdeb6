"""Show a run's checkpoints, each verified, and which would be used: python -m fmnist.checkpoint RUN..."""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fmnist.checkpoint.contents import EMA, MODEL, read_meta, read_state, verify
from fmnist.checkpoint.run_directory import read_summary
from fmnist.checkpoint.store import Checkpoints
from fmnist.checkpoint.tensors import non_finite, read_tensors
from fmnist.config.parse import load_config
from fmnist.config.same_run import changes, recipe
from fmnist.runtime.files import sha256_of


@dataclass(kw_only=True)
class Entry:
    """One checkpoint.

    Attributes:
        step: completed optimizer updates, of its name.
        bytes: size of its files.
        problem: what is wrong with it, in one line; empty for a good one.
        roles: newest, best, resume (a restart continues from it), weights (model.safetensors is a copy of its weights).
        meta: what it says of itself: model, world size, versions.
    """

    step: int
    bytes: int
    problem: str
    roles: list[str]
    meta: dict[str, Any]


def inspect(run: Path) -> tuple[list[Entry], list[str]]:
    """Verify a run's checkpoints.

    Args:
        run: a run directory.

    Returns:
        The checkpoints, oldest first, and what is wrong beside them, one line each.

    Raises:
        ValueError: the path is not a run directory.
    """
    if not run.is_dir():
        raise ValueError(f"{run} is not a directory: give a run directory of train.py")
    expected = json.loads(json.dumps(recipe(load_config(run / "config.yaml"))))
    checkpoints = Checkpoints(run / "checkpoints", 1, {})
    weights = sha256_of(run / MODEL) if (run / MODEL).is_file() else None
    entries, best, damaged = [], 0, []
    for step in checkpoints.steps():
        path = checkpoints.path(step)
        entry = Entry(step=step, bytes=size(path), problem="", roles=[], meta={})
        try:
            digests = verify(path)
            state, meta = read_state(path), read_meta(path)
            bad = [f"{name}: {key}" for name in digests if name.endswith(".safetensors") for key in broken(path / name)]
            differing = changes(meta.pop("config", {}), expected)
            if bad:
                raise ValueError(f"{path} holds non-finite values in {', '.join(bad[:3])}")
            if differing:
                raise ValueError(f"{path} is of another config: {'; '.join(differing[:3])}")
            entry.meta, best = meta, state.best_step
            if weights is not None and digests.get(EMA, digests.get(MODEL)) == weights:
                entry.roles.append("weights")
        except ValueError as error:
            entry.problem = str(error)
            damaged.append(entry.problem)
        entries.append(entry)
    good = [entry for entry in entries if not entry.problem]
    for entry in good[-1:]:
        entry.roles.insert(0, "resume")
    for entry in entries:
        if entry.step == best:
            entry.roles.append("best")
    copied = any("weights" in entry.roles for entry in entries)
    if (
        weights is not None and not copied and read_summary(run).get("status") == "finished"
    ):  # one that goes on drops older ones
        damaged.append(f"{run / MODEL} is not a copy of any good checkpoint here: its own is gone, or it is damaged")
    if not entries:
        damaged.append(f"{checkpoints.directory} holds no checkpoint")
    return entries, damaged


def broken(path: Path) -> list[str]:
    """Name a file's tensors that are not finite."""
    return non_finite(read_tensors(path))


def size(path: Path) -> int:
    """Return the bytes of a directory's files, of those that can be read."""
    return sum(file.stat().st_size for file in path.glob("*") if file.is_file())


def table(run: Path, entries: list[Entry], problems: list[str]) -> str:
    """Return the text for people."""
    words = {
        "resume": "a restart continues from it",
        "best": "best on validation",
        "weights": "model.safetensors is a copy of it",
    }
    lines = [str(run)]
    for entry in entries:
        verdict = "damaged" if entry.problem else "good"
        made = [str(entry.meta[key]) for key in ("model",) if key in entry.meta]
        if "world_size" in entry.meta:
            made.append(f"{entry.meta['world_size']} process(es)")
        if isinstance(entry.meta.get("versions"), dict):
            made.append(f"torch {entry.meta['versions'].get('torch', 'unknown')}")
        roles = [words[role] for role in entry.roles]
        lines.append(f"  step {entry.step:8d}  {entry.bytes / 1e6:9.2f} MB  {verdict:7s}  {'; '.join(made + roles)}")
    return "\n".join(lines + [f"  {problem}" for problem in problems])


def main(argv: list[str] | None = None) -> int:
    """Print what the runs' checkpoints are worth.

    Returns:
        0: each run has a checkpoint and none is damaged; 1: some are; 2: a path is not a run directory.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fmnist.checkpoint", description="Verify the checkpoints of runs: hashes, values, config, roles."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory of train.py")
    parser.add_argument("--json", action="store_true", help="print one JSON object a run, for scripts")
    args = parser.parse_args(argv)
    status = 0
    for run in args.runs:
        try:
            entries, problems = inspect(run)
        except (ValueError, OSError) as error:
            parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split())}\n")
        if args.json:
            found = {"run": str(run), "checkpoints": [asdict(entry) for entry in entries], "problems": problems}
            print(json.dumps(found))
        else:
            print(table(run, entries, problems))
        status = max(status, int(bool(problems)))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
