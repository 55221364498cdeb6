"""report.html: one evaluation as one offline page, with its figures and pictures inside."""

import datetime
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fmnist.config.schema import to_yaml
from fmnist.evaluation.exact_copies import copies_line
from fmnist.evaluation.findings import NUM_SHOWN, Findings
from fmnist.evaluation.misclassified import Misclassified, worst_by_f1
from fmnist.evaluation.numbers import confusion_of
from fmnist.evaluation.outcome import Outcome
from fmnist.evaluation.risk_coverage import MAX_ERRORS, least_answers
from fmnist.report.curves import loss_note
from fmnist.report.figures import MOST_CLASSES, OTHERS
from fmnist.report.matrix import MOST_WHOLE, cell_images, matrix_rows
from fmnist.report.overlay import LEGEND, overlay
from fmnist.report.page_figures import data_uri, learning_curves, picture, reliability, risk_against_coverage
from fmnist.runtime.files import write_atomic
from fmnist.tracking.metrics_file import METRICS_FILE

# People without fashion expertise, 1,000 test images, majority of three labels: the data set's own benchmark table.
HUMAN_TOP1 = 0.835
NUM_PAIRS, PICTURES_OF_A_PAIR = 4, 8


def _pairs(findings: Findings) -> list[dict[str, Any]]:
    outcome, errors = findings.outcome, findings.errors
    shown = []
    for a, b, forth, back in findings.pairs[:NUM_PAIRS]:
        ways = []
        for label, prediction, count in ((a, b, forth), (b, a, back)):
            names = outcome.class_names[label], outcome.class_names[prediction]
            of_way = [error for error in errors if (error.label, error.prediction) == names]
            pictures = [_shown(outcome, error) for error in of_way[:PICTURES_OF_A_PAIR]]
            ways.append({"label": names[0], "prediction": names[1], "count": count, "errors": pictures})
        names = outcome.class_names[a], outcome.class_names[b]
        shown.append({"names": names, "count": forth + back, "share": (forth + back) / len(errors), "ways": ways})
    return shown


def _shown(outcome: Outcome, error: Misclassified) -> dict[str, Any]:
    image = outcome.images[error.position]
    height, width = image.shape[-2:]
    return {"error": error, "uri": picture(image), "width": width, "height": height}


def _maps(findings: Findings) -> list[tuple[str, float] | None]:
    """Return, for each error on the page, the URI of its map and the largest drop; None where none was made."""
    outcome, shown = findings.outcome, findings.errors[:NUM_SHOWN]
    made = [
        (picture(overlay(outcome.images[error.position], drops)), max(0.0, float(drops.max())))
        for error, drops in zip(shown, findings.maps, strict=False)
    ]
    return [*made, *[None] * (len(shown) - len(made))]


def place_on_scale(top1: float, interval: Sequence[float], human: float | None) -> dict[str, Any]:
    """Positions, in percent of its width, on the scale under the headline."""
    lowest = min([interval[0], *([human] if human else [])])
    start = max(0.0, math.floor(20 * lowest - 0.5) / 20)  # a multiple of 5 %, with room to its right
    every = next(every for every in (5, 10, 20) if 100 * (1 - start) <= 6 * every)  # percent, so that they stay apart
    ticks = [tick / 100 for tick in range(0, 101, every) if tick > round(100 * start) - every]
    start = ticks[0]

    def place(value: float) -> float:
        return 100 * (value - start) / (1 - start)

    return {
        "ticks": [(place(tick), tick) for tick in ticks],
        "low": place(interval[0]),
        "high": place(interval[1]),
        "top1": place(top1),
        "human": place(human) if human else None,
    }


def context(findings: Findings) -> dict[str, Any]:
    """Collect what the template shows."""
    outcome, metrics = findings.outcome, findings.metrics
    trained = outcome.trained
    lines = trained.directory / METRICS_FILE if trained else None
    batch = trained.directory / "train_batch.png" if trained else None
    shown = findings.errors[:NUM_SHOWN]
    human = HUMAN_TOP1 if outcome.info.is_fashion_mnist and not outcome.other_data else None
    many = len(outcome.class_names) > MOST_CLASSES
    matrix, worst_pairs = matrix_rows(confusion_of(metrics), outcome.class_names), findings.pairs[:MOST_CLASSES]
    opened = [(cell["label"], cell["prediction"]) for row in matrix for cell in row["cells"]]
    opened += [pair for a, b, _, _ in worst_pairs for pair in ((a, b), (b, a))]
    return {
        "outcome": outcome,
        "result": metrics,
        "human": human,
        "strip": place_on_scale(metrics["top1"], metrics["top1_interval"], human),
        "num_errors": len(findings.errors),
        "curves": learning_curves(lines) if lines is not None and lines.is_file() else [],
        "loss_note": loss_note(trained.cfg) if trained else "",
        "train_batch": data_uri(batch.read_bytes(), "image/png") if batch is not None and batch.is_file() else None,
        "matrix": matrix,
        "cell_images": cell_images(outcome, opened),
        "class_names": outcome.class_names,
        "others": OTHERS if len(outcome.class_names) > MOST_WHOLE else "",
        "worst": worst_by_f1(metrics["per_class"]) if many else {},
        "worst_pairs": worst_pairs if many else [],
        "copies": copies_line(metrics["duplicates"]) if metrics["duplicates"] else "",
        "pairs": _pairs(findings),
        "errors": [
            _shown(outcome, error) | {"nearest": [(each, picture(each.image)) for each in near], "why": why}
            for error, near, why in zip(shown, findings.nearest or [[]] * len(shown), _maps(findings), strict=True)
        ],
        "num_maps": len(findings.maps),
        "map_ms": 1000 * findings.map_seconds,
        "legend": LEGEND,
        "automatic": metrics["trust"] is not None
        and any(row["threshold"] is not None for row in metrics["trust"]["automation"]),
        "least_answers": least_answers(max(MAX_ERRORS)),
        "risk": risk_against_coverage(findings.risk) if findings.risk else None,
        "before": reliability(findings.bins),
        "after": reliability(findings.scaled_bins) if findings.scaled_bins else None,
        "retrieval": metrics["retrieval"],
        "config": to_yaml(trained.cfg) if trained else None,
        "summary": trained.summary if trained else {},
        "date": datetime.date.today().isoformat(),
    }


def render(values: dict[str, Any], template: str = "report.html") -> str:
    """Fill a template; every value is escaped."""
    loader = PackageLoader("fmnist.report", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda value, digits=2: "-" if value is None else f"{100 * value:.{digits}f}"
    environment.filters["chance"] = lambda value: f"{100 * value:.2g}" if value < 0.1 else f"{100 * value:.0f}"
    environment.filters["comma"] = lambda value: f"{value:,.0f}"
    environment.filters["ms"] = lambda value: f"{value:.3g}" if value < 100 else f"{value:,.0f}"
    return environment.get_template(template).render(values)


def write_html(findings: Findings, path: Path) -> None:
    """Write report.html."""
    write_atomic(path, render(context(findings)))
