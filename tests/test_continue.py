"""A finished run is continued by the same command with more epochs; whatever else differs stays refused."""

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fmnist
from fmnist.apps.checkpoints import inspect
from fmnist.checkpoint.contents import EMA, MODEL, OPTIMIZER, TrainState
from fmnist.checkpoint.run_directory import is_finished, open_directory
from fmnist.checkpoint.store import Checkpoints
from fmnist.config.same_run import lengthened, recipe, run_yaml
from fmnist.config.schema import AugmentConfig, Config, OptimConfig, ScheduleConfig
from fmnist.optim import Schedule
from fmnist.runtime.files import sha256_of
from fmnist.trained import Trained, open_trained
from fmnist.training.resume import continuation


def directory_of(run: Path, cfg: Config, **summary: Any) -> Path:
    run.mkdir()
    (run / "config.yaml").write_text(run_yaml(cfg))
    (run / "summary.json").write_text(json.dumps(summary))
    (run / MODEL).touch()
    return run


def options(run: Path, epochs: float = 10.0, **changes: Any) -> Config:
    return replace(Config(output_dir=str(run)), schedule=replace(Config().schedule, epochs=epochs), **changes)


def test_only_a_finished_run_may_be_longer_and_nothing_else_may_change(tmp_path: Path) -> None:
    run = tmp_path / "run"
    directory_of(run, options(run), status="finished", steps=100)
    assert open_directory(options(run, 20)) == run
    assert open_directory(options(run)) == run
    for cfg, said in (
        (options(run, 5), "schedule.epochs was 10.0, now 5.*Give another --output_dir"),
        (options(run, 20, seed=1), r"schedule.epochs was 10.0, now 20; seed was 0, now 1\. Give another"),
        (options(run, 10, optim=OptimConfig(lr=0.1)), "optim.lr was 0.001, now 0.1"),
        (replace(options(run), schedule=ScheduleConfig(steps=10**6)), "schedule.steps was null, now 1000000"),
    ):
        with pytest.raises(ValueError, match=said):
            open_directory(cfg)
    (run / "summary.json").write_text(json.dumps({"status": "stopped", "steps": 60}))
    with pytest.raises(ValueError, match="Only a finished run can be extended: finish it with its original command"):
        open_directory(options(run, 20))
    (run / "summary.json").unlink()
    with pytest.raises(ValueError, match="Only a finished run can be extended"):
        open_directory(options(run, 20))


def test_a_run_of_steps_is_continued_by_more_steps(tmp_path: Path) -> None:
    run = tmp_path / "run"
    cfg = replace(options(run), schedule=ScheduleConfig(steps=40))
    directory_of(run, cfg, status="finished", steps=40)
    assert open_directory(replace(cfg, schedule=ScheduleConfig(steps=80))) == run
    with pytest.raises(ValueError, match="schedule.steps was 40, now null"):
        open_directory(replace(cfg, schedule=ScheduleConfig()))


def test_only_lengths_that_grow_are_taken_over() -> None:
    before = {"schedule.epochs": 10.0, "schedule.steps": None, "seed": 0}
    assert lengthened(before, {"schedule.epochs": 20, "schedule.steps": 5, "seed": 1}) == before | {
        "schedule.epochs": 20
    }
    assert lengthened(before, {"schedule.epochs": 5.0}) == before
    assert lengthened(before, before) == before and lengthened({}, before) == {}
    assert lengthened({"schedule.epochs": "10"}, before) == {"schedule.epochs": "10"}


def test_a_run_that_came_to_an_earlier_end_is_not_finished(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="fmnist")
    run = directory_of(tmp_path / "run", Config(), status="finished", steps=100)
    assert is_finished(run, test=False, total_steps=100, length="schedule.steps")
    assert caplog.messages[-1].count("raise --") == 1 and "raise --schedule.steps;" in caplog.messages[-1]
    assert is_finished(run, test=False, total_steps=100, length=None) and "raise" not in caplog.messages[-1]
    assert is_finished(run, test=False, total_steps=100)
    assert not is_finished(run, test=False, total_steps=101)
    (run / "summary.json").write_text(json.dumps({"status": "finished"}))  # a run from before it named its steps
    assert is_finished(run, test=False, total_steps=101)
    (run / MODEL).unlink()
    assert not is_finished(run, test=False, total_steps=101)
    assert caplog.messages[-1] == f"{run / MODEL} is lost: it is made again from the checkpoints"


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        # Of 100 steps the last has cos(pi * 99 / 100), of 200 steps that of step 100 is half-way: half of the peak.
        (
            ScheduleConfig(epochs=20),
            f"jumps from {0.001 * (1 + math.cos(math.pi * 0.99)) / 2:.4g} to 0.0005, its value",
        ),
        (ScheduleConfig(epochs=20, name="constant"), "the learning rate stays 0.001"),
        (ScheduleConfig(epochs=20, name="linear", min_lr=1e-4), "jumps from 0.000109 to 0.00055"),
    ],
)
def test_what_becomes_of_the_learning_rate_is_said_in_one_line(
    schedule: ScheduleConfig, said: str, tmp_path: Path
) -> None:
    cfg = replace(Config(), schedule=schedule)
    meta = {"config": recipe(replace(cfg, schedule=replace(schedule, epochs=10)))}
    state = TrainState(step=100, best_step=100)
    path = Checkpoints(tmp_path, 1, meta).save(state, {MODEL: {}, OPTIMIZER: {}})
    line = continuation(path, cfg, Schedule.from_config(cfg, 10), state)
    assert line.startswith("continuing a run of 100 steps from step 100 to 200: ") and said in line
    same = replace(cfg, schedule=replace(schedule, epochs=10))
    assert continuation(path, same, Schedule.from_config(same, 10), state) == ""


@pytest.mark.parametrize(
    ("size", "warmup", "differs"),
    [
        (28, 0.0, False),
        ({0: 20, 2: 28}, 0.0, False),  # both had the second size from epoch 2 on
        ({0: 20, 14: 28}, 0.0, True),  # a run of 10 epochs had the second size from epoch 9 on
        (28, 2.0, False),
        (28, 12.0, True),  # of 10 epochs a tenth, 1 of them; of 20 epochs 12
    ],
)
def test_a_constant_learning_rate_alone_does_not_make_it_one_long_run(
    size: int | dict[int, int], warmup: float, differs: bool, tmp_path: Path
) -> None:
    schedule = ScheduleConfig(epochs=20, name="constant", warmup_epochs=warmup)
    cfg = Config(schedule=schedule, augment=AugmentConfig(size=size))
    meta = {"config": recipe(replace(cfg, schedule=replace(schedule, epochs=10)))}
    state = TrainState(step=100, best_step=100)
    path = Checkpoints(tmp_path, 1, meta).save(state, {MODEL: {}, OPTIMIZER: {}})
    line = continuation(path, cfg, Schedule.from_config(cfg, 10), state)
    assert line.endswith("; the result differs from a single run of that length") == differs, line


@pytest.mark.parametrize(
    ("every", "best", "said"),
    [
        (30, 100, True),  # a run of 200 validates at 90 and 120; one of 100 at its end too
        (30, 90, False),
        (50, 100, False),  # as a run of 200 does
    ],
)
def test_an_end_that_one_long_run_does_not_validate_may_stay_the_best(
    every: int, best: int, said: bool, tmp_path: Path
) -> None:
    evaluation = replace(Config().evaluation, every_steps=every)
    cfg = replace(Config(), schedule=ScheduleConfig(epochs=20, name="constant"), evaluation=evaluation)
    meta = {"config": recipe(replace(cfg, schedule=replace(cfg.schedule, epochs=10)))}
    state = TrainState(step=100, best_step=best, best_val={"top1": 0.9})
    path = Checkpoints(tmp_path, 1, meta).save(state, {MODEL: {}, OPTIMIZER: {}})
    line = continuation(path, cfg, Schedule.from_config(cfg, 10), state)
    words = "; step 100, which a single run of that length does not validate, may stay the best"
    assert line.endswith(words) == said and "differs from" not in line
    # without validation images the newest step is the best, as in one long run
    assert words not in continuation(path, cfg, Schedule.from_config(cfg, 10), replace(state, best_val={}))


def go(run: Path, data: Path, epochs: float, name: str = "constant", **more: Any) -> fmnist.RunResults:
    """Train 3 steps an epoch, validated after each epoch."""
    return fmnist.train(
        "configs/mlp.yaml",
        output_dir=str(run),
        model=more.pop("model", {"name": "mlp", "options": {"width": 16}, "precision": "fp32"}),
        data={"root": str(data), "val_size": more.pop("val_size", 500)},
        batch={"global_batch_size": 500},
        schedule={"epochs": epochs, "warmup_epochs": 0.0, "name": name},
        evaluation={"every_steps": 3, "test": False},
        optim={"ema_decay": 0.5},
        checkpoint={"keep_last": 4},
        log={"every_steps": 1, "wandb": "disabled"},
        **more,
    )


def test_a_run_stopped_while_its_images_are_small_is_used_at_their_size(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cnn = {"name": "cnn", "options": {"widths": [4, 8, 16]}, "precision": "fp32"}
    growing = {"model": cnn, "augment": {"size": {0: 14, 2: 28}}}  # of 3 epochs, 3 steps each
    run = tmp_path / "run"

    def stopped_at(step: int) -> Trained:
        with monkeypatch.context() as patch:
            patch.setattr("fmnist.runtime.stop_vote.StopVote.__call__", lambda _: next(steps) == step)
            patch.setattr("fmnist.runtime.stop_vote.StopVote.reason", "SIGTERM", raising=False)
            steps = itertools.count(json.loads((run / "summary.json").read_text())["steps"] + 1 if run.exists() else 1)
            go(run, data, 3, **growing)
        return open_trained(run)

    before = stopped_at(2)  # nothing was validated
    assert before.checkpoint == "step_00000002" and before.size == 14
    trained = stopped_at(4)
    summary = json.loads((run / "summary.json").read_text())
    assert trained.weights == run / MODEL and summary["weights_step"] == 3 and summary["val.size"] == 14
    assert trained.size == 14
    assert fmnist.open_run(run).evaluate("val")["top1"] == pytest.approx(summary["val.top1"], abs=1e-9)
    trained = stopped_at(7)  # one step at 28 px, the best is still that of step 6
    assert trained.size == 14 and open_trained(run / "checkpoints" / "step_00000007").size == 28
    go(run, data, 3, **growing)
    summary = json.loads((run / "summary.json").read_text())
    assert open_trained(run).size == 28 and summary["weights_step"] == 9 and "val.size" not in summary


def test_weights_without_validation_numbers_are_used_at_the_size_they_were_trained_at(
    tmp_path: Path, data: Path
) -> None:
    """Whatever length config.yaml says: that of a run that was continued, say, and killed before its first save."""
    cnn = {"name": "cnn", "options": {"widths": [4, 8, 16]}, "precision": "fp32"}
    run = tmp_path / "run"
    go(run, data, 2, model=cnn, augment={"size": {0: 14, 2: 28}}, val_size=0)  # 4 steps an epoch; {0: 14, 1: 28}
    assert json.loads((run / "summary.json").read_text())["weights_size"] == 28
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("epochs: 2.0", "epochs: 12.0"))
    sizes = {int(path.name[-8:]): open_trained(path).size for path in (run / "checkpoints").iterdir()}
    assert min(sizes) <= 4 < max(sizes) and sizes == {step: 14 if step <= 4 else 28 for step in sizes}
    assert open_trained(run).size == 28


def test_no_validation_numbers_of_weights_that_were_lost_stand_in_the_summary(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Checkpoints.export

    def export(checkpoints: Checkpoints, step: int, target: Path) -> tuple[str, int]:
        (checkpoints.path(step) / EMA).write_bytes(b"damaged")
        return whole(checkpoints, step, target)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "export", export)
        go(tmp_path / "run", data, 2)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [name for name in summary if name.startswith("val.")] == ["val.top1"] and summary["val.top1"] is None
    assert summary["weights_sha256"] == sha256_of(tmp_path / "run" / MODEL) and summary["status"] == "finished"
    assert "summary.json has no validation numbers of these weights" in capsys.readouterr().err
    go(tmp_path / "whole", data, 2)
    assert json.loads((tmp_path / "whole" / "summary.json").read_text())["val.top1"] > 0.1


def test_no_report_of_other_weights_is_left_beside_those_of_a_continued_run(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, reports = tmp_path / "run", ("evaluation/test/report.txt", "evaluation/val-0123abcd/metrics.json")
    kept = ("evaluation/step_00000003/test/report.txt", "evaluation/test/notes.txt", "outside/report.txt")
    go(run, data, 1)
    for name in (*reports, *kept):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("of step 3")
    (run / "evaluation/train").symlink_to(run / "outside")
    before = sha256_of(run / MODEL)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr("fmnist.checkpoint.store.write_atomic", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        Checkpoints(run / "checkpoints", 1, {}).export(3, run / MODEL)  # the same weights: all stays
    assert all((run / name).is_file() for name in (*reports, *kept))
    go(run, data, 2)  # without test images, see go
    assert sha256_of(run / MODEL) != before and not any((run / name).exists() for name in reports)
    assert all((run / name).is_file() for name in kept)
    assert not (run / "evaluation/val-0123abcd").exists()
    assert "model.safetensors is replaced: the evaluations of the weights before are deleted" in capsys.readouterr().err


@pytest.mark.thorough
def test_with_a_constant_learning_rate_it_ends_with_the_bits_of_one_long_run(data: Path, tmp_path: Path) -> None:
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    assert go(parts, data, 1).summary["steps"] == 3
    done = go(parts, data, 2)
    assert (done.summary["status"], done.summary["steps"], done.summary["epochs"]) == ("finished", 6, 2.0)
    go(whole, data, 2)
    last = Path("checkpoints/step_00000006")
    for name in (MODEL, OPTIMIZER):
        assert (parts / last / name).read_bytes() == (whole / last / name).read_bytes()
    assert [line["step"] for line in done.metrics() if line["prefix"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert "continuing a run of 3 steps from step 3 to 6: the learning rate stays" in (parts / "train.log").read_text()
    assert open_trained(parts / "checkpoints/step_00000003")  # older checkpoints are still of this run
    assert inspect(parts)[1] == []
    before = (parts / MODEL).read_bytes()
    shutil.rmtree(parts / "checkpoints")  # to save room: there is nothing to continue
    with pytest.raises(ValueError, match="is finished and holds no checkpoint to go on from"):
        go(parts, data, 3)
    assert (parts / MODEL).read_bytes() == before and open_trained(parts).summary["status"] == "finished"


@pytest.mark.thorough
def test_a_kill_while_it_goes_on_loses_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, unbroken = tmp_path / "run", tmp_path / "unbroken"
    go(run, data, 1, "cosine")
    shutil.copytree(run, unbroken)
    go(unbroken, data, 3, "cosine")

    def killed(*_: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr("fmnist.run.Run.captured", killed)  # config.yaml is written, no step is made
        go(run, data, 3, "cosine")
    assert json.loads((run / "summary.json").read_text())["status"] == "stopped"
    assert open_trained(run).weights == run / MODEL  # nothing newer yet
    go(run, data, 3, "cosine")
    last = Path("checkpoints/step_00000009") / MODEL
    assert (run / last).read_bytes() == (unbroken / last).read_bytes()
    assert "jumps from" in capsys.readouterr().err
    go(run, data, 3, "cosine")
    said = capsys.readouterr().err
    assert "is finished" in said and "to train longer, raise --schedule.epochs" in said
    with pytest.raises(ValueError, match="schedule.epochs was 3.0, now 2"):
        go(run, data, 2, "cosine")
