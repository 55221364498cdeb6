"""Train an image classifier: accelerate launch train.py [--config FILE] [--section.field VALUE ...]"""

from fmnist.runtime.interrupts import end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # without a traceback, until the next imports are done

from fmnist.config.parse import parse_config
from fmnist.config.schema import Config
from fmnist.runtime.console import log_to_console, one_line_errors, open_door, same_arguments

if __name__ == "__main__":
    open_door("train.py")
    with same_arguments():
        CONFIG = parse_config(prog="train.py")  # before torch is imported: a misspelt option is answered at once

from torch.distributed.elastic.multiprocessing.errors import record

from fmnist.checkpoint.run_directory import open_directory
from fmnist.metrics import validate
from fmnist.optim import set_lr
from fmnist.run import Run
from fmnist.step import train_step
from fmnist.training.batch_pictures import write_train_batch
from fmnist.training.build import build
from fmnist.training.finish import finish
from fmnist.training.micro_batch import say_what_would_fit
from fmnist.training.parts import Training
from fmnist.training.plan import opening, print_plan
from fmnist.training.profile import StepProfiler
from fmnist.training.save import save


def train(training: Training, cfg: Config, run: Run) -> None:
    """Train to the schedule's end, or until asked to stop."""
    state, schedule, clock, non_finite = training.state, training.schedule, training.clock, training.non_finite
    loader, optimizer, augment, ema = training.loader, training.optimizer, training.augment, training.ema
    model, gradients = run.prepare(training.model, compiled=cfg.model.compile, trial=training.trial)
    update = run.captured(train_step, cfg.model.cuda_graph)  # train_step, on a GPU launched as one graph
    profiler = StepProfiler(cfg.profile if run.is_main else None, run.directory / "profile", run.device)
    model.train()
    clock.start()

    while state.step < schedule.total_steps:
        # update: one optimizer step on this process's share of the global batch
        lr = set_lr(optimizer, schedule, state.step)
        metrics = update(model, optimizer, loader.micro_batches(state.step), augment, gradients, cfg.optim, ema)
        state.step += 1
        non_finite.note(metrics, state.step)  # so that a NaN noticed late has a first step
        clock.tick()
        profiler.step()  # does nothing unless --profile asks for a trace

        # log: the only device sync of an ordinary step
        if schedule.logs(state.step):
            scalars = run.mean(metrics)
            non_finite.check(scalars, state.step)
            run.log("train", scalars | {"lr": lr} | clock.read(), state.step)

        # validate: the throughput clock is paused
        if schedule.validates(state.step):
            with clock.paused():
                val = validate(training.eval_model, training.val_split, augment, training.validation(cfg), run)
                state.update_best(val, cfg.evaluation.best)
                run.log("val", val, state.step)

        # save, or stop; the weights alone where they are the best between two checkpoints
        stopping = run.should_stop()
        full = stopping or schedule.saves(state.step)
        if full or state.best_step == state.step:
            with clock.paused():
                save(training, run, full=full)
        if stopping:
            break
    profiler.close()


def run_training(cfg: Config) -> int:
    """Train, or resume, with what stands around the loop; return the signal that asked for an end, or 0."""
    log_to_console()
    directory = open_directory(cfg)
    with Run(cfg, directory) as run:
        training = build(cfg, run, train_step)
        if training is None:  # the run is finished
            return 0
        if cfg.dry_run:
            print_plan(training, cfg, run)
            return 0
        run.start(training.progress, opening(training, cfg, run))
        write_train_batch(run.directory, training.loader, training.augment, training.schedule, run)
        with say_what_would_fit(training, cfg):
            train(training, cfg, run)
            finish(training, cfg, run)
        return run.should_stop.signal


@record  # torchrun's summary then shows this process' traceback and rank
def main(cfg: Config) -> None:
    with one_line_errors("train.py"):
        run_training(cfg)


if __name__ == "__main__":
    main(CONFIG)
