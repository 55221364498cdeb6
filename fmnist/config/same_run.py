"""The options that decide a run's result, and which of them differ between two configs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fmnist.config import strict_yaml
from fmnist.config.schema import Config, flatten

# These belong to one start of a run, and are not kept in its config.yaml.
OF_A_START = ("resume", "overwrite", "max_minutes", "profile", "dry_run")
# What may differ between a run's two starts: nothing here changes which weights come out.
MAY_CHANGE = (
    *OF_A_START,
    "output_dir",
    "timeout_s",
    "threads",
    "data.root",  # what they hold is compared: checkpoint/fingerprint.py
    "data.corrections",
    "data.where",
    "model.weights",
    "model.cuda_graph",
    "log.",
    "checkpoint.",
    "evaluation.test",
)
# These change the arithmetic's order or its hardware, not the recipe: batches stay the same, results to rounding.
MAY_CHANGE_ROUNDING = (
    "batch.micro_batch_size",
    "augment.backend",
    "evaluation.batch_size",
    "model.compile",
    "model.channels_last",
    "model.depthwise",
)
# All that may differ between the processes of one start: where each finds the same thing, and its share of the machine.
MAY_DIFFER_BETWEEN_RANKS = ("output_dir", "data.root", "data.corrections", "model.weights", "threads")


def of_all_ranks(cfg: Config) -> dict[str, Any]:
    """Return the options that all processes of one start have to share, under their dotted names."""
    return {key: value for key, value in flatten(cfg).items() if key not in MAY_DIFFER_BETWEEN_RANKS}


def recipe(cfg: Config) -> dict[str, Any]:
    """Return the options that decide the result, under their dotted names."""
    return {key: value for key, value in flatten(cfg).items() if not key.startswith(MAY_CHANGE + MAY_CHANGE_ROUNDING)}


def run_yaml(cfg: Config) -> str:
    """Return what a run keeps as its config.yaml."""
    return strict_yaml.dump({name: value for name, value in asdict(cfg).items() if name not in OF_A_START})


def is_run_yaml(content: Any) -> bool:
    """Say whether the content of a YAML file is a run's config, of this version or another: a recipe by hand is not."""
    return isinstance(content, dict) and {"data", "batch", "model", "optim", "seed", "output_dir"} <= content.keys()


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Name the options of both that differ, with both values."""
    differ = [key for key in before if key in after and before[key] != after[key]]
    return [f"{key} was {yaml_value(before[key])}, now {yaml_value(after[key])}" for key in differ]


def listed(changed: Sequence[str]) -> str:
    """Return what `changes` names as one line: another model or data set first, three in all, and how many more."""
    first = sorted(changed, key=lambda line: not line.startswith(("model.name was ", "data.name was ")))
    return "; ".join(first[:3]) + (f" and {len(first) - 3} more" if len(first) > 3 else "")


def lengthened(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options before with the length of those after where that is longer: a finished run may be continued.

    Args:
        before, after: options under their dotted names.
    """
    longer = {}
    for key in ("schedule.epochs", "schedule.steps"):
        old, new = before.get(key), after.get(key)
        if isinstance(old, int | float) and isinstance(new, int | float) and new > old:
            longer[key] = new
    return dict(before) | longer


def not_of(kept: Mapping[str, Any], cfg: Config, fingerprint: Mapping[str, str] | None = None) -> list[str]:
    """Name what a checkpoint was written with and a config has otherwise; a longer schedule is no difference.

    Args:
        kept: options under their dotted names and digests, as the checkpoint's JSON has them; what it lacks is not
            compared.
        cfg: the run's.
        fingerprint: of its data and weights, see checkpoint/fingerprint.py.
    """
    own = json.loads(json.dumps(recipe(cfg))) | dict(fingerprint or {})  # lists and text keys, as JSON has them
    return changes(lengthened(kept, own), own)


def yaml_value(value: Any) -> str:
    """Return a value as one writes it in a YAML file or flag: null, true, 0.1."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def differences(old: Config, new: Config) -> list[str]:
    """Name the options that differ and would change the result, with both values."""
    return changes(recipe(old), recipe(new))
