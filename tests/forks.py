"""Trainings by the dozen: each start is a process of its own, forked from one that has imported everything already.

`python tests/forks.py` reads one job a line (JSON) and answers with one line; the class `Forks` speaks to it. A start
costs a third of a second instead of ten, and nothing of an earlier one is left in it: a fork has its parent's memory,
and the parent never trains. So a kill here is a real SIGKILL, and several processes are a real gloo group.

What differs from train.py as a user starts it: a few hundred real images instead of 60,000, and no test images at the
end. The kills and launchers of `test_train.py` have neither difference.
"""

import contextlib
import functools
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fmnist.tracking.metrics_file import PERF_KEYS

ROOT = Path(__file__).resolve().parent.parent
TIME_LIMIT_S = 120
NUM_IMAGES = {"train": 230, "val": 150, "test": 10}  # 230 images in batches of 32: 7 steps an epoch, 6 images dropped
# Where a process can be struck, in the order of the loop. The step is the one being made, from 1.
MOMENTS = (
    "micro_batch",  # its last micro-batch is being made: gradients of the others wait, nothing is updated
    "update",  # weights, optimizer and moving average are new; nothing is logged
    "logged",  # logged and evaluated; not saved
    "saved",  # saved, where that is due
    "evaluation",  # within the evaluation, where one is due at this step
    "end",  # after the last save: nothing exported yet
    "exported",  # the weights to use are written, the summary is not
    "copied",  # the checkpoint of this step is copied and the next steps are under way; nothing of it is on the disk
    "written",  # likewise, and it is on the disk, all but its name
)


class Forks:
    """Start trainings.

    Args:
        env: more environment variables of every process.
    """

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",  # a process with threads cannot be forked safely
            "ACCELERATE_USE_CPU": "true",
            "PYTHONPATH": str(ROOT),
        }
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
            environment.pop(name, None)
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | dict(env or {}),
        )

    def start(self, directory: Path, config: Mapping[str, Any], processes: int = 1, **job: Any) -> list[int]:
        """Train until the end, or until struck.

        Args:
            directory: the run directory; a run in it goes on.
            config: sections and options that differ from the defaults.
            processes: how many.
            job: `strike`, a step and a moment of MOMENTS, at which `rank` (0) sends itself `signal` (SIGKILL);
                `record`, a file name to which the batches' hashes are appended; and `slow_disk`, the seconds that a
                save waits before it writes, and again before its checkpoint gets its name.

        Returns:
            each process's status as of subprocess: 0, or minus the number of the signal that ended it.

        Raises:
            AssertionError: a process ended otherwise than it was to end; with what it wrote.
        """
        assert self._server.stdin is not None and self._server.stdout is not None
        job |= {"directory": str(directory), "config": dict(config), "processes": processes}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        statuses = answer["statuses"]
        if "strike" in job and job.get("signal", signal.SIGKILL) == signal.SIGKILL:
            # The others lose their peer, and are killed too, as launchers do: either may come first.
            as_meant = statuses[job.get("rank", 0)] == -signal.SIGKILL and 0 not in statuses
        else:
            as_meant = statuses == [0] * processes
        assert as_meant, (job, statuses, answer["said"][-3000:])
        return statuses

    def close(self) -> None:
        """End the process that forks."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=60)


def digest(run: Path) -> dict[str, Any]:
    """Return all that a run leaves and the clock has no part in: hashes of tensors' files, metrics, states, summary."""
    left: dict[str, Any] = {}
    for path in sorted([*run.glob("checkpoints/*/*.safetensors"), run / "model.safetensors"]):
        left[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(run.glob("checkpoints/*/state.json")):
        state = json.loads(path.read_text())
        left[str(path.relative_to(run))] = {k: state[k] for k in ("step", "best_val", "best_step")}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    left["metrics.jsonl"] = [{k: v for k, v in line.items() if k not in PERF_KEYS} for line in lines]
    summary = json.loads((run / "summary.json").read_text())
    not_compared = (*PERF_KEYS, "train_seconds", "world_size", "git_revision")
    left["summary.json"] = {k: v for k, v in summary.items() if k not in not_compared}
    return left


def difference(run: Path, whole: Path) -> list[str]:
    """Name what differs between two finished runs; empty where every bit is equal."""
    one, other = digest(run), digest(whole)
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def serve() -> None:
    """Answer jobs until stdin ends."""
    import torch

    import fmnist.config.parse as options
    import fmnist.data.registry as registry
    import train  # noqa: F401 - imported once, for all forks

    torch.set_num_threads(1)
    options.load_config(options.DEFAULT_CONFIG)
    load = registry.load_indexed

    @functools.cache
    def few(name: str, root: str | None, val_size: int, fetch: bool = False) -> tuple[torch.Tensor, ...]:
        return tuple(part[: NUM_IMAGES[name]].clone() for part in load(name, root, 5000))

    registry.load_indexed = few
    for name in NUM_IMAGES:
        few(name, None, 5000)
    for line in sys.stdin:
        print(json.dumps(run_job(json.loads(line))), flush=True)
    os._exit(0)  # nothing to tidy up, and an interpreter with torch in it takes seconds to do so


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Make one start, and return the statuses of its processes and what they wrote."""
    log = Path(job["directory"] + ".log")
    log.unlink(missing_ok=True)
    return {"statuses": run_all(job["processes"], functools.partial(work, job, log)), "said": log.read_text()}


def free_socket() -> socket.socket:
    """Bind a port that nothing uses, below those that the system gives to connections: it is likely to stay free."""
    for port in random.Random().sample(range(15_000, 32_000), 100):
        bound = socket.socket()
        try:
            bound.bind(("127.0.0.1", port))
        except OSError:
            bound.close()
        else:
            return bound
    raise OSError("no free port")


def run_all(processes: int, work: Callable[[dict[str, str]], int], seconds: float = TIME_LIMIT_S) -> list[int]:
    """Fork processes and wait for them; where one is killed or fails, or the time is over, kill the others.

    Args:
        processes: how many.
        work: called in each with the variables that a launcher would set; returns the exit status.
        seconds: the time they have.

    Returns:
        each process's status as of subprocess.
    """
    with free_socket() as free:
        port = str(free.getsockname()[1])
    children = {}
    for rank in map(str, range(processes)):
        pid = os.fork()
        if pid == 0:
            status, world = 1, str(processes)
            launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            try:
                status = work(launched | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if processes > 1 else {})
            except BaseException:  # a fork must never go on in its parent's loop
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stderr.flush()
                os._exit(status)
        children[pid] = int(rank)
    statuses: list[Any] = [None] * processes
    deadline = time.monotonic() + seconds
    while None in statuses:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            statuses[children.pop(pid)] = os.waitstatus_to_exitcode(status)
        if (pid and status) or time.monotonic() > deadline:
            for child in children:
                os.kill(child, signal.SIGKILL)
        if not pid:
            time.sleep(0.002)
    return statuses


def work(job: dict[str, Any], log: Path, launched: dict[str, str]) -> int:
    """Train in this fork."""
    descriptor = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= launched
    try:
        train_here(job, int(launched.get("RANK", "0")))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def train_here(job: dict[str, Any], rank: int) -> None:
    """Train as train.py does, with what the job asks for."""
    import numpy
    import torch

    import fmnist.training.finish
    import train as entry
    from fmnist.config.conflicts import validate
    from fmnist.config.schema import Config

    # Whatever a start does not set itself is different in every start.
    random.seed(os.getpid())
    numpy.random.seed(os.getpid())
    torch.manual_seed(os.getpid())
    torch.rand(os.getpid() % 1000)

    default, options = Config(), {}
    for key, value in job["config"].items():
        options[key] = type(getattr(default, key))(**value) if isinstance(value, dict) else value
    if "size" in job["config"].get("augment", {}) and isinstance(job["config"]["augment"]["size"], dict):
        sizes = {int(epoch): size for epoch, size in job["config"]["augment"]["size"].items()}  # JSON's keys are text
        options["augment"] = type(default.augment)(**(job["config"]["augment"] | {"size": sizes}))
    cfg = Config(**options, output_dir=job["directory"])
    validate(cfg)
    fmnist.training.finish.evaluate_test = lambda *args: None
    if "slow_disk" in job:
        slow_down(job["slow_disk"])
    if "strike" in job and job.get("rank", 0) == rank:
        set_trap(*job["strike"], job.get("signal", signal.SIGKILL))
    if "record" in job:
        record_batches(Path(f"{job['record']}.{rank}"))
    entry.main(cfg)


def set_trap(step: int, moment: str, number: int) -> None:
    """Have this process send itself a signal at one step and moment."""
    import train as entry
    from fmnist.checkpoint.store import Checkpoints
    from fmnist.data.augment import Augment
    from fmnist.run import Run
    from fmnist.runtime.stop_vote import StopVote

    state: dict[str, Any] = {"step": 0, "micro_batches": 0}
    later = threading.Event()
    assert moment in MOMENTS

    def strike(now: str) -> None:
        if now == moment and (state["step"] == step or now in ("end", "exported")):
            os.kill(os.getpid(), number)

    real_step, real_augment, real_stop = entry.train_step, Augment.__call__, StopVote.__call__
    real_validate, real_lr, real_end, real_finish = entry.validate, entry.set_lr, entry.finish, Run.finish
    real_write, real_named = Checkpoints._write, Checkpoints._publish

    def set_lr(optimizer: Any, schedule: Any, done: int) -> float:
        strike("saved")  # of the step before
        state["step"] = done + 1
        return real_lr(optimizer, schedule, done)

    def augment(self: Any, batch: Any) -> Any:
        state["micro_batches"] -= 1
        if state["micro_batches"] == 0:
            strike("micro_batch")
        return real_augment(self, batch)

    def train_step(model: Any, optimizer: Any, micro_batches: Any, *args: Any) -> Any:
        state["micro_batches"] = len(micro_batches)
        metrics = real_step(model, optimizer, micro_batches, *args)
        strike("update")
        return metrics

    def validate(*args: Any) -> Any:
        strike("evaluation")
        return real_validate(*args)

    def should_stop(self: Any) -> bool:
        strike("logged")
        if state["step"] > step:
            later.set()
        return real_stop(self)

    def end(*args: Any) -> None:
        strike("saved")
        strike("end")
        later.set()
        real_end(*args)

    def finish(self: Any, summary: Any) -> None:
        strike("exported")
        real_finish(self, summary)

    def write(self: Any, part: Path, saved: Any, groups: Any) -> None:
        strike_save("copied", saved)
        real_write(self, part, saved, groups)

    def publish(self: Any, part: Path, final: Path, saved: Any) -> None:
        strike_save("written", saved)
        real_named(self, part, final, saved)

    def strike_save(now: str, saved: Any) -> None:
        if (now, saved.step) == (moment, step):
            later.wait(30)  # until the next step is done
            os.kill(os.getpid(), number)

    entry.train_step, entry.validate, entry.set_lr, entry.finish = train_step, validate, set_lr, end
    Checkpoints._write, Checkpoints._publish = write, publish
    Augment.__call__, StopVote.__call__, Run.finish = augment, should_stop, finish


def slow_down(seconds: float) -> None:
    """Let every save wait before it writes, and before its checkpoint gets its name."""
    from fmnist.checkpoint.store import Checkpoints

    def slowly(name: str) -> None:
        real = getattr(Checkpoints, name)

        def call(self: Any, *args: Any) -> None:
            time.sleep(seconds)
            real(self, *args)

        setattr(Checkpoints, name, call)

    slowly("_write")
    slowly("_publish")


def record_batches(path: Path) -> None:
    """Append one line for every image a step takes: [step, position in the global batch, hash of index and pixels]."""
    from fmnist.data.augment import Augment

    real = Augment.__call__

    def augment(self: Any, batch: Any) -> Any:
        images, targets = real(self, batch)
        if sys._getframe(1).f_globals["__name__"] == "fmnist.training.batch_pictures":  # looked at, not trained on
            return images, targets
        _, step, first = batch.key
        with path.open("a") as file:
            for i in range(len(images)):
                parts = (batch.indices[i], images[i].contiguous(), targets[i])
                seen = hashlib.sha256(b"".join(part.float().numpy().tobytes() for part in parts)).hexdigest()
                file.write(json.dumps([step, first + i, seen]) + "\n")
        return images, targets

    Augment.__call__ = augment


if __name__ == "__main__":
    serve()
