"""The queue of experiments: what has no result is run, what was killed goes on, and a search sees no test image."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from experiments.queue import Entry, read_queue, resolved, table

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
    return subprocess.run([*command, *more], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.thorough
def test_everything_is_run_once_and_a_search_has_no_test_images(queue: list[str], tmp_path: Path) -> None:
    done = call(queue)
    assert done.returncode == 0, done.stderr
    results = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()}
    assert set(results) == {"final_seed0", "final_seed1", "tried_seed0"}
    final, tried = results["final_seed0"], results["tried_seed0"]
    assert final["seed"] == 0 and results["final_seed1"]["seed"] == 1
    assert final["val.top1"] == max(entry["top1"] for entry in final["val"]) and len(final["val"]) == 2  # at 6 and 12
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
def test_killed_with_its_trainer_it_goes_on_where_that_was(queue: list[str], tmp_path: Path) -> None:
    only, killed = [*queue, "--only", "tried"], tmp_path / "runs" / "tried_seed0"
    process = subprocess.Popen(only, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not (killed / "checkpoints" / "step_00000003").exists():  # of 12 steps
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a", "expected a list of entries"),
        ("- {name: a, config: c, seed: 1}", "got an unexpected keyword argument 'seed'"),
        ("- {name: a}", "missing 1 required keyword-only argument: 'config'"),
        ("- {name: a, config: c}\n- {name: a, config: d}", "a is there twice"),
    ],
)
def test_a_mistake_in_the_queue_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "queue.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_queue(path)


def test_the_projects_own_queue_is_valid_and_its_results_belong_to_it() -> None:
    entries = read_queue(ROOT / "experiments" / "queue.yaml")
    for entry in entries:
        resolved(entry, entry.seeds[0])
    names = {f"{entry.name}_seed{seed}" for entry in entries for seed in entry.seeds}
    assert {path.stem for path in (ROOT / "experiments" / "results" / "queue").glob("*.json")} <= names
    assert table([Entry(name="none", config="c")], ROOT / "nowhere").endswith("| none | 0/1 | - | - | - |  |")
