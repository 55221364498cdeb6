"""Measure the label audit: plant wrong labels, train on them, and count where the audit ranks them.

    python -m experiments.label_audit train FOLDER --seeds 0 1 2     # the MLPs, one after another; again: resumes
    python -m experiments.label_audit train FOLDER --model cnn       # likewise the CNNs
    python -m experiments.label_audit measure FOLDER --seeds 0 1 2   # experiments/results/label_audit.json

2 % of the 60,000 training labels are changed, half of them to a random other class, half to one that is often
confused with the true one (the likely half). Trained on them: a model once a fold of five, and once on 55,000 images.
The MLP also, since somebody looked at the first 2,400 suspects of its folds (here the true labels decide), on the
corrected labels, and on the true ones. What is not finished is left out of the figures.
"""

import argparse
import datetime
import itertools
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmnist.apps.api import RunResults, train
from fmnist.apps.audit.audit import rank_labels
from fmnist.apps.audit.pool import Pool, gather
from fmnist.apps.audit.table import HEADER, Suspects
from fmnist.data.fashion_mnist import CLASS_NAMES, load
from fmnist.data.find import locate
from fmnist.runtime.console import log_to_console, one_line_errors
from fmnist.runtime.files import csv_bytes, write_atomic
from fmnist.runtime.provenance import git_revision, versions
from fmnist.trained import open_trained

RESULT = Path(__file__).parent / "results" / "label_audit.json"
SHARE, FOLDS, DECIDED = 0.02, 5, 2400
CHOSEN_ON = 0  # the seed that the ranking's two numbers were chosen on; the others confirm them
# Recipes and epochs; the CNN at 28 px throughout (experiments/LOG.md).
RECIPES = {"mlp": ("experiments/recipes/mlp_adamw.yaml", 10), "cnn": ("experiments/recipes/cnn_8_epochs.yaml", 5)}
# A class that each is often taken for: by an MLP's validation images the most frequent one, but for Dress and Bag.
LIKELY = torch.tensor([6, 3, 4, 6, 2, 7, 0, 9, 6, 7])


def plant(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Change a share of the labels.

    Args:
        labels: int64 [N], the true ones.
        seed: which are changed, and to what.

    Returns:
        int64 [N] labels, and int64 [N]: 0 as it was, 1 changed to a random class, 2 to the likely one.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[: round(SHARE * len(labels))]
    random, likely = chosen.chunk(2)
    noisy, kind = labels.clone(), torch.zeros_like(labels)
    noisy[random] = (labels[random] + torch.randint(1, 10, random.shape, generator=generator)) % 10
    noisy[likely] = LIKELY[labels[likely]]
    kind[random], kind[likely] = 1, 2
    return noisy, kind


def write_noisy(folder: Path, labels: Tensor) -> Path:
    """Write the published images with these training labels, once."""
    if not (folder / "train-labels-idx1-ubyte").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(locate().glob("*-ubyte*")):
            if not path.name.startswith("train-labels"):
                shutil.copyfile(path, folder / path.name)
        header = struct.pack(">II", 0x801, len(labels))
        (folder / "train-labels-idx1-ubyte").write_bytes(header + labels.byte().numpy().tobytes())
    return folder


def run(directory: Path, root: Path | None, seed: int, model: str, **data: Any) -> RunResults:
    """Train one run, or resume it; a finished one is only opened."""
    options: dict[str, Any] = {"data.root": str(root)} if root else {}
    options |= {f"data.{name}": value for name, value in data.items()}
    recipe, epochs = RECIPES[model]
    return train(
        recipe,
        output_dir=str(directory),
        seed=seed,
        threads=1,
        **{"schedule.epochs": epochs, "log.wandb": "disabled", "evaluation.test": "folds" not in data},
        **options,
    )


def noisy_run(folder: Path, seed: int, model: str, fold: int | None = None) -> Path:
    """Train on planted labels, all images or all but a fold."""
    root = write_noisy(folder / f"noisy{seed}", plant(load("train")[1], seed)[0])
    directory = folder / (f"{model}_noisy{seed}" + ("" if fold is None else f"_fold{fold}"))
    run(directory, root, seed, model, **({} if fold is None else {"folds": FOLDS, "fold": fold}))
    return directory


def noisy_folds(folder: Path, seed: int, model: str) -> list[Path]:
    """Train one run a fold on planted labels."""
    return [noisy_run(folder, seed, model, fold) for fold in range(FOLDS)]


def audited_run(folder: Path, seed: int) -> RunResults:
    """Train the MLP on the planted labels after an oracle looked at the first suspects of its folds."""
    true = load("train")[1]
    file = folder / f"oracle{seed}.csv"
    if not file.exists():  # once: a run stands by its decisions
        suspects, pool = ranked(noisy_folds(folder, seed, "mlp"))
        rows = [
            (
                *(rank, "train", position, CLASS_NAMES[pool.labels[position]], CLASS_NAMES[true[position]], ""),
                "keep" if pool.labels[position] == true[position] else "relabel",
            )
            for rank, position in enumerate(suspects.order[:DECIDED].tolist(), 1)
        ]
        write_atomic(file, csv_bytes(HEADER, rows))
    return run(folder / f"mlp_audited{seed}", folder / f"noisy{seed}", seed, "mlp", corrections=str(file))


def ranked(directories: list[Path], **options: Any) -> tuple[Suspects, Pool]:
    """Rank as `fmnist audit` does."""
    runs = [open_trained(directory) for directory in directories]
    pool = gather(runs, None)
    return rank(pool, **options), pool


def rank(pool: Pool, **options: Any) -> Suspects:
    return rank_labels(pool.probabilities, pool.labels, pool.images, pool.features, torch.device("cpu"), **options)


def found(order: Tensor, kind: Tensor) -> dict[str, float]:
    """Return the share of each half among the first suspects, and the average precision of both together."""
    hits = (kind[order] > 0).double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    shares = {
        f"{name}_in_first_{count}": float((kind[order[:count]] == half).sum() / (kind == half).sum())
        for half, name in ((1, "random"), (2, "likely"))
        for count in (1200, 2400)
    }
    return shares | {"average_precision": float((precision * hits).sum() / hits.sum())}


def groups(folder: Path, seed: int) -> dict[str, list[Path]]:
    """Return the runs that are audited together; neighbours are searched in the features of the first."""
    single = {model: [folder / f"{model}_noisy{seed}"] for model in RECIPES}
    folds = {model: [folder / f"{model}_noisy{seed}_fold{fold}" for fold in range(FOLDS)] for model in RECIPES}
    return {
        "one MLP run": single["mlp"],
        "five MLP folds": folds["mlp"],
        "one CNN run": single["cnn"],
        "five CNN folds": folds["cnn"],
        "five CNN and five MLP folds": folds["cnn"] + folds["mlp"],
    }


def finished(directory: Path) -> bool:
    return (directory / "summary.json").exists() and RunResults(directory).summary.get("status") == "finished"


def measure(folder: Path, seeds: list[int], before: dict[str, Any]) -> dict[str, Any]:
    """Measure what is finished of these seeds; the figures of others stay as they were before."""
    by_seed: dict[str, dict[str, dict[str, dict[str, float]]]] = before.get("by_seed", {})
    tried: dict[str, dict[str, float]] = before.get("tried", {})
    for seed in seeds:
        kind = plant(load("train")[1], seed)[1]
        for name, directories in groups(folder, seed).items():
            if not all(map(finished, directories)):
                continue
            suspects, pool = ranked(directories)
            orders = {
                "in use": suspects.order,
                "log-ratio without neighbours": rank(pool, weight=0).order,
                "own probability": suspects.own.argsort(stable=True),
            }
            for ranking, order in orders.items():
                by_seed.setdefault(name, {}).setdefault(ranking, {})[str(seed)] = found(order, kind)
            if name == "five CNN folds" and seed == CHOSEN_ON:
                for voters, weight in itertools.product((5, 10, 20), (0.25, 0.5, 1.0)):
                    order = rank(pool, voters=voters, weight=weight).order
                    tried[f"{voters} voters, weight {weight}"] = found(order, kind)
    seeds = sorted({int(seed) for of in by_seed.values() for each in of.values() for seed in each})
    return {
        "name": "label_audit",
        "command": f"python -m experiments.label_audit measure FOLDER --seeds {' '.join(map(str, seeds))}",
        "date": datetime.date.today().isoformat(),
        "hardware": "2-core CPU, shared with other work; one thread a run",
        "versions": versions(),
        "git_revision": git_revision(),
        "planted": {"share": SHARE, "images": 60_000, "random": 600, "likely": 600},
        "ranking_chosen_on_seed": CHOSEN_ON,
        "confirmed_on_seeds": {
            name: [int(seed) for seed in of["in use"] if int(seed) != CHOSEN_ON] for name, of in by_seed.items()
        },
        "means": {
            name: {ranking: mean(list(each.values())) for ranking, each in of.items()} for name, of in by_seed.items()
        },
        "by_seed": by_seed,
        "tried": tried,
        "test_top1": {name: accuracies(folder, name, seeds) for name in ("noisy", "audited", "clean")},
        "decided": DECIDED,
        "relabelled": [relabelled(folder / f"oracle{seed}.csv") for seed in seeds],
    }


def mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def accuracies(folder: Path, labels: str, seeds: list[int]) -> list[float]:
    runs = [folder / f"mlp_{labels}{seed}" for seed in seeds]
    return [RunResults(directory).summary["test.top1"] for directory in runs if finished(directory)]


def relabelled(file: Path) -> int:
    return file.read_text().count(",relabel\n") if file.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "measure"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=tuple(RECIPES), default="mlp", help="to train (default: mlp)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    log_to_console()
    with one_line_errors("experiments/label_audit.py"):
        if args.command == "measure":
            before = json.loads(RESULT.read_text()) if RESULT.exists() else {}
            result = json.dumps(measure(args.folder, args.seeds, before), indent=2) + "\n"
            write_atomic(RESULT, result)
            print(result)
            return
        for seed in args.seeds:
            noisy_folds(args.folder, seed, args.model)
            noisy_run(args.folder, seed, args.model)
            if args.model == "mlp":
                run(args.folder / f"mlp_clean{seed}", None, seed, "mlp")
                audited_run(args.folder, seed)


if __name__ == "__main__":
    main()
