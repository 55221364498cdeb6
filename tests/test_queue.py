"""The queue of experiments: what has no result is run, what was killed goes on, and a search sees no test image."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, execute

from experiments import queue as running
from experiments import queue_job
from experiments.median_stopping import lags
from experiments.queue import Queue
from experiments.queue_entries import Entry, chosen, in_order, resolved
from experiments.queue_file import read_queue
from experiments.queue_job import take_lock
from experiments.queue_results import curve, plan, table

QUEUE = """
- name: final
  config: {config}
  seeds: [0, 1]
- name: tried
  config: {config}
  flags: {{optim.lr: 0.01, augment.size: "{{0: 20, 1: 28}}"}}
  search: true
  note: a higher rate
"""


@pytest.fixture
def queue(small_config: Path) -> list[str]:
    """The command of a queue of three small runs in a folder of its own."""
    folder = small_config.parent
    (folder / "queue.yaml").write_text(QUEUE.format(config=small_config))
    options = (("queue", "queue.yaml"), ("results", "results"), ("runs", "runs"))
    return [sys.executable, "-m", "experiments.queue", *(f"--{key}={folder / name}" for key, name in options)]


def call(command: list[str], *more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return execute(*command, *more, env=environment, cwd=ROOT)


# A trainer of some milliseconds: validations whose top1 comes to the learning rate, and train.py's files.
TRAINER = """
import json, signal, sys, time
from pathlib import Path
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
run, lr = Path(flags["--output_dir"]), float(flags.get("--optim.lr", 0.5))
Path("log").open("a").write(f"{run.name} {flags.get('--threads')}\\n")
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
if "fails" in run.name:
    sys.exit(2)
epochs = 16 if "long" in run.name else 4
done = sum(1 for _ in (run / "metrics.jsonl").open()) if (run / "metrics.jsonl").exists() else 0
while done < epochs and not stopped:
    time.sleep(0.06)
    done += 1
    line = {"step": done, "epoch": done, "prefix": "val", "top1": lr * done / epochs, "loss": 1 - lr}
    (run / "metrics.jsonl").open("a").write(json.dumps(line) + "\\n")
summary = {"status": "finished" if done == epochs else "stopped", "val.top1": lr * done / epochs, "steps": done}
summary |= dict.fromkeys(("model", "parameters", "epochs", "images_per_second", "train_seconds"), 1)
summary |= {"device": "cpu", "versions": {}, "git_revision": "", "test.top1": lr, "test.loss": 1, "test.num_images": 2}
summary.pop("test.loss" if "broken" in run.name else "", None)
(run / "evaluation" / "test").mkdir(parents=True, exist_ok=True)
test = {"top1_interval": [0, 1], "confusion_matrix": [[1, 0], [0, 1]], "macro_f1": 1, "balanced_accuracy": 1}
(run / "evaluation" / "test" / "metrics.json").write_text(json.dumps(test))
(run / "summary.json").write_text(json.dumps(summary))
"""


@pytest.fixture
def stand_in(tmp_path: Path, small_config: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make queues of the entries given, whose trainer is the script above; real processes, locks and signals."""
    (tmp_path / "train.py").write_text(TRAINER)
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(queue_job, "ROOT", tmp_path)
    monkeypatch.setattr(running, "POLL_S", 0.02)

    def make(text: str, **kwargs: Any) -> Queue:
        (tmp_path / "queue.yaml").write_text(text.replace("CONFIG", str(small_config)))
        return Queue(read_queue(tmp_path / "queue.yaml"), tmp_path / "results", tmp_path / "runs", **kwargs)

    return make


def started(tmp_path: Path) -> list[list[str]]:
    """Name and threads of each start of the stand-in, in order."""
    return [line.split() for line in (tmp_path / "log").read_text().splitlines()]


def read_all(tmp_path: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").glob("*.json")}


def test_variants_and_grids_are_entries_and_first_seeds_come_first(tmp_path: Path) -> None:
    (tmp_path / "queue.yaml").write_text(
        "- {name: a, config: c, seeds: [0, 1], flags: {seed: 5}, minutes: {x: 1.5},"
        " variants: {x: {optim.lr: 1}, 7: {optim.lr: 2}}}\n"
        "- {name: b, config: c, seeds: [3, 4], grid: {optim.lr: [0.1, 1], augment.size: [28, {0: 20}]}}\n"
        "- {name: c, config: c, search: true, stop_after: 2, grid: {optim.lr: [0.1]}}\n"
    )
    entries = read_queue(tmp_path / "queue.yaml")
    x, seven, *trials, tuned, searched = entries
    assert (x.name, x.label, x.flags, x.minutes) == ("a_x", "x", {"seed": 5, "optim.lr": 1}, 1.5)
    assert (seven.name, seven.flags["optim.lr"], seven.minutes) == ("a_7", 2, 0)
    assert [trial.name for trial in trials] == [
        *("b_lr_0.1_size_28", "b_lr_0.1_size_0_20", "b_lr_1_size_28", "b_lr_1_size_0_20")
    ]
    assert all(trial.search and trial.seeds == [3] and trial.stop_after is None for trial in trials)
    assert tuned.trials == tuple(trial.name for trial in trials) and tuned.seeds == [3, 4] and not tuned.search
    assert searched.name == "c_lr_0.1" and searched.stop_after == 2 and searched.varied == {"optim.lr": 0.1}
    order = [(entry.name, seed) for entry, seed in in_order(entries)]
    assert order[:4] == [("a_x", 0), ("a_7", 0), ("a_x", 1), ("a_7", 1)]
    assert order[8:] == [("b", 3), ("b", 4), ("c_lr_0.1", 0)]
    text = plan(in_order(entries), 2)
    assert "| a | 4 | 3 |" in text and "0.0 hours on 2 cores" in text  # two seeds of 1.5 minutes


def test_the_best_trial_gives_its_options(stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")  # of a machine's 16
    queue = stand_in("- {name: a, config: CONFIG, seeds: [0, 1], grid: {optim.lr: [0.2, 0.6, 0.4]}}", jobs=2)
    final = queue.entries[-1]
    assert chosen(final, queue.entries, queue.results) is None  # no trial has a result
    queue.work()
    found = read_all(tmp_path)
    assert set(found) == {"a_lr_0.2_seed0", "a_lr_0.6_seed0", "a_lr_0.4_seed0", "a_seed0", "a_seed1"}
    for seed in (0, 1):
        assert found[f"a_seed{seed}"]["options"]["optim.lr"] == 0.6 and found[f"a_seed{seed}"]["test.top1"] == 0.6
    assert not any(key.startswith("test") for key in found["a_lr_0.6_seed0"])
    names = [line[0] for line in started(tmp_path)]
    assert len(names) == 5 and set(names[3:]) == {"a_seed0", "a_seed1"}  # neither before the last trial has ended
    assert {line[1] for line in started(tmp_path)} == {"3"}  # a half of them
    again = stand_in("- {name: a, config: CONFIG, seeds: [0, 1], grid: {optim.lr: [0.2, 0.6, 0.4]}}")
    assert again.left == []
    with pytest.raises(ValueError, match=r"a_seed0.json is of another optim.lr"):  # another rate would win now
        path = tmp_path / "results" / "a_lr_0.4_seed0.json"
        path.write_text(json.dumps(found["a_lr_0.4_seed0"] | {"val.top1": 0.7}))
        stand_in("- {name: a, config: CONFIG, seeds: [0, 1], grid: {optim.lr: [0.2, 0.6, 0.4]}}")


def test_what_fails_leaves_the_rest_alone(stand_in: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queue = stand_in(
        "- {name: fails, config: CONFIG, grid: {optim.lr: [0.2, 0.6]}}\n- {name: broken, config: CONFIG}\n"
        "- {name: after, config: CONFIG}",
        jobs=2,
    )
    queue.work()
    assert queue.failed == 4  # two trials, the run that wanted their best, and one without a number
    said = capsys.readouterr().out
    assert "trials without a result, so not run: fails" in said
    assert "--- broken_seed0 has no result: KeyError 'test.loss'" in said
    assert [path.stem for path in queue.results.iterdir()] == ["after_seed0"]
    with pytest.raises(ValueError, match="--only nowhere: the queue has no such entry"):
        stand_in("- {name: after, config: CONFIG}", only=["nowhere", "after"])


def test_two_queues_share_the_work_and_take_over(stand_in: Any, tmp_path: Path) -> None:
    text = "- {name: a, config: CONFIG, seeds: [0, 1, 2, 3, 4]}"
    queues = [stand_in(text, jobs=2), stand_in(text)]
    held = take_lock(tmp_path / "runs" / "a_seed4")  # a third that dies later
    assert held is not None and take_lock(tmp_path / "runs" / "a_seed4") is None
    threads = [threading.Thread(target=queue.share) for queue in queues]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while len(read_all(tmp_path)) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1.0)  # for one that would not wait
    assert all(thread.is_alive() for thread in threads) and "a_seed4" not in read_all(tmp_path)
    os.close(held)
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(line[0] for line in started(tmp_path)) == [f"a_seed{seed}" for seed in range(5)]  # once each
    assert set(read_all(tmp_path)) == {f"a_seed{seed}" for seed in range(5)}
    assert [queue.left for queue in queues] == [[], []]


def test_a_signal_reaches_all_trainers_and_what_they_took_is_known(stand_in: Any, tmp_path: Path) -> None:
    text = "- {name: long, config: CONFIG, seeds: [0, 1, 2]}"
    queue = stand_in(text, jobs=2)
    before = signal.getsignal(signal.SIGTERM)
    runs = [tmp_path / "runs" / f"long_seed{seed}" for seed in range(3)]

    def interrupt() -> None:
        while not all((run / "metrics.jsonl").exists() for run in runs[:2]):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    queue.work()
    assert queue.stopped_by == "SIGTERM" and signal.getsignal(signal.SIGTERM) == before and queue.failed == 0
    assert [json.loads((run / "summary.json").read_text())["status"] for run in runs[:2]] == ["stopped"] * 2
    assert not runs[2].exists() and read_all(tmp_path) == {}
    stand_in(text, jobs=2).work()
    found = read_all(tmp_path)
    assert [found[f"long_seed{seed}"]["starts"] for seed in range(3)] == [2, 2, 1]
    assert all(result["cpu_seconds"] is not None and len(result["val"]) == 16 for result in found.values())


def test_trials_that_lag_are_stopped_and_say_so(stand_in: Any, tmp_path: Path) -> None:
    text = "- {name: long, config: CONFIG, search: true, stop_after: 3, grid: {optim.lr: [0.8, 0.7, 0.6, 0.1, 0.75]}}"
    queue = stand_in(text)
    queue.work()
    found = read_all(tmp_path)
    # Of the first three none has three others to be held against. At epoch 3 the fourth has 0.1 * 3 / 16, the others
    # 0.7 * 3 / 16 in the middle; the fifth is above the median of 0.8, 0.7, 0.6, and the fourth does not count.
    stopped = {name: result.get("stopped_at_epoch") for name, result in found.items()}
    assert [name for name, epoch in stopped.items() if epoch] == ["long_lr_0.1_seed0"]
    assert 3 <= stopped["long_lr_0.1_seed0"] < 16
    assert len(found["long_lr_0.1_seed0"]["val"]) == stopped["long_lr_0.1_seed0"]
    assert stand_in(text).left == []  # it has its result
    rows = table(queue.entries, queue.results).splitlines()
    assert rows[5].endswith(f"stopped at epoch {stopped['long_lr_0.1_seed0']:g} |")


def test_lagging_is_below_the_median_of_those_that_came_as_far() -> None:
    def points(*top1: float) -> list[dict[str, float]]:
        return [{"epoch": number + 1, "top1": value} for number, value in enumerate(top1)]

    others = [points(0.5, 0.9), points(0.6, 0.7, 0.8), points(0.4, 0.5, 0.9)]  # by epoch 2: 0.9, 0.7, 0.5
    assert lags(points(0.6, 0.69), others, after=2)
    assert not lags(points(0.6, 0.7), others, after=2)  # the median itself does not lag
    assert not lags(points(0.71, 0.1), others, after=2)  # its best so far counts
    assert not lags(points(0.6, 0.69), others, after=3)
    assert not lags(points(0.1, 0.1, 0.1), others, after=2)  # only two came to epoch 3
    assert not lags([], others, after=0) and not lags(points(0.1), [[], [], []], after=0)


def test_a_curve_has_the_seconds_of_its_steps(tmp_path: Path) -> None:
    lines = [
        {"step": 10, "prefix": "train", "loss": 1, "step_time_s": 0.5},  # 10 steps: 5 s
        {"step": 15, "epoch": 1.0, "prefix": "val", "top1": 0.1, "loss": 9},  # a resumed run logs a step again
        {"step": 15, "epoch": 1.0, "prefix": "val", "top1": 0.5, "loss": 2},  # 5 of the next window: 5 s more
        {"step": 20, "prefix": "train", "loss": 1, "step_time_s": 1.0},  # 10 s
        {"step": 24, "epoch": 1.6, "prefix": "val", "top1": 0.6, "loss": 1},  # 4 beyond the last, at its speed: 4 s
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3')
    assert curve(tmp_path) == [
        {"epoch": 1.0, "top1": 0.5, "loss": 2, "seconds": 10.0},
        {"epoch": 1.6, "top1": 0.6, "loss": 1, "seconds": 19.0},
    ]
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines[2]))
    assert curve(tmp_path) == [{"epoch": 1.0, "top1": 0.5, "loss": 2}] and curve(tmp_path / "none") == []


@pytest.mark.thorough
def test_everything_is_run_once_and_a_search_has_no_test_images(queue: list[str], tmp_path: Path) -> None:
    done = call(queue, "--jobs", "2")
    assert done.returncode == 0, done.stderr
    results = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()}
    assert set(results) == {"final_seed0", "final_seed1", "tried_seed0"}
    final, tried = results["final_seed0"], results["tried_seed0"]
    assert final["seed"] == 0 and results["final_seed1"]["seed"] == 1
    assert final["val.top1"] == max(entry["top1"] for entry in final["val"]) and len(final["val"]) == 2  # at 6 and 12
    first, last = (entry["seconds"] for entry in final["val"])
    assert 0 < first < last < final["wall_seconds"]
    assert final["steps"] == 12 and final["starts"] == 1 and 0 < final["cpu_seconds"] < 300
    low, high = final["test.top1_interval"]
    assert low < final["test.top1"] < high and final["test.num_images"] == 10_000
    assert final["test.top1"] != results["final_seed1"]["test.top1"]

    assert not any(key.startswith("test") for key in tried)
    assert not (tmp_path / "runs" / "tried_seed0" / "evaluation").exists()
    assert tried["options"]["optim.lr"] == 0.01 and tried["options"]["augment.size"] == {"0": 20, "1": 28}
    assert "--evaluation.test false --seed 0" in tried["command"] and tried["note"] == "a higher rate"

    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").iterdir()}
    again = call(queue)
    assert again.returncode == 0 and "---" not in again.stdout
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "results").iterdir()}
    rows = call(queue, "--table").stdout.splitlines()
    mean = 50 * (final["test.top1"] + results["final_seed1"]["test.top1"])  # of two, in percent
    assert rows[2].startswith("| final | 2/2 | ") and f" {mean:.2f} ± " in rows[2]
    assert rows[3].startswith("| tried | 1/1 | ") and rows[3].endswith(" | - | " + rows[3].split(" | ", 4)[4])


@pytest.mark.thorough
def test_a_real_trial_that_lags_is_stopped_and_the_search_is_drawn(small_config: Path, tmp_path: Path) -> None:
    (tmp_path / "queue.yaml").write_text(
        f"- {{name: rates, config: {small_config}, search: true, stop_after: 0.001, grid: {{optim.lr: [0.003, 0.002,"
        " 0.004, 0.0000001]}, flags: {schedule.steps: 200, evaluation.every_steps: 10, checkpoint.every_steps: 0}}\n"
    )
    *others, slow = read_queue(tmp_path / "queue.yaml")
    (tmp_path / "r").mkdir()
    for other in others:  # those are done
        points = [{"epoch": 0.001, "top1": 0.3, "loss": 2.0}, {"epoch": 0.2, "top1": 0.8, "loss": 1.0}]
        content = {"options": resolved(other, 0), "val": points, "val.top1": 0.8, "cpu_seconds": 9.0}
        content["date"] = "2026-11-28"
        (tmp_path / "r" / f"{other.name}_seed0.json").write_text(json.dumps(content))
    places = [
        f"--{name}={tmp_path / file}" for name, file in (("queue", "queue.yaml"), ("results", "r"), ("runs", "s"))
    ]
    command = [sys.executable, "-m", "experiments.queue", *places]
    done = call(command)
    assert done.returncode == 0, done.stderr
    assert "--- rates_lr_1e_07_seed0 lags behind and is stopped" in done.stdout
    lagging = json.loads((tmp_path / "r" / f"{slow.name}_seed0.json").read_text())
    assert lagging["stopped_at_epoch"] == lagging["val"][-1]["epoch"] and 10 <= lagging["steps"] < 200
    assert lagging["val.top1"] == max(point["top1"] for point in lagging["val"]) < 0.3  # the least of the others
    assert lagging["starts"] == 1 and lagging["cpu_seconds"] > 0
    drawn = call(command, "--slices", str(tmp_path / "figures"))
    assert drawn.stdout.split() == [str(tmp_path / "figures" / "rates.png")]
    assert (tmp_path / "figures" / "rates.png").stat().st_size > 10_000
    rows = call(command, "--table", "--only", "rates_lr_0.002").stdout.splitlines()
    assert len(rows) == 3 and rows[2] == "| rates_lr_0.002 | 1/1 | 80.00 | - | 9 | 2026-11-28 |  |"


@pytest.mark.thorough
def test_killed_with_its_trainer_it_goes_on_where_that_was(queue: list[str], tmp_path: Path) -> None:
    only, killed = [*queue, "--only", "tried"], tmp_path / "runs" / "tried_seed0"
    process = subprocess.Popen(only, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while max((killed / "checkpoints").glob("step_*"), default=Path()).name < "step_00000003":  # of 12 steps
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "results" / "tried_seed0.json").exists()
    done = call(only)
    assert done.returncode == 0 and "resuming from" in done.stderr
    result = json.loads((tmp_path / "results" / "tried_seed0.json").read_text())
    assert result["steps"] == 12 and result["starts"] == 2
    assert result["cpu_seconds"] is None  # what the first start took is not known


def test_an_entry_keeps_its_meaning(queue: list[str], tmp_path: Path) -> None:
    entry = read_queue(tmp_path / "queue.yaml")[0]
    (tmp_path / "results").mkdir()
    for seed in entry.seeds:
        options = {**resolved(entry, seed), "optim.lr": 0.5}
        (tmp_path / "results" / f"final_seed{seed}.json").write_text(json.dumps({"options": options}))
    done = call(queue)
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        "final_seed0.json is of another optim.lr: give the entry another name, or delete it"
    )


def test_text_reaches_train_py_as_it_was_written() -> None:
    entry = Entry(name="a", config="c", flags={"data.root": "/für/a\\b", "optim.lr": 0.1, "model.weights": None})
    given = entry.arguments(1, Path("run"))[2:-4]
    assert given == ["--data.root", "/für/a\\b", "--optim.lr", "0.1", "--model.weights", "null"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a", "expected a list of entries"),
        ("- {name: a, config: c, seed: 1}", "got an unexpected keyword argument 'seed'"),
        ("- {name: a}", "missing 1 required keyword-only argument: 'config'"),
        ("- {name: a, config: c}\n- {name: a, config: d}", "a is there twice"),
        ("- a", "expected a list of entries"),
        ("- {name: a, config: c, stop_after: 2}", "a: stop_after has no effect: there is no grid"),
        ("- {name: a, config: c, grid: [1, 2]}", r"a: grid is \[1, 2\]; expected a list of values by option"),
        ("- {name: a, config: c, grid: {optim.lr: 0.1}}", "a: grid is {'optim.lr': 0.1}; expected a list of values"),
        ("- {name: a, config: c, grid: {optim.lr: []}}", "a: grid is {'optim.lr': .*}; expected a list of values"),
        ("- {name: a, config: c, variants: {}}", "a: variants is {}; expected flags by label"),
        ("- {name: a, config: c, variants: {x: 1}}", "a: variants is {'x': 1}; expected flags by label"),
        ("- {name: a, config: c, variants: {x: {}}, minutes: {y: 1}}", "a: minutes names y, which is no variant"),
        ("- {name: a, config: c, seeds: []}", r"a: seeds is \[\]; expected different whole numbers"),
        ("- {name: a, config: c, seeds: [1, 1]}", r"a: seeds is \[1, 1\]; expected different whole numbers"),
        ("- {name: a, config: c, seeds: 3}", "a: seeds is 3; expected different whole numbers"),
        ("- {name: 5, config: c}", "5: name is 5; expected text"),
        ("- {name: a, config: [c]}", r"a: config is \['c'\]; expected text"),
        ("- {name: a, config: c, note: 5}", "a: note is 5; expected text"),  # once a traceback of --table
        ("- {name: a, config: c, search: maybe}", "a: search is 'maybe'; expected true or false"),  # once it was true
        ("- {name: a/b, config: c}", "a/b: a name is part of file names and holds no /"),  # once trained, then lost
        ("- {name: a, config: c, variants: {x/y: {}}}", "a_x/y: a name is part of file names and holds no /"),
        ("- {name: a, config: c, flags: 3}", "a: flags is 3; expected values by option"),
        ("- {name: a, config: c, flags: null}", "a: flags is None; expected values by option"),
        ("- {name: a, config: c, minutes: five}", "a: minutes is 'five'; expected a number"),
        ("- {name: a, config: c, variants: {x: {}}, minutes: {x: y}}", "a: minutes is {'x': 'y'}; expected a number"),
        ("- {name: a, config: c, stop_after: five, grid: {x: [1]}}", "a: stop_after is 'five'; expected a number of"),
        ("- {name: a, config: c, stop_after: 0, grid: {x: [1]}}", "a: stop_after is 0; expected a number of epochs"),
        ("- {name: a, config: c, stop_after: true, grid: {x: [1]}}", "a: stop_after is True; expected a number of"),
        ("- {name: b, config: c}\n- {name: a, config: c, seed: 1}", "queue.yaml: a: got an unexpected keyword"),
        ("- {name: b, config: c}\n- {config: c}", "queue.yaml: entry 2: missing 1 required"),
    ],
)
def test_a_mistake_in_the_queue_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "queue.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_queue(path)


def test_a_queue_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}/absent.yaml: there is no such file"):
        read_queue(tmp_path / "absent.yaml")


def test_the_projects_own_queue_is_valid_and_its_results_belong_to_it() -> None:
    entries = read_queue(ROOT / "experiments" / "queue.yaml")
    for entry in entries:
        resolved(entry, entry.seeds[0])
        assert len(f"{entry.name}_seed{entry.seeds[0]}") <= 64  # of a run directory
    left = Queue(entries, ROOT / "nowhere", ROOT / "nowhere").left
    assert sum(entry.minutes for entry, _ in left) <= 20 * 60 + 60  # ten hours of two cores, and what is done already
    results = ROOT / "experiments" / "results" / "queue"
    assert len(Queue(entries, results, ROOT / "nowhere").left) < len(left)  # ValueError where one is of other options
    names = {f"{entry.name}_seed{seed}" for entry in entries for seed in entry.seeds}
    assert {path.stem for path in results.glob("*.json")} <= names
    assert table([Entry(name="none", config="c")], ROOT / "nowhere").endswith("| none | 0/1 | - | - | - | - |  |")
