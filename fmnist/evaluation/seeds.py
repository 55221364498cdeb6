"""Runs of one recipe that differ by the seed only, summed up."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fmnist.config.same_run import changes, differences
from fmnist.evaluation.outcome import Outcome


def seed_groups(outcomes: Sequence[Outcome]) -> list[list[int]]:
    """Return the positions of runs that differ by the seed only, for groups of two and more."""
    # The same seed twice is two checkpoints of a run, or a copy: not a sample of seeds.
    return [group for group in _same_but_seed(outcomes) if len(group) > 1 and not _repeated(outcomes, group)]


def repeated_seeds(outcomes: Sequence[Outcome]) -> list[str]:
    """Name, a line each, the groups without a mean because a seed is there more than once, among others."""
    return [
        f"No mean of {', '.join(outcomes[i].name for i in group)}: seed {_repeated(outcomes, group)[0]} is there twice."
        for group in _same_but_seed(outcomes)
        if (twice := _repeated(outcomes, group)) and {*twice} != {*_seeds(outcomes, group)}
    ]


def _same_but_seed(outcomes: Sequence[Outcome]) -> list[list[int]]:
    groups: list[list[int]] = []
    for i, outcome in enumerate(outcomes):
        if outcome.trained is None:
            continue
        for group in groups:
            if _differ_by_seed(outcomes[group[0]], outcome):
                group.append(i)
                break
        else:
            groups.append([i])
    return groups


def _differ_by_seed(one: Outcome, other: Outcome) -> bool:
    """Say whether two runs have the same options but the seed, the same data and first weights, and are as far."""
    first, second = one.trained, other.trained
    assert first is not None and second is not None
    return (
        one.tta == other.tta
        and first.checkpoint == second.checkpoint
        and first.summary.get("status") == second.summary.get("status")
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
