"""Train an image classifier: accelerate launch train.py [--config FILE] [--section.field VALUE ...]"""

from fmnist.config import Config
from fmnist.options import parse_config

if __name__ == "__main__":
    CONFIG = parse_config(prog="train.py")  # before torch is imported: a misspelt option is answered at once

from torch.distributed.elastic.multiprocessing.errors import record

from fmnist.console import log_to_console, one_line_errors
from fmnist.directory import is_finished, open_directory
from fmnist.metrics import predict, score
from fmnist.optim import is_due, set_lr
from fmnist.plan import print_plan
from fmnist.run import Run
from fmnist.step import train_step
from fmnist.training import Training, build, conclude, raise_if_not_finite, save


def train(training: Training, cfg: Config, run: Run) -> bool:
    """Train to the schedule's end, or until a stop is asked for; return whether it reached the end."""
    t, state, schedule, total = training, training.state, training.schedule, training.schedule.total_steps
    model = run.prepare(t.model)
    model.train()
    t.clock.start()

    while state.step < total:
        lr = set_lr(t.optimizer, schedule, state.step)
        micro_batches = t.loader.micro_batches(state.step)
        metrics = train_step(model, t.optimizer, micro_batches, t.augment, cfg.optim, run, t.ema)
        state.step += 1
        t.watch.note(metrics, state.step)
        t.clock.tick()

        if is_due(state.step, cfg.log.every_steps, total):
            scalars = run.mean(metrics)  # the loop's one device sync
            raise_if_not_finite(scalars, t, run)
            run.log("train", scalars | {"lr": lr} | t.clock.read(), state.step, schedule.epoch(state.step))

        evaluation_due = is_due(state.step, schedule.evaluation_steps, total)
        if evaluation_due:
            with t.clock.paused():
                top1 = None
                if len(t.val_split):
                    logits = predict(t.evaluated, t.val_split, t.augment, cfg.evaluation, run)
                    val = run.mean(score(logits, t.val_split.labels))
                    run.log("val", val, state.step, schedule.epoch(state.step))
                    top1 = val["top1"]
                state.update_best(top1)

        stopping = run.should_stop()
        if evaluation_due or stopping or is_due(state.step, cfg.checkpoint.every_steps, total):
            with t.clock.paused():
                save(t, run)
        if stopping:
            break

    return state.step == total


@record  # torchrun's summary then shows this process' traceback and rank
def main(cfg: Config) -> None:
    log_to_console()
    with one_line_errors("train.py"):
        run = Run(cfg, open_directory(cfg))
    with one_line_errors("train.py"), run.watch_peers():
        if is_finished(run.directory, test=cfg.evaluation.test) and not cfg.overwrite:
            return run.close()
        if not cfg.dry_run:
            run.claim()
        training = build(cfg, run)
        if cfg.dry_run:
            print_plan(training, cfg, run)
            return run.close()
        run.start(training.state.step, training.schedule.total_steps, training.augment.backend)
        finished = train(training, cfg, run)
        conclude(training, cfg, run, finished=finished)


if __name__ == "__main__":
    main(CONFIG)
