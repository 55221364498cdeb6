"""Signals to launchers and ranks: a checkpoint at the next step, no orphan, the weights of an unbroken run."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, SMALL_RUN, environment, warm_train

pytestmark = pytest.mark.thorough

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")
LAUNCHERS = {"torchrun": (TORCHRUN, 2), "accelerate": (ACCELERATE, 1)}
SETTINGS = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGUSR1", "PET_SHUTDOWN_TIMEOUT": "60"}
STEPS = 60  # several processes agree on a stop every ten quick steps


def mentioning(text: str) -> list[psutil.Process]:
    """Return the live processes that have this text in their command line."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = process.info["cmdline"] or []
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(text in part for part in line):
            found.append(process)
    return found


def wait_for(met: Callable[[], object], seconds: float, what: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, what()
        time.sleep(0.05)


def flags(folder: Path, run: Path) -> list[Path | str]:
    """Return those of a small run, whose config is written to a folder."""
    config = folder / "small.yaml"
    config.write_text(SMALL_RUN.replace("steps: 12", f"steps: {STEPS}"))
    return ["--config", config, "--output_dir", run]


def start(launcher: str, folder: Path, run: Path) -> "subprocess.Popen[bytes]":
    """Start the small run through a launcher; its messages go to a file beside the run directory."""
    # A job in the background of a shell script ignores SIGINT, and so would what it starts; a handler is not inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nor may it ignore this one because the tests run under nohup
    command = [sys.executable, *LAUNCHERS[launcher][0], str(ROOT / "train.py"), *flags(folder, run)]
    with run.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, env=environment() | SETTINGS, stdout=log, stderr=log, start_new_session=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Unbroken runs by launcher, made when first asked for."""
    return {"folder": tmp_path_factory.mktemp("whole")}


def unbroken(whole: dict[str, Path], launcher: str) -> Path:
    if launcher not in whole:
        whole[launcher] = whole["folder"] / launcher
        warm_train(*flags(whole["folder"], whole[launcher]), processes=LAUNCHERS[launcher][1])
    return whole[launcher]


@pytest.fixture
def no_leftovers(tmp_path: Path) -> Iterator[None]:
    """Kill what a failed test has left."""
    yield
    for process in psutil.process_iter(["cmdline"]):
        if any(str(tmp_path) in part for part in process.info["cmdline"] or []):
            process.kill()


def by_rank(run: Path) -> list[psutil.Process]:
    def trains(process: psutil.Process) -> bool:
        words = process.cmdline()
        return any(word.endswith("train.py") for word in words[1:3])  # a launcher's comes later

    found = [process for process in mentioning(str(run)) if trains(process)]
    return sorted(found, key=lambda process: int(process.environ().get("RANK", "0")))


def stop(launcher: str, target: str, number: signal.Signals, folder: Path, run: Path) -> None:
    """Start a run, send one signal to the launcher or a rank in its first steps, and wait until all is over."""
    child = start(launcher, folder, run)
    log = run.with_suffix(".log")

    def stepping() -> bool:
        assert child.poll() is None, log.read_text()[-3000:]
        return (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size > 0

    wait_for(stepping, 240, lambda: f"first step\n{log.read_text()[-3000:]}")
    ranks = by_rank(run)
    assert len(ranks) == LAUNCHERS[launcher][1]
    ranks[0].suspend()  # so that the run is not over before the signal arrives; a pending signal waits for resume()
    assert not (run / "summary.json").exists(), "the run was over before it could be signalled"
    (psutil.Process(child.pid) if target == "launcher" else ranks[int(target)]).send_signal(number)
    ranks[0].resume()
    child.wait(90)
    # The launcher may be gone before the last save: what counts is that nobody is left behind.
    wait_for(lambda: not mentioning(str(run)), 30, lambda: f"the end of all\n{log.read_text()[-3000:]}")


QUICK = [
    ("torchrun", "launcher", signal.SIGUSR1),
    ("torchrun", "1", signal.SIGTERM),
    ("accelerate", "launcher", signal.SIGTERM),
    ("accelerate", "0", signal.SIGHUP),
]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
TARGETS = [
    ("torchrun", "launcher"),
    ("torchrun", "0"),
    ("torchrun", "1"),
    ("accelerate", "launcher"),
    ("accelerate", "0"),
]
MATRIX = [(*target, number) for target in TARGETS for number in SIGNALS if (*target, number) not in QUICK]


@pytest.mark.parametrize(
    ("launcher", "target", "number"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in MATRIX)],
)
def test_a_signal_saves_and_stops_and_the_same_command_ends_with_the_same_weights(
    launcher: str,
    target: str,
    number: signal.Signals,
    whole: dict[str, Path],
    tmp_path: Path,
    no_leftovers: None,
) -> None:
    run = tmp_path / "run"
    stop(launcher, target, number, tmp_path, run)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert 0 < summary["steps"] < STEPS
    assert (run / "REQUEUE").exists()
    assert (run / "checkpoints" / f"step_{summary['steps']:08d}" / "manifest.json").exists()
    if target == "launcher":
        assert start(launcher, tmp_path, run).wait(240) == 0, run.with_suffix(".log").read_text()[-3000:]
    else:
        warm_train(*flags(tmp_path, run), processes=LAUNCHERS[launcher][1])
    assert f"resuming from {run}/checkpoints/step_{summary['steps']:08d}" in (run / "train.log").read_text()
    assert not (run / "REQUEUE").exists()
    weights = [(path / "model.safetensors").read_bytes() for path in (run, unbroken(whole, launcher))]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_two_signals_in_a_row_stop_once(whole: dict[str, Path], tmp_path: Path, no_leftovers: None) -> None:
    run = tmp_path / "run"
    child = start("torchrun", tmp_path, run)
    wait_for(
        lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size, 240, lambda: "first step"
    )
    held = by_rank(run)[0]
    held.suspend()
    for process in by_rank(run):
        process.send_signal(signal.SIGTERM)
    child.send_signal(signal.SIGTERM)
    held.resume()
    child.wait(90)
    assert json.loads((run / "summary.json").read_text())["status"] == "stopped"
    assert start("torchrun", tmp_path, run).wait(240) == 0
    assert (run / "model.safetensors").read_bytes() == (unbroken(whole, "torchrun") / "model.safetensors").read_bytes()
