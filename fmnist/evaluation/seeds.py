"""Runs of one recipe that differ by the seed only, summed up."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fmnist.config.same_run import changes, differences
from fmnist.evaluation.outcome import Outcome

UNFINISHED = "unfinished"


def seed_groups(outcomes: Sequence[Outcome]) -> list[list[int]]:
    """Return the positions of runs that differ by the seed only, for groups of two and more.

    Averaged are finished runs of as many steps, and checkpoints of one step.
    """
    # The same seed twice is two checkpoints of a run, or a copy: not a sample of seeds.
    return [group for group in _same_but_seed(outcomes) if len(group) > 1 and not _repeated(outcomes, group)]


def repeated_seeds(outcomes: Sequence[Outcome]) -> list[str]:
    """Name, a line each, the groups without a mean because a seed is there more than once, among others."""
    return [
        f"No mean of {', '.join(outcomes[i].name for i in group)}: seed {_repeated(outcomes, group)[0]} is there twice."
        for group in _same_but_seed(outcomes)
        if (twice := _repeated(outcomes, group)) and {*twice} != {*_seeds(outcomes, group)}
    ]


def unequal_lengths(outcomes: Sequence[Outcome]) -> list[str]:
    """Name, a line each, the groups of seeds with a run that is in no mean: it is not finished, or not as long."""
    lines, known = [], [*map(_length, outcomes)]
    for group in _same_but_seed(outcomes, of_one_length=False):
        lengths = [known[i] for i in group]
        alone = [length for length in lengths if length.endswith(UNFINISHED) or lengths.count(length) == 1]
        if alone and len({*_seeds(outcomes, group)}) > 1:
            each = ", ".join(f"{outcomes[i].name} ({known[i]})" for i in group)
            lines.append(f"A mean is over finished runs of one length: {each}.")
    return lines


def _same_but_seed(outcomes: Sequence[Outcome], *, of_one_length: bool = True) -> list[list[int]]:
    groups: list[list[int]] = []
    for i, outcome in enumerate(outcomes):
        if outcome.trained is None or (of_one_length and _length(outcome).endswith(UNFINISHED)):
            continue
        for group in groups:
            first = outcomes[group[0]]
            if _differ_by_seed(first, outcome) and (not of_one_length or _length(first) == _length(outcome)):
                group.append(i)
                break
        else:
            groups.append([i])
    return groups


def _length(outcome: Outcome) -> str:
    """Say how far a run is: the steps of a checkpoint or of a finished run, or that it is not finished."""
    if (trained := outcome.trained) is None:
        return ""
    steps = int(trained.checkpoint[-8:]) if trained.checkpoint else trained.summary.get("steps", "unknown")
    finished = trained.checkpoint or trained.summary.get("status") == "finished"
    return f"{steps} steps" if finished else f"{steps} steps, {UNFINISHED}"


def _differ_by_seed(one: Outcome, other: Outcome) -> bool:
    """Say whether two runs have the same options but the seed, and the same data and first weights."""
    first, second = one.trained, other.trained
    assert first is not None and second is not None
    return (
        one.tta == other.tta
        and bool(first.checkpoint) == bool(second.checkpoint)
        and all(line.startswith("seed was ") for line in differences(first.cfg, second.cfg))
        and not changes(first.fingerprint, second.fingerprint)
    )


def _seeds(outcomes: Sequence[Outcome], group: Sequence[int]) -> list[int]:
    return [trained.cfg.seed for i in group if (trained := outcomes[i].trained) is not None]


def _repeated(outcomes: Sequence[Outcome], group: Sequence[int]) -> list[int]:
    seeds = _seeds(outcomes, group)
    return sorted({seed for seed in seeds if seeds.count(seed) > 1})


def seed_rows(
    rows: Sequence[Mapping[str, Any]], outcomes: Sequence[Outcome], results: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return a row for each group of runs that differ by the seed only: means, and the spread of top1.

    Args:
        rows: from `comparison_rows`.
        outcomes, results: what these are of.
    """
    order = sorted(range(len(outcomes)), key=lambda i: -results[i]["top1"])
    row_of = dict(zip(order, rows, strict=True))
    means = []
    for group in seed_groups(outcomes):
        members = [row_of[i] for i in group]
        top1 = [row["top1"] for row in members]
        means.append(
            {
                "run": f"mean of {len(group)} seeds ({', '.join(row['run'] for row in members)})",
                "model": members[0]["model"],
                "top1": statistics.mean(top1),
                "top1_spread": statistics.stdev(top1),
                "top1_range": [min(top1), max(top1)],
                **{
                    key: statistics.mean(row[key] for row in members)
                    for key, value in members[0].items()
                    if isinstance(value, int | float) and key not in ("top1", "chosen", "num_images")
                    if all(row.get(key) is not None for row in members)
                },
            }
        )
    return means
