"""How the entries of a queue of experiments are written.

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
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.queue_entries import Entry
from fmnist.config import strict_yaml


def read_queue(path: Path) -> list[Entry]:
    """Read the entries, those of variants and grids one by one.

    Raises:
        ValueError: a key that there is not, or a name given twice.
    """
    try:
        content = strict_yaml.load_file(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise ValueError(f"{path}: expected a list of entries, - name: ...")
    entries: list[Entry] = []
    for item in content:
        try:
            entries += written(**item)
        except (TypeError, ValueError) as error:
            said = str(error).removeprefix("Entry.__init__() ").removeprefix("written() ")
            name = f"{item.get('name', f'entry {content.index(item) + 1}')}: "
            raise ValueError(f"{path}: {name}{said.removeprefix(name)}") from None
    names = [entry.name for entry in entries]
    if folders := [name for name in names if "/" in name]:
        raise ValueError(f"{path}: {folders[0]}: a name is part of file names and holds no /")
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
    if stop_after is not None and not (_is_number(stop_after) and stop_after > 0):
        raise ValueError(f"{whole.name}: stop_after is {stop_after!r:.100}; expected a number of epochs, more than 0")
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
    for key, kind, what in (
        ("name", str, "text"),
        ("config", str, "text"),
        ("note", str, "text"),
        ("search", bool, "true or false"),
    ):
        if not isinstance(given := getattr(entry, key), kind):
            raise ValueError(f"{entry.name}: {key} is {given!r:.100}; expected {what}")
    seeds = entry.seeds
    if not (isinstance(seeds, list) and seeds and {*map(type, seeds)} == {int} and len({*seeds}) == len(seeds)):
        raise ValueError(f"{entry.name}: seeds is {seeds!r:.100}; expected different whole numbers, at least one")
    if not isinstance(entry.flags, dict):
        raise ValueError(f"{entry.name}: flags is {entry.flags!r:.100}; expected values by option")
    for key, value, kind in (("variants", variants, dict), ("grid", grid, list)):
        parts = value.values() if isinstance(value, dict) else ()
        if value is not None and not (parts and all(isinstance(part, kind) for part in parts) and ([] not in parts)):
            what = "flags by label" if key == "variants" else "a list of values by option"
            raise ValueError(f"{entry.name}: {key} is {value!r:.100}; expected {what}")
    if not all(map(_is_number, minutes.values() if isinstance(minutes, dict) else [minutes])):
        raise ValueError(f"{entry.name}: minutes is {minutes!r:.100}; expected a number, or one by label")
    if isinstance(minutes, dict) and (unknown := minutes.keys() - (variants or {}).keys()):
        raise ValueError(f"{entry.name}: minutes names {min(map(str, unknown))}, which is no variant")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _named(option: str, value: Any) -> str:
    """Return an option of a trial with its value as a part of a file's name."""
    return f"{option.rpartition('.')[2]}_{re.sub('[^A-Za-z0-9.]+', '_', json.dumps(value)).strip('_')}"
