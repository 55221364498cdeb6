"""Write every file of one evaluation: metrics, tables, figures, report.html, and W&B's copy."""

from __future__ import annotations

from typing import Any

import torch

from fmnist.apps.search.retrieval import precision_line
from fmnist.config.schema import flatten
from fmnist.data.fashion_mnist import CLASS_NAMES
from fmnist.evaluation.calibration import calibrate
from fmnist.evaluation.honest import honest_sets, notes
from fmnist.evaluation.near_copies import NearCopies
from fmnist.evaluation.outcome import Outcome
from fmnist.report.figures import plot_learning_curves
from fmnist.report.page import confident_errors, write_html
from fmnist.report.write import write_evaluation
from fmnist.tracking.tracker import METRICS_FILE
from fmnist.tracking.wandb_run import log_evaluation


def write_outcome(
    outcome: Outcome, copies: NearCopies | None, retrieval: dict[str, Any] | None = None, *, quick: bool
) -> dict[str, Any]:
    """Write every file of one evaluation; the main process's job.

    Args:
        outcome: what to write; `outcome.directory` is made.
        copies: the near copies among its images.
        retrieval: what `measure_precision` gave; none where it was not measured.
        quick: metrics and figures only.

    Returns:
        What metrics.json holds.
    """
    arrays = outcome.logits, outcome.labels, torch.arange(len(outcome.labels))
    if quick:
        result = write_evaluation(outcome.directory, *arrays, CLASS_NAMES, title=outcome.title)
        plot_curves(outcome)
        return result
    honest, calibration = honest_sets(outcome.by_tta, outcome.labels, copies), None
    if outcome.validation is not None:
        same = outcome.split == "val"
        calibration = calibrate(outcome.logits, outcome.labels, outcome.validation, same_images=same)
    more = {
        "honest": honest,
        "calibration": calibration and calibration.as_dict(),
        "cost": outcome.cost and outcome.cost.as_dict(),
        "retrieval": retrieval,
    }
    text = notes(honest, calibration)
    if retrieval is not None:
        text += "\n\n" + precision_line(retrieval)
    result = write_evaluation(outcome.directory, *arrays, CLASS_NAMES, title=outcome.title, more=more, notes=text)
    plot_curves(outcome)

    write_html(outcome, result, outcome.directory / "report.html")
    trained = outcome.trained
    if trained is not None and not trained.checkpoint:
        files = [outcome.directory / f"{name}.png" for name in ("confusion_matrix", "reliability")]
        files.append(trained.directory / "learning_curves.png")
        scalars = {"top1": result["top1"], "loss": result["loss"], "ece": result["ece"]}
        scalars |= {f"honest.{key}": entry["top1"] for key, entry in honest.items()}
        if retrieval is not None:
            scalars[f"precision_at_{retrieval['k']}"] = retrieval["features"]["mean"]
        log_evaluation(
            trained.directory,
            trained.cfg.log,
            flatten(trained.cfg),
            prefix=f"evaluation/{outcome.split}",
            scalars=scalars,
            files=[file for file in files if file.is_file()],
            errors=[error.row(outcome) for error in confident_errors(outcome, 200)],
        )
    return result


def plot_curves(outcome: Outcome) -> None:
    """Draw a run's learning curves into its directory, where it has any."""
    if outcome.trained is not None and (metrics := outcome.trained.directory / METRICS_FILE).is_file():
        plot_learning_curves(metrics, outcome.trained.directory / "learning_curves.png", outcome.name)
