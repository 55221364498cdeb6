"""The end of a run: the weights to use, the test images, the summary, and then the figures."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fmnist.checkpoint.contents import MODEL
from fmnist.checkpoint.fingerprint import IN_SUMMARY
from fmnist.checkpoint.tensors import load_strict, read_tensors
from fmnist.config.schema import Config
from fmnist.config.shipped import command
from fmnist.data.corrections import DROPPED
from fmnist.data.info import SplitName
from fmnist.data.split import Split
from fmnist.evaluation.calibration import usable_temperature
from fmnist.evaluation.findings import Findings, findings
from fmnist.evaluation.numbers import SCORES, calibration_error
from fmnist.evaluation.outcome import Outcome
from fmnist.metrics import predict
from fmnist.run import Run
from fmnist.runtime.console import counted
from fmnist.runtime.files import sha256_of
from fmnist.runtime.provenance import git_revision, versions
from fmnist.tracking.metrics_file import METRICS_FILE
from fmnist.training.eager import eager_unless_long
from fmnist.training.parts import Training

logger = logging.getLogger("fmnist")


def finish(training: Training, cfg: Config, run: Run) -> None:
    """Write the weights to use and the summary; after the last step also evaluate the test images, once, if wanted."""
    state = training.state
    with training.clock.saving():
        run.wait_for_save()
    finished = state.step == training.schedule.total_steps
    summary: dict[str, Any] = {
        "model": cfg.model.name,
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "epochs": round(training.schedule.epoch(state.step), 4),
        "steps": state.step,
        "world_size": run.world_size,
        "seed": cfg.seed,
        **{f"val.{name}": value for name, value in ({"top1": None} | state.best_val).items()},
        **training.clock.summary(),
        "startup_seconds": round(training.clock.started - run.began, 3),
        "startup_processor_seconds": round(training.clock.processor_before, 3),
        "train_seconds": round(state.train_seconds, 1),
        "device": run.device_name,
        "versions": versions(),
        "git_revision": git_revision(),
        IN_SUMMARY: run.fingerprint,
        "status": "finished" if finished else "stopped",
    }
    if not finished:
        summary["stopped_by"] = run.should_stop.reason
    if state.best_step:
        exported = run.on_main(training.checkpoints.export, state.best_step, run.directory / MODEL)
        if exported is not None:
            summary["weights_sha256"], summary["weights_step"] = exported
            if summary["weights_step"] != state.best_step:  # others than those that were the best on validation
                logger.warning("summary.json has no validation numbers of these weights")
                summary = {name: value for name, value in summary.items() if not name.startswith("val.")}
                summary["val.top1"] = None
    if summary["val.top1"] is None and "weights_step" in summary:
        summary["weights_size"] = training.size_at(summary["weights_step"])
    found, numbers = evaluate_at_end(training, cfg, run) if finished else (None, {})
    run.finish(summary | numbers)
    if finished and run.is_main:  # after the summary: a figure that fails costs neither numbers nor summary
        write_report(found, run)
    if not finished:
        at = f"stopped at step {state.step:,} of {training.schedule.total_steps:,} by {run.should_stop.reason}"
        logger.info("%s; checkpoint saved; rerun the same command to resume", at)
    elif run.is_main:
        has_test = len(training.test_split) > 0
        logger.info("%s", closing(run.directory, summary["val.top1"], found, has_test=has_test))


def evaluate_at_end(training: Training, cfg: Config, run: Run) -> tuple[Findings | None, dict[str, Any]]:
    """Evaluate the weights to use; return what was found, on the main process, and numbers for the summary."""
    use_best_weights(training, run)
    numbers: dict[str, Any] = {}
    with eager_unless_long(training, cfg, run):
        numbers["temperature"] = fit_on_validation(training, cfg, run)
        if (split := training.val_split).corrected is not None:
            logits = predict(training.model, split, training.augment, cfg.evaluation, run)
            numbers |= scores_corrected("val", logits, split)
        found = evaluate_test(training, cfg, run) if cfg.evaluation.test else None
    if found is not None and found.outcome.split == "test":
        scores = {key: found.metrics[key] for key in (*SCORES, "loss", "num_images") if key in found.metrics}
        run.log("test", scores, training.state.step)
        numbers |= {f"test.{key}": value for key, value in scores.items()}
        numbers |= calibration_errors(found, numbers["temperature"])
        numbers |= scores_corrected("test", found.outcome.logits, training.test_split)
    elif not len(training.test_split):
        numbers["test.num_images"] = 0
    return found, numbers


def use_best_weights(training: Training, run: Run) -> None:
    """Read the weights to use, as they stand on the disk, into the model of every process."""
    model, weights = training.model, run.directory / MODEL
    run.on_main(lambda: load_strict(model, read_tensors(weights), weights))
    run.broadcast(model.state_dict().values())


def fit_on_validation(training: Training, cfg: Config, run: Run) -> float | None:
    """Fit the temperature that makes confidences mean what they say, on the main process; None without images."""
    split = training.val_split
    if not len(split):
        return None
    logits = predict(training.model, split, training.augment, replace(cfg.evaluation, tta="none"), run)
    temperature, why_not = run.on_main(usable_temperature, logits.cpu(), split.labels.cpu()) or (None, "")
    if why_not:
        logger.warning("%s", why_not)
    return temperature


def scores_corrected(name: str, logits: Tensor, split: Split) -> dict[str, float]:
    """Return accuracy on the labels after `data.corrections`, without the images they drop; empty where all stay.

    Everything else is counted on the labels as given, so that it compares with other runs.
    """
    labels, given = split.corrected, split.labels.cpu()
    if labels is None or not (labels != DROPPED).any():
        return {}
    right, kept = logits.cpu().argmax(-1) == labels, labels != DROPPED
    top1, changed = float(right[kept].double().mean()), int((labels != given).sum())
    as_given = float((logits.cpu().argmax(-1) == given).double().mean())
    said = f"{100 * as_given:.2f} % as given, {100 * top1:.2f} % after data.corrections"
    logger.info("%s top1 %s (%s changed or dropped)", name, said, counted(changed, "label"))
    return {f"{name}.top1_corrected": top1, f"{name}.num_corrected": changed}


def calibration_errors(found: Findings, temperature: float | None) -> dict[str, float]:
    """Return the expected calibration error on the test images, without and with the temperature.

    That is of single images: probabilities that are averaged over mirror images have another, which evaluate.py fits.
    """
    outcome, errors = found.outcome, {"test.ece": found.metrics["ece"]}
    if temperature is not None and outcome.tta == "none":
        scaled = (outcome.logits.double() / temperature).softmax(dim=1)
        errors["test.ece_calibrated"] = calibration_error(scaled, outcome.labels)
    return errors


def evaluate_test(training: Training, cfg: Config, run: Run) -> Findings | None:
    """Evaluate the weights to use on all processes; return the numbers on the main one.

    On the test images; on the validation images where the data set has none, and on nothing where it has neither.
    """
    model, split = training.model, training.test_split
    name: SplitName = "test"
    if not len(split):
        split, name = training.val_split, "val"
        logger.info("the data set has no test images%s", ": the validation images are evaluated" * bool(len(split)))
        if not len(split):
            return None
    logits = predict(model, split, training.augment, cfg.evaluation, run).cpu()
    outcome = Outcome(
        name=run.directory.resolve().name,
        model=cfg.model.name,
        directory=run.directory / "evaluation" / name,
        split=name,
        tta=cfg.evaluation.tta,
        images=split.at_rows(range(0)).cpu(),  # they may lie on other processes, and no picture is drawn here
        labels=split.labels.cpu(),
        logits=logits,
        class_names=split.class_names,
        info=split.info,
        data=split.title(),
        data_sha256=split.digest,
        published=split.published,
        files=tuple(map(split.file, range(len(split)))) if split.files else (),
    )
    return run.on_main(lambda: findings(replace(outcome, weights_sha256=sha256_of(run.directory / MODEL)), quick=True))


def write_report(found: Findings | None, run: Run) -> None:
    """Write the learning curves, and the evaluation's files where there is one; whatever fails is one warning."""
    from fmnist.report.curves import loss_note, plot_learning_curves  # three seconds of libraries, needed only here
    from fmnist.report.write import report_text, write_evaluation

    directory = run.directory
    curves, name = directory / "learning_curves.png", directory.resolve().name
    try:
        if found is not None:
            logger.info("%s", report_text(found))
            write_evaluation(found)
        plot_learning_curves(directory / METRICS_FILE, curves, name, loss_note(run.cfg))
    except Exception as error:  # numbers and summary are safe, and evaluate.py writes the files again
        again = f"{command('evaluate')} {directory}"
        logger.warning("the report is not complete (%s); write it again: %s", error, again)


def closing(directory: Path, val_top1: float | None, found: Findings | None, *, has_test: bool = True) -> str:
    """Return the last lines of a finished run: its accuracy, what is where, and what to type next."""
    no_test = "the test images were not evaluated" if has_test else "the data set has no test images"
    if found is not None:
        low, high = (100 * bound for bound in found.metrics["top1_interval"])
        top1 = f"{found.outcome.split} top1 {100 * found.metrics['top1']:.2f} %"
        top1 += f" (95 % interval {low:.2f} to {high:.2f})" + ("" if has_test else f"; {no_test}")
    elif val_top1 is not None:
        top1 = f"best val top1 {100 * val_top1:.2f} %; {no_test}"
    else:
        top1 = no_test
    report = "" if found is None else f"report and figures in evaluation/{found.outcome.split}/, "
    commands = {
        f"{command('evaluate')} {directory}": "report.html, calibration, speed",
        f"{command('predict')} {directory} NEW_PHOTOS/": "your own pictures",
        f"{command('evaluate')} {directory} OTHER_RUN": "compare two runs",
    }
    width = max(map(len, commands))
    return "\n".join(
        (
            f"finished: {top1}",
            f"{directory} holds {report}learning_curves.png, model.safetensors, metrics.jsonl, train.log",
            "next:",
            *(f"  {typed:<{width}}  # {gives}" for typed, gives in commands.items()),
        )
    )
