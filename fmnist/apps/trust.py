"""Which classes may be right, and which answers need no person, by thresholds from the run's validation images."""

from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor

from fmnist.evaluation.conformal import class_thresholds, least_images, prediction_sets
from fmnist.evaluation.features import features_of
from fmnist.evaluation.risk_coverage import confidence_threshold, least_answers
from fmnist.runtime.console import MAX_ERROR, counted, one_line
from fmnist.trained import Trained

NAMED = 3  # classes with too few validation images that are named
BETWEEN = " | "  # the classes of a set
PERSON, AUTOMATIC = "person", "automatic"
RANGES = {"coverage": (0.01, 0.9999), "max_error": (0.0001, 0.5)}  # of what may be asked for


@dataclass(kw_only=True)
class Trust:
    """Thresholds from validation images, and what they gave so far.

    Attributes:
        class_names: in the order of the logits.
        coverage, thresholds: of the prediction sets, float64 [C]; None where no sets are asked for.
        max_error: of the automatic answers; None where no decision is asked for.
        confidence: from which on an answer is automatic; None where none is.
        num_images: of validation.
        automatic_val: the share of them that is automatic.
        sizes, automatic, pictures: summed over the pictures decided so far.
    """

    class_names: tuple[str, ...]
    coverage: float | None = None
    thresholds: Tensor = field(default_factory=lambda: torch.zeros(0))
    in_every_set: tuple[str, ...] = ()
    max_error: float | None = None
    confidence: float | None = None
    num_images: int = 0
    automatic_val: float = 0.0
    sizes: int = 0
    automatic: int = 0
    pictures: int = 0
    not_read: int = 0

    @property
    def columns(self) -> list[str]:
        """The columns asked for."""
        return ["set"] * (self.coverage is not None) + ["decision"] * (self.max_error is not None)

    def unread(self) -> tuple[str, ...]:
        """Return the cells of a picture that could not be read."""
        self.not_read += 1
        return ("",) * (self.coverage is not None) + (PERSON,) * (self.max_error is not None)

    def decide(self, probabilities: Tensor, *, unfamiliar: bool) -> tuple[tuple[str, ...] | None, str | None]:
        """Return the set and the decision of one picture, None where they are not asked for.

        Args:
            probabilities: float64 [C].
            unfamiliar: it is unlike the validation images, which then vouch for nothing: a person decides.
        """
        names = decision = None
        self.pictures += 1
        if self.coverage is not None:
            chosen = prediction_sets(probabilities[None], self.thresholds)[0]
            order = probabilities.argsort(descending=True, stable=True).tolist()
            names = tuple(self.class_names[label] for label in order if chosen[label])
            self.sizes += len(names)
        if self.max_error is not None:
            alone = self.confidence is not None and float(probabilities.max()) >= self.confidence and not unfamiliar
            decision = AUTOMATIC if alone else PERSON
            self.automatic += alone
        return names, decision

    def cells(self, probabilities: Tensor, *, unfamiliar: bool) -> tuple[str, ...]:
        """Return the cells of one picture; see `decide`."""
        names, decision = self.decide(probabilities, unfamiliar=unfamiliar)
        return (*([] if names is None else [BETWEEN.join(names)]), *([] if decision is None else [decision]))

    def lines(self) -> list[str]:
        """Return what is said at the end."""
        lines = []
        if self.coverage is not None:
            asked = f"{100 * self.coverage:g} %"
            lines.append(f"{asked} sets: {self.sizes / max(1, self.pictures):.2f} classes a picture")
            if few := self.in_every_set:
                names = ", ".join(one_line(name, MAX_ERROR) for name in few[:NAMED])
                names += f" and {len(few) - NAMED:,} more" if len(few) > NAMED else ""
                least = f"fewer than {counted(least_images(self.coverage), 'validation image')}"
                lines.append(f"{names}: {least}, too few for {asked}: in every set")
        if self.max_error is not None:
            asked = f"at most {100 * self.max_error:g} % errors"
            images = counted(self.num_images, "validation image")
            if self.confidence is None:
                needed = least_answers(self.max_error)
                why = f"; at least {needed:,}, all answered correctly, are needed" if self.num_images < needed else ""
                lines.append(f"{asked}: none of {images} automatic{why}; every picture is for a person")
            else:
                share = f"{100 * self.automatic_val:.0f} % of {images} automatic"
                lines.append(f"{asked}: {share}, from confidence {self.confidence:.4f} on")
                others = self.pictures + self.not_read - self.automatic
                lines.append(
                    f"{self.automatic:,} automatic, {others:,} for a person, every unfamiliar picture among them"
                )
        return lines

    def counts(self) -> dict[str, float | int | None]:
        """Return the same for scripts."""
        found: dict[str, float | int | None] = {}
        if self.coverage is not None:
            found["mean_set_size"] = self.sizes / max(1, self.pictures)
        if self.max_error is not None:
            found |= {"automatic": self.automatic, "automatic_from": self.confidence}
        return found


def open_trust(
    trained: Trained,
    *,
    coverage: float | None = None,
    max_error: float | None = None,
    calibrate: bool = True,
    root: str | None = None,
) -> Trust:
    """Take thresholds from the run's validation images.

    Args:
        trained: the run.
        coverage: share of the pictures of each class whose set holds the true one, 0.01 to 0.9999; None: no sets.
        max_error: share of the automatic answers that may be wrong, 0.0001 to 0.5; None: no decisions.
        calibrate: see `Trained.probabilities`.
        root: where the data set lies; None takes the run's.

    Raises:
        ValueError: a share outside its range; the run has no validation images, or they are not there; one line.
    """
    asked = {name: value for name, value in (("coverage", coverage), ("max_error", max_error)) if value is not None}
    for name, value in asked.items():
        low, high = RANGES[name]
        if isinstance(value, bool) or not isinstance(value, Real) or not low <= value <= high:
            raise ValueError(f"{name} is {value!r:.40}; valid range: {low} to {high}")
    trust = Trust(class_names=trained.class_names, coverage=coverage, max_error=max_error)
    if not asked:
        return trust
    option = " and ".join(asked)
    if not trained.info.num_val:
        raise ValueError(f"{option}: thresholds are taken from validation images, and {trained.name} has none")
    try:
        split = trained.split("val", root, own=True)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None
    logits = features_of(trained, "val", split.images).logits
    probabilities, labels = trained.probabilities(logits, calibrate=calibrate), split.labels
    trust.num_images = len(labels)
    if coverage is not None:
        trust.thresholds = class_thresholds(probabilities, labels, coverage)
        known, least = labels.bincount(minlength=len(trained.class_names)).tolist(), least_images(coverage)
        pairs = zip(trained.class_names, known, strict=True)
        trust.in_every_set = tuple(name for name, count in pairs if count < least)
    if max_error is not None:
        confidence, predictions = probabilities.max(dim=1)
        trust.confidence = confidence_threshold(confidence, predictions == labels, max_error)
        if trust.confidence is not None:
            trust.automatic_val = float((confidence >= trust.confidence).double().mean())
    return trust
