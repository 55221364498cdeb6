"""Compute and what surrounds the loop: contexts that close, stop votes, hardware peaks, traces."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import environment
from filelock import FileLock, Timeout
from torch import nn

from fmnist.checkpoint.contents import TrainState
from fmnist.config.parse import parse_config
from fmnist.config.schema import Config
from fmnist.data.fashion_mnist import INFO
from fmnist.models.flops import flops_per_image
from fmnist.network import build_network
from fmnist.run import Run
from fmnist.runtime.background import Background, join_all
from fmnist.runtime.compute import Compute
from fmnist.runtime.gradients import AllReduce, ShardSum
from fmnist.runtime.hardware import autocast, peak_flops
from fmnist.runtime.launcher import check_gpus, gpu_warning
from fmnist.runtime.stop_vote import STOP_SIGNALS, StopVote
from fmnist.training import build
from fmnist.training.clock import Clock
from fmnist.training.profile import SKIPPED, StepProfiler


def test_compute_knows_device_and_precision_and_closes_after_an_error() -> None:
    closed = []

    class Watched(Compute):
        def close(self) -> None:
            closed.append(True)
            super().close()

    with pytest.raises(KeyError), Watched(precision="fp32", seed=3) as compute:
        assert (compute.precision, compute.rank, compute.world_size, compute.is_main) == ("fp32", 0, 1, True)
        assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(3)))
        raise KeyError
    assert closed == [True]


def test_an_interpreter_that_ends_does_not_leave_its_work_undone(tmp_path: Path) -> None:
    program = (
        "import pathlib, time; from fmnist.runtime.background import Background\n"
        f"Background().start(lambda: (time.sleep(1), pathlib.Path({str(tmp_path / 'done')!r}).touch()))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, env=environment())
    assert (tmp_path / "done").exists()


def test_a_run_that_fails_keeps_its_lock_until_the_checkpoint_is_written(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    seen = []

    def write() -> None:
        time.sleep(0.5)
        with pytest.raises(Timeout):
            FileLock(tmp_path / "run/.lock").acquire(timeout=0)
        seen.append("locked")

    with pytest.raises(KeyError), Run(Config(), tmp_path / "run") as run:
        run.claim()
        run.writing.start(write)
        raise KeyError
    assert seen == ["locked"]
    with FileLock(tmp_path / "run/.lock").acquire(timeout=0):
        pass


def test_both_ways_to_sum_gradients_give_the_mean_over_the_global_batch() -> None:
    compute = Compute(precision="fp32")
    torch.manual_seed(0)
    x, y = torch.randn(8, 3), torch.randn(8, 1)
    expected = nn.Linear(3, 1)
    ((expected(x) - y) ** 2).mean().backward()
    for shards in (None, 4):
        model = nn.Linear(3, 1)
        model.load_state_dict(expected.state_dict())
        gather = compute.gather_shards
        gradients = AllReduce(model, compute.accelerator)
        if shards is not None:
            gradients = ShardSum(model, compute.accelerator, shards, gather)
        for part in gradients.over(model, list(range(4))):
            rows = slice(2 * part, 2 * part + 2)
            gradients.backward(((model(x[rows]) - y[rows]) ** 2).mean())
        total = gradients.total()
        assert float(total) == pytest.approx(float(((expected(x) - y) ** 2).mean().detach()), abs=1e-6)
        assert torch.allclose(model.weight.grad, expected.weight.grad, atol=1e-6)
        assert gradients.model is model


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_asks_for_a_stop_and_the_handlers_are_put_back(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # these tests themselves may run under nohup
    vote = StopVote(None, max_minutes=None, timeout_s=1)
    vote.watch_signals()
    assert vote() is False
    os.kill(os.getpid(), number)
    assert vote() is True and vote.last() is False and vote.reason == number.name
    vote.restore_signals()
    assert signal.getsignal(number) == signal.SIG_DFL
    signal.signal(number, before)


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        vote = StopVote(None, max_minutes=None, timeout_s=1)
        vote.watch_signals()
        os.kill(os.getpid(), signal.SIGHUP)
        assert vote() is False
        vote.restore_signals()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_several_processes_without_a_gpu_are_warned_unless_the_cpu_is_meant() -> None:
    line = "no GPU found: 4 processes compute on the CPU; set ACCELERATE_USE_CPU=true if that is intended"
    assert gpu_warning(4, 0, {}) == gpu_warning(4, 0, {"ACCELERATE_USE_CPU": "false"}) == line
    assert gpu_warning(4, 0, {"ACCELERATE_USE_CPU": "true"}) is gpu_warning(4, 4, {}) is gpu_warning(1, 0, {}) is None


@pytest.mark.parametrize(
    ("given", "found", "on_cpu", "refused"),
    [("2", 0, "", True), ("2", 2, "", False), ("2", 0, "true", False), ("0", 0, "", False), (None, 0, "", False)],
)
def test_a_job_with_gpus_that_torch_cannot_see_is_refused(
    given: str | None, found: int, on_cpu: str, refused: bool
) -> None:
    environ = {"ACCELERATE_USE_CPU": on_cpu} | ({"SLURM_GPUS_ON_NODE": given} if given else {})
    with pytest.raises(ValueError, match="^torch sees no GPU, and this job has 2 ") if refused else nullcontext():
        check_gpus(found, environ)


def test_more_processes_than_gpus_are_refused_before_they_meet() -> None:
    environ = {"WORLD_SIZE": "4", "LOCAL_RANK": "2"}
    check_gpus(3, environ)
    with pytest.raises(ValueError, match="process 2 of this machine has no GPU of its own: torch sees 2"):
        check_gpus(2, environ)
    check_gpus(2, environ | {"ACCELERATE_USE_CPU": "true"})
    check_gpus(0, environ)  # on the CPU, which is a warning
    check_gpus(1, {"LOCAL_RANK": "2"})  # left over of another run


def test_processes_that_each_see_their_own_gpu_alone_are_not_refused() -> None:
    environ = {"WORLD_SIZE": "4", "LOCAL_RANK": "3", "CUDA_VISIBLE_DEVICES": "3"}  # srun --gpus-per-task=1
    check_gpus(1, environ)
    check_gpus(1, environ | {"CUDA_VISIBLE_DEVICES": "GPU-5ebe9f43"})
    several, one_for_all = {"CUDA_VISIBLE_DEVICES": "0,1"}, {"TORCHELASTIC_RUN_ID": "none"}
    for found, change in ((2, several), (1, {"CUDA_VISIBLE_DEVICES": ""}), (1, one_for_all)):
        with pytest.raises(ValueError, match=f"process 3 of this machine has no GPU of its own: torch sees {found}"):
            check_gpus(found, environ | change)


@pytest.mark.parametrize(("step_s", "voted"), [(0.01, [1, 2, 12, 22]), (0.5, list(range(1, 26)))])
def test_quick_steps_vote_every_ten_and_long_ones_each_time(
    step_s: float, voted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    votes: list[int] = []
    now, call = 0.0, 0

    def all_reduce(vote: torch.Tensor, *_: object, **__: object) -> SimpleNamespace:
        votes.append(call)
        if other == call:  # another process was asked to stop
            vote[0] = signal.SIGUSR1
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr("fmnist.runtime.stop_vote.dist.all_reduce", all_reduce)
    monkeypatch.setattr("time.monotonic", lambda: now)
    for other in (0, voted[3]):
        votes.clear()
        vote, answers, call = StopVote(object(), max_minutes=None, timeout_s=1), [], 0
        for _ in range(25):
            now, call = now + step_s, call + 1
            answers.append(vote())
        assert votes == voted
        assert [number for number, answer in enumerate(answers, 1) if answer] == ([voted[3] + 1] if other else [])


def test_a_step_that_may_compile_is_waited_for_and_the_limit_shrinks_when_all_have_done_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heartbeat, joined = SimpleNamespace(limit_s=600.0), []
    monkeypatch.setattr("fmnist.runtime.stop_vote.dist.all_reduce", lambda *_, **__: SimpleNamespace(wait=int))
    monkeypatch.setattr("fmnist.runtime.stop_vote.dist.barrier", lambda **_: joined.append(heartbeat.limit_s))
    vote = StopVote(object(), max_minutes=None, timeout_s=45, heartbeat=heartbeat)
    vote.expect_compiling([-3, 4, 5, 8])
    limits = []  # of the steps, from the second
    for _ in range(9):
        vote()
        limits.append(heartbeat.limit_s)
    assert limits == [45, 45, 600, 600, 45, 45, 600, 45, 45]
    assert joined == [600, 600, 600]  # before it shrinks, each time


def test_the_time_limit_asks_for_a_stop() -> None:
    assert StopVote(None, max_minutes=0.0, timeout_s=1)() is True
    assert StopVote(None, max_minutes=60.0, timeout_s=1)() is False


def test_the_peak_is_of_the_most_specific_name_and_of_bf16_alone() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989.5e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA L40S", "bf16") == 362e12
    assert peak_flops("NVIDIA H200 NVL", "bf16") == 835e12
    for unknown in ("NVIDIA L40", "NVIDIA A10G", "NVIDIA A100 80GB PCIe MIG 1g.10gb", "NVIDIA RTX 4090 Laptop GPU"):
        assert peak_flops(unknown, "bf16") is None, unknown  # a part of its name is another card's
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp32") is None
    assert peak_flops("CPU (x86_64), 2 threads", "bf16") is None


def test_mfu_is_the_rate_over_what_the_peak_would_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    now, least = iter([0.0, 0.0, 2.0]), iter([0.1, 0.1, 0.3, 0.3])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = Clock(100, least_seconds=lambda: next(least))
    clock.start()
    for _ in range(4):
        clock.tick()
    # 4 steps of 100 images in 2 s, two of them of larger images: they would take 0.8 s at the peak
    whole = {"save_seconds": 0.0, "images_per_second_overall": 200.0, "share_outside_steps": 0.0}
    assert clock.read() == {"images_per_second": 200.0, "step_time_s": 0.5, "mfu": pytest.approx(0.4)} | whole


def test_the_mfu_of_a_run_that_grows_is_of_the_size_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "peak_flops", lambda *_: 1e12)
    cfg = parse_config(["--schedule.epochs", "5"])
    model, augment = build_network(cfg, INFO, torch.device("cpu"), load_weights=False)
    run = SimpleNamespace(device_name="", precision="", world_size=2)
    loader, state = SimpleNamespace(staging=None, steps_per_epoch=10), TrainState()
    clock = build._clock(cfg, state, model, augment, loader, run)  # type: ignore[arg-type]
    assert clock._least_seconds is not None and augment.sizes == {0: 20, 4: 28}
    for step, size in ((1, 20), (40, 20), (41, 28), (50, 28)):
        state.step = step
        flops = cfg.batch.global_batch_size * flops_per_image(model, 1, size)[1]
        assert clock._least_seconds() == pytest.approx(flops / 2e12)


def test_the_clock_tells_what_validations_and_saves_take(monkeypatch: pytest.MonkeyPatch) -> None:
    # made 0, started 1, paused 3, saved 4 to 5, on again at 6, read at 8; after the loop saved 9 to 11
    now = iter([0.0, 1.0, 3.0, 4.0, 5.0, 6.0, 8.0, 9.0, 11.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    waits: list[str] = []
    clock = Clock(100, total_seconds=50.0, synchronize=lambda: waits.append("device"))
    assert set(clock.summary().values()) == {None}
    clock.start()
    for _ in range(4):
        clock.tick()
    with clock.paused(), clock.saving():
        assert waits == ["device"]  # what a validation would wait for is the time of steps
    # 4 steps of 100 images in 2 + 2 s of training, 7 s in all
    assert clock.read() == pytest.approx(
        {"images_per_second": 100.0, "step_time_s": 1.0, "save_seconds": 1.0}
        | {"images_per_second_overall": 400 / 7, "share_outside_steps": 3 / 7}
    )
    with clock.saving():
        pass
    assert clock.summary() == pytest.approx(
        {"images_per_second": 100.0, "save_seconds": 3.0}
        | {"images_per_second_overall": 40.0, "share_outside_steps": 0.6}
    )
    assert clock.total_seconds == 54.0


def test_work_beside_the_steps_that_fails_asks_for_a_stop_and_is_raised_where_it_is_waited_for() -> None:
    vote, held, done = StopVote(None, max_minutes=None, timeout_s=1), threading.Event(), []
    background = Background(vote.give_up)

    def work(fail: bool) -> None:
        held.wait(30)
        done.append(fail)
        if fail:
            raise OSError("the disk is full")

    background.wait()  # nothing is under way
    background.start(work, False)
    assert not done and not vote()  # it goes on beside
    held.set()
    background.wait()
    background.start(work, True)
    join_all(30)
    assert done == [False, True] and vote() and vote.reason == ""  # what failed is said by who waits
    background.join()
    with pytest.raises(OSError, match="the disk is full"):
        background.wait()
    background.wait()


def test_autocast_is_of_the_dtype_that_the_images_have() -> None:
    weight = torch.ones(2, 2)
    for dtype in (torch.float32, torch.bfloat16):
        with autocast(torch.device("cpu"), dtype):
            assert (weight @ weight).dtype == dtype


def test_a_profile_writes_a_trace_and_a_table_of_the_steps_asked_for(tmp_path: Path) -> None:
    profiler = StepProfiler(2, tmp_path / "profile", torch.device("cpu"))
    silent = StepProfiler(None, tmp_path / "none", torch.device("cpu"))
    for _ in range(SKIPPED + 4):
        torch.ones(20, 20) @ torch.ones(20, 20)
        profiler.step()
        silent.step()
    trace = json.loads((tmp_path / "profile" / "trace.json").read_text())
    products = [event for event in trace["traceEvents"] if event.get("name") == "aten::mm"]
    assert len(products) == 2
    assert "aten::mm" in (tmp_path / "profile" / "table.txt").read_text()
    assert not (tmp_path / "none").exists()


def test_a_profile_that_the_run_ends_within_is_written_as_far_as_it_came(tmp_path: Path) -> None:
    profiler = StepProfiler(5, tmp_path, torch.device("cpu"))
    for _ in range(SKIPPED + 2):
        torch.ones(20, 20) @ torch.ones(20, 20)
        profiler.step()
    profiler.close()
    profiler.close()
    assert "aten::mm" in (tmp_path / "table.txt").read_text()
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize(("steps", "said"), [(SKIPPED - 1, "9 steps"), (1, "1 step"), (SKIPPED + 1, "")])
def test_a_start_that_ends_before_the_traced_steps_says_that_nothing_is_written(
    steps: int, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    profiler = StepProfiler(5, tmp_path / "profile", torch.device("cpu"))
    for _ in range(steps):
        profiler.step()
    profiler.close()
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert lines == [f"profile: nothing is written: it traces after 10 steps; this start had {said}"] * bool(said)
    assert (tmp_path / "profile").exists() == (not said)


def test_a_refused_process_count_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMNIST_EXPECTED_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="1 process"):
        Compute(precision="fp32")
    monkeypatch.delenv("FMNIST_EXPECTED_WORLD_SIZE")
    with Compute(precision="bf16") as compute:  # not that of the refused one
        assert compute.precision == "bf16"


def test_speed_is_unknown_where_nothing_was_timed() -> None:
    clock = Clock(100)
    assert clock.median_rate() is None
    clock.rates = [7.0, 100.0, 200.0]
    assert clock.median_rate() == 150.0  # the first is the warm-up
