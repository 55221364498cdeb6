"""schedule.minutes: the steps that fit by an injected clock, and a run to the bit like one whose steps are given."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, execute
from conftest import warm_train as train

import fmnist
from fmnist.apps.checkpoints import inspect
from fmnist.checkpoint.contents import EMA, MODEL, OPTIMIZER, STATE, TrainState, read_state
from fmnist.checkpoint.store import Checkpoints
from fmnist.config.conflicts import validate
from fmnist.config.parse import parse_config
from fmnist.config.schema import AugmentConfig, CheckpointConfig, Config, EvaluationConfig, ScheduleConfig
from fmnist.runtime import interrupts
from fmnist.training import budget
from fmnist.training.budget import REPORT_S, Costs, cheaper_from, largest_within, no_less, seconds, sizes


def loader_of(steps_per_epoch: int, global_batch_size: int = 100) -> Any:
    split = range(steps_per_epoch * global_batch_size)
    return SimpleNamespace(steps_per_epoch=steps_per_epoch, global_batch_size=global_batch_size, split=split)


COSTS = Costs(steps=(0.1,), epoch=0.5, evaluation=2.0, save=0.25, end=3.0)


def test_seconds_by_hand() -> None:
    loader = loader_of(10)
    cfg = Config(batch=replace(Config().batch, global_batch_size=100))
    # 25 steps of 0.1 s, three epochs begun, evaluations and saves after 10, 20 and 25.
    assert seconds(cfg, 25, COSTS, loader) == pytest.approx(2.5 + 3 * 0.5 + 3 * (2 + 0.25))
    # Saves at 4, 8, 12, 16, 24 and, with the evaluations, at 10, 20, 25: eight. 20 is both.
    often = replace(cfg, checkpoint=CheckpointConfig(every_steps=4))
    assert seconds(often, 25, COSTS, loader) == pytest.approx(2.5 + 1.5 + 3 * 2 + 8 * 0.25)
    # 24 ends on a multiple of 4: saves at 4, 8, 12, 16, 10, 20 and the end.
    assert seconds(often, 24, COSTS, loader) == pytest.approx(2.4 + 1.5 + 3 * 2 + 7 * 0.25)
    rare = replace(cfg, evaluation=EvaluationConfig(every_steps=100))
    assert seconds(rare, 25, COSTS, loader) == pytest.approx(2.5 + 1.5 + 2.25)


@pytest.mark.parametrize("between", [0, 1, 3, 4, 6, 30])
@pytest.mark.parametrize("every", [1, 4, 5, 7])
def test_saves_are_those_of_the_schedule(every: int, between: int) -> None:
    """Counted one step after the other, as the loop asks the schedule; every evaluation may be the best so far."""
    from fmnist.optim import Schedule

    cfg = Config(
        evaluation=EvaluationConfig(every_steps=every),
        checkpoint=CheckpointConfig(every_steps=between),
        batch=replace(Config().batch, global_batch_size=100),
    )
    costs = Costs(steps=(0.0,), epoch=0.0, evaluation=100.0, save=1.0, end=0.0)
    for total in range(1, 30):
        schedule = Schedule.from_config(budget.with_steps(cfg, total), 10)
        due = [
            (schedule.validates(step), schedule.validates(step) or schedule.saves(step)) for step in range(1, total + 1)
        ]
        expected = sum(100 * validates + saves for validates, saves in due)
        assert seconds(cfg, total, costs, loader_of(10)) == expected, total


def test_each_image_size_counts_its_own_time() -> None:
    cfg = Config(augment=AugmentConfig(size={0: 20, 3: 28}), batch=replace(Config().batch, global_batch_size=100))
    costs = Costs(steps=(1.0, 2.0), epoch=0.0, evaluation=0.0, save=0.0, end=0.0)
    assert sizes(cfg) == [20, 28]
    assert seconds(cfg, 50, costs, loader_of(10)) == 30 * 1 + 20 * 2
    # Two epochs: the last one is at 28 px however short the run (`sizes_by_epoch`).
    assert seconds(cfg, 20, costs, loader_of(10)) == 10 * 1 + 10 * 2
    shrinking = replace(cfg, augment=AugmentConfig(size={0: 28, 1: 20, 2: 28}))
    assert sizes(shrinking) == [20, 28] and seconds(shrinking, 40, costs, loader_of(10)) == 30 * 2 + 10 * 1


def test_the_largest_that_fits() -> None:
    for fits in (0, 1, 2, 3, 7, 8, 9, 1000, 123_457):
        assert largest_within(fits + 0.5, float) == fits
    assert largest_within(-1.0, float) == 0


def test_a_longer_run_of_smaller_images_is_found() -> None:
    """Whatever fits, by trying every number: a run of two epochs takes less than one of 1.4, all at the last size."""
    growing = AugmentConfig(size={0: 96, 4: 128, 8: 224})
    cfg = Config(augment=growing, batch=replace(Config().batch, global_batch_size=100))
    costs = Costs(steps=(0.1, 0.178, 0.544), epoch=0.0, evaluation=1.0, save=0.1, end=0.0)
    loader = loader_of(10)
    taken = [seconds(cfg, count, costs, loader) for count in range(1, 200)]
    assert sorted(taken) != taken
    for limit in range(1, 40):
        expected = max((count for count, each in enumerate(taken, start=1) if each <= limit), default=0)
        found = largest_within(limit, lambda count: seconds(cfg, count, costs, loader), cheaper_from(cfg, loader))
        assert found == expected, limit


class Ticking:
    """A clock that moves when a part of the run says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def probed(cfg: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[int, Ticking]:
    """The steps that a probe finds where a step takes size / 200 s, an evaluation 4 s, a save 0.5 s, an epoch 1 s."""
    from fmnist.data.batches import Loader
    from fmnist.data.split import Split
    from fmnist.run import Run

    clock, splits = Ticking(), {}
    for name, number in (("train", 2000), ("val", 500), ("test", 1000)):
        images, labels = fmnist.data.fashion_mnist.load("test")
        splits[name] = Split(images=images[:number], labels=labels[:number])
    loader = Loader(splits["train"], global_batch_size=100, seed=0)
    seen: list[int] = []

    def train_step(model: Any, optimizer: Any, micro_batches: Any, augment: Any, *_: Any) -> dict[str, torch.Tensor]:
        epoch = micro_batches[0].epoch
        clock.now += augment.size(epoch) / 200 + (epoch not in seen)
        seen.append(epoch)
        return {"loss": torch.zeros(())}

    def validate(*_: Any) -> dict[str, float]:
        clock.now += 4.0
        return {}

    def captured(self: Run, step: Any, choice: str) -> Any:
        assert step is train_step and choice == cfg.model.cuda_graph
        return lambda *arguments: replayed.append(1) or step(*arguments)

    replayed: list[int] = []
    monkeypatch.setattr(Run, "captured", captured)
    monkeypatch.setattr(budget, "validate", validate)
    monkeypatch.setattr(budget, "_save", lambda run, files: setattr(clock, "now", clock.now + 0.5))
    with Run(cfg, tmp_path / "run") as run:
        run.clock, run.began = clock, clock.now - 20.0
        before = torch.get_rng_state()
        total, _ = budget.fixed_steps(cfg, run, loader, splits["train"].info, splits, train_step)
        assert torch.equal(torch.get_rng_state(), before)
    assert len(replayed) == len(seen)  # what is timed is what will run
    assert list(tmp_path.iterdir()) == []
    return total, clock


def test_steps_of_an_injected_clock_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = Config(
        model=replace(Config().model, name="mlp", options={"width": 16}),
        batch=replace(Config().batch, global_batch_size=100),
        augment=AugmentConfig(size=20),
        schedule=ScheduleConfig(minutes=5),
    )
    with caplog.at_level("INFO", "fmnist"):
        total, clock = probed(cfg, monkeypatch, tmp_path)
    # The probe: 5 + 1 + 20 steps (an epoch has 20) of 0.1 s, one more, two epochs of 1 s, 4 s and 0.5 s; 20 s before.
    used = 20 + 27 * 0.1 + 2 + 4 + 0.5
    assert clock.now - 80 == pytest.approx(used)
    # The end: 500 validation and 1,000 test images at 4 / 500 s, and the figures.
    left = 300 - used - 1500 * 4 / 500 - REPORT_S
    # An epoch: 20 steps, one start, an evaluation, a save: 2 + 1 + 4.5 = 7.5 s. 252.8 / 7.5 = 33 epochs, 5.3 s remain;
    # of another one 1 + 4.5 s are due at once.
    assert left == pytest.approx(252.8) and total == 33 * 20
    assert "schedule.minutes 5: 660 steps, 33 epochs; 100 ms per step at 20 px, 4 s per evaluation" in caplog.text


def test_too_few_minutes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = Config(
        model=replace(Config().model, name="mlp", options={"width": 16}),
        batch=replace(Config().batch, global_batch_size=100),
        schedule=ScheduleConfig(minutes=0.5),
    )
    with pytest.raises(ValueError, match=r"schedule.minutes is 0.5, too short for one step; valid here: ") as error:
        probed(cfg, monkeypatch, tmp_path)
    assert float(str(error.value).split("valid here: ")[1].split()[0]) > 0.5
    # what is named is enough: rounded to the nearest it would be refused again half of the time
    assert [no_less(number) for number in (0.2617, 0.27, 12.4, 100.2)] == ["0.27", "0.27", "13", "110"]


def test_two_lengths_are_refused_and_a_recipes_epochs_give_way(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = parse_config(["--config", "configs/mlp.yaml", "--schedule.minutes", "10"], to_run=False)
    assert (cfg.schedule.minutes, cfg.schedule.epochs) == (10.0, 40.0)
    for flags, said in (
        (["--schedule.epochs=5"], "schedule.epochs 5.0 and schedule.minutes 10.0 are two lengths; valid: one of them"),
        (["--schedule.steps=5"], "schedule.steps 5 and schedule.minutes 10.0 are two lengths"),
        (["--schedule.minutes=0"], "schedule.minutes is 0.0; valid range: 0.01 to 1000000"),
        (["--schedule.minutes=ten"], "schedule.minutes is 'ten'; expected float|null"),
    ):
        with pytest.raises(SystemExit):
            parse_config(["--schedule.minutes=10", *flags], to_run=False)
        assert said in capsys.readouterr().err
    with pytest.raises(ValueError, match="two lengths"):
        validate(Config(schedule=ScheduleConfig(minutes=1, steps=5)))
    validate(Config(schedule=ScheduleConfig(minutes=1, epochs=5)))  # as a run's config.yaml says it


def test_a_state_keeps_its_steps_and_bad_ones_are_refused(tmp_path: Path) -> None:
    state = TrainState(step=2, best_step=2, total_steps=812)
    path = Checkpoints(tmp_path, 1, {}).save(state, {MODEL: {}, OPTIMIZER: {}})
    assert read_state(path) == state
    for bad in (0, -1, 1.5, "812", math.inf):
        text = json.loads((path / STATE).read_text()) | {"total_steps": bad}
        (path / STATE).write_text(json.dumps(text))
        with pytest.raises(ValueError, match="does not hold the state of a run"):
            read_state(path)


def test_the_minutes_begin_with_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "began", None)
    monkeypatch.setattr("signal.getsignal", lambda number: None)
    interrupts.end_at_interrupt()
    first = interrupts.began
    interrupts.end_at_interrupt()  # `fmnist train` runs train.py, which calls it again
    assert first is not None and interrupts.began == first


def go(run: Path, data: Path, **schedule: Any) -> fmnist.RunResults:
    """Three steps an epoch; dropout, moving average and BatchNorm, whose states a probe could leave behind."""
    return fmnist.train(
        "configs/mlp.yaml",
        output_dir=str(run),
        model={"name": "cnn", "options": {"widths": [8, 8, 8]}, "drop_rate": 0.2, "precision": "fp32"},
        augment={"size": 14},
        data={"root": str(data), "val_size": 500},
        batch={"global_batch_size": 500},
        schedule={"warmup_epochs": 0.5} | schedule,
        optim={"ema_decay": 0.5},
        log={"every_steps": 1, "wandb": "disabled"},
    )


@pytest.mark.thorough
def test_a_run_of_minutes_has_the_bits_of_one_of_steps_and_resumes_with_its_own_number(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "largest_within", lambda *_: 8)  # whatever the real clock says
    timed, given = tmp_path / "timed", tmp_path / "given"
    results = go(timed, data, minutes=5)
    assert (results.summary["status"], results.summary["steps"]) == ("finished", 8)
    assert "8 steps in 5 minutes of 500 images" in (timed / "train.log").read_text()
    go(given, data, steps=8)
    last = "checkpoints/step_00000008"
    for name in (MODEL, f"{last}/{MODEL}", f"{last}/{EMA}", f"{last}/{OPTIMIZER}"):
        assert (timed / name).read_bytes() == (given / name).read_bytes(), name
    assert read_state(timed / "checkpoints/step_00000008").total_steps == 8
    assert read_state(given / "checkpoints/step_00000008").total_steps is None
    assert inspect(timed)[1] == []

    # stopped after its first epoch, and resumed where a probe would say something else
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr("fmnist.runtime.stop_vote.StopVote.__call__", lambda self: True)
        patch.setattr("fmnist.runtime.stop_vote.StopVote.reason", "SIGTERM", raising=False)
        assert go(stopped, data, minutes=5).summary["status"] == "stopped"
    monkeypatch.setattr(budget, "largest_within", lambda *_: 99)
    assert go(stopped, data, minutes=5).summary["steps"] == 8
    assert (stopped / MODEL).read_bytes() == (given / MODEL).read_bytes()
    with pytest.raises(ValueError, match=r"schedule.minutes was 5.0, now 6.0"):
        go(stopped, data, minutes=6)
    assert go(stopped, data, minutes=5).summary["status"] == "finished"


def test_a_jobs_limit_becomes_minutes(tmp_path: Path) -> None:
    """The batch script up to where it first asks Python, with programs in the places of SLURM's and of Python."""
    programs = tmp_path / "bin"
    programs.mkdir()
    asked = tmp_path / "asked"
    for name, script in (
        ("squeue", '[[ -n ${SLURM_ARRAY_JOB_ID:-} && " $* " != *" --jobs=5_2 "* ]] && echo "$LIMIT"; echo "$LIMIT"'),
        ("python", f'[ "$1" = -c ] && exit 0; printf "%s\\n" "$@" > {asked}; exit 7'),
    ):
        (programs / name).write_text(f"#!/bin/bash\n{script}\n")
        (programs / name).chmod(0o755)
    env = os.environ | {"SLURM_JOB_ID": "5", "FMNIST_VENV": str(tmp_path), "PATH": f"{programs}:{os.environ['PATH']}"}

    def submitted(limit: str, *flags: str) -> tuple[int, str, list[str]]:
        asked.unlink(missing_ok=True)
        done = execute("bash", "slurm/train.sbatch", "configs/mlp.yaml", *flags, env=env | {"LIMIT": limit}, cwd=ROOT)
        return done.returncode, done.stderr, asked.read_text().splitlines()[5:] if asked.exists() else []

    for limit, minutes in (("1:00:00", "57"), ("10:00", "7"), ("1-00:00:00", "1437"), ("4:30", "1.5")):  # 3 less
        assert submitted(limit, "--schedule.minutes", "job", "--seed", "3") == (
            7, "", ["--schedule.minutes", minutes, "--seed", "3"],
        )  # fmt: skip
    assert submitted("1:00:00", "--schedule.minutes=job")[2] == ["--schedule.minutes=57"]
    untouched = ["--schedule.minutes", "9", "--log.project", "job", "--output_dir", "a b"]
    assert submitted("1:00:00", *untouched)[2] == untouched
    # SLURM names the last task of an array by the id of the whole: squeue would answer with a line for each task
    env |= {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}
    assert submitted("1:00:00", "--schedule.minutes=job")[2] == ["--schedule.minutes=57"]
    for limit in ("UNLIMITED", "3:00", ""):
        status, said, _ = submitted(limit, "--schedule.minutes", "job")
        assert status == 2 and "--schedule.minutes job needs a --time of more than three minutes" in said


@pytest.mark.thorough
def test_the_slowest_process_decides_and_any_number_of_them_has_the_same_bits(
    small_config: Path, tmp_path: Path
) -> None:
    small_config.write_text(small_config.read_text().replace("{steps: 12, warmup_steps: 2}", "{warmup_steps: 2}"))
    flags = ["--config", small_config, "--exact", 2]
    # Rank 0 says 1 s a step, rank 1 says 2 s; nothing else takes any time.
    minutes = ["--schedule.minutes", 0.5, "--output_dir", tmp_path / "two"]
    train(*flags, *minutes, processes=2, script=ROOT / "tests/two_clocks.py")
    state = read_state(max((tmp_path / "two" / "checkpoints").iterdir()))
    assert state.total_steps == state.step == 15  # 30 s of steps of 2 s
    train(*flags, "--schedule.steps", 15, "--output_dir", tmp_path / "one")
    assert (tmp_path / "one" / MODEL).read_bytes() == (tmp_path / "two" / MODEL).read_bytes()
