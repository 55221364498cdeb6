"""The output goes away, and Ctrl-C at any moment: a run goes on, and what was interrupted ends with one line."""

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SMALL_RUN, environment, execute, metrics, train
from PIL import Image

from fmnist.apps.cutout import Cutout
from fmnist.apps.predict.predictions import Prediction, write_predictions
from fmnist.apps.views import Photo
from fmnist.runtime.console import keep_at_interrupt

DOOR = "import os, signal, sys, time\nfrom fmnist.runtime.console import *\nopen_door('program')\n"


def shell(command: str, cwd: Path = ROOT, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a command line in bash, where $PYTHON is this Python."""
    return execute("bash", "-c", command, env=environment() | {"PYTHON": sys.executable}, cwd=cwd, timeout=timeout)


def program(folder: Path, code: str) -> Path:
    """Write a program that has gone through the door."""
    path = folder / "program.py"
    path.write_text(DOOR + code)
    return path


SPEAK = """
for number in range(5000):
    print("result", number)
    sys.stderr.write("message\\n")
open(sys.argv[1], "a").write("done")
"""
READERS = ("2>&1 | head -1", "2>/dev/full", "2>&-", "2>&- >&- <&-", ">&-", "| head -1", "2>&1 >/dev/null | head -1")


@pytest.mark.parametrize("readers", READERS)
def test_a_program_goes_on_without_readers(readers: str, tmp_path: Path) -> None:
    path, file = program(tmp_path, SPEAK), tmp_path / "file"
    done = shell(f'"$PYTHON" {path} {file} {readers}; exit ${{PIPESTATUS[0]}}')
    assert file.read_text() == "done"  # nothing else: a closed descriptor is not given to a file
    assert done.returncode == 0
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.parametrize("count", [1, 5000])
def test_results_that_a_full_disk_has_lost_are_an_error(count: int, tmp_path: Path) -> None:
    path = program(tmp_path, f"with one_line_errors('program'):\n  print('result\\n' * {count})\n")
    done = shell(f'"$PYTHON" {path} >/dev/full')
    assert (done.returncode, done.stderr) == (1, "program: error: [Errno 28] No space left on device\n")


def test_any_name_can_be_printed(tmp_path: Path) -> None:
    path = program(tmp_path, "print(chr(252))")
    done = shell(f'LC_ALL=C PYTHONCOERCECLOCALE=0 PYTHONUTF8=0 "$PYTHON" {path}')
    assert (done.returncode, done.stdout) == (0, "\\xfc\n")


# Ctrl-C


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("os.kill(os.getpid(), 2); time.sleep(9)", -signal.SIGINT, "program: interrupted\n"),
        ("os.kill(os.getpid(), 2)\ntry: time.sleep(9)\nexcept BaseException: pass", -2, "program: interrupted\n"),
        ("raise KeyboardInterrupt", -2, "program: interrupted\n"),
        ("raise KeyboardInterrupt('3 rows\\nare kept')", -2, "program: interrupted; 3 rows are kept\n"),
        ("with one_line_errors('program'): raise KeyboardInterrupt", -2, "program: interrupted\n"),
        (
            "with keep_at_interrupt() as stopped: os.kill(os.getpid(), 2); time.sleep(9)\nprint(stopped)\n"
            "os.kill(os.getpid(), 2); time.sleep(9)",
            *(-2, "program: interrupted\n"),
        ),
    ],
)
def test_an_interrupt_is_one_line(code: str, status: int, said: str) -> None:
    done = execute(sys.executable, "-c", DOOR + code, cwd=ROOT, timeout=30)
    assert (done.returncode, done.stderr) == (status, said)


def test_an_error_keeps_its_traceback_and_a_job_in_the_background_its_signals(tmp_path: Path) -> None:
    done = shell(f'"$PYTHON" {program(tmp_path, "raise RuntimeError(1)")}')
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "Traceback (most recent call last):"
    code = "with keep_at_interrupt() as stopped: os.kill(os.getpid(), 2)\n"
    path = program(tmp_path, f"{code}os.kill(os.getpid(), 2)\nprint('lived', stopped)")
    done = shell(f"trap '' INT; \"$PYTHON\" {path}")
    assert (done.returncode, done.stdout) == (0, "lived []\n")


def test_what_was_made_before_an_interrupt_is_kept() -> None:
    before, made = signal.getsignal(signal.SIGINT), []
    with keep_at_interrupt() as interrupted:
        for number in range(9):
            made.append(number)
            if number == 3:
                signal.raise_signal(signal.SIGINT)
    assert (made, bool(interrupted)) == ([0, 1, 2, 3], True)
    with keep_at_interrupt() as interrupted:
        pass
    assert not interrupted
    assert signal.getsignal(signal.SIGINT) is before


def predictions(count: int) -> Iterator[Prediction]:
    cutout = Cutout(view=np.zeros((28, 28), np.uint8), box=(0, 0, 9, 9), inverted=False)
    for number in range(9):
        if number == count:
            signal.raise_signal(signal.SIGINT)
        photo = Photo(name=f"{number}.png", image=Image.new("RGB", (9, 9)), cutout=cutout)
        yield Prediction(photo=photo, top=(("Bag", 0.9), ("Coat", 0.1)))


def test_predict_keeps_the_rows_that_are_done(tmp_path: Path) -> None:
    args = argparse.Namespace(output=tmp_path, top=2, sheet=0, json=False)
    with pytest.raises(KeyboardInterrupt, match=r"predictions.csv holds the 4 pictures that are done"):
        write_predictions(predictions(4), args, "title")
    lines = (tmp_path / "predictions.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["file", "0.png", "1.png", "2.png", "3.png"]
    with pytest.raises(KeyboardInterrupt):  # before the first: what is there stays
        write_predictions(predictions(0), args, "title")
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 5


# Whole programs


@pytest.mark.thorough
def test_a_run_finishes_whatever_becomes_of_its_output(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL_RUN)
    train("--config", tmp_path / "small.yaml", "--output_dir", tmp_path / "expected")
    for name, redirect in (("head", "2>&1 | head -3"), ("full", ">/dev/full 2>&1"), ("closed", "2>&- >&- <&-")):
        command = f'"$PYTHON" train.py --config {tmp_path}/small.yaml --output_dir {tmp_path / name} {redirect}'
        done = shell(f"{command}; exit ${{PIPESTATUS[0]}}", timeout=200)
        run, expected = tmp_path / name, tmp_path / "expected"
        assert done.returncode == 0, (name, done.stdout, done.stderr)
        assert (run / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
        assert metrics(run) == metrics(expected)
        assert json.loads((run / "summary.json").read_text())["status"] == "finished"
        told, wanted = ((each / "train.log").read_text() for each in (run, expected))
        assert told.count("\n") == wanted.count("\n"), name


# Sends Ctrl-C when a module of this name is about to be imported, and runs what a command runs.
INTERRUPTED = """
import os, runpy, signal, sys

class AtImport:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, AtImport())
module, program, sys.argv = sys.argv[1], sys.argv[2], sys.argv[2:]
if program.endswith(".py"):
    runpy.run_path(program, run_name="__main__")
elif program == "script":
    from fmnist.__main__ import main
    main()
else:
    runpy.run_module(program, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("program", ["train.py", "evaluate.py", "fmnist", "script"])
@pytest.mark.parametrize("module", ["fmnist.runtime.console", "hashlib", "argparse"])
def test_ctrl_c_during_the_first_imports_is_no_traceback(program: str, module: str) -> None:
    done = execute(sys.executable, "-c", INTERRUPTED, module, program, cwd=ROOT, timeout=60)
    assert done.returncode == -signal.SIGINT, (done.stdout, done.stderr)
    assert done.stderr in ("", f"{program}: interrupted\n")


def test_a_job_in_the_background_ignores_ctrl_c_from_the_start() -> None:
    ignored = f"import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n{INTERRUPTED}"
    done = execute(sys.executable, "-c", ignored, "fmnist.runtime.console", "fmnist", "--help", cwd=ROOT, timeout=60)
    assert done.returncode == 0 and "usage: fmnist" in done.stdout, done.stderr


@pytest.mark.thorough
def test_ctrl_c_at_any_moment_of_the_start_is_one_line(tmp_path: Path) -> None:
    commands = {
        "train.py": [ROOT / "train.py", "--output_dir", tmp_path / "run", "--log.wandb", "disabled"],
        "fmnist benchmark": ["-m", "fmnist", "benchmark", "data", "--sizes", "28"],
        "fmnist doctor": ["-m", "fmnist", "doctor"],
    }
    ended = set()
    for seconds in (1.0, 2.0, 3.5, 5.0):  # not earlier: a busy machine is still in the interpreter then
        for name, command in commands.items():
            started = subprocess.Popen(
                [sys.executable, *map(str, command)],
                env=environment(), cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            time.sleep(seconds)
            started.send_signal(signal.SIGINT)
            _, said = started.communicate(timeout=120)
            # Done, or stopped with a checkpoint; or ended by the signal, without a word while it is still importing.
            assert started.returncode in (0, -signal.SIGINT) and "Traceback" not in said, (seconds, name, said)
            if started.returncode and said:
                assert said.splitlines()[-1] == f"{name}: interrupted", (seconds, said)
                ended.add(name)
    assert ended == set(commands)
