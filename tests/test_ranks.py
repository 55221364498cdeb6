"""One process of two dies or hangs: the other ends soon and names it, and the last checkpoint loads."""

import json
import re
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, environment, train, warm_train

import fmnist.runtime.lost_process
from fmnist.checkpoint.contents import read_state
from fmnist.checkpoint.store import Checkpoints
from fmnist.config.schema import Config
from fmnist.runtime.heartbeat import LINGER_S, NEVER, Beat, Waiting
from fmnist.runtime.lost_process import describe_loss, is_lost_process


def lose(
    rank: int, kind: str, tmp_path: Path, config: Path, *more: object, processes: int = 2, within_s: float = 60
) -> Path:
    flags = ["--config", config, "--output_dir", tmp_path, "--batch.micro_batch_size", 16, *more]
    done = train(kind, *flags, processes=processes, script=ROOT / "tests/inject.py", check=False)
    ended = time.time()
    assert done.returncode != 0
    dead = kind in ("killed", "rank_0_killed", "exception")  # else it hangs: the launcher cannot know which did
    said = set(re.findall(r"rank (\d) ends: rank (\d) (?:is gone|does not answer)", done.stderr))
    assert said <= {(str(other), str(rank)) for other in range(processes) if other != rank}, done.stderr
    assert said or dead, done.stderr
    if dead:
        root_cause = done.stderr.partition("Root Cause")[2]  # torchrun's own summary
        assert re.search(rf"rank\s*: {rank} ", root_cause), done.stderr
    if kind == "exception":
        assert "KeyError: 'planted'" in done.stderr
    newest = Checkpoints(tmp_path / kind / "checkpoints", 2, {}).newest_good()
    assert newest is not None
    # The last one before step 7; where who writes it is killed, perhaps the one before.
    assert read_state(newest).step in ((5, 6) if kind == "rank_0_killed" else (6,))
    assert ended - newest.stat().st_mtime < within_s  # from the last save to the end of all processes
    return newest


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["killed", "exception"])
def test_a_dead_rank_ends_the_other_at_once(
    kind: str, tmp_path: Path, small_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PET_MONITOR_INTERVAL", "1")  # even a launcher that seldom looks finds the dead one first
    lose(1, kind, tmp_path, small_config)


@pytest.mark.thorough
def test_rank_0_of_three_killed_ends_the_others_at_once(tmp_path: Path, small_config: Path) -> None:
    lose(0, "rank_0_killed", tmp_path, small_config, "--batch.global_batch_size", 48, processes=3)


@pytest.mark.thorough
def test_a_hanging_rank_ends_the_other_after_the_timeout(tmp_path: Path, small_config: Path) -> None:
    lose(1, "hang", tmp_path, small_config, "--timeout_s", 3)


@pytest.mark.parametrize(
    ("kind", "seconds", "timeout_s"),
    [
        pytest.param("compiles", 8, 3, marks=pytest.mark.thorough),
        pytest.param("compiles_for_a_minute", 60, Config().timeout_s, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_compiles_in_the_first_step_and_for_a_new_size_is_waited_for(
    kind: str, seconds: float, timeout_s: float, tmp_path: Path, small_config: Path
) -> None:
    """As with a cold cache: it takes longer than `timeout_s`, in steps in which compiling is to be expected."""
    assert seconds > timeout_s
    growing = ("--data.limit", 192, "--augment.size", "{0: 20, 1: 28}", "--timeout_s", timeout_s)  # six steps an epoch
    flags = ["--config", small_config, "--output_dir", tmp_path, "--batch.micro_batch_size", 16, *growing]
    done = warm_train(kind, *flags, processes=2, script=ROOT / "tests/inject.py", check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / kind / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 12)
    assert summary["share_outside_steps"] > 0 and summary["images_per_second_overall"] < 12 * 32 / seconds


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "kind", "processes"), [(1, "frozen", 2), (0, "rank_0_hangs", 3)])
def test_whoever_hangs_ends_the_others_after_the_timeout(
    rank: int, kind: str, processes: int, tmp_path: Path, small_config: Path
) -> None:
    flags = ("--timeout_s", 3, "--batch.global_batch_size", 16 * processes)
    lose(rank, kind, tmp_path, small_config, *flags, processes=processes)


@pytest.mark.slow
def test_the_default_timeout_ends_the_other_within_a_minute(tmp_path: Path, small_config: Path) -> None:
    newest = lose(1, "hang", tmp_path, small_config, within_s=110)  # torchrun gives who hangs half a minute more
    last_words = tmp_path / "hang/train.log"
    assert "rank 0 ends: rank 1 does not answer" in last_words.read_text()
    assert last_words.stat().st_mtime + LINGER_S - newest.stat().st_mtime < 60


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("[../gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:3457", True),
        ("[../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation to complete", True),
        ("Operation timed out!", True),
        ("Application timeout caused pair closure", True),
        ("NCCL error in: ../ProcessGroupNCCL.cpp, unhandled system error", True),
        ("CUDA out of memory. Tried to allocate 2 GiB", False),
        ("mat1 and mat2 shapes cannot be multiplied (8x3 and 4x10)", False),
    ],
)
def test_only_a_failed_collective_is_laid_to_another_process(text: str, lost: bool) -> None:
    assert is_lost_process(RuntimeError(text)) == lost


def test_the_lost_rank_is_named_where_it_can_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "[Rank 0]: Ranks 1, 3 failed to pass monitoredBarrier in 5000 ms": "rank 1, 3 does not answer",
        "Rank 2 successfully reached monitoredBarrier, but received errors while waiting for send/recv from rank 0.": (
            "rank 0 does not answer"
        ),
        "Connection reset by peer": "another rank does not answer",
    }
    for answer, expected in answers.items():

        def barrier(answer: str = answer, **_: object) -> None:
            raise RuntimeError(answer)

        monkeypatch.setattr(torch.distributed, "monitored_barrier", barrier)
        assert describe_loss(RuntimeError("Application timeout"), None, [1, 2, 3]).startswith(expected)
    assert describe_loss(RuntimeError("Connection closed by peer"), None, [1]) == "rank 1 is gone"
    monkeypatch.setattr(torch.distributed, "monitored_barrier", lambda **_: None)  # everyone answers after all
    assert describe_loss(RuntimeError("Application timeout"), None, [0, 2]).startswith("another rank does not answer")
    monkeypatch.setattr(torch.distributed, "monitored_barrier", lambda **_: time.sleep(30))
    monkeypatch.setattr(fmnist.runtime.lost_process, "PROBE", timedelta(seconds=0.1))
    assert describe_loss(RuntimeError("Application timeout"), None, [0, 2]).startswith("rank 0 does not answer")


def test_only_a_process_that_keeps_another_waiting_is_lost() -> None:
    waiting = Waiting()
    mine = Beat(1, 10, 5)
    assert not waiting.waits(mine) and waiting.waits(Beat(2, 10, 5))
    behind, level, later = Beat(1, 9, 5), Beat(1, 10, 5), Beat(1, 10, 4)

    def lost(others: dict[int, Beat], seconds: float) -> list[int]:
        """Let each process beat, but begin nothing, for so long."""
        found: list[int] = []
        for number in range(round(seconds)):
            found = waiting.lost({rank: beat._replace(number=number) for rank, beat in others.items()}, 1.0, 3.0)
        return found

    assert lost({1: level, 2: behind}, 3) == []
    assert lost({1: level, 2: behind}, 2) == [2]  # not rank 1, which waits too, or computes for long
    assert waiting.waits(Beat(3, 10, 5)) and not waiting.waits(Beat(4, 11, 5)) and waiting.waits(Beat(5, 11, 5))
    assert lost({1: level, 2: behind}, 3) == []  # counted anew after a step of its own
    assert lost({1: level._replace(world=11), 2: behind._replace(world=10)}, 3) == []  # rank 2 has begun another one
    assert lost({1: later._replace(world=11)}, 500) == []  # what rank 0 does alone may take ten minutes
    assert lost({1: later._replace(world=11)}, 110) == [1]
    ahead = {1: Beat(7, 12, 5)}  # it waits for this process, and is gone once its own patience is
    assert [waiting.lost(ahead, 1.0, 3.0) for _ in range(9)] == [[]] * 9
    frozen = {1: Beat(7, 11, 5)}
    assert not waiting.waits(Beat(6, 12, 5)) and waiting.waits(Beat(7, 12, 5))
    assert [waiting.lost(frozen, 1.0, 3.0) for _ in range(5)][-2:] == [[], [1]]  # it beats no more
    assert NEVER.total_seconds() * 1000 < 2**31  # else a store's poll() takes it for a negative number


@pytest.mark.thorough
def test_a_run_that_is_suspended_for_longer_than_the_timeout_goes_on(tmp_path: Path, small_config: Path) -> None:
    """As by `scontrol suspend`: all processes stop, the launcher too, and later all go on."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [ROOT / "train.py", "--config", small_config, "--output_dir", run, "--timeout_s", "3"]
    with (tmp_path / "log").open("wb") as log:
        child = subprocess.Popen(
            [*command, "--schedule.steps", "60"], env=environment(), stderr=log, start_new_session=True
        )
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").stat().st_size == 0:
        assert child.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.05)
    everyone = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
    for _ in range(2):
        for process in everyone:
            process.suspend()
        time.sleep(12)  # four times the limit
        for process in everyone:
            process.resume()
        time.sleep(1)
    assert child.wait(240) == 0, (tmp_path / "log").read_text()
    assert "was suspended for about 1" in (tmp_path / "log").read_text()
    assert json.loads((run / "summary.json").read_text())["steps"] == 60
