"""Write every file of one evaluation: metrics, tables, figures, report.html, and W&B's copy. Runs no model."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fmnist.config.schema import flatten
from fmnist.evaluation.exact_copies import copies_line
from fmnist.evaluation.findings import Findings
from fmnist.evaluation.misclassified import worst_by_f1
from fmnist.evaluation.numbers import RATIOS, confusion_of
from fmnist.report.curves import loss_note, plot_learning_curves
from fmnist.report.figures import MOST_CLASSES, plot_confusion_matrix, plot_reliability
from fmnist.report.page import write_html
from fmnist.report.retrieval_table import precision_line
from fmnist.runtime.console import MAX_ERROR, counted, one_line
from fmnist.runtime.files import csv_bytes, read_json, write_atomic
from fmnist.tracking.metrics_file import METRICS_FILE
from fmnist.tracking.wandb_run import log_evaluation

logger = logging.getLogger("fmnist")
METRICS, PAGE = "metrics.json", "report.html"
FILES = (METRICS, PAGE, "report.txt", "predictions.csv", "confusion_matrix.png", "reliability.png")
SUBSETS = {
    "all": "all images, without flip averaging",
    "flip_averaging": "all images, with flip averaging",
    "without_near_copies": "without near copies of training images (correlation > {correlation})",
    "without_similar": "without similar ones too (correlation > {correlation})",
    "without_exact_copies": "without exact copies of training images",
}

BESIDE_TOP1 = {"macro_f1": "macro F1", "balanced_accuracy": "balanced accuracy", "top5": "top5"}


def write_evaluation(findings: Findings) -> None:
    """Write metrics.json, report.txt, predictions.csv and the figures; of a complete evaluation also report.html.

    Args:
        findings: what was computed; `findings.outcome.directory` is made, files of the same names are replaced. Where
            a complete evaluation with the same results lies there, a quick one leaves it as it is.
    """
    outcome, metrics = findings.outcome, findings.metrics
    directory, names = outcome.directory, outcome.class_names
    if not findings.complete and (directory / PAGE).is_file():
        if _has_these_results(directory, metrics):
            logger.info("%s holds a full evaluation with the same results, which is kept", directory)
            return
        logger.warning("%s is removed: it is of other results; without --quick it is written again", directory / PAGE)
    # First: a directory with a metrics.json is a complete one, and nothing in it is of another evaluation.
    for name in (METRICS, PAGE):
        (directory / name).unlink(missing_ok=True)
    write_atomic(directory / "report.txt", report_text(findings))
    write_atomic(directory / "predictions.csv", predictions_csv(findings))
    plot_confusion_matrix(confusion_of(metrics), names, outcome.title, directory / "confusion_matrix.png")
    plot_reliability(findings.bins, metrics["ece"], outcome.title, directory / "reliability.png")
    trained = outcome.trained
    inside = trained is not None and directory.resolve().is_relative_to(trained.directory.resolve())
    if trained is not None and inside and (lines := trained.directory / METRICS_FILE).is_file():
        note = loss_note(trained.cfg)
        plot_learning_curves(lines, trained.directory / "learning_curves.png", outcome.name, note)
    if findings.complete:
        write_html(findings, directory / PAGE)
    indent = 2 if len(names) <= MOST_CLASSES else None  # a line a number would be a million lines for 1,000 classes
    write_atomic(directory / METRICS, json.dumps(metrics, indent=indent, allow_nan=False) + "\n")
    if findings.complete and inside and trained is not None and not trained.checkpoint:
        _log_to_wandb(findings)


def _has_these_results(directory: Path, metrics: Mapping[str, Any]) -> bool:
    """Say whether all files of an evaluation lie there, of the same images and weights, with the same results."""
    if not all((directory / name).is_file() for name in FILES):
        return False
    try:
        kept = read_json(directory / METRICS)
    except ValueError:
        return False
    same = all(kept.get(key) == metrics.get(key) for key in ("data", "confusion_matrix", "confusion_cells"))
    same &= all(kept.get(key, metrics[key]) == metrics[key] for key in ("weights_sha256", "tta"))  # not in older ones
    return same and isinstance(kept.get("loss"), float) and abs(kept["loss"] - metrics["loss"]) < 1e-6


def report_text(findings: Findings) -> str:
    """Return report.txt: the headline, the classification report, and what else is known."""
    outcome, metrics = findings.outcome, findings.metrics
    low, high = metrics["top1_interval"]
    headline = (
        f"{outcome.title}: top1 {100 * metrics['top1']:.2f} % (95 % interval {100 * low:.2f} to {100 * high:.2f}), "
        f"loss {metrics['loss']:.4f}, ECE {metrics['ece']:.4f}, {metrics['num_images']:,} images"
    )
    more = ", ".join(f"{words} {100 * metrics[key]:.2f} %" for key, words in BESIDE_TOP1.items() if key in metrics)
    data = f"images: {outcome.data}, sha256 {outcome.data_sha256}\n" if outcome.data_sha256 else ""
    table = class_table(metrics)
    if len(outcome.class_names) > MOST_CLASSES and findings.pairs:
        table += pair_table(findings)
    notes = _notes(metrics) if findings.complete else ""
    return f"{headline}\n{more}\n{data}\n{table}" + (f"\n{notes}\n" if notes else "")


def class_table(metrics: Mapping[str, Any]) -> str:
    """Lay precision, recall and F1 out as scikit-learn's classification_report does; "-" for a class without images.

    Of more than MOST_CLASSES the worst by F1 are listed, the worst first.
    """
    macro, per_class = metrics["macro_avg"], metrics["per_class"]
    shown = per_class if len(per_class) <= MOST_CLASSES else worst_by_f1(per_class)
    weights = {name: row["support"] / metrics["num_images"] for name, row in per_class.items() if row["support"]}
    weighted = {key: sum(weight * per_class[name][key] for name, weight in weights.items()) for key in RATIOS}
    names = {name: one_line(name, MAX_ERROR) for name in shown}
    width = max(12, *map(len, names.values()))
    total = {"support": metrics["num_images"]}

    def line(name: str, row: Mapping[str, Any]) -> str:
        cells = ["" if key not in row else "-" if row[key] is None else f"{row[key]:.4f}" for key in RATIOS]
        return f"{name:>{width}} " + "".join(f"{cell:>10}" for cell in (*cells, row["support"]))

    lines = [" " * (width + 1) + "".join(f"{head:>10}" for head in ("precision", "recall", "f1-score", "support")), ""]
    lines += [line(names[name], row) for name, row in shown.items()]
    if len(shown) < len(per_class):
        lines += ["", f"the {len(shown)} of {len(per_class):,} classes with the lowest F1; metrics.json holds all"]
    lines += ["", line("accuracy", {"f1": metrics["top1"]} | total)]
    lines += [line("macro avg", macro | total), line("weighted avg", weighted | total)]
    if macro["num_classes"] < len(per_class):
        lines.append(f"\nmacro avg: over the {macro['num_classes']} of {len(per_class)} classes that have images")
    return "\n".join(lines) + "\n"


def pair_table(findings: Findings) -> str:
    """List the classes that are taken for each other most, in place of a confusion matrix that nobody can read."""
    names, pairs = findings.outcome.class_names, findings.pairs[:MOST_CLASSES]
    lines = ["", f"the {len(pairs)} most confused of {counted(len(findings.pairs), 'pair')} of classes", ""]
    for a, b, forth, back in pairs:
        first, second = (one_line(names[label], MAX_ERROR) for label in (a, b))
        lines.append(f"{forth + back:>7,}  {first} taken for {second}: {forth:,}; the reverse: {back:,}")
    return "\n".join(lines) + "\n"


def _notes(metrics: Mapping[str, Any]) -> str:
    """Return the last lines of report.txt: accuracy on subsets, calibration, precision of the neighbours."""
    lines = []
    for key, entry in metrics["subsets"].items():
        low, high = (100 * bound for bound in entry["top1_interval"])
        text = SUBSETS[key].format(**entry)
        lines.append(f"{text:<68} {entry['num_images']:>7,} {100 * entry['top1']:6.2f} % ({low:.2f} to {high:.2f})")
    if (calibration := metrics["calibration"]) is None:
        lines.append("\nno validation images: no temperature is fitted")
    elif calibration["why_not"]:
        lines.append(f"\n{calibration['why_not']}")
    else:
        these = calibration["same_images"]
        lines.append(
            f"\ntemperature {calibration['temperature']:.3f}, fitted on "
            f"{'these ' * these}{calibration['num_images']:,} validation images{' themselves' * these}: "
            f"ECE {calibration['ece_before']:.4f} -> {calibration['ece_after']:.4f}, "
            f"loss {calibration['loss_before']:.4f} -> {calibration['loss_after']:.4f}"
        )
    if metrics["duplicates"]:
        lines.append("\n" + copies_line(metrics["duplicates"]))
    if metrics["retrieval"] is not None:
        lines.append("\n" + precision_line(metrics["retrieval"]))
    return "\n".join(lines)


def predictions_csv(findings: Findings) -> bytes:
    """Return one line per image: index, label, prediction, confidence, and the probability of each class.

    Of a folder of pictures also the file, in the last column.
    """
    outcome = findings.outcome
    predictions = outcome.logits.argmax(dim=1).tolist()
    probabilities = outcome.logits.double().softmax(dim=1).float().tolist()
    rows: list[list[object]] = []
    for index, label, prediction, row in zip(
        outcome.indices, outcome.labels.tolist(), predictions, probabilities, strict=True
    ):
        cells = [f"{p:.9g}" for p in row]  # nine digits give a float32 back unchanged
        rows.append([index, label, prediction, cells[prediction], *cells, *outcome.files[len(rows) :][:1]])
    header = ["index", "label", "prediction", "confidence", *(f"p_{name}" for name in outcome.class_names)]
    header += ["file"] if outcome.files else []
    return csv_bytes(header, rows)


def _log_to_wandb(findings: Findings) -> None:
    outcome, metrics = findings.outcome, findings.metrics
    trained = outcome.trained
    assert trained is not None
    files = [outcome.directory / f"{name}.png" for name in ("confusion_matrix", "reliability")]
    files.append(trained.directory / "learning_curves.png")
    scalars = {key: metrics[key] for key in ("top1", *BESIDE_TOP1, "loss", "ece") if key in metrics}
    scalars |= {f"subsets.{key}": entry["top1"] for key, entry in metrics["subsets"].items()}
    if (retrieval := metrics["retrieval"]) is not None:
        scalars[f"precision_at_{retrieval['k']}"] = retrieval["features"]["mean"]
    log_evaluation(
        trained.directory,
        trained.cfg.log,
        flatten(trained.cfg),
        prefix=f"evaluation/{outcome.directory.name}",
        scalars=scalars,
        files=[file for file in files if file.is_file()],
        errors=[error.row(outcome) for error in findings.errors[:200]],
    )
