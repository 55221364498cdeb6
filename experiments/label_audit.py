"""Measure the label audit: plant wrong labels, train on them, and count where the audit ranks them.

    python -m experiments.label_audit train  FOLDER --seeds 0 1 2    # the runs, one after another; again: resumes
    python -m experiments.label_audit measure FOLDER --seeds 0 1 2   # experiments/results/label_audit.json

2 % of the 60,000 training labels are changed, half of them to a random other class, half to one that is often
confused with the true one (the likely half). Trained on them: the MLP, once on 55,000 images and once a fold of five;
then, since somebody looked at the first 2,400 suspects of the folds (here the true labels decide), on the corrected
labels, and on the true ones.
"""

import argparse
import datetime
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
SHARE, FOLDS, EPOCHS, DECIDED = 0.02, 5, 10, 2400
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


def run(directory: Path, root: Path | None, seed: int, config: str, epochs: int, **data: Any) -> RunResults:
    """Train one run, or resume it; a finished one is only opened."""
    options: dict[str, Any] = {"data.root": str(root)} if root else {}
    options |= {f"data.{name}": value for name, value in data.items()}
    sizes = {"augment.size": 28} if config == "cnn" else {}
    return train(
        f"configs/{config}.yaml",
        output_dir=str(directory),
        seed=seed,
        threads=1,
        **{"schedule.epochs": epochs, "log.wandb": "disabled", "evaluation.test": "folds" not in data},
        **sizes,
        **options,
    )


def noisy_runs(folder: Path, seed: int, config: str = "mlp", epochs: int = EPOCHS) -> tuple[Path, list[Path]]:
    """Train on planted labels: one run, and one a fold."""
    root = write_noisy(folder / f"noisy{seed}", plant(load("train")[1], seed)[0])
    single = folder / f"{config}_noisy{seed}"
    if config == "mlp":
        run(single, root, seed, config, epochs)
    folds = [folder / f"{config}_noisy{seed}_fold{fold}" for fold in range(FOLDS)]
    for fold, directory in enumerate(folds):
        run(directory, root, seed, config, epochs, folds=FOLDS, fold=fold)
    return single, folds


def audited_run(folder: Path, seed: int) -> RunResults:
    """Train on the planted labels after an oracle looked at the first suspects of the folds."""
    true = load("train")[1]
    single, folds = noisy_runs(folder, seed)
    suspects, pool = ranked(folds)
    rows = [
        (
            *(rank, "train", position, CLASS_NAMES[pool.labels[position]], CLASS_NAMES[true[position]], ""),
            "keep" if pool.labels[position] == true[position] else "relabel",
        )
        for rank, position in enumerate(suspects.order[:DECIDED].tolist(), 1)
    ]
    file = folder / f"oracle{seed}.csv"
    write_atomic(file, csv_bytes(HEADER, rows))
    directory = single.with_name(single.name.replace("noisy", "audited"))
    return run(directory, folder / f"noisy{seed}", seed, "mlp", EPOCHS, corrections=str(file))


def ranked(directories: list[Path]) -> tuple[Suspects, Pool]:
    """Rank as `fmnist audit` does."""
    pool = gather([open_trained(directory) for directory in directories], None)
    return rank_labels(pool.probabilities, pool.labels), pool


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


def orders(pool: Pool, suspects: Suspects) -> dict[str, Tensor]:
    """Return the ranking in use, and others on the same probabilities."""
    own = suspects.own
    threshold = torch.zeros(10, dtype=own.dtype).index_add(0, pool.labels, own) / pool.labels.bincount()
    return {
        "log-ratio (in use)": suspects.order,
        "own probability": own.argsort(stable=True),
        "log-ratio, corrected by class": rank_labels(pool.probabilities / threshold, pool.labels).order,
    }


def measure(folder: Path, seeds: list[int]) -> dict[str, Any]:
    """Measure rankings and accuracies; runs that are missing are trained."""
    rankings: dict[str, dict[str, list[dict[str, float]]]] = {}
    accuracy: dict[str, list[float]] = {"noisy": [], "audited": [], "clean": []}
    for seed in seeds:
        kind = plant(load("train")[1], seed)[1]
        single, folds = noisy_runs(folder, seed)
        for name, directories in (("one MLP run", [single]), ("five MLP folds", folds)):
            suspects, pool = ranked(directories)
            for ranking, order in orders(pool, suspects).items():
                rankings.setdefault(name, {}).setdefault(ranking, []).append(found(order, kind))
        for name in accuracy:
            accuracy[name].append(RunResults(folder / f"mlp_{name}{seed}").summary["test.top1"])
    means = {
        name: {
            ranking: {key: sum(one[key] for one in each) / len(each) for key in each[0]} for ranking, each in of.items()
        }
        for name, of in rankings.items()
    }
    return {
        "name": "label_audit",
        "command": f"python -m experiments.label_audit measure FOLDER --seeds {' '.join(map(str, seeds))}",
        "date": datetime.date.today().isoformat(),
        "hardware": "2-core CPU, shared with other work; one thread a run",
        "versions": versions(),
        "git_revision": git_revision(),
        "planted": {"share": SHARE, "images": 60_000, "random": 600, "likely": 600},
        "seeds": seeds,
        "means": means,
        "by_seed": rankings,
        "test_top1": accuracy,
        "decided": DECIDED,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "measure"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    log_to_console()
    with one_line_errors("experiments/label_audit.py"):
        for seed in args.seeds:
            run(args.folder / f"mlp_clean{seed}", None, seed, "mlp", EPOCHS)
            audited_run(args.folder, seed)
        if args.command == "measure":
            result = json.dumps(measure(args.folder, args.seeds), indent=2) + "\n"
            write_atomic(RESULT, result)
            print(result)


if __name__ == "__main__":
    main()
