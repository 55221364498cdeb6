"""The runs of a queue: an entry, the best of its trials, and which result is whose."""

import itertools
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fmnist.config.parse import parse_config
from fmnist.config.same_run import recipe
from fmnist.config.schema import Config, flatten
from fmnist.runtime.files import read_json


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One recipe of the queue and its seeds.

    Attributes:
        group: the name in the file, which entries of variants and of a grid share.
        label: what tells it from others of its group.
        trials: names of the entries among which its own `varied` options are chosen, once they have results.
        varied: the options of a grid, with this trial's values.
        stop_after: epochs after which a trial that lags behind the others of its grid is stopped; None: never.
    """

    name: str
    config: str
    seeds: list[int] = field(default_factory=lambda: [0])
    flags: dict[str, Any] = field(default_factory=dict)
    search: bool = False
    note: str = ""
    minutes: float = 0.0
    group: str = ""
    label: str = ""
    trials: tuple[str, ...] = ()
    varied: dict[str, Any] = field(default_factory=dict)
    stop_after: float | None = None

    def arguments(self, seed: int, directory: Path) -> list[str]:
        """Return what train.py is called with."""
        flags = {**self.flags, **self.varied, **({"evaluation.test": False} if self.search else {}), "seed": seed}
        given = [
            part
            for key, value in flags.items()
            for part in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
        ]
        return ["--config", self.config, *given, "--output_dir", str(directory)]


def in_order(entries: list[Entry]) -> list[tuple[Entry, int]]:
    """Return the runs in the order of the file, but of variants all first seeds before any second one.

    So a comparison that is stopped early is one of fewer seeds, not of fewer variants.
    """
    runs: list[tuple[Entry, int]] = []
    for _, same in itertools.groupby(entries, key=lambda entry: entry.group):
        members = list(same)
        for number in range(max(len(entry.seeds) for entry in members)):
            runs += [(entry, entry.seeds[number]) for entry in members if number < len(entry.seeds)]
    return runs


def names(entry: Entry, seed: int) -> set[str]:
    """Return what a run may be called by: its entry, the group of that, or itself."""
    return {entry.name, entry.group, f"{entry.name}_seed{seed}"}


def result_path(results: Path, name: str, seed: int) -> Path:
    """Return where the result of an entry and seed is, or will be."""
    return results / f"{name}_seed{seed}.json"


def chosen(entry: Entry, entries: list[Entry], results: Path) -> Entry | None:
    """Return the entry with the options of its best trial: the most validation top1, then the first of the file.

    An entry without trials is returned as it is; None says that a trial has no result yet.
    """
    if not entry.trials:
        return entry
    trials = [other for other in entries if other.name in entry.trials]
    paths = [result_path(results, trial.name, trial.seeds[0]) for trial in trials]
    if not all(path.is_file() for path in paths):
        return None
    top1 = [read_json(path)["val.top1"] for path in paths]
    return replace(entry, varied=trials[top1.index(max(top1))].varied)


def resolved(entry: Entry, seed: int) -> dict[str, Any]:
    """Return the options that decide a run's result and differ from the defaults, as JSON reads them back."""
    cfg = parse_config(entry.arguments(seed, Path("runs")), prog=entry.name, to_run=False)
    options, defaults = recipe(cfg), flatten(Config())
    return json.loads(json.dumps({key: value for key, value in options.items() if value != defaults[key]}))


def has_result(entry: Entry, seed: int, path: Path) -> bool:
    """Say whether the result is there.

    Raises:
        ValueError: it is one of other options.
    """
    if not path.is_file():
        return False
    before, now = read_json(path)["options"], resolved(entry, seed)
    if changed := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
        raise ValueError(f"{path.name} is of another {', '.join(changed)}: give the entry another name, or delete it")
    return True
