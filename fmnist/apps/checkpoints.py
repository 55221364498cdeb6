"""Verify the checkpoints of runs: hashes, values, config; and show which one a restart would continue from.

The exit status is 0 where each run has a checkpoint and none is damaged, 1 where one is, 2 for a mistake.
"""

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fmnist.runtime.arguments import CommandLine, run_path
from fmnist.runtime.console import log_to_console, one_line, one_line_errors

PARSER = CommandLine(prog="fmnist checkpoint", description=__doc__)
PARSER.add_argument("runs", nargs="+", type=run_path, metavar="RUN", help="a run directory of train.py")
PARSER.add_argument("--json", action="store_true", help="print one JSON object per run, for scripts")


@dataclass(kw_only=True)
class Checked:
    """One checkpoint, verified.

    Attributes:
        step: completed optimizer updates, from its name.
        full: a restart can continue from it; else it holds the weights to use alone.
        bytes: size of its files.
        problem: what is wrong with it, in one line; empty for a valid one.
        roles: resume (a restart continues from it), best, weights (model.safetensors is a copy of its weights).
        meta: what it says of itself: model, world size, versions.
    """

    step: int
    full: bool
    bytes: int
    problem: str
    roles: list[str]
    meta: dict[str, Any]


def inspect(run: Path) -> tuple[list[Checked], list[str]]:
    """Verify a run's checkpoints.

    Returns:
        The checkpoints, oldest first, those of weights alone among them, and all problems, one line each.

    Raises:
        ValueError: the path is not a run directory.
    """
    from fmnist.checkpoint.contents import BEST, EMA, FULL, MODEL, read_meta, read_state, verify
    from fmnist.checkpoint.run_directory import read_summary
    from fmnist.checkpoint.store import Checkpoints
    from fmnist.checkpoint.tensors import non_finite, read_tensors
    from fmnist.config.parse import load_config
    from fmnist.config.same_run import listed, not_of
    from fmnist.runtime.files import sha256_of

    cfg = load_config(run / "config.yaml")
    checkpoints = Checkpoints(run / "checkpoints", 1, {})
    weights = sha256_of(run / MODEL) if (run / MODEL).is_file() else None
    found, best, problems = [], 0, []
    paths = [*map(checkpoints.path, checkpoints.steps()), *map(checkpoints.best_path, checkpoints.steps(BEST))]
    for path in sorted(paths, key=lambda path: path.name.partition("_")[2]):
        full, step = path.name.startswith(FULL), int(path.name.partition("_")[2])
        checked = Checked(step=step, full=full, bytes=0, problem="", roles=[], meta={})
        found.append(checked)
        try:
            with suppress(FileNotFoundError):
                checked.bytes = sum(file.stat().st_size for file in path.glob("*") if file.is_file())
            digests = verify(path)
            state, meta = read_state(path), read_meta(path)
            files = [name for name in digests if name.endswith(".safetensors")]
            if bad := [f"{name}: {key}" for name in files for key in non_finite(read_tensors(path / name))]:
                raise ValueError(f"{path} holds non-finite values in {', '.join(bad[:3])}")
            if differing := not_of(meta.pop("config"), cfg):
                raise ValueError(f"{path} is of another config: {listed(differing)}")
        except ValueError as error:
            if not os.path.lexists(path):  # dropped meanwhile, by a run that goes on
                found.remove(checked)
                continue
            checked.problem = str(error)
            problems.append(checked.problem)
            continue
        checked.meta, best = meta, state.best_step
        if weights is not None and digests.get(EMA, digests.get(MODEL)) == weights:
            checked.roles.append("weights")
    for checked in [checked for checked in found if checked.full and not checked.problem][-1:]:
        checked.roles.insert(0, "resume")
    for checked in found:
        checked.roles += ["best"] * (checked.step == best)
    # Only at the end: a run that goes on drops older checkpoints.
    summary = read_summary(run)
    finished = summary.get("status") == "finished"
    if weights is not None and summary.get("weights_sha256", weights) != weights:
        problems.append(f"{run / MODEL} does not have the hash in summary.json: it was changed afterwards")
    if finished and weights is None:
        problems.append(f"{run / MODEL} is lost: the command that trained the run makes it again")
    if finished and weights is not None and not any("weights" in checked.roles for checked in found):
        problems.append(f"{run / MODEL} is not a copy of any valid checkpoint here: its own is gone, or it is damaged")
    if not any(checked.full for checked in found):
        problems.append(f"{checkpoints.directory} holds no checkpoint to resume from")
    return found, problems


ROLES = {
    "resume": "a restart continues from it",
    "best": "best on validation",
    "weights": "model.safetensors is a copy of it",
}


def table(run: Path, found: list[Checked], problems: list[str]) -> str:
    """Return the text for people."""
    lines = [one_line(str(run), 4096)]
    for checked in found:
        meta = checked.meta
        notes = [one_line(str(meta["model"]), 60)] if "model" in meta else []
        if isinstance(size := meta.get("world_size"), int):
            notes.append(f"{size} process{'es' * (size != 1)}")
        if isinstance(versions := meta.get("versions"), dict):
            notes.append(f"torch {one_line(str(versions.get('torch', 'unknown')), 40)}")
        notes += ["weights alone"] * (not checked.full) + [ROLES[role] for role in checked.roles]
        unread = "permission denied" in checked.problem  # it may be whole
        state = "unread" if unread else "damaged" if checked.problem else "valid"
        lines.append(f"  step {checked.step:8d}  {checked.bytes / 1e6:9.2f} MB  {state:7s}  {'; '.join(notes)}")
    return "\n".join(lines + [f"  {one_line(problem, 500)}" for problem in problems])


def main(argv: list[str] | None = None) -> int:
    """Print what is known of each run's checkpoints."""
    args = PARSER.parse_args(argv)
    log_to_console()
    status = 0
    with one_line_errors(PARSER.prog):
        for run in args.runs:
            found, problems = inspect(run)
            about = {"run": str(run), "checkpoints": [asdict(checked) for checked in found], "problems": problems}
            print(json.dumps(about) if args.json else table(run, found, problems))
            status = max(status, int(bool(problems)))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
