"""fmnist benchmark accuracy: figures from recorded files, what it does with runs that fail, and one real race."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, environment
from filelock import FileLock

from fmnist.benchmark import accuracy, accuracy_rows
from fmnist.benchmark.__main__ import main
from fmnist.benchmark.accuracy_rows import measured, report, summarize
from fmnist.config.parse import parse_config
from fmnist.config.same_run import OF_A_START, run_yaml
from fmnist.run import Run
from fmnist.runtime.provenance import git_revision, versions
from fmnist.tracking.metrics_file import metric_name
from fmnist.training.clock import Clock

# A run that holds 93 % from its second evaluation on: the clock stops at its end, and not at the third.
LINES = [
    {"step": 50, "epoch": 0.5, "prefix": "train", "loss": 0.9, "elapsed_seconds": 12.0, "processor_seconds": 20.0},
    {"step": 100, "epoch": 1.0, "prefix": "val", "top1": 0.91, "elapsed_seconds": 20.0, "processor_seconds": 35.0},
    {"step": 200, "epoch": 2.0, "prefix": "val", "top1": 0.93, "elapsed_seconds": 31.5, "processor_seconds": 58.0},
    {"step": 300, "epoch": 3.0, "prefix": "val", "top1": 0.92, "elapsed_seconds": 43.0, "processor_seconds": 81.0},
]
SUMMARY: dict[str, Any] = {
    "status": "finished",
    "test.top1": 0.935,
    "startup_seconds": 6.5,
    "startup_processor_seconds": 9.0,
    "device": "CPU (x86_64), 2 threads",
}


def record(directory: Path, lines: list[dict[str, Any]] = LINES, **changed: Any) -> Path:
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = {"git_revision": git_revision(), "versions": versions()}
    summary = {key: value for key, value in (SUMMARY | made | changed).items() if value is not ...}
    (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def test_the_clock_stops_at_the_first_evaluation_that_holds_the_target(tmp_path: Path) -> None:
    assert measured(record(tmp_path / "run"), 0.93) == {
        "test_top1": 0.935,
        "step": 200,
        "epoch": 2.0,
        "val_top1": 0.93,
        "seconds": 31.5,
        "processor_seconds": 58.0,
        "seconds_from_step_0": 25.0,  # 31.5 - 6.5
        "processor_seconds_from_step_0": 49.0,  # 58 - 9
    }
    assert measured(tmp_path / "run", 0.5)["seconds"] == 20.0


def test_a_run_that_misses_says_why(tmp_path: Path) -> None:
    run = record(tmp_path / "run")
    assert measured(run, 0.9301) == {"test_top1": 0.935, "missed": "best validation top1 93.00 %"}
    unconfirmed = measured(record(tmp_path / "unlucky", **{"test.top1": 0.9299}), 0.93)
    assert unconfirmed["missed"] == "test top1 92.99 %" and unconfirmed["seconds"] == 31.5
    broken = [line | {"top1": None} if line["prefix"] == "val" else line for line in LINES]  # of a NaN
    assert measured(record(tmp_path / "broken", broken), 0.5)["missed"] == "best validation top1 0.00 %"


@pytest.mark.parametrize(
    ("lines", "changed", "words"),
    [
        (LINES[:1], {}, "evaluated no validation images"),
        (LINES, {"test.top1": ...}, "holds no test.top1"),
        (LINES, {"startup_seconds": ...}, "holds no startup_seconds"),
        ([{"step": 1, "epoch": 1.0, "prefix": "val", "top1": 0.95}], {}, "holds no elapsed_seconds"),
        # stopped after step 50 and resumed by hand: 9 s is the second start's clock, 12 + 9 s it took
        ([LINES[0], LINES[2] | {"elapsed_seconds": 9.0}], {}, "was trained in several starts, so its times are lost"),
    ],
)
def test_a_run_without_the_numbers_is_one_line(
    lines: list[dict[str, Any]], changed: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        measured(record(tmp_path / "run", lines, **changed), 0.93)


def rows() -> list[dict[str, Any]]:
    """Two runs that count, 10 s apart, one that misses, one that died."""
    first = {"seed": 0, "epoch": 2.0, "val_top1": 0.93, "test_top1": 0.935, "seconds": 31.5, "processor_seconds": 58.0}
    first |= {"seconds_from_step_0": 25.0, "processor_seconds_from_step_0": 49.0}
    second = first | {"seed": 2, "seconds": 41.5, "seconds_from_step_0": 35.0}
    missed = {"seed": 1, "test_top1": 0.92, "missed": "best validation top1 92.80 %"}
    return [first, missed, second, {"seed": 3, "missed": "killed by signal 9: no output"}]


def test_mean_and_standard_deviation_are_over_the_runs_that_count() -> None:
    found = summarize(rows())
    assert found["reached"] == 2
    assert found["missed"] == {"seed_1": "best validation top1 92.80 %", "seed_3": "killed by signal 9: no output"}
    assert found["mean"] == {
        "seconds": 36.5,
        "processor_seconds": 58.0,
        "seconds_from_step_0": 30.0,
        "processor_seconds_from_step_0": 49.0,
    }
    # of two values 10 apart: 10 / sqrt(2)
    assert found["standard_deviation"]["seconds"] == pytest.approx(7.0710678)
    assert found["standard_deviation"]["processor_seconds"] == 0
    assert summarize(rows()[1:2])["mean"] == summarize(rows()[:1])["standard_deviation"] == {}


def test_the_table_names_every_run() -> None:
    head, _, first, missed, *_, mean, std, last = report(rows(), 0.93).splitlines()
    assert " ".join(head.split()) == "seed epoch val top1 test top1 seconds processor s from step 0 processor s missed"
    assert first.split() == ["0", "2", "93.00%", "93.50%", "31.5", "58.0", "25.0", "49.0", "-"]
    assert missed.split()[:4] == ["1", "-", "-", "92.00%"] and missed.rstrip().endswith("92.80 %")
    assert mean.split() == ["mean", "-", "-", "-", "36.5", "58.0", "30.0", "49.0", "-"]
    assert std.split()[4] == "7.1"
    assert last == (
        "2 of 4 runs reached 93.00 % on the validation images, confirmed by the test images; missed: seed_1, seed_3"
    )


@pytest.mark.parametrize(("key", "other"), [("git_revision", "abc"), ("versions", {"torch": "1"})])
def test_runs_of_other_code_are_not_mixed_in(key: str, other: Any, tmp_path: Path) -> None:
    record(tmp_path / "seed_0")
    assert accuracy_rows.made_by(tmp_path, [{"seed": 0, "test_top1": 0.9}])["hardware"]["device"] == SUMMARY["device"]
    record(tmp_path / "seed_1", **{key: other})
    with pytest.raises(ValueError, match=f"seed_1 is not comparable .{key}"):
        accuracy_rows.made_by(tmp_path, [{"seed": 0, "test_top1": 0.9}, {"seed": 1, "test_top1": 0.9}])


def test_a_runs_lines_hold_the_time_since_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[Any] = []
    tracker = SimpleNamespace(log=lambda *line: logged.append(line))
    run: Any = SimpleNamespace(clock=lambda: 12.5, began=2.0, steps_per_epoch=10, tracker=tracker)
    monkeypatch.setattr("time.process_time", lambda: 20.25)
    Run.log(run, "val", {"top1": 0.9}, 5)
    Run.log(run, "val", {}, 5)  # nothing was evaluated: a line for people alone
    spent = {"elapsed_seconds": 10.5, "processor_seconds": 20.25}
    assert logged == [("val", {"top1": 0.9} | spent, 5, 0.5), ("val", {}, 5, 0.5)]
    assert metric_name("val", "elapsed_seconds") == "perf/elapsed_seconds"


def test_the_clock_notes_when_the_first_step_began(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(100)
    monkeypatch.setattr("time.monotonic", lambda: 7.0)
    monkeypatch.setattr("time.process_time", lambda: 3.5)
    clock.start()
    assert (clock.started, clock.processor_before) == (7.0, 3.5)


# --- runs, of a script that stands in for train.py ----------------------------------------------------------------

STAND_IN = """
import json, os, pathlib, signal, sys, time
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
run = pathlib.Path(options["--output_dir"])
if (run / "summary.json").exists():
    raise SystemExit
run.mkdir(exist_ok=True)
(run / "train.log").open("a").write(f"seed {options['--seed']}\\n")
how = (run.parent / "how").read_text()
if how == "waits":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit((run / "told").touch()))
    (run / "ready").touch()
    time.sleep(60)
if how == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if how == "refuses":
    sys.exit(print("train.py: error: no such weights", file=sys.stderr) or 2)
if how == "raises":
    raise RuntimeError("not finite")
print("trained")
(run / "summary.json").write_text(json.dumps({"status": how}))
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "train.py").write_text(STAND_IN)
    monkeypatch.setattr(accuracy, "shipped", lambda name: tmp_path / name)
    return tmp_path


def run_once(folder: Path, how: str) -> str:
    (folder / "how").write_text(how)
    return accuracy.train(folder / "seed_0", ["--seed", "0", "--output_dir", str(folder / "seed_0")])


def test_a_run_that_ends_early_is_named_and_trained_anew_the_next_time(stand_in: Path) -> None:
    log = stand_in / "seed_0.txt"
    assert run_once(stand_in, "dies") == f"killed by signal 9: no output ({log})"
    assert run_once(stand_in, "raises") == f"exit status 1: RuntimeError: not finite ({log})"
    assert run_once(stand_in, "stopped") == f"stopped before its end ({log})"
    assert run_once(stand_in, "finished") == ""
    # each began from nothing: its times are those of the whole run
    assert (stand_in / "seed_0/train.log").read_text() == "seed 0\n"
    before = (stand_in / "seed_0/summary.json").stat().st_mtime_ns
    output = log.read_text()
    assert run_once(stand_in, "raises") == ""  # finished: train.py compares its options, and leaves it
    assert (stand_in / "seed_0/summary.json").stat().st_mtime_ns == before
    assert log.read_text() == output and output.endswith("not finite\ntrained\ntrained\n")


def test_options_that_train_py_refuses_end_the_race(stand_in: Path) -> None:
    with pytest.raises(ValueError, match="^no such weights$"):
        run_once(stand_in, "refuses")


def test_a_run_that_another_process_trains_is_left_alone(stand_in: Path) -> None:
    run_once(stand_in, "stopped")
    with (
        FileLock(stand_in / "seed_0/.lock"),
        pytest.raises(ValueError, match="in use by another process: wait .* --output"),
    ):
        run_once(stand_in, "finished")
    assert (stand_in / "seed_0/train.log").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_ends_with_the_process_that_started_it(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(STAND_IN)
    (tmp_path / "how").write_text("waits")
    run = tmp_path / "seed_0"
    start = (
        "import pathlib, sys; from fmnist.benchmark import accuracy; run = pathlib.Path(sys.argv[1]);"
        "accuracy.shipped = lambda name: run.parent / name;"
        "accuracy.train(run, ['--seed', '0', '--output_dir', str(run)])"
    )
    command = subprocess.Popen([sys.executable, "-c", start, str(run)], cwd=ROOT)
    for file in ("ready", "told"):
        deadline = time.monotonic() + 60
        while not (run / file).exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        command.send_signal(number)
        command.wait(60)


# --- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "required: --target"),
        (["--target", "93"], "--target: '93' is not valid; valid range: 0.01 to 1"),
        (["--target", "0.9", "--runs", "0"], "valid range: 1 to 1000"),
        (["--target", "0.9", "--sead", "1"], "unknown option --sead"),
        (["--target", "0.9", "--config", "absent.yaml"], "absent.yaml"),
        (["--target", "0.9", "--", "--seed", "3"], "--seed after --"),
        (["--target", "0.9", "--", "--output_dir=x"], "--output_dir after --"),
        (["--target", "0.9", "--", "--config", "configs/mlp.yaml"], "--config after --: give it before"),
        (["--target", "0.9", "--", "--config=configs/mlp.yaml"], "--config after --: give it before"),
        (["--target", "0.9", "--", "--optim.lrr", "1"], "did you mean optim.lr"),
        (["--target", "0.9", "--", "--evaluation.test", "false"], "evaluation.test is false"),
        (["--target", "0.9", "--", "--max_minutes", "3"], "max_minutes is 3"),
        (["--target", "0.9", "--", "--dry_run"], "dry_run is True"),
        (["--target", "0.9", "--", "--resume", "never"], "resume is never"),
        (["--target", "0.9", "--", "--profile", "3"], "profile is 3"),
        (["--target", "0.9", "--output", "x.json"], "valid: a folder"),
        (["--target", "0.9", "--output", "taken"], "seed_7 was not made by this command"),
        (["--target", "0.9", "--output", "foreign"], "accuracy.json was not made by this command"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    argv: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken/seed_7").mkdir(parents=True)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/accuracy.json").write_text("{}")
    with pytest.raises(SystemExit) as end:
        main(["accuracy", *argv])
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert len(lines) == 1 and words in lines[0] and lines[0].startswith("fmnist benchmark accuracy: error: ")
    assert {path.name for path in tmp_path.iterdir()} == {"taken", "foreign"}


def test_options_of_one_start_are_refused_since_no_run_keeps_them() -> None:
    assert accuracy.WHOLE.keys() == set(OF_A_START)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--schedule.epochs", "9"], "schedule.epochs was 2.0, now 9.0"),  # train.py would go on, with a second clock
        (["--model.compile", "true"], "model.compile was false, now true"),  # changes nothing but the time
        (["--log.wandb", "online"], "log.wandb was disabled, now online"),
        (["--evaluation.every_steps", "7"], "evaluation.every_steps was null, now 7"),
    ],
)
def test_a_run_that_is_there_keeps_its_options_and_its_figures(
    changed: list[str], words: str, stand_in: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(stand_in)
    options = ["--config", "configs/mlp.yaml", "--schedule.epochs", "2", "--log.wandb", "disabled"]
    argv = ["accuracy", "--target", "0.9", "--output", "race", "--runs", "3", *options[:2], "--", *options[2:]]
    run = record(stand_in / "race/seed_2")  # the others are missing: nothing of them may be trained first
    cfg = replace(parse_config([*options, "--seed", "2", "--output_dir", "elsewhere"]), profile=3)
    (run / "config.yaml").write_text(run_yaml(cfg))
    figures = '{"name": "accuracy", "rows": [1]}'
    (stand_in / "race/accuracy.json").write_text(figures)
    (stand_in / "race/how").write_text("refuses")
    with pytest.raises(SystemExit):
        main([*argv, *changed])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"race/seed_2 holds a run with another config: {words}: give another --output" in line
    assert {path.name for path in (stand_in / "race").iterdir()} == {"seed_2", "accuracy.json", "how"}

    with pytest.raises(SystemExit):  # with its own options it is train.py that refuses
        main(argv)
    assert "no such weights" in capsys.readouterr().err
    assert (stand_in / "race/accuracy.json").read_text() == figures

    (stand_in / "race/how").write_text("raises")
    assert main(argv) == 0
    rows = json.loads((stand_in / "race/accuracy.json").read_text())["rows"]
    assert ["missed" in row for row in rows] == [True, True, False]


def test_another_commit_leaves_the_figures(stand_in: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(stand_in)
    record(stand_in / "race/seed_0", git_revision="abc")
    figures = stand_in / "race/accuracy.json"
    figures.write_text('{"name": "accuracy", "rows": [1]}')
    with pytest.raises(SystemExit):
        main(["accuracy", "--target", "0.9", "--output", "race", "--runs", "1", "--config", "configs/mlp.yaml"])
    assert "seed_0 is not comparable (git_revision abc" in capsys.readouterr().err
    assert figures.read_text() == '{"name": "accuracy", "rows": [1]}'


@pytest.mark.thorough
def test_a_race_is_resumed_and_its_targets_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)

    def race(target: float, runs: int, lr: float = 0.002) -> int:
        argv = ["accuracy", "--config", "configs/mlp.yaml", "--target", str(target), "--runs", str(runs)]
        short = ["--schedule.steps", "40", "--schedule.warmup_epochs", "0", "--evaluation.every_steps", "20"]
        return main([*argv, "--output", "race", "--", *short, "--optim.lr", str(lr), "--log.wandb", "disabled"])

    # an MLP is beyond 70 % after 20 steps
    assert race(0.5, 1) == 0
    weights = tmp_path / "race/seed_0/model.safetensors"
    stamp = weights.stat().st_mtime_ns
    assert race(0.5, 2) == 0
    assert weights.stat().st_mtime_ns == stamp
    assert "2 of 2 runs reached 50.00 %" in capfd.readouterr().out
    result = json.loads((tmp_path / "race/accuracy.json").read_text())
    assert {"name", "command", "date", "hardware", "versions", "git_revision", "config", "target"} <= result.keys()
    assert "--optim.lr" in result["train_options"] and result["hardware"]["device"].startswith("CPU")
    for seed, found in enumerate(result["rows"]):
        summary = json.loads((tmp_path / f"race/seed_{seed}/summary.json").read_text())
        assert summary["seed"] == found["seed"] == seed
        assert 0 < found["seconds_from_step_0"] < found["seconds"]  # imports and data come before step 0
        assert 0 < found["processor_seconds_from_step_0"] < found["processor_seconds"]
        assert found["step"] in (20, 40) and found["test_top1"] == summary["test.top1"] > 0.5
        assert found["seconds_from_step_0"] == pytest.approx(found["seconds"] - summary["startup_seconds"])
    assert result["mean"]["seconds"] == pytest.approx(sum(found["seconds"] for found in result["rows"]) / 2)

    assert race(0.99, 1) == 1  # of runs that are there
    said = capfd.readouterr().out
    assert "0 of 1 run reached 99.00 %" in said and "missed: seed_0" in said
    assert weights.stat().st_mtime_ns == stamp
    with pytest.raises(SystemExit) as end:  # another recipe in the same folder
        race(0.5, 1, lr=0.01)
    (line,) = capfd.readouterr().err.splitlines()
    assert end.value.code == 2 and "seed_0 holds a run with another config: optim.lr" in line
