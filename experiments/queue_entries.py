"""The entries of a queue of experiments: how they are written, what each of them trains, and which result is whose.

- name: cnn_wide             # results/queue/cnn_wide_seed0.json, runs/queue/cnn_wide_seed0/
  config: configs/cnn.yaml   # the recipe ...
  flags: {optim.lr: 0.008}   # ... and options that beat it
  seeds: [0, 1, 2]
  search: true               # chosen on validation: the test images are not evaluated, and the result has none
  minutes: 4                 # processor minutes of one run, for --plan
  note: why                  # optional
- name: effect
  config: configs/cnn.yaml
  variants: {none: {}, flip: {augment.flip: 0.5}}   # an entry each, effect_none and effect_flip; first seeds first
- name: rates
  config: configs/mlp.yaml
  search: true
  grid: {optim.lr: [0.001, 0.01], model.drop_rate: [0.0, 0.2]}    # a trial each, rates_lr_0.001_drop_rate_0.0, ...
  stop_after: 4              # epochs, after which a trial that lags is stopped: experiments/median_stopping.py
- name: tuned                # without search: the trials first, on the first seed, then the best of them with all seeds
  config: configs/mlp.yaml
  grid: {optim.lr: [0.001, 0.01]}

An entry keeps its meaning: once a result is there, an entry of that name with other options is an error.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fmnist.config import strict_yaml
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
        given = [part for key, value in flags.items() for part in (f"--{key}", json.dumps(value).strip('"'))]
        return ["--config", self.config, *given, "--output_dir", str(directory)]


def read_queue(path: Path) -> list[Entry]:
    """Read the entries, those of variants and grids one by one.

    Raises:
        ValueError: a key that there is not, or a name given twice.
    """
    content = strict_yaml.load_file(path)
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise ValueError(f"{path}: expected a list of entries, - name: ...")
    try:
        entries = [entry for item in content for entry in written(**item)]
    except (TypeError, ValueError) as error:
        said = str(error).removeprefix("Entry.__init__() ").removeprefix("written() ")
        raise ValueError(f"{path}: {said}") from None
    names = [entry.name for entry in entries]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path}: {', '.join(sorted(twice))} is there twice")
    return entries


def written(
    *,
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    grid: Mapping[str, list[Any]] | None = None,
    minutes: float | Mapping[str, float] = 0.0,
    stop_after: float | None = None,
    **entry: Any,
) -> Iterator[Entry]:
    """Yield the entries that one of the file stands for.

    Args:
        variants: further flags of each, by label.
        grid: values of each option, of which every combination is tried.
        minutes: of one run; or of each variant, by label.
        stop_after: of the trials of the grid.
        entry: the other keys of the file.

    Raises:
        ValueError: one line.
    """
    whole = Entry(**entry, group=entry.get("name", ""))
    _check(whole, variants, grid, minutes)
    if stop_after is not None and not grid:
        raise ValueError(f"{whole.name}: stop_after has no effect: there is no grid, whose trials it would stop")
    for label, flags in (variants or {"": {}}).items():
        one = replace(
            whole,
            name=whole.name if variants is None else f"{whole.name}_{label}",
            label=str(label),
            flags={**whole.flags, **flags},
            minutes=float(minutes.get(label, 0.0) if isinstance(minutes, dict) else minutes),
        )
        if grid is None:
            yield one
            continue
        tried = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        trials = [
            replace(
                one,
                name="_".join([one.name, *map(_named, varied, varied.values())]),
                seeds=one.seeds[:1],
                search=True,
                varied=varied,
                stop_after=stop_after,
            )
            for varied in tried
        ]
        yield from trials
        if not one.search:
            yield replace(one, trials=tuple(trial.name for trial in trials))


def _check(entry: Entry, variants: Any, grid: Any, minutes: Any) -> None:
    """Refuse what an entry cannot mean."""
    seeds = entry.seeds
    if not (isinstance(seeds, list) and seeds and {*map(type, seeds)} == {int} and len({*seeds}) == len(seeds)):
        raise ValueError(f"{entry.name}: seeds is {seeds!r:.100}; expected different whole numbers, at least one")
    for key, value, kind in (("variants", variants, dict), ("grid", grid, list)):
        parts = value.values() if isinstance(value, dict) else ()
        if value is not None and not (parts and all(isinstance(part, kind) for part in parts) and ([] not in parts)):
            what = "flags by label" if key == "variants" else "a list of values by option"
            raise ValueError(f"{entry.name}: {key} is {value!r:.100}; expected {what}")
    if isinstance(minutes, dict) and (unknown := minutes.keys() - (variants or {}).keys()):
        raise ValueError(f"{entry.name}: minutes names {min(map(str, unknown))}, which is no variant")


def _named(option: str, value: Any) -> str:
    """Return an option of a trial with its value as a part of a file's name."""
    return f"{option.rpartition('.')[2]}_{re.sub('[^A-Za-z0-9.]+', '_', json.dumps(value)).strip('_')}"


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
