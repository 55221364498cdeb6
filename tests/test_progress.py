"""What a person sees of a run: a line an epoch everywhere, a bar on a terminal that moves while a step takes long."""

import logging
import os
import pty
import subprocess
import sys
from collections.abc import Iterator

import pytest
from conftest import environment

from fmnist.checkpoint.contents import TrainState
from fmnist.tracking import progress as module
from fmnist.tracking.progress import Progress, duration, has_width


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("fmnist")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def watched(step: list[int], every: int = 10, best: float | None = None, by: str = "top1") -> Progress:
    """A run of 3 epochs of 10 steps that validates after `every` steps and at its end; its best is a constant."""
    progress = Progress(
        lambda: step[0],
        lambda number: number % every == 0 or number == 30,
        total_steps=30,
        steps_per_epoch=10,
        best=lambda: best,
        by=by,
    )
    progress.start()
    return progress


def test_an_epoch_is_one_line(said: list[str], clock: list[float]) -> None:
    progress = watched([0], best=0.9124)
    progress.log("train", {"loss": 0.5, "images_per_second": 1000.0}, 5)
    progress.log("train", {"loss": 0.3, "images_per_second": 1258.4}, 10)
    clock[0] += 20  # 10 steps in 20 s: 2 s a step, 20 steps are left
    progress.log("val", {"top1": 0.9124, "loss": 0.2}, 10)
    progress.log("train", {"loss": 0.2, "images_per_second": 1300.0, "images_per_second_overall": 1100.4}, 20)
    clock[0] += 5  # 0.5 s a step since the last line
    progress.log("val", {"top1": 0.9, "loss": 0.2}, 20)
    progress.log("test", {"top1": 0.9}, 30)
    assert said == [
        "epoch 1/3  step 10  train loss 0.4000  val top1 91.24 % (best 91.24 %)  1,258 images/s  0:40 left",
        "epoch 2/3  step 20  train loss 0.2000  val top1 90.00 % (best 91.24 %)  1,300 images/s (1,100 overall)"
        "  0:05 left",
    ]


def test_a_resumed_run_knows_its_best(said: list[str], clock: list[float]) -> None:
    progress = watched([10], best=0.95)
    clock[0] += 10
    progress.log("val", {"top1": 0.9}, 20)
    assert said == ["epoch 2/3  step 20  val top1 90.00 % (best 95.00 %)  0:10 left"]


def test_numbers_at_two_image_sizes_are_not_compared(said: list[str], clock: list[float]) -> None:
    state = TrainState()
    progress = Progress(
        lambda: state.step, lambda _: True, total_steps=30, steps_per_epoch=10, best=lambda: state.best_val.get("top1")
    )
    vals = {"top1": 0.9, "size": 20.0}, {"top1": 0.8}, {"top1": 0.7}, {"top1": float("nan")}
    for state.step, val in zip((10, 20, 25, 30), vals, strict=True):
        clock[0] += 10
        state.update_best(val)
        progress.log("val", val, state.step)
    assert [line.partition("  val ")[2].partition("  0:")[0] for line in said] == [
        "top1 90.00 % (best 90.00 %)  at 20 px",
        "top1 80.00 % (best 80.00 %)",
        "top1 70.00 % (best 80.00 %)",
        "top1 nan % (best 80.00 %)",
    ]


@pytest.mark.parametrize(
    ("by", "told"),
    [
        ("macro_f1", "val top1 90.00 %  val macro F1 80.00 % (best 85.00 %)"),
        ("loss", "val top1 90.00 %  val loss 0.2000 (best 0.8500)"),
    ],
)
def test_the_number_that_chooses_the_epoch_is_shown_with_its_best(
    said: list[str], clock: list[float], by: str, told: str
) -> None:
    progress = watched([10], best=0.85, by=by)
    clock[0] += 10
    progress.log("val", {"top1": 0.9, "macro_f1": 0.8, "loss": 0.2}, 20)
    assert said == [f"epoch 2/3  step 20  {told}  0:10 left"]


def test_epochs_without_a_validation_have_their_line_too(said: list[str], clock: list[float]) -> None:
    progress = watched([0], every=30)
    for step in (8, 12, 18, 24, 30):
        clock[0] += 1
        progress.log("train", {"loss": 1.0}, step)
    progress.log("val", {}, 30)  # no validation images are held out
    assert [line.split("  ")[1] for line in said] == ["step 12", "step 24", "step 30"]
    assert all("val" not in line for line in said)


def test_a_long_epoch_is_not_silent(said: list[str], clock: list[float]) -> None:
    progress = watched([0])
    progress.log("train", {"loss": 1.0}, 1)
    clock[0] += 59
    progress.log("train", {"loss": 1.0}, 2)
    assert said == []
    clock[0] += 2
    progress.log("train", {"loss": 0.7}, 3)
    assert said == ["epoch 0.3/3  step 3  train loss 0.9000  9:09 left"]  # 61 s / 3 steps x 27 steps


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.4, 42, 725, 11220)] == ["0:00", "0:42", "12:05", "3:07:00"]


BAR = """
import time
from fmnist.tracking.progress import Progress
step = [0]
progress = Progress(lambda: step[0], lambda number: False, total_steps=30, steps_per_epoch=10)
progress.start()
step[0] = 7
time.sleep(1.6)  # one long step: the bar moves meanwhile
step[0] = 30
progress.close()
progress.close()
"""


@pytest.mark.parametrize("columns", [80, 40, 0])
def test_the_bar_moves_while_a_step_takes_long(columns: int) -> None:
    ours, theirs = pty.openpty()
    os.set_inheritable(theirs, True)
    if columns:
        subprocess.run(["stty", "cols", str(columns), "rows", "24"], stdin=theirs, check=True)
    done = subprocess.run([sys.executable, "-c", BAR], stderr=theirs, env=environment(), timeout=60, check=True)
    os.close(theirs)
    drawn = b""
    while True:
        try:
            drawn += (chunk := os.read(ours, 65536))
        except OSError:  # how Linux tells that the other end is closed
            break
        if not chunk:
            break
    os.close(ours)
    assert done.returncode == 0
    if not columns:  # tqdm would draw nothing: there the lines say everything
        assert drawn == b""
        return
    assert b"7/30" in drawn and b"30/30" in drawn
    assert max(len(line.decode()) for line in drawn.replace(b"\n", b"\r").split(b"\r")) <= columns


def test_no_bar_where_stderr_is_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_width()  # pytest's own
    monkeypatch.setattr(sys, "stderr", None)
    assert not has_width()  # pythonw, and a closed stderr
