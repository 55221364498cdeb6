"""The end of a run: the weights to use, the test images, the summary, and then the figures."""

import logging
from typing import Any

from fmnist.checkpoint.contents import MODEL
from fmnist.checkpoint.tensors import load_strict, read_tensors
from fmnist.config.schema import Config
from fmnist.config.shipped import command
from fmnist.evaluation.findings import Findings, findings
from fmnist.evaluation.outcome import Outcome
from fmnist.metrics import predict
from fmnist.run import Run
from fmnist.runtime.provenance import git_revision, versions
from fmnist.tracking.metrics_file import METRICS_FILE
from fmnist.training.build import Training

logger = logging.getLogger("fmnist")


def finish(training: Training, cfg: Config, run: Run) -> None:
    """Write the weights to use and the summary; after the last step also evaluate the test images, once, if wanted."""
    state = training.state
    finished = state.step == training.schedule.total_steps
    summary: dict[str, Any] = {
        "model": cfg.model.name,
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "epochs": round(training.schedule.epoch(state.step), 4),
        "steps": state.step,
        "world_size": run.world_size,
        "seed": cfg.seed,
        "val.top1": state.best_top1 if state.best_top1 >= 0 else None,
        "images_per_second": training.clock.median_rate(),
        "train_seconds": round(state.train_seconds, 1),
        "device": run.device_name,
        "versions": versions(),
        "git_revision": git_revision(),
        "status": "finished" if finished else "stopped",
    }
    if state.best_step:
        run.on_main(training.checkpoints.export, state.best_step, run.directory / MODEL)
    found = evaluate_test(training, cfg, run) if finished and cfg.evaluation.test else None
    if found is not None:
        scores = {key: found.metrics[key] for key in ("top1", "loss", "num_images")}
        run.log("test", scores, state.step)
        summary |= {f"test.{key}": value for key, value in scores.items()}
    run.finish(summary)
    if not finished:
        total = training.schedule.total_steps
        logger.info("stopped at step %s of %s; checkpoint saved; rerun the same command to resume", state.step, total)
    if finished and run.is_main:  # after the summary: a figure that fails costs neither numbers nor summary
        write_report(found, run)


def evaluate_test(training: Training, cfg: Config, run: Run) -> Findings | None:
    """Evaluate the weights to use on the test images, on all processes; return the numbers on the main one."""
    model, split, weights = training.model, training.test_split, run.directory / MODEL
    run.on_main(lambda: load_strict(model, read_tensors(weights), weights))
    run.broadcast(model.state_dict().values())
    logits = predict(model, split, training.augment, cfg.evaluation, run).cpu()
    outcome = Outcome(
        name=run.directory.resolve().name,
        model=cfg.model.name,
        directory=run.directory / "evaluation" / "test",
        split="test",
        tta=cfg.evaluation.tta,
        images=split.images.cpu(),
        labels=split.labels.cpu(),
        logits=logits,
        class_names=split.class_names,
    )
    return run.on_main(findings, outcome, quick=True)


def write_report(found: Findings | None, run: Run) -> None:
    """Write the learning curves, and the evaluation's files where there is one; whatever fails is one warning."""
    from fmnist.report.curves import plot_learning_curves  # three seconds of libraries, needed only here
    from fmnist.report.write import report_text, write_evaluation

    directory = run.directory
    try:
        if found is not None:
            logger.info("%s", report_text(found))
            write_evaluation(found)
        plot_learning_curves(directory / METRICS_FILE, directory / "learning_curves.png", directory.resolve().name)
    except Exception as error:  # numbers and summary are safe, and evaluate.py writes the files again
        again = f"{command('evaluate')} {directory}"
        logger.warning("the report is not complete (%s); write it again: %s", error, again)
    if found is None:
        logger.info("finished; the test images were not evaluated; the run is in %s", directory)
    else:
        logger.info("test top1 %.2f %%; the run is in %s", 100 * found.metrics["top1"], directory)
